// One block's work of the fused mixed forward: the walk over near keys (fused_near_rows.h), then,
// where its stages of shared memory were, the far keys through the state before the chunk. It holds
// no key of the row's own two blocks, so no later key shows, and no row is unsafe.
#pragma once

#include "cuda/fused_features.h"
#include "cuda/fused_near_rows.h"

namespace dijiang::cuda {

template <class T_, int kHeadDim_, int kValueDim_, int kFeatures_>
struct MixedShape : NearShape<T_, kHeadDim_, kValueDim_> {
  using Near = NearShape<T_, kHeadDim_, kValueDim_>;
  using Map = FeatureMap<T_, kHeadDim_, kFeatures_>;
  static constexpr int kFeatures = kFeatures_;
  static constexpr int kParts = std::is_same_v<T_, __half> ? 2 : 1;
  // Behind the walk, of one slice of the features at a time: the query head's map, the state's
  // parts, its scales, z. In bytes.
  static constexpr int kStatePart = 2 * kValueDim_ * kFeatures;
  static constexpr int kFloats = kFeatures * static_cast<int>(sizeof(float));
  static constexpr int state = Map::kBytes;
  static constexpr int scale = state + kParts * kStatePart;
  static constexpr int z = scale + kFloats;
  static constexpr int kFarBytes = z + kFloats;
  static constexpr int kSharedBytes =
      kFarBytes > Near::kSharedBytes ? kFarBytes : Near::kSharedBytes;
  // Where registers allow a third block.
  static constexpr int kWanted = kFeatures == 64 && kParts * kValueDim_ <= 128 ? 3 : 2;
  static constexpr int kBlocks =
      kWanted * (kSharedBytes + 1024) <= kMultiprocessorShared ? kWanted : 2;
};

template <class Shape>
struct MixedRows : NearRows<Shape> {
  using Near = NearRows<Shape>;
  using Map = typename Shape::Map;
  using Near::a;
  using Near::chunk;
  using Near::den;
  using Near::first_row;
  using Near::head;
  using Near::kD;
  using Near::kV;
  using Near::lane;
  using Near::out;
  using Near::row0;
  using Near::rows;
  using Near::sum;
  using Near::top;
  static constexpr int kM = Shape::kFeatures, kParts = Shape::kParts;

  __device__ __forceinline__ MixedRows(const Attention& attention, const QueryTile& t, char* raw)
      : Near(attention, t, raw) {}

  __device__ __forceinline__ char* far(int offset) const {
    return reinterpret_cast<char*>(this->shared) + offset;
  }
  __device__ __forceinline__ int64_t chunk_index() const { return chunk - a.work.chunks; }

  // --- loading -----------------------------------------------------------------------------------

  __device__ __forceinline__ void load_far(int slice) {
    const int64_t slices = feature_slices(a.params, kM);
    const int64_t place = cell_of(a, chunk_index(), this->kv_head) * slices + slice;
    const int64_t part_size = tile_columns(a.params) * kM;
    const auto* states = static_cast<const __nv_bfloat16*>(a.work.states) +
                         place * kParts * part_size + this->first_column * kM;
    copy_block(far(0), a.work.query_maps + (head * slices + slice) * Map::kBytes, Map::kBytes);
    DIJIANG_UNROLL()
    for (int part = 0; part < kParts; ++part) {
      copy_block(far(Shape::state + part * Shape::kStatePart), states + part * part_size,
                 Shape::kStatePart);
    }
    copy_block(far(Shape::scale), a.work.scale + place * kM, Shape::kFloats);
    copy_block(far(Shape::z), a.work.z + place * kM, Shape::kFloats);
  }

  // --- sums --------------------------------------------------------------------------------------

  // Exponents of the queries' features, decayed from the chunk's first key on.
  __device__ __forceinline__ void find_exponents(float (&b)[kM / 8][4]) const {
    const Map map{a.params, far(0), far(Map::kMatrix)};
    map.template exponents<kD / 16>(a.params.fq.beta, head, b, [&](unsigned(&left)[4], int k) {
      DIJIANG_UNROLL()
      for (int r = 0; r < 4; ++r) left[r] = this->query[k / 16][r];
    });
    if (!a.has_decay) return;
    const double* levels = levels_of(a, chunk_index(), this->kv_head);
    const auto first = static_cast<int>(chunk->query_pos - chunk->key_pos) + first_row;
    float decay[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      decay[half] = decay_between(levels, -1, first + (row < rows ? row : 0));
    }
    add_to_rows(b, decay);
  }

  // A slice's part.
  __device__ __forceinline__ void add_far() {
    const int j = lane % 4;
    const auto* scale = reinterpret_cast<const float*>(far(Shape::scale));
    const auto* z = reinterpret_cast<const float*>(far(Shape::z));
    const auto* state = reinterpret_cast<const __nv_bfloat16*>(far(Shape::state));
    float b[kM / 8][4];
    find_exponents(b);
    float away[2];  // r; where there is nothing to refer to, features are to be 0
    bool moderate = true;
    {
      float most[2] = {kEmpty, kEmpty}, next[2];
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 4; ++e) {
          most[e / 2] = fmaxf(most[e / 2], b[t][e] + scale[8 * t + 2 * j + e % 2]);
        }
      }
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const float r = ceilf(quad_max(most[half]));
        const bool any = r > kNone;
        next[half] = any ? fmaxf(top[half], r) : top[half];
        away[half] = any ? next[half] : -kEmpty;
        moderate = moderate && (fabsf(next[half]) <= kModerate || !any);
      }
      this->raise_to(next);
    }
    moderate = __all_sync(~0u, moderate) && all_moderate(scale, kM);
    exp2_tiles<1, true, false>(b, moderate, [&](int t, int e) {
      return scale[8 * t + 2 * j + e % 2] - (e < 2 ? away[0] : away[1]);
    });
    float seen_sum[2] = {0.0f, 0.0f};  // of what the products see, a lane's part
    DIJIANG_UNROLL()
    for (int i = 0; i < kM; i += 16) {
      unsigned features[kParts][4];
      DIJIANG_UNROLL()
      for (int t = 0; t < 2; ++t) {
        const int column = i + 8 * t + 2 * j;
        DIJIANG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          float x[2];
          DIJIANG_UNROLL()
          for (int e = 0; e < 2; ++e) {
            x[e] = b[i / 8 + t][2 * half + e] * power_of_two(Shape::kLift);
            sum[half] = fmaf(x[e], z[column + e], sum[half]);
          }
          const Split<kParts> split(x[0], x[1]);
          DIJIANG_UNROLL()
          for (int part = 0; part < kParts; ++part) {
            features[part][2 * t + half] = split.part[part];
          }
          const Pair<float> seen = joined(split.part);
          seen_sum[half] =
              fmaf(seen.first, z[column], fmaf(seen.second, z[column + 1], seen_sum[half]));
        }
      }
      DIJIANG_UNROLL()
      for (int n = 0; n < kV; n += 16) {
        unsigned right[kParts][4];
        DIJIANG_UNROLL()
        for (int part = 0; part < kParts; ++part) {
          load_right<kM>(right[part], state + part * kV * kM, n, i);
        }
        multiply_parts_16<kParts>(out[n / 8], out[n / 8 + 1], features, right);
      }
    }
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) den[2 * half] += quad_sum(seen_sum[half]);
  }

  __device__ __forceinline__ void run() {
    this->walk([&](int tile) { this->add_tile(tile); });
    const bool empty = !a.params.initial.kv && chunk->key_pos == 0;  // the state
    const auto slices = empty ? 0 : static_cast<int>(feature_slices(a.params, kM));
    DIJIANG_UNROLL(1)
    for (int slice = 0; slice < slices; ++slice) {
      __syncthreads();       // nobody reads the stages, or the last slice, any more
      lane = unknown(lane);  // else addresses of all slices' fragments leave the loop, and spill
      load_far(slice);
      wait_copies();
      __syncthreads();
      if (row0 < rows) add_far();
    }
    this->write_rows();
  }
};

}  // namespace dijiang::cuda
