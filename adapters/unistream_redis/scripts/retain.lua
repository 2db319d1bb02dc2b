-- Remove what a declared retention lets go, from the publishing side: at most once in a while.
-- KEYS: stream, lost, lock
-- ARGV: max_age ms or -1, max_messages or -1, every ms
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[3]) then
  retain(KEYS[1], KEYS[2], tonumber(ARGV[1]), tonumber(ARGV[2]), now_ms())
end
return 1
