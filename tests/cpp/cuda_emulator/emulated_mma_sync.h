// csrc/cuda/mma_sync.h on the CPU: the same functions as warp collectives, with the layouts of the
// PTX manual. A copy arrives only when its thread waits for it, as late as the hardware may be; 8
// rows of a matrix that share banks of shared memory are counted.
#pragma once

#include "emulator.h"

namespace cuda_emulator {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};
struct Copies {
  uint64_t block = 0;  // that issued them: what it did not wait for is lost with it
  std::vector<Copy> pending;
};
inline Copies& copies() {
  static std::vector<Copies> all(1024);
  Copies& mine = all[threadIdx.x];
  if (mine.block != settings().blocks) {
    mine.block = settings().blocks;
    mine.pending.clear();
  }
  return mine;
}

inline void load_matrices(unsigned (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "cuda emulator: a row of a matrix is not 16-byte aligned\n");
    std::abort();
  }
  const int buffer = warp_exchange(~0u, reinterpret_cast<uint64_t>(row));
  const Fiber& fiber = *block().current;
  const uint64_t* rows = fiber.warp->slots[buffer];
  const int g = fiber.lane / 4, j = fiber.lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int y, int x) {
      uint16_t bits;
      std::memcpy(&bits, reinterpret_cast<const char*>(rows[8 * i + y]) + 2 * x, 2);
      return unsigned{bits};
    };
    r[i] = transposed ? element(2 * j, g) | element(2 * j + 1, g) << 16
                      : element(g, 2 * j) | element(g, 2 * j + 1) << 16;
    if (fiber.lane != 0) continue;
    unsigned banks = 0;
    for (int y = 0; y < 8; ++y) banks |= 1u << (rows[8 * i + y] / 16 % 8);
    settings().bank_conflicts += banks != 0xFF;
  }
}

inline float half_of(unsigned bits, int which, __nv_bfloat16) {
  return __bfloat162float(__nv_bfloat16{uint16_t(bits >> 16 * which)});
}
inline float half_of(unsigned bits, int which, __half) {
  return __half2float(__half{uint16_t(bits >> 16 * which)});
}

inline void arrive(const Copy& c) {
  if (c.inside) {
    std::memcpy(c.to, c.from, 16);
  } else {
    std::memset(c.to, 0, 16);
  }
}

}  // namespace cuda_emulator

namespace dijiang::cuda {

inline void copy_async(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      (inside && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    std::fprintf(stderr, "cuda emulator: an asynchronous copy is not 16-byte aligned\n");
    std::abort();
  }
  const cuda_emulator::Copy copy{to, from, inside};
  if (cuda_emulator::copies_arrive_at_once()) {
    cuda_emulator::arrive(copy);
  } else {
    cuda_emulator::copies().pending.push_back(copy);
  }
}
inline void wait_copies() {
  for (const cuda_emulator::Copy& c : cuda_emulator::copies().pending) cuda_emulator::arrive(c);
  cuda_emulator::copies().pending.clear();
}

inline void store_8(void* to, unsigned first, unsigned second, bool inside) {
  if (!inside) return;
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) {
    std::fprintf(stderr, "cuda emulator: a store of 8 bytes is not aligned\n");
    std::abort();
  }
  const unsigned both[2] = {first, second};
  std::memcpy(to, both, 8);
}

inline void load_matrices(unsigned (&r)[4], const void* row) {
  cuda_emulator::load_matrices(r, row, false);
}
inline void load_transposed(unsigned (&r)[4], const void* row) {
  cuda_emulator::load_matrices(r, row, true);
}

template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  cuda_emulator::Fiber& fiber = *cuda_emulator::block().current;
  cuda_emulator::Warp& warp = *fiber.warp;
  const int next = warp.generation & 1;
  for (int e = 0; e < 8; ++e) {
    warp.tiles[next][0][fiber.lane][e] = cuda_emulator::half_of(a[e / 2], e % 2, T{});
  }
  for (int e = 0; e < 4; ++e) {
    warp.tiles[next][1][fiber.lane][e] = cuda_emulator::half_of(e < 2 ? b0 : b1, e % 2, T{});
  }
  const auto& tiles = warp.tiles[cuda_emulator::warp_exchange(~0u, 0)];
  const int g = fiber.lane / 4, j = fiber.lane % 4;
  for (int e = 0; e < 4; ++e) {
    const int half = e / 2, column = 2 * j + e % 2;
    float sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;  // the j of the lanes that hold it
      sum += tiles[0][4 * g + pair][(2 * (k / 8) + half) * 2 + k % 2] *
             tiles[1][4 * column + pair][k / 8 * 2 + k % 2];
    }
    c[e] = sum;
  }
}

template <class T>
unsigned pack(float first, float second) {
  return from_float<T>(first).bits | unsigned(from_float<T>(second).bits) << 16;
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float fast_log2(float x) { return std::log2(x); }
inline float multiply_flushed(float x, float y) {
  const float z = x * y;
  return std::fabs(z) < 1.17549435e-38f ? 0.0f : z;
}

}  // namespace dijiang::cuda
