// The DCT of 16-bit rows of up to 128 elements as a product with its matrix, which lies in shared
// memory in two 16-bit parts: no worse than a sum in float, and at these lengths the matrix units
// are done before memory is.
#pragma once

#include "cuda/dct_rows.h"
#include "cuda/fused_pieces.h"

namespace dijiang::cuda {

template <int kWidth>
constexpr int kDctProductBytes = 2 * kWidth* kWidth * 2 + kPieceBytes<kWidth>;

template <int kWidth>
constexpr int kDctProductBlocks = kWidth <= 64 ? 4 : 2;  // on a multiprocessor

// The high parts of the matrix to `raw`, [element of out][element of x], and the low ones behind
// them, by a block. A thread has one element of x and goes from one of out to the next: turns add
// up. The warps' rows are not there yet: their place has a table of cosines.
template <class T, int kType, int kWidth>
__device__ __forceinline__ void store_dct_matrix(int n, char* raw) {
  static_assert(kWalkThreads % kWidth == 0 && kPieceBytes<kWidth> >= 4 * kWidth * 4);
  constexpr int kStep = kWalkThreads / kWidth;
  auto* high = reinterpret_cast<T*>(raw);
  T* low = high + kWidth * kWidth;
  auto* cosines = reinterpret_cast<float*>(low + kWidth * kWidth);
  const int circle = 4 * n, from = threadIdx.x % kWidth, first = threadIdx.x / kWidth;
  const float scale = sqrtf(2.0f / n);
  for (int t = threadIdx.x; t < circle; t += kWalkThreads) {
    cosines[t] = scale * cospif(static_cast<float>(t) / (2 * n));
  }
  __syncthreads();
  int angle = (kType == 2 ? (2 * from + 1) * first : (2 * first + 1) * from) % circle;
  const int more = (kType == 2 ? 2 * from + 1 : 2 * from) * kStep % circle;
  for (int to = first; to < kWidth; to += kStep) {
    float x = from < n && to < n ? cosines[angle] : 0.0f;
    if ((kType == 2 ? to : from) == 0) x *= 0.70710678118654752f;
    const T part = from_float<T>(x);
    high[tile_offset<kWidth>(to, from)] = part;
    low[tile_offset<kWidth>(to, from)] = from_float<T>(x - to_float(part));
    angle += more;
    if (angle >= circle) angle -= circle;
  }
}

// Grid: pieces of rows. kWidth: of the tiles, n or more.
template <class T, int kType, int kWidth>
__global__ void __launch_bounds__(kWalkThreads, kDctProductBlocks<kWidth>) dct_products(DctRows p) {
  DIJIANG_DYNAMIC_SHARED(raw);
  store_dct_matrix<T, kType, kWidth>(p.n, raw);
  __syncthreads();
  const int64_t sequences = p.rows / p.seqlen;
  const PieceWalk<T, kWidth> walk(raw + 2 * kWidth * kWidth * 2, p.seqlen, p.x.stride_seq,
                                  sequences * ((p.seqlen + kPieceRows - 1) / kPieceRows), p.n);
  const auto* high = reinterpret_cast<const T*>(raw);
  const T* low = high + kWidth * kWidth;
  walk.run([&](int64_t sequence) { return static_cast<const T*>(p.x.data) + p.begin(sequence); },
           [&](const Piece& rows, const auto& x) {
             float y[kWidth / 8][4];
             clear(y);
             DIJIANG_UNROLL()
             for (int k = 0; k < kWidth; k += 16) {
               DIJIANG_UNROLL()
               for (int i = 0; i < kWidth; i += 16) {
                 unsigned b[4];
                 load_right<kWidth>(b, low, i, k);
                 multiply_add_16<T>(y[i / 8], y[i / 8 + 1], x[k / 16], b);
                 load_right<kWidth>(b, high, i, k);
                 multiply_add_16<T>(y[i / 8], y[i / 8 + 1], x[k / 16], b);
               }
             }
             const int row = threadIdx.x % 32 / 4;
             T* out = static_cast<T*>(p.out) + (rows.sequence * p.seqlen + rows.first + row) * p.n;
             DIJIANG_UNROLL()
             for (int half = 0; half < 2; ++half) {
               float line[kWidth / 8][2];
               DIJIANG_UNROLL()
               for (int t = 0; t < kWidth / 8; ++t) {
                 line[t][0] = y[t][2 * half];
                 line[t][1] = y[t][2 * half + 1];
               }
               store_row(out + int64_t{8} * half * p.n, line,
                         row + 8 * half < rows.count ? p.n : 0);
             }
           });
}

}  // namespace dijiang::cuda
