-- Delete groups with everything that belongs to them.
-- KEYS: groups, ephemeral, then streams
-- ARGV: prefix of each stream's keys, …, then '', then names
local prefixes, at = {}, 1
while ARGV[at] ~= '' do
  prefixes[at] = ARGV[at]
  at = at + 1
end
for name = at + 1, #ARGV do
  for index, prefix in ipairs(prefixes) do
    if redis.call('EXISTS', KEYS[index + 2]) == 1 then
      redis.call('XGROUP', 'DESTROY', KEYS[index + 2], ARGV[name])
    end
    for _, kind in ipairs({ 'due:', 'held:', 'members:', 'owner:', 'epoch:', 'sweep:' }) do
      redis.call('DEL', prefix .. kind .. ARGV[name])
    end
    redis.call('HDEL', prefix .. 'lost', ARGV[name], ARGV[name] .. '~')
  end
  redis.call('HDEL', KEYS[1], ARGV[name])
  redis.call('ZREM', KEYS[2], ARGV[name])
end
return #ARGV - at
