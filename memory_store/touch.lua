#!lua flags=allow-oom
-- Write something that changes nothing: WAITAOF waits only for what its connection wrote, so
-- whoever waits for an earlier commit needs a write after it.
--
-- KEYS  1 head
-- ARGV  1 version
if redis.call('HEXISTS', KEYS[1], 'ver') == 1 then
  redis.call('HSET', KEYS[1], 'asked', ARGV[1])
end
return {'OK'}
