-- What the owner of a partition of an ordered group does with it; nothing happens unless it still is the owner.
-- KEYS: for each partition: stream, owner, due, lost
-- ARGV: group, what to do, for how many ms what it lends is lent, then its arguments (see below)
-- Returns: for each partition in turn, false where another member owns it
local group, action, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local OWNER = '~owner'  -- the one consumer of an ordered group: whoever owns a partition finds what is pending there

local function key_of(fields)
  for at = 1, #fields, 2 do
    if fields[at] == 'unistream-key' then return fields[at + 1] end
  end
  return false
end

local function pending(stream, id)
  return redis.call('XPENDING', stream, group, id, id, 1, OWNER)[1]
end

-- What is pending from an id on: the id last delivered, then (id, count, when due or false, key or false) in order.
local function load(stream, due, lost, from)
  local entries = { group_info(stream, group)['last-delivered-id'] }
  for _, entry in ipairs(redis.call('XPENDING', stream, group, from, '+', 1000000, OWNER)) do
    local id = entry[1]
    local found = redis.call('XRANGE', stream, id, id)[1]
    if found then
      entries[#entries + 1] = { id, entry[4], redis.call('ZSCORE', due, id), key_of(found[2]) }
    else
      redis.call('XACK', stream, group, id)
      redis.call('HINCRBY', lost, group, 1)
    end
  end
  return entries
end

-- Lend entries that are pending already, with the count given; false for one whose payload is gone.
local function lend(stream, due, lost, first, last)
  local entries = {}
  for at = first, last, 2 do
    redis.call('ZREM', due, ARGV[at])
    local claimed = {}
    if pending(stream, ARGV[at]) then
      claimed = redis.call('XCLAIM', stream, group, OWNER, 0, ARGV[at], 'RETRYCOUNT', ARGV[at + 1])
      if #claimed == 0 then redis.call('HINCRBY', lost, group, 1) end
    end
    entries[#entries + 1] = claimed[1] or false
  end
  return entries
end

-- Fetched, but not lent yet: the count is 0 until it is.
local function hold(stream, first, last)
  for at = first, last do
    redis.call('XCLAIM', stream, group, OWNER, 0, ARGV[at], 'RETRYCOUNT', 0, 'JUSTID')
  end
  return 1
end

-- A due time, also one that has passed, says that the member gave word; without it a lent entry is a suspect.
local function settle(stream, due, lost, first, last)
  local acks = tonumber(ARGV[first])
  local at = first + 1
  for from = at, at + acks - 1, 1000 do
    redis.call('XACK', stream, group, unpack(ARGV, from, math.min(from + 999, at + acks - 1)))
  end
  local now = now_ms()
  local gone = {}
  for from = at + acks, last, 3 do
    local id = ARGV[from]
    if not pending(stream, id) then
      gone[#gone + 1] = id  -- an earlier settle, whose answer was lost, acked it
    elseif #redis.call('XCLAIM', stream, group, OWNER, 0, id, 'RETRYCOUNT', ARGV[from + 1], 'JUSTID') == 0 then
      redis.call('HINCRBY', lost, group, 1)
      gone[#gone + 1] = id
    else
      redis.call('ZADD', due, now + tonumber(ARGV[from + 2]), id)
    end
  end
  return gone
end

-- ARGV: most entries, then for each partition its fence.
-- The others: then for each partition its fence, the number of its arguments, and these.
local answers = {}
local room, at = nil, 4
if action == 'read' then
  room = tonumber(ARGV[4])
  at = 5
end
for key = 1, #KEYS, 4 do
  local stream, owner, due, lost = KEYS[key], KEYS[key + 1], KEYS[key + 2], KEYS[key + 3]
  local mine = redis.call('GET', owner) == ARGV[at]
  local answer = false
  if mine and (action == 'read' or action == 'lend') then own_at_least(owner, lease) end
  if action == 'read' then
    if mine then
      answer = {}
      if room > 0 then
        local reply = redis.call('XREADGROUP', 'GROUP', group, OWNER, 'COUNT', room, 'STREAMS', stream, '>')
        if reply then answer = reply[1][2] end
        room = room - #answer
      end
    end
    at = at + 1
  else
    local first, last = at + 2, at + 1 + tonumber(ARGV[at + 1])
    if mine then
      if action == 'load' then answer = load(stream, due, lost, ARGV[first])
      elseif action == 'lend' then answer = lend(stream, due, lost, first, last)
      elseif action == 'hold' then answer = hold(stream, first, last)
      elseif action == 'settle' then answer = settle(stream, due, lost, first, last)
      elseif action == 'renew' then answer = own_at_least(owner, lease)
      elseif action == 'leave' then answer = redis.call('DEL', owner)
      end
    end
    at = last + 1
  end
  answers[#answers + 1] = answer
end
return answers
