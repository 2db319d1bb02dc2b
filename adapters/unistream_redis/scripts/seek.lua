-- Move a group that nobody is joined to.
-- KEYS: members, then streams
-- ARGV: group, alive for ms, then for each stream: where to start, its due set, its held set
-- Returns: 1, or 0 while members are joined
local members, group = KEYS[1], ARGV[1]
if redis.call('ZCOUNT', members, now_ms() - tonumber(ARGV[2]), '+inf') > 0 then return 0 end
for at = 2, #KEYS do
  if not group_info(KEYS[at], group) then return redis.error_reply('NOGROUP no such group') end
end
for at = 2, #KEYS do
  local first = 3 * (at - 2) + 3
  -- Destroying it is the one way to end all loans in constant time.
  redis.call('XGROUP', 'DESTROY', KEYS[at], group)
  place(KEYS[at], group, ARGV[first])
  redis.call('DEL', ARGV[first + 1], ARGV[first + 2])
end
return 1
