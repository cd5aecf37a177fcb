// Many rows against a few vectors, by a thread block: products with them, and sums of the rows by
// weights. Memory is what counts here, so that a thread reads 16 bytes at a time and four rows at
// once, and rows meet all vectors while they are in registers.
//
// kWidth: elements of a piece; 16 bytes, or one element where rows are not whole pieces.
#pragma once

#include "cuda/tile_product.h"

namespace dijiang::cuda {

template <class T>
constexpr int kPieceWidth = 16 / static_cast<int>(sizeof(T));

constexpr int kPieceRows = 4;  // of a thread at once

template <int kWidth, class T>
__device__ inline void load_piece(float (&x)[kWidth], const T* from) {
  if constexpr (kWidth == 1) {
    x[0] = to_float(*from);
  } else {
    static_assert(kWidth == kPieceWidth<T>);
    struct __align__(16) Bits {
      T x[kWidth];
    };
    const Bits bits = *reinterpret_cast<const Bits*>(from);
    DIJIANG_UNROLL()
    for (int e = 0; e < kWidth; ++e) x[e] = to_float(bits.x[e]);
  }
}

// Lanes that share a row of so many pieces: a power of two, a warp at most.
__device__ inline int lanes_of(int pieces) {
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  return lanes;
}

// give(s, n, row s . vector n) for rows s < count and vectors n, which lie at x + n width; all of
// width elements. One lane a row calls it.
template <int kWidth, int kVectors, class RowOf, class Give>
__device__ inline void multiply_rows_by(const float* x, int width, int count, RowOf row_of,
                                        Give give) {
  const int pieces = width / kWidth, lanes = lanes_of(pieces), step = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, part = threadIdx.x / lanes;
  for (int first = 0; first < count; first += kPieceRows * step) {
    float sum[kPieceRows][kVectors] = {};
    for (int piece = lane; piece < pieces; piece += lanes) {
      float row[kPieceRows][kWidth];
      DIJIANG_UNROLL()
      for (int u = 0; u < kPieceRows; ++u) {
        const int s = first + u * step + part;
        load_piece(row[u], row_of(s < count ? s : 0) + piece * kWidth);
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < kVectors; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < kWidth; ++e) {
          const float y = x[n * width + piece * kWidth + e];
          DIJIANG_UNROLL()
          for (int u = 0; u < kPieceRows; ++u) sum[u][n] = fmaf(y, row[u][e], sum[u][n]);
        }
      }
    }
    DIJIANG_UNROLL()
    for (int u = 0; u < kPieceRows; ++u) {
      const int s = first + u * step + part;
      DIJIANG_UNROLL()
      for (int n = 0; n < kVectors; ++n) {
        for (int k = lanes / 2; k > 0; k /= 2) sum[u][n] += __shfl_xor_sync(~0u, sum[u][n], k);
        if (lane == 0 && s < count) give(s, n, sum[u][n]);
      }
    }
  }
}

// The columns of rows that a block sums at a time: no more than a warp's lanes have.
template <int kWidth>
constexpr int kPieceColumns = kWidth == 1 ? 32 : 128;

// Shared memory of add_rows, in floats.
template <int kWidth, int kVectors>
constexpr int kPartialFloats = kThreads / 32 * kVectors* kPieceColumns<kWidth>;

// result[n][j] += sum over s < count of weights[n stride + s] row_s[j], j < columns, in rows of
// kPieceColumns. Barriers before the weights are read and after the result is complete.
template <int kWidth, int kVectors, class RowOf>
__device__ inline void add_rows(const float* weights, int64_t stride, int columns, int count,
                                RowOf row_of, float* partial, float* result) {
  const int pieces = columns / kWidth, lanes = lanes_of(pieces), step = kThreads / lanes;
  const int tid = threadIdx.x, piece = tid % lanes, part = tid / lanes;
  constexpr int kColumns = kPieceColumns<kWidth>;
  float sum[kVectors][kWidth] = {};
  __syncthreads();
  for (int first = part; piece < pieces && first < count; first += kPieceRows * step) {
    float row[kPieceRows][kWidth];
    DIJIANG_UNROLL()
    for (int u = 0; u < kPieceRows; ++u) {
      const int s = first + u * step;
      load_piece(row[u], row_of(s < count ? s : 0) + piece * kWidth);
    }
    DIJIANG_UNROLL()
    for (int u = 0; u < kPieceRows; ++u) {
      const int s = first + u * step;
      if (s >= count) continue;
      DIJIANG_UNROLL()
      for (int n = 0; n < kVectors; ++n) {
        const float weight = weights[n * stride + s];
        DIJIANG_UNROLL()
        for (int e = 0; e < kWidth; ++e) sum[n][e] = fmaf(weight, row[u][e], sum[n][e]);
      }
    }
  }
  DIJIANG_UNROLL()
  for (int n = 0; n < kVectors; ++n) {
    DIJIANG_UNROLL()
    for (int e = 0; e < kWidth; ++e) {
      for (int k = lanes; k < 32; k *= 2) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], k);
      if (tid % 32 < lanes && piece < pieces) {
        partial[(tid / 32 * kVectors + n) * kColumns + piece * kWidth + e] = sum[n][e];
      }
    }
  }
  __syncthreads();
  for (int e = tid; e < kVectors * kColumns; e += kThreads) {
    if (e % kColumns >= columns) continue;
    float x = result[e];
    for (int k = 0; k < kThreads / 32; ++k) x += partial[k * kVectors * kColumns + e];
    result[e] = x;
  }
  __syncthreads();
}

}  // namespace dijiang::cuda
