// One block's work of the fused far backward where no chunk has far keys of its own, because near
// ones stand beside them: 64 queries of a chunk against the state before it, or 64 keys that it
// folds against the state R behind it, with one slice of the features. Both are the same, with phi
// a row's features at the scale of the state, and x a row of gradients of the outputs, or of
// values:
//   db = phi * (S do - delta z), phi decayed up to the query, over den
//   da = phi * (R v - rho),      phi decayed up to the chunk's end;   dv = phi R
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/fused_far_rows.h"

namespace dijiang::cuda {

// Offsets in bytes.
template <class Shape>
struct SideShared {
  static constexpr int kTile = kTileRows * 2;  // bytes a column
  static constexpr int kFloats = Shape::kFeatures * static_cast<int>(sizeof(float));
  static constexpr int map = 0;
  static constexpr int rows = map + Shape::Map::kBytes;
  static constexpr int values = rows + Shape::kHeadDim * kTile;
  static constexpr int state = values + Shape::kValueDim * kTile;
  static constexpr int scale = state + Shape::kState * 2;
  static constexpr int z = scale + kFloats;
  static constexpr int kBytes = z + kFloats;
};

template <class Shape, bool kKeys>
struct FarSides : FarRows<Shape> {
  using Base = FarRows<Shape>;
  using Base::a;
  using Base::b;
  using Base::kD;
  using Base::kM;
  using Base::kV;
  using Base::lane;
  using Base::params;
  using Base::row;
  using Base::row0;
  using Base::shared;
  using Base::work;
  using typename Base::Map;
  using typename Base::T;
  using Shared = SideShared<Shape>;

  FarSide side;
  int64_t place;  // of the state
  // Of the lane's two rows: phi = 2^(u + decay + scale of the state + shift) times.
  float decay[2] = {0.0f, 0.0f}, shift[2] = {0.0f, 0.0f}, times[2] = {0.0f, 0.0f};
  float delta[2] = {1.0f, 1.0f};
  unsigned phi[kM / 8][2];

  // The head is that of the rows' own side.
  __device__ __forceinline__ FarSides(const FarBackward& backward, int64_t index, int64_t tile,
                                      int head, char* raw)
      : Base(backward, raw),
        side{kKeys ? 1 : 0,
             head,
             kKeys ? backward.a.params.num_kv_heads : backward.a.params.num_heads,
             kKeys ? backward.a.params.fk : backward.a.params.fq,
             {-1, -1},
             tile} {
    place = this->slice_at(cell_of(a, index, kKeys ? head : head / a.group));
  }

  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

  // from: the row that the lane finds of `count`: an input, of lanes behind 15 what it meets.
  __device__ __forceinline__ void load(const T* from, int count) {
    copy_warp_rows<kD>(at<T>(Shared::rows), from, 0, row0, count, this->headdim());
    copy_warp_rows<kV>(at<T>(Shared::values), from, 16, row0, count, this->headdim_v());
    copy_block(shared + Shared::map, this->map_of(side.number, side.head), Map::kBytes);
    const T* states = kKeys ? work.reverse : static_cast<const T*>(a.work.states);
    this->load_state(Shared::state, states, place);
    copy_block(shared + Shared::scale, (kKeys ? work.reverse_scale : a.work.scale) + place * kM,
               Shared::kFloats);
    copy_block(shared + Shared::z, (kKeys ? work.reverse_z : a.work.z) + place * kM,
               Shared::kFloats);
    wait_copies();
    __syncthreads();
  }

  // An empty feature of the state, to which no row could refer, has a scale that makes 0 of all.
  __device__ __forceinline__ void make_features(float (&u)[kM / 8][4]) {
    constexpr int kMost = 126;  // few, unless weights are not over den
    const float* scale = at<float>(Shared::scale);
    add_to_rows(u, decay);
    const bool kept[2] = {times[0] != 0.0f, times[1] != 0.0f};
    const bool moderate =
        all_moderate(scale, kM) &&
        __all_sync(~0u, fabsf(shift[0]) <= kModerate && fabsf(shift[1]) <= kModerate);
    exp2_tiles<kMost, false, false>(u, moderate, [&](int t, int e) {
      return scale[8 * t + 2 * (lane % 4) + e % 2] + (e < 2 ? shift[0] : shift[1]);
    });
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const unsigned x = pack<T>(u[t][2 * half] * times[half], u[t][2 * half + 1] * times[half]);
        phi[t][half] = kept[half] ? x : 0;  // a row that is not may hold anything
      }
    }
  }

  // g = phi * (x state - delta z)
  __device__ __forceinline__ void find_gradients(float (&g)[kM / 8][4]) const {
    clear(g);
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) {
      unsigned left[4];
      load_left<kV>(left, at<T>(Shared::values), row0, k);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned right[4];
        load_right_transposed<kM>(right, at<T>(Shared::state), i, k);
        multiply_add_16<T>(g[i / 8], g[i / 8 + 1], left, right);
      }
    }
    const float* z = at<float>(Shared::z);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const Pair<T> x = unpack<T>(phi[t][half]);
        const bool counts = times[half] != 0.0f;  // else the row may hold anything
        g[t][2 * half] = counts ? x.first * (g[t][2 * half] - delta[half] * z[column]) : 0.0f;
        g[t][2 * half + 1] =
            counts ? x.second * (g[t][2 * half + 1] - delta[half] * z[column + 1]) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void write_values() const {
    DIJIANG_UNROLL(1)
    for (int n = 0; n < kV; n += 32) {
      float x[4][4];
      clear(x);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        const unsigned left[4] = {phi[i / 8][0], phi[i / 8][1], phi[i / 8 + 1][0],
                                  phi[i / 8 + 1][1]};
        DIJIANG_UNROLL()
        for (int j = 0; j < 4; j += 2) {
          unsigned right[4];
          load_right<kM>(right, at<T>(Shared::state), n + 8 * j, i);
          multiply_add_16<T>(x[j], x[j + 1], left, right);
        }
      }
      this->add_columns(side, b.grad_v, work.sums_v, this->headdim_v(), n, [&](int half, int j) {
        return make_float2(x[j][2 * half], x[j][2 * half + 1]);
      });
    }
  }

  __device__ __forceinline__ void run() {
    const Map map{params(), shared, shared + Map::kMatrix};
    const T* tile = at<T>(Shared::rows);
    float u[kM / 8][4], g[kM / 8][4];
    this->exponents(tile, map, side.feature, side.head, u);
    make_features(u);
    find_gradients(g);
    // Read again by the few that want it, rather than kept by all.
    if (params().kind != FeatureKind::kExp) this->exponents(tile, map, side.feature, side.head, u);
    this->finish_side(side, tile, map, g, u);
    if (kKeys) write_values();
  }
};

}  // namespace dijiang::cuda
