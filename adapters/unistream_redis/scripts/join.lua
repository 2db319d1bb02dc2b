-- Become a member of a group.
-- KEYS: members, then streams
-- ARGV: group, member
for at = 2, #KEYS do redis.call('XGROUP', 'CREATECONSUMER', KEYS[at], ARGV[1], ARGV[2]) end
redis.call('ZADD', KEYS[1], now_ms(), ARGV[2])
return 1
