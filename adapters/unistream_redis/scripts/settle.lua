-- End loans that this member still holds, with the delivery count that it was given.
-- KEYS: stream, due, held, lost
-- ARGV: group, member, look ('range' or 'each'), number of acks, then (id, count) per ack,
--       then (id, count, count to keep or -1, delay ms) for each that is given back
-- Returns: (index from 0, why) for each refused one; why: 0 nobody holds it, 1 it is parked, 2 it is lent otherwise
local stream, due, held, lost = unpack(KEYS)
local group, member, acks = ARGV[1], ARGV[2], tonumber(ARGV[4])
local counts = {}
if ARGV[3] == 'range' then
  for _, entry in ipairs(redis.call('XPENDING', stream, group, '-', '+', 1000000, member)) do
    counts[entry[1]] = entry[4]
  end
end
local refused = {}

local function holds(index, id, count)
  local mine = counts[id]
  if not mine and ARGV[3] == 'each' then
    local entry = redis.call('XPENDING', stream, group, id, id, 1, member)[1]
    mine = entry and entry[4]
  end
  if mine == tonumber(count) then return true end
  local entry = redis.call('XPENDING', stream, group, id, id, 1)[1]
  refused[#refused + 1] = index
  refused[#refused + 1] = not entry and 0 or entry[2] == PARKED and 1 or 2
  return false
end

local done, all = {}, {}
local index, at = 0, 5
for _ = 1, acks do
  if holds(index, ARGV[at], ARGV[at + 1]) then done[#done + 1] = ARGV[at] end
  all[#all + 1] = ARGV[at]
  index, at = index + 1, at + 2
end
for first = 1, #done, 1000 do
  redis.call('XACK', stream, group, unpack(done, first, math.min(first + 999, #done)))
end
if at <= #ARGV then
  local now = now_ms()
  while at <= #ARGV do
    local id, keep = ARGV[at], tonumber(ARGV[at + 2])
    if holds(index, id, ARGV[at + 1]) then
      park(stream, due, lost, group, id, id, now + tonumber(ARGV[at + 3]), keep >= 0 and keep or nil)
    end
    all[#all + 1] = id
    index, at = index + 1, at + 4
  end
end
if redis.call('EXISTS', held) == 1 then
  for first = 1, #all, 1000 do redis.call('ZREM', held, unpack(all, first, math.min(first + 999, #all))) end
end
return refused
