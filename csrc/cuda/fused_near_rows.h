// One block's work of the fused near forward: 64 queries of one head, four warps of 16, walk over
// the tiles of their near keys as FlashAttention-2 does. Scores, weights and outputs exist only as
// fragments; two stages of keys and values lie in shared memory, so that the copies of the next
// tile run beside the products of this one.
//
// A row's weights are 2^(score - r), r = the ceil of the largest score so far of those keys that
// the row sees. So a later r scales what was summed by an exact power of two; a key that a row does
// not see has a weight of exactly 0, whatever it holds, and shows in no bit of the row.
#pragma once

#include <type_traits>

#include "cuda/attention_rows.h"
#include "cuda/fused_seen.h"

namespace dijiang::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMultiprocessorShared = 164 * 1024;
#else
constexpr int kMultiprocessorShared = 228 * 1024;
#endif

// kValueDim: columns of v that a block takes.
template <class T_, int kHeadDim_, int kValueDim_>
struct NearShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
  // Weights are T. float16 has few exponents: 1 is brought near its upper end.
  static constexpr float kLift = std::is_same_v<T, __half> ? 14.0f : 0.0f;
  // Keys, then values, two stages each. Queries lie in the second stage of the keys at first.
  static constexpr int kKeyTile = kTileRows * kHeadDim, kValueTile = kTileRows * kValueDim;
  static constexpr int kSharedBytes = 2 * (kKeyTile + kValueTile) * static_cast<int>(sizeof(T));
  // On a multiprocessor: what registers are to allow, where shared memory does.
  static constexpr int kWanted = kHeadDim + kValueDim <= 128 ? 4 : 3;
  static constexpr int kBlocks =
      kWanted * (kSharedBytes + 1024) <= kMultiprocessorShared ? kWanted : 2;
};

// The walk of one block over the near keys of its queries, whatever is made of them.
template <class Shape>
struct NearWalk {
  using T = typename Shape::T;
  static constexpr int kD = Shape::kHeadDim, kV = Shape::kValueDim;
  static constexpr int kGroup = 32;         // keys that are weighed together
  static constexpr int64_t kFar = 1 << 30;  // behind all sinks

  const Attention& a;
  T* shared;
  // What QueryTile and NearTiles say, in few registers. The chunk stays in memory: its cache is as
  // near as that of spilled registers.
  const Chunk* chunk;
  int head, kv_head, first_row, rows;  // first_row: of the chunk's queries
  int64_t window_begin;
  const int32_t* slots;
  int sinks, hard, window;  // keys of each kind
  int first_column;
  int lane, row0;
  // Of the lane's first row; the other one is 8 behind.
  int row_position;  // no larger than any number of sinks needs
  int window_row;    // its own key's place among those of the window
  int low[2];        // the first key of the window that each of them sees, likewise
  unsigned query[kD / 16][4];

  __device__ __forceinline__ NearWalk(const Attention& attention, const QueryTile& t, char* raw)
      : a(attention),
        shared(reinterpret_cast<T*>(raw)),
        chunk(attention.work.chunks + t.index),
        head(t.head),
        kv_head(t.kv_head),
        first_row(t.row0),
        rows(t.rows),
        first_column(static_cast<int>(blockIdx.z) * kV),
        lane(threadIdx.x % 32),
        row0(threadIdx.x / 32 * 16) {
    const int64_t first = t.position(0);
    const NearTiles near(a, t.chunk, t.kv_head, first, t.position(t.rows - 1));
    window_begin = near.window_begin;
    slots = near.slots;
    sinks = static_cast<int>(near.sinks);
    hard = near.hard;
    window = static_cast<int>(near.window_end - near.window_begin);
    const int row = row0 + lane / 4;
    row_position = static_cast<int>(first < kFar ? first : kFar) + row;
    window_row = static_cast<int>(first - window_begin) + row;
    low[0] = low[1] = 0;
    if (a.params.window == 0) return;
    const int64_t w = a.params.window, block = first / w * w;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int64_t inside = first - block + row + 8 * half;
      // 64 rows reach into one more block at most when a block has as many.
      const int64_t blocks = w >= kTileRows ? inside >= w : int(inside) / int(w);
      low[half] = static_cast<int>(block + (blocks - 1) * w - window_begin);
    }
  }

  // --- tiles -------------------------------------------------------------------------------------

  // Sinks, hard keys and the window have tiles of their own, in this order. first: of the tile's
  // keys, counted among those of its kind.
  struct Tile {
    bool is_hard, is_window;
    int first, size;
  };
  __device__ __forceinline__ static int tiles_of(int count) {
    return (count + kTileRows - 1) / kTileRows;
  }
  __device__ __forceinline__ Tile find_tile(int index) const {
    const int behind_sinks = index - tiles_of(sinks), behind_hard = behind_sinks - tiles_of(hard);
    Tile tile;
    tile.is_window = behind_hard >= 0;
    tile.is_hard = behind_sinks >= 0 && !tile.is_window;
    tile.first = kTileRows * (tile.is_window ? behind_hard : tile.is_hard ? behind_sinks : index);
    const int left = (tile.is_window ? window : tile.is_hard ? hard : sinks) - tile.first;
    tile.size = left < kTileRows ? left : kTileRows;
    return tile;
  }

  __device__ __forceinline__ T* keys(int tile) const { return shared + tile % 2 * Shape::kKeyTile; }
  __device__ __forceinline__ T* values(int tile) const {
    return shared + 2 * Shape::kKeyTile + tile % 2 * Shape::kValueTile;
  }

  __device__ __forceinline__ int headdim() const { return static_cast<int>(a.params.headdim); }
  // Of the block's columns of v those that there are.
  __device__ __forceinline__ int value_width() const {
    return static_cast<int>(a.params.headdim_v) - first_column;
  }

  // Into the place of the second tile's keys: the same rows, of which each warp fills its own.
  __device__ __forceinline__ void load_queries() {
    const int row = row0 + lane % 16 < rows ? row0 + lane % 16 : 0;
    const int token = chunk->query_token + first_row + row;
    copy_warp_rows<kD>(keys(1), view_row<T>(a.params.q, chunk->batch, head, token).data, 0, row0,
                       rows, headdim());
  }
  __device__ __forceinline__ void take_queries() {
    DIJIANG_UNROLL()
    for (int k = 0; k < kD; k += 16) load_left<kD>(query[k / 16], keys(1), row0, k);
    __syncwarp();
  }

  // The position of the hard key that the lane copies of a tile. Read a tile early: nothing waits.
  __device__ __forceinline__ int hard_position(int index) const {
    const Tile tile = find_tile(index);
    const int row = row0 + lane % 16;
    return tile.is_hard && row < tile.size ? slots[tile.first + row] : 0;
  }

  // Lanes 0 to 15 find the warp's rows of k, the others those of v. Rows behind the end: zeros, as
  // far as groups reach.
  __device__ __forceinline__ void load_tile(int index, int position) {
    const Tile tile = find_tile(index);
    const int row = row0 + lane % 16;
    if (row0 >= (tile.size + kGroup - 1) / kGroup * kGroup) return;
    const auto* from = static_cast<const T*>(a.params.k.data);
    if (row < tile.size) {
      const Keys<T> all{a, *chunk, kv_head};
      const int key = tile.first + row, slot = tile.is_hard ? key : -1;
      const int64_t pos = tile.is_window ? window_begin + key : tile.is_hard ? position : key;
      from = lane < 16 ? all.key(pos, slot).data : all.value(pos, slot).data + first_column;
    }
    copy_warp_rows<kD>(keys(index), from, 0, row0, tile.size, headdim());
    copy_warp_rows<kV>(values(index), from, 16, row0, tile.size, value_width());
  }

  // --- what rows see -----------------------------------------------------------------------------

  // Of a tile, the keys [first, last] that the lane's rows see.
  struct Seen {
    int first[2], last[2];

    __device__ __forceinline__ bool sees(int half, int s) const {
      return s >= first[half] && s <= last[half];
    }
    // Whether any of the warp's rows sees one of the keys [s, s + kGroup), and whether all see all
    // of [s, s + count).
    __device__ __forceinline__ bool any(int s) const {
      const int end = s + kGroup;
      return __any_sync(~0u, (first[0] < end && last[0] >= s) || (first[1] < end && last[1] >= s));
    }
    __device__ __forceinline__ bool all(int s, int count) const {
      const int end = s + count - 1;
      return __all_sync(~0u, sees(0, s) && sees(0, end) && sees(1, s) && sees(1, end));
    }
  };
  __device__ __forceinline__ Seen find_seen(const Tile& tile) const {
    Seen seen;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int self = (tile.is_window ? window_row : row_position) + 8 * half - tile.first;
      const int first = low[half] - tile.first, end = tile.size - 1;
      seen.last[half] = tile.is_hard || self > end ? end : self;
      seen.first[half] = tile.is_window && first > 0 ? first : 0;
    }
    return seen;
  }

  // Scores of the queries and of keys [s, s + kGroup) of a tile, base 2.
  __device__ __forceinline__ void find_scores(float (&x)[kGroup / 8][4], const T* key_tile,
                                              int s) const {
    clear(x);
    DIJIANG_UNROLL()
    for (int k = 0; k < kD; k += 16) {
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup; n += 16) {
        unsigned b[4];
        load_right<kD>(b, key_tile + s * kD, n, k);  // s apart: then addresses are the loop's own
        multiply_add_16<T>(x[n / 8], x[n / 8 + 1], query[k / 16], b);
      }
    }
    const float scale = score_scale(a.params);
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup / 8; ++n) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) x[n][e] *= scale;
    }
  }

  // --- the walk ----------------------------------------------------------------------------------

  // add(tile) for each tile, with the warp's queries in `query`; not by warps without any.
  template <class Add>
  __device__ __forceinline__ void walk(Add add) {
    const bool has_rows = row0 < rows;
    const int count = tiles_of(sinks) + tiles_of(hard) + tiles_of(window);
    load_queries();
    load_tile(0, hard_position(0));
    int position = hard_position(1);
    wait_copies();
    __syncthreads();
    take_queries();
    DIJIANG_UNROLL(1)
    for (int tile = 0;; ++tile) {
      const bool more = tile + 1 < count;
      if (more) load_tile(tile + 1, position);
      position = hard_position(tile + 2);
      if (has_rows) add(tile);
      if (!more) break;
      // The next tile is there, and nobody reads this one any more.
      wait_copies();
      __syncthreads();
    }
  }
};

// The forward's rows.
template <class Shape>
struct NearRows : NearWalk<Shape> {
  using Walk = NearWalk<Shape>;
  using typename Walk::Seen;
  using typename Walk::T;
  using typename Walk::Tile;
  using Walk::a;
  using Walk::chunk;
  using Walk::first_column;
  using Walk::first_row;
  using Walk::head;
  using Walk::kGroup;
  using Walk::kV;
  using Walk::lane;
  using Walk::row0;
  using Walk::rows;

  float out[kV / 8][4];
  float top[2] = {-INFINITY, -INFINITY};    // r
  float sum[2] = {0.0f, 0.0f};              // of the weights: a lane's part
  float den[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of what the products see of them: den[0], den[2]

  __device__ __forceinline__ NearRows(const Attention& attention, const QueryTile& t, char* raw)
      : Walk(attention, t, raw) {
    clear(out);
  }

  // --- sums --------------------------------------------------------------------------------------

  __device__ __forceinline__ void add_tile(int index) {
    const Tile tile = this->find_tile(index);
    const Seen seen = this->find_seen(tile);
    DIJIANG_UNROLL(1)
    for (int s = 0; s < tile.size; s += kGroup) {
      if (seen.any(s)) add_group(this->keys(index), this->values(index), s, seen);
    }
  }

  __device__ __forceinline__ void add_group(const T* key_tile, const T* value_tile, int s,
                                            const Seen& seen) {
    float x[kGroup / 8][4];
    this->find_scores(x, key_tile, s);
    const bool full = seen.all(s, kGroup);
    if (!full) {
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          const int key = s + 8 * n + 2 * (lane % 4) + e % 2;
          if (!seen.sees(e / 2, key)) x[n][e] = -INFINITY;
        }
      }
    }
    raise_top(x);
    weigh(x);
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup; n += 16) {
      unsigned w[4];
      pack_left<T>(w, x[n / 8], x[n / 8 + 1]);
      const unsigned ones = pack<T>(1.0f, 1.0f);
      multiply_add<T>(den, w, ones, ones);
      add_seen<kV>(out, w, value_tile, s + n, full || seen.all(s + n, 16),
                   [&](int half, int key) { return seen.sees(half, key); });
    }
  }

  __device__ __forceinline__ void raise_top(const float (&x)[kGroup / 8][4]) {
    float next[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
      }
      next[half] = fmaxf(top[half], ceilf(quad_max(most)));
    }
    raise_to(next);
  }
  // The new r, and all sums relative to it.
  __device__ __forceinline__ void raise_to(const float (&next)[2]) {
    float factor[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      factor[half] = power_of_two(fmaxf(top[half] - next[half], -127.0f));  // of -127: 0
      top[half] = next[half];
    }
    if (!__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) return;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      sum[half] *= factor[half];
      den[2 * half] *= factor[half];
      DIJIANG_UNROLL()
      for (int n = 0; n < kV / 8; ++n) {
        out[n][2 * half] *= factor[half];
        out[n][2 * half + 1] *= factor[half];
      }
    }
  }

  // Scores to weights, 2^kLift times.
  __device__ __forceinline__ void weigh(float (&x)[kGroup / 8][4]) {
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const float base = top[half] == -INFINITY ? 0.0f : top[half];
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        DIJIANG_UNROLL()
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          // Not base - kLift at once: beyond 2^24 it would lose the lift.
          const float below = x[n][e] - base;
          x[n][e] = fast_exp2(Shape::kLift > 0.0f ? below + Shape::kLift : below);
          sum[half] += x[n][e];
        }
      }
    }
  }

  // --- rows --------------------------------------------------------------------------------------

  // One of the lane's two rows: outputs and statistics.
  __device__ __forceinline__ void write_row(int half) {
    const LinearAttentionParams& p = a.params;
    const int row = row0 + lane / 4 + 8 * half;
    const bool mine = row < rows;
    const int first = chunk->query_token + first_row + row0 + lane / 4;
    const int64_t at = row_index(p, p.num_heads, chunk->batch, head, first) + 8 * half;
    const float weights = quad_sum(sum[half]);
    float scale = top[half], down = power_of_two(-Shape::kLift);
    if (scale < kNone) {  // nothing but scores that weigh nothing; of -infinity alone, NaN
      down = scale == -INFINITY ? NAN : 0.0f;
      scale = kEmpty;
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kV / 8; ++n) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 2; ++e) out[n][2 * half + e] *= down;
    }
    float y[kV / 8][2];
    take_outputs(p, y, out, half, den[2 * half] * down, scale);
    store_row(static_cast<T*>(p.out) + at * p.headdim_v + first_column, y,
              mine ? this->value_width() : 0);
    if (!p.row_scale && !p.row_sum) return;
    if (!mine || lane % 4 != 0 || first_column != 0) return;
    // The backward has weights as float: so is their sum.
    const RowEnd saved = finish_row(p, weights * down, scale);
    if (p.row_scale) static_cast<float*>(p.row_scale)[at] = saved.scale;
    if (p.row_sum) static_cast<float*>(p.row_sum)[at] = saved.sum;
  }

  __device__ __forceinline__ void run() {
    this->walk([&](int tile) { add_tile(tile); });
    write_rows();
  }
  __device__ __forceinline__ void write_rows() {
    if (row0 >= rows) return;
    write_row(0);
    write_row(1);
  }
};

}  // namespace dijiang::cuda
