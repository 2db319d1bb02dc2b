-- Let loans that this member still holds last for some time from now on.
-- KEYS: stream, held, lost
-- ARGV: group, member, idle ms to set, ms beyond the lease or 0, lease ms, then (id, count)
-- Returns: the index from 0 of each refused one
local stream, held, lost = unpack(KEYS)
local group, member, idle, beyond = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local refused = {}
local now = now_ms()
for at = 6, #ARGV, 2 do
  local entry = redis.call('XPENDING', stream, group, ARGV[at], ARGV[at], 1, member)[1]
  local holds = entry and entry[4] == tonumber(ARGV[at + 1])
  if holds and #redis.call('XCLAIM', stream, group, member, 0, ARGV[at], 'IDLE', idle, 'JUSTID') == 0 then
    -- Its payload was removed; Redis >= 7.0 drops such an entry from the group when it is claimed.
    redis.call('HINCRBY', lost, group, 1)
    holds = false
  end
  if holds then
    if beyond > 0 then
      redis.call('ZADD', held, now + tonumber(ARGV[5]) + beyond, ARGV[at])
    else
      redis.call('ZREM', held, ARGV[at])
    end
  else
    refused[#refused + 1] = (at - 6) / 2
  end
end
return refused
