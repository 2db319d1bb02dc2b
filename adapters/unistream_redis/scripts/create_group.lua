-- Create a group if it does not exist, pinned at its start in every stream.
-- KEYS: groups, ephemeral, then streams
-- ARGV: name, record ('' for an ephemeral group), then where to start in each stream
-- Returns: 0 if there is no such topic, else the record as it stands
local groups, name, record = KEYS[1], ARGV[1], ARGV[2]
for at = 3, #KEYS do
  if redis.call('EXISTS', KEYS[at]) == 0 then return 0 end
end
for at = 3, #KEYS do
  if not group_info(KEYS[at], name) then place(KEYS[at], name, ARGV[at]) end
end
if record == '' then
  redis.call('ZADD', KEYS[2], now_ms(), name)
  return record
end
redis.call('HSETNX', groups, name, record)
return redis.call('HGET', groups, name)
