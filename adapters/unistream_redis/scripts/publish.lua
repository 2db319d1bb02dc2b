-- Publish a batch to a topic with a bounded backlog.
-- KEYS: streams, then the 'lost' hash of each
-- ARGV: max_backlog, overflow, then for each message: index of its stream from 1, number of field arguments, fields
-- Returns: for each message its id, or false where it was refused; or 0 if there is no such topic
local streams = #KEYS / 2
local max_backlog, reject = tonumber(ARGV[1]), ARGV[2] == 'reject'
for at = 1, streams do
  if redis.call('EXISTS', KEYS[at]) == 0 then return 0 end
  trust(KEYS[at])
end

local at_most = max_backlog + 1

-- The unsettled of each group; the topic is as full as its slowest group is behind.
local function behind()
  local unsettled = {}
  for at = 1, streams do
    local info = map(redis.call('XINFO', 'STREAM', KEYS[at]))
    for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[at])) do
      local group = map(flat)
      local unread, pending = backlog(KEYS[at], group, info, at_most)
      local sum = unsettled[group['name']] or { total = 0 }
      sum.total = sum.total + unread + pending
      sum[at] = { unread = unread, pending = pending, info = group }
      unsettled[group['name']] = sum
    end
  end
  return unsettled
end

local function slowest()
  local most, which = 0, nil
  for _, sum in pairs(behind()) do
    if sum.total > most then most, which = sum.total, sum end
  end
  return most, which
end

-- Remove the oldest unsettled entries of one group in one stream. An entry that a member holds stays lent: its member
-- may still ack it, and only if it is given back it counts as lost.
local function drop(at, sum, excess)
  local stream, name = KEYS[at], sum[at].info['name']
  local last
  if excess <= sum[at].pending then
    local info = map(redis.call('XINFO', 'STREAM', stream))
    local ids = redis.call('XPENDING', stream, name, info['recorded-first-entry-id'], '+', excess)
    last = ids[#ids][1]
  else
    local more = redis.call('XRANGE', stream, '(' .. sum[at].info['last-delivered-id'], '+', 'COUNT', excess - sum[at].pending)
    last = more[#more][1]
  end
  cut(stream, KEYS[streams + at], id_after(last))
end

local room = math.huge
if reject then room = max_backlog - slowest() end
local grouped = false
for at = 1, streams do grouped = grouped or #redis.call('XINFO', 'GROUPS', KEYS[at]) > 0 end
if not grouped then room = math.huge end
local ids, at = {}, 3
while at <= #ARGV do
  local size = tonumber(ARGV[at + 1])
  if #ids < room then
    ids[#ids + 1] = redis.call('XADD', KEYS[tonumber(ARGV[at])], 'NOMKSTREAM', '*', unpack(ARGV, at + 2, at + 1 + size))
  else
    ids[#ids + 1] = false
  end
  at = at + 2 + size
end
if not reject then
  at_most = max_backlog + #ids + 1
  for _ = 1, streams do
    local total, sum = slowest()
    local excess = total - max_backlog
    if excess <= 0 then break end
    local fullest
    for one = 1, streams do
      if sum[one] and (not fullest or sum[one].unread + sum[one].pending > sum[fullest].unread + sum[fullest].pending) then
        fullest = one
      end
    end
    drop(fullest, sum, math.min(excess, sum[fullest].unread + sum[fullest].pending))
  end
end
return ids
