// One block's work of the fused far backward: a chunk of 64 tokens of a kv head, 16 a warp, with
// all query heads of its group, from the states that the walks left. Nothing hangs on another
// chunk.
//
// With P the far weights over den, G = (do v - delta) with the chunk's decay, phi_q the features of
// queries times 2^(M' - r) / den and phi_k those of keys times 2^-M':
//   db = phi_q * (S do - delta z + G phi_k)     da = phi_k * (R v - rho + G^T phi_q)
//   dv = phi_k R + P^T do
// G is worked out once with queries as rows and once with keys as rows, so that it is at once the
// left operand of what follows.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/fused_far_layout.h"
#include "cuda/fused_seen.h"
#include "cuda/fused_walk.h"

namespace dijiang::cuda {

// Of a row of queries.
struct FarRow {
  float scale, inverse, delta;
};

// Offsets in bytes.
template <class Shape>
struct FarShared {
  static constexpr int kTile = kTileRows * 2;  // bytes a column
  static constexpr int kMatrix = Shape::kMatrix * 2;
  static constexpr int kLines = Shape::kFeatures * static_cast<int>(sizeof(FeatureLine));
  static constexpr int kFloats = Shape::kFeatures * static_cast<int>(sizeof(float));

  static constexpr int key_omega = 0;
  static constexpr int query_omega = key_omega + kMatrix;
  static constexpr int keys = query_omega + kMatrix;
  static constexpr int values = keys + Shape::kHeadDim * kTile;
  static constexpr int queries = values + Shape::kValueDim * kTile;
  static constexpr int grads = queries + Shape::kHeadDim * kTile;
  static constexpr int state = grads + Shape::kValueDim * kTile;
  static constexpr int reverse = state + Shape::kState * 2;
  static constexpr int key_features = reverse + Shape::kState * 2;
  static constexpr int query_features = key_features + Shape::kFeatures * kTile;
  static constexpr int key_lines = query_features + Shape::kFeatures * kTile;
  static constexpr int query_lines = key_lines + kLines;
  static constexpr int levels = query_lines + kLines;  // up to a token, of the chunk's
  static constexpr int numbers = levels + kTileRows * static_cast<int>(sizeof(double));
  static constexpr int top = numbers + kTileRows * static_cast<int>(sizeof(FarRow));
  // 2^(M - M'), z 2^(M - M'), 2^(N + M'), rho 2^(N + M')
  static constexpr int factor = top + kFloats;
  static constexpr int z = factor + kFloats;
  static constexpr int reverse_factor = z + kFloats;
  static constexpr int rho = reverse_factor + kFloats;
  static constexpr int kBytes = rho + kFloats;
};

// The chunk's first row in buffers over (batch, heads, seqlen).
__device__ inline int64_t row_place(const LinearAttentionParams& p, int64_t heads, const Chunk& c,
                                    int64_t head) {
  return row_index(p, heads, c.batch, head, c.query_token);
}

// Sums over a warp's rows of x[t][e] and x[t][2 + e], of columns 8 t + 2 (lane % 4) + e: afterwards
// every lane has those of tile lane / 4 + 8 i at sums[i].
template <int kTiles>
__device__ __forceinline__ void sum_over_rows(const float (&x)[kTiles][4],
                                              float (&sums)[kTiles / 8][2]) {
  const int g = threadIdx.x % 32 / 4;
  DIJIANG_UNROLL()
  for (int t = 0; t < kTiles; ++t) {
    DIJIANG_UNROLL()
    for (int e = 0; e < 2; ++e) {
      float sum = x[t][e] + x[t][2 + e];
      DIJIANG_UNROLL()
      for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (t % 8 == g) sums[t / 8][e] = sum;
    }
  }
}

template <class Shape>
struct FarGrads {
  using T = typename Shape::T;
  using Shared = FarShared<Shape>;
  static constexpr int kD = Shape::kHeadDim, kV = Shape::kValueDim, kM = Shape::kFeatures;

  const FarBackward& b;
  const Attention& a;
  const FarWork& work;
  char* shared;
  Walk<typename Shape::Part, false> walk;  // for its exponents
  Chunk c;
  int64_t index, cell;
  int kv_head, count, lane, warp, row0;
  float da[kM / 8][4], dv[kV / 8][4];

  __device__ __forceinline__ FarGrads(const FarBackward& backward, const Chunk& chunk, char* raw)
      : b(backward),
        a(backward.f.attention),
        work(backward.work),
        shared(raw),
        walk(backward.f, raw),
        c(chunk),
        index(blockIdx.x),
        kv_head(blockIdx.y),
        count(chunk.query_count),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        row0(threadIdx.x / 32 * 16) {
    cell = cell_of(a, index, kv_head);
    walk.batch = c.batch;
    walk.token = c.query_token;
    walk.count = count;
    clear(da);
    clear(dv);
  }

  __device__ __forceinline__ const LinearAttentionParams& params() const { return a.params; }
  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  // Of the lane's two rows.
  __device__ __forceinline__ int row(int half) const { return row0 + lane / 4 + 8 * half; }
  // 2^(the decay of (from, to]); from = -1: from the chunk's beginning on.
  __device__ __forceinline__ float decay(int from, int to) const {
    if (!a.has_decay) return 1.0f;
    const double* levels = at<double>(Shared::levels);
    return fast_exp2(static_cast<float>(levels[to] - (from < 0 ? 0.0 : levels[from])));
  }

  // --- tiles -------------------------------------------------------------------------------------

  __device__ __forceinline__ void copy(int to, const void* from, int bytes) {
    for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kWalkThreads) {
      copy_async(shared + to + i, static_cast<const char*>(from) + i, true);
    }
  }
  __device__ __forceinline__ void load_side(int side, int head, int matrix, int lines) {
    copy(matrix, work.omega[side] + int64_t{head} * Shape::kMatrix, Shared::kMatrix);
    copy(lines, work.lines[side] + int64_t{head} * kM, Shared::kLines);
  }
  __device__ __forceinline__ void load_head(int head) {
    const LinearAttentionParams& p = params();
    walk.template load_rows<kD>(at<T>(Shared::queries), p.q, head, 0);
    walk.template load_rows<kV>(at<T>(Shared::grads), b.grad_out, head, 0);
    load_side(0, head, Shared::query_omega, Shared::query_lines);
    if (threadIdx.x >= kTileRows) return;
    const int64_t first = row_place(p, p.num_heads, c, head);
    const int mine = threadIdx.x;
    at<FarRow>(Shared::numbers)[mine] =
        mine < count ? FarRow{static_cast<const float*>(p.row_scale)[first + mine],
                              work.inverse[first + mine], work.delta[first + mine]}
                     : FarRow{0.0f, 0.0f, 0.0f};
  }
  __device__ __forceinline__ void load_chunk() {
    const LinearAttentionParams& p = params();
    walk.template load_rows<kD>(at<T>(Shared::keys), p.k, kv_head, 0);
    walk.template load_rows<kV>(at<T>(Shared::values), p.v, kv_head, 0);
    load_side(1, kv_head, Shared::key_omega, Shared::key_lines);
    copy(Shared::state, work.state + cell * Shape::kState, Shape::kState * 2);
    copy(Shared::reverse, work.reverse + cell * Shape::kState, Shape::kState * 2);
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      const int64_t place = cell * kM + i;
      const float top = work.top[place];
      const float factor = scale2(1.0f, work.scale[place] - top);
      const float reverse_factor = scale2(1.0f, work.reverse_scale[place] + top);
      at<float>(Shared::top)[i] = top;
      at<float>(Shared::factor)[i] = factor;
      at<float>(Shared::z)[i] = work.z[place] * factor;
      at<float>(Shared::reverse_factor)[i] = reverse_factor;
      at<float>(Shared::rho)[i] = work.reverse_z[place] * reverse_factor;
    }
    if (a.has_decay) {
      const double* levels = levels_of(a, index, kv_head);
      for (int i = threadIdx.x; i < kTileRows; i += kWalkThreads) {
        at<double>(Shared::levels)[i] = levels[i < count ? i : count - 1];
      }
    }
  }

  // --- features ----------------------------------------------------------------------------------

  __device__ __forceinline__ void key_exponents(float (&u)[kM / 8][4]) {
    walk.exponents(at<T>(Shared::keys), shared + Shared::key_omega, shared + Shared::key_lines,
                   params().fk.beta, kv_head, u);
  }
  __device__ __forceinline__ void store_feature(int tile, int half, int column, unsigned x) const {
    *reinterpret_cast<unsigned*>(at<T>(tile) + tile_offset<kM>(row(half), column)) = x;
  }
  __device__ __forceinline__ unsigned feature(int tile, int half, int column) const {
    return *reinterpret_cast<const unsigned*>(at<T>(tile) + tile_offset<kM>(row(half), column));
  }

  __device__ __forceinline__ void make_key_features() {
    float u[kM / 8][4];
    key_exponents(u);
    const float* top = at<float>(Shared::top);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const bool kept = row(half) < count;
        store_feature(Shared::key_features, half, column,
                      pack<T>(kept ? exp2_below(u[t][2 * half], -top[column]) : 0.0f,
                              kept ? exp2_below(u[t][2 * half + 1], -top[column + 1]) : 0.0f));
      }
    }
  }

  // From exponents. Rows whose features overflow relative to M' (those of later keys, or of keys
  // that have decayed since) are left out: fused_far_unsafe.h adds them.
  __device__ __forceinline__ void make_query_features(const float (&u)[kM / 8][4], int head) {
    constexpr int kMost = static_cast<int>(kSafeExponent) + 1;
    const float* top = at<float>(Shared::top);
    FarRow numbers[2];
    bool unsafe[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      numbers[half] = at<FarRow>(Shared::numbers)[row(half)];
      float most = kEmpty;
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        const int column = 8 * t + 2 * (lane % 4);
        most =
            fmaxf(most, fmaxf(u[t][2 * half] + top[column], u[t][2 * half + 1] + top[column + 1]));
      }
      most = quad_max(most) - numbers[half].scale;
      unsafe[half] = numbers[half].inverse != 0.0f && most > kSafeExponent;
    }
    const unsigned first = __ballot_sync(~0u, unsafe[0] && lane % 4 == 0);
    const unsigned second = __ballot_sync(~0u, unsafe[1] && lane % 4 == 0);
    if (lane == 0) {
      work.unsafe[(index * params().num_heads + head) * kWalkWarps + warp] = first | second << 2;
    }
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float times = unsafe[half] ? 0.0f : numbers[half].inverse;
        const auto one = [&](int e) {
          if (times == 0.0f) return 0.0f;
          return exp2_below<kMost>(u[t][2 * half + e], top[column + e] - numbers[half].scale) *
                 times;
        };
        store_feature(Shared::query_features, half, column, pack<T>(one(0), one(1)));
      }
    }
  }

  // --- queries -----------------------------------------------------------------------------------

  // What the warp's queries have from the state and the chunk's keys; without their own features.
  __device__ __forceinline__ void sum_queries(float (&db)[kM / 8][4]) {
    unsigned grad[kV / 16][4];
    clear(db);
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) {
      load_left<kV>(grad[k / 16], at<T>(Shared::grads), row0, k);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned s[4];
        load_right_transposed<kM>(s, at<T>(Shared::state), i, k);
        multiply_add_16<T>(db[i / 8], db[i / 8 + 1], grad[k / 16], s);
      }
    }
    float delta[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      delta[half] = at<FarRow>(Shared::numbers)[row(half)].delta;
      const float left = decay(-1, row(half));
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * t + 2 * (lane % 4) + e;
          float& x = db[t][2 * half + e];
          x = (x * at<float>(Shared::factor)[column] - delta[half] * at<float>(Shared::z)[column]) *
              left;
        }
      }
    }
    DIJIANG_UNROLL(1)
    for (int s = 0; s <= row0; s += 16) {
      float x[2][4];
      clear(x);
      DIJIANG_UNROLL()
      for (int k = 0; k < kV; k += 16) {
        unsigned v[4];
        load_right<kV>(v, at<T>(Shared::values), s, k);
        multiply_add_16<T>(x[0], x[1], grad[k / 16], v);
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < 2; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          const int key = s + 8 * n + 2 * (lane % 4) + e % 2, query = row(e / 2);
          x[n][e] = key <= query ? (x[n][e] - delta[e / 2]) * decay(key, query) : 0.0f;
        }
      }
      unsigned g[4];
      pack_left<T>(g, x[0], x[1]);
      add_rows(db, g, at<T>(Shared::key_features), s);
    }
  }

  // sum += w rows [s, s + 16) of a tile of features.
  __device__ __forceinline__ static void add_rows(float (&sum)[kM / 8][4], const unsigned (&w)[4],
                                                  const T* tile, int s) {
    DIJIANG_UNROLL()
    for (int i = 0; i < kM; i += 16) {
      unsigned x[4];
      load_right_transposed<kM>(x, tile, i, s);
      multiply_add_16<T>(sum[i / 8], sum[i / 8 + 1], w, x);
    }
  }

  // --- keys --------------------------------------------------------------------------------------

  // Adds what the chunk's queries of a head give the warp's keys and values.
  __device__ __forceinline__ void add_queries() {
    DIJIANG_UNROLL(1)
    for (int s = row0; s < kTileRows; s += 16) {
      float x[2][4], y[2][4];
      clear(x);
      clear(y);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned left[4], right[4];
        load_left<kM>(left, at<T>(Shared::key_features), row0, i);
        load_right<kM>(right, at<T>(Shared::query_features), s, i);
        multiply_add_16<T>(x[0], x[1], left, right);
      }
      DIJIANG_UNROLL()
      for (int k = 0; k < kV; k += 16) {
        unsigned left[4], right[4];
        load_left<kV>(left, at<T>(Shared::values), row0, k);
        load_right<kV>(right, at<T>(Shared::grads), s, k);
        multiply_add_16<T>(y[0], y[1], left, right);
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < 2; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          const int query = s + 8 * n + 2 * (lane % 4) + e % 2, key = row(e / 2);
          const float times = key <= query ? decay(key, query) : 0.0f;
          const float delta = at<FarRow>(Shared::numbers)[query].delta;
          x[n][e] = key <= query ? x[n][e] * times : 0.0f;
          y[n][e] = key <= query ? (y[n][e] - delta) * times : 0.0f;
        }
      }
      unsigned w[4];
      pack_left<T>(w, x[0], x[1]);
      DIJIANG_UNROLL()
      for (int k = 0; k < kV; k += 16) {
        unsigned grad[4];
        load_right_transposed<kV>(grad, at<T>(Shared::grads), k, s);
        multiply_add_16<T>(dv[k / 8], dv[k / 8 + 1], w, grad);
      }
      pack_left<T>(w, y[0], y[1]);
      add_rows(da, w, at<T>(Shared::query_features), s);
    }
  }

  // Adds what later chunks give, and writes the gradients of values.
  __device__ __forceinline__ void finish_values() {
    float left[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) left[half] = decay(row(half), kTileRows - 1);
    const float* factor = at<float>(Shared::reverse_factor);
    unsigned phi[kM / 16][4];
    DIJIANG_UNROLL()
    for (int i = 0; i < kM; i += 16) {
      load_left<kM>(phi[i / 16], at<T>(Shared::key_features), row0, i);
      DIJIANG_UNROLL()
      for (int r = 0; r < 4; ++r) {
        const int column = i + r / 2 * 8 + 2 * (lane % 4);
        const Pair<T> x = unpack<T>(phi[i / 16][r]);
        phi[i / 16][r] = pack<T>(x.first * factor[column], x.second * factor[column + 1]);
      }
    }
    DIJIANG_UNROLL()
    for (int n = 0; n < kV; n += 16) {
      float x[2][4];
      clear(x);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned r[4];
        load_right<kM>(r, at<T>(Shared::reverse), n, i);
        multiply_add_16<T>(x[0], x[1], phi[i / 16], r);
      }
      DIJIANG_UNROLL()
      for (int e = 0; e < 8; ++e) dv[n / 8 + e / 4][e % 4] += x[e / 4][e % 4] * left[e % 4 / 2];
    }
    const LinearAttentionParams& p = params();
    auto* to = static_cast<T*>(b.grad_v) + row_place(p, p.num_kv_heads, c, kv_head) * kV;
    DIJIANG_UNROLL()
    for (int n = 0; n < kV / 8; n += 4) {
      write_pieces<kV>(to, n, [&](int half, int i) {
        return pack<T>(dv[n + i][2 * half], dv[n + i][2 * half + 1]);
      });
    }
  }

  // Likewise for the features of keys, with their own.
  __device__ __forceinline__ void finish_keys() {
    float x[kM / 8][4];
    clear(x);
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) {
      unsigned v[4];
      load_left<kV>(v, at<T>(Shared::values), row0, k);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned r[4];
        load_right_transposed<kM>(r, at<T>(Shared::reverse), i, k);
        multiply_add_16<T>(x[i / 8], x[i / 8 + 1], v, r);
      }
    }
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const float left = decay(row(half), kTileRows - 1);
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * t + 2 * (lane % 4) + e;
          da[t][2 * half + e] += (x[t][2 * half + e] * at<float>(Shared::reverse_factor)[column] -
                                  at<float>(Shared::rho)[column]) *
                                 left;
        }
      }
    }
    times_features(da, Shared::key_features);
  }
  __device__ __forceinline__ void times_features(float (&x)[kM / 8][4], int tile) const {
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const Pair<T> phi = unpack<T>(feature(tile, half, 8 * t + 2 * (lane % 4)));
        x[t][2 * half] *= phi.first;
        x[t][2 * half + 1] *= phi.second;
      }
    }
  }

  // --- inputs ------------------------------------------------------------------------------------

  // 32 columns of the warp's rows, 8 (n + i) on for i < 4: pair(half, i) of the lane.
  template <int kWidth, class Pairs>
  __device__ __forceinline__ void write_pieces(T* to, int n, const Pairs& pair) const {
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      unsigned packed[4];
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) packed[i] = pair(half, i);
      transpose_quad(packed);
      if (row(half) >= count) continue;
      *reinterpret_cast<uint4*>(to + row(half) * kWidth + 8 * (n + lane % 4)) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }

  // A side's heads, parameters and what is in shared memory.
  struct Side {
    int number;  // 0: queries
    int64_t heads, head;
    const FeatureParams& feature;
    int tile, matrix, lines;
  };

  // From the gradient g of the exponents u (not read for kExp) to all that the side is given.
  __device__ __forceinline__ void finish_side(const Side& side, float (&g)[kM / 8][4],
                                              const float (&u)[kM / 8][4]) const {
    const LinearAttentionParams& p = params();
    const int64_t first = row_place(p, side.heads, c, side.head);
    const auto* line = at<FeatureLine>(side.lines);
    if (work.weights[side.number]) {
      float sums[kM / 64][2];
      sum_over_rows(g, sums);
      float* to =
          work.weights[side.number] + ((index * side.heads + side.head) * kWalkWarps + warp) * kM;
      to[lane / 4 * 8 + 2 * (lane % 4)] = sums[0][0];
      to[lane / 4 * 8 + 2 * (lane % 4) + 1] = sums[0][1];
    }
    float total[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) sum += g[t][2 * half] + g[t][2 * half + 1];
      total[half] = quad_sum(sum);
      if (row(half) < count && lane % 4 == 0)
        work.total[side.number][first + row(half)] = total[half];
    }
    slope_inputs(p.kind, line, g, u, total);
    if (work.slopes[side.number]) {
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; t += 4) {
        write_pieces<kM>(work.slopes[side.number] + first * kM, t, [&](int half, int i) {
          return pack<T>(g[t + i][2 * half], g[t + i][2 * half + 1]);
        });
      }
    }

    // dx = omega^T du: a row of omega's upper part times its gain ln 2 is sqrt(scale) omega.
    unsigned du[kM / 16][4];
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      const float gain[2] = {line[column].gain * kLn2, line[column + 1].gain * kLn2};
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        du[t / 2][t % 2 * 2 + half] =
            pack<T>(g[t][2 * half] * gain[0], g[t][2 * half + 1] * gain[1]);
      }
    }
    const bool has_beta = side.feature.beta && p.kind == FeatureKind::kExp;
    const float twice = has_beta ? 2.0f * static_cast<const float*>(side.feature.beta)[side.head] *
                                       static_cast<float>(p.scale)
                                 : 0.0f;
    float square[2] = {0.0f, 0.0f};
    DIJIANG_UNROLL(1)
    for (int n = 0; n < kD; n += 32) {
      float x[4][4];
      clear(x);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        DIJIANG_UNROLL()
        for (int j = 0; j < 4; j += 2) {
          unsigned omega[4];
          load_right_transposed<kD>(omega, at<T>(side.matrix), n + 8 * j, i);
          multiply_add_16<T>(x[j], x[j + 1], du[i / 16], omega);
        }
      }
      if (has_beta) {
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          DIJIANG_UNROLL()
          for (int j = 0; j < 4; ++j) {
            const Pair<T> y = unpack<T>(*reinterpret_cast<const unsigned*>(
                at<T>(side.tile) + tile_offset<kD>(row(half), n + 8 * j + 2 * (lane % 4))));
            square[half] = fmaf(y.first, y.first, fmaf(y.second, y.second, square[half]));
            x[j][2 * half] -= twice * total[half] * y.first;
            x[j][2 * half + 1] -= twice * total[half] * y.second;
          }
        }
      }
      write_pieces<kD>(
          static_cast<T*>(b.grad_x[side.number]) + first * kD, n / 8,
          [&](int half, int j) { return pack<T>(x[j][2 * half], x[j][2 * half + 1]); });
    }
    if (!has_beta || !b.grad_feature[side.number].beta) return;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const float size = quad_sum(square[half]) * static_cast<float>(p.scale);
      if (row(half) < count && lane % 4 == 0) {
        work.square[side.number][first + row(half)] = size * total[half];
      }
    }
  }

  // From gradients of exponents to those of omega x (linear_slope).
  __device__ __forceinline__ void slope_inputs(FeatureKind kind, const FeatureLine* line,
                                               float (&g)[kM / 8][4], const float (&u)[kM / 8][4],
                                               const float (&total)[2]) const {
    if (kind == FeatureKind::kExp) return;
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const float log_phi = u[t][e] - line[8 * t + 2 * (lane % 4) + e % 2].weight;
        if (row(e / 2) >= count) {
          g[t][e] = 0.0f;
        } else if (kind == FeatureKind::kSoftmax) {
          g[t][e] -= fast_exp2(log_phi) * total[e / 2];
        } else {
          g[t][e] *= fast_exp2(-fmaxf(log_phi, 0.0f));
        }
      }
    }
  }

  // --- the chunk ---------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    const LinearAttentionParams& p = params();
    const int group = a.group;
    load_chunk();
    load_head(kv_head * group);
    wait_copies();
    __syncthreads();
    make_key_features();
    DIJIANG_UNROLL(1)
    for (int h = 0; h < group; ++h) {
      const int head = kv_head * group + h;
      if (h > 0) {
        wait_copies();
        __syncthreads();
      }
      {
        float u[kM / 8][4], db[kM / 8][4];
        walk.exponents(at<T>(Shared::queries), shared + Shared::query_omega,
                       shared + Shared::query_lines, p.fq.beta, head, u);
        make_query_features(u, head);
        __syncthreads();
        sum_queries(db);
        times_features(db, Shared::query_features);
        finish_side(
            {0, p.num_heads, head, p.fq, Shared::queries, Shared::query_omega, Shared::query_lines},
            db, u);
      }
      add_queries();
      if (h + 1 == group) break;
      __syncthreads();
      load_head(head + 1);
    }
    finish_values();
    finish_keys();
    float u[kM / 8][4];
    if (p.kind != FeatureKind::kExp) key_exponents(u);
    finish_side(
        {1, p.num_kv_heads, kv_head, p.fk, Shared::keys, Shared::key_omega, Shared::key_lines}, da,
        u);
  }
};

}  // namespace dijiang::cuda
