// What forward and backward do alike for a tile of up to 64 queries.
#pragma once

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// Queries [row0, row0 + rows) of a chunk, of one query head.
struct QueryTile {
  int64_t index;  // of the chunk
  Chunk chunk;
  int head;
  int kv_head;
  int row0;
  int rows;

  __device__ int64_t position(int row) const { return chunk.query_pos + row0 + row; }
  __device__ int64_t token(int row) const { return chunk.query_token + row0 + row; }
};

// blockIdx.x counts chunks and their tiles, blockIdx.y query heads (kv heads: head is then the
// first of the group). False: nothing to do.
template <bool kKvHeads = false>
__device__ inline bool find_query_tile(const Attention& a, QueryTile& t) {
  t.index = blockIdx.x / a.row_tiles;
  t.row0 = static_cast<int>(blockIdx.x % a.row_tiles) * kRows;
  if (!find_chunk(a, t.index, t.chunk) || t.row0 >= t.chunk.query_count) return false;
  t.head = kKvHeads ? blockIdx.y * a.group : blockIdx.y;
  t.kv_head = t.head / a.group;
  t.rows = t.chunk.query_count - t.row0 < kRows ? t.chunk.query_count - t.row0 : kRows;
  return true;
}

// x[row][k] of 64 rows given by row_of(row), columns [k0, k0 + kDepth), zero outside.
template <class RowOf>
__device__ inline void load_depth_tile(float* tile, int rows, int64_t k0, int64_t width,
                                       RowOf row_of) {
  for (int e = threadIdx.x; e < kRows * kDepth; e += kThreads) {
    const int r = e / kDepth, k = e % kDepth;
    tile[r * kDepthStride + k] = r < rows && k0 + k < width ? row_of(r)[k0 + k] : 0.0f;
  }
}

// result (64 x 64, kRowStride) = x y^T over `width` columns of rows x_row(r), y_row(r): scores of
// queries and keys. Barriers before the tiles are used and after the result is complete.
template <class T, class RowX, class RowY>
__device__ inline void multiply_rows(float* x_tile, float* y_tile, float* result, int x_rows,
                                     int y_rows, int64_t width, RowX x_row, RowY y_row) {
  TileProduct<T> product;
  for (int64_t k0 = 0; k0 < width; k0 += kDepth) {
    __syncthreads();
    load_depth_tile(x_tile, x_rows, k0, width, x_row);
    load_depth_tile(y_tile, y_rows, k0, width, y_row);
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kColumnMajor>(x_tile, kDepthStride, y_tile,
                                                                     kDepthStride, kDepth);
  }
  __syncthreads();
  product.store(result, kRowStride);
  __syncthreads();
}

__device__ inline float score_scale(const LinearAttentionParams& p) {
  return static_cast<float>(p.scale) * kLog2e;
}

// A row's numbers once its sums are known. den may be NaN (from NaN inputs): then so is the output.
struct RowEnd {
  float factor;  // out = num * factor
  float scale;   // what is saved
  float sum;
};

// With eps, which may raise the scale: then num counts `factor`.
__device__ inline float add_eps(const LinearAttentionParams& p, float& den, float& scale) {
  if (!(p.eps > 0.0)) return 1.0f;
  const auto eps = static_cast<float>(p.eps);
  const float top = fmaxf(scale, binary_exponent(eps));
  const float factor = scale2(1.0f, scale - top);
  den = den * factor + scale2(eps, -top);
  scale = top;
  return factor;
}

__device__ inline RowEnd finish_row(const LinearAttentionParams& p, float den, float scale) {
  if (!p.normalize) return {1.0f, 0.0f, 1.0f};
  const float factor = add_eps(p, den, scale);
  if (den == 0.0f) return {0.0f, 0.0f, INFINITY};
  int exponent;
  const float fraction = frexpf(den, &exponent);
  const auto shift = static_cast<float>(exponent - 1);
  // Beyond 2^24 the scale may not take the exponent up exactly: the sum keeps it.
  if (scale + shift - scale != shift) return {factor / den, scale, den};
  return {factor / den, scale + shift, 2.0f * fraction};
}

// num 2^scale without the overflow of 2^scale alone when normalize = false.
__device__ inline float row_output(const LinearAttentionParams& p, float num, const RowEnd& end,
                                   float scale) {
  return p.normalize ? num * end.factor : scale2(num, scale);
}
// Of one of a lane's two rows of fragments. Whether to normalise is asked once.
template <int kTiles>
__device__ __forceinline__ void take_outputs(const LinearAttentionParams& p, float (&y)[kTiles][2],
                                             const float (&num)[kTiles][4], int half, float den,
                                             float scale) {
  const auto each = [&](const auto& find) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kTiles; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 2; ++e) y[t][e] = find(num[t][2 * half + e]);
    }
  };
  if (p.normalize) {
    float top = scale;
    const float factor = add_eps(p, den, top), times = den == 0.0f ? 0.0f : factor / den;
    each([&](float x) { return x * times; });
  } else {
    each([&](float x) { return scale2(x, scale); });
  }
}

}  // namespace dijiang::cuda
