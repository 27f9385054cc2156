#!lua
-- Take the right to write a session, and raise its fence in the same step.
--
-- KEYS  1 head (hash)   2 lease (string)
-- ARGV  1 owner   2 milliseconds   3 seconds that the head of a session without a version may stay
local head, lease = KEYS[1], KEYS[2]
local stored = redis.call('HMGET', head, 'ver', 'tomb', 'man', 'cids')

if stored[2] then
  return {'GONE'}
end

if not stored[1] and (stored[3] or stored[4]) then
  return {'DAMAGED'}
end

local holder = redis.call('GET', lease)
if holder and holder ~= ARGV[1] then
  return {'HELD', redis.call('PTTL', lease)}
end

local fence = redis.call('HINCRBY', head, 'fence', 1)
redis.call('HSET', head, 'holder', ARGV[1])
redis.call('SET', lease, ARGV[1], 'PX', ARGV[2])
if not stored[1] then
  redis.call('EXPIRE', head, ARGV[3])
end
return {'OK', fence, stored[1], stored[4]}
