#!lua
-- Replace one stored value, if it is still the one that was read.
--
-- KEYS  1 a hash, or a string
-- ARGV  1 field of the hash, or ""   2 sha1 of the value that was read   3 the new value
if ARGV[1] == '' then
  local value = redis.call('GET', KEYS[1])
  if not value or redis.sha1hex(value) ~= ARGV[2] then
    return {'MOVED'}
  end
  redis.call('SET', KEYS[1], ARGV[3], 'KEEPTTL')
else
  local value = redis.call('HGET', KEYS[1], ARGV[1])
  if not value or redis.sha1hex(value) ~= ARGV[2] then
    return {'MOVED'}
  end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
return {'OK'}
