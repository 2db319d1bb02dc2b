-- Shared by every script of this package: it is put in front of each of them.

local PARKED = '~parked'  -- the consumer that holds what is to be lent again; no member can have this name

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function map(flat)
  local result = {}
  for i = 1, #flat, 2 do result[flat[i]] = flat[i + 1] end
  return result
end

local function id_before(left, right)
  local left_ms, left_seq = string.match(left, '^(%d+)-(%d+)$')
  local right_ms, right_seq = string.match(right, '^(%d+)-(%d+)$')
  if left_ms ~= right_ms then return tonumber(left_ms) < tonumber(right_ms) end
  return tonumber(left_seq) < tonumber(right_seq)
end

local function id_after(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return ms .. '-' .. string.format('%.0f', tonumber(seq) + 1)
end

-- The group at `stream` as XINFO tells it, or nil.
local function group_info(stream, group)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = map(flat)
    if info['name'] == group then return info end
  end
  return nil
end

-- Keep an entry for later: the reserved consumer holds it, the sorted set says when it is due.
-- JUSTID leaves the delivery count alone, RETRYCOUNT sets it. Claiming an entry whose payload was removed drops it from
-- the group instead (Redis >= 7.0): then it is lost.
local function park(stream, due, lost, group, id, member, at, count)
  local claimed
  if count then
    claimed = redis.call('XCLAIM', stream, group, PARKED, 0, id, 'RETRYCOUNT', count, 'JUSTID')
  else
    claimed = redis.call('XCLAIM', stream, group, PARKED, 0, id, 'JUSTID')
  end
  if #claimed == 1 then
    redis.call('ZADD', due, at, member)
  else
    redis.call('HINCRBY', lost, group, 1)
  end
end

-- Redis 7.0 neither writes to its append-only file nor tells its replicas how many entries a group was given: after a
-- restart or a failover entries-read is too low (seen on 7.0.15; right on 8.2.3). So in a new run of the server all counters
-- of a stream are forgotten; Redis counts anew once the group has reached the end.
local function trust(stream)
  local server = redis.call('INFO', 'server')
  local major, minor = string.match(server, 'redis_version:(%d+)%.(%d+)')
  if tonumber(major) * 100 + tonumber(minor) >= 802 then return end
  local run, known = string.match(server, 'run_id:(%w+)'), string.gsub(stream, 'stream$', 'run')
  if redis.call('GET', known) == run then return end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = map(flat)
    redis.call('XGROUP', 'SETID', stream, group['name'], group['last-delivered-id'])
  end
  redis.call('SET', known, run)
end

-- Find what was removed before a group read it, and make the group's counter agree with what is there. Entries that
-- were removed are the first ones of the stream, so a group that read fewer than were removed has lost the rest.
-- A group has no counter (entries-read is null) while it is in the middle of the stream after it was placed there, or after
-- `trust` forgot it.
-- A group whose place is within what is there has lost nothing, whatever its counter says.
local function account(stream, lost)
  trust(stream)
  local info = map(redis.call('XINFO', 'STREAM', stream))
  local removed = info['entries-added'] - info['length']
  if removed == 0 then return end
  local first = info['length'] == 0 and info['last-generated-id'] or info['recorded-first-entry-id']
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = map(flat)
    local read = group['entries-read']
    if read and read < removed then
      if id_before(group['last-delivered-id'], first) then
        redis.call('HINCRBY', lost, group['name'], removed - read)
      end
      redis.call('XGROUP', 'SETID', stream, group['name'], group['last-delivered-id'], 'ENTRIESREAD', removed)
    end
  end
end

local COUNT_AT_MOST = 10000  -- entries; counting more of them would hold up the server

-- Remove all entries below an id, and count what each group loses by it; '<group>~' says that there was more than that.
local function cut(stream, lost, min_id)
  account(stream, lost)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = map(flat)
    if not group['entries-read'] and id_before(group['last-delivered-id'], min_id) then
      local first = '(' .. group['last-delivered-id']
      local count = #redis.call('XRANGE', stream, first, '(' .. min_id, 'COUNT', COUNT_AT_MOST + 1)
      if count > COUNT_AT_MOST then
        redis.call('HSET', lost, group['name'] .. '~', 1)
      elseif count > 0 then
        redis.call('HINCRBY', lost, group['name'], count)
      end
    end
  end
  if redis.call('XTRIM', stream, 'MINID', '=', min_id) > 0 then account(stream, lost) end
end

-- Remove what a declared retention lets go.
local function retain(stream, lost, max_age, max_messages, now)
  if max_age >= 0 then cut(stream, lost, string.format('%.0f-0', math.max(0, now - max_age))) end
  local excess = max_messages >= 0 and redis.call('XLEN', stream) - max_messages or 0
  while excess > 0 do
    local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', math.min(excess, COUNT_AT_MOST) + 1)
    if excess == redis.call('XLEN', stream) then oldest[#oldest + 1] = { id_after(oldest[#oldest][1]) } end
    cut(stream, lost, oldest[#oldest][1])
    excess = excess - (#oldest - 1)
  end
end

-- What a group lost since this was last asked, or -1 if that is more than could be counted.
local function take_lost(lost, group)
  local count = tonumber(redis.call('HGET', lost, group) or 0)
  if redis.call('HDEL', lost, group .. '~') == 1 then count = -1 end
  redis.call('HDEL', lost, group)
  return count
end

-- Remove what every group has settled. Without a group nothing is removed: a later one may start at the earliest.
-- Whole nodes only (some 100 entries), which costs next to nothing. Where an unsettled entry holds back many settled
-- ones behind it, Redis >= 8.2 (`acked`) can remove these too; its ACKED does nothing together with `~` (seen on 8.2.3).
local HELD_BACK = 1000

local function trim_settled(stream, acked)
  local oldest, delivered, pending = nil, nil, 0
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = map(flat)
    local last, first = group['last-delivered-id'], group['last-delivered-id']
    if group['pending'] > 0 then first = redis.call('XPENDING', stream, group['name'])[2] end
    if not oldest or id_before(first, oldest) then oldest = first end
    if not delivered or id_before(last, delivered) then delivered = last end
    pending = pending + group['pending']
  end
  if not oldest or delivered == '0-0' then return end
  redis.call('XTRIM', stream, 'MINID', '~', oldest)
  if acked and oldest ~= delivered and pending <= HELD_BACK then
    local between = #redis.call('XRANGE', stream, oldest, delivered, 'COUNT', pending + HELD_BACK)
    if between == pending + HELD_BACK then redis.call('XTRIM', stream, 'MINID', '=', delivered, 'ACKED') end
  end
end

-- Place a group: `at` is '$', '0', or the id before the first one wanted. Returns the XGROUP arguments that make its
-- counter right, so that lag is exact; a middle of a long stream would take too long to count.
local function counter(stream, at)
  local info = map(redis.call('XINFO', 'STREAM', stream))
  if at == '$' then return { 'ENTRIESREAD', info['entries-added'] } end
  if at == '0' then return { 'ENTRIESREAD', info['entries-added'] - info['length'] } end
  if info['length'] > COUNT_AT_MOST then return {} end
  local behind = #redis.call('XRANGE', stream, '(' .. at, '+')
  return { 'ENTRIESREAD', info['entries-added'] - behind }
end

local function place(stream, group, at)
  trust(stream)
  -- Beyond the end is the end: a group gets what is published after its creation, whatever the clocks say.
  if at ~= '$' and at ~= '0' and id_before(map(redis.call('XINFO', 'STREAM', stream))['last-generated-id'], at) then
    at = '$'
  end
  redis.call('XGROUP', 'CREATE', stream, group, at, unpack(counter(stream, at)))
end

-- Entries that a group has not been given yet, and those it holds and that are still there.
local function backlog(stream, group, info, at_most)
  local added, length, read = info['entries-added'], info['length'], group['entries-read']
  local unread
  if group['last-delivered-id'] == info['last-generated-id'] then
    unread = 0  -- whatever the counter says
  elseif read then
    unread = math.min(length, added - read)
  elseif group['lag'] then
    unread = math.min(length, group['lag'])
  else
    unread = #redis.call('XRANGE', stream, '(' .. group['last-delivered-id'], '+', 'COUNT', at_most)
    if unread > COUNT_AT_MOST then
      -- As many as there would be if messages came evenly.
      local first, last = string.match(info['recorded-first-entry-id'], '%d+'), string.match(info['last-generated-id'], '%d+')
      local here = string.match(group['last-delivered-id'], '%d+')
      local share = (tonumber(last) - tonumber(here)) / math.max(1, tonumber(last) - tonumber(first))
      unread = math.max(unread, math.floor(length * math.min(1, share)))
    end
  end
  local pending = group['pending']
  if pending > 0 and length < added then
    local first = info['recorded-first-entry-id']
    if length == 0 then
      pending = 0
    elseif id_before(redis.call('XPENDING', stream, group['name'])[2], first) then
      pending = pending - #redis.call('XPENDING', stream, group['name'], '-', '(' .. first, pending)
    end
  end
  return unread, pending
end

-- Let an ownership last so many ms at least: what is lent is lent as long as its partition is owned, so nothing shortens it.
local function own_at_least(owner, ms)
  if redis.call('PTTL', owner) < ms then redis.call('PEXPIRE', owner, ms) end
  return 1
end
