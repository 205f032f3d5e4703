// Time and chance, as one object that a test can take into its own hands: what a service does when,
// and what it draws, then follows from a seed.
#ifndef CINNABAR_COMMON_BASE_ENVIRONMENT_H_
#define CINNABAR_COMMON_BASE_ENVIRONMENT_H_

#include "absl/time/time.h"

namespace cinnabar {

// The default is the real one. Thread-safe.
class Environment {
 public:
  virtual ~Environment() = default;
  virtual absl::Time Now();
  virtual void Sleep(absl::Duration duration);
  virtual double Uniform();  // in [0, 1)

  static Environment& Real();
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_ENVIRONMENT_H_
