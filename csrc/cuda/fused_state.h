// What walks over keys have in common: the state of a block in registers, transposed, a quarter of
// its columns of v a warp; its scales and z in shared memory; and how a tile of 64 keys, 16 a warp,
// goes into it. FusedShared says where all lies. A block has one slice of the features.
#pragma once

#include "cuda/attention_phases.h"
#include "cuda/fused_layout.h"

namespace dijiang::cuda {

template <class Shape, class Shared_>
struct StateWalk {
  using T = typename Shape::T;
  using Shared = Shared_;
  using Map = typename Shape::Map;
  static constexpr int kD = Shape::kHeadDim, kM = Shape::kFeatures, kV = Shape::kValueDim;
  static constexpr int kParts = Shape::kParts;
  static constexpr int kStateTiles = kV / (16 * kWalkWarps);

  const Attention& a;
  char* shared;
  int kv_head, first_column, slice;
  int lane, warp, row0;
  float state[kStateTiles][kM / 8][4];  // columns of v by features, at the scale Shared::scale
  bool moderate = false;                // M' is in all features
  bool rescales = true;                 // Shared::factor is not 1 in all features

  // blockIdx.z counts blocks of columns, then slices from first_slice on.
  __device__ __forceinline__ StateWalk(const Attention& attention, char* raw, int head,
                                       int first_slice = 0)
      : a(attention),
        shared(raw),
        kv_head(head),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        row0(threadIdx.x / 32 * 16) {
    const auto z = static_cast<int>(blockIdx.z);
    const auto columns = static_cast<int>(column_blocks(params(), kV));
    first_column = z % columns * kV;
    slice = first_slice + z / columns;
  }

  __device__ __forceinline__ const LinearAttentionParams& params() const { return a.params; }
  // Of all features, the first one of the slice; and how many of the tile's there are.
  __device__ __forceinline__ int first_feature() const { return slice * kM; }
  __device__ __forceinline__ int feature_count() const {
    const auto left = static_cast<int>(params().num_features) - first_feature();
    return left < kM ? left : kM;
  }
  // Of the slice's first feature, in what memory has of a state over (cells, features); and of the
  // slice, in what tiles are made of.
  __device__ __forceinline__ int64_t feature_at(int64_t cell) const {
    return cell * params().num_features + first_feature();
  }
  __device__ __forceinline__ int64_t slice_at(int64_t cell) const {
    return cell * feature_slices(params(), kM) + slice;
  }
  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  // Of the block's columns of v those that there are.
  __device__ __forceinline__ int value_width() const {
    return static_cast<int>(params().headdim_v) - first_column;
  }
  // One of the stages.
  __device__ __forceinline__ T* values(int stage) const {
    return at<T>(Shared::values) + stage % Shared::kValueStages * (kTileRows * kV);
  }
  __device__ __forceinline__ void wait_rows() {
    wait_copies();
    __syncwarp();
  }

  // --- keys --------------------------------------------------------------------------------------

  __device__ __forceinline__ void store_key_map() {
    Map::store(params(), params().fk, kv_head, first_feature(), shared + Shared::key_omega,
               shared + Shared::key_lines);
  }
  // Exponents of the features of the warp's rows of a tile.
  __device__ __forceinline__ void exponents(const T* tile, const Map& map, const void* betas,
                                            int head, float (&u)[kM / 8][4]) {
    // With 128 features registers have no room for more.
    map.template exponents<kM == 64 ? 4 : 2>(
        betas, head, u, [&](unsigned(&left)[4], int k) { load_left<kD>(left, tile, row0, k); });
  }
  __device__ __forceinline__ void key_exponents(float (&u)[kM / 8][4]) {
    const Map map{params(), shared + Shared::key_omega, shared + Shared::key_lines};
    exponents(at<T>(Shared::keys), map, params().fk.beta, kv_head, u);
  }

  // u: exponents of the warp's rows, decayed as the walk is, overwritten; kept: the lane's two.
  // state_decay, where decayed: up to where theirs goes. Leaves M', what state and z are multiplied
  // by to refer to it, and the features weigh(half, 2^(u - M')) in shared memory, which are there
  // behind a barrier. between: called when all warps are done with what they did before.
  template <class Between, class Weigh>
  __device__ __forceinline__ void prepare_features(float (&u)[kM / 8][4], const bool (&kept)[2],
                                                   bool decayed, float state_decay,
                                                   const Between& between, const Weigh& weigh) {
    leave_out(u, kept);
    store_column_maxima(at<float>(Shared::maxima) + warp * kM, u);
    __syncthreads();
    between();

    // Every warp for itself: they all write the same numbers.
    float* top = at<float>(Shared::top);
    float* factor = at<float>(Shared::factor);
    bool all_moderate = true, any_factor = false;
    for (int i = lane; i < kM; i += 32) {
      const float most = column_maximum<kM>(at<float>(Shared::maxima), i);
      float before = at<float>(Shared::scale)[i], times = 1.0f;
      if (decayed) {
        float rest = at<float>(Shared::rest)[i];
        const DecayStep step = step_decay(state_decay, rest);
        before = fmaxf(before + step.whole, kEmpty);
        times = step.factor;
        at<float>(Shared::next_rest)[i] = rest;
      }
      const float most_of_all = fmaxf(before, ceilf(most));
      if (before != most_of_all) times = scale2(times, before - most_of_all);
      top[i] = most_of_all;
      factor[i] = times;
      all_moderate = all_moderate && (fabsf(most_of_all) <= kModerate || most_of_all == kEmpty);
      any_factor = any_factor || times != 1.0f;
      at<float>(Shared::top_z)[i] = at<float>(Shared::z)[i] * times;
    }
    moderate = __all_sync(~0u, all_moderate);
    rescales = __any_sync(~0u, any_factor);
    __syncwarp();

    exp2_tiles<1, true, true>(u, moderate,
                              [&](int t, int e) { return -top[8 * t + 2 * (lane % 4) + e % 2]; });
    auto* features = at<__nv_bfloat16>(Shared::features);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const Split<kParts> x(weigh(half, u[t][2 * half]), weigh(half, u[t][2 * half + 1]));
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          store_pair(features + part * kTileRows * kM, row0 + lane / 4 + 8 * half, column,
                     x.part[part]);
        }
      }
    }
  }

  template <class Between>
  __device__ __forceinline__ void prepare_features(float (&u)[kM / 8][4], const bool (&kept)[2],
                                                   bool decayed, float state_decay,
                                                   const Between& between) {
    prepare_features(u, kept, decayed, state_decay, between, [](int, float x) { return x; });
  }

  __device__ __forceinline__ static void store_pair(__nv_bfloat16* tile, int row, int column,
                                                    unsigned x) {
    *reinterpret_cast<unsigned*>(tile + tile_offset<kM>(row, column)) = x;
  }
  // Column of v of the lane's part n of the state.
  __device__ __forceinline__ int state_row(int n) const {
    return warp * (16 * kStateTiles) + n * 8 + lane / 4;
  }

  // --- state -------------------------------------------------------------------------------------

  struct Ones {};  // every row
  // weigh: what a row of the tile counts in z.
  template <class Weigh>
  __device__ __forceinline__ void update_state(const T* value_tile, bool decayed,
                                               const Weigh& weigh) {
    if (rescales) {
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
    }
    // Each warp sums the features of a quarter, as the product sees them: those of a column are in
    // sums[n][0] and [1] of all rows, but where rows weigh in sums[n][0] of the lanes of a quad.
    constexpr int kOwn = kM / (8 * kWalkWarps);
    constexpr bool kOnes = std::is_same_v<Weigh, Ones>;
    float sums[kOwn][4];
    clear(sums);
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
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < kOwn; n += 2) {
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          unsigned b[4];
          load_right_transposed<kM>(b, at<__nv_bfloat16>(Shared::features) + part * kTileRows * kM,
                                    (warp * kOwn + n) * 8, s);
          if constexpr (kOnes) {
            const unsigned one = pack<__nv_bfloat16>(1.0f, 1.0f), ones[4] = {one, one, one, one};
            multiply_add_16<__nv_bfloat16>(sums[n], sums[n + 1], ones, b);
          } else {
            DIJIANG_UNROLL()
            for (int r = 0; r < 4; ++r) {
              const Pair<__nv_bfloat16> x = unpack<__nv_bfloat16>(b[r]);
              const int row = s + r % 2 * 8 + 2 * (lane % 4);
              sums[n + r / 2][0] += x.first * weigh(row) + x.second * weigh(row + 1);
            }
          }
        }
      }
    }
    const auto add = [&](int i, float sum) {
      at<float>(Shared::z)[i] = at<float>(Shared::top_z)[i] + sum;
      at<float>(Shared::scale)[i] = at<float>(Shared::top)[i];
      if (decayed) at<float>(Shared::rest)[i] = at<float>(Shared::next_rest)[i];
    };
    DIJIANG_UNROLL()
    for (int n = 0; n < kOwn; ++n) {
      const int first = (warp * kOwn + n) * 8;
      if constexpr (kOnes) {
        if (lane >= 4) continue;
        add(first + 2 * lane, sums[n][0]);
        add(first + 2 * lane + 1, sums[n][1]);
      } else {
        const float sum = quad_sum(sums[n][0]);
        if (lane % 4 == 0) add(first + lane / 4, sum);
      }
    }
  }

  __device__ __forceinline__ void update_state(const T* value_tile, bool decayed) {
    update_state(value_tile, decayed, Ones{});
  }

  // take(i, n, x): x of the lane's state belongs to feature i and its part n of the columns.
  template <class Take>
  __device__ __forceinline__ void each_element(const Take& take) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int n = 0; n < 2 * kStateTiles; ++n) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          take(8 * t + 2 * (lane % 4) + e, n, state[n / 2][t][n % 2 * 2 + e]);
        }
      }
    }
  }
  // take(at, i, x): likewise of what is in memory, at its place in (cells, features, headdim_v).
  template <class Take>
  __device__ __forceinline__ void each_of_kv(int64_t cell, const Take& take) {
    const int features = feature_count();
    const int64_t first = feature_at(cell);
    each_element([&](int i, int n, float& x) {
      if (i >= features || state_row(n) >= value_width()) return;
      take((first + i) * params().headdim_v + first_column + state_row(n), i, x);
    });
  }
  // cell: of (sequence or part, kv head). Null kv: empty.
  __device__ __forceinline__ void read_state(const float* kv, const float* z, const float* scale,
                                             int64_t cell) {
    each_element([](int, int, float& x) { x = 0.0f; });
    if (kv) each_of_kv(cell, [&](int64_t at, int, float& x) { x = kv[at]; });
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      const bool exists = kv && i < feature_count();
      const float x = exists ? z[feature_at(cell) + i] : 0.0f;
      at<float>(Shared::z)[i] = x;
      at<float>(Shared::scale)[i] = exists ? scale[feature_at(cell) + i] : kEmpty;
      at<float>(Shared::rest)[i] = exists && !(x < 1.0f) ? 0.999f : 0.0f;
    }
  }
  // After a barrier behind the last update.
  __device__ __forceinline__ void write_state(float* kv, float* z, float* scale, int64_t cell) {
    each_of_kv(cell, [&](int64_t at, int, float& x) { kv[at] = x; });
    write_sums(z, scale, feature_at(cell), feature_count());
  }
  // By the block of the first columns, of so many features, from a place on.
  __device__ __forceinline__ void write_sums(float* z, float* scale, int64_t place,
                                             int features) const {
    if (first_column != 0) return;
    for (int i = threadIdx.x; i < features; i += kWalkThreads) {
      z[place + i] = at<float>(Shared::z)[i];
      scale[place + i] = at<float>(Shared::scale)[i];
    }
  }

  // The state as a tile that rows read, in parts; its scales and z.
  __device__ __forceinline__ void save_tile(__nv_bfloat16* tiles, float* z, float* scale,
                                            int64_t cell) const {
    write_sums(z, scale, slice_at(cell) * kM, kM);
    const int64_t part_size = tile_columns(params()) * kM;
    __nv_bfloat16* tile = tiles + slice_at(cell) * kParts * part_size + first_column * kM;
    DIJIANG_UNROLL()
    for (int n = 0; n < 2 * kStateTiles; ++n) {
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; t += 4) {
        unsigned packed[kParts][4];
        DIJIANG_UNROLL()
        for (int i = 0; i < 4; ++i) {
          const float* s = state[n / 2][t + i] + n % 2 * 2;
          const Split<kParts> x(s[0], s[1]);
          DIJIANG_UNROLL()
          for (int part = 0; part < kParts; ++part) packed[part][i] = x.part[part];
        }
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          transpose_quad(packed[part]);
          auto* to = tile + part * part_size + tile_offset<kM>(state_row(n), (t + lane % 4) * 8);
          *reinterpret_cast<uint4*>(to) =
              make_uint4(packed[part][0], packed[part][1], packed[part][2], packed[part][3]);
        }
      }
    }
  }

  // Behind all that came so far comes a part, of which its own walk has left the state.
  __device__ __forceinline__ void add_part(const FoldParts& part, int64_t cell) {
    auto* factor = at<float>(Shared::factor);
    auto* part_factor = at<float>(Shared::top);
    const int64_t place = feature_at(cell);
    __syncthreads();
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      float& scale = at<float>(Shared::scale)[i];
      float& z = at<float>(Shared::z)[i];
      float before = scale, times = 1.0f;
      if (a.has_decay) {
        const auto all = static_cast<float>(part.decay[cell]);
        const DecayStep step = step_decay(all, at<float>(Shared::rest)[i]);
        before = fmaxf(before + step.whole, kEmpty);
        times = step.factor;
      }
      const bool exists = i < feature_count();
      const float local = exists ? part.scale[place + i] : kEmpty;
      scale = fmaxf(before, local);
      factor[i] = scale2(times, before - scale);
      part_factor[i] = scale2(1.0f, local - scale);
      z = z * factor[i] + (exists ? part.z[place + i] * part_factor[i] : 0.0f);
    }
    __syncthreads();
    each_element([&](int i, int, float& x) { x *= factor[i]; });
    each_of_kv(cell, [&](int64_t at, int i, float& x) { x += part.kv[at] * part_factor[i]; });
  }
};

}  // namespace dijiang::cuda
