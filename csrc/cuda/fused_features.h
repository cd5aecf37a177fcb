// Exponents of features as fragments: 16 rows of a warp times a head's omega, which lies in two
// 16-bit parts, as an error in an exponent is magnified. Tiles may be larger than headdim and
// num_features: features that there are not have the exponent -infinity.
#pragma once

#include "cuda/attention_layout.h"
#include "cuda/fused_tiles.h"

namespace dijiang::cuda {

// Feature i of a head: exponent = omega_i.x gain + weight, base 2.
struct FeatureLine {
  float gain;
  float weight;
};

template <class T_, int kHeadDim, int kFeatures>
struct FeatureMap {
  using T = T_;
  static constexpr int kD = kHeadDim, kM = kFeatures;
  static constexpr int kMatrix = 2 * kM * kD * static_cast<int>(sizeof(T));  // high and low part
  static constexpr int kLines = kM * static_cast<int>(sizeof(FeatureLine));
  static constexpr int kBytes = kMatrix + kLines;

  const LinearAttentionParams& p;
  const char* matrix;
  const char* lines;

  // Writes the parameters of a head's features from `first` on, by a block of kWalkThreads. A row
  // is first brought to [1/2, 1), so that float16 holds it.
  __device__ __forceinline__ static void store(const LinearAttentionParams& p,
                                               const FeatureParams& feature, int head, int first,
                                               char* matrix, char* lines) {
    const int lane = threadIdx.x % 32;
    auto* high = reinterpret_cast<T*>(matrix);
    T* low = high + kM * kD;
    const auto* weight = static_cast<const float*>(feature.log_weight);
    const float scale = sqrtf(static_cast<float>(p.scale)) * kLog2e;
    const auto headdim = static_cast<int>(p.headdim);
    for (int i = threadIdx.x / 32; i < kM; i += kWalkWarps) {
      const bool exists = first + i < p.num_features;
      const int64_t line = head * p.num_features + first + i;
      const float* row = static_cast<const float*>(feature.omega) + line * headdim;
      const int width = exists ? headdim : 0;
      float size = 0.0f;
      for (int k = lane; k < width; k += 32) size = fmaxf(size, fabsf(row[k]));
      const float exponent = fmaxf(binary_exponent(warp_max(size)), -100.0f);
      for (int k = lane; k < kD; k += 32) {
        const float x = k < width ? scale2(row[k], -exponent) : 0.0f;
        const T part = from_float<T>(x);
        high[tile_offset<kD>(i, k)] = part;
        low[tile_offset<kD>(i, k)] = from_float<T>(x - to_float(part));
      }
      if (lane == 0) {
        auto& to = reinterpret_cast<FeatureLine*>(lines)[i];
        to = {0.0f, -INFINITY};
        if (exists) to = {scale2(scale, exponent), weight ? weight[line] * kLog2e : 0.0f};
      }
    }
  }

  // Of the warp's 16 rows, which left(a, k) takes as left operands of depth [k, k + 16). kUnroll:
  // steps of 16; all of them where operands are registers, few where their addresses cost some.
  template <int kUnroll, class Left>
  __device__ __forceinline__ void exponents(const void* betas, int head, float (&u)[kM / 8][4],
                                            const Left& left) const {
    const auto* high = reinterpret_cast<const T*>(matrix);
    const T* low = high + kM * kD;
    const bool has_beta = betas && p.kind == FeatureKind::kExp;
    float square[2] = {0.0f, 0.0f}, products[2][4];  // products: of rows with rows
    clear(products);
    clear(u);
    DIJIANG_UNROLL(kUnroll)
    for (int k = 0; k < kD; k += 16) {
      unsigned a[4];
      left(a, k);
      if (has_beta) {
        // As a right operand the same registers are 8 rows as columns.
        multiply_add<T>(products[0], a, a[0], a[2]);
        multiply_add<T>(products[1], a, a[1], a[3]);
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
      // Row g's own column is that of lane g / 2 of its quad.
      const int g = threadIdx.x % 32 / 4, from = 4 * g + g / 2;
      square[0] = __shfl_sync(~0u, g % 2 ? products[0][1] : products[0][0], from) * factor;
      square[1] = __shfl_sync(~0u, g % 2 ? products[1][3] : products[1][2], from) * factor;
    }
    const auto* line = reinterpret_cast<const FeatureLine*>(lines);
    if (p.kind == FeatureKind::kSoftmax) normalise_rows(line, static_cast<int>(p.num_features), u);
    // A kind has its own loop: asked for each exponent it would be half of the work.
    if (p.kind == FeatureKind::kExp) {
      each_exponent(u, line, [&](float x, const FeatureLine& l, int half) {
        return fmaf(x, l.gain, l.weight) - square[half];
      });
    } else if (p.kind == FeatureKind::kElu) {
      each_exponent(u, line, [](float x, const FeatureLine& l, int) {
        const float y = x * l.gain;
        // An exponent needs no more than log(1 + y) gives.
        return (y > 0.0f ? fast_log2(fmaf(y, kLn2, 1.0f)) : y) + l.weight;
      });
    } else {
      each_exponent(u, line, [](float x, const FeatureLine& l, int) { return x + l.weight; });
    }
  }

  // x of feature l and the lane's row `half` becomes find(x, l, half).
  template <class Find>
  __device__ __forceinline__ static void each_exponent(float (&u)[kM / 8][4],
                                                       const FeatureLine* lines, const Find& find) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (threadIdx.x % 4);
      const FeatureLine line[2] = {lines[column], lines[column + 1]};
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) u[t][e] = find(u[t][e], line[e % 2], e / 2);
    }
  }

  // u gain - log2 sum 2^(u gain)
  __device__ __forceinline__ static void normalise_rows(const FeatureLine* line, int features,
                                                        float (&u)[kM / 8][4]) {
    const int lane = threadIdx.x % 32;
    float top[2] = {kEmpty, kEmpty}, sum[2] = {0.0f, 0.0f};
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * t + 2 * (lane % 4) + e % 2;
        u[t][e] = column < features ? u[t][e] * line[column].gain : -INFINITY;
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
};

// A side's heads once a call, where each has many blocks; over (heads, slices). Grid: slice, head.
template <class Map>
__global__ void __launch_bounds__(kWalkThreads)
    split_maps(LinearAttentionParams p, FeatureParams feature, char* maps) {
  const int64_t place = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  char* to = maps + place * Map::kBytes;
  Map::store(p, feature, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x) * Map::kM, to,
             to + Map::kMatrix);
}

}  // namespace dijiang::cuda
