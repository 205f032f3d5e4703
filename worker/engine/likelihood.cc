#include "worker/engine/likelihood.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/philox.h"
#include "common/base/status.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

constexpr double kTimeMin = 1e-3;  // MDLM's and SEDD's sampling_eps
// Rows of logits that are in host memory at a time.
constexpr int32_t kLogitsRows = 8;

// One noised copy of the span that is scored together.
struct Sample {
  std::vector<TokenId> ids;        // of positions [begin, end)
  std::vector<int32_t> positions;  // that count, ascending: masked ones, or all scored (uniform)
  double time = 1.0;
  double weight = 1.0;  // of each of their losses
  double loss = 0.0;    // nats
};

double LogSumExp(absl::Span<const float> logits, TokenId without) {
  double top = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<TokenId>(i) != without) top = std::max<double>(top, logits[i]);
  }
  double sum = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<TokenId>(i) != without) sum += std::exp(logits[i] - top);
  }
  return top + std::log(sum);
}

// Score entropy of one position, without the rate. SEDD, graph_lib.py: score_entropy of Absorbing
// and of Uniform.
double AbsorbScoreEntropy(absl::Span<const float> log_scores, TokenId mask, TokenId clean,
                          double expm1_sigma) {
  const double ratio = 1.0 / expm1_sigma;
  return std::exp(LogSumExp(log_scores, mask)) - ratio * log_scores[clean] +
         ratio * (std::log(ratio) - 1.0);
}

double UniformScoreEntropy(absl::Span<const float> log_scores, TokenId noised, TokenId clean,
                           double expm1_sigma) {
  const auto n = static_cast<double>(log_scores.size());
  const double ratio = 1.0 - n / (expm1_sigma + n);
  double sum = 0.0, sum_exp = 0.0;
  for (const float s : log_scores) {
    sum += s;
    sum_exp += std::exp(static_cast<double>(s));
  }
  const double own = log_scores[noised];
  double negative = sum / n - own / n;
  double constant = 0.0;
  if (noised == clean) {
    negative *= ratio;
    constant = (n - 1.0) / n * ratio * (std::log(ratio) - 1.0);
  } else {
    negative += log_scores[clean] / expm1_sigma;
    constant = ((-std::log(ratio) - 1.0) / ratio - (n - 2.0)) / n;
  }
  return sum_exp / n - std::exp(own) / n - negative + constant;
}

class Estimator {
 public:
  Estimator(Denoiser& denoiser, const ForwardLimits& limits, absl::Span<const TokenId> ids,
            const std::vector<bool>& scored, const LikelihoodOptions& options)
      : denoiser_(denoiser),
        model_(denoiser.traits()),
        limits_(limits),
        ids_(ids),
        scored_(scored),
        options_(options),
        logits_(static_cast<size_t>(kLogitsRows) * model_.vocab_size) {}

  absl::Status Check() const {
    const auto length = static_cast<int32_t>(ids_.size());
    if (scored_.size() != ids_.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(ids_.size(), " ids and ", scored_.size(), " scored flags"));
    }
    if (options_.num_samples < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_samples: ", options_.num_samples, "; take at least 1"));
    }
    if (length > std::min(limits_.positions_max, limits_.rows_max)) {
      return absl::InvalidArgumentError(
          absl::StrCat(length, " tokens; at most ",
                       std::min(limits_.positions_max, limits_.rows_max), " are scored at once"));
    }
    if (std::find(scored_.begin(), scored_.end(), true) == scored_.end()) {
      return absl::InvalidArgumentError("no position is to be scored");
    }
    for (int32_t i = 0; i < length; ++i) {
      if (ids_[i] < 0 || ids_[i] >= model_.vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat(
            "ids[", i, "] = ", ids_[i], " is outside the vocabulary of ", model_.vocab_size));
      }
      if (scored_[i] && ids_[i] == model_.mask_token) {
        return absl::InvalidArgumentError(
            absl::StrCat("ids[", i, "] is the mask token, which has no likelihood"));
      }
    }
    if (model_.parameterization == Parameterization::kUniformPrediction) {
      return absl::UnimplementedError(
          "no bound is known for a model that predicts clean tokens under noise");
    }
    if (options_.rule == LikelihoodRule::kLlada &&
        (causal() || model_.parameterization != Parameterization::kMaskPrediction)) {
      return absl::UnimplementedError(
          "LLaDA's estimate is of full-attention models that predict masks; use nelbo");
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Likelihood> Run(absl::FunctionRef<void(double)> progress) {
    const auto length = static_cast<int32_t>(ids_.size());
    if (!causal()) {
      CINNABAR_RETURN_IF_ERROR(TakeMemory(std::max(
          1, std::min({limits_.rows_max / length, limits_.sequences_max, options_.num_samples}))));
      CINNABAR_RETURN_IF_ERROR(ScoreSpan(0, length, 0.0, 1.0, progress));
      return Finish();
    }
    // Left to right: each block's samples, then the block itself, whose keys and values the next
    // one reads.
    CINNABAR_RETURN_IF_ERROR(TakeMemory(1));
    const int32_t block_length = model_.causal_block_length;
    for (int32_t begin = 0; begin < length; begin += block_length) {
      const int32_t end = std::min(begin + block_length, length);
      const double done = static_cast<double>(begin) / length;
      if (std::find(scored_.begin() + begin, scored_.begin() + end, true) !=
          scored_.begin() + end) {
        CINNABAR_RETURN_IF_ERROR(
            ScoreSpan(begin, end, done, static_cast<double>(end - begin) / length, progress));
      }
      if (end == length) break;
      const SequenceSpan clean{.num_rows = end - begin,
                               .first_position = begin,
                               .block_length = block_length,
                               .kv = memory_[0].get()};
      CINNABAR_RETURN_IF_ERROR(denoiser_.Forward(
          {.ids = ids_.subspan(begin, end - begin), .sequences = absl::MakeConstSpan(&clean, 1)}));
      ++result_.forwards;
    }
    return Finish();
  }

 private:
  bool causal() const { return model_.causal_block_length > 0; }

  absl::Status TakeMemory(int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      CINNABAR_ASSIGN_OR_RETURN(memory_.emplace_back(),
                                denoiser_.backend().AllocateKv(denoiser_.SequenceKvShape(
                                    static_cast<int32_t>(ids_.size()), KvReuse::kExact)),
                                "KV memory");
    }
    return absl::OkStatus();
  }

  double Uniform(NoiseStream stream, int32_t position, int32_t sample) const {
    return UniformFromWord(NoiseWord({.seed = options_.seed,
                                      .position = static_cast<uint32_t>(position),
                                      .step = static_cast<uint32_t>(sample)},
                                     stream, 0));
  }

  // Scores positions [begin, end) together: all samples of them.
  absl::Status ScoreSpan(int32_t begin, int32_t end, double done, double share,
                         absl::FunctionRef<void(double)> progress) {
    std::vector<Sample> batch;
    std::vector<double> losses;
    const int32_t num_samples = options_.num_samples;
    for (int32_t i = 0; i < num_samples; ++i) {
      Sample sample = options_.rule == LikelihoodRule::kLlada ? MaskCount(begin, end, i)
                                                              : NoiseByTime(begin, end, i);
      if (sample.positions.empty()) {
        losses.push_back(0.0);
      } else {
        batch.push_back(std::move(sample));
      }
      const bool full = static_cast<int32_t>(batch.size()) == static_cast<int32_t>(memory_.size());
      if (batch.empty() || (!full && i + 1 < num_samples)) continue;
      CINNABAR_RETURN_IF_ERROR(RunBatch(begin, end, batch));
      for (const Sample& ran : batch) losses.push_back(ran.loss);
      batch.clear();
      progress(done + share * (i + 1) / num_samples);
    }
    double sum = 0.0;
    for (const double loss : losses) sum += loss;
    const double mean = sum / num_samples;
    double squares = 0.0;
    for (const double loss : losses) squares += (loss - mean) * (loss - mean);
    result_.log_likelihood -= mean;
    if (num_samples > 1) variance_ += squares / (num_samples - 1.0) / num_samples;
    return absl::OkStatus();
  }

  Sample NoiseByTime(int32_t begin, int32_t end, int32_t index) const {
    Sample sample;
    const double offset = Uniform(NoiseStream::kInitial, begin, 0);
    const double spread = (index + offset) / options_.num_samples;
    sample.time = kTimeMin + (1.0 - kTimeMin) * spread;
    const double sigma = SigmaAt(model_, sample.time);
    const double chance = -std::expm1(-sigma);
    sample.weight = model_.parameterization == Parameterization::kMaskPrediction
                        ? SigmaRateAt(model_, sample.time) / std::expm1(sigma)
                        : SigmaRateAt(model_, sample.time);
    const bool uniform = model_.parameterization == Parameterization::kUniformScore;
    for (int32_t position = begin; position < end; ++position) {
      TokenId id = ids_[position];
      const bool noised =
          scored_[position] && Uniform(NoiseStream::kTransfer, position, index) < chance;
      if (noised && uniform) {
        id =
            static_cast<TokenId>(Uniform(NoiseStream::kToken, position, index) * model_.vocab_size);
      } else if (noised) {
        id = model_.mask_token;
      }
      sample.ids.push_back(id);
      if (noised || (uniform && scored_[position])) sample.positions.push_back(position);
    }
    return sample;
  }

  Sample MaskCount(int32_t begin, int32_t end, int32_t index) const {
    std::vector<std::pair<double, int32_t>> order;
    for (int32_t position = begin; position < end; ++position) {
      if (scored_[position]) {
        order.emplace_back(Uniform(NoiseStream::kTransfer, position, index), position);
      }
    }
    std::sort(order.begin(), order.end());
    const auto num_scored = static_cast<int32_t>(order.size());
    const int32_t first =
        1 + static_cast<int32_t>(Uniform(NoiseStream::kInitial, begin, 0) * num_scored);
    const auto steps = static_cast<int64_t>(
        std::nearbyint(static_cast<double>(index) * num_scored / options_.num_samples));
    const auto count = static_cast<int32_t>((first - 1 + steps) % num_scored + 1);
    Sample sample;
    sample.ids.assign(ids_.begin() + begin, ids_.begin() + end);
    sample.weight = static_cast<double>(num_scored) / count;
    for (int32_t i = 0; i < count; ++i) {
      sample.positions.push_back(order[i].second);
      sample.ids[order[i].second - begin] = model_.mask_token;
    }
    std::sort(sample.positions.begin(), sample.positions.end());
    return sample;
  }

  // One forward pass over the samples, and their losses.
  absl::Status RunBatch(int32_t begin, int32_t end, std::vector<Sample>& batch) {
    std::vector<TokenId> ids;
    std::vector<SequenceSpan> spans;
    std::vector<float> sigmas;
    std::vector<int32_t> wanted;
    struct Row {
      Sample* sample;
      int32_t position;
      int32_t hidden_row;
    };
    std::vector<Row> rows;
    // With shifted logits a block's first position is predicted by the row before it.
    const int32_t lead = causal() && model_.shift_logits && begin > 0 ? 1 : 0;
    for (size_t i = 0; i < batch.size(); ++i) {
      Sample& sample = batch[i];
      SequenceSpan span{.row_begin = static_cast<int32_t>(ids.size()),
                        .num_rows = end - begin + lead,
                        .block_length = model_.causal_block_length,
                        .kv = memory_[i].get(),
                        .modulation_row = static_cast<int32_t>(i)};
      if (causal()) span.first_position = begin - lead;
      if (lead > 0) ids.push_back(ids_[begin - 1]);
      ids.insert(ids.end(), sample.ids.begin(), sample.ids.end());
      spans.push_back(span);
      sigmas.push_back(static_cast<float>(SigmaAt(model_, sample.time)));
      for (const int32_t position : sample.positions) {
        int32_t row = position - begin + lead;
        if (model_.shift_logits && row > 0) --row;
        row += span.row_begin;
        if (wanted.empty() || wanted.back() != row) wanted.push_back(row);
        rows.push_back({&sample, position, static_cast<int32_t>(wanted.size()) - 1});
      }
    }
    CINNABAR_RETURN_IF_ERROR(denoiser_.Forward(
        {.ids = ids, .sequences = spans, .sigmas = sigmas, .wanted_rows = wanted}));
    ++result_.forwards;
    const auto num_wanted = static_cast<int32_t>(wanted.size());
    int32_t have = 0;  // logits of hidden rows [have - count, have) are in logits_
    int32_t first = 0;
    for (const Row& row : rows) {
      if (row.hidden_row >= have) {
        first = row.hidden_row;
        const int32_t count = std::min(kLogitsRows, num_wanted - first);
        CINNABAR_RETURN_IF_ERROR(denoiser_.Logits(
            first, count,
            absl::MakeSpan(logits_).first(static_cast<size_t>(count) * model_.vocab_size)));
        have = first + count;
      }
      const absl::Span<const float> logits = absl::MakeConstSpan(logits_).subspan(
          static_cast<size_t>(row.hidden_row - first) * model_.vocab_size, model_.vocab_size);
      const double loss = LossOf(*row.sample, row.position, begin, logits);
      if (!std::isfinite(loss)) {
        return absl::DataLossError(
            absl::StrCat("the network gave no finite prediction for position ", row.position));
      }
      row.sample->loss += row.sample->weight * loss;
    }
    return absl::OkStatus();
  }

  double LossOf(const Sample& sample, int32_t position, int32_t begin,
                absl::Span<const float> logits) const {
    const TokenId clean = ids_[position];
    if (model_.parameterization == Parameterization::kMaskPrediction) {
      const TokenId without = options_.rule == LikelihoodRule::kNelbo ? model_.mask_token : -1;
      return LogSumExp(logits, without) - logits[clean];
    }
    const double expm1_sigma = std::expm1(SigmaAt(model_, sample.time));
    return model_.parameterization == Parameterization::kAbsorbScore
               ? AbsorbScoreEntropy(logits, model_.mask_token, clean, expm1_sigma)
               : UniformScoreEntropy(logits, sample.ids[position - begin], clean, expm1_sigma);
  }

  Likelihood Finish() {
    result_.standard_error = std::sqrt(variance_);
    result_.num_scored = static_cast<int32_t>(std::count(scored_.begin(), scored_.end(), true));
    return result_;
  }

  Denoiser& denoiser_;
  const ModelTraits& model_;
  const ForwardLimits limits_;
  const absl::Span<const TokenId> ids_;
  const std::vector<bool>& scored_;
  const LikelihoodOptions options_;
  std::vector<float> logits_;  // [kLogitsRows, vocab_size]
  std::vector<std::unique_ptr<KvMemory>> memory_;
  Likelihood result_;
  double variance_ = 0.0;
};

}  // namespace

absl::StatusOr<Likelihood> EstimateLikelihood(Denoiser& denoiser, const ForwardLimits& limits,
                                              absl::Span<const TokenId> ids,
                                              const std::vector<bool>& scored,
                                              const LikelihoodOptions& options,
                                              absl::FunctionRef<void(double)> progress) {
  Estimator estimator(denoiser, limits, ids, scored, options);
  CINNABAR_RETURN_IF_ERROR(estimator.Check());
  return estimator.Run(progress);
}

}  // namespace cinnabar
