-- Give back what was lent to this member and never reached it (or was not taken): all of its pending entries but
-- `keep`, without spending an attempt. On leaving, forget the member, if it holds nothing.
-- KEYS: stream, due, members, lost
-- ARGV: group, member, leave ('1' or '0'), then the ids to keep
-- Returns: how many were given back
local stream, due, members, lost = unpack(KEYS)
local group, member = ARGV[1], ARGV[2]
local kept = {}
for at = 4, #ARGV do kept[ARGV[at]] = true end
local now, given = now_ms(), 0
local holds = 0
for _, entry in ipairs(redis.call('XPENDING', stream, group, '-', '+', 1000000, member)) do
  if kept[entry[1]] then
    holds = holds + 1
  else
    park(stream, due, lost, group, entry[1], entry[1], now, math.max(0, entry[4] - 1))
    given = given + 1
  end
end
if ARGV[3] == '1' then
  redis.call('ZREM', members, member)
  if holds == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, group, member) end
end
return given
