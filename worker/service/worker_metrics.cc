#include "worker/service/worker_metrics.h"

#include <utility>

namespace cinnabar {
namespace {

// Counters that others keep: the metric follows.
void Follow(prometheus::Counter& counter, double total) {
  if (total > counter.Value()) counter.Increment(total - counter.Value());
}

}  // namespace

WorkerMetrics::WorkerMetrics(Metrics& metrics, std::string model, double dollars_per_hour)
    : model_(std::move(model)),
      dollars_per_second_(dollars_per_hour / 3600),
      batch_rows_(metrics.AddHistogram("cinnabar_batch_rows", "Sequences in a denoising step",
                                       PowerBuckets(9), {"model"})),
      batch_fill_(metrics.AddHistogram("cinnabar_batch_fill_ratio",
                                       "Sequences in a step, of those that fit",
                                       {0.1, 0.25, 0.5, 0.75, 0.9, 1.0}, {"model"})),
      step_seconds_(metrics.AddHistogram("cinnabar_step_duration_seconds",
                                         "Time of a denoising step of the whole batch",
                                         LatencyBuckets(), {"model"})),
      steps_per_request_(metrics.AddHistogram("cinnabar_denoise_steps_per_request",
                                              "Denoising steps that a request took",
                                              PowerBuckets(12), {"model"})),
      tokens_per_forward_(metrics.AddHistogram(
          "cinnabar_tokens_per_forward_ratio",
          "Tokens committed for each forward pass of a request", PowerBuckets(8), {"model"})),
      positions_(metrics.AddCounter("cinnabar_token_steps_total",
                                    "Positions computed, over all steps", {"model", "kind"})),
      reused_(metrics.AddCounter("cinnabar_prefix_positions_reused_total",
                                 "Positions whose keys and values were taken over from a sequence "
                                 "that began alike, instead of computed",
                                 {"model"})),
      tokens_(
          metrics.AddCounter("cinnabar_tokens_total", "Tokens committed", {"model", "direction"})),
      forwards_(metrics.AddCounter("cinnabar_nfe_total", "Forward passes of the batch", {"model"})),
      busy_seconds_(metrics.AddCounter("cinnabar_device_busy_seconds_total",
                                       "Time that the device computed", {"model"})),
      dollars_(metrics.AddCounter("cinnabar_cost_dollars_total",
                                  "Device time at the configured price", {"model"})),
      started_(metrics.AddCounter("cinnabar_attempts_total", "Requests that this worker took up",
                                  {"model", "kind"})),
      ended_(metrics.AddCounter("cinnabar_worker_rows_total", "Requests that left this worker",
                                {"model", "outcome"})),
      device_errors_(metrics.AddCounter("cinnabar_device_errors_total",
                                        "Steps that the device failed", {"model"})),
      published_steps_(metrics.AddCounter("cinnabar_published_steps_total", "Steps sent to Redis")),
      publish_calls_(metrics.AddCounter("cinnabar_publish_calls_total", "Calls that sent them")),
      publish_failures_(
          metrics.AddCounter("cinnabar_publish_failures_total", "Calls that found no Redis")),
      fenced_(metrics.AddCounter("cinnabar_fenced_writes_total",
                                 "Rows that were another worker's when their steps came")),
      rewinds_(metrics.AddCounter("cinnabar_redis_rewinds_total",
                                  "Rows whose steps were sent again: Redis had lost them")),
      lost_(metrics.AddCounter("cinnabar_lost_rows_total", "Rows that Redis no longer knew")),
      snapshots_(metrics.AddCounter("cinnabar_snapshots_total", "Canvas snapshots sent")),
      unpublished_(metrics.AddGauge("cinnabar_unpublished_steps", "Steps waiting to be sent")),
      ready_(metrics.AddGauge("cinnabar_worker_ready", "1 while it takes work", {"model"})),
      draining_(metrics.AddGauge("cinnabar_worker_draining", "1 while it drains", {"model"})),
      step_age_(metrics.AddGauge("cinnabar_worker_last_step_age_seconds",
                                 "How long the step under way has taken", {"model"})),
      rows_(metrics.AddGauge("cinnabar_worker_running_rows", "Sequences it holds", {"model"})),
      memory_(metrics.AddGauge("cinnabar_worker_memory_bytes", "Memory by use", {"model", "use"})),
      energy_joules_(metrics.AddCounter("cinnabar_device_energy_joules_total",
                                        "What the device drew since this worker started, whoever "
                                        "used it",
                                        {"model"})),
      graphs_(metrics.AddCounter("cinnabar_device_graph_steps_total",
                                 "Steps with a recorded graph for their shape (hit) and without",
                                 {"model", "outcome"})),
      ahead_(
          metrics.AddCounter("cinnabar_ahead_steps_total",
                             "Steps of a sequence that were computed before the step before them "
                             "was known: used, or dropped because it came otherwise",
                             {"model", "outcome"})),
      power_watts_(
          metrics.AddGauge("cinnabar_device_power_watts", "What the device draws", {"model"})),
      utilization_(metrics.AddGauge("cinnabar_device_utilization_ratio",
                                    "Share of time in which something ran", {"model"})),
      device_memory_(metrics.AddGauge("cinnabar_device_memory_bytes",
                                      "Memory of the device, whoever uses it",
                                      {"model", "state"})) {}

void WorkerMetrics::StepDone(int32_t rows, int64_t committed, int32_t rows_max,
                             absl::Duration took) {
  const double seconds = absl::ToDoubleSeconds(took);
  batch_rows_.With({model_}).Observe(rows);
  batch_fill_.With({model_}).Observe(static_cast<double>(rows) / rows_max);
  step_seconds_.With({model_}).Observe(seconds);
  tokens_.With({model_, "output"}).Increment(static_cast<double>(committed));
  forwards_.With({model_}).Increment();
  if (!device_has_clock_) busy_seconds_.With({model_}).Increment(seconds);
  dollars_.With({model_}).Increment(seconds * dollars_per_second_);
}

void WorkerMetrics::Set(const EngineCounters& engine) {
  Follow(positions_.With({model_, "useful"}),
         static_cast<double>(engine.rows_computed - engine.rows_wasted));
  Follow(reused_.With({model_}), static_cast<double>(engine.positions_reused));
  if (engine.ahead_used + engine.ahead_dropped == 0) return;
  Follow(positions_.With({model_, "discarded"}), static_cast<double>(engine.rows_wasted));
  Follow(ahead_.With({model_, "used"}), static_cast<double>(engine.ahead_used));
  Follow(ahead_.With({model_, "dropped"}), static_cast<double>(engine.ahead_dropped));
}

void WorkerMetrics::RowStarted(bool resumed) {
  started_.With({model_, resumed ? "resumed" : "new"}).Increment();
}

void WorkerMetrics::RowEnded(absl::string_view outcome, int64_t steps, double tokens_per_forward) {
  ended_.With({model_, outcome}).Increment();
  if (outcome != "done") return;
  steps_per_request_.With({model_}).Observe(static_cast<double>(steps));
  tokens_per_forward_.With({model_}).Observe(tokens_per_forward);
}

void WorkerMetrics::DeviceError() { device_errors_.With({model_}).Increment(); }

void WorkerMetrics::Set(const PublisherCounters& publisher) {
  Follow(published_steps_.With({}), static_cast<double>(publisher.steps));
  Follow(publish_calls_.With({}), static_cast<double>(publisher.calls));
  Follow(publish_failures_.With({}), static_cast<double>(publisher.failures));
  Follow(fenced_.With({}), static_cast<double>(publisher.fenced));
  Follow(rewinds_.With({}), static_cast<double>(publisher.rewinds));
  Follow(lost_.With({}), static_cast<double>(publisher.lost));
  Follow(snapshots_.With({}), static_cast<double>(publisher.snapshots));
  unpublished_.With({}).Set(static_cast<double>(publisher.pending));
}

void WorkerMetrics::SetState(bool ready, bool draining, absl::Duration step_age, int64_t rows,
                             const Denoiser::Memory& memory, int64_t kv_bytes) {
  ready_.With({model_}).Set(ready ? 1 : 0);
  draining_.With({model_}).Set(draining ? 1 : 0);
  step_age_.With({model_}).Set(absl::ToDoubleSeconds(step_age));
  rows_.With({model_}).Set(static_cast<double>(rows));
  memory_.With({model_, "weights"}).Set(static_cast<double>(memory.weights_bytes));
  memory_.With({model_, "workspace"}).Set(static_cast<double>(memory.workspace_bytes));
  memory_.With({model_, "kv"}).Set(static_cast<double>(kv_bytes));
}

void WorkerMetrics::SetDevice(const DeviceStats& stats, const DeviceReading& reading) {
  if (stats.busy_seconds >= 0) {
    device_has_clock_ = true;
    Follow(busy_seconds_.With({model_}), stats.busy_seconds);
  }
  if (stats.graph_hits + stats.graph_misses > 0) {
    Follow(graphs_.With({model_, "hit"}), static_cast<double>(stats.graph_hits));
    Follow(graphs_.With({model_, "miss"}), static_cast<double>(stats.graph_misses));
  }
  if (reading.energy_joules >= 0) Follow(energy_joules_.With({model_}), reading.energy_joules);
  if (reading.power_watts >= 0) power_watts_.With({model_}).Set(reading.power_watts);
  if (reading.utilization >= 0) utilization_.With({model_}).Set(reading.utilization);
  int64_t total = reading.memory_total_bytes, used = reading.memory_used_bytes;
  if (total < 0 && stats.memory_total_bytes >= 0 && stats.memory_free_bytes >= 0) {
    total = stats.memory_total_bytes;
    used = total - stats.memory_free_bytes;
  }
  if (total < 0 || used < 0) return;
  device_memory_.With({model_, "used"}).Set(static_cast<double>(used));
  device_memory_.With({model_, "free"}).Set(static_cast<double>(total - used));
}

}  // namespace cinnabar
