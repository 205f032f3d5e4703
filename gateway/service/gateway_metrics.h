// What the gateway counts: all names and labels are in gateway_metrics.cc.
#ifndef CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_
#define CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/http/http_server.h"
#include "common/keys/key_cache.h"
#include "common/metrics/metrics.h"
#include "common/queue/types.h"
#include "gateway/api/render.h"
#include "gateway/relay/event_hub.h"
#include "gateway/relay/queue_executor.h"

namespace cinnabar {

// Thread-safe.
class GatewayMetrics {
 public:
  explicit GatewayMetrics(Metrics& metrics);  // borrowed, outlives it

  // A client's request came to its end. `outcome`: ok, or ErrorOutcome().
  void RequestDone(absl::string_view model, RequestClass request_class, absl::string_view protocol,
                   absl::string_view outcome, absl::Duration duration);
  void Rejected(absl::string_view reason, RequestClass request_class);
  void FirstPartial(absl::string_view model, RequestClass request_class, absl::Duration after);
  void ChoiceDone(absl::string_view model, RequestClass request_class, absl::string_view tenant,
                  const UsageReport& usage);
  void AuthFailure(absl::string_view reason);  // KeyRefusalName
  void Show(const KeyCacheStats& keys);
  void Replayed(int64_t requests);
  void OpenStreams(absl::string_view protocol, int64_t change);

  // What others count; before each scrape.
  void Show(const HttpCounters& http);
  void Show(const EventHub::Counters& hub, const QueueExecutor::Counters& executor);

 private:
  CounterFamily& requests_;
  HistogramFamily& duration_;
  HistogramFamily& first_partial_;
  HistogramFamily& queue_seconds_;
  HistogramFamily& steps_;
  HistogramFamily& tokens_per_forward_;
  CounterFamily& rejections_;
  CounterFamily& tokens_;
  CounterFamily& device_seconds_;
  CounterFamily& tenant_tokens_;
  CounterFamily& tenant_dollars_;
  CounterFamily& revenue_;
  CounterFamily& auth_failures_;
  GaugeFamily& keys_;
  GaugeFamily& keys_age_;
  CounterFamily& replayed_;
  GaugeFamily& open_streams_;
  GaugeFamily& connections_;
  CounterFamily& http_events_;
  CounterFamily& events_;
  CounterFamily& stray_events_;
  CounterFamily& subscriptions_;
  GaugeFamily& relayed_;
  CounterFamily& queue_calls_;
  CounterFamily& queue_calls_refused_;
  GaugeFamily& queue_calls_waiting_;
  CounterFamily& rewinds_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_
