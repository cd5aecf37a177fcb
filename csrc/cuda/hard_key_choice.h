// Which keys the slots hold next (docs/numerics.md, "Hard keys"), for the walk over a sequence and
// for decoding. Run by a whole thread block.
#pragma once

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

constexpr int kChoiceWarps = kThreads / 32;

// Candidates: the slots' keys, then the block's without sinks.
struct Choice {
  float* votes;    // (slots + window): of slots, then of the block
  float* sums;     // (headdim + headdim_v): of all tokens
  int* held;       // (most slots): positions in the slots, before and after
  float* novelty;  // (candidates), like the rest
  int* position;
  int* entering;  // scratch: those of the block that stay, in order
  int* kept;
  int* counts;  // (2 kChoiceWarps) scratch

  __host__ __device__ static int64_t candidates(const LinearAttentionParams& p) {
    return p.cache.most + p.window;
  }
  // What `take` takes, in floats.
  static int64_t floats(const LinearAttentionParams& p) {
    return 4 * candidates(p) + 2 * kChoiceWarps + p.cache.most;
  }
  // Likewise take_all.
  static int64_t all_floats(const LinearAttentionParams& p) {
    return candidates(p) + p.headdim + p.headdim_v + floats(p);
  }
  __device__ void take_all(const LinearAttentionParams& p, float* shared) {
    votes = shared;
    sums = votes + candidates(p);
    take(p, sums + p.headdim + p.headdim_v);
  }
  // All but votes and sums.
  __device__ void take(const LinearAttentionParams& p, float* shared) {
    const int64_t n = candidates(p);
    novelty = shared;
    position = reinterpret_cast<int*>(novelty + n);
    entering = position + n;
    kept = entering + n;
    counts = kept + n;
    held = counts + 2 * kChoiceWarps;
  }
};

// How many slots are filled: they fill up from the first on.
__device__ inline int filled_slots(const int* held, int64_t size) {
  int low = 0, high = static_cast<int>(size);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (held[middle] >= 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// How many threads of the block say yes: those before this one, and all. counts: (kChoiceWarps).
struct Rank {
  int before, all;
};
__device__ inline Rank block_rank(bool yes, int* counts) {
  const unsigned lanes = __ballot_sync(~0u, yes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the counts of the last call are read
  if (lane == 0) counts[warp] = __popc(lanes);
  __syncthreads();
  Rank rank{__popc(lanes & ((1u << lane) - 1)), 0};
  for (int i = 0; i < kChoiceWarps; ++i) {
    rank.before += i < warp ? counts[i] : 0;
    rank.all += counts[i];
  }
  return rank;
}

// Calls found(i, rank) for those i < n of which is(i) holds, rank in the order of i. Returns how
// many there are. By a whole thread block; barriers before the first call.
template <class Is, class Found>
__device__ inline int enumerate(int n, int* counts, Is is, Found found) {
  int all = 0;
  for (int first = 0; first < n; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool yes = i < n && is(i);
    const Rank rank = block_rank(yes, counts);
    if (yes) found(i, all + rank.before);
    all += rank.all;
  }
  return all;
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
    slots = filled_slots(held, size);
    const int64_t sinks = p.sinks - leaving;
    skip = static_cast<int>(sinks < 0 ? 0 : sinks < p.window ? sinks : p.window);
    count = slots + static_cast<int>(p.window) - skip;
  }
  __device__ int row(int i) const { return skip + i - slots; }  // of the block
};

// Larger for larger scores, NaN as the lowest; never 0.
__device__ inline unsigned order_of(float score) {
  if (!(score == score)) score = -INFINITY;
  const unsigned bits = __float_as_uint(score + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Marks the `wanted` best of n candidates that are not marked yet, of equal ones the first.
// Barriers before and after.
template <class Score>
__device__ inline void keep_best(int n, int wanted, const Choice& choice, Score score) {
  const int tid = threadIdx.x;
  auto* orders = reinterpret_cast<unsigned*>(choice.entering);  // each thread its own
  for (int i = tid; i < n; i += kThreads) orders[i] = choice.kept[i] ? 0 : order_of(score(i));
  // The largest least order that so many have, bit by bit.
  unsigned least = 0;
  int have = -1;  // how many have it
  for (int bit = 31; bit >= 0 && have != wanted; --bit) {
    const unsigned next = least | 1u << bit;
    int count = 0;
    for (int i = tid; i < n; i += kThreads) count += orders[i] >= next;
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(~0u, count, step);
    int* counts = choice.counts + bit % 2 * kChoiceWarps;  // one barrier a bit is enough for two
    if (tid % 32 == 0) counts[tid / 32] = count;
    __syncthreads();
    count = 0;
    for (int i = 0; i < kChoiceWarps; ++i) count += counts[i];
    if (count < wanted) continue;
    least = next;
    have = count;
  }
  __syncthreads();
  if (have <= wanted) {  // least is 0 where there are not as many
    for (int i = tid; i < n; i += kThreads) choice.kept[i] |= orders[i] >= least;
  } else {
    const int more = enumerate(
        n, choice.counts, [&](int i) { return orders[i] > least; },
        [&](int i, int) { choice.kept[i] = 1; });
    enumerate(
        n, choice.counts, [&](int i) { return orders[i] == least; },
        [&](int i, int rank) {
          if (more + rank < wanted) choice.kept[i] = 1;
        });
  }
  __syncthreads();
}

// product: of the key and the sum of all; norm: |key|^2; square: |value - mean|^2.
__device__ inline float novelty_of(float product, float norm, float square, float length) {
  norm = sqrtf(norm) * length;
  return sqrtf(square) * expf(norm > 0.0f ? -product / norm : 0.0f);
}

// Each warp a candidate; key_of(i) and value_of(i) are their rows.
template <class KeyOf, class ValueOf>
__device__ inline void find_novelty(const LinearAttentionParams& p, int n, const Choice& choice,
                                    float length, float tokens, KeyOf key_of, ValueOf value_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < n; i += kChoiceWarps) {
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
    norm = warp_sum(norm);
    square = warp_sum(square);
    if (lane == 0) choice.novelty[i] = novelty_of(product, norm, square, length);
  }
}

// Sets choice.kept and the new choice.held. novelty(length, tokens) sets choice.novelty: of the
// |sum of the keys| and the number of tokens. The old choice.held, votes and sums are complete, a
// barrier behind them.
template <class Novelty>
__device__ inline void choose(const LinearAttentionParams& p, int size, const Candidates& all,
                              const Choice& choice, Novelty novelty) {
  const int n = all.count, slots = all.slots, tid = threadIdx.x;
  for (int i = tid; i < n; i += kThreads) {
    choice.position[i] = i < slots ? choice.held[i] : static_cast<int>(all.leaving) + all.row(i);
    choice.kept[i] = n <= size;
  }
  __syncthreads();
  if (n > size && size > 0) {
    float length = 0.0f;
    for (int64_t k = 0; k < p.headdim; ++k) length = fmaf(choice.sums[k], choice.sums[k], length);
    novelty(sqrtf(length), static_cast<float>(all.leaving + 2 * p.window));
    __syncthreads();
    const int novel = size / static_cast<int>(kNovelSlots);
    keep_best(n, novel, choice, [&](int i) { return choice.novelty[i]; });
    keep_best(n, size - novel, choice,
              [&](int i) { return choice.votes[i < slots ? i : size + all.row(i)]; });
  }
  const int entering = enumerate(
      n - slots, choice.counts, [&](int i) { return choice.kept[slots + i] != 0; },
      [&](int i, int rank) { choice.entering[rank] = choice.position[slots + i]; });
  __syncthreads();
  enumerate(
      size, choice.counts, [&](int i) { return i >= slots || !choice.kept[i]; },
      [&](int i, int rank) { choice.held[i] = rank < entering ? choice.entering[rank] : -1; });
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
