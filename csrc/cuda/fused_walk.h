// One block's walk over a part of a sequence, 64 tokens (a chunk) at a time: four warps of 16
// tokens, for kValueDim columns of v. The state stays in registers, transposed, a quarter of the
// columns of v a warp; features, scores and weights exist only as fragments, but for the key
// features, which all warps read.
//
// All is relative to M' = max(M before the chunk, ceil of the chunk's keys' exponents), a feature,
// and to r = ceil max_i (b_i + M'_i), a row. A later key of the chunk raises M' and so shifts what
// an earlier row sees by powers of two, which cancel exactly as long as nothing underflows. Rows
// whose sum falls below 2^-60 are done again with the keys up to themselves alone: the same
// operations in the same order, so that which way a row took shows in no bit (docs/numerics.md,
// exact rows). With decay such a row may fail again, because decay took what was large; then the
// decay goes into the exponents, under the maximum, and cannot.
#pragma once

#include "cuda/attention_phases.h"
#include "cuda/attention_rows.h"
#include "cuda/fused_layout.h"

namespace dijiang::cuda {

// Which keys of a chunk are prepared, and for whom.
struct KeyMode {
  int last = kTileRows - 1;
  bool single = false;   // for row `last` alone
  bool decayed = false;  // keys and state decayed up to the token `last`
};

template <class Shape, bool kRows>
struct Walk {
  using T = typename Shape::T;
  using Shared = FusedShared<Shape, kRows>;
  static constexpr int kD = Shape::kHeadDim, kM = Shape::kFeatures, kV = Shape::kValueDim;
  static constexpr int kParts = Shape::kParts;
  static constexpr int kStateTiles = kV / (16 * kWalkWarps);

  const FusedAttention& f;
  char* shared;
  int batch, kv_head, first_head, first_column, token, count;  // of the part
  int lane, warp, row0;
  float state[kStateTiles][kM / 8][4];  // columns of v by features, at the scale Shared::scale
  int turn = 0;
  double decay = 0.0;  // in the first warp: of all tokens so far, base 2

  __device__ __forceinline__ Walk(const FusedAttention& fused, char* raw)
      : f(fused),
        shared(raw),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        row0(threadIdx.x / 32 * 16) {}

  __device__ __forceinline__ const LinearAttentionParams& params() const {
    return f.attention.params;
  }
  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  __device__ __forceinline__ char* head_at(int h) const {
    return shared + Shared::heads + h * Shared::kHead;
  }

  // --- parameters --------------------------------------------------------------------------------

  // omega of a head in two parts. A row is first brought to [1/2, 1), so that float16 holds it.
  __device__ __forceinline__ void load_parameters(const FeatureParams& feature, int head,
                                                  char* matrix, char* lines) {
    const LinearAttentionParams& p = params();
    auto* high = reinterpret_cast<T*>(matrix);
    T* low = high + kM * kD;
    const auto* weight = static_cast<const float*>(feature.log_weight);
    const float scale = sqrtf(static_cast<float>(p.scale)) * kLog2e;
    for (int i = warp; i < kM; i += kWalkWarps) {
      const float* row =
          static_cast<const float*>(feature.omega) + (static_cast<int64_t>(head) * kM + i) * kD;
      float size = 0.0f;
      for (int k = lane; k < kD; k += 32) size = fmaxf(size, fabsf(row[k]));
      const float exponent = fmaxf(binary_exponent(warp_max(size)), -100.0f);
      for (int k = lane; k < kD; k += 32) {
        const float x = scale2(row[k], -exponent);
        const T part = from_float<T>(x);
        high[tile_offset<kD>(i, k)] = part;
        low[tile_offset<kD>(i, k)] = from_float<T>(x - to_float(part));
      }
      if (lane == 0) {
        reinterpret_cast<FeatureLine*>(lines)[i] = {
            scale2(scale, exponent),
            weight ? weight[static_cast<int64_t>(head) * kM + i] * kLog2e : 0.0f};
      }
    }
  }

  // --- tiles -------------------------------------------------------------------------------------

  // The warp's own 16 rows of the tile at `first`; zeros behind the part's end.
  template <int kWidth>
  __device__ __forceinline__ void load_rows(T* tile, const ConstView& view, int head, int first,
                                            int first_column_ = 0) {
    constexpr int kPieces = kWidth / 8, kStep = 32 / kPieces;
    const T* base = static_cast<const T*>(view.data) + batch * view.stride_batch +
                    head * view.stride_head + static_cast<int64_t>(token) * view.stride_seq +
                    first_column_;
    const int column = lane % kPieces * 8;
    DIJIANG_UNROLL()
    for (int i = 0; i < 16; i += kStep) {
      const int row = row0 + i + lane / kPieces;
      const bool inside = first + row < count;
      const T* from = inside ? base + (first + row) * view.stride_seq + column : base;
      copy_async(tile + tile_offset<kWidth>(row, column), from, inside);
    }
  }
  __device__ __forceinline__ void load_keys(int first) {
    load_rows<kD>(at<T>(Shared::keys), params().k, kv_head, first);
  }
  __device__ __forceinline__ void load_queries(int first, int h) {
    load_rows<kD>(at<T>(Shared::queries), params().q, first_head + h, first);
  }
  __device__ __forceinline__ T* values(int first) const {
    return at<T>(Shared::values) + first / kTileRows % 2 * (kTileRows * kV);
  }
  __device__ __forceinline__ void load_values(int first) {
    load_rows<kV>(values(first), params().v, kv_head, first, first_column);
  }
  __device__ __forceinline__ void wait_rows() {
    wait_copies();
    __syncwarp();
  }

  // --- features ----------------------------------------------------------------------------------

  // Exponents of the features of the warp's rows of a tile.
  __device__ __forceinline__ void exponents(const T* tile, const char* matrix, const char* lines,
                                            const void* betas, int head, float (&u)[kM / 8][4]) {
    const LinearAttentionParams& p = params();
    const auto* high = reinterpret_cast<const T*>(matrix);
    const T* low = high + kM * kD;
    const bool has_beta = betas && p.kind == FeatureKind::kExp;
    float square[2] = {0.0f, 0.0f};
    clear(u);
    DIJIANG_UNROLL(2)  // fully, its addresses cost registers
    for (int k = 0; k < kD; k += 16) {
      unsigned a[4];
      load_left<kD>(a, tile, row0, k);
      if (has_beta) {
        DIJIANG_UNROLL()
        for (int i = 0; i < 4; ++i) {
          const Pair<T> x = unpack<T>(a[i]);
          square[i % 2] = fmaf(x.first, x.first, square[i % 2]);
          square[i % 2] = fmaf(x.second, x.second, square[i % 2]);
        }
      }
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned b[4];
        load_right<kD>(b, low, i, k);
        multiply_add_16<T>(u[i / 8], u[i / 8 + 1], a, b);
        load_right<kD>(b, high, i, k);
        multiply_add_16<T>(u[i / 8], u[i / 8 + 1], a, b);
      }
    }
    if (has_beta) {
      const float factor =
          static_cast<const float*>(betas)[head] * (static_cast<float>(p.scale) * kLog2e);
      square[0] = quad_sum(square[0]) * factor;
      square[1] = quad_sum(square[1]) * factor;
    }
    const auto* line = reinterpret_cast<const FeatureLine*>(lines);
    if (p.kind == FeatureKind::kSoftmax) normalise_rows(line, u);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const FeatureLine l = line[8 * t + 2 * (lane % 4) + e % 2];
        if (p.kind == FeatureKind::kExp) {
          u[t][e] = fmaf(u[t][e], l.gain, l.weight) - square[e / 2];
        } else if (p.kind == FeatureKind::kElu) {
          const float y = u[t][e] * l.gain;
          // An exponent needs no more than log(1 + y) gives.
          u[t][e] = (y > 0.0f ? fast_log2(fmaf(y, kLn2, 1.0f)) : y) + l.weight;
        } else {
          u[t][e] += l.weight;
        }
      }
    }
  }

  // u gain - log2 sum 2^(u gain)
  __device__ __forceinline__ void normalise_rows(const FeatureLine* line, float (&u)[kM / 8][4]) {
    float top[2] = {kEmpty, kEmpty}, sum[2] = {0.0f, 0.0f};
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        u[t][e] *= line[8 * t + 2 * (lane % 4) + e % 2].gain;
        top[e / 2] = fmaxf(top[e / 2], u[t][e]);
      }
    }
    top[0] = quad_max(top[0]);
    top[1] = quad_max(top[1]);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        u[t][e] -= top[e / 2];
        sum[e / 2] += fast_exp2(u[t][e]);
      }
    }
    sum[0] = fast_log2(quad_sum(sum[0]));
    sum[1] = fast_log2(quad_sum(sum[1]));
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) u[t][e] -= sum[e / 2];
    }
  }

  // --- decay -------------------------------------------------------------------------------------

  // Inclusive sums over the chunk's tokens, by the first warp; a barrier follows later.
  __device__ __forceinline__ void sum_decay(int first) {
    if (!f.attention.has_decay || warp != 0) return;
    const LinearAttentionParams& p = params();
    const float* log_decay = static_cast<const float*>(p.log_decay) +
                             batch * p.log_decay_stride_batch + kv_head * p.log_decay_stride_head;
    double carry = 0.0;
    for (int s0 = 0; s0 < kTileRows; s0 += 32) {
      const int s = first + s0 + lane;
      double x = 0.0;
      if (s < count) {
        x = fmaxf(log_decay[(token + s) * p.log_decay_stride_seq], -1e9f) * double(kLog2e);
      }
      for (int step = 1; step < 32; step *= 2) {
        const double before = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += before;
      }
      at<double>(Shared::levels)[s0 + lane] = carry + x;
      carry += __shfl_sync(~0u, x, 31);
    }
    decay += carry;
  }

  // --- keys --------------------------------------------------------------------------------------

  // Of the rows that are kept, the largest exponent of each feature: the warp's part of M'.
  __device__ __forceinline__ void find_maxima(const float (&a)[kM / 8][4], const bool (&kept)[2]) {
    float most[kM / 8][2];
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 2; ++e) {
        most[t][e] = fmaxf(kept[0] ? a[t][e] : kEmpty, kept[1] ? a[t][2 + e] : kEmpty);
      }
    }
    const int tile = max_over_rows<kM / 8>(most);
    float* maxima = at<float>(Shared::maxima) + warp * kM;
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 64; ++t) {
      maxima[(tile + t) * 8 + 2 * (lane % 4)] = most[t][0];
      maxima[(tile + t) * 8 + 2 * (lane % 4) + 1] = most[t][1];
    }
  }

  // From all maxima: M', and what state and z are multiplied by to refer to it, once decayed so
  // far. Every warp for itself: they all write the same numbers.
  __device__ __forceinline__ void raise_tops(bool decays, float by) {
    for (int i = lane; i < kM; i += 32) {
      float most = kEmpty;
      for (int w = 0; w < kWalkWarps; ++w) {
        most = fmaxf(most, at<float>(Shared::maxima)[w * kM + i]);
      }
      float before = at<float>(Shared::scale)[i], decayed = 1.0f;
      if (decays) {
        float rest = at<float>(Shared::rest)[i];
        const DecayStep step = step_decay(by, rest);
        before = fmaxf(before + step.whole, kEmpty);
        decayed = step.factor;
        at<float>(Shared::next_rest)[i] = rest;
      }
      const float most_of_all = fmaxf(before, ceilf(most));
      const float times = scale2(decayed, before - most_of_all);
      at<float>(Shared::top)[i] = most_of_all;
      at<float>(Shared::factor)[i] = times;
      at<float>(Shared::top_z)[i] = at<float>(Shared::z)[i] * times;
    }
    __syncwarp();
  }

  // 2^(a - M') to shared memory, after weigh(half, it).
  template <class Weigh>
  __device__ __forceinline__ void write_features(const float (&a)[kM / 8][4], const Weigh& weigh) {
    const float* top = at<float>(Shared::top);
    auto* features = at<__nv_bfloat16>(Shared::features);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      const float top0 = top[column], top1 = top[column + 1];
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const Split<kParts> x(weigh(half, exp2_below(a[t][2 * half], -top0)),
                              weigh(half, exp2_below(a[t][2 * half + 1], -top1)));
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          store_pair(features + part * kTileRows * kM, row0 + lane / 4 + 8 * half, column,
                     x.part[part]);
        }
      }
    }
  }

  // From the keys' tile: M', what state and z are multiplied by to refer to it, and the features
  // 2^(a - M') in shared memory; likewise the state, for rows to read. between: called when all
  // warps are done with what they did before.
  template <class Between>
  __device__ __forceinline__ void prepare_keys(const KeyMode& mode, int tile_count, bool for_rows,
                                               const Between& between) {
    float a[kM / 8][4];
    exponents(at<T>(Shared::keys), shared + Shared::key_omega, shared + Shared::key_lines,
              params().fk.beta, kv_head, a);
    const int row[2] = {row0 + lane / 4, row0 + lane / 4 + 8};
    const int end = mode.last < tile_count ? mode.last + 1 : tile_count;
    const bool kept[2] = {row[0] < end, row[1] < end};
    const double* levels = at<double>(Shared::levels);
    if (mode.decayed) {
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float left =
            kept[half] ? static_cast<float>(levels[mode.last] - levels[row[half]]) : 0.0f;
        DIJIANG_UNROLL()
        for (int t = 0; t < kM / 8; ++t) {
          a[t][2 * half] += left;
          a[t][2 * half + 1] += left;
        }
      }
    }
    find_maxima(a, kept);
    __syncthreads();
    between();

    raise_tops(mode.decayed, mode.decayed ? static_cast<float>(levels[mode.last]) : 0.0f);
    write_features(a, [&](int half, float x) { return kept[half] ? x : 0.0f; });
    if (kRows && for_rows) {
      const float* factor = at<float>(Shared::factor);
      auto* readable = at<__nv_bfloat16>(Shared::state);
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        const int column = 8 * t + 2 * (lane % 4);
        const float factor0 = factor[column], factor1 = factor[column + 1];
        DIJIANG_UNROLL()
        for (int n = 0; n < 2 * kStateTiles; ++n) {
          const float* s = state[n / 2][t] + n % 2 * 2;
          const Split<kParts> x(s[0] * factor0, s[1] * factor1);
          DIJIANG_UNROLL()
          for (int part = 0; part < kParts; ++part) {
            store_pair(readable + part * kV * kM, state_row(n), column, x.part[part]);
          }
        }
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ static void store_pair(__nv_bfloat16* tile, int row, int column,
                                                    unsigned x) {
    *reinterpret_cast<unsigned*>(tile + tile_offset<kM>(row, column)) = x;
  }
  // Column of v of the lane's part n of the state.
  __device__ __forceinline__ int state_row(int n) const {
    return warp * (16 * kStateTiles) + n * 8 + lane / 4;
  }

  // --- rows --------------------------------------------------------------------------------------

  // The warp's rows of query head first_head + h; `single`: row mode.last alone. Returns, in every
  // lane, a bit for each of the warp's rows that failed. after_read: the queries' tile is free.
  template <class AfterRead>
  __device__ __forceinline__ unsigned compute_rows(const KeyMode& mode, int first, int h,
                                                   const AfterRead& after_read) {
    const LinearAttentionParams& p = params();
    const int tile_count = count - first < kTileRows ? count - first : kTileRows;
    const int g = lane / 4, j = lane % 4;
    const bool masks_decay = f.attention.has_decay && !mode.decayed;
    const double* levels = at<double>(Shared::levels);
    unsigned query[kParts][kM / 16][4];
    float den[2] = {0.0f, 0.0f}, scale[2] = {kEmpty, kEmpty};
    {
      float b[kM / 8][4];
      exponents(at<T>(Shared::queries), head_at(h), head_at(h) + Shared::kMatrix, p.fq.beta,
                first_head + h, b);
      after_read();
      const auto* top = at<float>(Shared::top);
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          scale[e / 2] = fmaxf(scale[e / 2], b[t][e] + top[8 * t + 2 * j + e % 2]);
        }
      }
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float r = ceilf(quad_max(scale[half]));
        scale[half] = r < kNone ? kEmpty : r;
      }
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        const int column = 8 * t + 2 * j;
        const float top0 = top[column], top1 = top[column + 1];
        const float z0 = at<float>(Shared::top_z)[column],
                    z1 = at<float>(Shared::top_z)[column + 1];
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          const bool any = scale[half] > kNone;
          const Split<kParts> x(any ? exp2_below(b[t][2 * half], top0 - scale[half]) : 0.0f,
                                any ? exp2_below(b[t][2 * half + 1], top1 - scale[half]) : 0.0f);
          DIJIANG_UNROLL()
          for (int part = 0; part < kParts; ++part) {
            query[part][t / 2][t % 2 * 2 + half] = x.part[part];
          }
          const Pair<float> seen = joined(x.part);
          den[half] = fmaf(seen.first, z0, fmaf(seen.second, z1, den[half]));
        }
      }
    }

    // The state's part.
    float out[kV / 8][4];
    clear(out);
    DIJIANG_UNROLL()
    for (int i = 0; i < kM; i += 16) {
      unsigned a[kParts][4];
      take_query(a, query, i);
      DIJIANG_UNROLL()
      for (int n = 0; n < kV; n += 16) {
        unsigned b[kParts][4];
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          load_right<kM>(b[part], at<__nv_bfloat16>(Shared::state) + part * kV * kM, n, i);
        }
        multiply_parts_16<kParts>(out[n / 8], out[n / 8 + 1], a, b);
      }
    }
    if (masks_decay) {
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float left = fast_exp2(static_cast<float>(levels[row0 + g + 8 * half]));
        den[half] *= left;
        DIJIANG_UNROLL()
        for (int t = 0; t < kV / 8; ++t) {
          out[t][2 * half] *= left;
          out[t][2 * half + 1] *= left;
        }
      }
    }

    // The chunk's own keys.
    const T* value_tile = values(first);
    if constexpr (kParts == 1) {
      DIJIANG_UNROLL()
      for (int s = 0; s < kTileRows; s += 16) {
        if (s > row0) continue;
        float w[2][4];
        weigh_keys(w, query, s, masks_decay);
        add_values(out, den, w, value_tile, s, 1.0f, 1.0f);
      }
    } else {
      // float16 has few exponents: weights are brought near its upper end, by a power of two that
      // hangs on the row's own weights alone, and the sums so far likewise.
      float w[kTileRows / 16][2][4], most[2] = {0.0f, 0.0f};
      DIJIANG_UNROLL()
      for (int s = 0; s < kTileRows; s += 16) {
        if (s > row0) continue;
        weigh_keys(w[s / 16], query, s, masks_decay);
        DIJIANG_UNROLL()
        for (int e = 0; e < 8; ++e) {
          most[e % 4 / 2] = fmaxf(most[e % 4 / 2], w[s / 16][e / 4][e % 4]);
        }
      }
      float up[2];
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float lift = 14.0f - binary_exponent(quad_max(most[half]));
        up[half] = power_of_two(fminf(lift, 74.0f));
        den[half] *= up[half];
        DIJIANG_UNROLL()
        for (int t = 0; t < kV / 8; ++t) {
          out[t][2 * half] *= up[half];
          out[t][2 * half + 1] *= up[half];
        }
      }
      DIJIANG_UNROLL()
      for (int s = 0; s < kTileRows; s += 16) {
        if (s <= row0) add_values(out, den, w[s / 16], value_tile, s, up[0], up[1]);
      }
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float down = 1.0f / up[half];
        den[half] *= down;
        DIJIANG_UNROLL()
        for (int t = 0; t < kV / 8; ++t) {
          out[t][2 * half] *= down;
          out[t][2 * half + 1] *= down;
        }
      }
    }

    unsigned failed = 0;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + g + 8 * half;
      const bool mine = mode.single ? row == mode.last : row < tile_count;
      const float sum = quad_sum(den[half]);
      failed |= __ballot_sync(~0u, mine && sum < kUnsafeSum && j == 0) << (2 * half);
      write_row(first + row, h, mine, sum, scale[half], out, half);
    }
    return failed;
  }

  __device__ __forceinline__ static void take_query(unsigned (&a)[kParts][4],
                                                    const unsigned (&query)[kParts][kM / 16][4],
                                                    int i) {
    DIJIANG_UNROLL()
    for (int part = 0; part < kParts; ++part) {
      DIJIANG_UNROLL()
      for (int r = 0; r < 4; ++r) a[part][r] = query[part][i / 16][r];
    }
  }

  // Weights of keys [s, s + 16) of the chunk for the warp's rows.
  __device__ __forceinline__ void weigh_keys(float (&w)[2][4],
                                             const unsigned (&query)[kParts][kM / 16][4], int s,
                                             bool masks_decay) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 8; ++e) w[e / 4][e % 4] = 0.0f;
    DIJIANG_UNROLL()
    for (int i = 0; i < kM; i += 16) {
      unsigned a[kParts][4], b[kParts][4];
      take_query(a, query, i);
      DIJIANG_UNROLL()
      for (int part = 0; part < kParts; ++part) {
        load_right<kM>(b[part], at<__nv_bfloat16>(Shared::features) + part * kTileRows * kM, s, i);
      }
      multiply_parts_16<kParts>(w[0], w[1], a, b);
    }
    const double* levels = at<double>(Shared::levels);
    DIJIANG_UNROLL()
    for (int t = 0; t < 2; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + lane / 4 + e / 2 * 8, key = s + 8 * t + 2 * (lane % 4) + e % 2;
        if (key > row) {
          w[t][e] = 0.0f;
        } else if (masks_decay) {
          w[t][e] *= fast_exp2(static_cast<float>(levels[row] - levels[key]));
        }
      }
    }
  }

  // out += w v over keys [s, s + 16), and their weights, as the product sees them, to the sums.
  __device__ __forceinline__ void add_values(float (&out)[kV / 8][4], float (&den)[2],
                                             const float (&w)[2][4], const T* value_tile, int s,
                                             float up0, float up1) {
    const unsigned a[4] = {
        pack<T>(w[0][0] * up0, w[0][1] * up0), pack<T>(w[0][2] * up1, w[0][3] * up1),
        pack<T>(w[1][0] * up0, w[1][1] * up0), pack<T>(w[1][2] * up1, w[1][3] * up1)};
    DIJIANG_UNROLL()
    for (int r = 0; r < 4; ++r) {
      const Pair<T> x = unpack<T>(a[r]);
      den[r % 2] += x.first + x.second;
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kV; n += 16) {
      unsigned b[4];
      load_right_transposed<kV>(b, value_tile, n, s);
      multiply_add_16<T>(out[n / 8], out[n / 8 + 1], a, b);
    }
  }

  // One of the lane's two rows: outputs, 16 bytes a lane, and statistics.
  __device__ __forceinline__ void write_row(int at_token, int h, bool mine, float den, float scale,
                                            const float (&out)[kV / 8][4], int half) {
    const LinearAttentionParams& p = params();
    const int j = lane % 4;
    const int64_t row = row_index(p, p.num_heads, batch, first_head + h, token + at_token);
    const RowEnd end = finish_row(p, den, scale);
    DIJIANG_UNROLL()
    for (int t = 0; t < kV / 8; t += 4) {
      unsigned packed[4];
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        packed[i] = pack<T>(row_output(p, out[t + i][2 * half], end, scale),
                            row_output(p, out[t + i][2 * half + 1], end, scale));
      }
      transpose_quad(packed);
      if (mine) {
        auto* to = static_cast<T*>(p.out) + row * p.headdim_v + first_column + (t + j) * 8;
        *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
    if (mine && j == 0 && first_column == 0) {
      if (p.row_scale) static_cast<float*>(p.row_scale)[row] = end.scale;
      if (p.row_sum) static_cast<float*>(p.row_sum)[row] = end.sum;
    }
  }

  // --- state -------------------------------------------------------------------------------------

  // weigh: what a token's features count in z.
  template <class Weigh>
  __device__ __forceinline__ void update_state(int first, bool decayed, const Weigh& weigh) {
    const auto* factor = at<float>(Shared::factor);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      const float factor0 = factor[column], factor1 = factor[column + 1];
      DIJIANG_UNROLL()
      for (int n = 0; n < kStateTiles; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) state[n][t][e] *= e % 2 ? factor1 : factor0;
      }
    }
    // Each warp sums the features of a quarter, as the product sees them.
    constexpr int kOwn = kM / (8 * kWalkWarps);
    float sums[kOwn] = {};
    const T* value_tile = values(first);
    DIJIANG_UNROLL()
    for (int s = 0; s < kTileRows; s += 16) {
      unsigned v[kStateTiles][kParts][4];
      DIJIANG_UNROLL()
      for (int n = 0; n < kStateTiles; ++n) {
        load_left_transposed<kV>(v[n][0], value_tile, (warp * kStateTiles + n) * 16, s);
        if constexpr (kParts == 2) {
          DIJIANG_UNROLL()
          for (int r = 0; r < 4; ++r) {
            const Pair<T> x = unpack<T>(v[n][0][r]);
            const Split<kParts> split(x.first, x.second);  // exact
            v[n][0][r] = split.part[0];
            v[n][1][r] = split.part[1];
          }
        }
      }
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned b[kParts][4];
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          load_right_transposed<kM>(
              b[part], at<__nv_bfloat16>(Shared::features) + part * kTileRows * kM, i, s);
        }
        DIJIANG_UNROLL()
        for (int n = 0; n < kStateTiles; ++n) {
          multiply_parts_16<kParts>(state[n][i / 8], state[n][i / 8 + 1], v[n], b);
        }
        if (i / (8 * kOwn) != warp) continue;
        DIJIANG_UNROLL()
        for (int r = 0; r < 4; ++r) {
          DIJIANG_UNROLL()
          for (int part = 0; part < kParts; ++part) {
            const Pair<__nv_bfloat16> x = unpack<__nv_bfloat16>(b[part][r]);
            const int token_ = s + r % 2 * 8 + 2 * (lane % 4);
            sums[(i / 8 + r / 2) % kOwn] += x.first * weigh(token_) + x.second * weigh(token_ + 1);
          }
        }
      }
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kOwn; ++n) {
      const float sum = quad_sum(sums[n]);
      const int i = (warp * kOwn + n) * 8 + lane / 4;
      if (lane % 4 == 0) {
        at<float>(Shared::z)[i] = at<float>(Shared::top_z)[i] + sum;
        at<float>(Shared::scale)[i] = at<float>(Shared::top)[i];
        if (decayed) at<float>(Shared::rest)[i] = at<float>(Shared::next_rest)[i];
      }
    }
  }

  // Of kv, whose last dimension is the whole of headdim_v.
  __device__ __forceinline__ int64_t element(int64_t cell, int i, int n) const {
    return (cell * kM + i) * params().headdim_v + first_column + state_row(n);
  }
  // use(place in kv, feature, element): of every element of the lane's.
  template <class Self, class Use>
  __device__ __forceinline__ static void each_element_of(Self& self, int64_t cell, const Use& use) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int n = 0; n < 2 * kStateTiles; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          const int i = 8 * t + 2 * (self.lane % 4) + e;
          use(self.element(cell, i, n), i, self.state[n / 2][t][n % 2 * 2 + e]);
        }
      }
    }
  }
  // cell: of (sequence or part, kv head). Null kv: empty.
  __device__ __forceinline__ void read_state(const float* kv, const float* z, const float* scale,
                                             int64_t cell) {
    each_element_of(*this, cell, [&](int64_t place, int, float& x) { x = kv ? kv[place] : 0.0f; });
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      const float x = z ? z[cell * kM + i] : 0.0f;
      at<float>(Shared::z)[i] = x;
      at<float>(Shared::scale)[i] = scale ? scale[cell * kM + i] : kEmpty;
      at<float>(Shared::rest)[i] = z && !(x < 1.0f) ? 0.999f : 0.0f;
    }
  }
  // After a barrier behind the last update.
  __device__ __forceinline__ void write_state(float* kv, float* z, float* scale,
                                              int64_t cell) const {
    each_element_of(*this, cell, [&](int64_t place, int, float x) { kv[place] = x; });
    if (first_column != 0) return;
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      z[cell * kM + i] = at<float>(Shared::z)[i];
      scale[cell * kM + i] = at<float>(Shared::scale)[i];
    }
  }

  // --- the walk ----------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    load_parameters(params().fk, kv_head, shared + Shared::key_omega, shared + Shared::key_lines);
    if (kRows) {
      for (int h = 0; h < f.block_heads; ++h) {
        load_parameters(params().fq, first_head + h, head_at(h), head_at(h) + Shared::kMatrix);
      }
    }
    load_keys(0);
    load_values(0);
    if (kRows) load_queries(0, 0);
    __syncthreads();
    for (int first = 0; first < count; first += kTileRows) walk_chunk(first);
    __syncthreads();
  }

  // A chunk goes through modes: its keys as they are for all rows of every head; for each row that
  // failed the keys up to it; with decay the keys as the state takes them up.
  __device__ __forceinline__ void walk_chunk(int first) {
    const bool has_decay = f.attention.has_decay;
    const int tile_count = count - first < kTileRows ? count - first : kTileRows;
    const int heads = kRows ? f.block_heads : 0;
    wait_rows();
    sum_decay(first);
    KeyMode mode;
    bool loaded = true;     // the keys' tile holds this chunk, not the next
    bool prepared = false;  // for `mode`
    bool begun = false;
    int h = 0;
    unsigned long long failed = 0;  // rows of head h still to be done alone
    while (true) {
      const bool updating = h == heads;
      if (updating && has_decay && !mode.decayed) {
        mode = {tile_count - 1, false, true};
        prepared = false;
      }
      if (!prepared) {
        if (!kRows && has_decay) __syncthreads();  // no rows have waited for the levels
        if (!loaded) {
          wait_rows();
          load_keys(first);
          wait_rows();
          loaded = true;
        }
        prepare_keys(mode, tile_count, !updating, [&] {
          if (!begun) load_values(first + kTileRows);
          begun = true;
          if (has_decay && !updating) return;
          load_keys(first + kTileRows);
          loaded = false;
        });
        prepared = true;
      }
      if (updating) break;

      unsigned mine = 0;
      if (!mode.single || mode.last / 16 == warp) {
        if (mode.single) {
          wait_rows();
          load_queries(first, h);
        }
        if (mode.single || h > 0) wait_rows();
        mine = compute_rows(mode, first, h, [&] {
          __syncwarp();
          const bool more = h + 1 < heads;
          load_queries(more ? first : first + kTileRows, more ? h + 1 : 0);
        });
      }
      // Two places in turn: slow warps may still read the last one.
      unsigned* places = at<unsigned>(Shared::failed) + turn * kWalkWarps;
      turn ^= 1;
      if (lane == 0) places[warp] = mine;
      __syncthreads();
      const unsigned long long now = failed_rows(places);
      if (!mode.single) {
        failed = now;
      } else if (now != 0 && has_decay && !mode.decayed) {
        mode.decayed = true;
        prepared = false;
        continue;
      } else {
        failed &= failed - 1;
      }
      if (failed != 0) {
        mode = {__ffsll(static_cast<long long>(failed)) - 1, true, false};
        prepared = false;
        continue;
      }
      if (mode.single) {
        mode = KeyMode{};
        prepared = false;
      }
      ++h;
    }
    update_state(first, mode.decayed, [](int) { return 1.0f; });
  }

  // Bit r: row r. A warp's ballots have row g at bit 4 g, row g + 8 at bit 4 g + 2.
  __device__ __forceinline__ static unsigned long long failed_rows(const unsigned* places) {
    unsigned long long all = 0;
    for (int w = 0; w < kWalkWarps; ++w) {
      const unsigned bits = places[w];
      if (bits == 0) continue;
      for (int g = 0; g < 8; ++g) {
        all |= static_cast<unsigned long long>(bits >> 4 * g & 1) << (16 * w + g);
        all |= static_cast<unsigned long long>(bits >> (4 * g + 2) & 1) << (16 * w + g + 8);
      }
    }
    return all;
  }
};

}  // namespace dijiang::cuda
