#include "cli/remote_generate.h"

#include <unistd.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/sse.h"
#include "cli/stream_view.h"
#include "cli/terminal.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

// One streamed answer, shown as it comes.
class StreamPrinter {
 public:
  StreamPrinter(const RemoteGeneration& generation, HttpClient& client)
      : generation_(generation), client_(client) {
    if (generation.watch && isatty(STDERR_FILENO) != 0) frame_.emplace(stderr);
  }

  absl::Status Run(HttpRequest request) {
    HttpHandlers handlers;
    handlers.on_head = [this](const HttpHead& head) { head_ = head; };
    handlers.on_body = [this](absl::string_view piece) { TakeBytes(piece); };
    handlers.on_done = [this](const absl::Status& end) {
      if (status_.ok()) status_ = end;
    };
    begin_ = client_.Now();
    id_ = client_.Start(std::move(request), absl::Seconds(generation_.timeout_seconds),
                        std::move(handlers));
    client_.Run();
    if (head_.status != 0 && head_.status != 200) return ReadFailure(head_, refusal_).status;
    if (status_.ok() && !done_) {
      status_ = absl::UnavailableError("the stream ended before the answer did");
    }
    Draw();
    frame_.reset();
    const bool drawn = isatty(STDERR_FILENO) != 0 && isatty(STDOUT_FILENO) != 0;
    if (generation_.watch && status_.ok() && !drawn) {
      std::printf("%s\n", canvas_.text().c_str());
    } else if (wrote_text_) {
      std::fputc('\n', stdout);
    }
    return status_;
  }

 private:
  void TakeBytes(absl::string_view piece) {
    if (head_.status != 200) {
      if (refusal_.size() < (1 << 20)) refusal_.append(piece.data(), piece.size());
      return;
    }
    const absl::Status fed = decoder_.Feed(piece, [this](const SseEvent& event) { Take(event); });
    if (!fed.ok()) Stop(fed);
  }

  void Stop(const absl::Status& why) {
    if (status_.ok()) status_ = why;
    client_.Cancel(id_);
  }

  void Take(const SseEvent& event) {
    if (!status_.ok()) return;
    const absl::StatusOr<ApiChunk> chunk = ReadChunk(event.data);
    if (!chunk.ok()) return Stop(chunk.status());
    if (chunk->failure) return Stop(chunk->failure->status);
    done_ = done_ || chunk->done;
    if (chunk->usage) usage_ = chunk->usage;
    if (chunk->frame) canvas_.Add(*chunk->frame);
    canvas_.Append(chunk->text);
    if (!generation_.watch && !chunk->text.empty()) {
      std::fwrite(chunk->text.data(), 1, chunk->text.size(), stdout);
      std::fflush(stdout);
      wrote_text_ = true;
    }
    if (chunk->frame || !chunk->text.empty()) Draw();
  }

  void Draw() {
    if (!frame_) return;
    const TerminalSize size = GetTerminalSize(STDERR_FILENO);
    const double seconds = absl::ToDoubleSeconds(client_.Now() - begin_);
    const int32_t tokens = canvas_.num_decided();
    std::string status =
        absl::StrFormat("step %d   %d of %d tokens   %s tokens/s   %s", canvas_.step(), tokens,
                        canvas_.canvas_tokens(), ShowCount(seconds > 0 ? tokens / seconds : 0.0),
                        ShowSeconds(seconds));
    if (usage_) {
      absl::StrAppend(
          &status, absl::StrFormat("   %.2f tokens per forward   waited %s   $%.6f",
                                   usage_->tokens_per_forward, ShowSeconds(usage_->queue_seconds),
                                   usage_->price_dollars));
    }
    const bool colour = WantsColour(STDERR_FILENO);
    frame_->Draw(absl::StrCat(
        canvas_.Render(generation_.prompt, generation_.suffix, size.columns, size.rows - 3, colour),
        colour ? ansi::kUndecided : "", FitLeft(status, size.columns - 1),
        colour ? ansi::kReset : "", "\n"));
  }

  const RemoteGeneration& generation_;
  HttpClient& client_;
  HttpClient::Id id_ = 0;
  absl::Duration begin_;
  std::optional<LiveFrame> frame_;
  SseDecoder decoder_;
  StreamedCanvas canvas_;
  HttpHead head_;
  std::string refusal_;
  std::optional<ApiUsage> usage_;
  absl::Status status_;
  bool done_ = false;
  bool wrote_text_ = false;
};

}  // namespace

absl::Status GenerateRemotely(RemoteGeneration generation) {
  CINNABAR_ASSIGN_OR_RETURN(const HttpUrl url, ParseHttpUrl(generation.url), "--url");
  std::string api_key;
  if (!generation.api_key_file.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> keys,
                              ReadApiKeys(generation.api_key_file));
    api_key = keys[0];
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<HttpClient> client,
                            HttpClient::Make(url, {.ca_file = generation.ca_file}));
  if (!generation.body.contains("model")) {
    CINNABAR_ASSIGN_OR_RETURN(generation.body["model"], FindFirstModel(*client, api_key));
  }
  if (generation.json) {
    absl::StatusOr<HttpReply> reply =
        client->Fetch(MakeApiRequest(url, generation.endpoint, api_key, generation.body),
                      absl::Seconds(generation.timeout_seconds));
    if (!reply.ok()) return WithHint(reply.status(), url);
    if (reply->head.status != 200) return ReadFailure(reply->head, reply->body).status;
    std::printf("%s\n", reply->body.c_str());
    return absl::OkStatus();
  }
  generation.body["stream"] = true;
  generation.body["stream_options"] = {{"include_usage", true}};
  if (generation.watch) generation.body["diffusion"]["frames"] = true;
  StreamPrinter printer(generation, *client);
  return WithHint(printer.Run(MakeApiRequest(url, generation.endpoint, api_key, generation.body)),
                  url);
}

}  // namespace cinnabar
