// ReMDM (arXiv:2503.00307; github.com/kuleshov-group/remdm, diffusion.py) and, from the same code,
// the corrector of Discrete Flow Matching (arXiv:2407.15595, appendix D). MDLM's process, but a
// committed position may be masked again: the chances of both ways do not depend on the network,
// which is asked for the positions that are unmasked alone. Steps at times 1 .. kTimeEnd and the
// closing one, which takes the argmax of what is still masked.
//
// With a(t) = 1 - t the committed share, a step from t to s has for each position
//   committed -> masked  sigma
//   masked -> committed  (a(s) - (1 - sigma) a(t)) / (1 - a(t))
// Unlike the published code: `remdm_conf` starts with sigma 0 (there the first softmax has nothing
// to go by and is NaN), keeps confidences in float32 and leaves given positions out;
// `dfm_corrector` works without top_p, too.
#include <algorithm>
#include <cmath>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

// One step, as chances.
struct Move {
  bool closing = false;
  double time = kTimeEnd;  // for the network's noise level
  double unmasks = 1.0;
  double masks = 0.0;
};

// What sigma may be at most between the committed shares `now` and `next`.
double LargestSigma(double now, double next) {
  return now > 0 ? std::min(1.0, (1 - next) / now) : 1.0;
}

Move MoveOf(double time, double now, double next, double sigma) {
  return {.time = time, .unmasks = (next - (1 - sigma) * now) / (1 - now), .masks = sigma};
}

class Revising : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const final {
    StartPlan(context, plan);
    const Move move = MoveAt(context);
    plan.sigma = static_cast<float>(SigmaAt(context.model, move.time));
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (!context.canvas.undecided(i) || !Changes(context, move, i)) continue;
      PositionQuery& query = AddQuery(i, plan);
      query.pick_temperature = move.closing ? 0.0F : context.params.temperature;
      query.statistics_temperature = TemperedStatistics(context.params);
      query.top_p = context.params.top_p;
      query.top_p_rule = TopPRule::kInside;
      // The parameterisation gives the mask token probability 0.
      query.rules.push_back({.id = context.model.mask_token, .counted = false, .pickable = false});
    }
    plan.forward = !plan.queries.empty();
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const final {
    outcome.Clear();
    const Move move = MoveAt(context);
    const double shares = SharesSum(context);
    int32_t next = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.undecided(i)) {
        if (next < static_cast<int32_t>(answers.size()) && plan.queries[next].position == i) {
          TransferChosen(plan, answers, absl::MakeConstSpan(&next, 1), outcome);
          ++next;
        }
      } else if (context.canvas.states[i] == PositionState::kCommitted) {
        Move own = move;
        if (shares > 0) own.masks *= Share(context, i) / shares;
        if (Changes(context, own, i)) {
          outcome.transfers.push_back({.position = i, .token = kMaskedAgain});
        }
      }
    }
    outcome.stays_open = !move.closing;
  }

 private:
  virtual Move MoveAt(const StepContext& context) const = 0;
  // How sigma is divided between the committed positions: in proportion to Share(), which sum to
  // SharesSum(); 0 gives each all of it.
  virtual double Share(const StepContext&, int32_t) const { return 0; }
  double SharesSum(const StepContext& context) const {
    double sum = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.states[i] == PositionState::kCommitted) sum += Share(context, i);
    }
    return sum;
  }

  static bool Changes(const StepContext& context, const Move& move, int32_t position) {
    const double chance = context.canvas.undecided(position) ? move.unmasks : move.masks;
    return move.closing ? context.canvas.undecided(position)
                        : StepUniform(context, NoiseStream::kTransfer, position) < chance;
  }
};

class Remdm final : public Revising {
 public:
  enum class Variant { kCap, kRescale, kConf, kLoop };
  explicit Remdm(Variant variant) : variant_(variant) {}

 private:
  Move MoveAt(const StepContext& context) const override {
    const int32_t num_steps = StepsOf(context);
    const TimeStep at = TimeStepAt(num_steps, context.state.block_step);
    if (context.state.block_step >= num_steps) return {.closing = true};
    const double eta = context.params.eta;
    const double now = 1 - at.time;
    const double next = now + at.length;
    switch (variant_) {
      case Variant::kCap:
        return MoveOf(at.time, now, next, std::min(eta, now > 0 ? (1 - next) / now : eta));
      case Variant::kRescale:
        return MoveOf(at.time, now, next, eta * LargestSigma(now, next));
      case Variant::kConf: {
        // Masked positions have sigma 0.
        Move move = MoveOf(at.time, now, next, 0);
        move.masks = LargestSigma(now, next);
        return move;
      }
      case Variant::kLoop:
        return LoopMove(context.params, at);
    }
    return {};
  }

  // Up to alpha_on of the positions until t_on, there until t_off, then the rest.
  static Move LoopMove(const DecodingParams& params, const TimeStep& at) {
    const double t_on = params.t_on;
    const double t_off = params.t_off;
    const double alpha_on = params.alpha_on;
    const double time = at.time;
    const double next = time - at.length;
    if (time > t_on) {
      const double rate = alpha_on / (1 - t_on);
      return MoveOf(time, (1 - time) * rate, (1 - next) * rate, 0);
    }
    if (time <= t_off) {
      const double rate = (1 - alpha_on) / t_off;
      return MoveOf(time, 1 - time * rate, 1 - next * rate, 0);
    }
    return MoveOf(time, alpha_on, alpha_on, params.eta);
  }

  double Share(const StepContext& context, int32_t position) const override {
    if (variant_ != Variant::kConf) return 0;
    return std::exp(-static_cast<double>(context.state.confidences[position]));
  }

  const Variant variant_;
};

class DfmCorrector final : public Revising {
  Move MoveAt(const StepContext& context) const override {
    const int32_t num_steps = StepsOf(context);
    const double end = TimeStepAt(num_steps, 0).length;
    // Steps are shorter where the rates are high, so the grid has to be followed from its start.
    double time = 1;
    for (int32_t step = 0; step < context.state.block_step && time > end; ++step) {
      time -= Length(time, num_steps);
    }
    if (time <= end) return {.closing = true, .time = time};
    const double length = Length(time, num_steps);
    const double forward = ForwardRate(time);
    return {.time = time,
            .unmasks = forward * length / time,
            .masks = time < 1 ? (forward - 1) * length / (1 - time) : 0.0};
  }

  static double ForwardRate(double time) {
    return 10 * std::pow(time, 0.25) * std::pow(1 - time, 0.25) + 1;
  }
  static double Length(double time, int32_t num_steps) {
    if (time == 1) return 1.0 / num_steps;
    const double forward = ForwardRate(time);
    return std::min(1.0 / num_steps, 1 / (forward / time + (forward - 1) / (1 - time)));
  }
};

}  // namespace

const Sampler* RemdmCapSampler() {
  static const Remdm sampler(Remdm::Variant::kCap);
  return &sampler;
}

const Sampler* RemdmRescaleSampler() {
  static const Remdm sampler(Remdm::Variant::kRescale);
  return &sampler;
}

const Sampler* RemdmConfSampler() {
  static const Remdm sampler(Remdm::Variant::kConf);
  return &sampler;
}

const Sampler* RemdmLoopSampler() {
  static const Remdm sampler(Remdm::Variant::kLoop);
  return &sampler;
}

const Sampler* DfmCorrectorSampler() {
  static const DfmCorrector sampler;
  return &sampler;
}

}  // namespace cinnabar
