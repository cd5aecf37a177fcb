// Which keys the slots hold next (docs/numerics.md, "Hard keys"), for the walk over a sequence and
// for decoding. Run by a whole thread block.
#pragma once

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// Candidates: the slots' keys, then the block's without sinks.
struct Choice {
  float* votes;    // (slots + window): of slots, then of the block
  float* sums;     // (headdim + headdim_v): of all tokens
  int* held;       // (most slots): positions in the slots, before and after
  float* novelty;  // (candidates), like the rest
  int* position;
  int* entering;  // scratch: those of the block that stay, in order
  int* kept;

  __host__ __device__ static int64_t candidates(const LinearAttentionParams& p) {
    return p.cache.most + p.window;
  }
  // What `take` takes, in floats.
  static int64_t floats(const LinearAttentionParams& p) { return 4 * candidates(p) + p.cache.most; }
  // All but votes and sums.
  __device__ void take(const LinearAttentionParams& p, float* shared) {
    const int64_t n = candidates(p);
    novelty = shared;
    position = reinterpret_cast<int*>(novelty + n);
    entering = position + n;
    kept = entering + n;
    held = kept + n;
  }
};

// How many slots are filled, by a whole thread block.
__device__ inline void count_filled(const int* slots, int64_t size, int32_t* count) {
  if (threadIdx.x == 0 && (size == 0 || slots[0] < 0)) *count = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const bool last = slots[i] >= 0 && (i + 1 == size || slots[i + 1] < 0);
    if (last) *count = static_cast<int32_t>(i + 1);
  }
}

// What there is to choose from.
struct Candidates {
  int slots;        // filled
  int skip;         // rows of the block that are sinks
  int count;        // slots + window - skip
  int64_t leaving;  // position of the block's first key

  // size: the head's slots.
  __device__ Candidates(const LinearAttentionParams& p, const int* held, int64_t size,
                        int64_t block)
      : leaving((block - 2) * p.window) {
    slots = 0;
    while (slots < size && held[slots] >= 0) ++slots;
    const int64_t sinks = p.sinks - leaving;
    skip = static_cast<int>(sinks < 0 ? 0 : sinks < p.window ? sinks : p.window);
    count = slots + static_cast<int>(p.window) - skip;
  }
  __device__ int row(int i) const { return skip + i - slots; }  // of the block
};

// Whether a candidate of score x comes before a later one of score y. NaN is below all.
__device__ inline bool comes_before(float x, int i, float y, int j) {
  x = x == x ? x : -INFINITY;
  y = y == y ? y : -INFINITY;
  return x > y || (x == y && i < j);
}

// Marks the `wanted` best of n candidates that are not marked yet.
template <class Score>
__device__ inline void keep_best(int n, int wanted, int* kept, int* marks, Score score) {
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int before = 0;
    for (int j = 0; j < n; ++j) before += !kept[j] && comes_before(score(j), j, score(i), i);
    marks[i] = !kept[i] && before < wanted;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) kept[i] |= marks[i];
  __syncthreads();
}

// Sets choice.kept and the new choice.held; key_of(i) and value_of(i) are the candidates' rows. The
// old choice.held, votes and sums are complete, a barrier behind them.
template <class KeyOf, class ValueOf>
__device__ inline void choose(const LinearAttentionParams& p, int size, const Candidates& all,
                              const Choice& choice, KeyOf key_of, ValueOf value_of) {
  const int n = all.count, slots = all.slots;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  for (int i = tid; i < n; i += kThreads) {
    choice.position[i] = i < slots ? choice.held[i] : static_cast<int>(all.leaving) + all.row(i);
    choice.kept[i] = n <= size;
  }
  __syncthreads();
  if (n > size && size > 0) {
    const auto tokens = static_cast<float>(all.leaving + 2 * p.window);
    float length = 0.0f;
    for (int64_t k = 0; k < p.headdim; ++k) length = fmaf(choice.sums[k], choice.sums[k], length);
    length = sqrtf(length);
    for (int i = warp; i < n; i += kThreads / 32) {
      const auto key = key_of(i);
      const auto value = value_of(i);
      float product = 0.0f, norm = 0.0f, square = 0.0f;
      for (int64_t k = lane; k < p.headdim; k += 32) {
        product = fmaf(key[k], choice.sums[k], product);
        norm = fmaf(key[k], key[k], norm);
      }
      for (int64_t j = lane; j < p.headdim_v; j += 32) {
        const float difference = value[j] - choice.sums[p.headdim + j] / tokens;
        square = fmaf(difference, difference, square);
      }
      product = warp_sum(product);
      norm = sqrtf(warp_sum(norm)) * length;
      square = warp_sum(square);
      const float cosine = norm > 0.0f ? product / norm : 0.0f;
      if (lane == 0) choice.novelty[i] = sqrtf(square) * expf(-cosine);
    }
    __syncthreads();
    const int novel = size / static_cast<int>(kNovelSlots);
    keep_best(n, novel, choice.kept, choice.entering, [&](int i) { return choice.novelty[i]; });
    keep_best(n, size - novel, choice.kept, choice.entering,
              [&](int i) { return choice.votes[i < slots ? i : size + all.row(i)]; });
  }
  int entering = 0;  // every thread alike
  for (int i = slots; i < n; ++i) entering += choice.kept[i];
  for (int i = slots + tid; i < n; i += kThreads) {
    int before = 0;
    for (int j = slots; j < i; ++j) before += choice.kept[j];
    if (choice.kept[i]) choice.entering[before] = choice.position[i];
  }
  __syncthreads();
  for (int i = tid; i < size; i += kThreads) {
    int free = 0;  // slots before this one that new keys go to
    for (int j = 0; j < i; ++j) free += j >= slots || !choice.kept[j];
    if (i >= slots || !choice.kept[i]) {
      choice.held[i] = free < entering ? choice.entering[free] : -1;
    }
  }
  __syncthreads();
}

// Votes for the next choice, once `held` is new: of those that stay or enter, some of what they
// had. Barriers before and after.
__device__ inline void carry_votes(const LinearAttentionParams& p, int64_t size,
                                   const Choice& choice, int64_t leaving) {
  __syncthreads();
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const int64_t at = choice.held[i] >= leaving ? size + choice.held[i] - leaving : i;
    const float votes = choice.held[i] < 0 ? 0.0f : choice.votes[at];
    choice.votes[i] = static_cast<float>(kCarriedVotes) * votes;
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < p.window; r += kThreads) choice.votes[size + r] = 0.0f;
  __syncthreads();
}

}  // namespace dijiang::cuda
