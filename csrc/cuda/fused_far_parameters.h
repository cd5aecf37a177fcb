// The gradients of omega and log_weight in the fused far backward.
#pragma once

#include "cuda/backward_parameters.h"
#include "cuda/fused_far_layout.h"
#include "cuda/fused_seen.h"

namespace dijiang::cuda {

// A split's part of grad omega and, in the last column, of grad log_weight, as grad_parameters
// leaves them: the product of slopes and inputs over the tokens of so many tiles of 64. Each warp
// has 16 features at a time. Grid: split, head, 64 features of all slices.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads)
    sum_omega(const __grid_constant__ FarBackward b, int side, int split_tiles, float* parts) {
  using T = typename Shape::T;
  constexpr int kD = Shape::kHeadDim, kOwn = 64;
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* slopes = reinterpret_cast<T*>(raw);   // two stages
  T* inputs = slopes + 2 * kTileRows * kOwn;  // likewise
  const Attention& a = b.a;
  const LinearAttentionParams& p = a.params;
  const ConstView& x = side == 0 ? p.q : p.k;
  const int64_t heads = side == 0 ? p.num_heads : p.num_kv_heads;
  const int head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.z) * kOwn;
  const int64_t m = int64_t{gridDim.z} * kOwn;
  const int64_t all = static_cast<int64_t>(a.work.first_chunk[p.num_seqs]) * a.row_tiles;
  const int64_t begin = int64_t{blockIdx.x} * split_tiles;
  const int64_t end = begin + split_tiles < all ? begin + split_tiles : all;

  // Lanes 0 to 15 find the warp's rows of slopes, the others those of x.
  const auto load = [&](int64_t tile) {
    const Chunk& c = a.work.chunks[tile / a.row_tiles];
    const int row = static_cast<int>(tile % a.row_tiles) * kTileRows, left = c.query_count - row;
    const int count = left < 0 ? 0 : left < kTileRows ? left : kTileRows;
    const int mine = 16 * warp + lane % 16;
    const auto* from = static_cast<const T*>(x.data);
    if (mine < count) {
      const int token = c.query_token + row + mine;
      from = lane < 16 ? b.work.slopes[side] + row_index(p, heads, c.batch, head, token) * m + first
                       : view_row<T>(x, c.batch, head, token).data;
    }
    const auto stage = static_cast<int>((tile - begin) % 2);
    copy_warp_rows<kOwn>(slopes + stage * kTileRows * kOwn, from, 0, 16 * warp, count, kOwn);
    copy_warp_rows<kD>(inputs + stage * kTileRows * kD, from, 16, 16 * warp, count,
                       static_cast<int>(p.headdim));
  };

  float sum[kD / 8][4], weight = 0.0f;  // of feature first + threadIdx.x
  clear(sum);
  const float* weights = b.work.weights[side];
  if (begin < end) load(begin);
  DIJIANG_UNROLL(1)
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto stage = static_cast<int>((tile - begin) % 2);
    wait_copies();
    __syncthreads();
    if (tile + 1 < end) load(tile + 1);
    if (weights && threadIdx.x < kOwn) {
      for (int w = 0; w < kWalkWarps; ++w) {
        weight += weights[((tile * heads + head) * kWalkWarps + w) * m + first + threadIdx.x];
      }
    }
    DIJIANG_UNROLL()
    for (int s = 0; s < kTileRows; s += 16) {
      unsigned left[4];
      load_left_transposed<kOwn>(left, slopes + stage * kTileRows * kOwn, 16 * warp, s);
      DIJIANG_UNROLL()
      for (int n = 0; n < kD; n += 16) {
        unsigned right[4];
        load_right_transposed<kD>(right, inputs + stage * kTileRows * kD, n, s);
        multiply_add_16<T>(sum[n / 8], sum[n / 8 + 1], left, right);
      }
    }
  }
  const float root = sqrtf(static_cast<float>(p.scale));
  const auto width = static_cast<int>(p.headdim);
  const auto count = static_cast<int>(p.num_features) - first;  // of the block's features
  float* part = parts + ((blockIdx.x * heads + head) * p.num_features + first) * (width + 1);
  DIJIANG_UNROLL()
  for (int n = 0; n < kD / 8; ++n) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 4; ++e) {
      const int i = 16 * warp + lane / 4 + e / 2 * 8, j = 8 * n + 2 * (lane % 4) + e % 2;
      if (i < count && j < width) part[i * (width + 1) + j] = sum[n][e] * root;
    }
  }
  const auto mine = static_cast<int>(threadIdx.x);
  if (mine < kOwn && mine < count) part[mine * (width + 1) + width] = weight;
}

}  // namespace dijiang::cuda
