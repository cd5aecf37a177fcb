// Gradients of the near terms: FlashAttention's backward with the shared denominator.
//
//   P_ts = 2^(s_ts - r_t) / den_t,  dS_ts = P_ts (do_t . v_s - delta_t)
//   dq_t += scale dS_ts k_s,  dk_s += scale dS_ts q_t,  dv_s += P_ts do_t
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/backward_layout.h"

namespace dijiang::cuda {

template <int kColumns>
struct NearShared {
  static constexpr int kStride = kColumns + 4;
  static constexpr int kOperand = kDepth * kStride > kDepthTile ? kDepth* kStride : kDepthTile;
  static constexpr int kFloats = kDepthTile + kOperand + 2 * kSquareTile;
  static_assert(kRows * kStride <= kFloats);
  float* x_tile;
  float* y_tile;
  float* weights;  // 64 x 64
  float* other;    // 64 x 64
  float* result;   // (64, kStride): over all of them, once they are no longer needed

  __device__ explicit NearShared(float* shared)
      : x_tile(shared),
        y_tile(x_tile + kDepthTile),
        weights(y_tile + kOperand),
        other(weights + kSquareTile),
        result(x_tile) {}
};

// Statistics of the rows of a tile of queries.
struct RowStatistics {
  const float* scale;
  const float* inverse;
  const float* delta;
};

__device__ inline RowStatistics row_statistics(const Backward& b, int64_t first_row) {
  return {static_cast<const float*>(b.params.forward.row_scale) + first_row,
          b.work.inverse + first_row, b.work.delta + first_row};
}

// weights (64 queries x 64 keys) = P, or dS with kScores. `sees(r, s)` masks.
template <class T, bool kScores, class RowQ, class RowK, class RowO, class RowV, class Sees>
__device__ inline void near_weights(const LinearAttentionParams& p, float* x_tile, float* y_tile,
                                    float* weights, float* other, int rows, int keys, RowQ q_row,
                                    RowK k_row, RowO grad_row, RowV v_row,
                                    const RowStatistics& statistics, Sees sees) {
  multiply_rows<T>(x_tile, y_tile, weights, rows, keys, p.headdim, q_row, k_row);
  if constexpr (kScores) {
    multiply_rows<T>(x_tile, y_tile, other, rows, keys, p.headdim_v, grad_row, v_row);
  }
  for (int e = threadIdx.x; e < kRows * kRows; e += kThreads) {
    const int r = e / kRows, s = e % kRows;
    float w = 0.0f;
    if (r < rows && s < keys && sees(r, s)) {
      w = exp2_scaled(weights[r * kRowStride + s] * score_scale(p), -statistics.scale[r]) *
          statistics.inverse[r];
      if constexpr (kScores) w *= other[r * kRowStride + s] - statistics.delta[r];
    }
    weights[r * kRowStride + s] = operand<T>(w);
  }
  __syncthreads();
}

// Loads [depth][column] of rows row_of(k0 + depth), columns [j0, j0 + kColumns).
template <int kColumns, class RowOf>
__device__ inline void load_columns(float* tile, int k0, int rows, int64_t j0, int64_t width,
                                    RowOf row_of) {
  for (int e = threadIdx.x; e < kDepth * kColumns; e += kThreads) {
    const int k = e / kColumns, j = e % kColumns;
    tile[k * (kColumns + 4) + j] = k0 + k < rows && j0 + j < width ? row_of(k0 + k)[j0 + j] : 0.0f;
  }
}

// near_q of a row tile. Grid: (chunk, row tile), query head, columns of q.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) grad_near_queries(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const NearShared<kColumns> tiles(reinterpret_cast<float*>(raw));
  constexpr int kStride = NearShared<kColumns>::kStride;
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kColumns;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  const Chunk& c = t.chunk;
  const Keys<T> keys{a, c, t.kv_head};
  const int64_t first_row = row_index(p, p.num_heads, c.batch, t.head, t.token(0));
  const RowStatistics statistics = row_statistics(b, first_row);

  TileProduct<T, kColumns> product;
  const NearTiles near(a, c, t.kv_head, t.position(0), t.position(t.rows - 1));
  for (int tile = 0; tile < near.count; ++tile) {
    const int size = near.size(tile);
    const auto key_row = [&](int s) { return keys.key(near.pos(tile, s), near.slot(tile, s)); };
    near_weights<T, true>(
        p, tiles.x_tile, tiles.y_tile, tiles.weights, tiles.other, t.rows, size,
        [&](int r) { return view_row<T>(p.q, c.batch, t.head, t.token(r)); }, key_row,
        [&](int r) { return view_row<T>(b.params.grad_out, c.batch, t.head, t.token(r)); },
        [&](int s) { return keys.value(near.pos(tile, s), near.slot(tile, s)); }, statistics,
        [&](int r, int s) { return near.sees(p, t.position(r), tile, s); });
    for (int s0 = 0; s0 < size; s0 += kDepth) {
      __syncthreads();
      load_columns<kColumns>(tiles.y_tile, s0, size, j0, p.headdim, key_row);
      __syncthreads();
      product.template multiply<Order::kRowMajor, Order::kRowMajor>(tiles.weights + s0, kRowStride,
                                                                    tiles.y_tile, kStride, kDepth);
    }
    __syncthreads();
  }
  __syncthreads();
  product.store(tiles.result, kStride);
  __syncthreads();
  for (int e = threadIdx.x; e < t.rows * kColumns; e += kThreads) {
    const int r = e / kColumns, j = e % kColumns;
    if (j0 + j < p.headdim) {
      b.work.near_q[(first_row + r) * p.headdim + j0 + j] =
          tiles.result[r * kStride + j] * static_cast<float>(p.scale);
    }
  }
}

// The columns of k, then of v, that blockIdx.z stands for.
template <int kColumns>
struct KeyColumns {
  bool for_values;
  int64_t j0, width;
  float factor;  // of what is summed

  __device__ explicit KeyColumns(const LinearAttentionParams& p) {
    const int of_keys = static_cast<int>((p.headdim + kColumns - 1) / kColumns);
    for_values = static_cast<int>(blockIdx.z) >= of_keys;
    j0 = static_cast<int64_t>(blockIdx.z - (for_values ? of_keys : 0)) * kColumns;
    width = for_values ? p.headdim_v : p.headdim;
    factor = for_values ? 1.0f : static_cast<float>(p.scale);
  }
};

// Adds to the product, (keys, columns), what the queries of a head at positions [begin, end) give
// `count` keys or their values. sees(position, key) masks. Barriers after the last use of the
// tiles.
template <class T, int kColumns, class RowK, class RowV, class Sees>
__device__ inline void add_key_gradients(const Backward& b, const Chunk& c,
                                         const NearShared<kColumns>& tiles,
                                         const KeyColumns<kColumns>& columns, int head,
                                         int64_t begin, int64_t end, int count, RowK k_row,
                                         RowV v_row, Sees sees, TileProduct<T, kColumns>& product) {
  const LinearAttentionParams& p = b.forward.params;
  for (int64_t q0 = begin; q0 < end; q0 += kRows) {
    const int rows = static_cast<int>(end - q0 < kRows ? end - q0 : kRows);
    const auto q_row = [&](int r) { return view_row<T>(p.q, c.batch, head, token_of(c, q0 + r)); };
    const auto grad_row = [&](int r) {
      return view_row<T>(b.params.grad_out, c.batch, head, token_of(c, q0 + r));
    };
    const auto mask = [&](int r, int s) { return sees(q0 + r, s); };
    const RowStatistics statistics =
        row_statistics(b, row_index(p, p.num_heads, c.batch, head, token_of(c, q0)));
    if (columns.for_values) {
      near_weights<T, false>(p, tiles.x_tile, tiles.y_tile, tiles.weights, tiles.other, rows, count,
                             q_row, k_row, grad_row, v_row, statistics, mask);
    } else {
      near_weights<T, true>(p, tiles.x_tile, tiles.y_tile, tiles.weights, tiles.other, rows, count,
                            q_row, k_row, grad_row, v_row, statistics, mask);
    }
    for (int r0 = 0; r0 < rows; r0 += kDepth) {
      __syncthreads();
      if (columns.for_values) {
        load_columns<kColumns>(tiles.y_tile, r0, rows, columns.j0, columns.width, grad_row);
      } else {
        load_columns<kColumns>(tiles.y_tile, r0, rows, columns.j0, columns.width, q_row);
      }
      __syncthreads();
      product.template multiply<Order::kColumnMajor, Order::kRowMajor>(
          tiles.weights + r0 * kRowStride, kRowStride, tiles.y_tile, NearShared<kColumns>::kStride,
          kDepth);
    }
    __syncthreads();
  }
}

// near_k and the near part of grad_v for a tile of the call's tokens as keys: from the queries of
// their own block of the window and the next. Grid: (chunk, row tile), kv head, columns of k, then
// of v. With kSinks the keys are the sinks, the queries one row tile and the result a part.
template <class T, int kColumns, bool kSinks>
__global__ void __launch_bounds__(kThreads) grad_near_keys(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const NearShared<kColumns> tiles(reinterpret_cast<float*>(raw));
  constexpr int kStride = NearShared<kColumns>::kStride;
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const KeyColumns<kColumns> columns(p);
  QueryTile t;
  if (!find_query_tile<!kSinks>(a, t)) return;
  const Chunk& c = t.chunk;
  const Keys<T> keys{a, c, t.kv_head};
  const auto sees = [&](int64_t query, int64_t key) {
    return kSinks ? key <= query : key >= p.sinks && is_near(p, query, key);
  };

  const int64_t all_keys = !kSinks ? t.rows : p.sinks < c.end_pos ? p.sinks : c.end_pos;
  for (int64_t key0 = 0; key0 < all_keys; key0 += kRows) {  // once, but for many sinks
    const int64_t first_key = kSinks ? key0 : t.position(0);
    const int size = static_cast<int>(all_keys - key0 < kRows ? all_keys - key0 : kRows);
    int64_t query_end = t.position(t.rows - 1) + 1;
    if (!kSinks) {
      query_end = ((first_key + size - 1) / p.window + 2) * p.window;
      if (query_end > c.end_pos) query_end = c.end_pos;
    }
    TileProduct<T, kColumns> product;
    for (int g = 0; g < (kSinks ? 1 : a.group); ++g) {
      add_key_gradients<T, kColumns>(
          b, c, tiles, columns, t.head + g, t.position(0), query_end, size,
          [&](int s) { return keys.key(first_key + s); },
          [&](int s) { return keys.value(first_key + s); },
          [&](int64_t query, int s) { return sees(query, first_key + s); }, product);
    }
    __syncthreads();
    product.store(tiles.result, kStride);
    __syncthreads();
    for (int e = threadIdx.x; e < size * kColumns; e += kThreads) {
      const int s = e / kColumns;
      const int64_t j = columns.j0 + e % kColumns;
      if (j >= columns.width) continue;
      const float x = tiles.result[s * kStride + e % kColumns] * columns.factor;
      if (kSinks) {
        const int64_t at = (static_cast<int64_t>(blockIdx.x) * p.num_heads + t.head) * p.sinks;
        b.work.sinks[(at + key0 + s) * (p.headdim + p.headdim_v) +
                     (columns.for_values ? p.headdim : 0) + j] = x;
      } else {
        const int64_t row = row_index(p, p.num_kv_heads, c.batch, t.kv_head, t.token(s));
        (columns.for_values ? b.work.grad_v : b.work.near_k)[row * columns.width + j] = x;
      }
    }
    __syncthreads();
  }
}

// Adds the parts of the sinks' gradients up, in order. Grid: (sequence, sink), kv head.
static __global__ void __launch_bounds__(kThreads) sum_sink_gradients(Backward b) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t seq = blockIdx.x / p.sinks, sink = blockIdx.x % p.sinks;
  const int64_t first = a.work.first_chunk[seq], last = a.work.first_chunk[seq + 1];
  if (first == last) return;
  const Chunk& c = a.work.chunks[first];
  if (sink < c.start_pos || sink >= c.end_pos) return;
  const int64_t width = p.headdim + p.headdim_v;
  const int64_t row = row_index(p, p.num_kv_heads, c.batch, blockIdx.y, token_of(c, sink));
  const int64_t parts = (last - first) * a.row_tiles * a.group;
  const auto part = [&](int64_t n, int64_t j) {  // n: (tile, head of the group)
    const int64_t tile = first * a.row_tiles + n / a.group;
    const int row0 = static_cast<int>(tile % a.row_tiles) * kRows;
    if (n >= parts || row0 >= a.work.chunks[tile / a.row_tiles].query_count) return 0.0f;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * a.group + n % a.group;
    return b.work.sinks[((tile * p.num_heads + head) * p.sinks + sink) * width + j];
  };
  constexpr int kUnder = 8;  // loads under way
  for (int64_t j = threadIdx.x; j < width; j += kThreads) {
    float sum = 0.0f;
    for (int64_t n = 0; n < parts; n += kUnder) {
      float x[kUnder];
      DIJIANG_UNROLL()
      for (int i = 0; i < kUnder; ++i) x[i] = part(n + i, j);
      DIJIANG_UNROLL()
      for (int i = 0; i < kUnder; ++i) sum += x[i];
    }
    if (j < p.headdim) {
      b.work.near_k[row * p.headdim + j] += sum;
    } else {
      b.work.grad_v[row * p.headdim_v + j - p.headdim] += sum;
    }
  }
}

}  // namespace dijiang::cuda
