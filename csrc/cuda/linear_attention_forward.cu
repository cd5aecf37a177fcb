// Forward: states before each chunk (attention_phases.h), then rows: their common exponent, their
// sums, the rare rows that underflowed, and the state's window and sink buffers.
#include "cuda/attention_phases.h"
#include "cuda/attention_rows.h"
#include "cuda/fused_forward.h"
#include "cuda/fused_mixed.h"
#include "cuda/fused_near.h"
#include "dijiang/core/linear_attention_cuda.h"

namespace dijiang::cuda {
namespace {

// r of each row: no term's exponent exceeds it. Grid: (chunk, row tile), query head.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) find_row_scales(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* y_tile = x_tile + kDepthTile;
  float* scores = y_tile + kDepthTile;
  const LinearAttentionParams& p = a.params;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  const int64_t row_at = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(row));
  float far = kEmpty, top = kEmpty;
  using F = Feature<kGiven>;

  if (row < t.rows) {
    const float row_decay = a.has_decay ? decay_between(levels_of(a, t.index, t.kv_head), -1,
                                                        t.position(row) - t.chunk.key_pos)
                                        : 0.0f;
    const float* b = a.work.query_features + row_at * p.num_features;
    const int64_t cell = cell_of(a, t.index, t.kv_head);
    for (int64_t i = part; i < p.num_features; i += 4) {
      const int64_t at = cell * p.num_features + i;
      far = fmaxf(far, F::bound(b[i], row_decay) + a.work.scale[at]);
      if (a.has_inner) far = fmaxf(far, F::bound(b[i]) + a.work.chunk_scale[at]);
    }
  }

  const Keys<T> keys{a, t.chunk, t.kv_head};
  const NearTiles near(a, t.chunk, t.kv_head, t.position(0), t.position(t.rows - 1));
  for (int tile = 0; tile < near.count; ++tile) {
    const int size = near.size(tile);
    multiply_rows<T>(
        x_tile, y_tile, scores, t.rows, size, p.headdim,
        [&](int r) { return view_row<T>(p.q, t.chunk.batch, t.head, t.token(r)); },
        [&](int s) { return keys.key(near.pos(tile, s), near.slot(tile, s)); });
    if (row < t.rows) {
      for (int s = part; s < size; s += 4) {
        if (!near.sees(p, t.position(row), tile, s)) continue;
        top = fmaxf(top, ceilf(scores[row * kRowStride + s] * score_scale(p)));
      }
    }
  }
  top = quad_max(top);
  far = fmaxf(quad_max(far), top);
  if (row < t.rows && part == 0) {
    a.work.near_scale[row_at] = top;
    a.work.row_scale[row_at] = far < kNone ? kEmpty : far;
  }
}

// The rows that a pass sums: all of a tile relative to the chunk's M', or a single one relative to
// maxima that look at no later key (docs/numerics.md, exact rows). Both do the same operations in
// the same order: which of them a row got shows in no bit.
struct RowChoice {
  int first;
  int end;
  const float* single_scale;  // M^t by feature; null: the chunk's
};

template <int kColumns>
struct OutputTiles {
  static constexpr int kValueStride = kColumns + 4;
  static constexpr int kValueTile =
      kDepth * kValueStride > kDepthTile ? kDepth* kValueStride : kDepthTile;
  static constexpr int kFloats = kDepthTile + kValueTile + kSquareTile + 2 * kRows;
  float* x_tile;
  float* y_tile;     // also [depth][column] of v and of the state
  float* weights;    // 64 x 64
  float* scales;     // r
  float* row_decay;  // from the last folded key to the row

  __device__ explicit OutputTiles(float* shared)
      : x_tile(shared),
        y_tile(x_tile + kDepthTile),
        weights(y_tile + kValueTile),
        scales(weights + kSquareTile),
        row_decay(scales + kRows) {}
};

// Sums of the chosen rows of a tile over columns [j0, j0 + kColumns) of v: numerators in the
// product, the denominator of row threadIdx.x / 4. tiles.scales is set, a barrier behind it.
template <class T, bool kGiven, int kColumns>
__device__ inline float sum_rows(const Attention& a, const QueryTile& t, const RowChoice& choice,
                                 int64_t j0, OutputTiles<kColumns>& tiles,
                                 TileProduct<T, kColumns>& product) {
  constexpr int kValueStride = OutputTiles<kColumns>::kValueStride;
  float *x_tile = tiles.x_tile, *y_tile = tiles.y_tile, *weights = tiles.weights;
  float *scales = tiles.scales, *row_decay = tiles.row_decay;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  const Chunk& c = t.chunk;
  const int tid = threadIdx.x, row = tid / 4, part = tid % 4;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const int64_t first_row = row_index(p, p.num_heads, c.batch, t.head, t.token(0));
  const float* features = a.work.query_features + first_row * m;
  const double* levels = a.has_decay ? levels_of(a, t.index, t.kv_head) : nullptr;
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;
  const auto chosen = [&](int r) { return r >= choice.first && r < choice.end; };

  if (tid < kRows) {
    row_decay[tid] =
        levels && chosen(tid) ? decay_between(levels, -1, t.position(tid) - c.key_pos) : 0.0f;
  }
  __syncthreads();

  float den = 0.0f;  // of `row`, a quarter
  // product += weights (64 x 64) times `size` values
  const auto add_values = [&](int size, const auto& value) {
    for (int s = part; s < kRows; s += 4) den += weights[row * kRowStride + s];
    for (int s0 = 0; s0 < size; s0 += kDepth) {
      __syncthreads();
      for (int e = tid; e < kDepth * kColumns; e += kThreads) {
        const int s = s0 + e / kColumns, j = e % kColumns;
        y_tile[e / kColumns * kValueStride + j] = s < size && j0 + j < dv ? value(s)[j0 + j] : 0.0f;
      }
      __syncthreads();
      product.template multiply<Order::kRowMajor, Order::kRowMajor>(weights + s0, kRowStride,
                                                                    y_tile, kValueStride, kDepth);
    }
    __syncthreads();
  };

  const NearTiles near(a, c, t.kv_head, t.position(0), t.position(t.rows - 1));
  for (int tile = 0; tile < near.count; ++tile) {
    const int size = near.size(tile);
    multiply_rows<T>(
        x_tile, y_tile, weights, t.rows, size, p.headdim,
        [&](int r) { return view_row<T>(p.q, c.batch, t.head, t.token(r)); },
        [&](int s) { return keys.key(near.pos(tile, s), near.slot(tile, s)); });
    for (int e = tid; e < kRows * kRows; e += kThreads) {
      const int r = e / kRows, s = e % kRows;
      float& w = weights[r * kRowStride + s];
      const bool seen = chosen(r) && s < size && near.sees(p, t.position(r), tile, s);
      w = seen ? operand<T>(exp2_scaled(w * score_scale(p), -scales[r])) : 0.0f;
    }
    __syncthreads();
    add_values(size, [&](int s) { return keys.value(near.pos(tile, s), near.slot(tile, s)); });
  }

  if (a.has_inner && c.key_count > c.key_skip) {
    TileProduct<T> inner;
    for (int64_t i0 = 0; i0 < m; i0 += kDepth) {
      __syncthreads();
      for (int e = tid; e < kRows * kDepth; e += kThreads) {
        const int r = e / kDepth, k = e % kDepth;
        const bool in_features = i0 + k < m;
        const float top = !in_features          ? 0.0f
                          : choice.single_scale ? choice.single_scale[i0 + k]
                                                : a.work.chunk_scale[cell * m + i0 + k];
        const bool has_row = in_features && chosen(r) && scales[r] > kNone;
        const bool has_key = in_features && r >= c.key_skip && r < c.key_count &&
                             is_far(p, t.position(choice.end - 1), c.key_pos + r);
        x_tile[r * kDepthStride + k] =
            has_row ? operand<T>(F::scaled(features[r * m + i0 + k], top - scales[r])) : 0.0f;
        y_tile[r * kDepthStride + k] =
            has_key ? operand<T>(F::scaled(keys.features(c.key_pos + r)[i0 + k], -top)) : 0.0f;
      }
      __syncthreads();
      inner.template multiply<Order::kRowMajor, Order::kColumnMajor>(x_tile, kDepthStride, y_tile,
                                                                     kDepthStride, kDepth);
    }
    __syncthreads();
    inner.store(weights, kRowStride);
    __syncthreads();
    for (int e = tid; e < kRows * kRows; e += kThreads) {
      const int r = e / kRows, s = e % kRows;
      float& w = weights[r * kRowStride + s];
      const bool seen = chosen(r) && s < c.key_count && is_far(p, t.position(r), c.key_pos + s);
      const float decay =
          levels && seen ? decay_between(levels, s, t.position(r) - c.key_pos) : 0.0f;
      w = seen ? operand<T>(levels ? w * exp2_scaled(decay, 0.0f) : w) : 0.0f;
    }
    __syncthreads();
    add_values(c.key_count, [&](int s) { return keys.value(c.key_pos + s); });
  }

  for (int64_t i0 = 0; i0 < m; i0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kRows * kDepth; e += kThreads) {
      const int r = e / kDepth, k = e % kDepth;
      float x = 0.0f;
      if (chosen(r) && i0 + k < m && scales[r] > kNone) {
        const float shift = a.work.scale[cell * m + i0 + k] - scales[r];
        const float y = features[r * m + i0 + k];
        x = levels ? F::scaled(y, row_decay[r], shift) : F::scaled(y, shift);
      }
      x_tile[r * kDepthStride + k] = operand<T>(x);
    }
    for (int e = tid; e < kDepth * kColumns; e += kThreads) {
      const int i = e / kColumns, j = e % kColumns;
      y_tile[i * kValueStride + j] =
          i0 + i < m && j0 + j < dv ? a.work.kv[(cell * m + i0 + i) * dv + j0 + j] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kRowMajor>(x_tile, kDepthStride, y_tile,
                                                                  kValueStride, kDepth);
    for (int k = part; k < kDepth && i0 + k < m; k += 4) {
      den += x_tile[row * kDepthStride + k] * a.work.z[cell * m + i0 + k];
    }
  }

  return quad_sum(den);
}

// Writes the chosen rows' outputs and, in the first block of columns, their statistics; true
// (of a thread's row) where the sum is too small to be trusted.
template <class T, int kColumns>
__device__ inline bool write_rows(const Attention& a, const QueryTile& t, const RowChoice& choice,
                                  int64_t j0, OutputTiles<kColumns>& tiles,
                                  const TileProduct<T, kColumns>& product, float den) {
  // Over the tiles that are no longer needed.
  constexpr int kStride = kColumns + 4;
  float* result = tiles.x_tile;
  static_assert(kRows * kStride <= OutputTiles<kColumns>::kFloats - 2 * kRows);
  const LinearAttentionParams& p = a.params;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  __syncthreads();
  product.store(result, kStride);
  __syncthreads();
  if (row < choice.first || row >= choice.end) return false;
  const int64_t row_at = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(row));
  const float scale = tiles.scales[row];
  const RowEnd end = finish_row(p, den, scale);
  auto* out = static_cast<T*>(p.out) + row_at * p.headdim_v + j0;
  for (int j = part; j < kColumns && j0 + j < p.headdim_v; j += 4) {
    out[j] = from_float<T>(row_output(p, result[row * kStride + j], end, scale));
  }
  if (part == 0 && blockIdx.z == 0) {
    if (p.row_scale) static_cast<float*>(p.row_scale)[row_at] = end.scale;
    if (p.row_sum) static_cast<float*>(p.row_sum)[row_at] = end.sum;
  }
  return a.has_inner && t.chunk.key_count > t.chunk.key_skip && den < kUnsafeSum;
}

// Grid: (chunk, row tile), query head, columns of v.
template <class T, bool kGiven, int kColumns>
__global__ void __launch_bounds__(kThreads) compute_outputs(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  OutputTiles<kColumns> tiles(reinterpret_cast<float*>(raw));
  const LinearAttentionParams& p = a.params;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kColumns;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const int64_t first_row = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(0));
  const int tid = threadIdx.x;
  if (tid < kRows) tiles.scales[tid] = tid < t.rows ? a.work.row_scale[first_row + tid] : kEmpty;
  __syncthreads();
  const RowChoice all{0, t.rows, nullptr};
  TileProduct<T, kColumns> product;
  const float den = sum_rows<T, kGiven, kColumns>(a, t, all, j0, tiles, product);
  const bool unsafe = write_rows<T, kColumns>(a, t, all, j0, tiles, product, den);
  if (a.has_inner && blockIdx.z == 0 && tid % 4 == 0 && tid / 4 < t.rows) {
    a.work.exact[first_row + tid / 4] = unsafe;
  }
}

// One row, term by term: for rows whose sum stays small relative to the largest exponent because
// decay has taken what was large. One column of v a thread.
template <class T, bool kGiven>
__device__ inline void sum_single_row(const Attention& a, const QueryTile& t, int row, int64_t j0,
                                      int columns, float* weights, float* scratch) {
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, j = j0 + threadIdx.x;
  const int64_t dv = j0 + columns < p.headdim_v ? j0 + columns : p.headdim_v;
  const Chunk& c = t.chunk;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const double* levels = a.has_decay ? levels_of(a, t.index, t.kv_head) : nullptr;
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;
  const int64_t row_at = row_index(p, p.num_heads, c.batch, t.head, t.token(row));
  const int64_t pos = t.position(row);
  const Row<T> query = view_row<T>(p.q, c.batch, t.head, t.token(row));
  const float* b = a.work.query_features + row_at * m;
  const float row_decay = levels ? decay_between(levels, -1, pos - c.key_pos) : 0.0f;
  const auto key_decay = [&](int s) {
    return levels ? decay_between(levels, s, pos - c.key_pos) : 0.0f;
  };
  // One warp's score of a near key.
  const auto score = [&](int64_t key_pos) {
    const Row<T> key = keys.key(key_pos);
    float x = 0.0f;
    for (int64_t k = lane; k < p.headdim; k += 32) x = fmaf(query[k], key[k], x);
    return warp_sum(x) * score_scale(p);
  };

  const NearTiles near(a, c, t.kv_head, pos, pos);  // no hard keys: only chunks of many blocks call
  float top = kEmpty;
  for (int tile = 0; tile < near.count; ++tile) {
    for (int s = warp; s < near.size(tile); s += kThreads / 32) {
      if (is_near(p, pos, near.begin(tile) + s)) top = fmaxf(top, score(near.begin(tile) + s));
    }
  }
  for (int64_t i = tid; i < m; i += kThreads) {
    top = fmaxf(top, F::bound(b[i], row_decay) + a.work.scale[cell * m + i]);
  }
  for (int s = c.key_skip + warp; s < c.key_count; s += kThreads / 32) {
    if (!is_far(p, pos, c.key_pos + s)) continue;
    const float* x = keys.features(c.key_pos + s);
    for (int64_t i = lane; i < m; i += 32) {
      const float term =
          kGiven ? F::bound(b[i], key_decay(s)) + F::bound(x[i]) : b[i] + x[i] + key_decay(s);
      top = fmaxf(top, term);
    }
  }
  const float scale = ceilf(block_max(top, scratch));
  if (scale < kNone) return;  // no weight at all: what was written stands

  float num = 0.0f, den = 0.0f;
  const auto add_values = [&](int64_t begin, int size) {
    __syncthreads();
    for (int s = 0; s < size; ++s) {
      den += weights[s];
      if (j < dv) num = fmaf(weights[s], keys.value(begin + s)[j], num);
    }
    __syncthreads();
  };
  __syncthreads();
  for (int tile = 0; tile < near.count; ++tile) {
    const int64_t begin = near.begin(tile);
    for (int s = warp; s < near.size(tile); s += kThreads / 32) {
      const float x = score(begin + s);
      if (lane == 0) weights[s] = is_near(p, pos, begin + s) ? exp2_scaled(x, -scale) : 0.0f;
    }
    add_values(begin, near.size(tile));
  }
  for (int s = warp; s < c.key_count; s += kThreads / 32) {
    float sum = 0.0f;
    if (is_far(p, pos, c.key_pos + s)) {
      const float* x = keys.features(c.key_pos + s);
      for (int64_t i = lane; i < m; i += 32) {
        if (kGiven) {
          const float e = binary_exponent(x[i]);
          sum += scale2(x[i], -e) * F::scaled(b[i], key_decay(s), e - scale);
        } else {
          sum += exp2_scaled(b[i] + x[i] + key_decay(s), -scale);
        }
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) weights[s] = sum;
  }
  add_values(c.key_pos, c.key_count);
  for (int64_t i0 = 0; i0 < m; i0 += kRows) {
    if (tid < kRows) {
      const bool inside = i0 + tid < m;
      weights[tid] =
          inside ? F::scaled(b[i0 + tid], row_decay, a.work.scale[cell * m + i0 + tid] - scale)
                 : 0.0f;
    }
    __syncthreads();
    for (int64_t i = i0; i < i0 + kRows && i < m; ++i) {
      den = fmaf(weights[i - i0], a.work.z[cell * m + i], den);
      if (j < dv) num = fmaf(weights[i - i0], a.work.kv[(cell * m + i) * p.headdim_v + j], num);
    }
    __syncthreads();
  }
  const RowEnd end = finish_row(p, den, scale);
  if (j < dv)
    static_cast<T*>(p.out)[row_at * p.headdim_v + j] =
        from_float<T>(row_output(p, num, end, scale));
  if (tid == 0 && blockIdx.z == 0) {
    if (p.row_scale) static_cast<float*>(p.row_scale)[row_at] = end.scale;
    if (p.row_sum) static_cast<float*>(p.row_sum)[row_at] = end.sum;
  }
}

template <int kColumns>
size_t exact_shared(int64_t features) {
  return (OutputTiles<kColumns>::kFloats + 32 + kRows + features) * sizeof(float);
}

// The rows that compute_outputs marked, one after another. Grid as compute_outputs.
template <class T, bool kGiven, int kColumns>
__global__ void __launch_bounds__(kThreads) compute_exact_rows(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  OutputTiles<kColumns> tiles(reinterpret_cast<float*>(raw));
  float* scratch = reinterpret_cast<float*>(raw) + OutputTiles<kColumns>::kFloats;
  float* weights = scratch + 32;
  float* single_scale = weights + kRows;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, j0 = static_cast<int64_t>(blockIdx.z) * kColumns;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const Chunk& c = t.chunk;
  const int64_t cell = cell_of(a, t.index, t.kv_head);
  const Keys<T> keys{a, c, t.kv_head};
  using F = Feature<kGiven>;
  for (int row = 0; row < t.rows; ++row) {
    const int64_t row_at = row_index(p, p.num_heads, c.batch, t.head, t.token(row));
    if (!a.work.exact[row_at]) continue;
    // M^t and r_t; find_row_scales left the near part.
    const float row_decay = a.has_decay ? decay_between(levels_of(a, t.index, t.kv_head), -1,
                                                        t.position(row) - c.key_pos)
                                        : 0.0f;
    float far = kEmpty;
    for (int64_t i = threadIdx.x; i < m; i += kThreads) {
      float top = kEmpty;
      for (int s = c.key_skip; s < c.key_count; ++s) {
        if (is_far(p, t.position(row), c.key_pos + s)) {
          top = fmaxf(top, F::bound(keys.features(c.key_pos + s)[i]));
        }
      }
      single_scale[i] = top;
      const float b = a.work.query_features[row_at * m + i];
      far = fmaxf(far, F::bound(b) + top);
      far = fmaxf(far, F::bound(b, row_decay) + a.work.scale[cell * m + i]);
    }
    far = block_max(far, scratch);
    const float top = fmaxf(far, a.work.near_scale[row_at]);
    __syncthreads();
    if (threadIdx.x < kRows) tiles.scales[threadIdx.x] = top < kNone ? kEmpty : top;
    __syncthreads();
    const RowChoice single{row, row + 1, single_scale};
    TileProduct<T, kColumns> product;
    const float den = sum_rows<T, kGiven, kColumns>(a, t, single, j0, tiles, product);
    const bool unsafe = write_rows<T, kColumns>(a, t, single, j0, tiles, product, den);
    if (block_max(unsafe ? 1.0f : 0.0f, scratch) == 0.0f) continue;
    sum_single_row<T, kGiven>(a, t, row, j0, kColumns, weights, scratch);
    __syncthreads();
  }
}

// The final state's buffers in the inputs' dtype. Grid: (sequence, slot or sink), kv head.
template <class T>
__global__ void __launch_bounds__(kThreads) write_buffers(Attention a) {
  const LinearAttentionParams& p = a.params;
  const int64_t slots = 2 * p.window, rows = slots + p.sinks;
  const int64_t seq = blockIdx.x / rows, place = blockIdx.x % rows;
  const int head = blockIdx.y;
  const Sequence s = find_sequence(a, seq);
  const int64_t end = s.start_pos + s.length;
  const int64_t cell = seq * p.num_kv_heads + head;
  const bool is_sink = place >= slots;
  // The newest position in this place; a place that has none yet gets zeros.
  const int64_t pos =
      is_sink ? place - slots : end - 1 - ((end - 1 - place) % slots + slots) % slots;
  const bool exists = pos >= 0 && pos < end;

  const auto copy = [&](const ConstView& input, const void* given, void* to, int64_t dim,
                        int64_t at) {
    if (!to) return;
    for (int64_t k = threadIdx.x; k < dim; k += kThreads) {
      T x = from_float<T>(0.0f);
      if (exists && pos >= s.start_pos) {
        const Row<T> row = view_row<T>(input, s.batch, head, s.begin + (pos - s.start_pos));
        x = row.data[k * row.stride];
      } else if (exists) {
        x = static_cast<const T*>(given)[at * dim + k];
      }
      static_cast<T*>(to)[at * dim + k] = x;
    }
  };
  if (is_sink) {
    const int64_t at = cell * p.sinks + place - slots;
    copy(p.k, p.initial.sink_k, p.final.sink_k, p.headdim, at);
    copy(p.v, p.initial.sink_v, p.final.sink_v, p.headdim_v, at);
    return;
  }
  const int64_t at = cell * slots + place;
  copy(p.k, p.initial.window_k, p.final.window_k, p.headdim, at);
  copy(p.v, p.initial.window_v, p.final.window_v, p.headdim_v, at);
  if (p.final.window_decay && threadIdx.x == 0) {
    float x = 0.0f;
    if (exists && pos >= s.start_pos && p.log_decay) {
      x = static_cast<const float*>(
          p.log_decay)[s.batch * p.log_decay_stride_batch + head * p.log_decay_stride_head +
                       (s.begin + pos - s.start_pos) * p.log_decay_stride_seq];
    } else if (exists && pos < s.start_pos && p.initial.window_decay) {
      x = static_cast<const float*>(p.initial.window_decay)[at];
    }
    static_cast<float*>(p.final.window_decay)[at] = x;
  }
}

static __global__ void write_lengths(Attention a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= a.params.num_seqs) return;
  const Sequence s = find_sequence(a, n);
  a.params.final.length[n] = s.start_pos + s.length;
}

template <class T, bool kGiven, int kColumns>
void launch_rows(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  const dim3 grid(static_cast<unsigned>(a.max_chunks * a.row_tiles),
                  static_cast<unsigned>(p.num_heads), column_blocks(p.headdim_v, kColumns));
  DIJIANG_LAUNCH((compute_outputs<T, kGiven, kColumns>), grid, kThreads,
                 OutputTiles<kColumns>::kFloats * sizeof(float), stream, a);
  if (a.has_inner) {
    const size_t shared = exact_shared<kColumns>(p.num_features);
    allow_shared(compute_exact_rows<T, kGiven, kColumns>, shared);
    DIJIANG_LAUNCH((compute_exact_rows<T, kGiven, kColumns>), grid, kThreads, shared, stream, a);
  }
}

void launch_lengths(const Attention& a, cudaStream_t stream) {
  if (!a.params.final.length) return;
  DIJIANG_LAUNCH(write_lengths, dim3(static_cast<unsigned>(ceil_div(a.params.num_seqs, 128))), 128,
                 0, stream, a);
}

// The rows of all heads: their scales, then what they sum.
template <class T, bool kGiven>
void launch_heads(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  if (fused_near_applies(p)) {
    launch_fused_near(a, stream);
    return;
  }
  const auto tiles = static_cast<unsigned>(a.max_chunks * a.row_tiles);
  const auto heads = static_cast<unsigned>(p.num_heads);
  constexpr int shared = (2 * kDepthTile + kSquareTile) * sizeof(float);
  DIJIANG_LAUNCH((find_row_scales<T, kGiven>), dim3(tiles, heads), kThreads, shared, stream, a);
  if (p.headdim_v <= 64) {
    launch_rows<T, kGiven, 64>(a, stream);
  } else {
    launch_rows<T, kGiven, 128>(a, stream);
  }
}

template <class T, bool kGiven>
cudaError_t forward(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  if (fused_mixed_applies(p)) {
    launch_chunks<T>(a, stream);
    launch_fused_mixed(a, stream);
  } else {
    launch_states<T, kGiven>(a, stream);
    if (p.num_heads > 0) launch_heads<T, kGiven>(a, stream);
  }
  const bool wants_buffers = p.final.window_k || p.final.sink_k;
  if (wants_buffers && 2 * p.window + p.sinks > 0) {
    const auto rows = static_cast<unsigned>(p.num_seqs * (2 * p.window + p.sinks));
    DIJIANG_LAUNCH((write_buffers<T>), dim3(rows, static_cast<unsigned>(p.num_kv_heads)), kThreads,
                   0, stream, a);
  }
  launch_lengths(a, stream);
  return launch_status();
}

template <class T>
cudaError_t forward_kind(const Attention& a, cudaStream_t stream) {
  return a.params.kind == FeatureKind::kGiven ? forward<T, true>(a, stream)
                                              : forward<T, false>(a, stream);
}

// Not without elements: its grid would be empty.
bool takes_fused(const LinearAttentionParams& p) {
  return p.num_heads > 0 && p.headdim_v > 0 && fused_forward_applies(p);
}

Attention plan_forward(const LinearAttentionParams& p, Arena& arena) {
  return fused_mixed_applies(p) ? plan_fused_mixed(p, arena) : plan_attention(p, arena);
}

// All results but the lengths are empty.
cudaError_t forward_without_heads(const LinearAttentionParams& p, cudaStream_t stream) {
  Attention a{};
  a.params = p;
  if (!p.segments) a.params.num_seqs = p.batch;
  if (a.params.num_seqs > 0) launch_lengths(a, stream);
  return launch_status();
}

}  // namespace

size_t linear_attention_forward_workspace(const LinearAttentionParams& params) {
  if (params.num_kv_heads == 0) return 0;
  if (takes_fused(params)) return fused_forward_workspace(params);
  Arena arena(nullptr);
  plan_forward(params, arena);
  return arena.used();
}

cudaError_t linear_attention_forward(const LinearAttentionParams& params, void* workspace,
                                     cudaStream_t stream) {
  if (const cudaError_t error = check_attention(params); error != cudaSuccess) return error;
  if (params.num_kv_heads == 0) return forward_without_heads(params, stream);
  if (takes_fused(params)) {
    const cudaError_t error = fused_forward(params, workspace, stream);
    const cudaError_t shared = launch_status();
    return shared != cudaSuccess ? shared : error;
  }
  Arena arena(workspace);
  const Attention a = plan_forward(params, arena);
  if (a.params.num_seqs == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32: return forward_kind<float>(a, stream);
    case DType::kBFloat16: return forward_kind<__nv_bfloat16>(a, stream);
    case DType::kFloat16: return forward_kind<__half>(a, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace dijiang::cuda
