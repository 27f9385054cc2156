#!lua
-- One commit of a session: every check first, then every write. The server runs it whole or
-- not at all, and nothing that follows it is needed for safety or for cleaning up.
--
-- KEYS  1 head (hash)   2 items (hash)   3 references (hash: blob id -> "last version, bytes")
--       4 lease (not touched)
-- ARGV  1 expected version   2 the new version   3 fence   4 holder of the lease   5 commit id
--       6 the new manifest   7 older versions to keep   8 seconds until a dropped blob is gone
--       9 the session's owner, or ""   10 number of turns, then for each: its id, its record
--       then for every blob that the manifest names: id, number of fields, bytes
--
-- Blobs and older manifests are reached by names built from KEYS[1]: same hash tag, same slot.
local REMEMBERED_COMMITS, REMEMBERED_TURNS, FIRST_TURN = 32, 1000, 11

local head, items, references = KEYS[1], KEYS[2], KEYS[3]
local prefix = string.sub(head, 1, -2)
local expected, new, fence = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local holder, commit, manifest = ARGV[4], ARGV[5], ARGV[6]
local kept, owner = tonumber(ARGV[7]), ARGV[9]
local first_blob = FIRST_TURN + 2 * tonumber(ARGV[10])
local stored = redis.call('HMGET', head, 'ver', 'tomb', 'man', 'cids', 'old', 'fence', 'holder')
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

local current = tonumber(stored[6] or '0')
if fence < current then
  return {'FENCED'}
end
if fence > current or stored[7] ~= holder then
  return {'REGRESSED'}
end
if version ~= expected then
  return {'CONFLICT', version}
end

for i = FIRST_TURN, first_blob - 1, 2 do
  if redis.call('HEXISTS', items, 't:' .. ARGV[i]) == 1 then
    return {'REPEATED', ARGV[i]}
  end
end
for i = first_blob, #ARGV, 3 do
  if redis.call('HLEN', prefix .. 'b:' .. ARGV[i]) ~= tonumber(ARGV[i + 1]) then
    return {'INCOMPLETE', ARGV[i]}
  end
end

-- From here on only writes.
local known_oldest = tonumber(stored[5] or '1')
local oldest = math.max(known_oldest, new - kept)

if stored[3] and kept > 0 then
  redis.call('SET', prefix .. 'm:' .. version, stored[3])
end
for dropped = known_oldest, math.min(oldest - 1, version) do
  redis.call('DEL', prefix .. 'm:' .. dropped)
end

for i = first_blob, #ARGV, 3 do
  redis.call('PERSIST', prefix .. 'b:' .. ARGV[i])
  redis.call('HSET', references, ARGV[i], new .. ' ' .. ARGV[i + 2])
end

-- A blob lives while a kept version names it (or while damage hides which). The delay lets a
-- reader in flight finish.
local named = redis.call('HGETALL', references)
for i = 1, #named, 2 do
  local last = tonumber(string.match(named[i + 1], '^%d+') or new)
  if last < oldest then
    redis.call('EXPIRE', prefix .. 'b:' .. named[i], ARGV[8])
    redis.call('HDEL', references, named[i])
  end
end

-- The transcript: "t:<turn id>" is the record, "n:<number>" its place; the oldest makes room.
for i = FIRST_TURN, first_blob - 1, 2 do
  redis.call('HSET', items, 't:' .. ARGV[i], ARGV[i + 1])
  local place = redis.call('HINCRBY', items, 'n', 1)
  redis.call('HSET', items, 'n:' .. place, ARGV[i])
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
if owner ~= '' then
  redis.call('HSET', head, 'user', owner)
end
redis.call('PERSIST', head)
return {'OK', new}
