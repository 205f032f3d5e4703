#include "gateway/service/gateway_metrics.h"

#include "absl/time/clock.h"

namespace cinnabar {
namespace {

// Counters that others keep: the metric follows.
void Follow(prometheus::Counter& counter, int64_t total) {
  counter.Increment(static_cast<double>(total) - counter.Value());
}

}  // namespace

GatewayMetrics::GatewayMetrics(Metrics& metrics)
    : requests_(metrics.AddCounter("cinnabar_gateway_requests_total", "Requests by their outcome",
                                   {"model", "class", "proto", "outcome"})),
      duration_(metrics.AddHistogram("cinnabar_gateway_request_duration_seconds",
                                     "From the request to the end of its reply", LatencyBuckets(),
                                     {"model", "class"})),
      first_partial_(metrics.AddHistogram("cinnabar_time_to_first_partial_seconds",
                                          "From the request to its first denoising step",
                                          LatencyBuckets(), {"model", "class"})),
      queue_seconds_(metrics.AddHistogram("cinnabar_request_queue_seconds",
                                          "From the request to the start of its first step",
                                          LatencyBuckets(), {"model", "class"})),
      steps_(metrics.AddHistogram("cinnabar_request_steps", "Denoising steps of an answer",
                                  PowerBuckets(12), {"model"})),
      tokens_per_forward_(metrics.AddHistogram("cinnabar_request_tokens_per_forward_ratio",
                                               "Tokens committed for each forward of an answer",
                                               PowerBuckets(8), {"model"})),
      rejections_(metrics.AddCounter("cinnabar_admission_rejections_total",
                                     "Requests that were not admitted", {"reason", "class"})),
      tokens_(metrics.AddCounter("cinnabar_gateway_tokens_total", "Tokens of finished answers",
                                 {"model", "class", "direction"})),
      device_seconds_(metrics.AddCounter("cinnabar_request_device_seconds_total",
                                         "Device time of finished answers: their share of each "
                                         "step that they ran in",
                                         {"model", "class"})),
      tenant_tokens_(metrics.AddCounter("cinnabar_tenant_tokens_total",
                                        "Tokens of finished answers, prompt and completion",
                                        {"tenant"})),
      tenant_dollars_(metrics.AddCounter("cinnabar_tenant_cost_dollars_total",
                                         "Price of finished answers", {"tenant"})),
      revenue_(metrics.AddCounter("cinnabar_price_dollars_total", "Price of finished answers",
                                  {"model", "class"})),
      auth_failures_(metrics.AddCounter("cinnabar_auth_failures_total",
                                        "Requests without a key that is good, by reason",
                                        {"reason"})),
      keys_(metrics.AddGauge("cinnabar_api_keys",
                             "API keys by state: live, revoked, other_pepper, unreadable",
                             {"state"})),
      keys_age_(metrics.AddGauge("cinnabar_api_keys_age_seconds",
                                 "Since Redis last confirmed the copy of the keys", {})),
      replayed_(metrics.AddCounter("cinnabar_replayed_requests_total",
                                   "Requests enqueued again: Redis had lost them")),
      open_streams_(
          metrics.AddGauge("cinnabar_gateway_open_streams", "Streams under way", {"proto"})),
      connections_(metrics.AddGauge("cinnabar_gateway_connections", "HTTP connections")),
      http_events_(metrics.AddCounter("cinnabar_http_events_total",
                                      "What the HTTP server met besides requests", {"event"})),
      events_(
          metrics.AddCounter("cinnabar_relayed_events_total", "Steps and ends pushed by Redis")),
      stray_events_(metrics.AddCounter("cinnabar_stray_events_total",
                                       "Of those, for requests nobody waits for any more")),
      subscriptions_(metrics.AddCounter("cinnabar_event_subscriptions_total",
                                        "Subscriptions made; more than one: it was lost")),
      relayed_(metrics.AddGauge("cinnabar_relayed_requests", "Requests that are waited for")),
      queue_calls_(metrics.AddCounter("cinnabar_queue_calls_total", "Calls to the queue")),
      queue_calls_refused_(metrics.AddCounter("cinnabar_queue_calls_refused_total",
                                              "Calls that found too many waiting")),
      queue_calls_waiting_(metrics.AddGauge("cinnabar_queue_calls_waiting",
                                            "Calls that wait for a "
                                            "connection")),
      rewinds_(metrics.AddCounter("cinnabar_redis_rewinds_total",
                                  "Times that Redis was found to have lost changes")) {}

void GatewayMetrics::RequestDone(absl::string_view model, RequestClass request_class,
                                 absl::string_view protocol, absl::string_view outcome,
                                 absl::Duration duration) {
  const absl::string_view name = RequestClassName(request_class);
  // Without a model that is served the name is the client's, and no label.
  const absl::string_view known = model.empty() ? "none" : model;
  requests_.With({known, name, protocol, outcome}).Increment();
  duration_.With({known, name}).Observe(absl::ToDoubleSeconds(duration));
}

void GatewayMetrics::Rejected(absl::string_view reason, RequestClass request_class) {
  rejections_.With({reason, RequestClassName(request_class)}).Increment();
}

void GatewayMetrics::FirstPartial(absl::string_view model, RequestClass request_class,
                                  absl::Duration after) {
  first_partial_.With({model, RequestClassName(request_class)})
      .Observe(absl::ToDoubleSeconds(after));
}

void GatewayMetrics::ChoiceDone(absl::string_view model, RequestClass request_class,
                                absl::string_view tenant, const UsageReport& usage) {
  const absl::string_view name = RequestClassName(request_class);
  queue_seconds_.With({model, name}).Observe(absl::ToDoubleSeconds(usage.queue));
  steps_.With({model}).Observe(static_cast<double>(usage.steps));
  if (usage.forwards > 0) {
    tokens_per_forward_.With({model}).Observe(static_cast<double>(usage.tokens_committed) /
                                              static_cast<double>(usage.forwards));
  }
  tokens_.With({model, name, "input"}).Increment(static_cast<double>(usage.prompt_tokens));
  tokens_.With({model, name, "output"}).Increment(static_cast<double>(usage.completion_tokens));
  tenant_tokens_.With({tenant}).Increment(
      static_cast<double>(usage.prompt_tokens + usage.completion_tokens));
  tenant_dollars_.With({tenant}).Increment(usage.price_dollars);
  device_seconds_.With({model, name}).Increment(absl::ToDoubleSeconds(usage.device));
  revenue_.With({model, name}).Increment(usage.price_dollars);
}

void GatewayMetrics::AuthFailure(absl::string_view reason) {
  auth_failures_.With({reason}).Increment();
}

void GatewayMetrics::Show(const KeyCacheStats& keys) {
  const auto set = [&](absl::string_view state, int64_t count) {
    keys_.With({state}).Set(static_cast<double>(count));
  };
  set("live", keys.num_live);
  set("revoked", keys.num_keys - keys.num_live - keys.num_other_pepper);
  set("other_pepper", keys.num_other_pepper);
  set("unreadable", keys.num_unreadable);
  if (keys.loaded) keys_age_.With({}).Set(absl::ToDoubleSeconds(absl::Now() - keys.read_at));
}

void GatewayMetrics::Replayed(int64_t requests) {
  if (requests > 0) replayed_.With({}).Increment(static_cast<double>(requests));
}

void GatewayMetrics::OpenStreams(absl::string_view protocol, int64_t change) {
  open_streams_.With({protocol}).Increment(static_cast<double>(change));
}

void GatewayMetrics::Show(const HttpCounters& http) {
  connections_.With({}).Set(static_cast<double>(http.connections));
  Follow(http_events_.With({"connection_refused"}), http.refused_connections);
  Follow(http_events_.With({"malformed"}), http.malformed);
  Follow(http_events_.With({"too_large"}), http.too_large);
  Follow(http_events_.With({"timeout"}), http.timeouts);
  Follow(http_events_.With({"slow_reader"}), http.slow_readers);
  Follow(http_events_.With({"handler_failure"}), http.handler_failures);
}

void GatewayMetrics::Show(const EventHub::Counters& hub, const QueueExecutor::Counters& executor) {
  Follow(events_.With({}), hub.events);
  Follow(stray_events_.With({}), hub.strangers);
  Follow(subscriptions_.With({}), hub.subscriptions);
  relayed_.With({}).Set(static_cast<double>(hub.inboxes));
  Follow(queue_calls_.With({}), executor.calls);
  Follow(queue_calls_refused_.With({}), executor.refused);
  queue_calls_waiting_.With({}).Set(static_cast<double>(executor.waiting));
  Follow(rewinds_.With({}), executor.rewinds);
}

}  // namespace cinnabar
