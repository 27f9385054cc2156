#!lua flags=allow-oom
-- Let go of a lease, if it is still this one.
--
-- KEYS  1 head   2 lease
-- ARGV  1 owner   2 fence
if redis.call('HGET', KEYS[1], 'fence') == ARGV[2] and redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2])
end
return {'OK'}
