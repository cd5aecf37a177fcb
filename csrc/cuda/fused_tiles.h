// Tiles of the fused kernels: 16-bit rows in shared memory, and a warp's fragments of them.
//
// A row is 128 or 256 bytes, so that rows a multiple of 8 apart begin at the same bank. Its pieces
// of 16 bytes lie at their number XOR row % 8: the 8 rows that ldmatrix reads at a time, or the 8
// rows that a fragment writes its registers to, then touch every bank once. No padding: a copy
// of 16 bytes stays one piece, and two blocks fit on a multiprocessor.
#pragma once

#include "cuda/mma_sync.h"

namespace dijiang::cuda {

constexpr int kTileRows = 64;  // tokens
constexpr int kWalkWarps = 4;  // of 16 tokens each
constexpr int kWalkThreads = 32 * kWalkWarps;

template <int kWidth>
__device__ inline int tile_offset(int row, int column) {
  return row * kWidth + (column ^ (row % 8 * 8));
}

// Of a tile stored [row][depth] as the left operand: rows [row, row + 16), depth [k, k + 16).
template <int kWidth, class T>
__device__ inline void load_left(unsigned (&a)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, tile + tile_offset<kWidth>(row + lane % 16, k + lane / 16 * 8));
}
// Stored [depth][row].
template <int kWidth, class T>
__device__ inline void load_left_transposed(unsigned (&a)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_transposed(a,
                  tile + tile_offset<kWidth>(k + lane % 8 + lane / 16 * 8, row + lane / 8 % 2 * 8));
}
// The right operand, columns [column, column + 16): b[0], b[1] of the first 8, then of the others.
// Stored [column][depth].
template <int kWidth, class T>
__device__ inline void load_right(unsigned (&b)[4], const T* tile, int column, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(
      b, tile + tile_offset<kWidth>(column + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
}
// Stored [depth][column].
template <int kWidth, class T>
__device__ inline void load_right_transposed(unsigned (&b)[4], const T* tile, int column, int k) {
  const int lane = threadIdx.x % 32;
  load_transposed(b, tile + tile_offset<kWidth>(k + lane % 16, column + lane / 16 * 8));
}

// Copies the warp's rows [row0, row0 + 16) of a tile: row row0 + r begins where lane first_lane + r
// says. Rows from `size` on and columns from `width` on: zeros.
template <int kWidth, class T>
__device__ __forceinline__ void copy_warp_rows(T* tile, const T* from, int first_lane, int row0,
                                               int size, int width) {
  constexpr int kPieces = kWidth / 8, kStep = 32 / kPieces;
  const int lane = threadIdx.x % 32, column = lane % kPieces * 8;
  if (column >= width) size = 0;
  DIJIANG_UNROLL()
  for (int i = 0; i < 16; i += kStep) {
    const int r = i + lane / kPieces;
    const auto address = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(from));
    const auto* row = reinterpret_cast<const T*>(
        static_cast<uintptr_t>(__shfl_sync(~0u, address, first_lane + r)));
    copy_async(tile + tile_offset<kWidth>(row0 + r, column), row + column, row0 + r < size);
  }
}

// Whole pieces of 16 bytes, by all threads of a block.
__device__ __forceinline__ void copy_block(void* to, const void* from, int bytes) {
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kWalkThreads) {
    copy_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, true);
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&c)[kTiles][4]) {
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 4; ++e) c[t][e] = 0.0f;
  }
}

// The lane's two rows.
template <int kTiles>
__device__ __forceinline__ void add_to_rows(float (&c)[kTiles][4], const float (&x)[2]) {
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 4; ++e) c[t][e] += x[e / 2];
  }
}

// c0 (columns 0-7), c1 (8-15) += a b
template <class T>
__device__ inline void multiply_add_16(float (&c0)[4], float (&c1)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[4]) {
  multiply_add<T>(c0, a, b[0], b[1]);
  multiply_add<T>(c1, a, b[2], b[3]);
}

// Computed operands are bfloat16 whatever the inputs are: its exponents reach as far as those of
// float, so that another scale shows in no bit. With kParts = 2 (float16 inputs, which are worth
// more bits) they are sums of two.
template <int kParts>
struct Split {
  unsigned part[kParts];
  __device__ Split(float first, float second) {
    part[0] = pack<__nv_bfloat16>(first, second);
    if constexpr (kParts == 2) {
      const Pair<__nv_bfloat16> high = unpack<__nv_bfloat16>(part[0]);
      part[1] = pack<__nv_bfloat16>(first - high.first, second - high.second);
    }
  }
};

// What products with the parts will see.
template <int kParts>
__device__ inline Pair<float> joined(const unsigned (&part)[kParts]) {
  const Pair<__nv_bfloat16> high = unpack<__nv_bfloat16>(part[0]);
  if constexpr (kParts == 1) {
    return {high.first, high.second};
  } else {
    const Pair<__nv_bfloat16> low = unpack<__nv_bfloat16>(part[1]);
    return {high.first + low.first, high.second + low.second};
  }
}

// Products of operands of kParts parts each, but for that of the two lower ones.
template <int kParts>
__device__ inline void multiply_parts_16(float (&c0)[4], float (&c1)[4],
                                         const unsigned (&a)[kParts][4],
                                         const unsigned (&b)[kParts][4]) {
  if constexpr (kParts == 2) {
    multiply_add_16<__nv_bfloat16>(c0, c1, a[1], b[0]);
    multiply_add_16<__nv_bfloat16>(c0, c1, a[0], b[1]);
  }
  multiply_add_16<__nv_bfloat16>(c0, c1, a[0], b[0]);
}

// The whole number nearest to x. Additions, because rintf takes the slow pipe of exp2.
__device__ inline float round_whole(float x) {
  const float big = copysignf(8388608.0f, x);
  return fabsf(x) < 8388608.0f ? __fadd_rn(__fadd_rn(x, big), -big) : x;
}

constexpr float kWholes = 12582912.0f;  // 1.5 2^23: a whole number added stands in the lowest bits
// 2^e of e + kWholes, e in [-127, 127]; of -127 it is 0.
__device__ inline float power_of_wholes(float e) {
  return __int_as_float(static_cast<int>(static_cast<unsigned>(__float_as_int(e)) << 23) +
                        0x3F800000);
}

// 2^(x + shift) for a whole shift, as exp2_scaled, of exponents that do not exceed kMost - 1 (but
// by the rounding of exponents beyond 2^24).
template <int kMost = 1>
__device__ inline float exp2_below(float x, float shift) {
  static_assert(kMost <= 126);
  const float whole = round_whole(x), e = whole + shift;
  const float power = power_of_wholes(__fadd_rn(fminf(fmaxf(e, -127.0f), float(kMost)), kWholes));
  const float y = multiply_flushed(fast_exp2(x - whole), power);  // a NaN stays one
  return e < -127.0f ? 0.0f : y;
}

// The same bits where shifts are of moderate size (twice kModerate), with fewer instructions: what
// lies below -2^22 is 0, and nothing lies above.
constexpr float kModerate = 1048576.0f;
template <int kMost = 1, bool kBounded = true>
__device__ inline float exp2_moderate(float x, float shift) {
  const float whole = __fadd_rn(fmaxf(x, -4194304.0f), kWholes);
  float e = fmaxf(__fadd_rn(whole, shift), kWholes - 127.0f);
  if (!kBounded) e = fminf(e, kWholes + float(kMost));
  return multiply_flushed(fast_exp2(x - __fadd_rn(whole, -kWholes)), power_of_wholes(e));
}

// x[t][e] becomes 2^(x + shift(t, e)), in either way; t and e may be no constants: no index of what
// lies in registers. kBounded: exponents are known not to exceed kMost. kEmpties: a shift of
// -kEmpty is moderate, too, as it stands beside exponents of kEmpty or less.
template <int kMost, bool kBounded, bool kEmpties, int kTiles, class Shift>
__device__ __forceinline__ void exp2_tiles(float (&x)[kTiles][4], bool moderate,
                                           const Shift& shift) {
  if (moderate) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kTiles; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const float by = kEmpties ? fminf(shift(t, e), 4194304.0f) : shift(t, e);
        x[t][e] = exp2_moderate<kMost, kBounded>(x[t][e], by);
      }
    }
    return;
  }
  // Rare: a loop of few instructions, for which the numbers go through memory.
  float y[4 * kTiles];
  DIJIANG_UNROLL()
  for (int i = 0; i < 4 * kTiles; ++i) y[i] = x[i / 4][i % 4];
  DIJIANG_UNROLL(1)
  for (int i = 0; i < 4 * kTiles; ++i) y[i] = exp2_below<kMost>(y[i], shift(i / 4, i % 4));
  DIJIANG_UNROLL()
  for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][i % 4] = y[i];
}

// Whether all of so many scales are moderate, or empty; by a warp.
__device__ __forceinline__ bool all_moderate(const float* scales, int count) {
  bool all = true;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    all = all && (fabsf(scales[i]) <= kModerate || scales[i] == kEmpty);
  }
  return __all_sync(~0u, all);
}

// Exponents of rows that are not kept, of the lane's two: -infinity.
template <int kTiles>
__device__ __forceinline__ void leave_out(float (&x)[kTiles][4], const bool (&kept)[2]) {
  if (__all_sync(~0u, kept[0] && kept[1])) return;
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 4; ++e) x[t][e] = kept[e / 2] ? x[t][e] : -INFINITY;
  }
}

// Register t of lane j of a quad goes to register j of lane t.
__device__ inline void transpose_quad(unsigned (&r)[4]) {
  const int j = threadIdx.x % 4;
  DIJIANG_UNROLL()
  for (int step = 1; step <= 2; step *= 2) {
    DIJIANG_UNROLL()
    for (int t = 0; t < 4; ++t) {
      if (t & step) continue;
      const bool upper = j & step;
      const unsigned got = __shfl_xor_sync(~0u, upper ? r[t] : r[t + step], step);
      if (upper) {
        r[t] = got;
      } else {
        r[t + step] = got;
      }
    }
  }
}

// A row of fragments, one of a lane's two, to memory: `width` columns at most, 8 bytes a lane and
// two tiles, so that a quad fills whole sectors.
template <class T, int kTiles>
__device__ __forceinline__ void store_row(T* to, const float (&x)[kTiles][2], int width) {
  const int j = threadIdx.x % 4, column = j % 2 * 8 + j / 2 * 4;
  const bool odd = j % 2 != 0;
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; t += 2) {
    const unsigned first = pack<T>(x[t][0], x[t][1]), second = pack<T>(x[t + 1][0], x[t + 1][1]);
    const unsigned got = __shfl_xor_sync(~0u, odd ? first : second, 1);
    store_8(to + 8 * t + column, odd ? got : first, odd ? second : got, 8 * t + column < width);
  }
}

// Column maxima of a warp's rows: x[t][e] is of column 8 t + 2 (lane % 4) + e. Afterwards the
// first kTiles / 8 tiles stand for those from the number returned on.
template <int kTiles>
__device__ inline int max_over_rows(float (&x)[kTiles][2]) {
  const int lane = threadIdx.x % 32;
  int first = 0;
  DIJIANG_UNROLL()
  for (int level = 0; level < 3; ++level) {
    const int half = kTiles >> (level + 1), mask = 16 >> level;
    const bool upper = lane & mask;
    first += upper ? half : 0;
    DIJIANG_UNROLL()
    for (int t = 0; t < kTiles / 2; ++t) {
      if (t >= half) continue;
      DIJIANG_UNROLL()
      for (int e = 0; e < 2; ++e) {
        const float got = __shfl_xor_sync(~0u, upper ? x[t][e] : x[t + half][e], mask);
        x[t][e] = fmaxf(upper ? x[t + half][e] : x[t][e], got);
      }
    }
  }
  return first;
}

// Of the warp's rows: the largest number in each column.
template <int kTiles>
__device__ __forceinline__ void store_column_maxima(float* maxima, const float (&x)[kTiles][4]) {
  float most[kTiles][2];
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 2; ++e) most[t][e] = fmaxf(x[t][e], x[t][2 + e]);
  }
  const int tile = max_over_rows(most);
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles / 8; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 2; ++e) maxima[(tile + t) * 8 + 2 * (threadIdx.x % 4) + e] = most[t][e];
  }
}

// Of a column, over what all warps stored, kWidth numbers each.
template <int kWidth>
__device__ __forceinline__ float column_maximum(const float* maxima, int column) {
  float most = kEmpty;
  for (int w = 0; w < kWalkWarps; ++w) most = fmaxf(most, maxima[w * kWidth + column]);
  return most;
}

// Bit r: row r. A warp's ballots have row g at bit 4 g, row g + 8 at bit 4 g + 2.
__device__ __forceinline__ unsigned long long failed_rows(const unsigned* places) {
  unsigned long long all = 0;
  for (int w = 0; w < kWalkWarps; ++w) {
    const unsigned bits = places[w];
    if (bits == 0) continue;
    for (int g = 0; g < 8; ++g) {
      all |= static_cast<unsigned long long>(bits >> 4 * g & 1) << (16 * w + g);
      all |= static_cast<unsigned long long>(bits >> (4 * g + 2) & 1) << (16 * w + g + 8);
    }
  }
  return all;
}

}  // namespace dijiang::cuda
