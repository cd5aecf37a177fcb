// What the choice of hard keys goes by, of 16-bit keys: votes by products of fragments, novelty by
// pieces of 16 bytes. One block walks over a sequence, so that nothing but its own latency counts:
// keys go from memory to registers without shared memory between, each warp its own 32 of them, and
// meet all queries of the block there.
//
// A product's terms may come in any order that both operands share. So lane (g, j) of a fragment
// holds the 8 elements 32 c + 8 j of its row, one piece, in the place of four pairs.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/fused_tiles.h"
#include "cuda/hard_key_choice.h"

namespace dijiang::cuda {

template <class T_, int kD>
struct FusedChoice {
  using T = T_;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocks = 1;  // on a multiprocessor, what registers are to allow
#else
  static constexpr int kBlocks = kD <= 64 ? 2 : 1;
#endif
  static constexpr int kPieces = kD / 32;  // of a lane and row
  static constexpr int kGroup = 32;        // keys of a warp at a time
  static constexpr int kBatch = kThreads;  // rows of queries at a time
  static constexpr int kTiles = kBatch / 16;

  // Of a row, what one warp's keys add up to.
  struct Sum {
    float top, sum;
  };
  uint4* queries;      // [tile][c][half][lane]
  Sum* sums;           // (warps, kBatch)
  float* row_top;      // (kBatch)
  float* row_inverse;  // 1 / the sum of 2^(score - top); 0: the row has no votes
  Choice choice;

  static constexpr int kQueries = kTiles * kPieces * 2 * 32;
  static size_t bytes(const LinearAttentionParams& p) {
    return kQueries * sizeof(uint4) + kChoiceWarps * kBatch * sizeof(Sum) +
           (2 * kBatch + Choice::all_floats(p)) * sizeof(float);
  }
  __device__ FusedChoice(const LinearAttentionParams& p, char* shared) {
    queries = reinterpret_cast<uint4*>(shared);
    sums = reinterpret_cast<Sum*>(queries + kQueries);
    row_top = reinterpret_cast<float*>(sums + kChoiceWarps * kBatch);
    row_inverse = row_top + kBatch;
    choice.take_all(p, row_inverse + kBatch);
  }

  // --- novelty -----------------------------------------------------------------------------------

  static constexpr int kLanes = 8;                        // a candidate
  static constexpr int kValuePieces = kD <= 128 ? 2 : 4;  // of a lane at most
  static constexpr int kMostColumns = 8 * kLanes * kValuePieces;

  __device__ static const uint4* piece(const T* row, int i) {
    return reinterpret_cast<const uint4*>(row + 8 * i);
  }
  __device__ static void widen(float (&x)[8], const uint4& bits) {
    const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const Pair<T> pair = unpack<T>(pairs[i]);
      x[2 * i] = pair.first;
      x[2 * i + 1] = pair.second;
    }
  }

  __device__ void find_novelty(const Attention& a, const Chunk& c, int head, const Candidates& all,
                               float length, float tokens) const {
    const Keys<T> keys{a, c, head};
    const int lane = threadIdx.x % kLanes;
    const int key_pieces = static_cast<int>(a.params.headdim / 8);
    const int value_pieces = static_cast<int>(a.params.headdim_v / 8);
    float key_sums[kD / 64][8], means[kValuePieces][8];
    DIJIANG_UNROLL()
    for (int e = 0; e < 8; ++e) {
      DIJIANG_UNROLL()
      for (int i = 0; i < kD / 64; ++i) {
        const int at = lane + kLanes * i;
        key_sums[i][e] = at < key_pieces ? choice.sums[at * 8 + e] : 0.0f;
      }
      DIJIANG_UNROLL()
      for (int i = 0; i < kValuePieces; ++i) {
        const int at = lane + kLanes * i;
        means[i][e] = at < value_pieces ? choice.sums[8 * (key_pieces + at) + e] / tokens : 0.0f;
      }
    }
    DIJIANG_UNROLL(1)
    for (int first = 0; first < all.count; first += kThreads / kLanes) {
      const int i = first + static_cast<int>(threadIdx.x) / kLanes;
      float product = 0.0f, norm = 0.0f, square = 0.0f;
      if (i < all.count) {
        const int slot = i < all.slots ? i : -1;
        const T* key = keys.key(choice.position[i], slot).data;
        const T* value = keys.value(choice.position[i], slot).data;
        float x[8];
        DIJIANG_UNROLL()
        for (int n = 0; n < kD / 64; ++n) {
          if (lane + kLanes * n >= key_pieces) continue;
          widen(x, *piece(key, lane + kLanes * n));
          DIJIANG_UNROLL()
          for (int e = 0; e < 8; ++e) {
            product = fmaf(x[e], key_sums[n][e], product);
            norm = fmaf(x[e], x[e], norm);
          }
        }
        DIJIANG_UNROLL()
        for (int n = 0; n < kValuePieces; ++n) {
          if (lane + kLanes * n >= value_pieces) continue;
          widen(x, *piece(value, lane + kLanes * n));
          DIJIANG_UNROLL()
          for (int e = 0; e < 8; ++e) {
            const float difference = x[e] - means[n][e];
            square = fmaf(difference, difference, square);
          }
        }
      }
      DIJIANG_UNROLL()
      for (int step = kLanes / 2; step > 0; step /= 2) {
        product += __shfl_xor_sync(~0u, product, step);
        norm += __shfl_xor_sync(~0u, norm, step);
        square += __shfl_xor_sync(~0u, square, step);
      }
      if (i < all.count && lane == 0) {
        choice.novelty[i] = novelty_of(product, norm, square, length);
      }
    }
  }

  // --- votes -------------------------------------------------------------------------------------

  // The near keys of a block of queries in one row: sinks, hard keys, the window.
  struct Near {
    int64_t begin;         // position of the first query
    int64_t window_begin;  // of the window's first key
    int count;             // queries a head
    int sinks, hard, all;
    int voted;  // index behind the last key that gets votes: those of the block before

    // Of a key, its position behind the first query; what is before has 0, what is behind all keys
    // the place of a later token.
    __device__ int behind(int i) const {
      const int64_t pos = i < sinks          ? i
                          : i < sinks + hard ? begin
                                             : window_begin + i - sinks - hard;
      return pos > begin ? static_cast<int>(pos - begin) : 0;
    }
  };

  struct KeyGroup {
    unsigned bits[kGroup / 8][kPieces][4];
  };
  // Each lane finds one key's row.
  __device__ __forceinline__ void load_keys(KeyGroup& group, const Keys<T>& keys, const Near& near,
                                            int first) const {
    const int lane = threadIdx.x % 32;
    const auto pieces = static_cast<int>(keys.a.params.headdim / 8);
    const int mine = first + lane, slot = mine - near.sinks;
    unsigned long long address = 0;
    if (mine < near.all) {
      const bool is_hard = slot >= 0 && slot < near.hard;
      const int64_t pos = is_hard    ? choice.held[slot]
                          : slot < 0 ? mine
                                     : near.window_begin + slot - near.hard;
      address = reinterpret_cast<uintptr_t>(keys.key(pos, is_hard ? slot : -1).data);
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup / 8; ++n) {
      const auto* row = reinterpret_cast<const T*>(
          static_cast<uintptr_t>(__shfl_sync(~0u, address, 8 * n + lane / 4)));
      DIJIANG_UNROLL()
      for (int c = 0; c < kPieces; ++c) {
        const int at = 4 * c + lane % 4;
        const uint4 bits = row && at < pieces ? *piece(row, at) : make_uint4(0, 0, 0, 0);
        group.bits[n][c][0] = bits.x;
        group.bits[n][c][1] = bits.y;
        group.bits[n][c][2] = bits.z;
        group.bits[n][c][3] = bits.w;
      }
    }
  }

  // Rows [first, first + kBatch) of the heads' queries, head behind head.
  __device__ void load_queries(const Attention& a, const Chunk& c, int head, const Near& near,
                               int first, int rows) const {
    for (int e = threadIdx.x; e < kBatch * kPieces * 4; e += kThreads) {
      const int row = e / (4 * kPieces), at = e % (4 * kPieces);
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (row < rows && at < a.params.headdim / 8) {
        const int64_t pos = near.begin + (first + row) % near.count;
        const int query_head = head * a.group + (first + row) / near.count;
        bits = *piece(view_row<T>(a.params.q, c.batch, query_head, token_of(c, pos)).data, at);
      }
      const int half = row % 16 / 8, lane = row % 8 * 4 + at % 4;
      queries[((row / 16 * kPieces + at / 4) * 2 + half) * 32 + lane] = bits;
    }
  }

  // x[n] = scores of a tile of 16 rows and the keys [8 n, 8 n + 8) of a group.
  __device__ __forceinline__ void score(float (&x)[kGroup / 8][4], const KeyGroup& group, int tile,
                                        float scale) const {
    const int lane = threadIdx.x % 32;
    clear(x);
    DIJIANG_UNROLL()
    for (int c = 0; c < kPieces; ++c) {
      const uint4 low = queries[((tile * kPieces + c) * 2) * 32 + lane];
      const uint4 high = queries[((tile * kPieces + c) * 2 + 1) * 32 + lane];
      const unsigned first[4] = {low.x, high.x, low.y, high.y};
      const unsigned second[4] = {low.z, high.z, low.w, high.w};
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        multiply_add<T>(x[n], first, group.bits[n][c][0], group.bits[n][c][1]);
        multiply_add<T>(x[n], second, group.bits[n][c][2], group.bits[n][c][3]);
      }
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kGroup / 8; ++n) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) x[n][e] *= scale;
    }
  }

  // Largest score and sum of the weights of each row, of every warp's keys.
  __device__ void sum_rows(const Attention& a, const Keys<T>& keys, const Near& near, int first,
                           int tiles) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float scale = score_scale(a.params);
    Sum* mine = sums + warp * kBatch;
    for (int row = lane; row < 16 * tiles; row += 32) mine[row] = {-INFINITY, 0.0f};
    __syncwarp();
    for (int k = warp * kGroup; k < near.all; k += kChoiceWarps * kGroup) {
      KeyGroup group;
      load_keys(group, keys, near, k);
      int behind[kGroup / 8][2];
      bool hidden = false;
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          behind[n][e] = near.behind(k + 8 * n + lane % 4 * 2 + e);
          hidden |= behind[n][e] > 0;
        }
      }
      hidden = __any_sync(~0u, hidden);
      DIJIANG_UNROLL(1)
      for (int tile = 0; tile < tiles; ++tile) {
        float x[kGroup / 8][4];
        score(x, group, tile, scale);
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          const int row = tile * 16 + lane / 4 + 8 * half;
          const int self = hidden ? (first + row) % near.count : 0;
          float most = -INFINITY;
          DIJIANG_UNROLL()
          for (int n = 0; n < kGroup / 8; ++n) {
            DIJIANG_UNROLL()
            for (int e = 0; e < 2; ++e) {
              float& y = x[n][2 * half + e];
              if (hidden && behind[n][e] > self) y = -INFINITY;
              most = fmaxf(most, y);
            }
          }
          const Sum before = mine[row];
          const float top = fmaxf(before.top, quad_max(most));
          const float base = top == -INFINITY ? 0.0f : top;
          float sum = 0.0f;
          DIJIANG_UNROLL()
          for (int n = 0; n < kGroup / 8; ++n) {
            sum += fast_exp2(x[n][2 * half] - base) + fast_exp2(x[n][2 * half + 1] - base);
          }
          sum = quad_sum(sum) + before.sum * fast_exp2(before.top - base);
          __syncwarp();  // the row's lanes have read it
          if (lane % 4 == 0) mine[row] = {top, sum};
        }
        __syncwarp();
      }
    }
  }

  // A thread a row.
  __device__ void merge_sums(int rows) const {
    const int row = threadIdx.x;
    float top = -INFINITY, sum = 0.0f;
    if (row < rows) {
      for (int i = 0; i < kChoiceWarps; ++i) top = fmaxf(top, sums[i * kBatch + row].top);
      const float base = top == -INFINITY ? 0.0f : top;
      for (int i = 0; i < kChoiceWarps; ++i) {
        const Sum part = sums[i * kBatch + row];
        sum += part.sum * fast_exp2(part.top - base);
      }
    }
    row_top[row] = top;
    row_inverse[row] = sum > 0.0f ? 1.0f / sum : 0.0f;  // NaN: 0
  }

  // Each warp's keys: what the rows give them.
  __device__ void vote(const Attention& a, const Keys<T>& keys, const Near& near, int64_t block,
                       int tiles) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float scale = score_scale(a.params);
    const int64_t size = a.params.cache.of(keys.head);
    const int64_t shift = near.window_begin - (block - 1) * a.params.window;
    for (int k = warp * kGroup; k < near.voted; k += kChoiceWarps * kGroup) {
      if (k + kGroup <= near.sinks) continue;
      KeyGroup group;
      load_keys(group, keys, near, k);
      float votes[kGroup / 8][2] = {};
      DIJIANG_UNROLL(1)
      for (int tile = 0; tile < tiles; ++tile) {
        float x[kGroup / 8][4];
        score(x, group, tile, scale);
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          const int row = tile * 16 + lane / 4 + 8 * half;
          const float top = row_top[row], inverse = row_inverse[row];
          if (!(inverse > 0.0f)) continue;  // its weights may be NaN
          DIJIANG_UNROLL()
          for (int n = 0; n < kGroup / 8; ++n) {
            votes[n][0] = fmaf(fast_exp2(x[n][2 * half] - top), inverse, votes[n][0]);
            votes[n][1] = fmaf(fast_exp2(x[n][2 * half + 1] - top), inverse, votes[n][1]);
          }
        }
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < kGroup / 8; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          float sum = votes[n][e];
          DIJIANG_UNROLL()
          for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
          const int slot = k + 8 * n + 2 * lane + e - near.sinks;
          if (lane >= 4 || slot < 0 || slot >= near.voted - near.sinks) continue;
          choice.votes[slot < near.hard ? slot : size + shift + slot - near.hard] += sum;
        }
      }
    }
  }

  __device__ void add_votes(const Attention& a, const Chunk& c, int head, int64_t block) const {
    const LinearAttentionParams& p = a.params;
    const Keys<T> keys{a, c, head};
    const int64_t w = p.window;
    Near near;
    near.begin = block * w > c.start_pos ? block * w : c.start_pos;
    const int64_t end = (block + 1) * w < c.end_pos ? (block + 1) * w : c.end_pos;
    near.count = static_cast<int>(end - near.begin);
    near.sinks = static_cast<int>(p.sinks < end ? p.sinks : end);
    near.hard = filled_slots(choice.held, p.cache.of(head));
    near.window_begin = (block - 1) * w > near.sinks ? (block - 1) * w : near.sinks;
    const int64_t before = block * w - near.window_begin;
    near.all = near.sinks + near.hard + static_cast<int>(end - near.window_begin);
    near.voted = near.sinks + near.hard + static_cast<int>(before > 0 ? before : 0);
    for (int first = 0; first < a.group * near.count; first += kBatch) {
      const int left = a.group * near.count - first, rows = left < kBatch ? left : kBatch;
      const int tiles = (rows + 15) / 16;
      __syncthreads();
      load_queries(a, c, head, near, first, rows);
      __syncthreads();
      sum_rows(a, keys, near, first, tiles);
      __syncthreads();
      merge_sums(rows);
      __syncthreads();
      vote(a, keys, near, block, tiles);
    }
  }
};

}  // namespace dijiang::cuda
