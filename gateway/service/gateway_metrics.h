// What the gateway counts. Names and labels: reliability of dashboards depends on them, so they are
// all in gateway_metrics.cc.
#ifndef CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_
#define CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "common/queue/types.h"
#include "gateway/api/render.h"

namespace cinnabar {

// Thread-safe.
class GatewayMetrics {
 public:
  // `metrics` is borrowed and outlives this.
  explicit GatewayMetrics(Metrics& metrics);

  // One request of a client came to its end. `outcome`: ok, or ErrorOutcome().
  void RequestDone(absl::string_view model, RequestClass request_class, absl::string_view protocol,
                   absl::string_view outcome, absl::Duration duration);
  void Rejected(absl::string_view reason, RequestClass request_class);
  void FirstPartial(absl::string_view model, RequestClass request_class, absl::Duration after);
  void ChoiceDone(absl::string_view model, RequestClass request_class, absl::string_view tenant,
                  const UsageReport& usage);
  void AuthFailure(absl::string_view reason);
  void Replayed(int64_t requests);
  void OpenStreams(absl::string_view protocol, int64_t change);
  // Totals that others count; called before each scrape.
  void SetRelay(int64_t inboxes, int64_t strangers, int64_t subscriptions, int64_t calls_waiting,
                int64_t calls_refused, int64_t rewinds);

 private:
  struct Families;
  Metrics& metrics_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_GATEWAY_METRICS_H_
