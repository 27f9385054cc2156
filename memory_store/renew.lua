#!lua flags=allow-oom
-- Go on holding a lease, which may have run out meanwhile, unless another acquired it. A full
-- server is no reason to lose it: nothing grows.
--
-- KEYS  1 head   2 lease
-- ARGV  1 owner   2 fence   3 milliseconds   4 seconds that a head without a version may stay
local head, lease = KEYS[1], KEYS[2]
local stored = redis.call('HMGET', head, 'fence', 'holder')

if stored[1] ~= ARGV[2] or stored[2] ~= ARGV[1] then
  return {'LOST'}
end

redis.call('SET', lease, ARGV[1], 'PX', ARGV[3])
if redis.call('TTL', head) >= 0 then
  redis.call('EXPIRE', head, ARGV[4])
end
return {'OK'}
