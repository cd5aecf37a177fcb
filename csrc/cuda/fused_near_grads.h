// What the blocks of the fused near backward do: FlashAttention's backward with the formulas of
// backward_near.h, on fragments. 64 queries against the tiles of their near keys for dq; 64 keys
// against the tiles of the queries that see them for dk and dv, whether the keys are those of the
// window, sinks or hard keys. Nothing is added by two blocks at once. Of tiles of 256 columns a
// block has 128 columns of the gradients: blockIdx.z says which, and weights are computed again.
#pragma once

#include "cuda/backward_layout.h"
#include "cuda/fused_near_rows.h"

namespace dijiang::cuda {

// P = 2^(score - scale) inverse.
struct RowNumbers {
  float scale, inverse, delta;

  __device__ __forceinline__ float weight(float score) const {
    return inverse == 0.0f ? 0.0f : fast_exp2(score - scale) * inverse;
  }
};
__device__ __forceinline__ RowNumbers row_numbers(const Backward& b, int64_t row) {
  return {static_cast<const float*>(b.params.forward.row_scale)[row], b.work.inverse[row],
          b.work.delta[row]};
}

// --- dq ------------------------------------------------------------------------------------------

constexpr int kOwnColumns = 128;

template <class Shape>
struct NearQueryGrads : NearWalk<Shape> {
  using Walk = NearWalk<Shape>;
  using typename Walk::Seen;
  using typename Walk::T;
  using typename Walk::Tile;
  using Walk::kD;
  using Walk::kGroup;
  using Walk::kV;
  using Walk::lane;
  using Walk::row0;
  using Walk::rows;
  static constexpr int kOwn = kD < kOwnColumns ? kD : kOwnColumns;
  static constexpr int kPieces = kD / kOwn;  // blocks a tile
  // Whether registers have room for the gradients of the outputs; else they have a tile.
  static constexpr bool kHolds = kV <= 128;
  static constexpr int kSharedBytes =
      Shape::kSharedBytes + (kHolds ? 0 : Shape::kValueTile * static_cast<int>(sizeof(T)));

  const Backward& b;
  int64_t first_at;  // of the tile's first query, in buffers over them
  int first_own;     // column
  RowNumbers numbers[2];
  unsigned grad[kHolds ? kV / 16 : 1][4];  // of the outputs
  float sum[kOwn / 8][4];

  __device__ __forceinline__ NearQueryGrads(const Backward& backward, const QueryTile& t, char* raw)
      : Walk(backward.forward, t, raw), b(backward), first_own(blockIdx.z * kOwn) {
    const LinearAttentionParams& p = b.forward.params;
    this->first_column = 0;
    first_at = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(0));
    clear(sum);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      numbers[half] = row < rows ? row_numbers(b, first_at + row) : RowNumbers{0.0f, 0.0f, 0.0f};
    }
  }

  // Each warp's own rows; to registers through the place of the second tile's values.
  __device__ __forceinline__ T* grad_tile() const {
    return kHolds ? this->values(1) : this->values(0) + 2 * Shape::kValueTile;
  }
  __device__ __forceinline__ void take_grads() {
    const int row = row0 + lane % 16 < rows ? row0 + lane % 16 : 0;
    const int token = this->chunk->query_token + this->first_row + row;
    copy_warp_rows<kV>(grad_tile(),
                       view_row<T>(b.params.grad_out, this->chunk->batch, this->head, token).data,
                       0, row0, rows, this->value_width());
    wait_copies();
    __syncwarp();
    if (!kHolds) return;
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) load_left<kV>(grad[kHolds ? k / 16 : 0], grad_tile(), row0, k);
    __syncwarp();
  }

  __device__ __forceinline__ void add_group(const T* keys, const T* values, int s,
                                            const Seen& seen) {
    float x[kGroup / 8][4], dp[kGroup / 8][4];
    this->find_scores(x, keys, s);
    clear(dp);
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) {
      auto& left = grad[kHolds ? k / 16 : 0];
      if (!kHolds) load_left<kV>(left, grad_tile(), row0, k);
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup; n += 16) {
        unsigned v[4];
        load_right<kV>(v, values, s + n, k);
        multiply_add_16<T>(dp[n / 8], dp[n / 8 + 1], left, v);
      }
    }
    const bool full = seen.all(s, kGroup);
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup / 8; ++n) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const RowNumbers& row = numbers[e / 2];
        const bool sees = full || seen.sees(e / 2, s + 8 * n + 2 * (lane % 4) + e % 2);
        x[n][e] = sees ? row.weight(x[n][e]) * (dp[n][e] - row.delta) : 0.0f;
      }
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup; n += 16) {
      unsigned w[4];
      pack_left<T>(w, x[n / 8], x[n / 8 + 1]);
      add_seen<kD, kOwn>(sum, w, keys + first_own, s + n, full || seen.all(s + n, 16),
                         [&](int half, int key) { return seen.sees(half, key); });
    }
  }

  __device__ __forceinline__ void run() {
    take_grads();
    this->walk([&](int index) {
      const Tile tile = this->find_tile(index);
      const Seen seen = this->find_seen(tile);
      DIJIANG_UNROLL(1)
      for (int s = 0; s < tile.size; s += kGroup) {
        if (seen.any(s)) add_group(this->keys(index), this->values(index), s, seen);
      }
    });
    const auto scale = static_cast<float>(b.forward.params.scale);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      if (row >= rows) continue;
      auto* to =
          reinterpret_cast<float2*>(b.work.near_q + (first_at + row) * this->headdim() + first_own);
      DIJIANG_UNROLL()
      for (int n = 0; n < kOwn / 8; ++n) {
        if (first_own + 8 * n >= this->headdim()) continue;
        to[4 * n + lane % 4] = make_float2(sum[n][2 * half] * scale, sum[n][2 * half + 1] * scale);
      }
    }
  }
};

// --- dk, dv --------------------------------------------------------------------------------------

template <class T_, int kHeadDim, int kValueDim>
struct NearGradShape {
  using T = T_;
  static constexpr int kD = kHeadDim, kV = kValueDim;
  // In pieces of kOwnColumns, those of dk first; else a block has all columns.
  static constexpr bool kSplit = kD > kOwnColumns || kV > kOwnColumns;
  static constexpr int kPieces = kSplit ? (kD + kV) / kOwnColumns : 1;  // blocks a tile
  static_assert(!kSplit || kD == kV);
  // Keys and values, two stages of queries and gradients, of two stages of rows their numbers.
  static constexpr int kKeyTile = kTileRows * kD, kValueTile = kTileRows * kV;
  static constexpr int kSharedBytes = 3 * (kKeyTile + kValueTile) * static_cast<int>(sizeof(T)) +
                                      2 * kTileRows * static_cast<int>(sizeof(RowNumbers));
  static constexpr int kBlocks = kD + kV <= 128 ? 3 : 2;
};

// 64 keys of a kv head, 16 a warp; a lane has parts of two of them.
template <class Shape>
struct NearKeyGrads {
  using T = typename Shape::T;
  static constexpr int kD = Shape::kD, kV = Shape::kV;
  static constexpr bool kSplit = Shape::kSplit;

  const Backward& b;
  const Chunk& chunk;
  int kv_head;
  T* key_tile;
  T* value_tile;
  T* query_tiles;
  T* grad_tiles;
  RowNumbers* numbers;
  int lane, row0;
  // The queries that see the lane's keys, by position; last < first: none do.
  int64_t first[2], last[2];
  // In pieces: dk alone, the block's own columns of either.
  static constexpr int kKeyTiles = kSplit ? kOwnColumns / 8 : kD / 8;
  static constexpr int kValueTiles = kSplit ? 1 : kV / 8;
  float dk[kKeyTiles][4], dv[kValueTiles][4];
  int first_own;  // column
  bool owns_keys;

  __device__ __forceinline__ NearKeyGrads(const Backward& backward, const Chunk& c, int head,
                                          char* raw)
      : b(backward), chunk(c), kv_head(head), lane(threadIdx.x % 32), row0(threadIdx.x / 32 * 16) {
    key_tile = reinterpret_cast<T*>(raw);
    value_tile = key_tile + Shape::kKeyTile;
    query_tiles = value_tile + Shape::kValueTile;
    grad_tiles = query_tiles + 2 * Shape::kKeyTile;
    numbers = reinterpret_cast<RowNumbers*>(grad_tiles + 2 * Shape::kValueTile);
    const auto column = static_cast<int>(blockIdx.z) * kOwnColumns;
    owns_keys = column < kD;
    first_own = owns_keys ? column : column - kD;
    clear(dk);
    clear(dv);
  }
  __device__ __forceinline__ int row(int half) const { return row0 + lane / 4 + 8 * half; }
  __device__ __forceinline__ int headdim() const {
    return static_cast<int>(b.forward.params.headdim);
  }
  __device__ __forceinline__ int headdim_v() const {
    return static_cast<int>(b.forward.params.headdim_v);
  }

  // The warp's rows of keys and values: place_of(r) is where key r of `count` stands.
  template <class PlaceOf>
  __device__ __forceinline__ void load_keys(int count, PlaceOf place_of) {
    const int r = row0 + lane % 16;
    const auto* from = static_cast<const T*>(b.forward.params.k.data);
    if (r < count) {
      const Keys<T> keys{b.forward, chunk, kv_head};
      const Place at = place_of(r);
      from = lane < 16 ? keys.key(at.pos, at.slot).data : keys.value(at.pos, at.slot).data;
    }
    copy_warp_rows<kD>(key_tile, from, 0, row0, count, headdim());
    copy_warp_rows<kV>(value_tile, from, 16, row0, count, headdim_v());
  }

  __device__ __forceinline__ void load_queries(int stage, int head, int64_t begin, int count) {
    const LinearAttentionParams& p = b.forward.params;
    const int r = row0 + lane % 16 < count ? row0 + lane % 16 : 0;
    const int64_t token = token_of(chunk, begin + r);
    const T* from = lane < 16 ? view_row<T>(p.q, chunk.batch, head, token).data
                              : view_row<T>(b.params.grad_out, chunk.batch, head, token).data;
    copy_warp_rows<kD>(query_tiles + stage * Shape::kKeyTile, from, 0, row0, count, headdim());
    copy_warp_rows<kV>(grad_tiles + stage * Shape::kValueTile, from, 16, row0, count, headdim_v());
    const int mine = threadIdx.x;
    if (mine >= kTileRows) return;
    const int64_t at = row_index(p, p.num_heads, chunk.batch, head, token_of(chunk, begin));
    numbers[stage * kTileRows + mine] =
        mine < count ? row_numbers(b, at + mine) : RowNumbers{0.0f, 0.0f, 0.0f};
  }

  // Of a tile of queries at [begin, begin + count).
  __device__ __forceinline__ void add_tile(int stage, int64_t begin, int count) {
    const T* queries = query_tiles + stage * Shape::kKeyTile;
    const T* grads = grad_tiles + stage * Shape::kValueTile;
    int low[2], high[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int64_t from = first[half] - begin, to = last[half] - begin;
      low[half] = from < 0 ? 0 : from < count ? static_cast<int>(from) : count;
      high[half] = to < 0 ? -1 : to < count ? static_cast<int>(to) : count - 1;
    }
    const auto sees = [&](int half, int query) {
      return query >= low[half] && query <= high[half];
    };
    DIJIANG_UNROLL(1)
    for (int s = 0; s < count; s += 16) {
      const bool any = (low[0] < s + 16 && high[0] >= s && low[0] <= high[0]) ||
                       (low[1] < s + 16 && high[1] >= s && low[1] <= high[1]);
      if (!__any_sync(~0u, any)) continue;
      const bool whole =
          __all_sync(~0u, sees(0, s) && sees(0, s + 15) && sees(1, s) && sees(1, s + 15));
      float x[2][4], dp[2][4];
      clear(x);
      clear(dp);
      DIJIANG_UNROLL()
      for (int k = 0; k < kD; k += 16) {
        unsigned left[4], right[4];
        load_left<kD>(left, key_tile, row0, k);
        load_right<kD>(right, queries, s, k);
        multiply_add_16<T>(x[0], x[1], left, right);
      }
      if (!kSplit || owns_keys) {
        DIJIANG_UNROLL()
        for (int k = 0; k < kV; k += 16) {
          unsigned left[4], right[4];
          load_left<kV>(left, value_tile, row0, k);
          load_right<kV>(right, grads, s, k);
          multiply_add_16<T>(dp[0], dp[1], left, right);
        }
      }
      const float scale = score_scale(b.forward.params);
      DIJIANG_UNROLL()
      for (int n = 0; n < 2; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          const int query = s + 8 * n + 2 * (lane % 4) + e % 2;
          const RowNumbers row = numbers[stage * kTileRows + query];
          const bool visible = whole || sees(e / 2, query);
          const float w = visible ? row.weight(x[n][e] * scale) : 0.0f;
          x[n][e] = w;
          dp[n][e] = visible ? w * (dp[n][e] - row.delta) : 0.0f;
        }
      }
      unsigned w[4];
      if constexpr (kSplit) {
        if (owns_keys) {
          pack_left<T>(w, dp[0], dp[1]);
        } else {
          pack_left<T>(w, x[0], x[1]);
        }
        add_seen<kD, kOwnColumns>(dk, w, (owns_keys ? queries : grads) + first_own, s, whole, sees);
      } else {
        pack_left<T>(w, x[0], x[1]);
        add_seen<kV>(dv, w, grads, s, whole, sees);
        pack_left<T>(w, dp[0], dp[1]);
        add_seen<kD>(dk, w, queries, s, whole, sees);
      }
    }
  }

  // All queries at [begin, end) of `heads` heads from first_head on. Barriers before the first tile
  // is read, which also complete load_keys, and after the last one.
  __device__ __forceinline__ void add_queries(int first_head, int heads, int64_t begin,
                                              int64_t end) {
    const int a_head = static_cast<int>((end - begin + kTileRows - 1) / kTileRows);
    const auto begin_of = [&](int tile) { return begin + tile % a_head * kTileRows; };
    const auto size_of = [&](int tile) {
      const int64_t left = end - begin_of(tile);
      return static_cast<int>(left < kTileRows ? left : kTileRows);
    };
    const auto load = [&](int tile) {
      load_queries(tile % 2, first_head + tile / a_head, begin_of(tile), size_of(tile));
    };
    const int tiles = heads * a_head;
    if (tiles > 0) load(0);
    wait_copies();
    __syncthreads();
    DIJIANG_UNROLL(1)
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) load(tile + 1);
      add_tile(tile % 2, begin_of(tile), size_of(tile));
      wait_copies();
      __syncthreads();
    }
  }

  // give(half, column, x, is_key) for pairs of columns: x, and the next one's.
  template <class Give>
  __device__ __forceinline__ void give_row(int half, Give give) const {
    const bool is_key = !kSplit || owns_keys;
    const int first_of_block = kSplit ? first_own : 0, width = is_key ? headdim() : headdim_v();
    const float scale = is_key ? static_cast<float>(b.forward.params.scale) : 1.0f;
    DIJIANG_UNROLL()
    for (int n = 0; n < kKeyTiles; ++n) {
      const int column = first_of_block + 8 * n;
      if (column >= width) continue;
      give(is_key, column + 2 * (lane % 4),
           make_float2(dk[n][2 * half] * scale, dk[n][2 * half + 1] * scale));
    }
    if (kSplit) return;
    DIJIANG_UNROLL()
    for (int n = 0; n < kValueTiles; ++n) {
      if (8 * n >= headdim_v()) continue;
      give(false, 8 * n + 2 * (lane % 4), make_float2(dv[n][2 * half], dv[n][2 * half + 1]));
    }
  }
  __device__ __forceinline__ float2* place_of(bool is_key, int64_t pos, int column) const {
    const LinearAttentionParams& p = b.forward.params;
    const int64_t at = row_index(p, p.num_kv_heads, chunk.batch, kv_head, token_of(chunk, pos));
    return reinterpret_cast<float2*>(is_key ? b.work.near_k + at * headdim() + column
                                            : b.work.grad_v + at * headdim_v() + column);
  }

  // Adds the lane's part of a row to the gradients of the call's key at a position, and forgets it.
  __device__ __forceinline__ void flush(int half, int64_t pos) {
    if (pos >= chunk.start_pos) {
      give_row(half, [&](bool is_key, int column, float2 x) {
        float2* to = place_of(is_key, pos, column);
        const float2 before = *to;
        *to = make_float2(before.x + x.x, before.y + x.y);
      });
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kKeyTiles; ++n) dk[n][2 * half] = dk[n][2 * half + 1] = 0.0f;
    DIJIANG_UNROLL()
    for (int n = 0; n < kValueTiles; ++n) dv[n][2 * half] = dv[n][2 * half + 1] = 0.0f;
  }
};

}  // namespace dijiang::cuda
