-- What stands of a budget in a period, shared: one atomic script, on this server's clock.
--
-- KEYS  1 sums    hash: spent, held and doubt -> an amount
--       2 parts   hash: id of a reservation -> its amount
--       3 open    sorted set: id -> when it was made (µs); their sum is held
--       4 given   sorted set: id -> when it was given up (µs): counted as spent, nobody settled it yet
-- ARGV  1 command, 2 seconds to keep all this after the last call (0: for ever), then what it takes
--
-- An amount is "dollars femto tokens requests"; femto is what is left of a dollar, in 10^-15: a sum of
-- two is exact in Lua's numbers, which hold whole ones up to 9 * 10^15.
local sums, parts, open, given = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local command, keep = ARGV[1], tonumber(ARGV[2])
local FEMTO = 1e15
local ABANDONED = 3600 * 1e6  -- as in LLM/policies/spending.py
local FORGOTTEN = 86400 * 1e6 -- who settles a day later than that is not heard
local AT_ONCE = 1000          -- of those, in one call

local function read(text)
  local amount = {}
  for number in string.gmatch(text or '0 0 0 0', '%S+') do
    amount[#amount + 1] = tonumber(number)
  end
  return amount
end

local function write(amount)
  return string.format('%.0f %.0f %.0f %.0f', amount[1], amount[2], amount[3], amount[4])
end

local function plus(a, b)
  local dollars, femto = a[1] + b[1], a[2] + b[2]
  if femto >= FEMTO then
    dollars, femto = dollars + 1, femto - FEMTO
  end
  return { dollars, femto, a[3] + b[3], a[4] + b[4] }
end

-- Part by part at least 0.
local function minus(a, b)
  local dollars, femto = a[1] - b[1], a[2] - b[2]
  if femto < 0 then
    dollars, femto = dollars - 1, femto + FEMTO
  end
  if dollars < 0 then
    dollars, femto = 0, 0
  end
  return { dollars, femto, math.max(0, a[3] - b[3]), math.max(0, a[4] - b[4]) }
end

local function fits(a, most)
  local dear = a[1] > most[1] or (a[1] == most[1] and a[2] > most[2])
  return not dear and a[3] <= most[3] and a[4] <= most[4]
end

local found = redis.call('HMGET', sums, 'spent', 'held', 'doubt')
local spent, held, doubt = read(found[1]), read(found[2]), read(found[3])

local function note()
  redis.call('HSET', sums, 'spent', write(spent), 'held', write(held), 'doubt', write(doubt))
  if keep > 0 then
    for _, key in ipairs(KEYS) do
      redis.call('EXPIRE', key, keep)
    end
  end
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function older_than(set, age)
  return redis.call('ZRANGEBYSCORE', set, '-inf', string.format('%.0f', now - age), 'LIMIT', 0, AT_ONCE)
end

local old = older_than(open, ABANDONED)
for _, id in ipairs(old) do
  local amount = read(redis.call('HGET', parts, id))
  held, spent, doubt = minus(held, amount), plus(spent, amount), plus(doubt, { amount[1], amount[2], 0, 0 })
  redis.call('ZREM', open, id)
  redis.call('ZADD', given, string.format('%.0f', now), id)
end
for _, id in ipairs(older_than(given, FORGOTTEN)) do
  redis.call('ZREM', given, id)
  redis.call('HDEL', parts, id)
end
if #old > 0 then
  note()
end

-- Both can come twice, when an answer was lost; the second time they find it done.
local done = 1
if command == 'reserve' then
  -- id, amount, the most that may stand before it
  local id, amount = ARGV[3], read(ARGV[4])
  if redis.call('HEXISTS', parts, id) == 0 then
    if fits(plus(spent, held), read(ARGV[5])) then
      held = plus(held, amount)
      redis.call('HSET', parts, id, write(amount))
      redis.call('ZADD', open, string.format('%.0f', now), id)
      note()
    else
      done = 0
    end
  end
elseif command == 'settle' then
  -- id, the truth, how much of it is in doubt
  local id = ARGV[3]
  local stored = redis.call('HGET', parts, id)
  if stored then
    local amount = read(stored)
    if redis.call('ZREM', open, id) == 1 then
      held = minus(held, amount)
    else
      redis.call('ZREM', given, id)
      spent, doubt = minus(spent, amount), minus(doubt, { amount[1], amount[2], 0, 0 })
    end
    redis.call('HDEL', parts, id)
    spent, doubt = plus(spent, read(ARGV[4])), plus(doubt, read(ARGV[5]))
    note()
  end
end

return { done, write(spent), write(held), write(doubt) }
