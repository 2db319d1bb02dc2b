-- Delete a topic with everything that belongs to it.
-- KEYS: meta, groups, ephemeral, then streams
-- ARGV: prefix of the topic's keys, then the prefix of each stream's keys
local names = redis.call('HKEYS', KEYS[2])
for at = 4, #KEYS do
  if redis.call('EXISTS', KEYS[at]) == 1 then
    for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[at])) do names[#names + 1] = map(flat)['name'] end
  end
end
for at = 1, #ARGV do
  for _, name in ipairs(names) do
    for _, kind in ipairs({ 'due:', 'held:', 'members:', 'owner:', 'epoch:', 'sweep:' }) do
      redis.call('DEL', ARGV[at] .. kind .. name)
    end
  end
  redis.call('DEL', ARGV[at] .. 'lost', ARGV[at] .. 'run')
end
for at = 1, #KEYS do redis.call('DEL', KEYS[at]) end
return 1
