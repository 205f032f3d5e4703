// Owners of what the runtime hands out, and the two ways bytes reach the device.
#ifndef CINNABAR_KERNELS_CUDA_DEVICE_H_
#define CINNABAR_KERNELS_CUDA_DEVICE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {

template <void (*kGiveBack)(void*)>
struct GiveBack {
  void operator()(void* owned) const { kGiveBack(owned); }
};
using DeviceMemory = std::unique_ptr<void, GiveBack<FreeDevice>>;
using PinnedMemory = std::unique_ptr<void, GiveBack<FreePinned>>;
using Stream = std::unique_ptr<void, GiveBack<DestroyStream>>;
using Event = std::unique_ptr<void, GiveBack<DestroyEvent>>;
using Graph = std::unique_ptr<void, GiveBack<DestroyGraph>>;
using GraphExecutable = std::unique_ptr<void, GiveBack<DestroyExecutable>>;

// ResourceExhausted when there is not so much.
absl::StatusOr<DeviceMemory> TakeDeviceMemory(int64_t bytes);
absl::StatusOr<PinnedMemory> TakePinnedMemory(int64_t bytes);

// A stretch of pinned memory and one of the device that mirrors it: what a step uploads (ids,
// geometry, queries) is laid out here once and copied in stream order. Used again after the stream
// was waited for.
class Staging {
 public:
  // What `bytes` take of a stretch.
  static constexpr int64_t RoomOf(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  void Reset(char* host, char* device, int64_t bytes);
  int64_t bytes() const { return bytes_; }
  int64_t bytes_left() const { return bytes_ - used_; }
  void Rewind() { used_ = 0; }
  // Copies `bytes` of `data` to the device; there must be room. Null on an error, which *error
  // gets.
  void* Copy(const void* data, int64_t bytes, void* stream, int* error);

 private:
  char* host_ = nullptr;
  char* device_ = nullptr;
  int64_t bytes_ = 0;
  int64_t used_ = 0;
};

template <typename T>
int64_t StagedBytesOf(absl::Span<const T> values) {
  return Staging::RoomOf(static_cast<int64_t>(values.size() * sizeof(T)));
}

// Fills device memory from a source that produces it piece by piece: one piece is made on the host
// while the one before is copied.
class Loader {
 public:
  static constexpr int64_t kPieceBytes = int64_t{8} << 20;

  // `fill(begin, count, to)` writes units begin .. begin + count - 1, of unit_bytes each; a unit is
  // at most kPieceBytes.
  absl::Status Load(void* device, int64_t num_units, int64_t unit_bytes,
                    const std::function<void(int64_t begin, int64_t count, char* to)>& fill,
                    void* stream);

 private:
  absl::Status Prepare();

  PinnedMemory pieces_[2];
  Event events_[2];
  bool pending_[2] = {};
};

Element ElementOf(DType dtype);
int64_t BytesOf(Element element);
// Element `index` of `from` as a float, and back; `from` need not be aligned.
float ReadHost(const void* from, Element element, int64_t index);
// `count` elements to another kind, with rounding to nearest even; kE4m3: divided by `scale` first.
void ConvertHost(const void* from, Element from_element, int64_t count, Element to_element,
                 float scale, void* to);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_DEVICE_H_
