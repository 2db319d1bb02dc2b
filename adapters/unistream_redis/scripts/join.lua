-- Become a member of a group.
-- KEYS: members, then each stream with its 'lost' hash
-- ARGV: group, member
for at = 2, #KEYS, 2 do
  redis.call('XGROUP', 'CREATECONSUMER', KEYS[at], ARGV[1], ARGV[2])
  account(KEYS[at], KEYS[at + 1])
end
redis.call('ZADD', KEYS[1], now_ms(), ARGV[2])
return 1
