// Gradients of the far terms: of the exponents of query features (grad_b) and key features
// (grad_a), and of v. Inside a chunk by products of features; through the state by the state run
// backwards in time. docs/numerics.md has the formulas; r is the forward's row_scale.
#pragma once

#include "cuda/attention_phases.h"
#include "cuda/attention_rows.h"
#include "cuda/backward_layout.h"

namespace dijiang::cuda {

// M' of the inner products. A given feature that is 0 for all keys still has its gradient: any
// finite scale will do for it.
template <bool kGiven>
__device__ inline float inner_scale(const Attention& a, int64_t at) {
  const float scale = a.work.chunk_scale[at];
  return kGiven && scale < kNone ? 0.0f : scale;
}

__device__ inline float saved_scale(const Backward& b, int64_t row) {
  return static_cast<const float*>(b.params.forward.row_scale)[row];
}

// delta, 1/den and which rows are unsafe. Grid: (chunk, row tile), query head; a warp a row.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) prepare_rows(Backward b) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const int lane = threadIdx.x % 32;
  const int64_t cell = cell_of(a, t.index, t.kv_head), m = p.num_features;
  for (int r = threadIdx.x / 32; r < t.rows; r += kThreads / 32) {
    const int64_t row = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(r));
    float delta = 0.0f;
    if (p.normalize) {
      const Row<T> grad = view_row<T>(b.params.grad_out, t.chunk.batch, t.head, t.token(r));
      const T* out = static_cast<const T*>(p.out) + row * p.headdim_v;
      for (int64_t j = lane; j < p.headdim_v; j += 32)
        delta = fmaf(grad[j], to_float(out[j]), delta);
      delta = warp_sum(delta);
    }
    float top = kEmpty;
    for (int64_t i = lane; a.has_inner && i < m; i += 32) {
      top = fmaxf(top, Feature<kGiven>::bound(a.work.query_features[row * m + i]) +
                           inner_scale<kGiven>(a, cell * m + i));
    }
    top = warp_max(top);
    if (lane == 0) {
      b.work.delta[row] = delta;
      b.work.inverse[row] = 1.0f / static_cast<const float*>(p.row_sum)[row];
      if (a.has_inner) b.work.unsafe[row] = top - saved_scale(b, row) > kSafeExponent;
    }
  }
}

// --- the state run backwards ---------------------------------------------------------------------

constexpr int kReverseShared = (2 * kDepthTile + 6 * kRows) * sizeof(float);

// R, rho and their maxima N of a chunk's queries alone, at the chunk's state. Grid: (chunk, 64
// features), kv head, 64 columns of v.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) local_reverse_states(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* phi = reinterpret_cast<float*>(raw);  // [query][feature]
  float* grads = phi + kDepthTile;            // [query][column]
  float* result = phi;
  float* maxima = grads + kDepthTile;  // (4, 64)
  float* scale = maxima + 4 * kRows;
  float* deltas = scale + kRows;  // (kDepth)
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  const int64_t feature_tiles = (m + kRows - 1) / kRows;
  const int64_t index = blockIdx.x / feature_tiles, i0 = blockIdx.x % feature_tiles * kRows;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kRows;
  Chunk c;
  if (!find_chunk(a, index, c)) return;
  const int kv_head = blockIdx.y, tid = threadIdx.x;
  const int64_t cell = cell_of(a, index, kv_head);
  const double* levels = a.has_decay ? levels_of(a, index, kv_head) : nullptr;
  using F = Feature<kGiven>;
  const int queries = a.group * c.query_count;
  const auto head_of = [&](int q) { return kv_head * a.group + q / c.query_count; };
  const auto token_at = [&](int q) { return c.query_token + q % c.query_count; };
  const auto row_of = [&](int q) {
    return row_index(p, p.num_heads, c.batch, head_of(q), token_at(q));
  };
  const auto decay_of = [&](int q) {
    return levels ? decay_between(levels, -1, c.query_pos + q % c.query_count - c.key_pos) : 0.0f;
  };

  {
    const int i = tid % kRows, part = tid / kRows;
    float top = kEmpty;
    for (int q = part; i0 + i < m && q < queries; q += 4) {
      const int64_t row = row_of(q);
      if (b.work.inverse[row] == 0.0f) continue;
      const float x = a.work.query_features[row * m + i0 + i];
      top = fmaxf(top, F::bound(x, decay_of(q)) - saved_scale(b, row));
    }
    maxima[tid] = top;
    __syncthreads();
    if (tid < kRows) {
      for (int q = 1; q < 4; ++q) top = fmaxf(top, maxima[q * kRows + i]);
      if (top < kNone) top = kEmpty;
      scale[i] = top;
      if (blockIdx.z == 0 && i0 + i < m) b.work.reverse_local[cell * m + i0 + i] = top;
    }
  }

  TileProduct<T> product;
  float rho = 0.0f;
  for (int q0 = 0; q0 < queries; q0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int q = q0 + e / kRows, i = e % kRows;
      float x = 0.0f, g = 0.0f;
      if (q < queries) {
        const int64_t row = row_of(q);
        if (i0 + i < m && scale[i] > kNone) {
          x = F::scaled(a.work.query_features[row * m + i0 + i], decay_of(q),
                        -saved_scale(b, row) - scale[i]) *
              b.work.inverse[row];
        }
        if (j0 + i < dv) {
          g = view_row<T>(b.params.grad_out, c.batch, head_of(q), token_at(q))[j0 + i];
        }
        if (i == 0) deltas[e / kRows] = b.work.delta[row];
      } else if (i == 0) {
        deltas[e / kRows] = 0.0f;
      }
      phi[e / kRows * kRowStride + i] = operand<T>(x);
      grads[e / kRows * kRowStride + i] = g;
    }
    __syncthreads();
    product.template multiply<Order::kColumnMajor, Order::kRowMajor>(phi, kRowStride, grads,
                                                                     kRowStride, kDepth);
    if (tid < kRows) {
      for (int k = 0; k < kDepth; ++k) rho = fmaf(phi[k * kRowStride + tid], deltas[k], rho);
    }
  }
  __syncthreads();
  product.store(result, kRowStride);
  if (blockIdx.z == 0 && tid < kRows && i0 + tid < m) b.work.reverse_z[cell * m + i0 + tid] = rho;
  __syncthreads();
  for (int e = tid; e < kRows * kRows; e += kThreads) {
    const int i = e / kRows, j = e % kRows;
    if (i0 + i < m && j0 + j < dv) {
      b.work.reverse_kv[(cell * m + i0 + i) * dv + j0 + j] = result[i * kRowStride + j];
    }
  }
}

// scan_states the other way: leaves in each chunk what its keys need, the sum over all later
// chunks. Ends with the gradient of the initial state.
static __global__ void __launch_bounds__(kThreads) scan_reverse_states(Backward b) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v, columns = dv + 1;
  const int64_t tiles = (m * columns + kThreads - 1) / kThreads;
  const int64_t seq = blockIdx.x / tiles;
  const int64_t element = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (element >= m * columns) return;
  const int64_t i = element / columns, j = element % columns;
  const int head = blockIdx.y;
  const int64_t state = (seq * p.num_kv_heads + head) * m + i;
  const bool is_z = j == dv;

  float scale = kEmpty, sum = 0.0f, rest = 0.0f;
  const auto* grad_kv = static_cast<const float*>(b.params.grad_final_kv);
  const auto* grad_z = static_cast<const float*>(b.params.grad_final_z);
  if (grad_kv || grad_z) {
    const float final_scale = static_cast<const float*>(b.params.final_log_scale)[state];
    if (final_scale > kNone) {
      scale = -final_scale;
      if (is_z && grad_z) sum = -grad_z[state];
      if (!is_z && grad_kv) sum = grad_kv[state * dv + j];
    }
  }
  const int64_t first = a.work.first_chunk[seq];
  for (int64_t index = a.work.first_chunk[seq + 1] - 1; index >= first; --index) {
    const int64_t cell = cell_of(a, index, head);
    float& place =
        is_z ? b.work.reverse_z[cell * m + i] : b.work.reverse_kv[(cell * m + i) * dv + j];
    const float local = place, local_scale = b.work.reverse_local[cell * m + i];
    place = sum;
    if (is_z) b.work.reverse_scale[cell * m + i] = scale;
    const int key_count = a.work.chunks[index].key_count;
    if (a.has_decay && key_count > 0) {
      const float decay = decay_between(levels_of(a, index, head), -1, key_count - 1);
      const DecayStep step = step_decay(decay, rest);
      sum *= step.factor;
      scale = fmaxf(scale + step.whole, kEmpty);
    }
    const float top = fmaxf(scale, local_scale);
    sum = scale2(sum, scale - top) + scale2(local, local_scale - top);
    scale = top;
  }
  auto* to_kv = static_cast<float*>(b.params.grad_initial_kv);
  auto* to_z = static_cast<float*>(b.params.grad_initial_z);
  if (!(is_z ? to_z : to_kv)) return;
  const float shift = static_cast<const float*>(p.initial.log_scale)[state] + scale;
  if (is_z) {
    to_z[state] = -scale2(sum, shift);
  } else {
    to_kv[state * dv + j] = scale2(sum, shift);
  }
}

// --- query features ------------------------------------------------------------------------------

constexpr int kFarShared = (2 * kDepthTile + kSquareTile) * sizeof(float);

// 64 x 64 features of the rows of a chunk (queries of one head, or keys), relative to the chunk's
// maxima: queries are phi 2^(M' - r), keys phi 2^-M'. Unsafe rows are 0.
template <class T, bool kGiven>
__device__ inline float inner_query(const Backward& b, int64_t cell, int64_t row, int64_t i) {
  const Attention& a = b.forward;
  const int64_t m = a.params.num_features;
  if (b.work.unsafe[row] || b.work.inverse[row] == 0.0f) return 0.0f;
  const float shift = inner_scale<kGiven>(a, cell * m + i) - saved_scale(b, row);
  return operand<T>(Feature<kGiven>::scaled(a.work.query_features[row * m + i], shift));
}
template <class T, bool kGiven>
__device__ inline float inner_key(const Attention& a, int64_t cell, const float* features,
                                  int64_t i) {
  const float shift = inner_scale<kGiven>(a, cell * a.params.num_features + i);
  return operand<T>(Feature<kGiven>::scaled(features[i], -shift));
}

// grad_b of a row tile, all features; inner_g and inner_p of its chunk. Grid: (chunk, row tile),
// query head.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) grad_query_features(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* y_tile = x_tile + kDepthTile;
  float* weights = y_tile + kDepthTile;  // 64 x 64
  float* result = x_tile;                // over both depth tiles
  static_assert(2 * kDepthTile >= kSquareTile);
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const Chunk& c = t.chunk;
  const int tid = threadIdx.x;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const int64_t first_row = row_index(p, p.num_heads, c.batch, t.head, t.token(0));
  const double* levels = a.has_decay ? levels_of(a, t.index, t.kv_head) : nullptr;
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;
  const auto grad_row = [&](int r) {
    return view_row<T>(b.params.grad_out, c.batch, t.head, t.token(r));
  };
  const bool inner = a.has_inner && c.key_count > c.key_skip;
  const auto inner_decay = [&](int r, int s) {
    return levels ? exp2_scaled(decay_between(levels, s, t.position(r) - c.key_pos), 0.0f) : 1.0f;
  };
  const auto sees = [&](int r, int s) {
    return r < t.rows && s < c.key_count && is_far(p, t.position(r), c.key_pos + s);
  };

  if (inner) {
    const int64_t at = (t.index * p.num_heads + t.head) * kRows * kRows;
    TileProduct<T> product;
    for (int64_t i0 = 0; i0 < m; i0 += kDepth) {
      __syncthreads();
      for (int e = tid; e < kRows * kDepth; e += kThreads) {
        const int r = e / kDepth, k = e % kDepth;
        const bool inside = i0 + k < m;
        x_tile[r * kDepthStride + k] =
            inside && r < t.rows ? inner_query<T, kGiven>(b, cell, first_row + r, i0 + k) : 0.0f;
        y_tile[r * kDepthStride + k] =
            inside && r >= c.key_skip && r < c.key_count
                ? inner_key<T, kGiven>(a, cell, keys.features(c.key_pos + r), i0 + k)
                : 0.0f;
      }
      __syncthreads();
      product.template multiply<Order::kRowMajor, Order::kColumnMajor>(x_tile, kDepthStride, y_tile,
                                                                       kDepthStride, kDepth);
    }
    __syncthreads();
    product.store(result, kRowStride);
    __syncthreads();
    for (int e = tid; e < kRows * kRows; e += kThreads) {
      const int r = e / kRows, s = e % kRows;
      b.work.inner_p[at + e] = sees(r, s) ? result[r * kRowStride + s] * inner_decay(r, s) *
                                                b.work.inverse[first_row + r]
                                          : 0.0f;
    }
    multiply_rows<T>(x_tile, y_tile, weights, t.rows, c.key_count, dv, grad_row,
                     [&](int s) { return keys.value(c.key_pos + s); });
    for (int e = tid; e < kRows * kRows; e += kThreads) {
      const int r = e / kRows, s = e % kRows;
      float g = 0.0f;
      if (sees(r, s)) {
        g = (weights[r * kRowStride + s] - b.work.delta[first_row + r]) *
            b.work.inverse[first_row + r];
        if (!b.work.unsafe[first_row + r]) g *= inner_decay(r, s);
      }
      b.work.inner_g[at + e] = g;
      weights[r * kRowStride + s] =
          r < t.rows && b.work.unsafe[first_row + r] ? 0.0f : operand<T>(g);
    }
    __syncthreads();
  }

  constexpr int kPerThread = kRows * kRows / kThreads;
  for (int64_t i0 = 0; i0 < m; i0 += kRows) {
    float grad[kPerThread] = {};
    if (inner) {
      TileProduct<T> product;
      for (int s0 = 0; s0 < c.key_count; s0 += kDepth) {
        __syncthreads();
        for (int e = tid; e < kDepth * kRows; e += kThreads) {
          const int s = s0 + e / kRows, i = e % kRows;
          x_tile[e / kRows * kRowStride + i] =
              i0 + i < m && s >= c.key_skip && s < c.key_count
                  ? inner_key<T, kGiven>(a, cell, keys.features(c.key_pos + s), i0 + i)
                  : 0.0f;
        }
        __syncthreads();
        product.template multiply<Order::kRowMajor, Order::kRowMajor>(weights + s0, kRowStride,
                                                                      x_tile, kRowStride, kDepth);
      }
      __syncthreads();
      product.store(result, kRowStride);
      __syncthreads();
      for (int n = 0; n < kPerThread; ++n) {
        const int e = tid + n * kThreads, r = e / kRows, i = e % kRows;
        if (r >= t.rows || i0 + i >= m || b.work.unsafe[first_row + r]) continue;
        const float shift =
            inner_scale<kGiven>(a, cell * m + i0 + i) - saved_scale(b, first_row + r);
        grad[n] = F::backward(result[r * kRowStride + i],
                              a.work.query_features[(first_row + r) * m + i0 + i], shift);
      }
    }
    TileProduct<T> product;
    for (int64_t j0 = 0; j0 < dv; j0 += kDepth) {
      __syncthreads();
      load_depth_tile(x_tile, t.rows, j0, dv, grad_row);
      for (int e = tid; e < kRows * kDepth; e += kThreads) {
        const int i = e / kDepth, j = e % kDepth;
        y_tile[i * kDepthStride + j] =
            i0 + i < m && j0 + j < dv ? a.work.kv[(cell * m + i0 + i) * dv + j0 + j] : 0.0f;
      }
      __syncthreads();
      product.template multiply<Order::kRowMajor, Order::kColumnMajor>(x_tile, kDepthStride, y_tile,
                                                                       kDepthStride, kDepth);
    }
    __syncthreads();
    product.store(result, kRowStride);
    __syncthreads();
    for (int n = 0; n < kPerThread; ++n) {
      const int e = tid + n * kThreads, r = e / kRows, i = e % kRows;
      if (r >= t.rows || i0 + i >= m) continue;
      const int64_t row = first_row + r, feature = cell * m + i0 + i;
      const float scale = a.work.scale[feature];
      if (scale > kNone && b.work.inverse[row] != 0.0f) {
        const float decay = levels ? decay_between(levels, -1, t.position(r) - c.key_pos) : 0.0f;
        const float g = result[r * kRowStride + i] - b.work.delta[row] * a.work.z[feature];
        grad[n] += F::backward(g * b.work.inverse[row], a.work.query_features[row * m + i0 + i],
                               decay, scale - saved_scale(b, row));
      }
      b.work.grad_b[row * m + i0 + i] = grad[n];
    }
    __syncthreads();
  }
}

// --- keys ----------------------------------------------------------------------------------------

// Up to 64 of the keys that a chunk folds; those before the call's first token get no gradient.
struct FoldedTile {
  int64_t index;
  Chunk chunk;
  int kv_head;
  int key0;  // within the chunk's keys
  int keys;
};

__device__ inline bool find_folded_tile(const Attention& a, FoldedTile& t) {
  t.index = blockIdx.x / a.row_tiles;
  t.kv_head = blockIdx.y;
  if (!find_chunk(a, t.index, t.chunk)) return false;
  t.key0 = static_cast<int>(blockIdx.x % a.row_tiles) * kRows;
  const FoldedKeys folded(a, t.chunk, t.index, t.kv_head);
  t.keys = folded.count - t.key0 < kRows ? folded.count - t.key0 : kRows;
  return t.keys > 0 && folded.count > folded.first;
}

// grad_a. Grid: (chunk, key tile), kv head, 64 features.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) grad_key_features(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* y_tile = x_tile + kDepthTile;
  float* result = y_tile + kDepthTile;
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  const int64_t i0 = static_cast<int64_t>(blockIdx.z) * kRows;
  FoldedTile t;
  if (!find_folded_tile(a, t)) return;
  const Chunk& c = t.chunk;
  const int tid = threadIdx.x;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const FoldedKeys folded(a, c, t.index, t.kv_head);
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;
  constexpr int kPerThread = kRows * kRows / kThreads;
  float grad[kPerThread] = {};

  if (a.has_inner && c.query_count > 0) {  // key0 = 0: the chunk has one tile
    TileProduct<T> product;
    for (int g = 0; g < a.group; ++g) {
      const int64_t head = static_cast<int64_t>(t.kv_head) * a.group + g;
      const float* weights = b.work.inner_g + (t.index * p.num_heads + head) * kRows * kRows;
      const int64_t first_row = row_index(p, p.num_heads, c.batch, head, c.query_token);
      for (int r0 = 0; r0 < c.query_count; r0 += kDepth) {
        __syncthreads();
        for (int e = tid; e < kDepth * kRows; e += kThreads) {
          const int r = r0 + e / kRows, i = e % kRows;
          const bool inside = r < c.query_count;
          x_tile[e / kRows * kRowStride + i] =
              inside && i < t.keys ? operand<T>(weights[r * kRows + i]) : 0.0f;
          y_tile[e / kRows * kRowStride + i] =
              inside && i0 + i < m ? inner_query<T, kGiven>(b, cell, first_row + r, i0 + i) : 0.0f;
        }
        __syncthreads();
        product.template multiply<Order::kColumnMajor, Order::kRowMajor>(x_tile, kRowStride, y_tile,
                                                                         kRowStride, kDepth);
      }
    }
    __syncthreads();
    product.store(result, kRowStride);
    __syncthreads();
    for (int n = 0; n < kPerThread; ++n) {
      const int e = tid + n * kThreads, s = e / kRows, i = e % kRows;
      if (s < c.key_skip || s >= t.keys || i0 + i >= m) continue;
      grad[n] = F::backward(result[s * kRowStride + i], keys.features(c.key_pos + s)[i0 + i],
                            -inner_scale<kGiven>(a, cell * m + i0 + i));
    }
  }

  TileProduct<T> product;
  for (int64_t j0 = 0; j0 < dv; j0 += kDepth) {
    __syncthreads();
    load_depth_tile(x_tile, t.keys, j0, dv, [&](int s) {
      return keys.value(folded.pos(t.key0 + s), folded.slot(t.key0 + s));
    });
    for (int e = tid; e < kRows * kDepth; e += kThreads) {
      const int i = e / kDepth, j = e % kDepth;
      y_tile[i * kDepthStride + j] =
          i0 + i < m && j0 + j < dv ? b.work.reverse_kv[(cell * m + i0 + i) * dv + j0 + j] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kColumnMajor>(x_tile, kDepthStride, y_tile,
                                                                     kDepthStride, kDepth);
  }
  __syncthreads();
  product.store(result, kRowStride);
  __syncthreads();
  for (int n = 0; n < kPerThread; ++n) {
    const int e = tid + n * kThreads, i = e % kRows, s = t.key0 + e / kRows;
    if (s < folded.first || s >= t.key0 + t.keys || i0 + i >= m) continue;
    const int64_t pos = folded.pos(s);
    if (pos < c.start_pos) continue;
    const int64_t feature = cell * m + i0 + i;
    const float scale = b.work.reverse_scale[feature];
    if (scale > kNone) {
      grad[n] += F::backward(result[e / kRows * kRowStride + i] - b.work.reverse_z[feature],
                             keys.features(pos)[i0 + i], folded.decay(s), scale);
    }
    const int64_t row = row_index(p, p.num_kv_heads, c.batch, t.kv_head, token_of(c, pos));
    b.work.grad_a[row * m + i0 + i] = grad[n];
  }
}

// Adds the far part of grad_v. Grid: (chunk, key tile), kv head, 64 columns of v.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) grad_far_values(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* y_tile = x_tile + kDepthTile;
  float* result = x_tile;
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kRows;
  FoldedTile t;
  if (!find_folded_tile(a, t)) return;
  const Chunk& c = t.chunk;
  const int tid = threadIdx.x;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const FoldedKeys folded(a, c, t.index, t.kv_head);
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;

  TileProduct<T> product;
  if (a.has_inner && c.query_count > 0) {
    for (int g = 0; g < a.group; ++g) {
      const int64_t head = static_cast<int64_t>(t.kv_head) * a.group + g;
      const float* weights = b.work.inner_p + (t.index * p.num_heads + head) * kRows * kRows;
      for (int r0 = 0; r0 < c.query_count; r0 += kDepth) {
        __syncthreads();
        for (int e = tid; e < kDepth * kRows; e += kThreads) {
          const int r = r0 + e / kRows, i = e % kRows;
          const bool inside = r < c.query_count;
          x_tile[e / kRows * kRowStride + i] =
              inside && i < t.keys ? operand<T>(weights[r * kRows + i]) : 0.0f;
          y_tile[e / kRows * kRowStride + i] =
              inside && j0 + i < dv
                  ? view_row<T>(b.params.grad_out, c.batch, head, c.query_token + r)[j0 + i]
                  : 0.0f;
        }
        __syncthreads();
        product.template multiply<Order::kColumnMajor, Order::kRowMajor>(x_tile, kRowStride, y_tile,
                                                                         kRowStride, kDepth);
      }
    }
  }
  for (int64_t i0 = 0; i0 < m; i0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kRows * kDepth; e += kThreads) {
      const int s = t.key0 + e / kDepth, k = e % kDepth;
      float x = 0.0f;
      if (s >= folded.first && s < t.key0 + t.keys && i0 + k < m) {
        const float scale = b.work.reverse_scale[cell * m + i0 + k];
        const float* key = keys.features(folded.pos(s), folded.slot(s));
        if (scale > kNone) x = F::scaled(key[i0 + k], folded.decay(s), scale);
      }
      x_tile[e / kDepth * kDepthStride + k] = operand<T>(x);
    }
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int i = e / kRows, j = e % kRows;
      y_tile[i * kRowStride + j] =
          i0 + i < m && j0 + j < dv ? b.work.reverse_kv[(cell * m + i0 + i) * dv + j0 + j] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kRowMajor>(x_tile, kDepthStride, y_tile,
                                                                  kRowStride, kDepth);
  }
  __syncthreads();
  product.store(result, kRowStride);
  __syncthreads();
  for (int e = tid; e < t.keys * kRows; e += kThreads) {
    const int s = t.key0 + e / kRows, j = e % kRows;
    const int64_t pos = folded.pos(s);
    if (s < folded.first || pos < c.start_pos || j0 + j >= dv) continue;
    const int64_t row = row_index(p, p.num_kv_heads, c.batch, t.kv_head, token_of(c, pos));
    b.work.grad_v[row * dv + j0 + j] += result[e / kRows * kRowStride + j];
  }
}

// --- unsafe rows ---------------------------------------------------------------------------------

constexpr int kUnsafeShared = 2 * kRows * sizeof(float);

// Adds what the rows left out above give inside their chunk, term by term, one row after another.
// Grid: chunk, kv head.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) grad_unsafe_rows(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* weights = reinterpret_cast<float*>(raw);  // of the keys, over den
  float* slopes = weights + kRows;
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  Chunk c;
  if (!find_chunk(a, blockIdx.x, c) || c.key_count <= c.key_skip) return;
  const int kv_head = blockIdx.y, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const double* levels = a.has_decay ? levels_of(a, blockIdx.x, kv_head) : nullptr;
  const Keys<T> keys{a, c, kv_head};
  using F = Feature<kGiven>;

  for (int n = 0; n < a.group * c.query_count; ++n) {
    const int64_t head = static_cast<int64_t>(kv_head) * a.group + n / c.query_count;
    const int r = n % c.query_count;
    const int64_t row = row_index(p, p.num_heads, c.batch, head, c.query_token + r);
    const float inverse = b.work.inverse[row];
    if (!b.work.unsafe[row] || inverse == 0.0f) continue;
    const int64_t pos = c.query_pos + r;
    const float scale = saved_scale(b, row);
    const float* query = a.work.query_features + row * m;
    const float* grads = b.work.inner_g + ((blockIdx.x * p.num_heads + head) * kRows + r) * kRows;
    const Row<T> grad_out = view_row<T>(b.params.grad_out, c.batch, head, c.query_token + r);
    const auto decay_of = [&](int s) {
      return levels ? decay_between(levels, s, pos - c.key_pos) : 0.0f;
    };
    // The term of key and query feature, without the query's or the key's factor when given.
    const auto term = [&](float x, float y, float decay) {
      if (kGiven) {
        const float e = binary_exponent(x);
        return scale2(x, -e) * F::scaled(y, decay, e - scale);
      }
      return exp2_scaled(x + y + decay, -scale);
    };
    for (int s = warp; s < c.key_count; s += kThreads / 32) {
      float sum = 0.0f;
      if (is_far(p, pos, c.key_pos + s)) {
        const float* key = keys.features(c.key_pos + s);
        for (int64_t i = lane; i < m; i += 32) sum += term(key[i], query[i], decay_of(s));
      }
      sum = warp_sum(sum);
      if (lane == 0) weights[s] = sum * inverse;
      if (lane == 0) slopes[s] = grads[s];  // without decay in such a row, see above
    }
    __syncthreads();
    for (int64_t i = tid; i < m; i += kThreads) {
      float grad_b = 0.0f;
      for (int s = c.key_skip; s < c.key_count; ++s) {
        if (!is_far(p, pos, c.key_pos + s)) continue;
        const float x = keys.features(c.key_pos + s)[i];
        float grad_a;
        if (kGiven) {
          grad_b += slopes[s] * F::scaled(x, decay_of(s), -scale);
          grad_a = slopes[s] * F::scaled(query[i], decay_of(s), -scale);
        } else {
          grad_a = slopes[s] * exp2_scaled(x + query[i] + decay_of(s), -scale);
          grad_b += grad_a;
        }
        if (c.key_pos + s >= c.start_pos) {
          const int64_t at =
              row_index(p, p.num_kv_heads, c.batch, kv_head, token_of(c, c.key_pos + s));
          b.work.grad_a[at * m + i] += grad_a;
        }
      }
      b.work.grad_b[row * m + i] += grad_b;
    }
    for (int64_t e = tid; e < c.key_count * dv; e += kThreads) {
      const int64_t s = e / dv, j = e % dv, key = c.key_pos + s;
      if (key < c.start_pos || weights[s] == 0.0f) continue;
      const int64_t at = row_index(p, p.num_kv_heads, c.batch, kv_head, token_of(c, key));
      b.work.grad_v[at * dv + j] += weights[s] * grad_out[j];
    }
    __syncthreads();
  }
}

}  // namespace dijiang::cuda
