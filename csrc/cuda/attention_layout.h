// How a call of linear attention is cut into chunks, and what lies in the workspace.
//
// A chunk is kChunk tokens, or with a window w a whole number of blocks of w. Chunk c of a sequence
// handles the queries at positions [c C, c C + C) and folds the keys at [c C - w, c C + C - w): of
// those keys a query sees the blocks two or more before its own (all up to itself when w = 0), and
// all earlier keys through the state before the chunk. So w only shifts the keys, and for w >= 64
// (C = w) no chunk has a far key of its own. With hard keys a chunk is one block (C = w), and in
// the place of its keys it folds those that leave for good when the next block begins: hard_keys.h.
#pragma once

#include "cuda/tile_product.h"
#include "dijiang/core/linear_attention.h"

namespace dijiang::cuda {

constexpr int kChunk = 64;
constexpr float kUnsafeSum = 8.673617379884035e-19f;  // 2^-60: see docs/numerics.md

struct Chunk {
  int seq;          // of num_seqs
  int batch;        // row of q, k, v
  int query_token;  // of the first query, in the batch row
  int query_count;
  int64_t query_pos;  // in the sequence
  int64_t key_pos;    // of the first key folded here
  int key_count;
  int key_skip;       // of those keys the first so many are sinks: they are not folded
  int64_t start_pos;  // of the call's first token: earlier keys lie in the given state
  int64_t end_pos;    // behind the call's last token
  int start_token;
  int64_t table_row;  // of block 0, in the table of hard keys: see row_of
};

// A key by its position; slot: the one that held it when it lay in none of the call's tokens.
struct Place {
  int32_t pos, slot;
};

// How the fused mixed forward cuts the chunks of each sequence among blocks that walk over them,
// and over (num_seqs, parts but for the last, kv heads) the state of a part's keys alone.
struct FoldParts {
  int count;   // of a sequence
  int chunks;  // of a part
  float* kv;   // (.., num_features, headdim_v)
  float* z;    // (.., num_features)
  float* scale;
  double* decay;  // of the part, base 2
};

// Dense float buffers over tokens have the shape (batch, heads, seqlen, ...), those over chunks
// (chunk, kv heads, ...).
struct Workspace {
  int32_t* first_chunk;  // (num_seqs + 1): prefix sums of the sequences' chunk counts
  Chunk* chunks;
  double* levels;         // (chunk, kv heads, chunk_size + window): base-2 decay summed from
                          // key_pos on, the position's own included; null: no decay
  float* query_features;  // base-2 exponents (values when given)
  float* key_features;
  float* window_features;  // (num_seqs, kv heads, 2 window, num_features)
  float* chunk_scale;      // (.., num_features): M of the chunk's own keys without decay
  float* local_scale;      // (.., num_features): M of the chunk's keys at its end
  float* scale;            // (.., num_features): M of the state before the chunk
  float* kv;               // (.., num_features, headdim_v): local, then before the chunk
  float* z;                // (.., num_features): likewise
  float* row_scale;        // r over query tokens
  float* near_scale;       // its near part
  uint8_t* exact;          // rows that underflowed, over query tokens
  // With hard keys, over (kv heads, cache_rows, ..): what holds when a row's block begins.
  int32_t* chosen;       // (.., most slots): positions in the slots; null: given
  const int32_t* slots;  // the same
  int32_t* slot_count;   // filled ones
  Place* left;           // (.., window): the keys that leave then
  float* left_decay;     // (.., window): base-2 decay from each to the end of its last block
  int32_t* left_count;
  float* cache_features;  // (num_seqs, all slots, num_features): of the given state
  // Of the fused mixed forward, which has no features and no kv in memory.
  char* query_maps;  // (heads): omega as tiles in shared memory have it
  void* states;      // (.., 1 or 2, headdim_v, num_features): kv before the chunk, likewise
  FoldParts parts;
};

struct Attention {
  LinearAttentionParams params;
  Workspace work;
  int group;  // query heads a kv head
  int chunk_size;
  int row_tiles;       // tiles of 64 queries a chunk
  int64_t max_chunks;  // at most; the true number is first_chunk[num_seqs]
  bool has_decay;
  bool has_given_window;  // keys before the call may lie in window and sink buffers
  bool has_inner;         // chunks have far keys of their own
  int64_t cache_rows;     // of the table of hard keys, a kv head
};

// Hands out 256-byte aligned pieces; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    if (count <= 0) return nullptr;
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The chunks, with their table and decay.
inline Attention plan_chunks(const LinearAttentionParams& p, Arena& arena) {
  Attention a{};
  a.params = p;
  if (!p.segments) a.params.num_seqs = p.batch;
  const int64_t seqs = a.params.num_seqs;
  a.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const bool one_block = p.window >= kChunk || p.cache.most > 0;
  a.chunk_size = static_cast<int>(p.window == 0 ? kChunk
                                  : one_block   ? p.window
                                                : kChunk / p.window * p.window);
  a.row_tiles = static_cast<int>(ceil_div(a.chunk_size, kRows));
  a.max_chunks = p.batch * p.seqlen / a.chunk_size + 2 * seqs;
  a.has_decay = p.log_decay != nullptr && p.num_features > 0;
  a.has_given_window = p.initial.length != nullptr && (p.window > 0 || p.sinks > 0);
  a.has_inner = p.num_features > 0 && (p.window == 0 || p.window < a.chunk_size);

  const int64_t cells = a.max_chunks * p.num_kv_heads;
  Workspace& w = a.work;
  w.first_chunk = arena.take<int32_t>(seqs + 1);
  w.chunks = arena.take<Chunk>(a.max_chunks);
  w.levels = arena.take<double>(a.has_decay ? cells * (a.chunk_size + p.window) : 0);
  return a;
}

// The table of hard keys, and the lists of those that leave.
inline void plan_hard_keys(Attention& a, Arena& arena) {
  const LinearAttentionParams& p = a.params;
  if (p.cache.most == 0) return;
  a.cache_rows = p.cache_rows();
  const int64_t rows = p.num_kv_heads * a.cache_rows;
  const bool kept = p.given || p.chosen;  // by the caller
  Workspace& w = a.work;
  int32_t* own = arena.take<int32_t>(kept ? 0 : rows * p.cache.most);
  w.chosen = p.given ? nullptr : p.chosen ? p.chosen : own;
  w.slots = p.given ? p.given : w.chosen;
  w.slot_count = arena.take<int32_t>(rows);
  w.left = arena.take<Place>(rows * p.window);
  w.left_decay = arena.take<float>(rows * p.window);
  w.left_count = arena.take<int32_t>(rows);
}

inline Attention plan_attention(const LinearAttentionParams& p, Arena& arena) {
  Attention a = plan_chunks(p, arena);
  const int64_t m = p.num_features, seqs = a.params.num_seqs;
  const int64_t cells = a.max_chunks * p.num_kv_heads;
  Workspace& w = a.work;
  w.query_features = arena.take<float>(p.batch * p.num_heads * p.seqlen * m);
  w.key_features = arena.take<float>(p.batch * p.num_kv_heads * p.seqlen * m);
  w.window_features =
      arena.take<float>(a.has_given_window ? seqs * p.num_kv_heads * 2 * p.window * m : 0);
  w.chunk_scale = arena.take<float>(cells * m);
  w.local_scale = arena.take<float>(cells * m);
  w.scale = arena.take<float>(cells * m);
  w.kv = arena.take<float>(cells * m * p.headdim_v);
  w.z = arena.take<float>(cells * m);
  w.row_scale = arena.take<float>(p.batch * p.num_heads * p.seqlen);
  w.near_scale = arena.take<float>(p.batch * p.num_heads * p.seqlen);
  w.exact = arena.take<uint8_t>(p.batch * p.num_heads * p.seqlen);
  plan_hard_keys(a, arena);
  const bool resumed = p.cache.most > 0 && p.initial.cache_position != nullptr;
  w.cache_features = arena.take<float>(resumed ? seqs * p.cache.all(p.num_kv_heads) * m : 0);
  return a;
}

// A strided row of elements.
template <class T>
struct Row {
  const T* data;
  int64_t stride;
  __device__ float operator[](int64_t i) const { return to_float(data[i * stride]); }
};

template <class T>
__device__ inline Row<T> view_row(const ConstView& view, int64_t batch, int64_t head,
                                  int64_t token) {
  return {static_cast<const T*>(view.data) + batch * view.stride_batch + head * view.stride_head +
              token * view.stride_seq,
          view.stride_dim};
}

__device__ inline int64_t token_of(const Chunk& c, int64_t pos) {
  return c.start_token + (pos - c.start_pos);
}

// Index of a row of a dense (batch, heads, seqlen) buffer.
__device__ inline int64_t row_index(const LinearAttentionParams& p, int64_t heads, int64_t batch,
                                    int64_t head, int64_t token) {
  return (batch * heads + head) * p.seqlen + token;
}

// Row of a block in the tables of hard keys.
__device__ inline int64_t row_of(const Attention& a, const Chunk& c, int kv_head, int64_t block) {
  return kv_head * a.cache_rows + c.table_row + block;
}

// Keys, values, their features and decay by position: from the call's tensors, or, before its
// first token, from the state's sinks, window and slots.
template <class T>
struct Keys {
  const Attention& a;
  const Chunk& c;
  int head;

  __device__ int64_t slot(int64_t pos) const {
    const int64_t slots = 2 * a.params.window;
    return (static_cast<int64_t>(c.seq) * a.params.num_kv_heads + head) * slots + pos % slots;
  }
  // Whether a key before the call lies in a slot of the state, rather than in its window.
  __device__ bool in_slot(int64_t pos, int64_t hard) const {
    const int64_t block = (c.start_pos - 1) / (a.params.window > 0 ? a.params.window : 1);
    return hard >= 0 && pos < (block - 1) * a.params.window;
  }
  __device__ int64_t hard_slot(int64_t hard) const {
    return a.params.cache.slot(c.seq, head, a.params.num_kv_heads) + hard;
  }
  __device__ Row<T> from_state(int64_t pos, int64_t hard, const void* sinks, const void* slots,
                               const void* window, int64_t dim) const {
    const int64_t n = a.params.sinks;
    const int64_t cell = static_cast<int64_t>(c.seq) * a.params.num_kv_heads + head;
    if (in_slot(pos, hard)) return {static_cast<const T*>(slots) + hard_slot(hard) * dim, 1};
    if (pos < n) return {static_cast<const T*>(sinks) + (cell * n + pos) * dim, 1};
    return {static_cast<const T*>(window) + slot(pos) * dim, 1};
  }
  // hard: the slot of a hard key; -1: of a key that is none.
  __device__ Row<T> key(int64_t pos, int64_t hard = -1) const {
    const LinearAttentionParams& p = a.params;
    if (pos >= c.start_pos) return view_row<T>(p.k, c.batch, head, token_of(c, pos));
    return from_state(pos, hard, p.initial.sink_k, p.initial.cache_k, p.initial.window_k,
                      p.headdim);
  }
  __device__ Row<T> value(int64_t pos, int64_t hard = -1) const {
    const LinearAttentionParams& p = a.params;
    if (pos >= c.start_pos) return view_row<T>(p.v, c.batch, head, token_of(c, pos));
    return from_state(pos, hard, p.initial.sink_v, p.initial.cache_v, p.initial.window_v,
                      p.headdim_v);
  }
  __device__ const float* features(int64_t pos, int64_t hard = -1) const {
    const LinearAttentionParams& p = a.params;
    if (pos >= c.start_pos) {
      return a.work.key_features +
             row_index(p, p.num_kv_heads, c.batch, head, token_of(c, pos)) * p.num_features;
    }
    if (in_slot(pos, hard)) return a.work.cache_features + hard_slot(hard) * p.num_features;
    return a.work.window_features + slot(pos) * p.num_features;
  }
  __device__ float log_decay(int64_t pos) const {
    const LinearAttentionParams& p = a.params;
    if (pos >= c.start_pos) {
      return static_cast<const float*>(
          p.log_decay)[c.batch * p.log_decay_stride_batch + head * p.log_decay_stride_head +
                       token_of(c, pos) * p.log_decay_stride_seq];
    }
    const auto* window = static_cast<const float*>(p.initial.window_decay);
    return window ? window[slot(pos)] : 0.0f;
  }
};

// Cell of a (chunk, kv head).
__device__ inline int64_t cell_of(const Attention& a, int64_t chunk, int kv_head) {
  return chunk * a.params.num_kv_heads + kv_head;
}
__device__ inline const double* levels_of(const Attention& a, int64_t chunk, int kv_head) {
  return a.work.levels + cell_of(a, chunk, kv_head) * (a.chunk_size + a.params.window);
}

// Decay summed over (from, to], positions counted from key_pos; -1 is before the first.
__device__ inline float decay_between(const double* levels, int64_t from, int64_t to) {
  return static_cast<float>(levels[to] - (from < 0 ? 0.0 : levels[from]));
}

// The block's chunk; false when there is none.
__device__ inline bool find_chunk(const Attention& a, int64_t index, Chunk& c) {
  if (index >= a.work.first_chunk[a.params.num_seqs]) return false;
  c = a.work.chunks[index];
  return true;
}

__device__ inline bool is_far(const LinearAttentionParams& p, int64_t query, int64_t key) {
  if (key < p.sinks) return false;
  return p.window == 0 ? key <= query : key / p.window + 2 <= query / p.window;
}
__device__ inline bool is_near(const LinearAttentionParams& p, int64_t query, int64_t key) {
  if (key > query) return false;
  return key < p.sinks || (p.window > 0 && key / p.window + 1 >= query / p.window);
}

// The keys that a chunk folds: s in [first, count), in the order of time but for hard keys that
// leave their slots, which come first.
struct FoldedKeys {
  const Chunk& c;
  const double* levels;
  const Place* left = nullptr;
  const float* left_decay = nullptr;
  int first, count;

  __device__ FoldedKeys(const Attention& a, const Chunk& chunk, int64_t index, int kv_head)
      : c(chunk),
        levels(a.has_decay ? levels_of(a, index, kv_head) : nullptr),
        first(chunk.key_skip),
        count(chunk.key_count) {
    if (a.params.cache.most == 0 || count == 0) return;
    const int64_t w = a.params.window;
    const int64_t row = row_of(a, c, kv_head, (c.key_pos + count - 1) / w + 2);
    left = a.work.left + row * w;
    left_decay = a.work.left_decay + row * w;
    first = 0;
    count = a.work.left_count[row];
  }
  __device__ int64_t pos(int s) const { return left ? left[s].pos : c.key_pos + s; }
  __device__ int slot(int s) const { return left ? left[s].slot : -1; }
  __device__ float decay(int s) const {
    return !levels ? 0.0f : left ? left_decay[s] : decay_between(levels, s, c.key_count - 1);
  }
};

// The near keys of the queries at [first, last], in tiles of up to 64: sinks, hard keys, then the
// window.
struct NearTiles {
  int64_t sinks;
  int64_t window_begin;
  int64_t window_end;
  const int32_t* slots = nullptr;
  int hard = 0;
  int sink_tiles, hard_tiles;
  int count;

  __device__ NearTiles(const Attention& a, const Chunk& c, int kv_head, int64_t first,
                       int64_t last) {
    const LinearAttentionParams& p = a.params;
    sinks = p.sinks < last + 1 ? p.sinks : last + 1;
    window_end = last + 1;
    window_begin = window_end;
    if (p.window > 0) {
      const int64_t block = first / p.window;
      window_begin = block > 0 ? (block - 1) * p.window : 0;
      if (window_begin < p.sinks) window_begin = p.sinks;
      if (window_begin > window_end) window_begin = window_end;
    }
    if (p.cache.most > 0) {
      const int64_t row = row_of(a, c, kv_head, first / p.window);
      slots = a.work.slots + row * p.cache.most;
      hard = a.work.slot_count[row];
    }
    sink_tiles = static_cast<int>((sinks + kRows - 1) / kRows);
    hard_tiles = (hard + kRows - 1) / kRows;
    count =
        sink_tiles + hard_tiles + static_cast<int>((window_end - window_begin + kRows - 1) / kRows);
  }
  __device__ bool is_hard(int tile) const {
    return tile >= sink_tiles && tile < sink_tiles + hard_tiles;
  }
  // Of the first key of a tile, by position or, of hard keys, by slot.
  __device__ int64_t begin(int tile) const {
    if (tile < sink_tiles) return static_cast<int64_t>(tile) * kRows;
    if (is_hard(tile)) return static_cast<int64_t>(tile - sink_tiles) * kRows;
    return window_begin + static_cast<int64_t>(tile - sink_tiles - hard_tiles) * kRows;
  }
  __device__ int size(int tile) const {
    const int64_t end = tile < sink_tiles ? sinks : is_hard(tile) ? hard : window_end;
    const int64_t left = end - begin(tile);
    return static_cast<int>(left < kRows ? left : kRows);
  }
  __device__ int64_t pos(int tile, int s) const {
    return is_hard(tile) ? slots[begin(tile) + s] : begin(tile) + s;
  }
  __device__ int64_t slot(int tile, int s) const { return is_hard(tile) ? begin(tile) + s : -1; }
  __device__ bool sees(const LinearAttentionParams& p, int64_t query, int tile, int s) const {
    return is_hard(tile) || is_near(p, query, begin(tile) + s);
  }
};

// --- sequences and their chunks ------------------------------------------------------------------

struct Sequence {
  int batch;
  int begin;
  int64_t length;
  int64_t start_pos;
  int64_t first_chunk;  // in units of chunk_size positions; 0 when w = 0
  int64_t chunks;
};

__device__ inline int64_t non_negative(int64_t x) { return x > 0 ? x : 0; }

__device__ inline Sequence find_sequence(const Attention& a, int64_t n) {
  const LinearAttentionParams& p = a.params;
  Sequence s;
  s.batch = p.segments ? p.segments[3 * n] : static_cast<int>(n);
  s.begin = p.segments ? p.segments[3 * n + 1] : 0;
  s.length = (p.segments ? p.segments[3 * n + 2] : p.seqlen) - s.begin;
  s.start_pos = p.initial.length ? p.initial.length[n] : 0;
  if (p.window == 0) {
    s.first_chunk = 0;
    s.chunks = (s.length + a.chunk_size - 1) / a.chunk_size;
  } else {
    // From the chunk of the last token seen, whose blocks may yet have to be folded.
    s.first_chunk = non_negative(s.start_pos - 1) / a.chunk_size;
    s.chunks = non_negative(s.start_pos + s.length - 1) / a.chunk_size - s.first_chunk + 1;
  }
  return s;
}

__device__ inline Chunk make_chunk(const Attention& a, int64_t n, const Sequence& s, int64_t i) {
  const LinearAttentionParams& p = a.params;
  const int64_t w = p.window, size = a.chunk_size, end = s.start_pos + s.length;
  const int64_t base = w == 0 ? s.start_pos + i * size : (s.first_chunk + i) * size;
  const int64_t query_begin = base > s.start_pos ? base : s.start_pos;
  const int64_t query_end = base + size < end ? base + size : end;
  int64_t key_begin = query_begin, key_end = query_end;
  if (w > 0) {
    // Blocks up to two before the last token's are folded.
    const int64_t folded = non_negative(non_negative(s.start_pos - 1) / w - 1) * w;
    const int64_t fold_end = non_negative(non_negative(end - 1) / w - 1) * w;
    key_begin = base - w > folded ? base - w : folded;
    key_end = base + size - w < fold_end ? base + size - w : fold_end;
  }
  Chunk c;
  c.seq = static_cast<int>(n);
  c.batch = s.batch;
  c.start_pos = s.start_pos;
  c.end_pos = end;
  c.start_token = s.begin;
  c.query_pos = query_begin;
  c.query_token = static_cast<int>(s.begin + (query_begin - s.start_pos));
  c.query_count = static_cast<int>(non_negative(query_end - query_begin));
  c.key_pos = key_begin;
  c.key_count = static_cast<int>(non_negative(key_end - key_begin));
  const int64_t skip = non_negative(p.sinks - key_begin);
  c.key_skip = skip < c.key_count ? static_cast<int>(skip) : c.key_count;
  // As LinearAttentionParams::cache_row.
  const int64_t first_token = int64_t{s.batch} * p.seqlen + s.begin;
  c.table_row = w == 0 ? 0 : first_token / w + 2 * n - s.start_pos / w;
  return c;
}

}  // namespace dijiang::cuda
