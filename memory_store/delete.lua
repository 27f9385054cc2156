#!lua flags=allow-oom
-- Leave a tombstone and remove the rest in one step. A full server must still let go of things.
--
-- KEYS  1 head   2 items   3 references (see commit.lua)   4 lease
-- ARGV  1 time and name of this deletion
local head, items, references, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local prefix = string.sub(head, 1, -2)
local stored = redis.call('HMGET', head, 'ver', 'tomb', 'man', 'old')
local keys, bytes = 0, 0

if stored[2] == ARGV[1] then
  return {'OK', 0, 0} -- this very deletion, asked for again because its reply was lost
end
if stored[2] then
  return {'GONE'}
end
if not (stored[1] or stored[3]) then
  return {'MISSING'}
end

local function remove(key, size)
  if redis.call('UNLINK', key) == 1 then
    keys, bytes = keys + 1, bytes + size
  end
end

redis.call('HSET', head, 'tomb', ARGV[1])
redis.call('HDEL', head, 'man', 'old', 'cids', 'fence', 'holder', 'user', 'asked')
redis.call('PERSIST', head)
bytes = #(stored[3] or '')

local named = redis.call('HGETALL', references)
for i = 1, #named, 2 do
  remove(prefix .. 'b:' .. named[i], tonumber(string.match(named[i + 1], '%d+$') or '0'))
end
-- What damaged numbers hide is found by the scan that follows (see redis.py).
for version = tonumber(stored[4] or '1') or 1, (tonumber(stored[1] or '0') or 0) - 1 do
  local key = prefix .. 'm:' .. version
  remove(key, redis.call('STRLEN', key))
end
local recorded = 0
for _, value in ipairs(redis.call('HVALS', items)) do
  recorded = recorded + #value
end
remove(items, recorded)
remove(references, 0)
redis.call('DEL', lease)
return {'OK', keys, bytes}
