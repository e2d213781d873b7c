-- The sliding minute of LLM/policies/ratelimit.py, shared: one atomic script, on this server's clock.
--
-- KEYS  1 entries  sorted set: entry -> when its last part was taken (µs)
--       2 counts   hash: entry:r and entry:t -> its requests and tokens; r and t -> their sums
--       3 queue    sorted set: ticket -> its number
--       4 tickets  hash: ticket -> "alive until (µs) tokens scope"; "next" -> the last number
--       5 holds    hash: scope -> held until (µs)
-- ARGV  1 command, 2 length of the minute (µs), then what the command takes
local entries, counts, queue, tickets, holds = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local command, minute = ARGV[1], tonumber(ARGV[2])
local GRAIN = 10000    -- what is taken within 10 ms is one entry, dated by its last part
local ALIVE = 2000000  -- a waiting process that is silent for 2 s has lost its place
local GLANCE = 50000   -- who is not first looks again after 50 ms

local function text(number)
  return string.format('%.0f', number)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local newest = redis.call('ZRANGE', entries, -1, -1, 'WITHSCORES')
if newest[2] and tonumber(newest[2]) > now then
  if tonumber(newest[2]) > now + minute then
    -- The clock was set back by more than the minute: nothing here can be dated any more.
    redis.call('DEL', entries, counts, queue, tickets, holds)
    newest = {}
  else
    now = tonumber(newest[2])
  end
end

for _, entry in ipairs(redis.call('ZRANGEBYSCORE', entries, '-inf', text(now - minute))) do
  local used = redis.call('HMGET', counts, entry .. ':r', entry .. ':t')
  redis.call('HINCRBY', counts, 'r', 0 - tonumber(used[1] or 0))
  redis.call('HINCRBY', counts, 't', 0 - tonumber(used[2] or 0))
  redis.call('HDEL', counts, entry .. ':r', entry .. ':t')
  redis.call('ZREM', entries, entry)
end

local sums = redis.call('HMGET', counts, 'r', 't')
local requests, tokens = tonumber(sums[1] or 0), tonumber(sums[2] or 0)

local function keep(key, long)
  redis.call('PEXPIRE', key, text(math.ceil((long or 2 * minute) / 1000) + 10000))
end

local function change(entry, more_requests, more_tokens)
  redis.call('HINCRBY', counts, entry .. ':r', more_requests)
  redis.call('HINCRBY', counts, entry .. ':t', more_tokens)
  redis.call('HINCRBY', counts, 'r', more_requests)
  redis.call('HINCRBY', counts, 't', more_tokens)
  keep(entries)
  keep(counts)
end

local function add(more_requests, more_tokens)
  local entry = newest[1]
  if not entry or now - tonumber(entry) >= GRAIN then
    entry = text(now)
  end
  redis.call('ZADD', entries, text(now), entry)
  change(entry, more_requests, more_tokens)
  return entry
end

-- µs until so much more fits under the limits (-1: none); after the last entry left, all does.
local function wait_for(more_requests, more_tokens, max_requests, max_tokens)
  local over_requests = max_requests < 0 and 0 or requests + more_requests - max_requests
  local over_tokens = max_tokens < 0 and 0 or tokens + more_tokens - max_tokens
  local at, first = now, 0
  while over_requests > 0 or over_tokens > 0 do
    local some = redis.call('ZRANGE', entries, first, first + 99, 'WITHSCORES')
    if #some == 0 then
      break
    end
    for i = 1, #some, 2 do
      local used = redis.call('HMGET', counts, some[i] .. ':r', some[i] .. ':t')
      over_requests = over_requests - tonumber(used[1] or 0)
      over_tokens = over_tokens - tonumber(used[2] or 0)
      at = tonumber(some[i + 1]) + minute
      if over_requests <= 0 and over_tokens <= 0 then
        break
      end
    end
    first = first + 100
  end
  return at - now
end

local function held(scope)
  return math.max(0, tonumber(redis.call('HGET', holds, scope) or 0) - now)
end

-- Requests and tokens of those who came before and can go: they must not be kept waiting longer.
local function ahead_of(ticket)
  local count, sum = 0, 0
  for _, other in ipairs(redis.call('ZRANGE', queue, 0, -1)) do
    if other == ticket then
      break
    end
    local alive, size, scope = string.match(redis.call('HGET', tickets, other) or '', '^(%d+) (%d+) (.*)$')
    if not alive or tonumber(alive) < now then
      redis.call('ZREM', queue, other)
      redis.call('HDEL', tickets, other)
    elseif held(scope) == 0 then
      count, sum = count + 1, sum + tonumber(size)
    end
  end
  return count, sum
end

local function leave(ticket)
  redis.call('ZREM', queue, ticket)
  redis.call('HDEL', tickets, ticket)
end

if command == 'take' or command == 'look' then
  -- max requests, max tokens, tokens, scope, ticket -> entry or '', µs to wait, µs of them held
  local max_requests, max_tokens, size = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  local scope, ticket = ARGV[6], ARGV[7]
  local count, sum = ahead_of(ticket)
  local hold = held(scope)
  local wait = math.max(hold, wait_for(count + 1, sum + size, max_requests, max_tokens))
  if (max_requests >= 0 and count + 1 > max_requests) or (max_tokens >= 0 and sum + size > max_tokens and count > 0) then
    wait = math.max(wait, GLANCE)  -- even an empty minute is for those who came before
  end
  if command == 'look' then
    return { '', text(wait), text(hold) }
  end
  if wait == 0 then
    leave(ticket)
    return { add(1, size), '0', '0' }
  end
  if not redis.call('ZSCORE', queue, ticket) then
    redis.call('ZADD', queue, redis.call('HINCRBY', tickets, 'next', 1), ticket)
  end
  redis.call('HSET', tickets, ticket, text(now + ALIVE) .. ' ' .. ARGV[5] .. ' ' .. scope)
  keep(queue)
  keep(tickets)
  if count > 0 and hold == 0 then
    wait = math.max(wait_for(1, size, max_requests, max_tokens), math.min(wait, GLANCE))
  end
  return { '', text(wait), text(hold) }
elseif command == 'leave' then
  leave(ARGV[3])
elseif command == 'add' then
  add(0, ARGV[3])
elseif command == 'change' then
  -- An entry that has left the window is not changed any more.
  if redis.call('ZSCORE', entries, ARGV[3]) then
    change(ARGV[3], ARGV[4], ARGV[5])
  end
elseif command == 'hold' then
  local until_ = now + tonumber(ARGV[4])
  if until_ > tonumber(redis.call('HGET', holds, ARGV[3]) or 0) then
    redis.call('HSET', holds, ARGV[3], text(until_))
    if redis.call('PTTL', holds) * 1000 < tonumber(ARGV[4]) + minute then
      keep(holds, tonumber(ARGV[4]) + 2 * minute)
    end
  end
end
return { requests, tokens }
