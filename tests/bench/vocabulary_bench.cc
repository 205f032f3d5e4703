// What the vocabulary head costs beside the bare product of hidden rows and weight. Every round
// times the product and then each kind of query; medians, their ratio to the product and the middle
// half of the ratios are printed, so that a slow moment of the machine touches both sides.
//   vocabulary_bench [rows dim vocabulary rounds threads isa]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "kernels/backend.h"

namespace cinnabar {
namespace {

struct Shape {
  int64_t rows;
  int64_t dim;
  int64_t vocabulary;
};

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

void Measure(const Shape& shape, int32_t rounds, const BackendOptions& options) {
  const auto [rows, dim, vocabulary] = shape;
  std::unique_ptr<Backend> backend = *MakeBackend(BackendKind::kCpu, options);
  std::mt19937 random(7);
  // Logits of deviation 2, and in every row one id 17 above: a confident model (p about 0.99). Flat
  // rows lack that id.
  std::vector<float> weight(vocabulary * dim);
  {
    // A plain generator: std::normal_distribution would take longer than the measurement.
    const float scale = 2.0F / std::sqrt(static_cast<float>(dim) / 12.0F);
    uint32_t state = 1;
    for (float& value : weight) {
      state = state * 1664525U + 1013904223U;
      value = (static_cast<float>(state >> 8) * 0x1p-24F - 0.5F) * scale;
    }
  }
  std::normal_distribution<float> normal;
  std::vector<float> flat(rows * dim);
  for (float& value : flat) value = normal(random);
  std::vector<float> peaked = flat;
  for (int64_t row = 0; row < rows; ++row) {
    const float* target = weight.data() + random() % vocabulary * dim;
    for (int64_t k = 0; k < dim; ++k) peaked[row * dim + k] += 17.0F / 4.0F * target[k];
  }
  auto copy = [&](const std::vector<float>& host) {
    auto buffer = *backend->Allocate(static_cast<int64_t>(host.size()) * 4);
    CINNABAR_CHECK(backend->Upload(host, buffer->data()).ok());
    return buffer;
  };
  const auto peaked_rows = copy(peaked);
  const auto flat_rows = copy(flat);
  const HostMatrix matrix = {.data = weight.data(), .rows = vocabulary, .cols = dim};
  const auto packed = *backend->LoadWeight({&matrix, 1}, RowOrder::kStacked, DType::kF32);
  weight = std::vector<float>();
  const WorkspaceShape workspace = {
      .rows_max = rows, .cols_max = dim, .vocabulary = vocabulary, .queries_max = rows};
  CINNABAR_CHECK(backend->Reserve(workspace).ok());
  std::vector<VocabularyAnswer> answers(rows);
  // The product is timed without a place for its result where the backend allows that, so that
  // writing rows x vocabulary does not flatter the head.
#ifdef CINNABAR_STAND_IN
  std::unique_ptr<Buffer> logits;
#else
  const auto logits = *backend->Allocate(rows * vocabulary * 4);
#endif

  std::vector<std::pair<std::string, std::function<void()>>> runs;
  runs.emplace_back("product", [&] {
    CINNABAR_CHECK(backend
                       ->Logits({.hidden = {.data = peaked_rows->data(), .stride = dim},
                                 .num_rows = rows,
                                 .weight = packed.get(),
                                 .out = {.data = logits == nullptr ? nullptr : logits->data(),
                                         .stride = vocabulary}})
                       .ok());
  });
  std::vector<VocabularyRule> rules(4);
  for (int32_t rule = 0; rule < 4; ++rule) {
    rules[rule].id = rule * static_cast<int32_t>(vocabulary / 5);
    rules[rule].counted = rule % 2 == 0;
    rules[rule].pickable = false;
  }
  auto add = [&](const char* name, const Buffer& hidden, const VocabularyQuery& query) {
    runs.emplace_back(name, [&, query] {
      std::vector<VocabularyQuery> queries(rows, query);
      for (int32_t row = 0; row < rows; ++row) {
        queries[row].hidden_row = row;
        queries[row].noise = {.seed = 3, .position = static_cast<uint32_t>(row), .step = 0};
      }
      CINNABAR_CHECK(backend
                         ->AnswerVocabulary({.hidden = {.data = hidden.data(), .stride = dim},
                                             .weight = packed.get(),
                                             .queries = queries,
                                             .answers = absl::MakeSpan(answers)})
                         .ok());
      CINNABAR_CHECK(backend->Synchronize().ok());
    });
  };
  VocabularyQuery query;
  add("argmax", *peaked_rows, query);
  query.rules = rules;
  add("argmax, 4 rules", *peaked_rows, query);
  query.rules = {};
  query.pick_temperature = 1.0F;
  add("draw, T 1", *peaked_rows, query);
  add("draw, T 1, flat", *flat_rows, query);
  query.pick_temperature = query.statistics_temperature = 0.2F;
  add("draw, T 0.2, flat", *flat_rows, query);
  query.pick_temperature = query.statistics_temperature = 1.0F;
  query.top_p = 0.95F;
  query.top_k = 50;
  add("draw, top_p .95, top_k 50", *peaked_rows, query);
  add("draw, top_p .95, top_k 50, flat", *flat_rows, query);
  query.top_k = 0;
  add("draw, top_p .95", *peaked_rows, query);
  if (rounds > 0 && std::getenv("CINNABAR_BENCH_SLOW") != nullptr) {
    add("draw, top_p .95, flat (whole rows)", *flat_rows, query);
    VocabularyQuery tweedie;
    tweedie.pick = PickRule::kUniformTweedie;
    tweedie.own_token = 1;
    tweedie.sigma_step = 0.1F;
    add("Tweedie step (whole rows)", *flat_rows, tweedie);
  }

  std::vector<std::vector<double>> seconds(runs.size());
  std::vector<std::vector<double>> ratios(runs.size());
  for (int32_t round = -1; round < rounds; ++round) {
    for (size_t run = 0; run < runs.size(); ++run) {
      const auto begin = std::chrono::steady_clock::now();
      runs[run].second();
      const auto end = std::chrono::steady_clock::now();
      if (round < 0) continue;  // the first round warms up
      seconds[run].push_back(std::chrono::duration<double>(end - begin).count());
      ratios[run].push_back(seconds[run].back() / seconds[0].back());
    }
  }
  std::printf("%s: rows %ld, dim %ld, vocabulary %ld, F32, seed 7, %d rounds, scratch %.1f MB\n",
              backend->Describe().c_str(), rows, dim, vocabulary, rounds,
              static_cast<double>(backend->WorkspaceBytes(workspace)) * 1e-6);
  for (size_t run = 0; run < runs.size(); ++run) {
    const double median = Quantile(seconds[run], 0.5);
    std::printf(
        "  %-36s %8.2f ms %7.1f GFLOP/s  ratio %.3f [%.3f, %.3f]\n", runs[run].first.c_str(),
        median * 1e3, 2e-9 * static_cast<double>(rows * dim * vocabulary) / median,
        Quantile(ratios[run], 0.5), Quantile(ratios[run], 0.25), Quantile(ratios[run], 0.75));
  }
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  auto number = [&](int index, int64_t otherwise) {
    return argc > index ? std::atoll(argv[index]) : otherwise;
  };
  cinnabar::BackendOptions options;
  options.num_threads = static_cast<int32_t>(number(5, 0));
  if (argc > 6) options.isa = argv[6];
  const auto rounds = static_cast<int32_t>(number(4, 9));
  if (argc > 3) {
    cinnabar::Measure({number(1, 0), number(2, 0), number(3, 0)}, rounds, options);
  } else {
    cinnabar::Measure({256, 768, 32000}, rounds, options);
    cinnabar::Measure({256, 1024, 152000}, rounds, options);
  }
  return 0;
}
