#!lua
-- One commit of a session: every check first, then every write. The server runs it whole or
-- not at all, and nothing that follows it is needed for safety or for cleaning up.
--
-- KEYS  1 head (hash)   2 items (hash)   3 references (hash: blob id -> "last version, bytes")
-- ARGV  1 expected version   2 commit id   3 the new version's manifest   4 older versions to keep
--       5 seconds until a dropped blob is gone   6 "1" with a turn record   7 turn id   8 record
--       from 9 on, for every blob that the manifest names: id, number of fields, bytes
--
-- Blobs and older manifests are reached by names built from KEYS[1]: same hash tag, same slot.
local REMEMBERED_COMMITS, REMEMBERED_TURNS, FIRST_BLOB = 32, 1000, 9

local head, items, references = KEYS[1], KEYS[2], KEYS[3]
local prefix = string.sub(head, 1, -2)
local expected, commit, manifest, kept = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local stored = redis.call('HMGET', head, 'ver', 'tomb', 'man', 'cids', 'old')
local version = tonumber(stored[1] or '0')

if stored[2] then
  return {'GONE'}
end

local commits = cjson.decode(stored[4] or '[]')
for _, known in ipairs(commits) do
  if known[1] == commit then
    return {'DUPLICATE', known[2]}
  end
end

if version ~= expected then
  return {'CONFLICT', version}
end

for i = FIRST_BLOB, #ARGV, 3 do
  if redis.call('HLEN', prefix .. 'b:' .. ARGV[i]) ~= tonumber(ARGV[i + 1]) then
    return {'INCOMPLETE', ARGV[i]}
  end
end

-- From here on only writes.
local new = version + 1
local known_oldest = tonumber(stored[5] or '1')
local oldest = math.max(known_oldest, new - kept)

if stored[3] and kept > 0 then
  redis.call('SET', prefix .. 'm:' .. version, stored[3])
end
for dropped = known_oldest, oldest - 1 do
  redis.call('DEL', prefix .. 'm:' .. dropped)
end

for i = FIRST_BLOB, #ARGV, 3 do
  redis.call('PERSIST', prefix .. 'b:' .. ARGV[i])
  redis.call('HSET', references, ARGV[i], new .. ' ' .. ARGV[i + 2])
end

-- A blob lives while a kept version names it. The delay lets a reader in flight finish.
local named = redis.call('HGETALL', references)
for i = 1, #named, 2 do
  if tonumber(string.match(named[i + 1], '^%d+')) < oldest then
    redis.call('EXPIRE', prefix .. 'b:' .. named[i], ARGV[5])
    redis.call('HDEL', references, named[i])
  end
end

-- The transcript: "t:<turn id>" is a record, "n:<number>" its place; the oldest makes room.
if ARGV[6] == '1' and redis.call('HSET', items, 't:' .. ARGV[7], ARGV[8]) == 1 then
  local place = redis.call('HINCRBY', items, 'n', 1)
  redis.call('HSET', items, 'n:' .. place, ARGV[7])
  local oldest_place = 'n:' .. (place - REMEMBERED_TURNS)
  local oldest_turn = redis.call('HGET', items, oldest_place)
  if oldest_turn then
    redis.call('HDEL', items, oldest_place, 't:' .. oldest_turn)
  end
end

table.insert(commits, {commit, new})
if #commits > REMEMBERED_COMMITS then
  table.remove(commits, 1)
end
redis.call('HSET', head, 'ver', new, 'man', manifest, 'old', oldest, 'cids', cjson.encode(commits))
return {'OK', new}
