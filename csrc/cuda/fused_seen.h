// Products of weights and rows of a tile of which a fragment's rows see only some: a weight that is
// not seen is 0, and what it meets must not show even when it is infinite or NaN.
#pragma once

#include "cuda/fused_tiles.h"

namespace dijiang::cuda {

// Of two numbers in a register, or of many by | of their tests: whether one is infinite or NaN.
template <class T>
__device__ inline unsigned test_finite(unsigned bits) {
  // The magnitude of what is not finite overflows into the sign.
  return (bits & 0x7FFF7FFFu) + (std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u);
}
__device__ inline bool not_finite(unsigned tests) { return (tests & 0x80008000u) != 0; }
__device__ inline bool not_finite(float x) { return !(fabsf(x) <= 3.4028235e38f); }

// Of rows [s, s + 16) of a tile, its first kColumns.
template <int kWidth, int kColumns, class T>
__device__ __forceinline__ bool any_not_finite(const T* tile, int s) {
  unsigned tests = 0;
  DIJIANG_UNROLL()
  for (int j = 0; j < kColumns; j += 16) {
    unsigned b[4];
    load_right_transposed<kWidth>(b, tile + s * kWidth, j, 0);
    DIJIANG_UNROLL()
    for (int r = 0; r < 4; ++r) tests |= test_finite<T>(b[r]);
  }
  return __any_sync(~0u, not_finite(tests));
}
template <class T>
__device__ __forceinline__ void keep_finite(unsigned (&b)[4]) {
  DIJIANG_UNROLL()
  for (int r = 0; r < 4; ++r) {
    const unsigned bad = test_finite<T>(b[r]) & 0x80008000u;
    b[r] &= ~((bad >> 15) * 0xFFFFu);
  }
}

// sum += w rows [s, s + 16) of a tile, of elements that are not finite, for the fragment's rows
// that see them: sees(half, i) of the lane's row `half` and row i of the tile.
template <int kWidth, int kColumns, class T, class Sees>
__device__ __forceinline__ void add_not_finite(float (&sum)[kColumns / 8][4],
                                               const unsigned (&w)[4], const T* tile, int s,
                                               Sees sees) {
  const int lane = threadIdx.x % 32;
  DIJIANG_UNROLL(1)
  for (int key = 0; key < 16; ++key) {
    const int source = lane / 4 * 4 + key % 8 / 2;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const unsigned pair = __shfl_sync(~0u, key < 8 ? w[half] : w[2 + half], source);
      const Pair<T> weights = unpack<T>(pair);
      const float weight = key % 2 == 0 ? weights.first : weights.second;
      if (!sees(half, s + key)) continue;
      DIJIANG_UNROLL()
      for (int n = 0; n < kColumns / 8; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          const float x = to_float(tile[tile_offset<kWidth>(s + key, 8 * n + 2 * (lane % 4) + e)]);
          if (not_finite(x)) sum[n][2 * half + e] += weight * x;
        }
      }
    }
  }
}

// sum += w rows [s, s + 16) of a tile, of kColumns from where `tile` begins, a multiple of 64;
// whole: all rows of the fragment see all of them.
template <int kWidth, int kColumns = kWidth, class T, class Sees>
__device__ __forceinline__ void add_seen(float (&sum)[kColumns / 8][4], const unsigned (&w)[4],
                                         const T* tile, int s, bool whole, Sees sees) {
  // 0 times infinity would show to rows that do not see it.
  const bool apart = !whole && any_not_finite<kWidth, kColumns>(tile, s);
  DIJIANG_UNROLL()
  for (int j = 0; j < kColumns; j += 16) {
    unsigned b[4];
    load_right_transposed<kWidth>(b, tile + s * kWidth, j, 0);
    if (apart) keep_finite<T>(b);
    multiply_add_16<T>(sum[j / 8], sum[j / 8 + 1], w, b);
  }
  if (apart) add_not_finite<kWidth, kColumns>(sum, w, tile, s, sees);
}

// The left operand that 16 columns of sums make.
template <class T>
__device__ __forceinline__ void pack_left(unsigned (&w)[4], const float (&x0)[4],
                                          const float (&x1)[4]) {
  w[0] = pack<T>(x0[0], x0[1]);
  w[1] = pack<T>(x0[2], x0[3]);
  w[2] = pack<T>(x1[0], x1[1]);
  w[3] = pack<T>(x1[2], x1[3]);
}

}  // namespace dijiang::cuda
