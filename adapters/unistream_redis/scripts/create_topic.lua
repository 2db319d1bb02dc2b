-- Create a topic if it does not exist.
-- KEYS: meta, groups, then streams
-- ARGV: format, then field, value, …
-- Returns: the record as it stands
local meta, groups = KEYS[1], KEYS[2]
local there = true
for at = 3, #KEYS do
  if redis.call('EXISTS', KEYS[at]) == 0 then there = false end
end
if redis.call('EXISTS', meta) == 1 then
  local record = redis.call('HGETALL', meta)
  if map(record)['format'] ~= ARGV[1] then return record end
  if there then return record end
  -- Somebody removed the stream, and its groups with it; their records describe nothing.
  redis.call('DEL', meta, groups)
end
for at = 3, #KEYS do
  if redis.call('EXISTS', KEYS[at]) == 0 then
    redis.call('XGROUP', 'CREATE', KEYS[at], PARKED, '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', KEYS[at], PARKED)
  end
end
redis.call('HSET', meta, 'format', unpack(ARGV))
return redis.call('HGETALL', meta)
