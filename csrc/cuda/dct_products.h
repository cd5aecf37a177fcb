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

// Grid: pieces of rows. kWidth: of the tiles, n or more.
template <class T, int kType, int kWidth>
__global__ void __launch_bounds__(kWalkThreads, kDctProductBlocks<kWidth>) dct_products(DctRows p) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* high = reinterpret_cast<T*>(raw);
  T* low = high + kWidth * kWidth;
  for (int e = threadIdx.x; e < kWidth * kWidth; e += kWalkThreads) {
    const int to = e / kWidth, from = e % kWidth;
    const bool inside = to < p.n && from < p.n;
    const float x = inside ? dct_element<kType>(p.n, from, to) : 0.0f;
    const T part = from_float<T>(x);
    high[tile_offset<kWidth>(to, from)] = part;
    low[tile_offset<kWidth>(to, from)] = from_float<T>(x - to_float(part));
  }
  __syncthreads();
  const int64_t sequences = p.rows / p.seqlen;
  const PieceWalk<T, kWidth> walk(raw + 2 * kWidth * kWidth * 2, p.seqlen, p.x.stride_seq,
                                  sequences * ((p.seqlen + kPieceRows - 1) / kPieceRows), p.n);
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
