// Hard keys (docs/numerics.md): which ones the slots hold while the queries of each block run, and
// which keys leave for good when a block begins. One thread block walks over the blocks of a
// (sequence, kv head): each choice hangs on the one before.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/fused_choice.h"
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

// How many slots of a row of the table are filled, by a whole thread block.
__device__ inline void count_filled(const int32_t* slots, int64_t size, int32_t* count) {
  if (threadIdx.x == 0 && (size == 0 || slots[0] < 0)) *count = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const bool last = slots[i] >= 0 && (i + 1 == size || slots[i + 1] < 0);
    if (last) *count = static_cast<int32_t>(i + 1);
  }
}

// What a block of the walk is asked: the numbers that the choice goes by, of any sizes and types.
// fused_choice.h has them for 16-bit keys.
template <class T_>
struct PlainChoice {
  using T = T_;
  static constexpr int kBlocks = 1;  // on a multiprocessor at least
  float* x_tile;
  float* y_tile;
  float* scores;   // 64 x 64
  float* row_top;  // (64)
  float* row_sum;  // (64)
  Choice choice;

  static size_t bytes(const LinearAttentionParams& p) {
    return (2 * kDepthTile + kSquareTile + 2 * kRows + Choice::all_floats(p)) * sizeof(float);
  }
  __device__ PlainChoice(const LinearAttentionParams& p, char* shared) {
    x_tile = reinterpret_cast<float*>(shared);
    y_tile = x_tile + kDepthTile;
    scores = y_tile + kDepthTile;
    row_top = scores + kSquareTile;
    row_sum = row_top + kRows;
    choice.take_all(p, row_sum + kRows);
  }
  __device__ void find_novelty(const Attention& a, const Chunk& c, int head, const Candidates& all,
                               float length, float tokens) const {
    const Keys<T> keys{a, c, head};
    const auto place = [&](int i) { return i < all.slots ? i : -1; };
    cuda::find_novelty(
        a.params, all.count, choice, length, tokens,
        [&](int i) { return keys.key(choice.position[i], place(i)); },
        [&](int i) { return keys.value(choice.position[i], place(i)); });
  }
  __device__ void add_votes(const Attention& a, const Chunk& c, int head, int64_t block) const;
};

// Adds what the queries of a block give the slots and the block before: their softmax weights among
// exact keys.
template <class T>
__device__ inline void PlainChoice<T>::add_votes(const Attention& a, const Chunk& c, int head,
                                                 int64_t block) const {
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
            x_tile, y_tile, scores, rows, near.size(tile), p.headdim,
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
          const float x = scores[row * kRowStride + s] * score_scale(p);
          if (x > top) {
            sum = sum * exp2f(top - x) + 1.0f;
            top = x;
          } else {
            sum += exp2f(x - top);
          }
        }
      }
      const float most = quad_max(top);
      sum = quad_sum(most > kNone ? sum * exp2f(top - most) : 0.0f);
      if (part == 0) {
        row_top[row] = most;
        row_sum[row] = sum;
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
            if (!(row_sum[r] > 0.0f)) continue;
            const float x = scores[r * kRowStride + s] * score_scale(p);
            votes += exp2f(x - row_top[r]) / row_sum[r];
          }
          if (at < size + p.window) choice.votes[at] += votes;
        }
        __syncthreads();
      }
    }
  }
}

// Table, votes and sums of a (sequence, kv head). Grid: sequence, kv head.
template <class Work>
__global__ void __launch_bounds__(kThreads, Work::kBlocks) choose_hard_keys(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = a.params;
  const Work work(p, raw);
  const Choice& choice = work.choice;
  using T = typename Work::T;
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
    choice.held[i] = resumed ? static_cast<int>(p.initial.cache_position[slot + i]) : -1;
  }
  for (int64_t i = tid; i < size + w; i += kThreads) {
    choice.votes[i] = resumed ? static_cast<const float*>(p.initial.votes)[vote + i] : 0.0f;
  }
  for (int64_t j = tid; j < width; j += kThreads) {
    choice.sums[j] = resumed ? static_cast<const float*>(p.initial.sums)[cell * width + j] : 0.0f;
  }
  __syncthreads();

  const int64_t first = s.start_pos / w, last = s.length > 0 ? (c.end_pos - 1) / w : first - 1;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t row = row_of(a, c, head, block);
    if (block >= 2 && block * w >= s.start_pos) {
      if (a.work.chosen) {
        const Candidates all(p, choice.held, size, block);
        choose(p, static_cast<int>(size), all, choice, [&](float length, float tokens) {
          work.find_novelty(a, c, head, all, length, tokens);
        });
      } else {
        for (int64_t i = tid; i < size; i += kThreads) choice.held[i] = p.given[row * most + i];
      }
      carry_votes(p, size, choice, (block - 2) * w);
    }
    for (int64_t i = tid; a.work.chosen && i < most; i += kThreads) {
      a.work.chosen[row * most + i] = i < size ? choice.held[i] : -1;
    }
    if (tid == 0) a.work.slot_count[row] = filled_slots(choice.held, size);
    __syncthreads();
    if (block > 0) work.add_votes(a, c, head, block);
    const int64_t begin = block * w > s.start_pos ? block * w : s.start_pos;
    const int64_t end = (block + 1) * w < c.end_pos ? (block + 1) * w : c.end_pos;
    for (int64_t j = tid; j < width; j += kThreads) {
      const bool is_key = j < p.headdim;
      float sum = choice.sums[j];
      DIJIANG_UNROLL(8)
      for (int64_t pos = begin; pos < end; ++pos) {
        const int64_t token = token_of(c, pos);
        sum += is_key ? view_row<T>(p.k, c.batch, head, token)[j]
                      : view_row<T>(p.v, c.batch, head, token)[j - p.headdim];
      }
      choice.sums[j] = sum;
    }
    __syncthreads();
  }
  if (p.final.votes == nullptr) return;
  for (int64_t i = tid; i < size + w; i += kThreads) {
    static_cast<float*>(p.final.votes)[vote + i] = choice.votes[i];
  }
  for (int64_t j = tid; j < width; j += kThreads) {
    static_cast<float*>(p.final.sums)[cell * width + j] = choice.sums[j];
  }
}

// --- those that leave ----------------------------------------------------------------------------

inline size_t leaving_shared(const LinearAttentionParams& p) {
  return (p.cache.most + p.window + 1) * sizeof(double) +
         (2 * p.cache.most + 2 * p.window + kChoiceWarps) * sizeof(int);
}
// Without features nothing is folded.
__host__ __device__ inline bool lists_leaving(const LinearAttentionParams& p) {
  return p.num_features > 0 || p.final.cache_decay;
}

// Counts the filled slots of each block, lists the keys that leave when it begins, the slots'
// first, and writes the final state's slots. Grid: sequence, kv head.
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
  int* counts = stays + w;         // scratch
  const bool lists = lists_leaving(p);
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
    if (!lists) {
      if (block < last) continue;
      for (int64_t i = tid; i < size; i += kThreads) held[i] = now[i];
      continue;
    }
    for (int64_t r = tid; r < w; r += kThreads) {
      stays[r] = 0;
      after[r] = 0.0;
      if (p.log_decay) after[r] = fmax(double(keys.log_decay(leaving + r)), -1e9) * double(kLog2e);
    }
    __syncthreads();
    if (tid == 0) {
      after[w] = 0.0;
      for (int64_t r = w - 1; r >= 0; --r) after[r] += after[r + 1];
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
    const int left = enumerate(
        static_cast<int>(size + w), counts, [&](int i) { return leaves[i] != 0; },
        [&](int i, int rank) {
          const bool in_slot = i < size;
          a.work.left[row * w + rank] = {in_slot ? held[i] : static_cast<int>(leaving + i - size),
                                         in_slot ? i : -1};
          a.work.left_decay[row * w + rank] =
              static_cast<float>(in_slot ? since[i] : after[i - size + 1]);
        });
    if (tid == 0) a.work.left_count[row] = left;
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
  const bool walks = a.work.chosen || p.final.votes;
  if (walks && fused_choice_applies(p)) {
    launch_fused_choice(a, stream);
  } else if (walks) {
    using Plain = PlainChoice<T>;
    allow_shared(choose_hard_keys<Plain>, Plain::bytes(p));
    DIJIANG_LAUNCH(choose_hard_keys<Plain>, grid, kThreads, Plain::bytes(p), stream, a);
  }
  if (walks && !lists_leaving(p) && !p.final.cache_position) return;  // the slots are counted
  const size_t shared = leaving_shared(p);
  allow_shared(list_leaving<T>, shared);
  DIJIANG_LAUNCH((list_leaving<T>), grid, kThreads, shared, stream, a);
}

}  // namespace dijiang::cuda
