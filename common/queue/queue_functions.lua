#!lua name=cinnabar_queue_v1
-- The queue: every change of a request's state is one call of a function below, validated first and
-- written second (Redis does not roll a script back). README.md has the keys and the state diagram;
-- queue.h is the typed contract of each call, and holds MayMove, which the tests compare with this.
--
-- KEYS[1] is the partition's prefix, 'cb:{pool}:'. Every key is derived from it and shares its hash
-- tag. A reply is an array: a code, the partition's change number (0: nothing changed), then values.
-- 'v1' in the names is the layout of keys and replies; REVISION counts texts within one layout, all
-- of which work with each other. Any edit of this file raises REVISION.
local REVISION = 3
local DIGEST = '@CINNABAR_QUEUE_DIGEST@'

local PACK_ROWS_MAX = 256        -- rows of one pack
local LANES_MAX = 4096           -- ready streams of a partition
local LANE_KEEP_MS = 3600000     -- a ready stream that nobody dispatches to; longer than any pack waits
local WORKERS_MAX = 4096         -- registered workers
local WATCHERS_MAX = 4           -- gateways told of one request's events
local EVENTS_MAX = 1024          -- events in one reply
local FEED_MAX = 65536           -- entries of the scheduler's feed; a reader that lags rescans
local DEAD_LETTERS_MAX = 10000
local GENERATIONS_MAX = 64       -- remembered starts of Redis
local EVENTS_KEEP_MS = 600000    -- of a terminal request's event stream
local IDEMPOTENCY_KEEP_MS = 86400000
local TENANT_KEEP_MS = 40 * 86400000  -- longer than a budget period
local LEDGER_EXPORTED_MAX = 5000000   -- with an exporter: unread entries before admission stops
local LEDGER_LOCAL_MAX = 100000       -- without one: the newest are kept

local call  -- redis.call, which is absent while a library loads
local TERMINAL = {done = true, failed = true, cancelled = true, expired = true}
local CLASS = {interactive = true, standard = true, batch = true}
local CLASSES = {'interactive', 'standard', 'batch'}

-- Arguments: a refusal raises before anything was written. ---------------------------------------

local function bad(what) error({err = 'BADARG ' .. what}) end

local function integer(text, name)
  if not text or not string.match(text, '^%d+$') or #text > 15 then bad(name) end
  return tonumber(text)
end

local function name(text, what)
  if not text or #text < 1 or #text > 64 or string.find(text, '[^%w_.%-]') then bad(what) end
  return text
end

local function usage(text)
  if not string.match(text or '', '^%d+ %d+ %d+ %d+$') or #text > 64 then bad('usage') end
  return text
end

local function rows_of(A, first, width)
  local count = (#A - first + 1) / width
  if count ~= math.floor(count) or count < 1 or count > PACK_ROWS_MAX then bad('rows') end
end

-- One call's context: the prefix, one reading of the clock, and the change number once it has one.
local function begin(K)
  call = redis.call
  if #K ~= 1 or not string.match(K[1], '^cb:{[%w_.%-]+}:$') then bad('prefix') end
  local time = call('TIME')
  return {P = K[1], t = time[1] * 1000 + math.floor(time[2] / 1000), lsn = 0, fed = 0, notes = {}}
end

-- To be called before the first write of a call that changes a request.
local function change(c)
  if c.lsn == 0 then c.lsn = call('HINCRBY', c.P .. 'meta', 'lsn', 1) end
end

local function feed(c, ...)
  c.fed = c.fed + 1
  call('XADD', c.P .. 'feed', 'MAXLEN', '~', FEED_MAX, string.format('%.0f-%d', c.lsn, c.fed), ...)
end

local WAITING = {'tn', 'cl', 'lp', 'lg', 'steps', 'stp', 'cost', 'np', 'nb', 'sub', 'dl', 'seq', 'hint'}
local function announce(c, rid)
  local h = call('HMGET', c.P .. 'r:' .. rid, unpack(WAITING))
  local fields = {'k', 'q', 'rid', rid}
  for i, key in ipairs(WAITING) do
    fields[#fields + 1] = key
    fields[#fields + 1] = h[i]
  end
  feed(c, unpack(fields))
end

-- Events for the gateways that watch a request: collected during a call, and pushed as one message for
-- each gateway by flush. At most once, so never relied upon: the event stream is the truth, and a gap in
-- the steps tells the gateway to read it. A message is a run of '<rid> <step> <kind> <bytes> <data>'.
local function notify(c, watchers, rid, step, kind, data)
  if watchers == '' then return end
  local event = rid .. ' ' .. step .. ' ' .. kind .. ' ' .. #data .. ' ' .. data
  for gateway in string.gmatch(watchers, '[^,]+') do
    local events = c.notes[gateway]
    if events then events[#events + 1] = event else c.notes[gateway] = {event} end
  end
end

local function flush(c)
  for gateway, events in pairs(c.notes) do call('PUBLISH', c.P .. 'gw:' .. gateway, table.concat(events)) end
end

-- Batches. b:<bid> holds '@e' ready entry, '@l' lane, '@w' owner, and one field for each live row: its
-- attempt while it is leased, and all that a step needs while it runs. So a report on a whole batch costs
-- one read and one write, and step and usage of a running request are here, not in its record; they
-- move back when it leaves.

local BATCH_FIELDS = 3

local function running_row(att, stp, steps, dl, gw, use)
  return table.concat({att, stp, steps, dl, gw == '' and '*' or gw, use}, ' ')
end

-- The row of a running request, or nil.
local function parse_row(value)
  local att, stp, steps, dl, gw, use = string.match(value or '', '^(%d+) (%d+) (%d+) (%d+) (%S+) (.+)$')
  if not att then return nil end
  return {att = att, stp = tonumber(stp), steps = tonumber(steps), dl = tonumber(dl), gw = gw == '*' and '' or gw, use = use,
          deadline = dl}
end

local function drop_batch(P, bid, entry, lane)
  call('ZREM', P .. 'lease', bid)
  call('DEL', P .. 'b:' .. bid)
  call('XDEL', P .. 'ready:' .. lane, entry)
end

local function leave_batch(P, bid, rid)
  if bid == '' then return end
  local b = P .. 'b:' .. bid
  if call('HDEL', b, rid) == 1 and call('HLEN', b) == BATCH_FIELDS then
    local h = call('HMGET', b, '@e', '@l')
    drop_batch(P, bid, h[1], h[2])
  end
end

-- The only place where a request becomes terminal: state, final event, ledger entry and the release
-- of everything it held, together. Nothing in here may fail midway. The caller has checked that the
-- request is live. `use` nil keeps what the last progress reported; `free` true charges nothing.
local function settle(c, rid, st, why, use, result, free)
  local P, r = c.P, c.P .. 'r:' .. rid
  local h = call('HMGET', r, 'st', 'tn', 'cl', 'cost', 'lp', 'lg', 'steps', 'stp', 'bid', 'use', 'pin',
                 'pout', 'gw', 'keep', 'tag', 'att', 'own', 'bh', 'hint')
  local row = h[1] == 'running' and parse_row(call('HGET', P .. 'b:' .. h[9], rid))
  local was, tn, cl, cost, lp, lg = h[1], h[2], h[3], tonumber(h[4]), h[5], tonumber(h[6])
  local stp, bid, pin, pout, keep = row and row.stp or tonumber(h[8]), h[9], tonumber(h[11]), tonumber(h[12]), tonumber(h[14])
  use = use or row and row.use or h[10]
  local charge = 0
  if not free and (st == 'done' or (st == 'cancelled' and stp > 0)) then
    local out = math.min(tonumber(string.match(use, '^%d+')), lg)
    charge = pin + math.ceil(pout * out / math.max(lg, 1))
  end
  change(c)
  if was == 'queued' then call('ZREM', P .. 'q:' .. cl .. ':' .. tn, rid) end
  call('ZREM', P .. 'dl', rid)
  leave_batch(P, bid, rid)
  call('HSET', r, 'st', st, 'stp', stp, 'fin', c.t, 'use', use, 'why', why, 'res', result, 'charge', charge)
  local lim = call('HMGET', P .. 'lim:' .. tn, 'n', 'rsv', 'bud', 'spend')
  call('HSET', P .. 'lim:' .. tn, 'n', (tonumber(lim[1]) or 0) - 1, 'rsv', (tonumber(lim[2]) or 0) - cost,
       'bud', (tonumber(lim[3]) or 0) - pin - pout, 'spend', (tonumber(lim[4]) or 0) + charge)
  local tot = call('HMGET', P .. 'tot', 'n', 'rsv')
  call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0) - 1, 'rsv', (tonumber(tot[2]) or 0) - cost)
  call('XADD', P .. 'ledger', '*', 'v', 1, 'rid', rid, 'tn', tn, 'cl', cl, 'tag', h[15], 'st', st, 'in', lp,
       'use', use, 'steps', stp, 'att', h[16], 'charge', charge)
  local ev = P .. 'ev:' .. rid
  call('XADD', ev, string.format('%.0f-1', stp + 1), 'k', st, 'd', why)
  call('PEXPIRE', ev, math.min(keep, EVENTS_KEEP_MS))
  call('PEXPIRE', r, keep)
  call('DEL', P .. 'pl:' .. rid, P .. 'cv:' .. rid)
  if st == 'failed' then
    call('XADD', P .. 'dlq', 'MAXLEN', '~', DEAD_LETTERS_MAX, '*', 'rid', rid, 'tn', tn, 'tag', h[15], 'why', why,
         'own', h[17], 'att', h[16], 'stp', stp, 'bh', h[18])
  end
  feed(c, 'k', 't', 'rid', rid, 'tn', tn, 'cl', cl, 'lg', h[6], 'st', st, 'stp', stp, 'use', use, 'hint', h[19])
  notify(c, h[13], rid, stp + 1, st, result ~= '' and result or why)
end

-- Back to its queue, in its old place. The caller has checked that it is leased or running; `row` is
-- that of a running one.
local function requeue(c, rid, h, row, np, crashes, not_before)
  local P = c.P
  change(c)
  leave_batch(P, h.bid, rid)
  if row then call('HSET', P .. 'r:' .. rid, 'stp', row.stp, 'use', row.use) end
  call('HSET', P .. 'r:' .. rid, 'st', 'queued', 'bid', '', 'own', '', 'np', np, 'cr', crashes, 'nb', not_before)
  call('ZADD', P .. 'q:' .. h.cl .. ':' .. h.tn, h.seq, rid)
  call('SADD', P .. 'ten:' .. h.cl, h.tn)
  announce(c, rid)
end

-- Connections and leadership. ---------------------------------------------------------------------

local function version() return {REVISION, DIGEST} end

-- site|'' run_id known_generation|'0' known_lsn may_create(0|1) insist(0|1: on that site)
--   -> OK lsn site generation rewound(0|1) | NO_SITE | WRONG_SITE 0 site
-- Called first on every connection. A run id not seen before starts a generation, which remembers
-- the change number it began with: whoever knows a later one has seen writes that Redis lost.
local function open(K, A)
  local c = begin(K)
  local P, site, run, known, known_lsn, create = c.P, A[1], A[2], integer(A[3], 'generation'), integer(A[4], 'lsn'), A[5]
  if #A ~= 6 then bad('arity') end
  name(run, 'run id')
  if site ~= '' then name(site, 'site') end
  local h = call('HMGET', P .. 'meta', 'site', 'run', 'gen', 'lsn')
  local lsn = tonumber(h[4]) or 0
  if not h[1] then
    if create ~= '1' or site == '' then return {'NO_SITE', 0} end
    call('HSET', P .. 'meta', 'site', site, 'lsn', lsn)
    h[1] = site
  elseif A[6] == '1' and site ~= h[1] then
    return {'WRONG_SITE', 0, h[1]}
  end
  local generation = tonumber(h[3]) or 0
  if h[2] ~= run then
    generation = math.max(generation + 1, c.t)
    call('HSET', P .. 'meta', 'run', run, 'gen', generation)
    call('ZADD', P .. 'gens', generation, string.format('%.0f:%.0f', generation, lsn))
    call('ZREMRANGEBYRANK', P .. 'gens', 0, -GENERATIONS_MAX - 1)
  end
  local rewound = known_lsn > lsn
  if known ~= 0 and known ~= generation then
    local since = call('ZRANGEBYSCORE', P .. 'gens', known, '+inf')
    if not since[1] or tonumber(string.match(since[1], '^%d+')) ~= known then rewound = true end
    for i = 2, #since do
      if tonumber(string.match(since[i], ':(%d+)$')) < known_lsn then rewound = true end
    end
  end
  return {'OK', lsn, h[1], generation, rewound and 1 or 0}
end

-- me ttl_ms -> LEADER 0 epoch | FOLLOWER 0 epoch leader
-- A new epoch is at least the time in ms, so that a lost write cannot hand one out twice.
local function lead(K, A)
  local c = begin(K)
  local P, me, ttl = c.P, name(A[1], 'leader'), integer(A[2], 'ttl')
  local holder, epoch = call('GET', P .. 'leader'), tonumber(call('HGET', P .. 'meta', 'epoch') or '0')
  if holder == me then
    call('PEXPIRE', P .. 'leader', ttl)
    return {'LEADER', 0, epoch}
  elseif holder then
    return {'FOLLOWER', 0, epoch, holder}
  end
  epoch = math.max(epoch + 1, c.t)
  call('SET', P .. 'leader', me, 'PX', ttl)
  call('HSET', P .. 'meta', 'epoch', epoch)
  return {'LEADER', 0, epoch}
end

-- me -> OK | NOT_LEADER
local function resign(K, A)
  local c = begin(K)
  if call('GET', c.P .. 'leader') ~= name(A[1], 'leader') then return {'NOT_LEADER', 0} end
  call('DEL', c.P .. 'leader')
  return {'OK', 0}
end

local function stale_epoch(c, epoch)
  local current = tonumber(call('HGET', c.P .. 'meta', 'epoch') or '0')
  if current ~= epoch or epoch == 0 then return {'STALE_EPOCH', 0, current} end
end

-- Admission. --------------------------------------------------------------------------------------

-- A token bucket by its theoretical arrival time (GCRA): 0 a minute is no limit. An amount above the
-- burst is let in when the bucket is full, and pays in full. Returns the new time, or nil and the ms
-- to wait.
local function take(arrival, t, per_minute, burst, amount)
  if per_minute == 0 then return arrival end
  local unit = 60000 / per_minute
  local base = math.max(arrival, t)
  local over = base + math.min(amount, burst) * unit - (t + burst * unit)
  if over > 0 then return nil, math.ceil(over) end
  return base + amount * unit
end

-- What three such buckets hold: appends (remaining reset_ms)x3, -1 0 for one without a limit. The
-- limits are n[21] to n[26] of enqueue.
local function append_rates(reply, arrivals, t, n)
  for i = 1, 3 do
    local per_minute, burst, left, reset = n[19 + 2 * i], n[20 + 2 * i], -1, 0
    if per_minute > 0 then
      left = math.max(math.floor(math.min(t - arrivals[i], 0) * per_minute / 60000 + burst), 0)
      reset = math.max(math.ceil(arrivals[i] - t), 0)
    end
    reply[#reply + 1] = left
    reply[#reply + 1] = reset
  end
  return reply
end

local ENQUEUE_ARGS = 30
-- rid tenant class idempotency|'' digest | lp lg steps cost | deadline_ms keep_ms | gateway|'' tag hint payload
--   replay(0|1) | cost_max queue_max tenant_requests_max tenant_cost_max
--   | requests/min burst tokens/min burst cost/min burst | period budget_max price_in price_out
--   -> OK lsn rid state (remaining reset_ms)x3 | DUPLICATE 0 rid state | MISMATCH 0 rid
--    | OVERLOADED 0 cost | LEDGER_FULL 0 n | QUEUE_FULL 0 n | TENANT_REQUESTS 0 n | TENANT_COST 0 cost
--    | BUDGET 0 left | RATE 0 wait_ms what (remaining reset_ms)x3
local function enqueue(K, A)
  local c = begin(K)
  if #A ~= ENQUEUE_ARGS then bad('arity') end
  local P, t = c.P, c.t
  local rid, tn, cl, idem, digest = name(A[1], 'rid'), name(A[2], 'tenant'), A[3], A[4], A[5]
  if not CLASS[cl] then bad('class') end
  if idem ~= '' then name(idem, 'idempotency') end
  if #digest > 64 then bad('digest') end
  local n = {}
  for i = 6, 11 do n[i] = integer(A[i], 'number ' .. i) end
  for i = 16, 26 do n[i] = integer(A[i], 'number ' .. i) end
  for i = 28, 30 do n[i] = integer(A[i], 'number ' .. i) end
  local lp, lg, steps, cost, deadline, keep = n[6], n[7], n[8], n[9], n[10], n[11]
  if steps < 1 or keep < 1 or deadline < 1 then bad('steps, keep or deadline') end
  if A[12] ~= '' then name(A[12], 'gateway') end
  if #A[13] > 256 or #A[14] > 1024 or A[15] == '' then bad('tag, hint or payload') end
  if A[27] ~= '' then name(A[27], 'period') end

  local r, key = P .. 'r:' .. rid, P .. 'idem:' .. tn .. ':' .. idem
  local known = call('HMGET', r, 'st', 'tn', 'bh')
  if known[1] then
    if known[2] ~= tn or known[3] ~= digest then return {'MISMATCH', 0, rid} end
    return {'DUPLICATE', 0, rid, known[1]}
  end
  if idem ~= '' then
    local earlier = call('HMGET', key, 'rid', 'bh')
    local st = earlier[1] and call('HGET', P .. 'r:' .. earlier[1], 'st')
    if st then  -- a key whose request is gone (kept for less long, or lost) admits anew
      if earlier[2] ~= digest then return {'MISMATCH', 0, earlier[1]} end
      return {'DUPLICATE', 0, earlier[1], st}
    end
  end

  local lim = call('HMGET', P .. 'lim:' .. tn, 'n', 'rsv', 'bud', 'spend', 'per', 'tr', 'tt', 'tc')
  local tot = call('HMGET', P .. 'tot', 'n', 'rsv')
  for i = 1, 4 do lim[i] = tonumber(lim[i]) or 0 end
  for i = 6, 8 do lim[i] = tonumber(lim[i]) or 0 end
  local total_cost = tonumber(tot[2]) or 0
  local price = n[29] + n[30]
  local spend = lim[5] == A[27] and lim[4] or 0
  local amount = {1, lp + lg, cost}
  if n[16] == 0 then  -- what was accepted once is not refused when it is replayed after a rewind
    if n[17] > 0 and total_cost + cost > n[17] then return {'OVERLOADED', 0, total_cost} end
    if call('HEXISTS', P .. 'meta', 'bill') == 1 and call('XLEN', P .. 'ledger') >= LEDGER_EXPORTED_MAX then
      return {'LEDGER_FULL', 0, LEDGER_EXPORTED_MAX}
    end
    local depth = call('ZCARD', P .. 'q:' .. cl .. ':' .. tn)
    if n[18] > 0 and depth >= n[18] then return {'QUEUE_FULL', 0, depth} end
    if n[19] > 0 and lim[1] >= n[19] then return {'TENANT_REQUESTS', 0, lim[1]} end
    if n[20] > 0 and lim[2] + cost > n[20] then return {'TENANT_COST', 0, lim[2]} end
    if n[28] > 0 and spend + lim[3] + price > n[28] then
      return {'BUDGET', 0, math.max(n[28] - spend - lim[3], 0)}
    end
    local before = {lim[6], lim[7], lim[8]}
    for i = 1, 3 do
      local arrival, wait = take(lim[5 + i], t, n[19 + 2 * i], n[20 + 2 * i], amount[i])
      if not arrival then
        return append_rates({'RATE', 0, wait, ({'requests', 'tokens', 'cost'})[i]}, before, t, n)
      end
      lim[5 + i] = arrival
    end
  end

  change(c)
  call('HSET', r, 'st', 'queued', 'att', 0, 'own', '', 'bid', '', 'stp', 0, 'use', '0 0 0 0', 'steps', A[8], 'dl',
       t + deadline, 'gw', A[12], 'tn', tn, 'cl', cl, 'lp', A[6], 'lg', A[7], 'cost', A[9], 'seq', c.lsn, 'sub', t,
       'ps', 0, 'np', 0, 'cr', 0, 'nb', 0, 'keep', A[11], 'pin', A[29], 'pout', A[30], 'bh', digest, 'tag', A[13],
       'hint', A[14])
  call('SET', P .. 'pl:' .. rid, A[15])
  call('DEL', P .. 'ev:' .. rid, P .. 'cv:' .. rid)
  call('ZADD', P .. 'q:' .. cl .. ':' .. tn, c.lsn, rid)
  call('SADD', P .. 'ten:' .. cl, tn)
  call('ZADD', P .. 'dl', t + deadline, rid)
  call('HSET', P .. 'lim:' .. tn, 'n', lim[1] + 1, 'rsv', lim[2] + cost, 'bud', lim[3] + price, 'spend', spend,
       'per', A[27], 'tr', lim[6], 'tt', lim[7], 'tc', lim[8])
  call('PEXPIRE', P .. 'lim:' .. tn, TENANT_KEEP_MS)
  call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0) + 1, 'rsv', total_cost + cost)
  if idem ~= '' then
    call('HSET', key, 'rid', rid, 'bh', digest)
    call('PEXPIRE', key, IDEMPOTENCY_KEEP_MS)
  end
  announce(c, rid)
  return append_rates({'OK', c.lsn, rid, 'queued'}, {lim[6], lim[7], lim[8]}, t, n)
end

-- Scheduler. --------------------------------------------------------------------------------------

-- epoch bid lane ready_max start_within_ms info rid...
--   -> OK lsn (verdict attempt step)... | STALE_EPOCH 0 epoch | READY_FULL 0 n
-- Verdicts: OK GONE NOT_QUEUED EXPIRED BACKOFF SUSPECT
local function dispatch(K, A)
  local c = begin(K)
  local epoch, bid, lane = integer(A[1], 'epoch'), name(A[2], 'bid'), name(A[3], 'lane')
  local ready_max, within, P, t = integer(A[4], 'ready_max'), integer(A[5], 'start_within'), c.P, c.t
  if #A < 7 or #A - 6 > PACK_ROWS_MAX then bad('rows') end
  for i = 7, #A do name(A[i], 'rid') end
  local stale = stale_epoch(c, epoch)
  if stale then return stale end
  local b, ready = P .. 'b:' .. bid, P .. 'ready:' .. lane
  local again = call('EXISTS', b) == 1
  if not again then
    local depth = call('XLEN', ready)
    if depth >= ready_max then return {'READY_FULL', 0, depth} end
    if call('SISMEMBER', P .. 'lanes', lane) == 0 and call('SCARD', P .. 'lanes') >= LANES_MAX then
      return {'READY_FULL', 0, LANES_MAX}
    end
  end
  local reply, taken, seen, suspect = {'OK', 0}, {}, {}, 0
  for i = 7, #A do
    local rid = A[i]
    local h = call('HMGET', P .. 'r:' .. rid, 'st', 'bid', 'dl', 'np', 'nb', 'att', 'stp', 'cl', 'tn')
    local verdict, att = 'OK', tonumber(h[6] or '0')
    if not h[1] then verdict = 'GONE'
    elseif seen[rid] then verdict = 'NOT_QUEUED'
    elseif again and h[2] == bid and not TERMINAL[h[1]] then verdict = 'OK'  -- a repeated call
    elseif h[1] ~= 'queued' or again then verdict = 'NOT_QUEUED'
    elseif tonumber(h[3]) <= t then verdict = 'EXPIRED'
    elseif tonumber(h[5]) > t then verdict = 'BACKOFF'
    elseif tonumber(h[4]) > 0 and #A > 7 then verdict = 'SUSPECT'
    else
      att = att + 1
      if tonumber(h[4]) > 0 then suspect = 1 end
      taken[#taken + 1] = {rid = rid, att = att, q = P .. 'q:' .. h[8] .. ':' .. h[9]}
    end
    seen[rid] = true
    reply[#reply + 1] = verdict
    reply[#reply + 1] = att
    reply[#reply + 1] = tonumber(h[7] or '0')
  end
  if #taken == 0 then return reply end
  change(c)
  call('SADD', P .. 'lanes', lane)
  local entry = call('XADD', ready, '*', 'v', 1, 'bid', bid, 'rows', #taken, 'solo', suspect, 'info', A[6])
  call('PEXPIRE', ready, LANE_KEEP_MS)
  call('HSET', b, '@e', entry, '@l', lane, '@w', '')
  for _, row in ipairs(taken) do
    call('ZREM', row.q, row.rid)
    call('HSET', P .. 'r:' .. row.rid, 'st', 'leased', 'bid', bid, 'att', row.att)
    call('HSET', b, row.rid, row.att)
  end
  call('ZADD', P .. 'lease', t + within, bid)
  reply[2] = c.lsn
  return reply
end

-- epoch why rid... -> OK lsn verdict... | STALE_EPOCH 0 epoch
-- Verdicts: OK GONE NOT_QUEUED.  Ends those that wait, as cancelled for this reason and free of charge: what
-- a planner knows cannot be served. Unlike cancel it is the leader's, and leaves alone what a worker has.
local function refuse(K, A)
  local c = begin(K)
  local epoch, why = integer(A[1], 'epoch'), A[2]
  if not why or why == '' or #why > 256 then bad('why') end
  if #A < 3 or #A - 2 > PACK_ROWS_MAX then bad('rows') end
  for i = 3, #A do name(A[i], 'rid') end
  local stale = stale_epoch(c, epoch)
  if stale then return stale end
  local reply = {'OK', 0}
  for i = 3, #A do
    local h, verdict = call('HMGET', c.P .. 'r:' .. A[i], 'st', 'why'), 'NOT_QUEUED'
    if not h[1] then verdict = 'GONE'
    elseif h[1] == 'queued' then
      settle(c, A[i], 'cancelled', why, nil, '', true)
      verdict = 'OK'
    elseif h[1] == 'cancelled' and h[2] == why then verdict = 'OK' end  -- a repeated call
    reply[#reply + 1] = verdict
  end
  flush(c)
  reply[2] = c.lsn
  return reply
end

-- epoch count_max no_progress_max crashes_max backoff_ms
--   -> OK lsn requeued not_started dead expired | STALE_EPOCH 0 epoch
local function reap(K, A)
  local c = begin(K)
  if #A ~= 5 then bad('arity') end
  local P, t, epoch, count = c.P, c.t, integer(A[1], 'epoch'), integer(A[2], 'count')
  local np_max, crashes_max, backoff = integer(A[3], 'no_progress_max'), integer(A[4], 'crashes_max'), integer(A[5], 'backoff')
  local stale = stale_epoch(c, epoch)
  if stale then return stale end
  local requeued, not_started, dead, expired = 0, 0, 0, 0
  for _, bid in ipairs(call('ZRANGEBYSCORE', P .. 'lease', '-inf', t, 'LIMIT', 0, count)) do
    change(c)
    local fields = call('HGETALL', P .. 'b:' .. bid)
    local batch, rids = {}, {}
    for i = 1, #fields, 2 do
      batch[fields[i]] = fields[i + 1]
      if string.sub(fields[i], 1, 1) ~= '@' then rids[#rids + 1] = fields[i] end
    end
    table.sort(rids)
    for _, rid in ipairs(rids) do
      local v = call('HMGET', P .. 'r:' .. rid, 'st', 'bid', 'cl', 'tn', 'seq', 'np', 'cr', 'stp', 'ps', 'dl')
      local h = {bid = v[2], cl = v[3], tn = v[4], seq = v[5]}
      if v[2] == bid and (v[1] == 'leased' or v[1] == 'running') then
        local np, crashes = tonumber(v[6]), tonumber(v[7])
        if tonumber(v[10]) <= t then
          expired = expired + 1
          settle(c, rid, 'expired', 'deadline', nil, '')
        elseif v[1] == 'leased' then
          not_started = not_started + 1
          requeue(c, rid, h, nil, np, crashes, 0)
        else
          local row = parse_row(batch[rid])
          np = row.stp > tonumber(v[9]) and 0 or np + 1
          crashes = crashes + 1
          if np >= np_max or crashes >= crashes_max then
            dead = dead + 1
            settle(c, rid, 'failed', np >= np_max and 'no_progress' or 'too_many_crashes', nil, '')
          else
            requeued = requeued + 1
            requeue(c, rid, h, row, np, crashes, np > 0 and t + backoff * 4 ^ (np - 1) or 0)
          end
        end
      end
    end
    call('ZREM', P .. 'lease', bid)
    if batch['@e'] then drop_batch(P, bid, batch['@e'], batch['@l']) end
  end
  for _, rid in ipairs(call('ZRANGEBYSCORE', P .. 'dl', '-inf', t, 'LIMIT', 0, count)) do
    expired = expired + 1
    settle(c, rid, 'expired', 'deadline', nil, '')
  end
  call('ZREMRANGEBYSCORE', P .. 'workers', '-inf', t)
  for _, class in ipairs(CLASSES) do
    local tenants = call('SRANDMEMBER', P .. 'ten:' .. class, 16)
    for _, tn in ipairs(tenants) do
      if call('EXISTS', P .. 'q:' .. class .. ':' .. tn) == 0 then call('SREM', P .. 'ten:' .. class, tn) end
    end
  end
  for _, l in ipairs(call('SRANDMEMBER', P .. 'lanes', 16)) do
    if call('EXISTS', P .. 'ready:' .. l) == 0 then call('SREM', P .. 'lanes', l) end
  end
  if call('HEXISTS', P .. 'meta', 'bill') == 0 then call('XTRIM', P .. 'ledger', 'MAXLEN', '~', LEDGER_LOCAL_MAX) end
  flush(c)
  return {'OK', c.lsn, requeued, not_started, dead, expired}
end

-- -> OK lsn (class tenant depth)...  The change number is where to read the feed from afterwards.
local function queues(K, A)
  local c = begin(K)
  local reply = {'OK', tonumber(call('HGET', c.P .. 'meta', 'lsn') or '0')}
  for _, class in ipairs(CLASSES) do
    local tenants = call('SMEMBERS', c.P .. 'ten:' .. class)
    table.sort(tenants)
    for _, tn in ipairs(tenants) do
      local depth = call('ZCARD', c.P .. 'q:' .. class .. ':' .. tn)
      if depth > 0 then
        reply[#reply + 1] = class
        reply[#reply + 1] = tn
        reply[#reply + 1] = depth
      end
    end
  end
  return reply
end

-- class tenant after_seq count -> OK 0 (rid field...)...  One queue, oldest first.
local function waiting(K, A)
  local c = begin(K)
  if not CLASS[A[1]] then bad('class') end
  local queue = c.P .. 'q:' .. A[1] .. ':' .. name(A[2], 'tenant')
  local after, count = integer(A[3], 'after'), integer(A[4], 'count')
  local reply = {'OK', 0}
  for _, rid in ipairs(call('ZRANGEBYSCORE', queue, '(' .. string.format('%.0f', after), '+inf', 'LIMIT', 0, count)) do
    local h = call('HMGET', c.P .. 'r:' .. rid, unpack(WAITING))
    table.insert(h, 1, rid)
    reply[#reply + 1] = h
  end
  return reply
end

-- Worker. -----------------------------------------------------------------------------------------

-- lane -> OK.  Makes the ready stream and its group, once.
local function lane(K, A)
  local c = begin(K)
  local stream = c.P .. 'ready:' .. name(A[1], 'lane')
  if call('EXISTS', stream) == 1 then
    for _, group in ipairs(call('XINFO', 'GROUPS', stream)) do
      if group[2] == 'w' then return {'OK', 0} end
    end
  end
  call('XGROUP', 'CREATE', stream, 'w', '0', 'MKSTREAM')
  call('PEXPIRE', stream, LANE_KEEP_MS)
  return {'OK', 0}
end

-- boot bid lease_ms -> OK lsn (row)... | GONE | STALE
-- Row: rid attempt step usage deadline_in_ms suspect payload snapshot_step snapshot delta...
-- The deltas are those of the steps after the snapshot's. A repeated call returns the rows again.
local function start(K, A)
  local c = begin(K)
  local P, t, boot, bid, lease = c.P, c.t, name(A[1], 'boot'), name(A[2], 'bid'), integer(A[3], 'lease')
  local b = P .. 'b:' .. bid
  local fields = call('HGETALL', b)
  if #fields == 0 then return {'GONE', 0} end
  local batch, rids = {}, {}
  for i = 1, #fields, 2 do
    batch[fields[i]] = fields[i + 1]
    if string.sub(fields[i], 1, 1) ~= '@' then rids[#rids + 1] = fields[i] end
  end
  if batch['@w'] ~= '' and batch['@w'] ~= boot then return {'STALE', 0} end
  table.sort(rids)
  local reply, live = {'OK', 0}, false
  for _, rid in ipairs(rids) do
    local r = P .. 'r:' .. rid
    local h = call('HMGET', r, 'st', 'bid', 'att', 'stp', 'use', 'dl', 'np', 'own', 'steps', 'gw')
    if h[2] == bid and (h[1] == 'leased' or (h[1] == 'running' and h[8] == boot)) then
      local payload = call('GET', P .. 'pl:' .. rid)
      if tonumber(h[6]) <= t then settle(c, rid, 'expired', 'deadline', nil, '')
      elseif not payload then settle(c, rid, 'failed', 'payload_lost', nil, '')
      else
        local row = parse_row(batch[rid]) or {stp = tonumber(h[4]), use = h[5]}
        if h[1] == 'leased' then
          change(c)
          call('HSET', r, 'st', 'running', 'own', boot, 'ps', h[4])
          call('HSET', b, rid, running_row(h[3], h[4], h[9], h[6], h[10], h[5]))
        end
        live = true
        local canvas = call('HMGET', P .. 'cv:' .. rid, 's', 'c')
        local from, upto = tonumber(canvas[1] or '0'), row.stp
        local started = {rid, tonumber(h[3]), upto, row.use, tonumber(h[6]) - t, tonumber(h[7]), payload, from,
                         canvas[2] or ''}
        if upto > from then
          for _, event in ipairs(call('XRANGE', P .. 'ev:' .. rid, string.format('%.0f-1', from + 1),
                                      string.format('%.0f-1', upto))) do
            started[#started + 1] = event[2][4]
          end
        end
        reply[#reply + 1] = started
      end
    end
  end
  if live and batch['@w'] == '' then
    call('HSET', b, '@w', boot)
    call('XDEL', P .. 'ready:' .. batch['@l'], batch['@e'])
    feed(c, 'k', 's', 'bid', bid, 'own', boot)
  end
  if live then call('ZADD', P .. 'lease', 'XX', t + lease, bid) end
  flush(c)
  reply[2] = c.lsn
  return reply
end

-- Why (boot, bid, attempt) does not hold the request.
local function refusal(c, boot, bid, rid, att)
  local h = call('HMGET', c.P .. 'r:' .. rid, 'st', 'att', 'own', 'bid')
  if not h[1] then return 'GONE' end
  if h[2] == att and h[3] == boot and h[4] == bid and TERMINAL[h[1]] then return string.upper(h[1]) end
  return 'STALE'
end

-- The row, when (boot, bid, attempt) holds the request: it is in that batch, which is that worker's, by
-- that attempt.
local function fenced(owner, value, boot, att)
  if owner ~= boot then return nil end
  local row = parse_row(value)
  if row and row.att ~= att then return nil end
  return row
end

local function held(c, boot, bid, rid, att)
  local v = call('HMGET', c.P .. 'b:' .. bid, '@w', rid)
  return fenced(v[1], v[2], boot, att)
end

local PROGRESS_WIDTH = 7
-- boot lease_ms (rid bid attempt step usage delta snapshot|'')...  -> OK lsn (verdict step)...
-- Verdicts: OK GONE STALE DONE FAILED CANCELLED EXPIRED BAD_STEP REWIND; step is the last Redis has.
local function progress(K, A)
  local c = begin(K)
  local P, t, boot, lease = c.P, c.t, name(A[1], 'boot'), integer(A[2], 'lease')
  rows_of(A, 3, PROGRESS_WIDTH)
  local batches, order = {}, {}
  for i = 3, #A, PROGRESS_WIDTH do
    local rid, bid = A[i], A[i + 1]
    if rid == '' or string.sub(rid, 1, 1) == '@' then bad('rid') end
    if integer(A[i + 3], 'step') < 1 then bad('step') end
    usage(A[i + 4])
    local batch = batches[bid]
    if not batch then
      batch = {key = P .. 'b:' .. bid, bid = bid, fields = {'@w'}, at = {}, rows = {}, dirty = {}}
      batches[bid] = batch
      order[#order + 1] = batch
    end
    if not batch.at[rid] then
      batch.fields[#batch.fields + 1] = rid
      batch.at[rid] = #batch.fields
    end
  end
  for _, batch in ipairs(order) do batch.values = call('HMGET', batch.key, unpack(batch.fields)) end

  local reply = {'OK', 0}
  for i = 3, #A, PROGRESS_WIDTH do
    local rid, batch, step = A[i], batches[A[i + 1]], tonumber(A[i + 3])
    local row = batch.rows[rid]
    if row == nil then row = fenced(batch.values[1], batch.values[batch.at[rid]], boot, A[i + 2]) end
    local verdict
    if not row or row.att ~= A[i + 2] then verdict = refusal(c, boot, batch.bid, rid, A[i + 2])
    elseif row.dl <= t then
      settle(c, rid, 'expired', 'deadline', nil, '')
      batch.rows[rid] = false
      verdict = 'EXPIRED'
    elseif step > row.steps then verdict = 'BAD_STEP'
    else
      batch.rows[rid] = row
      batch.renewed = true
      if step > row.stp + 1 then verdict = 'REWIND'  -- Redis forgot steps: the worker sends them again
      else
        verdict = 'OK'
        if step == row.stp + 1 then
          change(c)
          row.stp, row.text, row.use = step, A[i + 3], A[i + 4]
          if not row.dirty then
            row.dirty = true
            batch.dirty[#batch.dirty + 1] = rid
          end
          call('XADD', P .. 'ev:' .. rid, A[i + 3] .. '-1', 'k', 'p', 'd', A[i + 5])
          if A[i + 6] ~= '' then call('HSET', P .. 'cv:' .. rid, 's', A[i + 3], 'c', A[i + 6]) end
          notify(c, row.gw, rid, A[i + 3], 'p', A[i + 5])
        end
      end
    end
    reply[#reply + 1] = verdict
    reply[#reply + 1] = row and row.stp or 0
  end
  for _, batch in ipairs(order) do
    local written = {}
    for _, rid in ipairs(batch.dirty) do
      local row = batch.rows[rid]
      written[#written + 1] = rid
      written[#written + 1] = running_row(row.att, row.text, row.steps, row.deadline, row.gw, row.use)
    end
    if #written > 0 then call('HSET', batch.key, unpack(written)) end
    if batch.renewed then call('ZADD', P .. 'lease', 'XX', 'GT', t + lease, batch.bid) end
  end
  flush(c)
  reply[2] = c.lsn
  return reply
end

-- boot rid bid attempt last_step outcome(done|failed) usage why result
--   -> OK lsn | DUPLICATE | REWIND 0 step | BAD_STEP 0 step | GONE | STALE | DONE | FAILED | CANCELLED | EXPIRED
local function finish(K, A)
  local c = begin(K)
  if #A ~= 9 then bad('arity') end
  local boot, rid, bid, att = name(A[1], 'boot'), name(A[2], 'rid'), name(A[3], 'bid'), A[4]
  local last, outcome, use = integer(A[5], 'step'), A[6], usage(A[7])
  if outcome ~= 'done' and outcome ~= 'failed' then bad('outcome') end
  if #A[8] > 256 then bad('why') end
  local row = held(c, boot, bid, rid, att)
  if not row then
    local verdict = refusal(c, boot, bid, rid, att)
    return {verdict == string.upper(outcome) and 'DUPLICATE' or verdict, 0}
  end
  local stp = row.stp
  if last < stp then return {'BAD_STEP', 0, stp} end
  if last > stp then return {'REWIND', 0, stp} end
  settle(c, rid, outcome, A[8], use, A[9])
  flush(c)
  return {'OK', c.lsn}
end

local HAND_BACK_WIDTH = 5
-- boot (rid bid attempt snapshot_step snapshot|'')... -> OK lsn (verdict step)...
-- Without blame: counts as no crash. A repeated call finds the request gone from this worker: STALE.
local function hand_back(K, A)
  local c = begin(K)
  local P, boot = c.P, name(A[1], 'boot')
  rows_of(A, 2, HAND_BACK_WIDTH)
  for i = 2, #A, HAND_BACK_WIDTH do
    name(A[i], 'rid')
    name(A[i + 1], 'bid')
    integer(A[i + 3], 'snapshot step')
  end
  local reply = {'OK', 0}
  for i = 2, #A, HAND_BACK_WIDTH do
    local rid, bid, step, snapshot = A[i], A[i + 1], tonumber(A[i + 3]), A[i + 4]
    local row, verdict = held(c, boot, bid, rid, A[i + 2]), 'OK'
    if not row then verdict = refusal(c, boot, bid, rid, A[i + 2])
    else
      local h = call('HMGET', P .. 'r:' .. rid, 'cl', 'tn', 'seq', 'np', 'cr')
      change(c)
      if snapshot ~= '' and step <= row.stp and step > tonumber(call('HGET', P .. 'cv:' .. rid, 's') or '0') then
        call('HSET', P .. 'cv:' .. rid, 's', step, 'c', snapshot)
      end
      requeue(c, rid, {bid = bid, cl = h[1], tn = h[2], seq = h[3]}, row, h[4], h[5], 0)
    end
    reply[#reply + 1] = verdict
    reply[#reply + 1] = row and row.stp or 0
  end
  reply[2] = c.lsn
  return reply
end

-- boot bid... -> OK 0.  The device failed under these batches: their leases end now, and the next reap
-- blames what still runs of them as it does after a crash.
local function abandon(K, A)
  local c = begin(K)
  local boot = name(A[1], 'boot')
  if #A < 2 or #A - 1 > PACK_ROWS_MAX then bad('batches') end
  for i = 2, #A do name(A[i], 'bid') end
  for i = 2, #A do
    if call('HGET', c.P .. 'b:' .. A[i], '@w') == boot then call('ZADD', c.P .. 'lease', 'XX', 1, A[i]) end
  end
  return {'OK', 0}
end

-- boot ttl_ms lease_ms state bid... -> OK 0 drain(0|1) lost_bid... | WORKERS_FULL 0 n
-- Registers the worker and renews the batches it owns: for a worker whose step takes longer than a
-- lease. It must stop calling while its device hangs.
local function beat(K, A)
  local c = begin(K)
  local P, t, boot = c.P, c.t, name(A[1], 'boot')
  local ttl, lease = integer(A[2], 'ttl'), integer(A[3], 'lease')
  if not A[4] or #A[4] > 65536 then bad('state') end
  for i = 5, #A do name(A[i], 'bid') end
  if not call('ZSCORE', P .. 'workers', boot) and call('ZCARD', P .. 'workers') >= WORKERS_MAX then
    return {'WORKERS_FULL', 0, WORKERS_MAX}
  end
  call('SET', P .. 'w:' .. boot, A[4], 'PX', ttl)
  call('ZADD', P .. 'workers', t + ttl, boot)
  local reply = {'OK', 0, call('EXISTS', P .. 'drain:' .. boot)}
  for i = 5, #A do
    if call('HGET', P .. 'b:' .. A[i], '@w') == boot then call('ZADD', P .. 'lease', 'XX', 'GT', t + lease, A[i])
    else reply[#reply + 1] = A[i] end
  end
  return reply
end

-- boot -> OK.  After the worker has finished or handed back its rows.
local function leave(K, A)
  local c = begin(K)
  name(A[1], 'boot')
  call('ZREM', c.P .. 'workers', A[1])
  call('DEL', c.P .. 'w:' .. A[1], c.P .. 'drain:' .. A[1])
  return {'OK', 0}
end

-- boot -> OK.  Its next beat is told to drain.
local function drain(K, A)
  local c = begin(K)
  call('SET', c.P .. 'drain:' .. name(A[1], 'boot'), 1, 'PX', 3600000)
  return {'OK', 0}
end

-- -> OK 0 (boot state)...
local function workers(K, A)
  local c = begin(K)
  local reply = {'OK', 0}
  for _, boot in ipairs(call('ZRANGEBYSCORE', c.P .. 'workers', '(' .. string.format('%.0f', c.t), '+inf')) do
    local state = call('GET', c.P .. 'w:' .. boot)
    if state then
      reply[#reply + 1] = boot
      reply[#reply + 1] = state
    end
  end
  return reply
end

-- Gateway. ----------------------------------------------------------------------------------------

-- The gateways that are told of a request's events: `text`, oldest first, separated by commas.
local function watch(c, rid, h, text)
  call('HSET', c.P .. 'r:' .. rid, 'gw', text)
  local row = h.st == 'running' and parse_row(call('HGET', c.P .. 'b:' .. h.bid, rid))
  if row then
    call('HSET', c.P .. 'b:' .. h.bid, rid, running_row(row.att, row.stp, row.steps, row.deadline, text, row.use))
  end
end

local function others(watchers, gateway)
  local left = {}
  for watcher in string.gmatch(watchers, '[^,]+') do
    if watcher ~= gateway then left[#left + 1] = watcher end
  end
  return left
end

-- rid tenant why [gateway] -> OK lsn | ALREADY 0 state | WATCHED 0 state | NOT_FOUND
-- Another tenant's request is not found.
local function cancel(K, A)
  local c = begin(K)
  if #A < 3 or #A > 4 or #A[3] > 256 then bad('arity or why') end
  local h = call('HMGET', c.P .. 'r:' .. name(A[1], 'rid'), 'st', 'tn', 'gw', 'bid')
  if not h[1] or h[2] ~= name(A[2], 'tenant') then return {'NOT_FOUND', 0} end
  if TERMINAL[h[1]] then return {'ALREADY', 0, h[1]} end
  if A[4] then  -- this gateway's client left: the request lives on while another gateway waits for it
    local left = others(h[3], name(A[4], 'gateway'))
    if #left > 0 then
      local text = table.concat(left, ',')
      if text ~= h[3] then watch(c, A[1], {st = h[1], bid = h[4]}, text) end
      return {'WATCHED', 0, h[1]}
    end
  end
  settle(c, A[1], 'cancelled', A[3], nil, '')
  flush(c)
  return {'OK', c.lsn}
end

local function read_events(c, rid, after, count)
  local P, r = c.P, c.P .. 'r:' .. rid
  local h = call('HMGET', r, 'st', 'stp', 'att', 'use', 'why', 'charge', 'res', 'sub', 'bid')
  local row = h[1] == 'running' and parse_row(call('HGET', P .. 'b:' .. h[9], rid))
  if row then h[2], h[4] = row.stp, row.use end
  local reply = {'OK', 0, h[1], tonumber(h[2]), tonumber(h[3]), h[4], h[5] or '', tonumber(h[6] or '0'), h[7] or '',
                 c.t - tonumber(h[8])}
  if count > 0 then
    for _, event in ipairs(call('XRANGE', P .. 'ev:' .. rid, string.format('%.0f-1', after + 1), '+', 'COUNT',
                                math.min(count, EVENTS_MAX))) do
      reply[#reply + 1] = tonumber(string.match(event[1], '^%d+'))
      reply[#reply + 1] = event[2][2]
      reply[#reply + 1] = event[2][4]
    end
  end
  return reply
end

-- rid tenant after_step count -> OK 0 state step attempt usage why charge result age_ms (step kind data)...
--   | NOT_FOUND
local function events(K, A)
  local c = begin(K)
  local rid, tn = name(A[1], 'rid'), name(A[2], 'tenant')
  local after, count = integer(A[3], 'after'), integer(A[4], 'count')
  if call('HGET', c.P .. 'r:' .. rid, 'tn') ~= tn then return {'NOT_FOUND', 0} end
  return read_events(c, rid, after, count)
end

-- rid tenant after_step count gateway -> as events.  From now on that gateway is told of new events.
local function attach(K, A)
  local c = begin(K)
  local P, rid, tn = c.P, name(A[1], 'rid'), name(A[2], 'tenant')
  local after, count, gateway = integer(A[3], 'after'), integer(A[4], 'count'), name(A[5], 'gateway')
  local r = P .. 'r:' .. rid
  local h = call('HMGET', r, 'tn', 'st', 'gw', 'bid')
  if h[1] ~= tn then return {'NOT_FOUND', 0} end
  if not TERMINAL[h[2]] then
    local watchers = others(h[3], gateway)
    watchers[#watchers + 1] = gateway
    while #watchers > WATCHERS_MAX do table.remove(watchers, 1) end
    local text = table.concat(watchers, ',')
    if text ~= h[3] then watch(c, rid, {st = h[2], bid = h[4]}, text) end
  end
  return read_events(c, rid, after, count)
end

-- Operator. ---------------------------------------------------------------------------------------

-- id -> OK 0 removed.  Everything up to this entry is exported: the ledger forgets it.
local function ledger_ack(K, A)
  local c = begin(K)
  local ms, n = string.match(A[1] or '', '^(%d+)%-(%d+)$')
  if not ms then bad('id') end
  call('HSET', c.P .. 'meta', 'bill', A[1])
  return {'OK', 0, call('XTRIM', c.P .. 'ledger', 'MINID', ms .. '-' .. string.format('%.0f', tonumber(n) + 1))}
end

-- id... -> OK 0 removed.  Dead letters that somebody has looked at.
local function dlq_drop(K, A)
  local c = begin(K)
  if #A < 1 or #A > PACK_ROWS_MAX then bad('ids') end
  for i = 1, #A do
    if not string.match(A[i], '^%d+%-%d+$') or #A[i] > 41 then bad('id') end
  end
  return {'OK', 0, call('XDEL', c.P .. 'dlq', unpack(A))}
end

-- -> OK 0 name value ...
local function stats(K, A)
  local c = begin(K)
  local P = c.P
  local tot = call('HMGET', P .. 'tot', 'n', 'rsv')
  local reply = {'OK', 0, 'live', tonumber(tot[1] or '0'), 'cost', tonumber(tot[2] or '0'),
                 'batches', call('ZCARD', P .. 'lease'), 'ledger', call('XLEN', P .. 'ledger'),
                 'dead_letters', call('XLEN', P .. 'dlq'), 'workers', call('ZCOUNT', P .. 'workers', c.t, '+inf')}
  local ready = 0
  for _, l in ipairs(call('SMEMBERS', P .. 'lanes')) do ready = ready + call('XLEN', P .. 'ready:' .. l) end
  reply[#reply + 1] = 'ready'
  reply[#reply + 1] = ready
  for _, class in ipairs(CLASSES) do
    local depth, oldest = 0, c.t
    for _, tn in ipairs(call('SMEMBERS', P .. 'ten:' .. class)) do
      local queue = P .. 'q:' .. class .. ':' .. tn
      depth = depth + call('ZCARD', queue)
      local first = call('ZRANGE', queue, 0, 0)[1]
      if first then oldest = math.min(oldest, tonumber(call('HGET', P .. 'r:' .. first, 'sub'))) end
    end
    for _, value in ipairs({'waiting_' .. class, depth, 'oldest_ms_' .. class, c.t - oldest}) do
      reply[#reply + 1] = value
    end
  end
  return reply
end

local function register(function_name, callback, ...)
  redis.register_function{function_name = 'cinnabar_v1_' .. function_name, callback = callback, flags = {...}}
end
-- What takes new work is refused by a full Redis before it starts; what drains it is not.
register('enqueue', enqueue)
register('dispatch', dispatch)
register('open', open, 'allow-oom')
register('lead', lead, 'allow-oom')
register('resign', resign, 'allow-oom')
register('refuse', refuse, 'allow-oom')
register('reap', reap, 'allow-oom')
register('lane', lane, 'allow-oom')
register('start', start, 'allow-oom')
register('progress', progress, 'allow-oom')
register('finish', finish, 'allow-oom')
register('hand_back', hand_back, 'allow-oom')
register('abandon', abandon, 'allow-oom')
register('beat', beat, 'allow-oom')
register('leave', leave, 'allow-oom')
register('drain', drain, 'allow-oom')
register('cancel', cancel, 'allow-oom')
register('attach', attach, 'allow-oom')
register('ledger_ack', ledger_ack, 'allow-oom')
register('dlq_drop', dlq_drop, 'allow-oom')
register('version', version, 'no-writes')
register('queues', queues, 'no-writes')
register('waiting', waiting, 'no-writes')
register('workers', workers, 'no-writes')
register('events', events, 'no-writes')
register('stats', stats, 'no-writes')
