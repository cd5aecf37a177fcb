// Omega on its way into the fused far backward, as tiles, and its gradient on the way out.
#pragma once

#include "cuda/backward_parameters.h"
#include "cuda/fused_far_layout.h"
#include "cuda/fused_seen.h"
#include "cuda/fused_walk.h"

namespace dijiang::cuda {

// Grid: head, side.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads) split_omega(const __grid_constant__ FarBackward b) {
  const LinearAttentionParams& p = b.f.attention.params;
  const int head = blockIdx.x, side = blockIdx.y;
  if (head >= (side == 0 ? p.num_heads : p.num_kv_heads)) return;
  Walk<typename Shape::Part, false> walk(b.f, nullptr);
  walk.load_parameters(side == 0 ? p.fq : p.fk, head,
                       reinterpret_cast<char*>(b.work.omega[side] + int64_t{head} * Shape::kMatrix),
                       reinterpret_cast<char*>(b.work.lines[side] + head * Shape::kFeatures));
}

// A split's part of grad omega and, in the last column, of grad log_weight, as grad_parameters
// leaves them: the product of slopes and inputs over the tokens of so many chunks. Each warp has 16
// features. Grid: split, head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads)
    sum_omega(const __grid_constant__ FarBackward b, int side, int chunks, float* parts) {
  using T = typename Shape::T;
  constexpr int kD = Shape::kHeadDim, kM = Shape::kFeatures;
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* slopes = reinterpret_cast<T*>(raw);  // two stages
  T* inputs = slopes + 2 * kTileRows * kM;   // likewise
  const Attention& a = b.f.attention;
  const LinearAttentionParams& p = a.params;
  const int64_t heads = side == 0 ? p.num_heads : p.num_kv_heads;
  const int head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * chunks, total = a.work.first_chunk[p.num_seqs];
  const int64_t end = begin + chunks < total ? begin + chunks : total;
  Walk<typename Shape::Part, false> walk(b.f, raw);
  const ConstView slope_view{b.work.slopes[side], heads * p.seqlen * kM, p.seqlen * kM, kM, 1};
  const auto load = [&](int64_t index) {
    const Chunk& c = a.work.chunks[index];
    walk.batch = c.batch;
    walk.token = c.query_token;
    walk.count = c.query_count;
    const int stage = static_cast<int>((index - begin) % 2);
    walk.template load_rows<kM>(slopes + stage * kTileRows * kM, slope_view, head, 0);
    walk.template load_rows<kD>(inputs + stage * kTileRows * kD, side == 0 ? p.q : p.k, head, 0);
  };

  float sum[kD / 8][4], weight = 0.0f;  // of feature threadIdx.x
  clear(sum);
  const float* weights = b.work.weights[side];
  if (begin < end) load(begin);
  DIJIANG_UNROLL(1)
  for (int64_t index = begin; index < end; ++index) {
    const int stage = static_cast<int>((index - begin) % 2);
    wait_copies();
    __syncthreads();
    if (index + 1 < end) load(index + 1);
    if (weights && threadIdx.x < kM) {
      for (int w = 0; w < kWalkWarps; ++w) {
        weight += weights[((index * heads + head) * kWalkWarps + w) * kM + threadIdx.x];
      }
    }
    DIJIANG_UNROLL()
    for (int s = 0; s < kTileRows; s += 16) {
      unsigned left[4];
      load_left_transposed<kM>(left, slopes + stage * kTileRows * kM, 16 * warp, s);
      DIJIANG_UNROLL()
      for (int n = 0; n < kD; n += 16) {
        unsigned right[4];
        load_right_transposed<kD>(right, inputs + stage * kTileRows * kD, n, s);
        multiply_add_16<T>(sum[n / 8], sum[n / 8 + 1], left, right);
      }
    }
  }
  const float root = sqrtf(static_cast<float>(p.scale));
  float* part = parts + (blockIdx.x * heads + head) * kM * (kD + 1);
  DIJIANG_UNROLL()
  for (int n = 0; n < kD / 8; ++n) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 4; ++e) {
      const int i = 16 * warp + lane / 4 + e / 2 * 8, j = 8 * n + 2 * (lane % 4) + e % 2;
      part[i * (kD + 1) + j] = sum[n][e] * root;
    }
  }
  if (threadIdx.x < kM) part[threadIdx.x * (kD + 1) + kD] = weight;
}

}  // namespace dijiang::cuda
