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

#include "cuda/attention_rows.h"
#include "cuda/fused_state.h"

namespace dijiang::cuda {

// Which keys of a chunk are prepared, and for whom.
struct KeyMode {
  int last = kTileRows - 1;
  bool single = false;   // for row `last` alone
  bool decayed = false;  // keys and state decayed up to the token `last`
};

template <class Shape, bool kRows>
struct Walk : StateWalk<Shape, FusedShared<Shape, kRows>> {
  using Base = StateWalk<Shape, FusedShared<Shape, kRows>>;
  using Base::first_column;
  using Base::kD;
  using Base::kM;
  using Base::kParts;
  using Base::kStateTiles;
  using Base::kV;
  using Base::kv_head;
  using Base::lane;
  using Base::params;
  using Base::row0;
  using Base::shared;
  using Base::state;
  using Base::wait_rows;
  using Base::warp;
  using typename Base::Map;
  using typename Base::Shared;
  using typename Base::T;

  static constexpr bool kValuesEarly = Shared::kValueStages > 1;

  const FusedAttention& f;
  int batch, first_head, token, count;  // of the part
  int turn = 0;
  double decay = 0.0;  // in the first warp: of all tokens so far, base 2

  __device__ __forceinline__ Walk(const FusedAttention& fused, char* raw, const Chunk& part,
                                  int head, int first_query_head)
      : Base(fused.attention, raw, head, kRows ? fused.slice : 0),
        f(fused),
        batch(part.batch),
        first_head(first_query_head),
        token(part.query_token),
        count(part.query_count) {}

  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return Base::template at<U>(offset);
  }
  __device__ __forceinline__ char* head_at(int h) const {
    return shared + Shared::heads + h * Shared::kHead;
  }

  // --- tiles -------------------------------------------------------------------------------------

  __device__ __forceinline__ int headdim() const { return static_cast<int>(params().headdim); }
  // The warp's own 16 rows of the tile at `first`, `width` columns from `from_column` on; zeros
  // behind the part's end and behind those columns.
  template <int kWidth>
  __device__ __forceinline__ void load_rows(T* tile, const ConstView& view, int head, int first,
                                            int width, int from_column = 0) {
    constexpr int kPieces = kWidth / 8, kStep = 32 / kPieces;
    const int column = lane % kPieces * 8, row = row0 + lane / kPieces;
    const int left = column < width ? count - first - row : 0;  // rows from the lane's first one on
    const T* from =
        static_cast<const T*>(view.data) + batch * view.stride_batch + head * view.stride_head +
        static_cast<int64_t>(token + first + row) * view.stride_seq + (from_column + column);
    DIJIANG_UNROLL()
    for (int i = 0; i < 16; i += kStep) {
      copy_async(tile + tile_offset<kWidth>(row + i, column), from + i * view.stride_seq, i < left);
    }
  }
  __device__ __forceinline__ void load_keys(int first) {
    load_rows<kD>(at<T>(Shared::keys), params().k, kv_head, first, headdim());
  }
  __device__ __forceinline__ void load_queries(int first, int h) {
    load_rows<kD>(at<T>(Shared::queries), params().q, first_head + h, first, headdim());
  }
  __device__ __forceinline__ T* values(int first) const { return Base::values(first / kTileRows); }
  __device__ __forceinline__ void load_values(int first) {
    load_rows<kV>(values(first), params().v, kv_head, first, this->value_width(), first_column);
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

  // From the keys' tile: M', the features and what state and z are multiplied by; likewise the
  // state, for rows to read. between: called when all warps are done with what they did before.
  template <class Between>
  __device__ __forceinline__ void prepare_keys(const KeyMode& mode, int tile_count, bool for_rows,
                                               const Between& between) {
    float u[kM / 8][4];
    this->key_exponents(u);
    const int end = mode.last < tile_count ? mode.last + 1 : tile_count;
    const double* levels = at<double>(Shared::levels);
    bool kept[2];
    float left[2] = {0.0f, 0.0f};
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      kept[half] = row < end;
      if (mode.decayed && kept[half]) {
        left[half] = static_cast<float>(levels[mode.last] - levels[row]);
      }
    }
    if (mode.decayed) add_to_rows(u, left);
    this->prepare_features(u, kept, mode.decayed,
                           mode.decayed ? static_cast<float>(levels[mode.last]) : 0.0f, between);
    if (kRows && for_rows) store_readable();
    __syncthreads();
  }
  __device__ __forceinline__ void store_readable() {
    const auto* factor = at<float>(Shared::factor);
    auto* readable = at<__nv_bfloat16>(Shared::state);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      float factor0 = 1.0f, factor1 = 1.0f;
      if (this->rescales) {
        factor0 = factor[column];
        factor1 = factor[column + 1];
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < 2 * kStateTiles; ++n) {
        const float* s = state[n / 2][t] + n % 2 * 2;
        const Split<kParts> x(s[0] * factor0, s[1] * factor1);
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          this->store_pair(readable + part * kV * kM, this->state_row(n), column, x.part[part]);
        }
      }
    }
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
    float own[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of the chunk's own keys: own[0], own[2]
    {
      float b[kM / 8][4];
      const Map map{p, head_at(h), head_at(h) + Map::kMatrix};
      this->exponents(at<T>(Shared::queries), map, p.fq.beta, first_head + h, b);
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
      // Where there is nothing to refer to, features are 0.
      float away[2];
      bool moderate = this->moderate;
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const bool any = scale[half] > kNone;
        away[half] = any ? scale[half] : -kEmpty;
        moderate = moderate && (fabsf(scale[half]) <= kModerate || !any);
      }
      exp2_tiles<1, true, false>(b, __all_sync(~0u, moderate), [&](int t, int e) {
        return top[8 * t + 2 * j + e % 2] - (e < 2 ? away[0] : away[1]);
      });
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        const int column = 8 * t + 2 * j;
        const float z0 = at<float>(Shared::top_z)[column],
                    z1 = at<float>(Shared::top_z)[column + 1];
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          const Split<kParts> x(b[t][2 * half], b[t][2 * half + 1]);
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
        add_values(out, own, w, value_tile, s, 1.0f, 1.0f);
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
        if (s <= row0) add_values(out, own, w[s / 16], value_tile, s, up[0], up[1]);
      }
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float down = 1.0f / up[half];
        den[half] *= down;
        own[2 * half] *= down;
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
      const float sum = quad_sum(den[half]) + own[2 * half];
      failed |= __ballot_sync(~0u, mine && sum < kUnsafeSum && j == 0) << (2 * half);
      write_row(first + row0 + g, h, mine, sum, scale[half], out, half);
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
    const auto each = [&](const auto& take) {
      DIJIANG_UNROLL()
      for (int t = 0; t < 2; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          take(w[t][e], row0 + lane / 4 + e / 2 * 8, s + 8 * t + 2 * (lane % 4) + e % 2);
        }
      }
    };
    if (masks_decay) {
      const double* levels = at<double>(Shared::levels);
      each([&](float& x, int row, int key) {
        if (key <= row) x *= fast_exp2(static_cast<float>(levels[row] - levels[key]));
      });
    }
    if (s == row0) {
      each([](float& x, int row, int key) { x = key > row ? 0.0f : x; });
    }
  }

  // out += w v over keys [s, s + 16), and their weights, as the product sees them, to the sums.
  __device__ __forceinline__ void add_values(float (&out)[kV / 8][4], float (&sums)[4],
                                             const float (&w)[2][4], const T* value_tile, int s,
                                             float up0, float up1) {
    const unsigned a[4] = {
        pack<T>(w[0][0] * up0, w[0][1] * up0), pack<T>(w[0][2] * up1, w[0][3] * up1),
        pack<T>(w[1][0] * up0, w[1][1] * up0), pack<T>(w[1][2] * up1, w[1][3] * up1)};
    const unsigned ones = pack<T>(1.0f, 1.0f);
    multiply_add<T>(sums, a, ones, ones);
    DIJIANG_UNROLL()
    for (int n = 0; n < kV; n += 16) {
      unsigned b[4];
      load_right_transposed<kV>(b, value_tile, n, s);
      multiply_add_16<T>(out[n / 8], out[n / 8 + 1], a, b);
    }
  }

  // One of the lane's two rows of a slice: with those before it, to memory. What slices before have
  // left stays as it is, as a row that fails is written again. at_token: of the first of the two.
  __device__ __forceinline__ void write_row(int at_token, int h, bool mine, float den, float scale,
                                            float (&out)[kV / 8][4], int half) {
    const LinearAttentionParams& p = params();
    const int64_t row =
        row_index(p, p.num_heads, batch, first_head + h, token + at_token) + 8 * half;
    const bool is_last = this->first_feature() + kM >= p.num_features;
    if (this->slice > 0 || !is_last) normalise_sums(den, scale, out, half);
    if (mine && this->slice > 0) {
      add_sums(f.sums[(this->slice + 1) % 2], row, den, scale, out, half);
    }
    if (is_last) {
      finish(row, mine, den, scale, out, half);
    } else if (mine) {
      save_sums(f.sums[this->slice % 2], row, den, scale, out, half);
    }
  }
  // den in [1/2, 1): that later keys of the chunk may have raised the scale shows in no bit of what
  // is added to other slices, or of which one of them counts nothing.
  __device__ __forceinline__ static void normalise_sums(float& den, float& scale,
                                                        float (&out)[kV / 8][4], int half) {
    if (den == 0.0f) scale = kEmpty;
    if (!(den > 0.0f && den < 1e37f)) return;  // nothing, or not a number
    const float shift = fmaxf(binary_exponent(den), -126.0f);
    if (scale + shift - scale != shift) return;  // beyond 2^24
    const float times = power_of_two(-shift);
    scale += shift;
    den *= times;
    DIJIANG_UNROLL()
    for (int t = 0; t < kV / 8; ++t) {
      out[t][2 * half] *= times;
      out[t][2 * half + 1] *= times;
    }
  }
  // take(t, i): the lane's two columns of part t, so far as there are any; in memory from i on.
  template <class Take>
  __device__ __forceinline__ void each_column(const Take& take) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kV / 8; ++t) {
      if (8 * t < this->value_width()) take(t, first_column + 8 * t + 2 * (lane % 4));
    }
  }
  __device__ __forceinline__ void add_sums(const RowSums& sums, int64_t row, float& den,
                                           float& scale, float (&out)[kV / 8][4], int half) {
    const float before = sums.scale[row], top = fmaxf(scale, before);
    const float times = scale2(1.0f, scale - top), times_before = scale2(1.0f, before - top);
    scale = top;
    den = fmaf(den, times, sums.den[row] * times_before);
    const float* from = sums.out + row * params().headdim_v;
    each_column([&](int t, int column) {
      const auto x = *reinterpret_cast<const float2*>(from + column);
      out[t][2 * half] = fmaf(out[t][2 * half], times, x.x * times_before);
      out[t][2 * half + 1] = fmaf(out[t][2 * half + 1], times, x.y * times_before);
    });
  }
  __device__ __forceinline__ void save_sums(const RowSums& sums, int64_t row, float den,
                                            float scale, const float (&out)[kV / 8][4], int half) {
    float* to = sums.out + row * params().headdim_v;
    each_column([&](int t, int column) {
      *reinterpret_cast<float2*>(to + column) = make_float2(out[t][2 * half], out[t][2 * half + 1]);
    });
    if (lane % 4 != 0 || first_column != 0) return;
    sums.den[row] = den;
    sums.scale[row] = scale;
  }

  // Outputs and statistics.
  __device__ __forceinline__ void finish(int64_t row, bool mine, float den, float scale,
                                         const float (&out)[kV / 8][4], int half) {
    const LinearAttentionParams& p = params();
    float y[kV / 8][2];
    take_outputs(p, y, out, half, den, scale);
    store_row(static_cast<T*>(p.out) + row * p.headdim_v + first_column, y,
              mine ? this->value_width() : 0);
    if (!p.row_scale && !p.row_sum) return;
    if (mine && lane % 4 == 0 && first_column == 0) {
      const RowEnd end = finish_row(p, den, scale);
      if (p.row_scale) static_cast<float*>(p.row_scale)[row] = end.scale;
      if (p.row_sum) static_cast<float*>(p.row_sum)[row] = end.sum;
    }
  }

  // --- the walk ----------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    this->store_key_map();
    if (kRows) {
      for (int h = 0; h < f.block_heads; ++h) {
        Map::store(params(), params().fq, first_head + h, this->first_feature(), head_at(h),
                   head_at(h) + Map::kMatrix);
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
          if (kValuesEarly && !begun) load_values(first + kTileRows);
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
    this->update_state(values(first), mode.decayed);
    if (kValuesEarly) return;
    __syncthreads();  // nobody reads the values any more
    load_values(first + kTileRows);
  }
};

}  // namespace dijiang::cuda
