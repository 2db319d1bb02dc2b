-- Messages that a group has not settled, over its streams.
-- KEYS: streams
-- ARGV: group
-- Returns: how many, and 1 if that is exact
local total, exact = 0, 1
for _, stream in ipairs(KEYS) do
  trust(stream)
  local group = group_info(stream, ARGV[1])
  if not group then return redis.error_reply('NOGROUP no such group') end
  local info = map(redis.call('XINFO', 'STREAM', stream))
  local unread, pending = backlog(stream, group, info, COUNT_AT_MOST + 1)
  if not group['entries-read'] and not group['lag'] and unread > COUNT_AT_MOST then exact = 0 end
  total = total + unread + pending
end
return { total, exact }
