// From gradients of exponents to those of q, k, their feature parameters and log_decay. All sums
// over tokens are split alike on every run and added in order.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/backward_layout.h"

namespace dijiang::cuda {

// One side: queries or keys.
struct FeatureSide {
  ConstView x;
  FeatureParams feature;
  FeatureGrads grad;
  int64_t heads;
  const float* features;  // base-2 exponents, or values when given
  const float* slopes;    // gradient of the exponents (of the values when given)
  const float* near;      // near part of grad_x; null: none
  float* total;
  float* square;
  void* grad_x;
};

__device__ inline float natural_weight(const FeatureSide& side, int64_t features, int64_t head,
                                       int64_t i) {
  const auto* log_weight = static_cast<const float*>(side.feature.log_weight);
  return log_weight ? log_weight[head * features + i] : 0.0f;
}

// du_i: the gradient of u = omega x. Features of padding may be NaN, its slopes are 0.
__device__ inline float linear_slope(FeatureKind kind, float slope, float feature, float weight,
                                     float total) {
  if (slope == 0.0f && total == 0.0f) return 0.0f;
  if (kind == FeatureKind::kSoftmax) return slope - exp2f(feature - weight * kLog2e) * total;
  if (kind == FeatureKind::kElu) {
    // phi = 1 + u above 1, e^u below.
    return slope * exp2f(-fmaxf(feature - weight * kLog2e, 0.0f));
  }
  return slope;
}

// total_t = sum_i of the gradient of log phi_i, and |x|^2 of it. A warp a row; rows in no sequence
// have zero slopes. Grid: rows of (batch, heads, seqlen).
template <class T>
__global__ void __launch_bounds__(kThreads) sum_slopes(LinearAttentionParams p, FeatureSide side) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.batch * side.heads * p.seqlen) return;
  const bool given = p.kind == FeatureKind::kGiven;
  const int64_t m = p.num_features;
  float sum = 0.0f;
  for (int64_t i = lane; i < m; i += 32) {
    const float slope = side.slopes[row * m + i];
    if (slope != 0.0f) sum += given ? slope * side.features[row * m + i] : slope;
  }
  sum = warp_sum(sum);
  float square = 0.0f;
  if (side.feature.beta && sum != 0.0f) {
    const Row<T> x = view_row<T>(side.x, row / p.seqlen / side.heads, row / p.seqlen % side.heads,
                                 row % p.seqlen);
    for (int64_t k = lane; k < p.headdim; k += 32) square = fmaf(x[k], x[k], square);
    square = warp_sum(square) * static_cast<float>(p.scale);
  }
  if (lane == 0) {
    side.total[row] = sum;
    side.square[row] = square * sum;
  }
}

// grad_x = sqrt(scale) omega^T du - 2 beta scale x total + near, for a row tile of the call.
// Grid: (chunk, row tile), head, 64 columns.
template <class T, bool kKeys>
__global__ void __launch_bounds__(kThreads) grad_inputs(Backward b, FeatureSide side) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* y_tile = x_tile + kDepthTile;
  float* result = x_tile;
  const LinearAttentionParams& p = b.forward.params;
  const int64_t m = p.num_features, d = p.headdim, j0 = static_cast<int64_t>(blockIdx.z) * kRows;
  QueryTile t;
  if (!find_query_tile<kKeys>(b.forward, t)) return;
  const int head = blockIdx.y, tid = threadIdx.x;
  const int64_t first_row = row_index(p, side.heads, t.chunk.batch, head, t.token(0));
  const bool given = p.kind == FeatureKind::kGiven;
  const auto* omega = static_cast<const float*>(side.feature.omega) + head * m * d;
  const auto* beta = static_cast<const float*>(side.feature.beta);

  TileProduct<T> product;
  for (int64_t i0 = 0; !given && i0 < m; i0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kRows * kDepth; e += kThreads) {
      const int r = e / kDepth, k = e % kDepth;
      float du = 0.0f;
      if (r < t.rows && i0 + k < m) {
        const int64_t at = (first_row + r) * m + i0 + k;
        du = linear_slope(p.kind, side.slopes[at], side.features[at],
                          natural_weight(side, m, head, i0 + k), side.total[first_row + r]);
      }
      x_tile[r * kDepthStride + k] = du;
    }
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int i = e / kRows, j = e % kRows;
      y_tile[i * kRowStride + j] = i0 + i < m && j0 + j < d ? omega[(i0 + i) * d + j0 + j] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kRowMajor, true, true>(
        x_tile, kDepthStride, y_tile, kRowStride, kDepth);
  }
  __syncthreads();
  product.store(result, kRowStride);
  __syncthreads();
  const float root = sqrtf(static_cast<float>(p.scale));
  for (int e = tid; e < t.rows * kRows; e += kThreads) {
    const int r = e / kRows, j = e % kRows;
    if (j0 + j >= d) continue;
    const int64_t row = first_row + r, at = row * d + j0 + j;
    float g = side.near ? side.near[at] : 0.0f;
    if (given) {
      if (m > 0) g += side.slopes[row * m + j0 + j];
    } else if (m > 0) {
      g += result[r * kRowStride + j] * root;
      if (beta && p.kind == FeatureKind::kExp) {
        const Row<T> x = view_row<T>(side.x, t.chunk.batch, head, t.token(r));
        g -= 2.0f * beta[head] * static_cast<float>(p.scale) * x[j0 + j] * side.total[row];
      }
    }
    static_cast<T*>(side.grad_x)[at] = from_float<T>(g);
  }
}

// grad_v in its own type. Grid: (chunk, row tile), kv head.
template <class T>
__global__ void __launch_bounds__(kThreads) write_grad_values(Backward b) {
  const LinearAttentionParams& p = b.forward.params;
  QueryTile t;
  if (!find_query_tile<true>(b.forward, t)) return;
  const int64_t at =
      row_index(p, p.num_kv_heads, t.chunk.batch, t.kv_head, t.token(0)) * p.headdim_v;
  for (int64_t e = threadIdx.x; e < t.rows * p.headdim_v; e += kThreads) {
    static_cast<T*>(b.params.grad_v)[at + e] = from_float<T>(b.work.grad_v[at + e]);
  }
}

// A split's part of grad omega and, in the last column, of grad log_weight. Grid: (split, 64
// features), head, 64 columns of omega and one more block for log_weight.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_parameters(LinearAttentionParams p, FeatureSide side, int splits, float* parts) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);  // [token][feature]
  float* y_tile = x_tile + kDepthTile;           // [token][column]
  float* result = x_tile;
  const int64_t m = p.num_features, d = p.headdim;
  const int64_t feature_tiles = (m + kRows - 1) / kRows;
  const int64_t split = blockIdx.x / feature_tiles, i0 = blockIdx.x % feature_tiles * kRows;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kRows;
  const bool for_weight = blockIdx.z == gridDim.z - 1;
  const int head = blockIdx.y, tid = threadIdx.x;
  const int64_t tokens = p.batch * p.seqlen, each = (tokens + splits - 1) / splits;
  const int64_t begin = split * each, end = begin + each < tokens ? begin + each : tokens;
  float* part = parts + (split * side.heads + head) * m * (d + 1);

  TileProduct<T> product;
  float sum = 0.0f;  // of feature tid % 64
  for (int64_t t0 = begin; t0 < end; t0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int64_t token = t0 + e / kRows;
      const int i = e % kRows;
      float du = 0.0f, x = 0.0f;
      if (token < end) {
        const int64_t batch = token / p.seqlen, t = token % p.seqlen;
        const int64_t row = (batch * side.heads + head) * p.seqlen + t, at = row * m + i0 + i;
        if (i0 + i < m) {
          du = side.slopes[at];
          if (!for_weight) {
            du = linear_slope(p.kind, du, side.features[at], natural_weight(side, m, head, i0 + i),
                              side.total[row]);
          }
        }
        // Padding may hold anything. (Where x is not finite in a sequence, so are the slopes.)
        if (!for_weight && j0 + i < d) x = view_row<T>(side.x, batch, head, t)[j0 + i];
        if (!isfinite(x)) x = 0.0f;
      }
      x_tile[e / kRows * kRowStride + i] = du;
      y_tile[e / kRows * kRowStride + i] = x;
    }
    __syncthreads();
    if (for_weight) {
      if (tid < kRows) {
        for (int k = 0; k < kDepth; ++k) sum += x_tile[k * kRowStride + tid];
      }
    } else {
      product.template multiply<Order::kColumnMajor, Order::kRowMajor, true, false>(
          x_tile, kRowStride, y_tile, kRowStride, kDepth);
    }
  }
  if (for_weight) {
    if (tid < kRows && i0 + tid < m) part[(i0 + tid) * (d + 1) + d] = sum;
    return;
  }
  __syncthreads();
  product.store(result, kRowStride);
  __syncthreads();
  const float root = sqrtf(static_cast<float>(p.scale));
  for (int e = tid; e < kRows * kRows; e += kThreads) {
    const int i = e / kRows, j = e % kRows;
    if (i0 + i < m && j0 + j < d) {
      part[(i0 + i) * (d + 1) + j0 + j] = result[i * kRowStride + j] * root;
    }
  }
}

static __global__ void __launch_bounds__(kThreads)
    sum_parameters(LinearAttentionParams p, FeatureSide side, int splits, const float* parts) {
  const int64_t d = p.headdim, count = side.heads * p.num_features * (d + 1);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += parts[split * count + e];
  const int64_t feature = e / (d + 1), column = e % (d + 1);
  if (column < d) {
    if (side.grad.omega) static_cast<float*>(side.grad.omega)[feature * d + column] = sum;
  } else if (side.grad.log_weight) {
    static_cast<float*>(side.grad.log_weight)[feature] = sum;
  }
}

// Grid: head.
static __global__ void __launch_bounds__(kThreads)
    grad_betas(LinearAttentionParams p, FeatureSide side) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<double*>(raw);
  const int tid = threadIdx.x;
  double sum = 0.0;
  for (int64_t e = tid; e < p.batch * p.seqlen; e += kThreads) {
    sum += side.square[(e / p.seqlen * side.heads + blockIdx.x) * p.seqlen + e % p.seqlen];
  }
  sums[tid] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (tid < step) sums[tid] += sums[tid + step];
    __syncthreads();
  }
  if (tid == 0) static_cast<float*>(side.grad.beta)[blockIdx.x] = static_cast<float>(-sums[0]);
}

// dlog_decay_r = sum_{t >= r} dc_t, dc_t from the features of the token's queries and key, at the
// last token also from the final state. Grid: sequence, kv head.
static __global__ void __launch_bounds__(kThreads) grad_decays(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<double*>(raw);
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t seq = blockIdx.x;
  const int head = blockIdx.y, tid = threadIdx.x;
  const int batch = p.segments ? p.segments[3 * seq] : static_cast<int>(seq);
  const int64_t begin = p.segments ? p.segments[3 * seq + 1] : 0;
  const int64_t end = p.segments ? p.segments[3 * seq + 2] : p.seqlen;
  const int64_t state = (seq * p.num_kv_heads + head) * p.num_features;
  const auto add_up = [&](double x) {  // of the block, to sums[0]
    __syncthreads();
    sums[tid] = x;
    __syncthreads();
    for (int step = kThreads / 2; step > 0; step /= 2) {
      if (tid < step) sums[tid] += sums[tid + step];
      __syncthreads();
    }
    const double total = sums[0];
    __syncthreads();
    return total;
  };

  double carry = 0.0;
  const auto* grad_kv = static_cast<const float*>(b.params.grad_final_kv);
  const auto* grad_z = static_cast<const float*>(b.params.grad_final_z);
  if (grad_kv) {
    const auto* kv = static_cast<const float*>(b.params.final_kv) + state * p.headdim_v;
    double sum = 0.0;
    for (int64_t e = tid; e < p.num_features * p.headdim_v; e += kThreads) {
      sum += double(kv[e]) * double(grad_kv[state * p.headdim_v + e]);
    }
    carry += add_up(sum);
  }
  if (grad_z) {
    const auto* z = static_cast<const float*>(b.params.final_z) + state;
    double sum = 0.0;
    for (int64_t e = tid; e < p.num_features; e += kThreads) {
      sum += double(z[e]) * double(grad_z[state + e]);
    }
    carry += add_up(sum);
  }

  // From the end, kThreads tokens at a time; thread 0 has the last of them.
  for (int64_t last = end - 1; last >= begin; last -= kThreads) {
    const int64_t token = last - tid;
    double x = 0.0;
    if (token >= begin) {
      x = -double(b.work.key_total[row_index(p, p.num_kv_heads, batch, head, token)]);
      for (int g = 0; g < a.group; ++g) {
        x += double(b.work.query_total[row_index(p, p.num_heads, batch,
                                                 static_cast<int64_t>(head) * a.group + g, token)]);
      }
    }
    sums[tid] = x;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const double before = tid >= step ? sums[tid - step] : 0.0;
      __syncthreads();
      sums[tid] += before;
      __syncthreads();
    }
    if (token >= begin) {
      static_cast<float*>(
          b.params.grad_log_decay)[row_index(p, p.num_kv_heads, batch, head, token)] =
          static_cast<float>(carry + sums[tid]);
    }
    carry += sums[kThreads - 1];
    __syncthreads();
  }
}

}  // namespace dijiang::cuda
