-- What a member does now and then: say that it lives, lend what is due, and, one member at a time, look for loans that
-- ended and for settled entries to remove.
-- KEYS: stream, due, held, lost, members, lock
-- ARGV: group, member, limit, lease ms, sweep every ms, alive for ms, max_age ms or -1, max_messages or -1, trim, acked
-- Returns: now, when the next one is due or -1, entries lost (-1: too many to count), whether the only entry is a
--          suspect, entries, attempts
local stream, due, held, lost, members, lock = unpack(KEYS)
local group, member, limit, lease = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local alive_for = tonumber(ARGV[6])
local now = now_ms()
local gone = 0

-- Entries whose time is up are parked as suspects ('!' in front), so that any member can take them, one alone.
local function collect(consumer)
  for _, entry in ipairs(redis.call('XPENDING', stream, group, 'IDLE', lease, '-', '+', 1000, consumer)) do
    local id = entry[1]
    local until_ms = redis.call('ZSCORE', held, id)
    if not until_ms or tonumber(until_ms) <= now then
      redis.call('ZREM', held, id)
      park(stream, due, lost, group, id, '!' .. id, now)
    end
  end
end

local function repair()
  for _, entry in ipairs(redis.call('XPENDING', stream, group, '-', '+', 10000, PARKED)) do
    if not redis.call('ZSCORE', due, '!' .. entry[1]) then redis.call('ZADD', due, 'NX', now, entry[1]) end
  end
end

local function sweep()
  local summary = redis.call('XPENDING', stream, group)
  local parked = 0
  if summary[1] > 0 then
    for _, consumer in ipairs(summary[4]) do
      if consumer[1] == PARKED then parked = tonumber(consumer[2]) else collect(consumer[1]) end
    end
  end
  if parked > redis.call('ZCARD', due) then repair() end
  redis.call('ZREMRANGEBYSCORE', members, '-inf', now - alive_for)
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local consumer = map(flat)
    if consumer['pending'] == 0 and consumer['name'] ~= PARKED and not redis.call('ZSCORE', members, consumer['name']) then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer['name'])
    end
  end
  local max_age, max_messages = tonumber(ARGV[7]), tonumber(ARGV[8])
  if ARGV[9] == '1' then
    trim_settled(stream, ARGV[10] == '1')
  elseif max_age >= 0 or max_messages >= 0 then
    retain(stream, lost, max_age, max_messages, now)
  end
  account(stream, lost)
end

local function lend()
  local entries, counts, suspect = {}, {}, 0
  if limit == 0 then return entries, counts, suspect end
  for _, name in ipairs(redis.call('ZRANGE', due, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)) do
    local dangerous = string.sub(name, 1, 1) == '!'
    if dangerous and #entries > 0 then break end
    local id = dangerous and string.sub(name, 2) or name
    redis.call('ZREM', due, name)
    local pending = redis.call('XPENDING', stream, group, id, id, 1)
    if #pending == 1 and pending[1][2] == PARKED then
      local count = pending[1][4] + 1
      local claimed = redis.call('XCLAIM', stream, group, member, 0, id, 'RETRYCOUNT', count)
      if #claimed == 1 then
        entries[#entries + 1] = claimed[1]
        counts[#counts + 1] = count
        if dangerous then
          suspect = 1
          break
        end
      else
        gone = gone + 1
      end
    end
  end
  return entries, counts, suspect
end

redis.call('ZADD', members, now, member)
if redis.call('SET', lock, member, 'NX', 'PX', ARGV[5]) then sweep() end
local entries, counts, suspect = lend()
local counted = take_lost(lost, group)
gone = counted < 0 and -1 or gone + counted
local next_due = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
return { now, next_due[2] and tonumber(next_due[2]) or -1, gone, suspect, entries, counts }
