#include "worker/service/null_denoiser.h"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/time/clock.h"

namespace cinnabar {
namespace {

uint32_t Mix(uint32_t value) {  // Murmur3's finaliser
  value ^= value >> 16;
  value *= 0x85EBCA6BU;
  value ^= value >> 13;
  value *= 0xC2B2AE35U;
  return value ^ (value >> 16);
}

class NullDenoiser : public Denoiser {
 public:
  NullDenoiser(ModelTraits traits, absl::Duration step_time, Backend& backend,
               const NullFaults& faults)
      : traits_(std::move(traits)), step_time_(step_time), backend_(backend), faults_(faults) {}

  const ModelTraits& traits() const override { return traits_; }
  Backend& backend() const override { return backend_; }
  KvShape SequenceKvShape(int32_t positions, KvReuse /*reuse*/) const override {
    return {.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .positions_max = positions};
  }

  absl::Status Forward(const ForwardBatch& batch) override {
    if (faults_.passes >= 0 && passes_++ >= faults_.passes) {
      return absl::UnavailableError("the null device is gone, as it was told");
    }
    // What a row predicts depends on its position in its own sequence alone.
    keys_.clear();
    bad_.clear();
    for (const SequenceSpan& sequence : batch.sequences) {
      if (sequence.first_position != 0) continue;
      const TokenId first = batch.ids[sequence.row_begin];
      if (first == faults_.abort) std::abort();
      if (first == faults_.hang) absl::SleepFor(faults_.hang_for);
      if (first == faults_.fail) return absl::InternalError("the null device was told to fail");
    }
    size_t span = 0;
    for (const int32_t row : batch.wanted_rows) {
      while (row >= batch.sequences[span].row_begin + batch.sequences[span].num_rows) ++span;
      const SequenceSpan& sequence = batch.sequences[span];
      const int32_t position = sequence.first_position + row - sequence.row_begin;
      const TokenId first = batch.ids[sequence.row_begin];
      bad_.push_back(faults_.not_finite >= 0 && first == faults_.not_finite);
      keys_.push_back(
          Mix(static_cast<uint32_t>(position) * 2654435761U + static_cast<uint32_t>(first)));
    }
    absl::SleepFor(step_time_);
    return absl::OkStatus();
  }

  absl::Status Answer(absl::Span<const VocabularyQuery> queries,
                      absl::Span<VocabularyAnswer> answers) override {
    for (size_t i = 0; i < queries.size(); ++i) {
      const VocabularyQuery& query = queries[i];
      const uint32_t key = keys_[query.hidden_row];
      VocabularyAnswer& answer = answers[i];
      answer = {};
      answer.finite = !bad_[query.hidden_row];
      answer.token = answer.top_token = Pick(query, key);
      answer.probability = 0.25 + 0.5 * static_cast<double>(key >> 8) / (1 << 24);
      answer.margin = answer.probability / 2;
      answer.entropy = 1.0 - answer.probability;
    }
    return absl::OkStatus();
  }

  absl::Status Logits(int32_t, int32_t, absl::Span<float>) override {
    return absl::UnimplementedError("the null device has no logits");
  }
  double OutputOffset(float) const override { return 0.0; }
  Memory memory() const override { return {}; }

 private:
  // Any token that may be picked and ends nothing.
  TokenId Pick(const VocabularyQuery& query, uint32_t key) const {
    const int32_t limit = query.pickable_ids > 0 ? query.pickable_ids : traits_.vocab_size;
    for (uint32_t i = 0;; ++i) {
      const auto token = static_cast<TokenId>((key + i) % static_cast<uint32_t>(limit));
      const bool ruled_out = std::any_of(
          query.rules.begin(), query.rules.end(),
          [&](const VocabularyRule& rule) { return rule.id == token && !rule.pickable; });
      const bool ends = token == traits_.eot_token ||
                        std::count(traits_.eos_tokens.begin(), traits_.eos_tokens.end(), token) > 0;
      if ((!ruled_out && !ends) || i > 64) return token;
    }
  }

  const ModelTraits traits_;
  const absl::Duration step_time_;
  Backend& backend_;
  const NullFaults faults_;
  std::vector<uint32_t> keys_;  // by wanted row
  std::vector<bool> bad_;       // likewise
  int64_t passes_ = 0;
};

}  // namespace

std::unique_ptr<Denoiser> MakeNullDenoiser(ModelTraits traits, absl::Duration step_time,
                                           Backend& backend, const NullFaults& faults) {
  return std::make_unique<NullDenoiser>(std::move(traits), step_time, backend, faults);
}

}  // namespace cinnabar
