#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/commands.h"
#include "cli/model_session.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/tokenizer/tokenizer.h"
#include "worker/model/inspect.h"
#include "worker/model/quantize.h"

namespace cinnabar {
namespace {

constexpr size_t kTextBytesMax = size_t{16} << 20;
constexpr size_t kTokensMax = 16 * kQuantizationWindow;

// What the cost is measured on where no text is given.
constexpr char kSampleText[] =
    "def merge(left, right):\n"
    "    result = []\n"
    "    i = j = 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            result.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            result.append(right[j])\n"
    "            j += 1\n"
    "    return result + left[i:] + right[j:]\n\n\n"
    "class Stack:\n"
    "    \"\"\"Last in, first out.\"\"\"\n\n"
    "    def __init__(self):\n"
    "        self.items = []\n\n"
    "    def push(self, item):\n"
    "        self.items.append(item)\n\n"
    "    def pop(self):\n"
    "        if not self.items:\n"
    "            raise IndexError('pop from an empty stack')\n"
    "        return self.items.pop()\n";

struct Flags {
  bool json = false;
  std::string to;
  std::string text;
  int32_t num_threads = 0;
};

absl::Status Inspect(const FlagSet& set, bool json) {
  if (set.positional().size() != 2) {
    return absl::InvalidArgumentError("say: cinnabar model inspect DIR|FILE.gguf");
  }
  CINNABAR_ASSIGN_OR_RETURN(const ModelReport report, InspectModel(set.positional()[1]));
  if (json) {
    std::printf("%s\n", ReportToJson(report).dump(2).c_str());
  } else {
    std::printf("%s", FormatReport(report).c_str());
  }
  if (report.problems.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("this model does not load: ", report.problems.front()));
}

// A line every tenth of the way.
class Progress {
 public:
  explicit Progress(const char* what) : what_(what) {}
  void operator()(int64_t done, int64_t total) {
    const int64_t tenth = total == 0 ? 10 : 10 * done / total;
    if (tenth == shown_) return;
    shown_ = tenth;
    std::fprintf(stderr, "%s: %d of %d\n", what_, static_cast<int>(done), static_cast<int>(total));
  }

 private:
  const char* what_;
  int64_t shown_ = -1;
};

// The text as ids; without a tokenizer ids that say nothing but compare two networks all the same.
absl::StatusOr<std::vector<TokenId>> TextOf(const std::string& model, const std::string& path,
                                            const ModelTraits& traits) {
  std::vector<TokenId> ids;
  if (traits.tokenizer_size > 0) {
    std::string text = kSampleText;
    if (!path.empty()) {
      CINNABAR_ASSIGN_OR_RETURN(text, ReadFile(path, kTextBytesMax));
    }
    CINNABAR_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(model));
    ids = tokenizer.Encode(text);
  } else if (path.empty()) {
    for (int32_t i = 0; i < 2 * kQuantizationWindow; ++i) {
      ids.push_back((i * 131 + 7) % std::max(1, traits.vocab_size - 1));
    }
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("--text ", path, ": ", model, " has no tokenizer"));
  }
  if (ids.size() > kTokensMax) ids.resize(kTokensMax);
  return ids;
}

absl::Status PrintCost(const Flags& flags, const std::string& before, const std::string& after) {
  ModelFlags model{.directory = before, .num_threads = flags.num_threads};
  const ForwardLimits limits = {
      .rows_max = kQuantizationWindow, .sequences_max = 1, .positions_max = kQuantizationWindow};
  CINNABAR_ASSIGN_OR_RETURN(const ModelSession first, OpenModel(model, limits));
  model.directory = after;
  CINNABAR_ASSIGN_OR_RETURN(const ModelSession second, OpenModel(model, limits));
  const ModelTraits& traits = first.denoiser->traits();
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<TokenId> ids, TextOf(before, flags.text, traits));
  Progress progress("measure");
  CINNABAR_ASSIGN_OR_RETURN(
      const QuantizationCost cost,
      MeasureQuantization(ids, *first.denoiser, *second.denoiser,
                          [&](int64_t done, int64_t total) { progress(done, total); }));
  std::printf("cost, over %d positions of %s\n", static_cast<int>(cost.num_positions),
              traits.tokenizer_size == 0 ? "ids without text"
              : flags.text.empty()       ? "a built-in sample (--text FILE takes yours)"
                                         : flags.text.c_str());
  if (!std::isnan(cost.nll_before)) {
    std::printf("  perplexity       %.4f before, %.4f after (%+.2f%%)\n", std::exp(cost.nll_before),
                std::exp(cost.nll_after),
                100.0 * (std::exp(cost.nll_after - cost.nll_before) - 1.0));
  }
  std::printf("  divergence       %.6f nats a position\n", cost.divergence);
  std::printf("  same first token %.2f%%\n", 100.0 * cost.agreement);
  return absl::OkStatus();
}

absl::Status Quantize(const FlagSet& set, const Flags& flags) {
  if (set.positional().size() != 3) {
    return absl::InvalidArgumentError(
        "say: cinnabar model quantize DIR|FILE.gguf OUT --to q8_0|q4_k");
  }
  if (flags.to != "q8_0" && flags.to != "q4_k") {
    return absl::InvalidArgumentError(absl::StrCat("--to ", flags.to, ": take q8_0 or q4_k"));
  }
  const std::string& from = set.positional()[1];
  const std::string& out = set.positional()[2];
  Progress progress("tensors");
  CINNABAR_ASSIGN_OR_RETURN(
      const QuantizeReport report,
      QuantizeModel(from, flags.to == "q8_0" ? DType::kQ8_0 : DType::kQ4_K, out,
                    [&](int64_t done, int64_t total) { progress(done, total); }));
  std::printf("%s: %d tensors quantised, %d kept; %.1f MiB, from %.1f MiB\n", out.c_str(),
              report.num_quantized, report.num_kept,
              static_cast<double>(report.bytes_after) / (1 << 20),
              static_cast<double>(report.bytes_before) / (1 << 20));
  return PrintCost(flags, from, out);
}

}  // namespace

int RunModel(const std::vector<std::string>& args) {
  Flags flags;
  FlagSet set(
      "cinnabar model inspect DIR|FILE.gguf [--json]\n"
      "       cinnabar model quantize DIR|FILE.gguf OUT --to q8_0|q4_k [--text FILE]",
      "inspect says what a checkpoint is: family, sizes, dtype, mask token, block length, memory "
      "needed, and what is not\nsupported and why. Reads headers only; exits with 1 when the model "
      "does not load.\nquantize writes a folder that loads like the first, with its matrices in "
      "8 or 4 bits, and prints what that costs:\nperplexity at masked positions and divergence, of "
      "both networks under the same masks.");
  set.Section("inspect");
  set.Add("json", &flags.json, "the same as one JSON object");
  set.Section("quantize");
  set.Add("to", &flags.to, "TYPE", "q8_0, or q4_k (embedding and head: q6_k)");
  set.Add("text", &flags.text, "FILE", "what the cost is measured on; its first 2048 tokens");
  set.Add("threads", &flags.num_threads, "N", "threads; 0 takes every core");
  return RunCommand("model", set, args, [&] {
    if (!set.positional().empty() && set.positional()[0] == "quantize") {
      return Quantize(set, flags);
    }
    if (!set.positional().empty() && set.positional()[0] == "inspect") {
      return Inspect(set, flags.json);
    }
    return absl::Status(absl::InvalidArgumentError("say: cinnabar model inspect or quantize"));
  });
}

}  // namespace cinnabar
