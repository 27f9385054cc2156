#!lua flags=allow-oom
-- Leave a tombstone and remove the rest in one step. A full server must still let go of things.
--
-- KEYS  1 head   2 items   3 references (see commit.lua)
-- ARGV  1 time of the deletion
local head, items, references = KEYS[1], KEYS[2], KEYS[3]
local prefix = string.sub(head, 1, -2)
local stored = redis.call('HMGET', head, 'ver', 'tomb', 'man', 'old')
local keys, bytes = 0, 0

if stored[2] then
  return {'GONE'}
end
if not stored[1] then
  return {'MISSING'}
end

local function remove(key, size)
  if redis.call('UNLINK', key) == 1 then
    keys, bytes = keys + 1, bytes + size
  end
end

redis.call('HSET', head, 'tomb', ARGV[1])
redis.call('HDEL', head, 'man', 'old', 'cids')
bytes = #(stored[3] or '')

local named = redis.call('HGETALL', references)
for i = 1, #named, 2 do
  remove(prefix .. 'b:' .. named[i], tonumber(string.match(named[i + 1], '%d+$')))
end
for version = tonumber(stored[4] or '1'), tonumber(stored[1]) - 1 do
  local key = prefix .. 'm:' .. version
  remove(key, redis.call('STRLEN', key))
end
local recorded = 0
for _, value in ipairs(redis.call('HVALS', items)) do
  recorded = recorded + #value
end
remove(items, recorded)
remove(references, 0)
return {'OK', keys, bytes}
