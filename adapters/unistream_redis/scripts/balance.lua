-- What a member of an ordered group does now and then: say that it lives, renew the partitions it owns, take free ones up
-- to its share, and trim what it owns.
-- KEYS: members, then for each partition: stream, owner, epoch, lost, sweep lock
-- ARGV: group, member, lease ms, alive for ms, trim every ms, max_age ms or -1, max_messages or -1, trim, acked,
--       then for each partition the fence of this member, or '' where it owns none
-- Returns: share, entries lost (-1: too many to count), members alive, index from 0 of each partition lost,
--          (index, fence) of each one taken
local members = KEYS[1]
local group, member, lease, alive_for = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local max_age, max_messages = tonumber(ARGV[6]), tonumber(ARGV[7])
local partitions = (#KEYS - 1) / 5
local now = now_ms()
for at = 2, #KEYS, 5 do
  if redis.call('EXISTS', KEYS[at]) == 0 or not group_info(KEYS[at], group) then
    return redis.error_reply('NOGROUP no such group')
  end
end
redis.call('ZREMRANGEBYSCORE', members, '-inf', now - alive_for)
redis.call('ZADD', members, now, member)

-- Each member knows its share from the sorted names alone, so that all of them agree without talking.
local names = redis.call('ZRANGE', members, 0, -1)
table.sort(names)
local rank = 0
for at, name in ipairs(names) do
  if name == member then rank = at - 1 end
end
local share = math.floor(partitions / #names)
if rank < partitions % #names then share = share + 1 end

local gone, owned, lost, taken = 0, 0, {}, {}
for index = 0, partitions - 1 do
  local at, fence = 2 + 5 * index, ARGV[10 + index]
  if fence ~= '' then
    if redis.call('GET', KEYS[at + 1]) == fence then
      own_at_least(KEYS[at + 1], lease)
      owned = owned + 1
      if redis.call('SET', KEYS[at + 4], member, 'NX', 'PX', ARGV[5]) then
        if ARGV[8] == '1' then
          trim_settled(KEYS[at], ARGV[9] == '1')
        elseif max_age >= 0 or max_messages >= 0 then
          retain(KEYS[at], KEYS[at + 3], max_age, max_messages, now)
        end
        account(KEYS[at], KEYS[at + 3])
      end
      local counted = take_lost(KEYS[at + 3], group)
      gone = (counted < 0 or gone < 0) and -1 or gone + counted
    else
      lost[#lost + 1] = index
    end
  end
end
for index = 0, partitions - 1 do
  local at = 2 + 5 * index
  if ARGV[10 + index] == '' then
    local fence = redis.call('GET', KEYS[at + 1])
    -- Its own without knowing it: the answer that told so was lost.
    local mine = fence and string.sub(fence, 1, #member + 1) == member .. ':'
    if not fence and owned < share then
      fence = member .. ':' .. redis.call('INCR', KEYS[at + 2])
      mine = true
    end
    if mine then
      redis.call('SET', KEYS[at + 1], fence, 'PX', lease)
      account(KEYS[at], KEYS[at + 3])
      owned = owned + 1
      taken[#taken + 1] = index
      taken[#taken + 1] = fence
    end
  end
end
return { share, gone, #names, lost, taken }
