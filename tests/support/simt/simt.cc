#include "tests/support/simt/simt.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/support/simt/emulated.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cinnabar::simt {

Place place;

namespace {

constexpr size_t kStackBytes = 96 << 10;
constexpr int kWarp = 32;
constexpr int kWarpGroup = 128;
constexpr int64_t kSharedMax = 227 << 10;   // of a block, on sm_90
constexpr uint32_t kSharedBegin = 1024;     // what lies below is the system's
constexpr uint32_t kInFlight = 0x7FBADBAD;  // a NaN: what a sum holds while a wgmma may write it

[[noreturn]] void Abort(const char* what) {
  std::fprintf(stderr, "simt: %s, block (%d, %d, %d), thread %d\n", what, place.block.x,
               place.block.y, place.block.z, place.thread);
  std::abort();
}

// --- Switching stacks

#if defined(__x86_64__)
// Saves what a callee must keep on the old stack, leaves its top in *from, goes on with `to`.
extern "C" void CinnabarSimtSwitch(void** from, void* to);
asm(R"(
.text
.globl CinnabarSimtSwitch
.type CinnabarSimtSwitch, @function
CinnabarSimtSwitch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size CinnabarSimtSwitch, .-CinnabarSimtSwitch
)");
#endif

struct Group {
  // Copies of one cp.async group, not yet made.
  struct Copy {
    void* to;
    const void* from;
    int32_t bytes;
    int32_t zero_bytes;
  };
  std::vector<Copy> copies;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* top = nullptr;  // saved stack pointer
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  bool done = true;
  // Waits until *generation differs from `seen`; null: runs.
  const int64_t* generation = nullptr;
  int64_t seen = 0;
  std::vector<Group> groups;
  Group open;
  std::vector<int64_t> unfenced;  // 16-byte pieces of shared memory that its cp.async have written
  bool wgmma_fenced = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  void* operands[kWarp] = {};
  Execute execute = nullptr;
  int arrived = 0;
  int64_t generation = 0;
};

// One wgmma of a warp group, not yet made.
struct WgmmaOperation {
  uint64_t a;
  uint64_t b;
  bool accumulate;
  bool fp8;
};

struct WarpGroup {
  void* operands[kWarpGroup] = {};
  void (*execute)(WarpGroup& group) = nullptr;
  int arrived = 0;
  int64_t generation = 0;
  // The registers of the threads that are written, null: none; and what is in them meanwhile.
  float* registers[kWarpGroup] = {};
  int32_t count = 0;
  std::vector<float> sums;  // [kWarpGroup][count]
  std::vector<WgmmaOperation> open;
  std::vector<std::vector<WgmmaOperation>> groups;
};

struct Mbarrier {
  uint32_t arrivals = 0;
  uint32_t arrived = 0;
  int64_t bytes_left = 0;  // announced, and not yet named by a copy
  int64_t phase = 0;
  int64_t events = 0;
  std::vector<Group::Copy> copies;
};

struct Machine {
  Order order = Order::kForward;
  std::mt19937 random{1};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<WarpGroup> warp_groups;
  std::map<const uint64_t*, Mbarrier> mbarriers;
  std::vector<bool> unfenced;  // 16-byte pieces that the async proxy may not see yet
  int threads = 0;
  int alive = 0;
  int at_barrier = 0;
  int64_t barrier_generation = 0;
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;
#if !defined(__x86_64__)
  ucontext_t scheduler_context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};
Machine machine;

void ToScheduler(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, machine.scheduler_bottom,
                                 machine.scheduler_size);
#endif
#if defined(__x86_64__)
  CinnabarSimtSwitch(&fiber.top, machine.scheduler);
#else
  swapcontext(&fiber.context, &machine.scheduler_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.scheduler_bottom,
                                  &machine.scheduler_size);
#endif
}

void ToFiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake, fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  CinnabarSimtSwitch(&machine.scheduler, fiber.top);
#else
  swapcontext(&machine.scheduler_context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake, nullptr, nullptr);
#endif
}

void FiberMain() {
  Fiber& fiber = machine.fibers[place.thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  (*machine.body)();
  fiber.done = true;
  --machine.alive;
  ToScheduler(fiber);
  Abort("a thread came back after its end");
}

void Prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
  fiber.done = false;
  fiber.generation = nullptr;
  fiber.groups.clear();
  fiber.open.copies.clear();
  fiber.unfenced.clear();
  fiber.wgmma_fenced = false;
#if defined(__SANITIZE_ADDRESS__)
  fiber.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  // Six registers, the address to return to, and the alignment that a call leaves.
  auto end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<void**>(end - 16);
  slots[0] = reinterpret_cast<void*>(&FiberMain);
  slots[1] = nullptr;
  std::fill_n(slots - 6, 6, nullptr);
  fiber.top = slots - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &FiberMain, 0);
#endif
}

void WaitFor(const int64_t& generation) {
  Fiber& fiber = machine.fibers[place.thread];
  fiber.generation = &generation;
  fiber.seen = generation;
  ToScheduler(fiber);
}

std::vector<int> OrderOf(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (machine.order == Order::kShuffled) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  return order;
}

void RunBlock(const std::vector<int>& order) {
  machine.alive = machine.threads;
  machine.at_barrier = 0;
  for (Warp& warp : machine.warps) warp = Warp();
  for (WarpGroup& group : machine.warp_groups) group = WarpGroup();
  machine.mbarriers.clear();
  machine.unfenced.assign(place.shared_bytes / 16 + 1, false);
  for (int thread = 0; thread < machine.threads; ++thread) Prepare(machine.fibers[thread]);
  while (machine.alive > 0) {
    bool moved = false;
    for (const int thread : order) {
      Fiber& fiber = machine.fibers[thread];
      if (fiber.done) continue;
      if (fiber.generation != nullptr && *fiber.generation == fiber.seen) continue;
      fiber.generation = nullptr;
      place.thread = thread;
      ToFiber(fiber);
      moved = true;
    }
    if (!moved) Abort("every thread waits: a barrier or a warp function that not all reach");
  }
  for (int thread = 0; thread < machine.threads; ++thread) {
    if (!machine.fibers[thread].open.copies.empty() || !machine.fibers[thread].groups.empty()) {
      Abort("a thread ended with copies that nobody waited for");
    }
  }
  for (const auto& [at, barrier] : machine.mbarriers) {
    if (!barrier.copies.empty()) Abort("a block ended with bulk copies that nobody waited for");
  }
  for (const WarpGroup& group : machine.warp_groups) {
    if (group.count > 0) Abort("a block ended with wgmma that nobody waited for");
  }
}

float Bf16(uint32_t pair, int half) {
  const uint32_t bits = half == 0 ? pair << 16 : pair & 0xFFFF0000U;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float E4m3(uint32_t four, int byte) {
  const uint32_t bits = four >> (8 * byte) & 0xFFU;
  const int exponent = static_cast<int>(bits >> 3 & 15U);
  const float fraction = static_cast<float>(bits & 7U);
  float value =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(1.0F + fraction / 8.0F, exponent - 7);
  if ((bits & 0x7FU) == 0x7FU) value = NAN;
  return (bits & 0x80U) != 0 ? -value : value;
}

struct MmaOperands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// Lane l has group g = l / 4 and t = l % 4; a register holds 4 bytes of a row. A: registers 0 and 2
// row g, 1 and 3 row g + 8, 2 and 3 the second half of k. B: column g, register 1 the second half.
// C: rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
template <int kPerRegister, float (*kValue)(uint32_t, int)>
void ExecuteMma(void* const operands[32]) {
  constexpr int kDepth = 8 * kPerRegister;
  static float a[16][kDepth];
  static float b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPerRegister; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = half * kDepth / 2 + t * kPerRegister + i;
        a[g][k] = kValue(mine.a[2 * half], i);
        a[g + 8][k] = kValue(mine.a[2 * half + 1], i);
        b[g][k] = kValue(mine.b[half], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const float* left = a[lane / 4 + 8 * (i / 2)];
      const float* right = b[2 * (lane % 4) + i % 2];
      float sum = mine.c[i];
      for (int k = 0; k < kDepth; ++k) sum += left[k] * right[k];
      mine.c[i] = sum;
    }
  }
}

struct MatrixOperands {
  uint32_t* out;
  const unsigned char* row;
};

template <bool kTransposed>
void ExecuteLoadMatrix(void* const operands[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<MatrixOperands*>(operands[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
        const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
        const auto& holder = *static_cast<MatrixOperands*>(operands[8 * matrix + row]);
        if (reinterpret_cast<uintptr_t>(holder.row) % 16 != 0) Abort("ldmatrix row not aligned");
        std::memcpy(&pair[i], holder.row + 2 * column, 2);
      }
      mine.out[matrix] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
    }
  }
}

// --- wgmma

// The last of the warp group to come runs `execute`.
void WarpGroupMeeting(void* operands, void (*execute)(WarpGroup& group)) {
  if (place.threads < place.thread / kWarpGroup * kWarpGroup + kWarpGroup) {
    Abort("wgmma by less than a warp group");
  }
  WarpGroup& group = machine.warp_groups[place.thread / kWarpGroup];
  if (group.arrived > 0 && group.execute != execute) {
    Abort("threads of a warp group meet in different functions");
  }
  group.execute = execute;
  group.operands[place.thread % kWarpGroup] = operands;
  if (++group.arrived == kWarpGroup) {
    execute(group);
    group.arrived = 0;
    ++group.generation;
    return;
  }
  WaitFor(group.generation);
}

// `bytes` of k of row `row` of a matrix that lies along k, swizzled over 128 bytes.
void ReadMatrix(uint64_t descriptor, int row, int bytes, unsigned char* to) {
  if (descriptor >> 62 != 1) Abort("wgmma operand without the 128-byte swizzle");
  if ((descriptor >> 49 & 7U) != 0) Abort("wgmma operand with a base offset");
  const auto start = static_cast<uint32_t>((descriptor & 0x3FFFU) << 4);
  const auto stride = static_cast<uint32_t>((descriptor >> 32 & 0x3FFFU) << 4);
  for (int byte = 0; byte < bytes; byte += 16) {
    uint32_t at = start + row / 8 * stride + row % 8 * 128 + byte;
    at ^= (at >> 7 & 7U) << 4;  // bits 4 to 6 of the address by bits 7 to 9
    at -= kSharedBegin;
    if (at + 16 > place.shared_bytes) Abort("wgmma operand outside of shared memory");
    if (machine.unfenced[at / 16]) Abort("wgmma operand that no proxy fence has passed");
    std::memcpy(to + byte, place.shared + at, 16);
  }
}

template <int kPerRegister, float (*kValue)(uint32_t, int)>
void ReadValues(uint64_t descriptor, int rows, float (*values)[256]) {
  for (int row = 0; row < rows; ++row) {
    uint32_t words[8];
    ReadMatrix(descriptor, row, 32, reinterpret_cast<unsigned char*>(words));
    for (int k = 0; k < 8 * kPerRegister; ++k) {
      values[k][row] = kValue(words[k / kPerRegister], k % kPerRegister);
    }
  }
}

void Compute(WarpGroup& group, const WgmmaOperation& operation) {
  static float a[32][256];  // [k][row]
  static float b[32][256];  // [k][column]
  static float row_sums[256];
  const int columns = 2 * group.count;
  const int depth = operation.fp8 ? 32 : 16;
  if (operation.fp8) {
    ReadValues<4, E4m3>(operation.a, 64, a);
    ReadValues<4, E4m3>(operation.b, columns, b);
  } else {
    ReadValues<2, Bf16>(operation.a, 64, a);
    ReadValues<2, Bf16>(operation.b, columns, b);
  }
  for (int row = 0; row < 64; ++row) {
    // Row r: threads 32 (r / 16) + 4 (r % 8) .. + 3, registers 4 j + 2 (r / 8 % 2) and the next.
    const auto sum = [&](int column) -> float& {
      const int thread = 32 * (row / 16) + 4 * (row % 8) + column % 8 / 2;
      return group.sums[thread * group.count + column / 8 * 4 + row / 8 % 2 * 2 + column % 2];
    };
    for (int column = 0; column < columns; ++column) {
      row_sums[column] = operation.accumulate ? sum(column) : 0.0F;
    }
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < columns; ++column) row_sums[column] += a[k][row] * b[k][column];
    }
    for (int column = 0; column < columns; ++column) {
      if (operation.fp8) {
        uint32_t bits;
        std::memcpy(&bits, &row_sums[column], 4);
        bits &= ~0x3FFU;
        std::memcpy(&row_sums[column], &bits, 4);
      }
      sum(column) = row_sums[column];
    }
  }
}

struct WgmmaOperands {
  float* d;
  int32_t count;
  WgmmaOperation operation;
  bool fenced;
};

void Issue(WarpGroup& group) {
  const auto& first = *static_cast<WgmmaOperands*>(group.operands[0]);
  const bool begins = group.count == 0;
  if (!begins && group.count != first.count) Abort("wgmma of two shapes at a time");
  group.count = first.count;
  if (begins) group.sums.assign(static_cast<size_t>(kWarpGroup) * first.count, 0.0F);
  for (int thread = 0; thread < kWarpGroup; ++thread) {
    const auto& mine = *static_cast<WgmmaOperands*>(group.operands[thread]);
    if (mine.operation.a != first.operation.a || mine.operation.b != first.operation.b ||
        mine.operation.accumulate != first.operation.accumulate) {
      Abort("wgmma operands differ in a warp group");
    }
    if (begins && !mine.fenced) Abort("wgmma without wgmma.fence");
    if (!begins && group.registers[thread] != mine.d) Abort("wgmma on two sets of sums at a time");
    if (!begins) continue;
    group.registers[thread] = mine.d;
    std::memcpy(&group.sums[thread * first.count], mine.d, first.count * sizeof(float));
    for (int i = 0; i < first.count; ++i) std::memcpy(mine.d + i, &kInFlight, 4);
  }
  group.open.push_back(first.operation);
}

void Wait(WarpGroup& group) {
  const auto left = static_cast<size_t>(*static_cast<int32_t*>(group.operands[0]));
  while (group.groups.size() > left) {
    for (const WgmmaOperation& operation : group.groups.front()) Compute(group, operation);
    group.groups.erase(group.groups.begin());
  }
  if (!group.groups.empty() || !group.open.empty() || group.count == 0) return;
  for (int thread = 0; thread < kWarpGroup; ++thread) {
    float* registers = group.registers[thread];
    for (int i = 0; i < group.count; ++i) {
      if (std::memcmp(registers + i, &kInFlight, 4) != 0) Abort("sums touched during a wgmma");
    }
    std::memcpy(registers, &group.sums[thread * group.count], group.count * sizeof(float));
  }
  group.count = 0;
}

// --- mbarrier

Mbarrier& MbarrierAt(const uint64_t* barrier) {
  const auto found = machine.mbarriers.find(barrier);
  if (found == machine.mbarriers.end()) Abort("mbarrier without mbarrier.init");
  return found->second;
}

// Ends the phase where all have arrived and all that was announced is copied: at the latest moment,
// when somebody waits or the next phase begins.
bool CompletePhase(Mbarrier& barrier) {
  if (barrier.arrived < barrier.arrivals || barrier.bytes_left != 0) return false;
  for (const Group::Copy& copy : barrier.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  barrier.copies.clear();
  barrier.arrived = 0;
  ++barrier.phase;
  ++barrier.events;
  return true;
}

struct BallotOperands {
  bool vote;
  uint32_t result;
};

}  // namespace

void SetOrder(Order order) { machine.order = order; }

void RunGrid(Index grid, int32_t threads, int64_t shared_bytes, const std::function<void()>& body) {
  if (threads % kWarp != 0 || threads > 1024) Abort("not a number of threads");
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0 || grid.y > 65535 || grid.z > 65535) {
    Abort("not a grid");
  }
  if (machine.fibers.size() < static_cast<size_t>(threads)) machine.fibers.resize(threads);
  machine.warps.resize(threads / kWarp);
  machine.threads = threads;
  machine.body = &body;
  machine.warp_groups.resize(threads / kWarpGroup + 1);
  if (shared_bytes > kSharedMax) Abort("more shared memory than a block may have");
  std::vector<uint64_t> shared(shared_bytes / 8 + 130);
  auto base = reinterpret_cast<uintptr_t>(shared.data());
  place.shared = reinterpret_cast<unsigned char*>((base + 1023) & ~uintptr_t{1023});
  place.shared_bytes = shared_bytes;
  place.threads = threads;
  place.grid = grid;
  const std::vector<int> threads_order = OrderOf(threads);
  for (const int block : OrderOf(grid.x * grid.y * grid.z)) {
    place.block = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    std::memset(shared.data(), 0xFF, shared.size() * 8);
    RunBlock(threads_order);
    // Nothing may have written behind the end.
    for (const unsigned char* at = place.shared + shared_bytes;
         at < reinterpret_cast<unsigned char*>(shared.data() + shared.size()); ++at) {
      if (*at != 0xFF) Abort("shared memory written beyond its end");
    }
  }
}

void BlockBarrier() {
  ++machine.at_barrier;
  if (machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    ++machine.barrier_generation;
    return;
  }
  WaitFor(machine.barrier_generation);
}

void WarpMeeting(void* operands, Execute execute) {
  Warp& warp = machine.warps[place.thread / kWarp];
  if (warp.arrived > 0 && warp.execute != execute) Abort("lanes meet in different functions");
  warp.execute = execute;
  warp.operands[place.thread % kWarp] = operands;
  if (++warp.arrived == kWarp) {
    execute(warp.operands);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  WaitFor(warp.generation);
}

uint32_t Ballot(bool vote) {
  BallotOperands mine = {vote, 0};
  WarpMeeting(&mine, [](void* const operands[32]) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
      bits |= static_cast<uint32_t>(static_cast<BallotOperands*>(operands[i])->vote) << i;
    }
    for (int i = 0; i < 32; ++i) static_cast<BallotOperands*>(operands[i])->result = bits;
  });
  return mine.result;
}

void CopyAsync(void* to, const void* from, int32_t bytes, int32_t zero_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    Abort("cp.async not aligned to 16 bytes");
  }
  if (bytes < 0 || zero_bytes < 0) Abort("cp.async of a negative size");
  std::memset(to, 0xFF, bytes + zero_bytes);
  machine.fibers[place.thread].open.copies.push_back({to, from, bytes, zero_bytes});
}

void CopyCommit() {
  Fiber& fiber = machine.fibers[place.thread];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open = Group();
}

void CopyWait(int32_t groups_left) {
  Fiber& fiber = machine.fibers[place.thread];
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Group::Copy& copy : fiber.groups.front().copies) {
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zero_bytes);
      const int64_t piece = (static_cast<unsigned char*>(copy.to) - place.shared) / 16;
      machine.unfenced[piece] = true;
      fiber.unfenced.push_back(piece);
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

void MmaBf16(float* c, const uint32_t* a, const uint32_t* b) {
  MmaOperands mine = {c, a, b};
  WarpMeeting(&mine, &ExecuteMma<2, Bf16>);
}
void MmaE4m3(float* c, const uint32_t* a, const uint32_t* b) {
  MmaOperands mine = {c, a, b};
  WarpMeeting(&mine, &ExecuteMma<4, E4m3>);
}
void LoadMatrix4(uint32_t* out, const void* row) {
  MatrixOperands mine = {out, static_cast<const unsigned char*>(row)};
  WarpMeeting(&mine, &ExecuteLoadMatrix<false>);
}
void LoadMatrix4Transposed(uint32_t* out, const void* row) {
  MatrixOperands mine = {out, static_cast<const unsigned char*>(row)};
  WarpMeeting(&mine, &ExecuteLoadMatrix<true>);
}

uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - place.shared) +
         kSharedBegin;
}

void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  if (!machine.mbarriers.insert({barrier, {.arrivals = arrivals}}).second) {
    Abort("mbarrier.init of an mbarrier");
  }
}

void MbarrierArrive(uint64_t* at, uint32_t expected_bytes) {
  Mbarrier& barrier = MbarrierAt(at);
  if (barrier.arrived == barrier.arrivals && !CompletePhase(barrier)) {
    Abort("more arrivals at an mbarrier than it counts");
  }
  ++barrier.arrived;
  barrier.bytes_left += expected_bytes;
  ++barrier.events;
  if (barrier.copies.empty()) CompletePhase(barrier);
}

void MbarrierWait(uint64_t* at, uint32_t parity) {
  Mbarrier& barrier = MbarrierAt(at);
  while ((barrier.phase & 1) == parity) {
    if (!CompletePhase(barrier)) WaitFor(barrier.events);
  }
}

void BulkCopy(void* shared, const void* global, uint32_t bytes, uint64_t* at) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    Abort("cp.async.bulk not aligned to 16 bytes");
  }
  Mbarrier& barrier = MbarrierAt(at);
  if (barrier.bytes_left < bytes) Abort("cp.async.bulk of bytes that were not announced");
  barrier.bytes_left -= bytes;
  barrier.copies.push_back({shared, global, static_cast<int32_t>(bytes), 0});
  std::memset(shared, 0xFF, bytes);
  ++barrier.events;
}

void AsyncProxyFence() {
  Fiber& fiber = machine.fibers[place.thread];
  for (const int64_t piece : fiber.unfenced) machine.unfenced[piece] = false;
  fiber.unfenced.clear();
}

void WgmmaFence() { machine.fibers[place.thread].wgmma_fenced = true; }

void Wgmma(float* d, int32_t count, uint64_t a, uint64_t b, bool accumulate, bool fp8) {
  WgmmaOperands mine = {
      d, count, {a, b, accumulate, fp8}, machine.fibers[place.thread].wgmma_fenced};
  WarpGroupMeeting(&mine, &Issue);
}

void WgmmaCommit() {
  WarpGroupMeeting(nullptr, [](WarpGroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

void WgmmaWait(int32_t groups_left) {
  WarpGroupMeeting(&groups_left, &Wait);
  if (groups_left == 0) machine.fibers[place.thread].wgmma_fenced = false;
}

}  // namespace cinnabar::simt
