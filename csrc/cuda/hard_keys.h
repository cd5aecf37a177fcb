// Hard keys (docs/numerics.md): which ones the slots hold while the queries of each block run, and
// which keys leave for good when a block begins. One thread block walks over the blocks of a
// (sequence, kv head): each choice hangs on the one before.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/hard_key_choice.h"

namespace dijiang::cuda {

// What a walk over the blocks of a sequence needs of a chunk.
__device__ inline Chunk whole_sequence(const Attention& a, int64_t n, const Sequence& s) {
  Chunk c = make_chunk(a, n, s, 0);
  c.query_pos = s.start_pos;
  c.query_token = s.begin;
  c.query_count = static_cast<int>(s.length);
  return c;
}

// Shared memory, in floats.
struct ChoiceTiles {
  float* x_tile;
  float* y_tile;
  float* scores;   // 64 x 64
  float* row_top;  // (64)
  float* row_sum;  // (64)
  Choice choice;

  static int64_t floats(const LinearAttentionParams& p) {
    return 2 * kDepthTile + kSquareTile + 2 * kRows + Choice::candidates(p) + p.headdim +
           p.headdim_v + Choice::floats(p);
  }
  __device__ ChoiceTiles(const LinearAttentionParams& p, float* shared) {
    x_tile = shared;
    y_tile = x_tile + kDepthTile;
    scores = y_tile + kDepthTile;
    row_top = scores + kSquareTile;
    row_sum = row_top + kRows;
    choice.votes = row_sum + kRows;
    choice.sums = choice.votes + Choice::candidates(p);
    choice.take(p, choice.sums + p.headdim + p.headdim_v);
  }
};

// Adds what the queries of a block give the slots and the block before: their softmax weights among
// exact keys.
template <class T>
__device__ inline void add_votes(const Attention& a, const Chunk& c, int head, int64_t block,
                                 ChoiceTiles& tiles) {
  const LinearAttentionParams& p = a.params;
  const Keys<T> keys{a, c, head};
  const int64_t size = p.cache.of(head);
  const int tid = threadIdx.x, row = tid / 4, part = tid % 4;
  const int64_t begin = block * p.window > c.start_pos ? block * p.window : c.start_pos;
  const int64_t end = (block + 1) * p.window < c.end_pos ? (block + 1) * p.window : c.end_pos;
  for (int g = 0; g < a.group; ++g) {
    for (int64_t q0 = begin; q0 < end; q0 += kRows) {
      const int rows = static_cast<int>(end - q0 < kRows ? end - q0 : kRows);
      const NearTiles near(a, c, head, q0, q0 + rows - 1);
      const auto score_tile = [&](int tile) {
        multiply_rows<T>(
            tiles.x_tile, tiles.y_tile, tiles.scores, rows, near.size(tile), p.headdim,
            [&](int r) {
              return view_row<T>(p.q, c.batch, head * a.group + g, token_of(c, q0 + r));
            },
            [&](int s) { return keys.key(near.pos(tile, s), near.slot(tile, s)); });
      };
      float top = kEmpty, sum = 0.0f;  // of a quarter of a row
      for (int tile = 0; tile < near.count; ++tile) {
        score_tile(tile);
        for (int s = part; row < rows && s < near.size(tile); s += 4) {
          if (!near.sees(p, q0 + row, tile, s)) continue;
          const float x = tiles.scores[row * kRowStride + s] * score_scale(p);
          if (x > top) {
            sum = sum * exp2f(top - x) + 1.0f;
            top = x;
          } else {
            sum += exp2f(x - top);
          }
        }
      }
      const float row_top = quad_max(top);
      sum = quad_sum(row_top > kNone ? sum * exp2f(top - row_top) : 0.0f);
      if (part == 0) {
        tiles.row_top[row] = row_top;
        tiles.row_sum[row] = sum;
      }
      for (int tile = near.sink_tiles; tile < near.count; ++tile) {
        if (!near.is_hard(tile) && near.begin(tile) >= block * p.window) break;
        score_tile(tile);
        const int s = tid;
        if (s < near.size(tile)) {
          const int64_t at = near.is_hard(tile)
                                 ? near.begin(tile) + s
                                 : size + near.begin(tile) + s - (block - 1) * p.window;
          float votes = 0.0f;
          for (int r = 0; r < rows; ++r) {
            if (!(tiles.row_sum[r] > 0.0f)) continue;
            const float x = tiles.scores[r * kRowStride + s] * score_scale(p);
            votes += exp2f(x - tiles.row_top[r]) / tiles.row_sum[r];
          }
          if (at < size + p.window) tiles.choice.votes[at] += votes;
        }
        __syncthreads();
      }
    }
  }
}

// Table, votes and sums of a (sequence, kv head). Grid: sequence, kv head.
template <class T>
__global__ void __launch_bounds__(kThreads) choose_hard_keys(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = a.params;
  ChoiceTiles tiles(p, reinterpret_cast<float*>(raw));
  const int64_t n = blockIdx.x;
  const int head = blockIdx.y, tid = threadIdx.x;
  const Sequence s = find_sequence(a, n);
  const Chunk c = whole_sequence(a, n, s);
  const int64_t cell = n * p.num_kv_heads + head, w = p.window;
  const int64_t size = p.cache.of(head), most = p.cache.most;
  const int64_t slot = p.cache.slot(n, head, p.num_kv_heads);
  const int64_t vote = p.cache.vote(n, head, p.num_kv_heads, w);
  const int64_t width = p.headdim + p.headdim_v;
  const bool resumed = p.initial.cache_position != nullptr;
  for (int64_t i = tid; i < size; i += kThreads) {
    tiles.choice.held[i] = resumed ? static_cast<int>(p.initial.cache_position[slot + i]) : -1;
  }
  for (int64_t i = tid; i < size + w; i += kThreads) {
    tiles.choice.votes[i] = resumed ? static_cast<const float*>(p.initial.votes)[vote + i] : 0.0f;
  }
  for (int64_t j = tid; j < width; j += kThreads) {
    tiles.choice.sums[j] =
        resumed ? static_cast<const float*>(p.initial.sums)[cell * width + j] : 0.0f;
  }
  __syncthreads();

  const int64_t first = s.start_pos / w, last = s.length > 0 ? (c.end_pos - 1) / w : first - 1;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t row = row_of(a, c, head, block);
    if (block >= 2 && block * w >= s.start_pos) {
      if (a.work.chosen) {
        const Candidates all(p, tiles.choice.held, size, block);
        const Keys<T> keys{a, c, head};
        const auto place = [&](int i) { return i < all.slots ? i : -1; };
        choose(
            p, static_cast<int>(size), all, tiles.choice,
            [&](int i) { return keys.key(tiles.choice.position[i], place(i)); },
            [&](int i) { return keys.value(tiles.choice.position[i], place(i)); });
      } else {
        for (int64_t i = tid; i < size; i += kThreads)
          tiles.choice.held[i] = p.given[row * most + i];
      }
      carry_votes(p, size, tiles.choice, (block - 2) * w);
    }
    for (int64_t i = tid; a.work.chosen && i < most; i += kThreads) {
      a.work.chosen[row * most + i] = i < size ? tiles.choice.held[i] : -1;
    }
    count_filled(tiles.choice.held, size, a.work.slot_count + row);
    __syncthreads();
    if (block > 0) add_votes<T>(a, c, head, block, tiles);
    const int64_t begin = block * w > s.start_pos ? block * w : s.start_pos;
    const int64_t end = (block + 1) * w < c.end_pos ? (block + 1) * w : c.end_pos;
    for (int64_t j = tid; j < width; j += kThreads) {
      const bool is_key = j < p.headdim;
      float sum = tiles.choice.sums[j];
      for (int64_t pos = begin; pos < end; ++pos) {
        const int64_t token = token_of(c, pos);
        sum += is_key ? view_row<T>(p.k, c.batch, head, token)[j]
                      : view_row<T>(p.v, c.batch, head, token)[j - p.headdim];
      }
      tiles.choice.sums[j] = sum;
    }
    __syncthreads();
  }
  if (p.final.votes == nullptr) return;
  for (int64_t i = tid; i < size + w; i += kThreads) {
    static_cast<float*>(p.final.votes)[vote + i] = tiles.choice.votes[i];
  }
  for (int64_t j = tid; j < width; j += kThreads) {
    static_cast<float*>(p.final.sums)[cell * width + j] = tiles.choice.sums[j];
  }
}

// --- those that leave ----------------------------------------------------------------------------

inline size_t leaving_shared(const LinearAttentionParams& p) {
  return (p.cache.most + p.window + 1) * sizeof(double) +
         (2 * p.cache.most + 2 * p.window) * sizeof(int);
}

// Lists the keys that leave when each block begins, the slots' first, and writes the final state's
// slots. Grid: sequence, kv head.
template <class T>
__global__ void __launch_bounds__(kThreads) list_leaving(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = a.params;
  const int head = blockIdx.y, tid = threadIdx.x;
  const int64_t size = p.cache.of(head), w = p.window, n = blockIdx.x;
  auto* since = reinterpret_cast<double*>(raw);  // (slots): decay after the slots' keys
  double* after = since + size;  // (window + 1): decay of the block's tokens from a row on
  auto* held = reinterpret_cast<int*>(after + w + 1);
  int* leaves = held + size;       // (slots + window)
  int* stays = leaves + size + w;  // (window): rows of the block that enter
  const Sequence s = find_sequence(a, n);
  const Chunk c = whole_sequence(a, n, s);
  const Keys<T> keys{a, c, head};
  const int64_t slot = p.cache.slot(n, head, p.num_kv_heads);
  const bool resumed = p.initial.cache_position != nullptr;
  const auto* given_decay = static_cast<const float*>(p.initial.cache_decay);
  for (int64_t i = tid; i < size; i += kThreads) {
    held[i] = resumed ? static_cast<int>(p.initial.cache_position[slot + i]) : -1;
    since[i] = given_decay ? double(given_decay[slot + i]) * double(kLog2e) : 0.0;
  }
  __syncthreads();

  const int64_t first = s.start_pos / w, last = s.length > 0 ? (c.end_pos - 1) / w : first - 1;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t row = row_of(a, c, head, block), leaving = (block - 2) * w;
    const int32_t* now = a.work.slots + row * p.cache.most;
    count_filled(now, size, a.work.slot_count + row);
    if (block < 2 || block * w < s.start_pos) continue;
    for (int64_t r = tid; r < w; r += kThreads) stays[r] = 0;
    if (tid == 0) {
      after[w] = 0.0;
      for (int64_t r = w - 1; r >= 0; --r) {
        after[r] = after[r + 1];
        if (p.log_decay) {
          after[r] += fmax(double(keys.log_decay(leaving + r)), -1e9) * double(kLog2e);
        }
      }
    }
    __syncthreads();
    for (int64_t i = tid; i < size; i += kThreads) {
      since[i] += after[0];
      leaves[i] = held[i] >= 0 && held[i] != now[i];
      if (now[i] >= 0 && now[i] != held[i]) stays[now[i] - leaving] = 1;
    }
    __syncthreads();
    for (int64_t r = tid; r < w; r += kThreads) {
      leaves[size + r] = leaving + r >= p.sinks && !stays[r];
    }
    __syncthreads();
    for (int64_t i = tid; i < size + w; i += kThreads) {
      int before = 0;
      for (int64_t j = 0; j < i; ++j) before += leaves[j];
      if (i == size + w - 1) a.work.left_count[row] = before + leaves[i];
      if (!leaves[i]) continue;
      const bool in_slot = i < size;
      a.work.left[row * w + before] = {in_slot ? held[i] : static_cast<int>(leaving + i - size),
                                       in_slot ? static_cast<int>(i) : -1};
      a.work.left_decay[row * w + before] =
          static_cast<float>(in_slot ? since[i] : after[i - size + 1]);
    }
    __syncthreads();
    for (int64_t i = tid; i < size; i += kThreads) {
      if (now[i] >= 0 && now[i] != held[i]) since[i] = after[now[i] - leaving + 1];
      held[i] = now[i];
    }
    __syncthreads();
  }

  if (p.final.cache_position == nullptr) return;
  __syncthreads();
  for (int64_t i = tid; i < size; i += kThreads) {
    p.final.cache_position[slot + i] = held[i];
    if (p.final.cache_decay) {
      static_cast<float*>(p.final.cache_decay)[slot + i] =
          static_cast<float>(held[i] < 0 ? 0.0 : since[i] / double(kLog2e));
    }
  }
  for (int64_t e = tid; e < size * p.headdim; e += kThreads) {
    const int64_t i = e / p.headdim, k = e % p.headdim;
    auto* to = static_cast<T*>(p.final.cache_k) + slot * p.headdim;
    to[e] = from_float<T>(held[i] < 0 ? 0.0f : keys.key(held[i], i)[k]);
  }
  for (int64_t e = tid; e < size * p.headdim_v; e += kThreads) {
    const int64_t i = e / p.headdim_v, j = e % p.headdim_v;
    auto* to = static_cast<T*>(p.final.cache_v) + slot * p.headdim_v;
    to[e] = from_float<T>(held[i] < 0 ? 0.0f : keys.value(held[i], i)[j]);
  }
}

template <class T>
void launch_hard_keys(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  const dim3 grid(static_cast<unsigned>(p.num_seqs), static_cast<unsigned>(p.num_kv_heads));
  if (a.work.chosen || p.final.votes) {
    const size_t shared = ChoiceTiles::floats(p) * sizeof(float);
    allow_shared(choose_hard_keys<T>, shared);
    DIJIANG_LAUNCH((choose_hard_keys<T>), grid, kThreads, shared, stream, a);
  }
  const size_t shared = leaving_shared(p);
  allow_shared(list_leaving<T>, shared);
  DIJIANG_LAUNCH((list_leaving<T>), grid, kThreads, shared, stream, a);
}

}  // namespace dijiang::cuda
