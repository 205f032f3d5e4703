#include "common/queue/queue.h"

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/queue/library.h"

namespace cinnabar {
namespace {

constexpr size_t kRowsPerCall = 256;        // PACK_ROWS_MAX
constexpr int64_t kFeedEntriesMax = 65536;  // FEED_MAX
constexpr int64_t kScanPage = 512;

std::string Ms(absl::Duration duration) {
  return absl::StrCat(std::max<int64_t>(absl::ToInt64Milliseconds(duration), 0));
}

absl::Status Malformed(absl::string_view function) {
  return absl::DataLossError(absl::StrCat(function, ": the reply does not have the form we know"));
}

// Takes the elements of a reply one by one; what is missing or of another type is remembered.
class Reader {
 public:
  explicit Reader(std::vector<RedisReply>& elements, size_t next = 0)
      : elements_(elements), next_(next) {}

  bool more() const { return ok_ && next_ < elements_.size(); }
  bool ok() const { return ok_; }
  void Fail() { ok_ = false; }

  std::string Text() {
    RedisReply* reply = Next();
    if (reply == nullptr) return "";
    if (!reply->is_text()) Fail();
    return std::move(reply->text);
  }
  int64_t Integer() {
    RedisReply* reply = Next();
    if (reply == nullptr) return 0;
    if (reply->is_integer()) return reply->integer;
    int64_t value = 0;
    if (!reply->is_text() || !absl::SimpleAtoi(reply->text, &value)) Fail();
    return value;
  }
  int32_t Small() { return static_cast<int32_t>(Integer()); }
  absl::Duration Milliseconds() { return absl::Milliseconds(Integer()); }
  absl::Time Time() { return absl::FromUnixMillis(Integer()); }
  template <typename T>
  T Parsed(absl::StatusOr<T> (*parse)(absl::string_view)) {
    absl::StatusOr<T> value = parse(Text());
    if (!value.ok()) {
      Fail();
      return T{};
    }
    return *value;
  }

 private:
  RedisReply* Next() {
    if (next_ >= elements_.size()) {
      Fail();
      return nullptr;
    }
    return &elements_[next_++];
  }
  std::vector<RedisReply>& elements_;
  size_t next_;
  bool ok_ = true;
};

// The field-value pairs of a stream entry.
class Fields {
 public:
  explicit Fields(std::vector<RedisReply>& pairs) {
    for (size_t i = 0; i + 1 < pairs.size(); i += 2)
      values_[pairs[i].text] = std::move(pairs[i + 1].text);
  }
  std::string Text(absl::string_view name) {
    const auto found = values_.find(std::string_view(name.data(), name.size()));
    if (found != values_.end()) return found->second;
    ok_ = false;
    return "";
  }
  int64_t Integer(absl::string_view name) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(Text(name), &value)) ok_ = false;
    return value;
  }
  template <typename T>
  T Parsed(absl::string_view name, absl::StatusOr<T> (*parse)(absl::string_view)) {
    absl::StatusOr<T> value = parse(Text(name));
    if (value.ok()) return *value;
    ok_ = false;
    return T{};
  }
  bool Has(absl::string_view name) const {
    return values_.find(std::string_view(name.data(), name.size())) != values_.end();
  }
  bool ok() const { return ok_; }

 private:
  std::map<std::string, std::string, std::less<>> values_;
  bool ok_ = true;
};

// The entries of XRANGE, or of one stream of XREAD: (id, fields).
bool IsEntry(const RedisReply& entry) {
  return entry.is_array() && entry.elements.size() == 2 && entry.elements[1].is_array();
}

// XREAD and XREADGROUP of one stream.
std::vector<RedisReply>* EntriesOf(RedisReply& reply) {
  if (!reply.is_array() || reply.elements.size() != 1 || reply.elements[0].elements.size() != 2)
    return nullptr;
  return &reply.elements[0].elements[1].elements;
}

// "12-3" as numbers; (0, 0) when it is not an id.
std::pair<uint64_t, uint64_t> StreamId(absl::string_view id) {
  const std::pair<absl::string_view, absl::string_view> halves =
      absl::StrSplit(id, absl::MaxSplits('-', 1));
  std::pair<uint64_t, uint64_t> numbers = {0, 0};
  if (!absl::SimpleAtoi(halves.first, &numbers.first)) return {0, 0};
  if (!halves.second.empty() && !absl::SimpleAtoi(halves.second, &numbers.second)) return {0, 0};
  return numbers;
}

struct OutcomeName {
  absl::string_view code;
  EnqueueOutcome outcome;
};
constexpr OutcomeName kOutcomes[] = {{"OK", EnqueueOutcome::kAccepted},
                                     {"DUPLICATE", EnqueueOutcome::kDuplicate},
                                     {"MISMATCH", EnqueueOutcome::kMismatch},
                                     {"OVERLOADED", EnqueueOutcome::kOverloaded},
                                     {"LEDGER_FULL", EnqueueOutcome::kLedgerFull},
                                     {"QUEUE_FULL", EnqueueOutcome::kQueueFull},
                                     {"TENANT_REQUESTS", EnqueueOutcome::kTenantRequests},
                                     {"TENANT_COST", EnqueueOutcome::kTenantCost},
                                     {"BUDGET", EnqueueOutcome::kBudget},
                                     {"RATE", EnqueueOutcome::kRate}};

absl::StatusOr<DispatchVerdict> ParseDispatchVerdict(absl::string_view code) {
  if (code == "OK") return DispatchVerdict::kOk;
  if (code == "GONE") return DispatchVerdict::kGone;
  if (code == "NOT_QUEUED") return DispatchVerdict::kNotQueued;
  if (code == "EXPIRED") return DispatchVerdict::kExpired;
  if (code == "BACKOFF") return DispatchVerdict::kBackoff;
  if (code == "SUSPECT") return DispatchVerdict::kSuspect;
  return absl::DataLossError(absl::StrCat("not a verdict: ", code));
}

absl::StatusOr<RowVerdict> ParseRowVerdict(absl::string_view code) {
  if (code == "OK" || code == "DUPLICATE") return RowVerdict::kOk;
  if (code == "REWIND") return RowVerdict::kRewind;
  if (code == "GONE") return RowVerdict::kGone;
  if (code == "STALE") return RowVerdict::kStale;
  if (code == "DONE") return RowVerdict::kDone;
  if (code == "FAILED") return RowVerdict::kFailed;
  if (code == "CANCELLED") return RowVerdict::kCancelled;
  if (code == "EXPIRED") return RowVerdict::kExpired;
  if (code == "BAD_STEP") return RowVerdict::kBadStep;
  return absl::DataLossError(absl::StrCat("not a verdict: ", code));
}

std::vector<RowReply> ReadRows(Reader& reader) {
  std::vector<RowReply> rows;
  while (reader.more()) {
    const RowVerdict verdict = reader.Parsed(&ParseRowVerdict);
    rows.push_back({.verdict = verdict, .step = reader.Small()});
  }
  return rows;
}

// In the order of WAITING in queue_functions.lua, after the id.
WaitingRequest ReadWaiting(Reader& reader) {
  WaitingRequest request;
  request.id = reader.Text();
  request.tenant = reader.Text();
  request.request_class = reader.Parsed(&ParseRequestClass);
  request.prompt_tokens = reader.Integer();
  request.canvas_tokens = reader.Integer();
  request.steps_max = reader.Small();
  request.step = reader.Small();
  request.cost = reader.Integer();
  request.attempts_without_progress = reader.Small();
  request.not_before = reader.Time();
  request.enqueued_at = reader.Time();
  request.deadline = reader.Time();
  request.sequence = reader.Integer();
  request.hint = reader.Text();
  return request;
}

absl::StatusOr<FeedEntry> ReadFeedEntry(std::vector<RedisReply>& pairs) {
  Fields fields(pairs);
  FeedEntry entry;
  WaitingRequest& request = entry.request;
  const std::string kind = fields.Text("k");
  if (kind == "s") {
    entry.kind = FeedEntry::Kind::kPackStarted;
    entry.batch = fields.Text("bid");
    entry.worker = fields.Text("own");
  } else {
    request.id = fields.Text("rid");
    request.tenant = fields.Text("tn");
    request.request_class = fields.Parsed("cl", &ParseRequestClass);
    request.step = static_cast<int32_t>(fields.Integer("stp"));
    request.hint = fields.Text("hint");
    if (kind == "t") {
      entry.kind = FeedEntry::Kind::kTerminal;
      if (fields.Has("lg")) request.canvas_tokens = fields.Integer("lg");  // since revision 2
      entry.state = fields.Parsed("st", &ParseRequestState);
      entry.usage = fields.Parsed("use", &ParseUsage);
    } else if (kind == "q") {
      entry.kind = FeedEntry::Kind::kQueued;
      request.prompt_tokens = fields.Integer("lp");
      request.canvas_tokens = fields.Integer("lg");
      request.steps_max = static_cast<int32_t>(fields.Integer("steps"));
      request.cost = fields.Integer("cost");
      request.attempts_without_progress = static_cast<int32_t>(fields.Integer("np"));
      request.not_before = absl::FromUnixMillis(fields.Integer("nb"));
      request.enqueued_at = absl::FromUnixMillis(fields.Integer("sub"));
      request.deadline = absl::FromUnixMillis(fields.Integer("dl"));
      request.sequence = fields.Integer("seq");
    } else {
      return Malformed("feed");
    }
  }
  if (!fields.ok()) return Malformed("feed");
  return entry;
}

void AddProgress(const ProgressRow& row, std::vector<std::string>& args) {
  args.insert(args.end(),
              {row.lease.request, row.lease.batch, absl::StrCat(row.lease.attempt),
               absl::StrCat(row.step), FormatUsage(row.usage), row.delta, row.snapshot});
}

std::vector<std::string> FinishArgs(absl::string_view boot, const FinishRow& row) {
  return {std::string(boot),
          row.lease.request,
          row.lease.batch,
          absl::StrCat(row.lease.attempt),
          absl::StrCat(row.last_step),
          row.failed ? "failed" : "done",
          FormatUsage(row.usage),
          row.why,
          row.result};
}

std::string RandomSite() {
  std::random_device entropy;
  return absl::StrFormat("site-%08x%08x", entropy(), entropy());
}

std::vector<std::string> DispatchArgs(int64_t epoch, const PackOrder& order) {
  std::vector<std::string> args = {
      absl::StrCat(epoch),    order.batch, order.lane, absl::StrCat(order.ready_packs_max),
      Ms(order.start_within), order.info};
  args.insert(args.end(), order.requests.begin(), order.requests.end());
  return args;
}

absl::StatusOr<DispatchResult> ReadDispatch(std::vector<RedisReply>& elements,
                                            size_t num_requests) {
  Reader reader(elements);
  const std::string code = reader.Text();
  (void)reader.Integer();
  DispatchResult result;
  if (code == "STALE_EPOCH") {
    result.outcome = DispatchResult::Outcome::kStaleEpoch;
    return result;
  }
  if (code == "READY_FULL") {
    result.outcome = DispatchResult::Outcome::kReadyFull;
    return result;
  }
  while (reader.more()) {
    const DispatchVerdict verdict = reader.Parsed(&ParseDispatchVerdict);
    const int64_t attempt = reader.Integer();
    result.rows.push_back({.verdict = verdict, .attempt = attempt, .step = reader.Small()});
  }
  if (code != "OK" || !reader.ok() || result.rows.size() != num_requests)
    return Malformed("dispatch");
  return result;
}

// FCALL cinnabar_v1_<function> 1 <prefix> args...
struct FunctionCall {
  FunctionCall(absl::string_view function, const std::string& prefix,
               absl::Span<const std::string> args)
      : name(absl::StrCat("cinnabar_v1_", function)), words({"FCALL", name, "1", prefix}) {
    words.insert(words.end(), args.begin(), args.end());
  }
  FunctionCall(const FunctionCall&) = delete;
  std::string name;
  std::vector<absl::string_view> words;
};

}  // namespace

Queue::Queue(RedisClient& redis, QueueOptions options)
    : redis_(redis),
      options_(std::move(options)),
      prefix_(absl::StrCat("cb:{", options_.partition, "}:")) {
  redis_.set_on_connect([this](RedisClient& fresh) { return Greet(fresh); });
}

std::string Queue::Key(absl::string_view name) const { return absl::StrCat(prefix_, name); }

std::string SiteMemory::Get() const {
  MutexLock lock(mu_);
  return site_;
}

void SiteMemory::Set(const std::string& site) {
  MutexLock lock(mu_);
  site_ = site;
}

absl::Status Queue::Greet(RedisClient& redis) {
  CINNABAR_RETURN_IF_ERROR(EnsureQueueLibrary(redis, options_.may_load_library));
  // What this client or another of the process once saw it insists on, whatever the options leave
  // open. A site that is made gets a name of its own: another empty server can never pass for it.
  std::string site = mark_.site;
  if (site.empty() && options_.site_memory != nullptr) site = options_.site_memory->Get();
  const bool seen = !site.empty();
  const bool may_create = options_.may_create_site && !seen;
  const bool insist = seen || !options_.site.empty();
  if (!seen) site = !insist && may_create ? RandomSite() : options_.site;
  const std::vector<std::string> args = {site,
                                         redis.server().run_id,
                                         absl::StrCat(mark_.generation),
                                         absl::StrCat(mark_.change),
                                         may_create ? "1" : "0",
                                         insist ? "1" : "0"};
  const FunctionCall call("open", prefix_, args);
  CINNABAR_ASSIGN_OR_RETURN(RedisReply reply, redis.Command(call.words), "open the queue");
  Reader reader(reply.elements);
  const std::string code = reader.Text();
  if (code == "NO_SITE") {
    return absl::FailedPreconditionError(absl::StrCat(
        "Redis at ", redis.server().address.ToString(), " holds no data of partition ",
        options_.partition, mark_.site.empty() ? "" : " any more",
        ": the wrong server or an empty volume; restore it, or create the site on purpose"));
  }
  const int64_t change = reader.Integer();
  const std::string found = reader.Text();
  if (code == "WRONG_SITE") {
    return absl::FailedPreconditionError(
        absl::StrCat("Redis at ", redis.server().address.ToString(), " holds site '", found,
                     "', not '", site, "'"));
  }
  const int64_t generation = reader.Integer();
  const bool rewound = reader.Integer() != 0;
  if (code != "OK" || !reader.ok()) return Malformed("open");
  if (mark_.generation != 0 && mark_.generation != generation) ++mark_.restarts;
  if (rewound) ++mark_.rewinds;
  mark_.site = found;
  if (options_.site_memory != nullptr) options_.site_memory->Set(found);
  mark_.generation = generation;
  mark_.change = change;
  return absl::OkStatus();
}

absl::Status Queue::Open() { return Call("stats", {}).status(); }

absl::StatusOr<std::vector<RedisReply>> Queue::Accept(absl::string_view function,
                                                      RedisReply reply) {
  if (!reply.is_array() || reply.elements.empty() || !reply.elements[0].is_text())
    return Malformed(function);
  if (reply.elements.size() > 1 && reply.elements[1].is_integer()) {
    mark_.change = std::max(mark_.change, reply.elements[1].integer);
  }
  return std::move(reply.elements);
}

absl::StatusOr<std::vector<RedisReply>> Queue::Call(absl::string_view function,
                                                    absl::Span<const std::string> args) {
  const FunctionCall call(function, prefix_, args);
  absl::StatusOr<RedisReply> reply = redis_.Retry(call.words);
  if (absl::IsUnimplemented(reply.status())) {
    // Somebody flushed the functions under an open connection: a new one loads them.
    redis_.Close();
    reply = redis_.Retry(call.words);
  }
  if (!reply.ok()) return internal::WithContext(reply.status(), std::string(function));
  return Accept(function, *std::move(reply));
}

absl::StatusOr<EnqueueResult> Queue::Enqueue(const EnqueueRequest& request,
                                             const AdmissionLimits& limits) {
  const auto number = [](int64_t value) { return absl::StrCat(value); };
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                            Call("enqueue", {request.id,
                                             request.tenant,
                                             std::string(RequestClassName(request.request_class)),
                                             request.idempotency_key,
                                             request.body_digest,
                                             number(request.prompt_tokens),
                                             number(request.canvas_tokens),
                                             number(request.steps_max),
                                             number(request.cost),
                                             Ms(request.deadline),
                                             Ms(request.keep),
                                             request.gateway,
                                             request.tag,
                                             request.hint,
                                             request.payload,
                                             request.replay ? "1" : "0",
                                             number(limits.cost_max),
                                             number(limits.queue_requests_max),
                                             number(limits.tenant_requests_max),
                                             number(limits.tenant_cost_max),
                                             number(limits.requests.per_minute),
                                             number(limits.requests.burst),
                                             number(limits.tokens.per_minute),
                                             number(limits.tokens.burst),
                                             number(limits.cost.per_minute),
                                             number(limits.cost.burst),
                                             limits.budget_period,
                                             number(limits.budget_max_microdollars),
                                             number(request.input_price_microdollars),
                                             number(request.output_price_microdollars)}),
                            "request ", request.id);
  Reader reader(elements);
  const std::string code = reader.Text();
  (void)reader.Integer();
  EnqueueResult result;
  const auto* named = std::find_if(std::begin(kOutcomes), std::end(kOutcomes),
                                   [&](const OutcomeName& each) { return each.code == code; });
  if (named == std::end(kOutcomes)) return Malformed("enqueue");
  result.outcome = named->outcome;
  const auto read_rates = [&] {
    for (RateRemaining* rate : {&result.requests, &result.tokens, &result.cost}) {
      rate->remaining = reader.Integer();
      rate->reset = reader.Milliseconds();
    }
  };
  switch (result.outcome) {
    case EnqueueOutcome::kAccepted:
      result.id = reader.Text();
      result.state = reader.Parsed(&ParseRequestState);
      read_rates();
      break;
    case EnqueueOutcome::kDuplicate:
      result.id = reader.Text();
      result.state = reader.Parsed(&ParseRequestState);
      break;
    case EnqueueOutcome::kMismatch:
      result.id = reader.Text();
      break;
    case EnqueueOutcome::kOverloaded:
    case EnqueueOutcome::kLedgerFull:
    case EnqueueOutcome::kQueueFull:
    case EnqueueOutcome::kTenantRequests:
    case EnqueueOutcome::kTenantCost:
    case EnqueueOutcome::kBudget:
      result.level = reader.Integer();
      break;
    case EnqueueOutcome::kRate:
      result.retry_after = reader.Milliseconds();
      result.detail = reader.Text();
      read_rates();
      break;
  }
  if (!reader.ok()) return Malformed("enqueue");
  return result;
}

absl::StatusOr<RequestState> Queue::Cancel(absl::string_view request, absl::string_view tenant,
                                           absl::string_view why, absl::string_view leaving) {
  std::vector<std::string> args = {std::string(request), std::string(tenant), std::string(why)};
  if (!leaving.empty()) args.emplace_back(leaving);
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("cancel", args));
  Reader reader(elements);
  const std::string code = reader.Text();
  if (code == "NOT_FOUND") return absl::NotFoundError(absl::StrCat("no request ", request));
  if (code == "OK") return RequestState::kCancelled;
  (void)reader.Integer();
  const RequestState state = reader.Parsed(&ParseRequestState);
  if ((code != "ALREADY" && code != "WATCHED") || !reader.ok()) return Malformed("cancel");
  return state;
}

absl::StatusOr<RequestView> Queue::ReadView(absl::string_view function, absl::string_view request,
                                            absl::Span<const std::string> args) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call(function, args));
  Reader reader(elements);
  if (reader.Text() == "NOT_FOUND")
    return absl::NotFoundError(absl::StrCat("no request ", request));
  (void)reader.Integer();
  RequestView view;
  view.state = reader.Parsed(&ParseRequestState);
  view.step = reader.Small();
  view.attempt = reader.Integer();
  view.usage = reader.Parsed(&ParseUsage);
  view.why = reader.Text();
  view.charge_microdollars = reader.Integer();
  view.result = reader.Text();
  view.age = reader.Milliseconds();
  while (reader.more()) {
    QueueEvent event;
    event.request = std::string(request);
    event.step = reader.Small();
    const std::string kind = reader.Text();
    event.data = reader.Text();
    if (kind != "p") {
      CINNABAR_ASSIGN_OR_RETURN(event.final_state, ParseRequestState(kind));
      if (!view.result.empty()) event.data = view.result;  // kept once, in the record
    }
    view.events.push_back(std::move(event));
  }
  if (!reader.ok()) return Malformed(function);
  return view;
}

absl::StatusOr<RequestView> Queue::Events(absl::string_view request, absl::string_view tenant,
                                          int32_t after_step, int32_t events_max) {
  return ReadView("events", request,
                  {std::string(request), std::string(tenant), absl::StrCat(after_step),
                   absl::StrCat(events_max)});
}

absl::StatusOr<RequestView> Queue::Attach(absl::string_view request, absl::string_view tenant,
                                          int32_t after_step, int32_t events_max,
                                          absl::string_view gateway) {
  return ReadView("attach", request,
                  {std::string(request), std::string(tenant), absl::StrCat(after_step),
                   absl::StrCat(events_max), std::string(gateway)});
}

std::string Queue::EventChannel(absl::string_view gateway) const {
  return absl::StrCat(prefix_, "gw:", gateway);
}

absl::StatusOr<std::vector<QueueEvent>> Queue::ParseEventMessage(absl::string_view payload) {
  std::vector<QueueEvent> events;
  while (!payload.empty()) {
    // "<id> <step> <kind> <bytes> <data>", and the next one right after.
    const std::vector<absl::string_view> parts = absl::StrSplit(payload, absl::MaxSplits(' ', 4));
    QueueEvent event;
    size_t num_bytes = 0;
    if (parts.size() != 5 || !absl::SimpleAtoi(parts[1], &event.step) ||
        !absl::SimpleAtoi(parts[3], &num_bytes) || num_bytes > parts[4].size()) {
      return Malformed("event message");
    }
    event.request = std::string(parts[0]);
    if (parts[2] != "p") {
      CINNABAR_ASSIGN_OR_RETURN(event.final_state, ParseRequestState(parts[2]));
    }
    event.data = std::string(parts[4].substr(0, num_bytes));
    payload = parts[4].substr(num_bytes);
    events.push_back(std::move(event));
  }
  return events;
}

absl::StatusOr<Leadership> Queue::Lead(absl::string_view me, absl::Duration lease_for) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                            Call("lead", {std::string(me), Ms(lease_for)}));
  Reader reader(elements);
  Leadership leadership;
  leadership.leading = reader.Text() == "LEADER";
  (void)reader.Integer();
  leadership.epoch = reader.Integer();
  leadership.leader = leadership.leading ? std::string(me) : reader.Text();
  if (!reader.ok()) return Malformed("lead");
  return leadership;
}

absl::Status Queue::Resign(absl::string_view me) {
  return Call("resign", {std::string(me)}).status();
}

absl::StatusOr<DispatchResult> Queue::Dispatch(int64_t epoch, const PackOrder& order) {
  return std::move(DispatchAll(epoch, absl::MakeConstSpan(&order, 1))[0]);
}

bool Queue::PipelineAgain(const absl::Status& status, int32_t attempt) {
  const bool again = absl::IsUnavailable(status) || absl::IsUnimplemented(status);
  const RedisRetryPolicy& retry = redis_.options().retry;
  if (!again || attempt >= retry.attempts_max) return false;
  if (absl::IsUnimplemented(status)) redis_.Close();  // the library went: greet again
  redis_.environment().Sleep(RedisBackoff(retry, attempt + 1, redis_.environment().Uniform()));
  return true;
}

std::vector<absl::StatusOr<DispatchResult>> Queue::DispatchAll(int64_t epoch,
                                                               absl::Span<const PackOrder> orders) {
  std::vector<absl::StatusOr<DispatchResult>> results(
      orders.size(), absl::StatusOr<DispatchResult>(absl::UnavailableError("not sent")));
  // As Publish: all of it again after a loss, for a repeated call changes nothing.
  for (int32_t attempt = 1;; ++attempt) {
    absl::Status status;
    size_t num_sent = 0;
    for (const PackOrder& order : orders) {
      const std::vector<std::string> args = DispatchArgs(epoch, order);
      const FunctionCall call("dispatch", prefix_, args);
      if (!redis_.Append(call.words).ok()) break;  // a pipeline that is too long: the rest waits
      ++num_sent;
    }
    std::vector<absl::StatusOr<RedisReply>> replies = redis_.Flush();
    for (size_t i = 0; i < num_sent && i < replies.size(); ++i) {
      results[i] = [&]() -> absl::StatusOr<DispatchResult> {
        if (!replies[i].ok()) return internal::WithContext(replies[i].status(), "dispatch");
        CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                                  Accept("dispatch", *std::move(replies[i])));
        return ReadDispatch(elements, orders[i].requests.size());
      }();
      if (status.ok()) status = results[i].status();
    }
    if (!PipelineAgain(status, attempt)) return results;
  }
}

absl::StatusOr<RefuseResult> Queue::Refuse(int64_t epoch, absl::string_view why,
                                           absl::Span<const std::string> requests) {
  RefuseResult result;
  for (size_t first = 0; first < requests.size(); first += kRowsPerCall) {
    const absl::Span<const std::string> part =
        requests.subspan(first, std::min(kRowsPerCall, requests.size() - first));
    std::vector<std::string> args = {absl::StrCat(epoch), std::string(why)};
    args.insert(args.end(), part.begin(), part.end());
    CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("refuse", args));
    if (elements[0].text == "STALE_EPOCH") return RefuseResult{.stale_epoch = true, .rows = {}};
    Reader reader(elements, 2);
    while (reader.more()) result.rows.push_back(reader.Parsed(&ParseDispatchVerdict));
    if (elements[0].text != "OK" || !reader.ok() || result.rows.size() != first + part.size())
      return Malformed("refuse");
  }
  return result;
}

absl::StatusOr<ReapResult> Queue::Reap(int64_t epoch, const ReapLimits& limits) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                            Call("reap", {absl::StrCat(epoch), absl::StrCat(limits.count_max),
                                          absl::StrCat(limits.attempts_without_progress_max),
                                          absl::StrCat(limits.crashes_max), Ms(limits.backoff)}));
  Reader reader(elements);
  ReapResult result;
  const std::string code = reader.Text();
  if (code == "STALE_EPOCH") {
    result.stale_epoch = true;
    return result;
  }
  (void)reader.Integer();
  result.requeued = reader.Integer();
  result.not_started = reader.Integer();
  result.dead = reader.Integer();
  result.expired = reader.Integer();
  if (code != "OK" || !reader.ok()) return Malformed("reap");
  return result;
}

absl::StatusOr<std::vector<WaitingRequest>> Queue::ScanWaiting(int64_t requests_max,
                                                               std::string& position) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("queues", {}));
  Reader queues(elements);
  (void)queues.Text();
  // Past every entry of the change that the scan has seen whole.
  position = absl::StrCat(queues.Integer(), "-999999");
  std::vector<WaitingRequest> requests;
  while (queues.more()) {
    const std::string request_class = queues.Text();
    const std::string tenant = queues.Text();
    (void)queues.Integer();
    int64_t after = 0;
    while (queues.ok()) {
      const int64_t page =
          std::min<int64_t>(kScanPage, requests_max - static_cast<int64_t>(requests.size()));
      if (page <= 0) return requests;
      CINNABAR_ASSIGN_OR_RETURN(
          std::vector<RedisReply> rows,
          Call("waiting", {request_class, tenant, absl::StrCat(after), absl::StrCat(page)}));
      for (size_t i = 2; i < rows.size(); ++i) {
        Reader reader(rows[i].elements);
        requests.push_back(ReadWaiting(reader));
        if (!reader.ok()) return Malformed("waiting");
        after = requests.back().sequence;
      }
      if (static_cast<int64_t>(rows.size()) - 2 < page) break;
    }
  }
  if (!queues.ok()) return Malformed("queues");
  return requests;
}

absl::StatusOr<Feed> Queue::ReadFeed(absl::string_view position, int32_t entries_max,
                                     absl::Duration block) {
  const std::string key = Key("feed");
  const std::string count = absl::StrCat(entries_max);
  const std::string block_ms = Ms(std::max(block, absl::Milliseconds(1)));
  absl::StatusOr<RedisReply> read =
      block <= absl::ZeroDuration()
          ? redis_.Command({"XREAD", "COUNT", count, "STREAMS", key, position})
          : redis_.Block({"XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", key, position},
                         block);
  CINNABAR_ASSIGN_OR_RETURN(RedisReply reply, std::move(read), "read the feed");
  Feed feed;
  feed.position = std::string(position);
  if (reply.is_nil()) return feed;
  std::vector<RedisReply>* entries = EntriesOf(reply);
  if (entries == nullptr) return Malformed("feed");
  for (RedisReply& each : *entries) {
    if (!IsEntry(each)) return Malformed("feed");
    feed.position = each.elements[0].text;
    CINNABAR_ASSIGN_OR_RETURN(FeedEntry entry, ReadFeedEntry(each.elements[1].elements));
    feed.entries.push_back(std::move(entry));
  }
  if (static_cast<int32_t>(feed.entries.size()) == entries_max) {
    // A full answer may mean that we lag; was the stream trimmed past our position?
    CINNABAR_RETURN_IF_ERROR(redis_.Append({"XLEN", key}));
    CINNABAR_RETURN_IF_ERROR(redis_.Append({"XRANGE", key, "-", "+", "COUNT", "1"}));
    const std::vector<absl::StatusOr<RedisReply>> replies = redis_.Flush();
    for (const absl::StatusOr<RedisReply>& each : replies) CINNABAR_RETURN_IF_ERROR(each.status());
    feed.gap = replies[0]->integer >= kFeedEntriesMax && !replies[1]->elements.empty() &&
               IsEntry(replies[1]->elements[0]) &&
               StreamId(replies[1]->elements[0].elements[0].text) > StreamId(position);
  }
  return feed;
}

absl::StatusOr<std::vector<WorkerEntry>> Queue::Workers() {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("workers", {}));
  Reader reader(elements, 2);
  std::vector<WorkerEntry> workers;
  while (reader.more()) {
    std::string boot = reader.Text();
    workers.push_back({.boot = std::move(boot), .state = reader.Text()});
  }
  if (!reader.ok()) return Malformed("workers");
  return workers;
}

absl::StatusOr<std::optional<Pack>> Queue::TakePack(absl::string_view lane, absl::Duration block) {
  const std::string key = Key(absl::StrCat("ready:", lane));
  const std::string block_ms = Ms(std::max(block, absl::Milliseconds(1)));
  // One name for all: the lease set, not the group's pending list, knows who holds what. NOACK
  // keeps that list empty.
  const auto read = [&] {
    if (block <= absl::ZeroDuration()) {
      return redis_.Command(
          {"XREADGROUP", "GROUP", "w", "w", "COUNT", "1", "NOACK", "STREAMS", key, ">"});
    }
    return redis_.Block({"XREADGROUP", "GROUP", "w", "w", "COUNT", "1", "BLOCK", block_ms, "NOACK",
                         "STREAMS", key, ">"},
                        block);
  };
  absl::StatusOr<RedisReply> reply = read();
  if (absl::IsNotFound(reply.status())) {
    CINNABAR_RETURN_IF_ERROR(Call("lane", {std::string(lane)}).status());
    reply = read();
  }
  if (!reply.ok()) return internal::WithContext(reply.status(), "take a pack");
  if (reply->is_nil()) return std::optional<Pack>();
  std::vector<RedisReply>* entries = EntriesOf(*reply);
  if (entries == nullptr || entries->size() != 1 || !IsEntry((*entries)[0]))
    return Malformed("take a pack");
  Fields fields((*entries)[0].elements[1].elements);
  Pack pack = {.batch = fields.Text("bid"),
               .solo = fields.Integer("solo") != 0,
               .info = fields.Text("info")};
  if (!fields.ok()) return Malformed("take a pack");
  return std::optional<Pack>(std::move(pack));
}

absl::StatusOr<StartResult> Queue::Start(absl::string_view boot, absl::string_view batch,
                                         absl::Duration lease_for) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                            Call("start", {std::string(boot), std::string(batch), Ms(lease_for)}),
                            "batch ", batch);
  StartResult result;
  if (elements[0].text == "GONE") {
    result.outcome = StartResult::Outcome::kGone;
    return result;
  }
  if (elements[0].text == "STALE") {
    result.outcome = StartResult::Outcome::kStale;
    return result;
  }
  if (elements[0].text != "OK") return Malformed("start");
  for (size_t i = 2; i < elements.size(); ++i) {
    Reader reader(elements[i].elements);
    StartedRow row;
    row.lease.request = reader.Text();
    row.lease.batch = std::string(batch);
    row.lease.attempt = reader.Integer();
    row.step = reader.Small();
    row.usage = reader.Parsed(&ParseUsage);
    row.deadline_in = reader.Milliseconds();
    row.attempts_without_progress = reader.Small();
    row.payload = reader.Text();
    row.snapshot_step = reader.Small();
    row.snapshot = reader.Text();
    while (reader.more()) row.deltas.push_back(reader.Text());
    if (!reader.ok() || row.snapshot_step + static_cast<int32_t>(row.deltas.size()) != row.step)
      return Malformed("start");
    result.rows.push_back(std::move(row));
  }
  return result;
}

absl::StatusOr<PublishReply> Queue::Publish(absl::string_view boot, const PublishReport& report) {
  std::vector<std::vector<std::string>> calls;  // progress in parts, then one for each end
  for (size_t first = 0; first < report.progress.size(); first += kRowsPerCall) {
    std::vector<std::string>& args = calls.emplace_back();
    args = {std::string(boot), Ms(report.lease_for)};
    const size_t last = std::min(first + kRowsPerCall, report.progress.size());
    for (size_t i = first; i < last; ++i) AddProgress(report.progress[i], args);
  }
  const size_t num_progress_calls = calls.size();
  for (const FinishRow& row : report.finished) calls.push_back(FinishArgs(boot, row));

  // All of it again after a loss: repeated calls change nothing.
  for (int32_t attempt = 1;; ++attempt) {
    PublishReply result;
    absl::Status status;
    for (size_t i = 0; i < calls.size(); ++i) {
      const FunctionCall call(i < num_progress_calls ? "progress" : "finish", prefix_, calls[i]);
      CINNABAR_RETURN_IF_ERROR(redis_.Append(call.words), "publish");
    }
    std::vector<absl::StatusOr<RedisReply>> replies = redis_.Flush();
    for (size_t i = 0; i < replies.size() && status.ok(); ++i) {
      if (!replies[i].ok()) {
        status = replies[i].status();
        break;
      }
      CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements,
                                Accept("publish", *std::move(replies[i])));
      if (i < num_progress_calls) {
        Reader reader(elements, 2);
        for (const RowReply& row : ReadRows(reader)) result.progress.push_back(row);
        if (!reader.ok()) return Malformed("progress");
      } else {
        CINNABAR_ASSIGN_OR_RETURN(const RowVerdict verdict, ParseRowVerdict(elements[0].text));
        Reader reader(elements, 2);
        result.finished.push_back({.verdict = verdict, .step = reader.more() ? reader.Small() : 0});
      }
    }
    if (status.ok()) {
      if (result.progress.size() != report.progress.size()) return Malformed("progress");
      return result;
    }
    if (!PipelineAgain(status, attempt)) return internal::WithContext(status, "publish");
  }
}

absl::StatusOr<std::vector<RowReply>> Queue::HandBack(absl::string_view boot,
                                                      absl::Span<const HandBackRow> rows) {
  std::vector<RowReply> replies;
  for (size_t first = 0; first < rows.size(); first += kRowsPerCall) {
    std::vector<std::string> args = {std::string(boot)};
    for (const HandBackRow& row :
         rows.subspan(first, std::min(kRowsPerCall, rows.size() - first))) {
      args.insert(args.end(), {row.lease.request, row.lease.batch, absl::StrCat(row.lease.attempt),
                               absl::StrCat(row.snapshot_step), row.snapshot});
    }
    CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("hand_back", args));
    Reader reader(elements, 2);
    for (const RowReply& row : ReadRows(reader)) replies.push_back(row);
    if (!reader.ok()) return Malformed("hand_back");
  }
  return replies;
}

absl::Status Queue::Abandon(absl::string_view boot, absl::Span<const std::string> batches) {
  for (size_t first = 0; first < batches.size(); first += kRowsPerCall) {
    std::vector<std::string> args = {std::string(boot)};
    const absl::Span<const std::string> part = batches.subspan(first, kRowsPerCall);
    args.insert(args.end(), part.begin(), part.end());
    CINNABAR_RETURN_IF_ERROR(Call("abandon", args).status());
  }
  return absl::OkStatus();
}

absl::StatusOr<BeatReply> Queue::Beat(absl::string_view boot, absl::string_view state,
                                      absl::Duration alive_for, absl::Duration lease_for,
                                      absl::Span<const std::string> batches) {
  std::vector<std::string> args = {std::string(boot), Ms(alive_for), Ms(lease_for),
                                   std::string(state)};
  args.insert(args.end(), batches.begin(), batches.end());
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("beat", args));
  BeatReply reply;
  if (elements[0].text == "WORKERS_FULL") {
    reply.registered = false;
    return reply;
  }
  Reader reader(elements, 2);
  reply.drain = reader.Integer() != 0;
  while (reader.more()) reply.lost_batches.push_back(reader.Text());
  if (!reader.ok()) return Malformed("beat");
  return reply;
}

absl::Status Queue::Leave(absl::string_view boot) {
  return Call("leave", {std::string(boot)}).status();
}

absl::Status Queue::Drain(absl::string_view boot) {
  return Call("drain", {std::string(boot)}).status();
}

absl::StatusOr<std::string> Queue::Tenant(absl::string_view request) {
  const std::string key = Key(absl::StrCat("r:", request));
  CINNABAR_ASSIGN_OR_RETURN(RedisReply reply, redis_.Retry({"HGET", key, "tn"}), "find the tenant");
  if (reply.is_nil()) return absl::NotFoundError(absl::StrCat("no request ", request));
  if (!reply.is_text()) return Malformed("tenant");
  return std::move(reply.text);
}

absl::StatusOr<QueueStats> Queue::Stats() {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("stats", {}));
  std::map<std::string, int64_t> values;
  Reader reader(elements, 2);
  while (reader.more()) {
    const std::string name = reader.Text();
    values[name] = reader.Integer();
  }
  if (!reader.ok()) return Malformed("stats");
  QueueStats stats = {.live = values["live"],
                      .cost = values["cost"],
                      .batches = values["batches"],
                      .ready_packs = values["ready"],
                      .ledger_entries = values["ledger"],
                      .dead_letters = values["dead_letters"],
                      .workers = values["workers"]};
  for (size_t i = 0; i < kRequestClasses.size(); ++i) {
    const absl::string_view name = RequestClassName(kRequestClasses[i]);
    stats.waiting[i] = values[absl::StrCat("waiting_", name)];
    stats.oldest_age[i] = absl::Milliseconds(values[absl::StrCat("oldest_ms_", name)]);
  }
  return stats;
}

absl::StatusOr<std::vector<LedgerEntry>> Queue::ReadLedger(absl::string_view position,
                                                           int32_t entries_max) {
  const std::string key = Key("ledger");
  CINNABAR_ASSIGN_OR_RETURN(RedisReply reply,
                            redis_.Retry({"XRANGE", key, absl::StrCat("(", position), "+", "COUNT",
                                          absl::StrCat(entries_max)}),
                            "read the ledger");
  std::vector<LedgerEntry> entries;
  for (RedisReply& each : reply.elements) {
    if (!IsEntry(each)) return Malformed("ledger");
    Fields fields(each.elements[1].elements);
    if (fields.Integer("v") != 1) return absl::DataLossError("a ledger entry of another version");
    LedgerEntry entry;
    entry.position = each.elements[0].text;
    entry.request = fields.Text("rid");
    entry.tenant = fields.Text("tn");
    entry.tag = fields.Text("tag");
    entry.request_class = fields.Parsed("cl", &ParseRequestClass);
    entry.state = fields.Parsed("st", &ParseRequestState);
    entry.prompt_tokens = fields.Integer("in");
    entry.usage = fields.Parsed("use", &ParseUsage);
    entry.steps = static_cast<int32_t>(fields.Integer("steps"));
    entry.attempts = fields.Integer("att");
    entry.charge_microdollars = fields.Integer("charge");
    if (!fields.ok()) return Malformed("ledger");
    entries.push_back(std::move(entry));
  }
  return entries;
}

absl::Status Queue::AckLedger(absl::string_view position) {
  return Call("ledger_ack", {std::string(position)}).status();
}

absl::StatusOr<std::vector<DeadLetter>> Queue::DeadLetters(int32_t entries_max) {
  const std::string key = Key("dlq");
  CINNABAR_ASSIGN_OR_RETURN(
      RedisReply reply,
      redis_.Retry({"XREVRANGE", key, "+", "-", "COUNT", absl::StrCat(entries_max)}),
      "read the dead letters");
  std::vector<DeadLetter> letters;
  for (RedisReply& each : reply.elements) {
    if (!IsEntry(each)) return Malformed("dead letters");
    Fields fields(each.elements[1].elements);
    DeadLetter letter;
    letter.position = each.elements[0].text;
    letter.request = fields.Text("rid");
    letter.tenant = fields.Text("tn");
    letter.tag = fields.Text("tag");
    letter.why = fields.Text("why");
    letter.worker = fields.Text("own");
    letter.body_digest = fields.Text("bh");
    letter.attempts = fields.Integer("att");
    letter.step = static_cast<int32_t>(fields.Integer("stp"));
    if (!fields.ok()) return Malformed("dead letters");
    letters.push_back(std::move(letter));
  }
  return letters;
}

absl::StatusOr<int64_t> Queue::DropDeadLetters(absl::Span<const std::string> positions) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<RedisReply> elements, Call("dlq_drop", positions));
  Reader reader(elements, 2);
  const int64_t dropped = reader.Integer();
  if (!reader.ok()) return Malformed("dlq_drop");
  return dropped;
}

}  // namespace cinnabar
