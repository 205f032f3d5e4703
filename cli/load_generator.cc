#include "cli/load_generator.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/sse.h"
#include "common/base/json.h"
#include "common/base/philox.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

constexpr size_t kReplyBytesMax = 16 << 20;
constexpr absl::Duration kTick = absl::Milliseconds(200);
constexpr absl::Duration kProgressEvery = absl::Seconds(1);

// Words that are one token in the usual code vocabularies.
constexpr const char* kWords[] = {"return", "for", "if",    "in",    "def",  "self", "x",
                                  "value",  "not", "index", "print", "None", "else", "import",
                                  "data",   "is",  "list",  "class", "name", "while"};
constexpr size_t kNumWords = std::size(kWords);

enum Purpose : uint32_t { kWord = 1, kClass = 2 };

uint32_t Hash(uint64_t seed, uint64_t index, uint32_t purpose, uint32_t salt) {
  return Philox4x32(
             {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), purpose, salt}},
             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
      .word[0];
}

std::string MakeWords(int32_t count, uint64_t seed, uint64_t index, uint32_t salt) {
  std::string text;
  uint32_t state = Hash(seed, index, kWord, salt) | 1U;
  for (int32_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;  // any spread will do
    if (i > 0) text += ' ';
    text += kWords[(state >> 16) % kNumWords];
  }
  return text;
}

// The usage object and errors are looked for without parsing each chunk.
bool MayHaveUsage(absl::string_view data) {
  const size_t at = data.find("\"usage\"");
  if (at == absl::string_view::npos) return false;
  absl::string_view rest = data.substr(at + 7);
  while (!rest.empty() && (rest[0] == ' ' || rest[0] == ':')) rest.remove_prefix(1);
  return !absl::StartsWith(rest, "null");
}

struct Request {
  uint64_t index = 0;
  absl::Duration due;
  absl::Duration sent;
  bool counted = false;
  HttpClient::Id id = 0;
  HttpHead head;
  std::string body;  // whole replies and refusals
  SseDecoder decoder;
  std::optional<absl::Duration> first_partial;
  std::optional<ApiUsage> usage;
  std::string failure;  // the stream's own
  bool done = false;    // the stream's end mark
};

class LoadRun {
 public:
  LoadRun(const LoadOptions& options, HttpClient& client, ArrivalSchedule* schedule,
          const std::atomic<bool>* stop,
          const std::function<void(const LoadProgress&)>& on_progress)
      : options_(options),
        client_(client),
        schedule_(schedule),
        stop_(stop),
        on_progress_(on_progress),
        end_(options.warmup + options.duration) {}

  LoadReport Run() {
    begin_ = client_.Now();
    if (options_.concurrency > 0) {
      client_.At(begin_, [this] {
        for (int32_t i = 0; i < options_.concurrency; ++i) Launch({.at = Elapsed()});
      });
    } else {
      Advance();
    }
    client_.At(begin_ + kTick, [this] { Tick(); });
    client_.Run();
    report_.seconds =
        absl::ToDoubleSeconds(std::max(last_answer_ - options_.warmup, options_.duration));
    if (report_.interrupted) {
      report_.seconds =
          std::max(1e-3, absl::ToDoubleSeconds(std::min(Elapsed(), end_) - options_.warmup));
    }
    report_.connections_made = client_.connections_made();
    return std::move(report_);
  }

 private:
  absl::Duration Elapsed() const { return client_.Now() - begin_; }

  // Sends what is due and sleeps until the next.
  void Advance() {
    while (true) {
      if (!next_) next_ = schedule_->Next();
      if (!next_ || next_->at >= end_ || over_) {
        arrivals_over_ = true;
        return;
      }
      if (next_->at > Elapsed()) {
        client_.At(begin_ + next_->at, [this] { Advance(); });
        return;
      }
      const Arrival arrival = *next_;
      next_.reset();
      Launch(arrival);
    }
  }

  void Launch(const Arrival& arrival) {
    ++num_due_;
    if (arrival.at >= options_.warmup) ++report_.num_due;
    if (static_cast<int32_t>(in_flight_.size()) >= options_.in_flight_max) {
      if (arrival.at >= options_.warmup) ++report_.num_held_back;
      held_.push_back(arrival);
      return;
    }
    Send(arrival);
  }

  void Send(const Arrival& arrival) {
    auto request = std::make_shared<Request>();
    request->index = next_index_++;
    request->due = arrival.at;
    request->counted = arrival.at >= options_.warmup;
    HttpHandlers handlers;
    handlers.on_head = [request](const HttpHead& head) { request->head = head; };
    handlers.on_body = [this, request](absl::string_view piece) { TakeBody(*request, piece); };
    handlers.on_done = [this, request](const absl::Status& status) { Settle(*request, status); };
    std::string key;
    if (!options_.api_keys.empty()) {
      const uint64_t tenant =
          arrival.tenant >= 0 ? static_cast<uint64_t>(arrival.tenant) : request->index;
      key = options_.api_keys[tenant % options_.api_keys.size()];
    }
    HttpRequest http = MakeApiRequest(options_.url, options_.endpoint, key,
                                      MakeLoadBody(options_, arrival, request->index));
    request->sent = Elapsed();
    request->id = client_.Start(std::move(http), options_.timeout, std::move(handlers));
    if (request->counted) report_.lateness.Record(request->sent - request->due);
    in_flight_[request->id] = request;
    report_.in_flight_peak =
        std::max(report_.in_flight_peak, static_cast<int32_t>(in_flight_.size()));
  }

  void TakeBody(Request& request, absl::string_view piece) {
    if (!options_.stream || request.head.status != 200) {
      if (request.body.size() + piece.size() <= kReplyBytesMax) {
        request.body.append(piece.data(), piece.size());
      }
      return;
    }
    const absl::Status fed =
        request.decoder.Feed(piece, [&](const SseEvent& event) { TakeEvent(request, event.data); });
    if (!fed.ok()) request.failure = "stream unreadable";
  }

  void TakeEvent(Request& request, const std::string& data) {
    const bool wanted = !request.first_partial || absl::StartsWith(data, "[DONE]") ||
                        absl::StrContains(data, "\"error\"") || MayHaveUsage(data);
    if (!wanted) return;
    const absl::StatusOr<ApiChunk> chunk = ReadChunk(data);
    if (!chunk.ok()) {
      request.failure = "stream unreadable";
      return;
    }
    if (chunk->failure) request.failure = absl::StrCat("stream ", chunk->failure->code);
    if (chunk->done) request.done = true;
    if (chunk->usage) request.usage = chunk->usage;
    if (!request.first_partial && (!chunk->text.empty() || chunk->frame)) {
      request.first_partial = Elapsed();
    }
  }

  // The name of what went wrong, or empty.
  std::string ErrorOf(Request& request, const absl::Status& status) const {
    if (absl::IsCancelled(status)) return "unfinished";
    if (absl::IsDeadlineExceeded(status)) return "timeout";
    if (!status.ok()) return request.head.status == 0 ? "connect" : "broken";
    if (request.head.status != 200) {
      const std::string code = ReadFailure(request.head, request.body).code;
      return absl::StrCat(request.head.status, code.empty() ? "" : " ", code);
    }
    if (options_.stream) {
      if (!request.failure.empty()) return request.failure;
      return request.done ? "" : "broken";
    }
    const absl::StatusOr<Json> reply = ParseJson(request.body, "reply");
    if (!reply.ok()) return "unreadable";
    request.usage = ReadUsage(*reply);
    return "";
  }

  void Settle(Request& request, const absl::Status& status) {
    in_flight_.erase(request.id);
    const absl::Duration now = Elapsed();
    const std::string error = ErrorOf(request, status);
    const absl::Duration latency = now - request.due;
    if (error.empty()) {
      ++num_ok_;
      ++recent_ok_;
      recent_latency_.Record(latency);
      if (request.usage) recent_tokens_ += request.usage->completion_tokens;
    } else {
      ++num_failed_;
    }
    if (request.counted) Count(request, error, latency);
    if (request.counted && error != "unfinished") last_answer_ = std::max(last_answer_, now);
    if (!held_.empty() && !over_) {
      const Arrival arrival = held_.front();
      held_.pop_front();
      Send(arrival);
    } else if (options_.concurrency > 0 && !over_ && now < end_) {
      // A server that refuses at once would otherwise be asked in a busy loop.
      if (error.empty()) {
        Launch({.at = now});
      } else {
        client_.At(client_.Now() + absl::Milliseconds(50), [this] {
          if (!over_ && Elapsed() < end_) Launch({.at = Elapsed()});
        });
      }
    }
  }

  void Count(const Request& request, const std::string& error, absl::Duration latency) {
    if (!error.empty()) {
      ++report_.errors[error];
      return;
    }
    ++report_.num_ok;
    if (!options_.deadline || latency <= *options_.deadline) ++report_.num_in_deadline;
    report_.latency.Record(latency);
    if (options_.priority == "mix") {
      report_.latency_of_class[LoadClassOf(options_.seed, request.index)].Record(latency);
    }
    if (request.first_partial) report_.first_partial.Record(*request.first_partial - request.due);
    if (!request.usage) return;
    const ApiUsage& usage = *request.usage;
    report_.queue.Record(absl::Seconds(usage.queue_seconds));
    report_.prompt_tokens += usage.prompt_tokens;
    report_.completion_tokens += usage.completion_tokens;
    report_.steps += usage.steps;
    report_.forwards += usage.forwards;
    report_.device_seconds += usage.device_seconds;
    report_.price_dollars += usage.price_dollars;
  }

  void Tick() {
    const absl::Duration now = Elapsed();
    if (now - last_progress_ >= kProgressEvery) ShowProgress(now);
    if (stop_ != nullptr && stop_->load() && !over_) {
      report_.interrupted = true;
      GiveUp();
    }
    if (now >= end_) arrivals_over_ = true;
    if (now >= end_ + options_.drain && !over_) GiveUp();
    if (arrivals_over_ && in_flight_.empty() && held_.empty()) {
      client_.Stop();
      return;
    }
    client_.At(client_.Now() + kTick, [this] { Tick(); });
  }

  void GiveUp() {
    over_ = true;
    arrivals_over_ = true;
    for (const Arrival& arrival : held_) {
      ++num_failed_;
      if (arrival.at >= options_.warmup) ++report_.errors["unfinished"];
    }
    held_.clear();
    std::vector<HttpClient::Id> ids;
    for (const auto& [id, request] : in_flight_) ids.push_back(id);
    for (const HttpClient::Id id : ids) client_.Cancel(id);
  }

  void ShowProgress(absl::Duration now) {
    const double seconds = absl::ToDoubleSeconds(now - last_progress_);
    LoadProgress progress;
    progress.elapsed = now;
    progress.num_due = num_due_;
    progress.num_ok = num_ok_;
    progress.num_failed = num_failed_;
    progress.in_flight = static_cast<int32_t>(in_flight_.size() + held_.size());
    progress.ok_per_second = static_cast<double>(recent_ok_) / seconds;
    progress.tokens_per_second = static_cast<double>(recent_tokens_) / seconds;
    progress.p50 = recent_latency_.Percentile(50.0);
    progress.p99 = recent_latency_.Percentile(99.0);
    if (on_progress_) on_progress_(progress);
    last_progress_ = now;
    recent_ok_ = 0;
    recent_tokens_ = 0;
    recent_latency_ = LatencyHistogram();
  }

  const LoadOptions& options_;
  HttpClient& client_;
  ArrivalSchedule* schedule_;
  const std::atomic<bool>* stop_;
  const std::function<void(const LoadProgress&)>& on_progress_;
  const absl::Duration end_;
  absl::Duration begin_;
  std::optional<Arrival> next_;
  bool arrivals_over_ = false;
  bool over_ = false;  // given up: nothing is sent any more
  std::unordered_map<HttpClient::Id, std::shared_ptr<Request>> in_flight_;
  std::deque<Arrival> held_;
  uint64_t next_index_ = 0;
  int64_t num_due_ = 0;
  int64_t num_ok_ = 0;
  int64_t num_failed_ = 0;
  absl::Duration last_answer_;
  absl::Duration last_progress_;
  int64_t recent_ok_ = 0;
  int64_t recent_tokens_ = 0;
  LatencyHistogram recent_latency_;
  LoadReport report_;
};

Json LatencyJson(const LatencyHistogram& histogram) {
  const auto seconds = [](absl::Duration duration) { return absl::ToDoubleSeconds(duration); };
  return {{"count", histogram.count()},
          {"mean", seconds(histogram.mean())},
          {"p50", seconds(histogram.Percentile(50))},
          {"p90", seconds(histogram.Percentile(90))},
          {"p95", seconds(histogram.Percentile(95))},
          {"p99", seconds(histogram.Percentile(99))},
          {"max", seconds(histogram.max())}};
}

}  // namespace

int32_t LoadClassOf(uint64_t seed, uint64_t index) {
  const double draw = UniformFromWord(Hash(seed, index, kClass, 0));
  return draw < 0.5 ? 0 : draw < 0.85 ? 1 : 2;
}

nlohmann::json MakeLoadBody(const LoadOptions& options, const Arrival& arrival, uint64_t index) {
  const int32_t prompt_tokens =
      std::max(1, arrival.prompt_tokens > 0 ? std::min(arrival.prompt_tokens, options.prompt_tokens)
                                            : options.prompt_tokens);
  const int32_t canvas =
      arrival.output_tokens > 0
          ? std::min(CanvasForOutput(arrival.output_tokens), options.canvas_tokens)
          : options.canvas_tokens;
  const int32_t steps = std::clamp(options.steps > 0 ? options.steps : canvas / 2, 1, canvas);
  Json body = {{"max_tokens", canvas}, {"seed", index}, {"diffusion", {{"steps", steps}}}};
  const bool own_prompt = !options.prompt.empty();
  switch (options.endpoint) {
    case ApiEndpoint::kCompletion:
      body["prompt"] =
          own_prompt ? options.prompt : MakeWords(prompt_tokens, options.seed, index, 0);
      break;
    case ApiEndpoint::kFim: {
      const int32_t suffix_tokens = prompt_tokens / 4;
      body["prompt"] = own_prompt
                           ? options.prompt
                           : MakeWords(prompt_tokens - suffix_tokens, options.seed, index, 0);
      body["suffix"] = MakeWords(std::max(1, suffix_tokens), options.seed, index, 1);
      break;
    }
    case ApiEndpoint::kChat:
      body["messages"] = {
          {{"role", "user"},
           {"content",
            own_prompt ? options.prompt : MakeWords(prompt_tokens, options.seed, index, 0)}}};
      break;
  }
  if (options.stream) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
  }
  if (!options.priority.empty()) {
    body["priority"] = options.priority == "mix"
                           ? std::string(kLoadClasses[LoadClassOf(options.seed, index)])
                           : options.priority;
  }
  if (options.deadline) {
    body["diffusion"]["deadline_seconds"] = absl::ToDoubleSeconds(*options.deadline);
  }
  body.merge_patch(options.body);
  return body;
}

int64_t LoadReport::num_failed() const {
  int64_t count = 0;
  for (const auto& [name, times] : errors) count += times;
  return count;
}

nlohmann::json LoadReport::ToJson() const {
  const double span = std::max(seconds, 1e-9);
  Json classes = Json::object();
  for (size_t i = 0; i < kLoadClasses.size(); ++i) {
    if (latency_of_class[i].count() > 0) {
      classes[std::string(kLoadClasses[i])] = LatencyJson(latency_of_class[i]);
    }
  }
  return {
      {"seconds", seconds},
      {"requests", num_due},
      {"ok", num_ok},
      {"failed", num_failed()},
      {"errors", errors},
      {"requests_per_second", static_cast<double>(num_ok) / span},
      {"in_deadline", num_in_deadline},
      {"goodput_per_second", static_cast<double>(num_in_deadline) / span},
      {"goodput_share",
       num_due > 0 ? static_cast<double>(num_in_deadline) / static_cast<double>(num_due) : 0.0},
      {"latency_seconds", LatencyJson(latency)},
      {"latency_seconds_of_class", std::move(classes)},
      {"first_partial_seconds", LatencyJson(first_partial)},
      {"queue_seconds", LatencyJson(queue)},
      {"client_lateness_seconds", LatencyJson(lateness)},
      {"prompt_tokens", prompt_tokens},
      {"completion_tokens", completion_tokens},
      {"tokens_per_second", static_cast<double>(completion_tokens) / span},
      {"steps", steps},
      {"forwards", forwards},
      {"tokens_per_forward",
       forwards > 0 ? static_cast<double>(completion_tokens) / static_cast<double>(forwards) : 0.0},
      {"device_seconds", device_seconds},
      {"price_dollars", price_dollars},
      {"in_flight_peak", in_flight_peak},
      {"held_back", num_held_back},
      {"connections", connections_made},
      {"interrupted", interrupted}};
}

absl::StatusOr<LoadReport> RunLoad(const LoadOptions& options, ArrivalSchedule* schedule,
                                   const std::atomic<bool>* stop,
                                   const std::function<void(const LoadProgress&)>& on_progress) {
  CINNABAR_ASSIGN_OR_RETURN(
      const std::unique_ptr<HttpClient> client,
      HttpClient::Make(options.url, {.idle_connections_max = options.in_flight_max,
                                     .ca_file = options.ca_file}));
  LoadRun run(options, *client, schedule, stop, on_progress);
  return run.Run();
}

}  // namespace cinnabar
