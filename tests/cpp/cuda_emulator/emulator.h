// Runs CUDA kernels on the CPU, so that the sources under csrc/cuda can be tested where no GPU is.
//
// Put this folder first on the include path and compile a .cu as C++ (or #include it from a test):
// the headers here stand in for cuda_runtime.h, cuda_bf16.h, cuda_fp16.h and mma.h. Kernels are
// started with DIJIANG_LAUNCH (csrc/cuda/launch.h), which is <<<>>> under nvcc and launch() here.
//
// Each thread of a block is a fiber; the fibers of a block take turns on one OS thread and switch
// only at __syncthreads and at warp collectives. What is checked:
//   - shared memory is new for every block, of exactly the size asked for (AddressSanitizer sees
//     accesses outside; a guard behind it sees writes without) and full of NaN,
//   - threads of a block that wait at different barriers, or at one that others never reach,
//   - warp collectives that a lane of the mask never reaches,
//   - launches beyond the hardware's limits.
// Races between barriers show as results that change with the order in which threads run:
// set_schedule() runs the same kernel in ascending, descending (blocks, too) or shuffled order, or
// with one warp far ahead of the others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DIJIANG_CUDA_EMULATION 1
#define DIJIANG_UNROLL(times)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The built-in variables; the scheduler sets threadIdx whenever a fiber goes on.
inline uint3 threadIdx{};
inline uint3 blockIdx{};
inline dim3 blockDim{};
inline dim3 gridDim{};
constexpr int warpSize = 32;

namespace cuda_emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xA5;

// The last two: warp after warp, each as far as it comes without the others.
enum class Schedule { kAscending, kDescending, kShuffled, kFirstWarpFirst, kLastWarpFirst };

struct Settings {
  Schedule schedule = Schedule::kAscending;
  unsigned seed = 1;
  int64_t launches = 0;  // since the program began
  uint64_t blocks = 0;   // likewise
  int64_t bank_conflicts = 0;
  std::vector<std::string> kernels;  // launched, by name
};

inline Settings& settings() {
  static Settings instance;
  return instance;
}

inline void set_schedule(Schedule schedule, unsigned seed = 1) {
  settings().schedule = schedule;
  settings().seed = seed;
}
// Asynchronous copies arrive as late as they may, under these schedules as early.
inline bool copies_arrive_at_once() {
  const Schedule schedule = settings().schedule;
  return schedule == Schedule::kDescending || schedule == Schedule::kLastWarpFirst;
}

// What the lanes of a warp exchange. Two buffers: a lane may be writing to the next exchange
// while a slower one still reads the last.
struct Warp {
  unsigned lanes = 0;  // those that exist
  unsigned mask = 0;   // of the exchange under way
  unsigned arrived = 0;
  unsigned generation = 0;
  uint64_t slots[2][32];
  float tiles[2][2][32][32];  // [buffer][operand][lane][element]: matrix fragments
};

struct Fiber {
  enum class State { kReady, kBarrier, kWarp, kDone };
  State state = State::kReady;
  uint3 thread{};
  int lane = 0;
  Warp* warp = nullptr;
  unsigned generation = 0;  // of the warp exchange waited for
  const char* file = "";    // of the barrier waited at
  int line = 0;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  const std::function<void()>* body = nullptr;
  char* shared = nullptr;
  Fiber* current = nullptr;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  const void* scheduler_stack = nullptr;  // for AddressSanitizer
  size_t scheduler_stack_bytes = 0;
};

inline Block& block() {
  static Block instance;
  return instance;
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack and goes on with another one.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// From the running fiber to the scheduler.
inline void suspend(bool for_ever = false) {
  Block& b = block();
  Fiber& fiber = *b.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, b.scheduler_stack,
                                 b.scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&fiber.stack_pointer, b.scheduler);
#else
  swapcontext(&fiber.context, &b.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)for_ever;
}

inline void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
#endif
  (*b.body)();
  b.current->state = Fiber::State::kDone;
  suspend(true);
  std::abort();
}

// From the scheduler to a fiber, until it suspends itself.
inline void resume(Fiber& fiber) {
  Block& b = block();
  b.current = &fiber;
  threadIdx = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&b.scheduler, fiber.stack_pointer);
#else
  swapcontext(&b.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // marks of its last use
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + kStackBytes) & ~uintptr_t{63};
  auto* words = reinterpret_cast<uintptr_t*>(top) - 2;  // entered by ret: rsp = 8 (mod 16)
  *words = reinterpret_cast<uintptr_t>(&fiber_main);
  words -= 6;
  std::memset(words, 0, 6 * sizeof(uintptr_t));
  fiber.stack_pointer = words;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

// Stacks are kept between launches: there are at most 1024.
inline char* stack_of(size_t index) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= index) stacks.emplace_back(new char[kStackBytes]);
  return stacks[index].get();
}

inline void sync_block(const char* file, int line) {
  Fiber& fiber = *block().current;
  fiber.state = Fiber::State::kBarrier;
  fiber.file = file;
  fiber.line = line;
  suspend();
}

// Every lane of mask hands in a value and goes on once all have; returns the buffer number.
inline int warp_exchange(unsigned mask, uint64_t value) {
  Fiber& fiber = *block().current;
  Warp& warp = *fiber.warp;
  mask &= warp.lanes;
  if (warp.arrived == 0) warp.mask = mask;
  if (warp.mask != mask || !(mask >> fiber.lane & 1)) {
    std::fprintf(stderr, "cuda emulator: lanes of one warp collective name different masks\n");
    std::abort();
  }
  const unsigned generation = warp.generation;
  const int buffer = generation & 1;
  warp.slots[buffer][fiber.lane] = value;
  warp.arrived |= 1u << fiber.lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    fiber.state = Fiber::State::kWarp;
    fiber.generation = generation;
    suspend();
  }
  return buffer;
}

inline bool runnable(const Fiber& fiber) {
  return fiber.state == Fiber::State::kReady ||
         (fiber.state == Fiber::State::kWarp && fiber.warp->generation != fiber.generation);
}

// All fibers of one block, to the end.
inline void run_block() {
  Block& b = block();
  std::vector<Fiber*> order;
  for (Fiber& fiber : b.fibers) order.push_back(&fiber);
  const Schedule schedule = settings().schedule;
  if (schedule == Schedule::kDescending || schedule == Schedule::kLastWarpFirst) {
    std::reverse(order.begin(), order.end());
  }
  const bool by_warps =
      schedule == Schedule::kFirstWarpFirst || schedule == Schedule::kLastWarpFirst;
  const size_t together = by_warps ? 32 : order.size();
  std::mt19937 shuffle(settings().seed + blockIdx.x * 31 + blockIdx.y * 7 + blockIdx.z);
  size_t done = 0;
  while (done < order.size()) {
    if (schedule == Schedule::kShuffled) {
      std::shuffle(order.begin(), order.end(), shuffle);
    }
    for (size_t first = 0; first < order.size(); first += together) {
      const size_t end = std::min(first + together, order.size());
      bool progress = true;
      while (progress) {
        progress = false;
        for (size_t i = first; i < end; ++i) {
          Fiber& fiber = *order[i];
          if (!runnable(fiber)) continue;
          fiber.state = Fiber::State::kReady;
          resume(fiber);
          progress = true;
          if (fiber.state == Fiber::State::kDone) ++done;
        }
      }
    }
    if (done == order.size()) break;
    // Nobody can go on: either all stand at one barrier, or the kernel is wrong.
    const Fiber* first = nullptr;
    for (const Fiber* fiber : order) {
      const auto where = [](const Fiber& f) {
        const char* what = f.state == Fiber::State::kDone   ? "has returned"
                           : f.state == Fiber::State::kWarp ? "waits for its warp"
                                                            : "waits at a barrier";
        return "thread " + std::to_string(f.thread.x) + " " + what + " (" + f.file + ":" +
               std::to_string(f.line) + ")";
      };
      if (!first) first = fiber;
      const bool same = fiber->state == Fiber::State::kBarrier && fiber->line == first->line &&
                        std::strcmp(fiber->file, first->file) == 0;
      if (!same) {
        throw std::runtime_error("cuda emulator: the threads of block " +
                                 std::to_string(blockIdx.x) + " diverge: " + where(*first) +
                                 ", but " + where(*fiber));
      }
    }
    for (Fiber* fiber : order) fiber->state = Fiber::State::kReady;
  }
}

inline void launch(const char* name, dim3 grid, dim3 threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 ||
      grid.z > 65535 || count == 0 || count > 1024 || threads.z > 64 ||
      shared_bytes > size_t(device().shared_bytes)) {
    throw std::runtime_error("cuda emulator: launch beyond the limits of the hardware");
  }
  ++settings().launches;
  settings().kernels.emplace_back(name);
  Block& b = block();
  b.body = &body;
  gridDim = grid;
  const bool backwards = settings().schedule == Schedule::kDescending;
  blockDim = threads;
  b.fibers.assign(count, Fiber{});
  b.warps.assign((count + 31) / 32, Warp{});
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx =
            backwards ? uint3{grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z} : uint3{x, y, z};
        ++settings().blocks;
        // Allocated anew for each block, to the byte, so that AddressSanitizer knows its end.
        const size_t bytes = (shared_bytes + kGuardBytes + 127) / 128 * 128;
        const std::unique_ptr<char, decltype(&std::free)> owner(
            static_cast<char*>(std::aligned_alloc(128, bytes)), &std::free);
        char* shared = owner.get();
        std::memset(shared, 0xFF, shared_bytes);  // every float a NaN
        std::memset(shared + shared_bytes, kGuard, kGuardBytes);
        b.shared = shared;
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(shared + shared_bytes, kGuardBytes);
#endif
        for (size_t i = 0; i < count; ++i) {
          Fiber& fiber = b.fibers[i];
          fiber = Fiber{};
          fiber.thread = {unsigned(i % threads.x), unsigned(i / threads.x % threads.y),
                          unsigned(i / (size_t{threads.x} * threads.y))};
          fiber.lane = int(i % 32);
          fiber.warp = &b.warps[i / 32];
          if (fiber.lane == 0) {
            const size_t lanes = std::min<size_t>(32, count - i);
            fiber.warp->lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
            fiber.warp->arrived = 0;
          }
          fiber.stack = stack_of(i);
          prepare(fiber);
        }
        run_block();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(shared + shared_bytes, kGuardBytes);
#endif
        for (size_t i = 0; i < kGuardBytes; ++i) {
          if (static_cast<unsigned char>(shared[shared_bytes + i]) != kGuard) {
            throw std::runtime_error(
                "cuda emulator: a write behind the end of shared memory, in " +
                (settings().kernels.empty() ? std::string("?") : settings().kernels.back()));
          }
        }
      }
    }
  }
}

}  // namespace cuda_emulator

#define DIJIANG_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  do {                                                                   \
    (void)(stream);                                                      \
    cuda_emulator::launch(#kernel, (grid), (threads), (shared_bytes),    \
                          [&] { kernel(__VA_ARGS__); });                 \
  } while (0)

// The block's dynamic shared memory under the name given.
#define DIJIANG_DYNAMIC_SHARED(name) char* name = cuda_emulator::block().shared

#define __global__ __attribute__((unused))  // of a header that defines some for others
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ static  // static shared memory: shared by the fibers, but not poisoned
#define __syncthreads() cuda_emulator::sync_block(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = ~0u) { cuda_emulator::warp_exchange(mask, 0); }

namespace cuda_emulator {
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int buffer = warp_exchange(mask, bits);
  if (!inside) return value;
  T result;
  std::memcpy(&result, &block().current->warp->slots[buffer][source], sizeof(T));
  return result;
}
}  // namespace cuda_emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = cuda_emulator::block().current->lane / width * width;
  return cuda_emulator::shuffle(mask, value, base + source % width, true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuda_emulator::block().current->lane;
  const int source = lane ^ lane_mask;
  return cuda_emulator::shuffle(mask, value, source & 31, source / width == lane / width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulator::block().current->lane;
  const int source = lane + int(delta);
  return cuda_emulator::shuffle(mask, value, source & 31, source / width == lane / width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulator::block().current->lane;
  const int source = lane - int(delta);
  return cuda_emulator::shuffle(mask, value, source & 31,
                                source >= 0 && source / width == lane / width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int buffer = cuda_emulator::warp_exchange(mask, predicate != 0);
  const cuda_emulator::Warp& warp = *cuda_emulator::block().current->warp;
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask & warp.lanes) >> lane & 1) result |= unsigned(warp.slots[buffer][lane]) << lane;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Fibers switch only where they wait, so that a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
