// 16 rows of a warp, queries or keys, in the fused far backward: from the gradient of their
// features' exponents to those of inputs and to what parameters and decay are summed from.
#pragma once

#include "cuda/fused_far_layout.h"
#include "cuda/fused_seen.h"

namespace dijiang::cuda {

// Sums over a warp's rows of x[t][e] and x[t][2 + e], of columns 8 t + 2 (lane % 4) + e: afterwards
// lane / 4 has those of tiles lane / 4 + 8 i at sums[i].
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

// The rows, and where what is found of them goes.
struct FarSide {
  int number;  // 0: queries, 1: keys
  int64_t head, heads;
  const FeatureParams& feature;
  int64_t place[2];  // of the lane's two rows, over (batch, heads, seqlen); -1: none
  int64_t tile;      // of (chunk, tile of 64 rows)
};

template <class Shape>
struct FarRows {
  using T = typename Shape::T;
  using Map = typename Shape::Map;
  static constexpr int kD = Shape::kHeadDim, kV = Shape::kValueDim, kM = Shape::kFeatures;

  const FarBackward& b;
  const Attention& a;
  const FarWork& work;
  char* shared;
  int lane, warp, row0;

  __device__ __forceinline__ FarRows(const FarBackward& backward, char* raw)
      : b(backward),
        a(backward.a),
        work(backward.work),
        shared(raw),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        row0(threadIdx.x / 32 * 16) {}

  __device__ __forceinline__ const LinearAttentionParams& params() const { return a.params; }
  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  // A state as tiles have it; of columns of v that it has not: zeros.
  __device__ __forceinline__ void load_state(int to, const T* states, int64_t place) const {
    const int size = kV > 128 ? static_cast<int>(tile_columns(params())) * kM : Shape::kState;
    copy_block(shared + to, states + place * size, 2 * size);
    for (int i = 2 * size + 16 * threadIdx.x; i < 2 * Shape::kState; i += 16 * kWalkThreads) {
      *at<uint4>(to + i) = make_uint4(0, 0, 0, 0);
    }
  }
  // Of the lane's two rows.
  __device__ __forceinline__ int row(int half) const { return row0 + lane / 4 + 8 * half; }

  // Exponents of the warp's rows of a tile.
  __device__ __forceinline__ void exponents(const T* tile, const Map& map,
                                            const FeatureParams& feature, int64_t head,
                                            float (&u)[kM / 8][4]) const {
    map.template exponents<2>(
        feature.beta, static_cast<int>(head), u,
        [&](unsigned(&left)[4], int k) { load_left<kD>(left, tile, row0, k); });
  }

  // The slice's first feature, of all; what a row of all tiles' features has.
  __device__ __forceinline__ int first_feature() const { return b.slice * kM; }
  __device__ __forceinline__ int all_features() const { return b.slices * kM; }
  // The slice's place in what is over (.., slices).
  __device__ __forceinline__ int64_t slice_at(int64_t place) const {
    return place * b.slices + b.slice;
  }
  __device__ __forceinline__ const char* map_of(int number, int64_t head) const {
    return work.maps[number] + slice_at(head) * Map::kBytes;
  }

  __device__ __forceinline__ int headdim() const { return static_cast<int>(params().headdim); }
  __device__ __forceinline__ int headdim_v() const { return static_cast<int>(params().headdim_v); }

  // Columns [n, n + 32) of rows of `width`: pair(half, i) is the lane's two numbers of columns
  // n + 8 i on.
  template <class Pairs>
  __device__ __forceinline__ void write_columns(const FarSide& side, T* to, int width, int n,
                                                const Pairs& pair) const {
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      unsigned packed[4];
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        const float2 x = pair(half, i);
        packed[i] = pack<T>(x.x, x.y);
      }
      transpose_quad(packed);
      const int column = n + 8 * (lane % 4);
      if (side.place[half] < 0 || column >= width) continue;
      *reinterpret_cast<uint4*>(to + side.place[half] * width + column) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
  // The slice's part of a gradient goes to what near keys and the slices before have left in sums;
  // that of the last one out.
  template <class Pairs>
  __device__ __forceinline__ void add_columns(const FarSide& side, void* to, float* sums, int width,
                                              int n, const Pairs& pair) const {
    const bool any_before = b.has_near || b.slice > 0;
    const auto exists = [&](int half, int i) { return side.place[half] >= 0 && n + 8 * i < width; };
    const auto place = [&](int half, int i) {
      return reinterpret_cast<float2*>(sums + side.place[half] * width + n + 8 * i +
                                       2 * (lane % 4));
    };
    const auto sum = [&](int half, int i) {
      const float2 x = pair(half, i);
      const bool adds = any_before && exists(half, i);
      const float2 before = adds ? *place(half, i) : make_float2(0.0f, 0.0f);
      return make_float2(x.x + before.x, x.y + before.y);
    };
    if (b.slice + 1 == b.slices) {
      write_columns(side, static_cast<T*>(to), width, n, sum);
      return;
    }
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        if (exists(half, i)) *place(half, i) = sum(half, i);
      }
    }
  }
  // Likewise a number a row has.
  __device__ __forceinline__ void add_number(float& to, float x) const {
    to = b.slice > 0 ? to + x : x;
  }

  // From the gradient g of the exponents u (not read for kExp) to all that the side is given. tile:
  // where the rows lie.
  __device__ __forceinline__ void finish_side(const FarSide& side, const T* tile, const Map& map,
                                              float (&g)[kM / 8][4],
                                              const float (&u)[kM / 8][4]) const {
    const LinearAttentionParams& p = params();
    if (work.weights[side.number]) {
      float sums[kM / 64][2];
      sum_over_rows(g, sums);
      float* to = work.weights[side.number] +
                  ((side.tile * side.heads + side.head) * kWalkWarps + warp) * all_features() +
                  first_feature();
      DIJIANG_UNROLL()
      for (int i = 0; i < kM / 64; ++i) {
        to[64 * i + lane / 4 * 8 + 2 * (lane % 4)] = sums[i][0];
        to[64 * i + lane / 4 * 8 + 2 * (lane % 4) + 1] = sums[i][1];
      }
    }
    float total[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) sum += g[t][2 * half] + g[t][2 * half + 1];
      total[half] = quad_sum(sum);
      if (side.place[half] >= 0 && lane % 4 == 0) {
        add_number(work.total[side.number][side.place[half]], total[half]);
      }
    }
    const auto* line = reinterpret_cast<const FeatureLine*>(map.lines);
    slope_inputs(p.kind, side, line, g, u, total);
    if (work.slopes[side.number]) {
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; t += 4) {
        write_columns(side, work.slopes[side.number], all_features(), first_feature() + 8 * t,
                      [&](int half, int i) {
                        return make_float2(g[t + i][2 * half], g[t + i][2 * half + 1]);
                      });
      }
    }
    write_inputs(side, tile, map, g, total);
  }

  // From gradients of exponents to those of omega x (linear_slope).
  __device__ __forceinline__ void slope_inputs(FeatureKind kind, const FarSide& side,
                                               const FeatureLine* line, float (&g)[kM / 8][4],
                                               const float (&u)[kM / 8][4],
                                               const float (&total)[2]) const {
    if (kind == FeatureKind::kExp) return;
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * t + 2 * (lane % 4) + e % 2;
        const float log_phi = u[t][e] - line[column].weight;
        if (side.place[e / 2] < 0 || first_feature() + column >= params().num_features) {
          g[t][e] = 0.0f;
        } else if (kind == FeatureKind::kSoftmax) {
          g[t][e] -= fast_exp2(log_phi) * total[e / 2];
        } else {
          g[t][e] *= fast_exp2(-fmaxf(log_phi, 0.0f));
        }
      }
    }
  }

  // dx = omega^T du: a row of omega's upper part times its gain ln 2 is sqrt(scale) omega.
  __device__ __forceinline__ void write_inputs(const FarSide& side, const T* tile, const Map& map,
                                               const float (&g)[kM / 8][4],
                                               const float (&total)[2]) const {
    const LinearAttentionParams& p = params();
    const auto* line = reinterpret_cast<const FeatureLine*>(map.lines);
    const auto* omega = reinterpret_cast<const T*>(map.matrix);
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
          unsigned right[4];
          load_right_transposed<kD>(right, omega, n + 8 * j, i);
          multiply_add_16<T>(x[j], x[j + 1], du[i / 16], right);
        }
      }
      if (has_beta) {
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          DIJIANG_UNROLL()
          for (int j = 0; j < 4; ++j) {
            const Pair<T> y = unpack<T>(*reinterpret_cast<const unsigned*>(
                tile + tile_offset<kD>(row(half), n + 8 * j + 2 * (lane % 4))));
            square[half] = fmaf(y.first, y.first, fmaf(y.second, y.second, square[half]));
            x[j][2 * half] -= twice * total[half] * y.first;
            x[j][2 * half + 1] -= twice * total[half] * y.second;
          }
        }
      }
      add_columns(side, b.grad_x[side.number], work.sums[side.number], headdim(), n,
                  [&](int half, int j) { return make_float2(x[j][2 * half], x[j][2 * half + 1]); });
    }
    if (!has_beta || !work.square[side.number]) return;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const float size = quad_sum(square[half]) * static_cast<float>(p.scale);
      if (side.place[half] >= 0 && lane % 4 == 0) {
        add_number(work.square[side.number][side.place[half]], size * total[half]);
      }
    }
  }
};

}  // namespace dijiang::cuda
