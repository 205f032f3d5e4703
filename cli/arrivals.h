// When the requests of a load test arrive, and how long they are: a rate, or a recorded trace.
#ifndef CINNABAR_CLI_ARRIVALS_H_
#define CINNABAR_CLI_ARRIVALS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace cinnabar {

struct Arrival {
  absl::Duration at;          // from the start; never falls
  int32_t prompt_tokens = 0;  // 0: whatever the test asks for
  int32_t output_tokens = 0;
  int32_t tenant = -1;  // of a trace that has them; -1: none
};

class ArrivalSchedule {
 public:
  virtual ~ArrivalSchedule() = default;
  // The next one, or nullopt when there are no more.
  virtual std::optional<Arrival> Next() = 0;
};

enum class ArrivalKind { kPoisson, kUniform };
// `rate` requests a second (> 0) without end. The same seed gives the same arrivals.
std::unique_ptr<ArrivalSchedule> MakeRateSchedule(double rate, ArrivalKind kind, uint64_t seed);

// `rows` at `time_scale` (> 0) times their speed; from the start again, without end, with `repeat`.
std::unique_ptr<ArrivalSchedule> MakeTraceSchedule(std::vector<Arrival> rows, double time_scale,
                                                   bool repeat);

// Reads a recorded trace; what kind it is shows in its first line:
//   Azure LLM inference traces   CSV with the header TIMESTAMP,ContextTokens,GeneratedTokens
//   Mooncake traces              JSON lines with timestamp (ms), input_length, output_length
//   ServeGen rate tables         CSV without a header, window_start_s,rate_rps,cv,pattern,a,b:
//   arrivals
//                                are drawn, by `seed`, as the table says; a folder of such files is
//                                one tenant a file
//   three numbers a line         delta_ms,context,generated; '#' begins a comment
// Arrivals count from the first one. InvalidArgument names the file and the line.
absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path, uint64_t seed);

// What a trace's output length asks of the gateway: the next power of two, in whole blocks of 32.
int32_t CanvasForOutput(int32_t output_tokens);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_ARRIVALS_H_
