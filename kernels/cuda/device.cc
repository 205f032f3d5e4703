#include "kernels/cuda/device.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/math.h"

namespace cinnabar::cuda {

absl::StatusOr<DeviceMemory> TakeDeviceMemory(int64_t bytes) {
  void* memory = nullptr;
  CINNABAR_RETURN_IF_ERROR(StatusOfError(AllocateDevice(std::max<int64_t>(bytes, 256), &memory),
                                         absl::StrCat("take ", bytes, " bytes of device memory")));
  return DeviceMemory(memory);
}

absl::StatusOr<PinnedMemory> TakePinnedMemory(int64_t bytes) {
  void* memory = nullptr;
  CINNABAR_RETURN_IF_ERROR(StatusOfError(AllocatePinned(std::max<int64_t>(bytes, 256), &memory),
                                         absl::StrCat("take ", bytes, " bytes of pinned memory")));
  return PinnedMemory(memory);
}

void Staging::Reset(char* host, char* device, int64_t bytes) {
  host_ = host;
  device_ = device;
  bytes_ = bytes;
  used_ = 0;
}

void* Staging::Copy(const void* data, int64_t bytes, void* stream, int* error) {
  CINNABAR_CHECK(bytes <= bytes_left()) << bytes << " bytes staged, " << bytes_left() << " left";
  char* const host = host_ + used_;
  char* const device = device_ + used_;
  used_ += std::min(bytes_left(), RoomOf(bytes));
  std::memcpy(host, data, bytes);
  *error = CopyToDevice(device, host, bytes, stream);
  return *error == kSuccess ? device : nullptr;
}

absl::Status Loader::Prepare() {
  for (int i = 0; i < 2; ++i) {
    if (pieces_[i] == nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(pieces_[i], TakePinnedMemory(kPieceBytes));
    }
    if (events_[i] == nullptr) {
      void* event = nullptr;
      const int error = CreateEvent(/*timed=*/false, &event);
      events_[i].reset(event);
      CINNABAR_RETURN_IF_ERROR(StatusOfError(error, "make an event"));
    }
  }
  return absl::OkStatus();
}

absl::Status Loader::Load(void* device, int64_t num_units, int64_t unit_bytes,
                          const std::function<void(int64_t, int64_t, char*)>& fill, void* stream) {
  CINNABAR_CHECK(unit_bytes > 0 && unit_bytes <= kPieceBytes) << "a row of " << unit_bytes;
  CINNABAR_RETURN_IF_ERROR(Prepare());
  const int64_t units_per_piece = kPieceBytes / unit_bytes;
  int turn = 0;
  for (int64_t begin = 0; begin < num_units; begin += units_per_piece, turn ^= 1) {
    const int64_t count = std::min(units_per_piece, num_units - begin);
    if (pending_[turn]) {
      CINNABAR_RETURN_IF_ERROR(
          StatusOfError(SynchronizeEvent(events_[turn].get()), "wait for a copy"));
      pending_[turn] = false;
    }
    char* const piece = static_cast<char*>(pieces_[turn].get());
    fill(begin, count, piece);
    CINNABAR_RETURN_IF_ERROR(
        StatusOfError(CopyToDevice(static_cast<char*>(device) + begin * unit_bytes, piece,
                                   count * unit_bytes, stream),
                      "copy a weight to the device"));
    CINNABAR_RETURN_IF_ERROR(
        StatusOfError(RecordEvent(events_[turn].get(), stream), "mark a copy"));
    pending_[turn] = true;
  }
  return absl::OkStatus();
}

Element ElementOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return Element::kF32;
    case DType::kF16:
      return Element::kF16;
    case DType::kBf16:
      return Element::kBf16;
    case DType::kQ8_0:
      return Element::kQ8_0;
    case DType::kQ4_0:
      return Element::kQ4_0;
    case DType::kQ4_1:
      return Element::kQ4_1;
    case DType::kQ4_K:
      return Element::kQ4_K;
    case DType::kQ6_K:
      return Element::kQ6_K;
  }
  CINNABAR_CHECK(false) << "not a dtype: " << static_cast<int>(dtype);
  return Element::kF32;
}

int64_t BytesOf(Element element) {
  switch (element) {
    case Element::kF32:
      return 4;
    case Element::kF16:
    case Element::kBf16:
      return 2;
    case Element::kE4m3:
      return 1;
    case Element::kQ8_0:
    case Element::kQ4_0:
    case Element::kQ4_1:
    case Element::kQ4_K:
    case Element::kQ6_K:
      break;  // PackUnits()
  }
  CINNABAR_CHECK(false) << "not an element by itself";
  return 0;
}

float ReadHost(const void* from, Element element, int64_t index) {
  const char* const at = static_cast<const char*>(from) + index * BytesOf(element);
  if (element == Element::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  if (element == Element::kE4m3) return FromE4m3(static_cast<uint8_t>(*at));
  uint16_t half;
  std::memcpy(&half, at, sizeof(half));
  return element == Element::kBf16 ? FromBf16(half) : FromF16(half);
}

void ConvertHost(const void* from, Element from_element, int64_t count, Element to_element,
                 float scale, void* to) {
  if (from_element == to_element && to_element != Element::kE4m3) {
    std::memcpy(to, from, count * BytesOf(to_element));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float value = ReadHost(from, from_element, i);
    switch (to_element) {
      case Element::kF32:
        static_cast<float*>(to)[i] = value;
        break;
      case Element::kF16:
        static_cast<uint16_t*>(to)[i] = ToF16(value);
        break;
      case Element::kBf16:
        static_cast<uint16_t*>(to)[i] = ToBf16(value);
        break;
      case Element::kE4m3:
        static_cast<uint8_t*>(to)[i] = ToE4m3(value / scale);
        break;
      case Element::kQ8_0:
      case Element::kQ4_0:
      case Element::kQ4_1:
      case Element::kQ4_K:
      case Element::kQ6_K:
        break;  // PackUnits()
    }
  }
}

}  // namespace cinnabar::cuda
