// One block's work of the fused far backward: a chunk of 64 tokens of a kv head, 16 a warp, with
// all query heads of its group and one slice of the features, from the states that the walks left.
// Nothing hangs on another chunk. Where registers or shared memory do not hold all of that, one
// block has the queries of a head and another one the keys; of 256 columns of v a block of keys has
// 128 of the gradients, the first one those of the features, too.
//
// With P the far weights over den, G = (do v - delta) with the chunk's decay, phi_q the features of
// queries times 2^(M' - r) / den and phi_k those of keys times 2^-M':
//   db = phi_q * (S do - delta z + G phi_k)     da = phi_k * (R v - rho + G^T phi_q)
//   dv = phi_k R + P^T do
// G is worked out once with queries as rows and once with keys as rows, so that it is at once the
// left operand of what follows.
#pragma once

#include "cuda/backward_layout.h"
#include "cuda/fused_far_rows.h"

namespace dijiang::cuda {

// Of a row of queries.
struct FarRow {
  float scale, inverse, delta;
};

enum class FarPart { kAll, kQueries, kKeys };

// Offsets in bytes. kHalf: queries or keys alone, which have one map at a time and one state.
// kShares: queries and keys take turns in one tile, too.
template <class Shape, bool kHalf>
struct FarShared {
  static constexpr int kTile = kTileRows * 2;  // bytes a column
  static constexpr int kFloats = Shape::kFeatures * static_cast<int>(sizeof(float));

  static constexpr int key_map = 0;
  static constexpr int query_map = key_map + (kHalf ? 0 : Shape::Map::kBytes);
  static constexpr int keys = query_map + Shape::Map::kBytes;
  static constexpr int values = keys + Shape::kHeadDim * kTile;
  static constexpr bool kShares = kHalf && Shape::kHeadDim > 128;
  static constexpr int queries = kShares ? keys : values + Shape::kValueDim * kTile;
  static constexpr int grads =
      values + (Shape::kValueDim + (kShares ? 0 : Shape::kHeadDim)) * kTile;
  static constexpr int state = grads + Shape::kValueDim * kTile;
  static constexpr int reverse = state + (kHalf ? 0 : Shape::kState * 2);
  static constexpr int key_features = reverse + Shape::kState * 2;
  static constexpr int query_features = key_features + Shape::kFeatures * kTile;
  static constexpr int levels = query_features + Shape::kFeatures * kTile;  // up to a token
  static constexpr int numbers = levels + kTileRows * static_cast<int>(sizeof(double));
  static constexpr int maxima = numbers + kTileRows * static_cast<int>(sizeof(FarRow));  // of warps
  static constexpr int top = maxima + kWalkWarps * kFloats;                              // M'
  // 2^(M - M'), z 2^(M - M'); N, rho
  static constexpr int factor = top + kFloats;
  static constexpr int z = factor + kFloats;
  static constexpr int reverse_scale = z + kFloats;
  static constexpr int rho = reverse_scale + kFloats;
  static constexpr int kBytes = rho + kFloats;
};

template <class Shape, FarPart kPart>
struct FarGrads : FarRows<Shape> {
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
  using Base::warp;
  using Base::work;
  using typename Base::Map;
  using typename Base::T;
  using Shared = FarShared<Shape, kPart != FarPart::kAll>;
  static constexpr int kOwn = kV < 128 ? kV : 128;  // columns of the values' gradients

  Chunk c;
  int64_t index, place;  // place: of the states
  int kv_head, count;
  int first_own;          // column
  bool moderate = false;  // M' is in all features
  float da[kM / 8][4], dv[kOwn / 8][4];

  __device__ __forceinline__ FarGrads(const FarBackward& backward, const Chunk& chunk, char* raw)
      : Base(backward, raw),
        c(chunk),
        index(blockIdx.x),
        kv_head(kPart == FarPart::kQueries ? blockIdx.y / backward.a.group : blockIdx.y),
        count(chunk.query_count),
        first_own(blockIdx.z * kOwn) {
    place = this->slice_at(cell_of(a, index, kv_head));
    clear(da);
    clear(dv);
  }

  // Whether the block has the gradients of keys.
  __device__ __forceinline__ bool owns_features() const { return kOwn == kV || first_own == 0; }
  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  __device__ __forceinline__ Map map_at(int offset) const {
    return {params(), shared + offset, shared + offset + Map::kMatrix};
  }
  __device__ __forceinline__ FarSide side(int number, int64_t head) const {
    const LinearAttentionParams& p = params();
    const int64_t heads = number == 0 ? p.num_heads : p.num_kv_heads;
    FarSide s{number, head, heads, number == 0 ? p.fq : p.fk, {-1, -1}, index};
    const int64_t first = row_index(p, heads, c.batch, head, c.query_token);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      if (row(half) < count) s.place[half] = first + row(half);
    }
    return s;
  }
  // 2^(the decay of (from, to]); from = -1: from the chunk's beginning on.
  __device__ __forceinline__ float decay(int from, int to) const {
    if (!a.has_decay) return 1.0f;
    const double* levels = at<double>(Shared::levels);
    return fast_exp2(static_cast<float>(levels[to] - (from < 0 ? 0.0 : levels[from])));
  }

  // --- tiles -------------------------------------------------------------------------------------

  // The warp's own rows of the chunk, of `width` columns; zeros behind its end.
  template <int kWidth>
  __device__ __forceinline__ void load_rows(int tile, const ConstView& view, int64_t head,
                                            int width) {
    const int mine = row0 + lane % 16 < count ? row0 + lane % 16 : 0;
    copy_warp_rows<kWidth>(at<T>(tile), view_row<T>(view, c.batch, head, c.query_token + mine).data,
                           0, row0, count, width);
  }
  __device__ __forceinline__ void load_map(int to, int number, int64_t head) {
    copy_block(shared + to, this->map_of(number, head), Map::kBytes);
  }
  __device__ __forceinline__ void load_head(int64_t head) {
    const LinearAttentionParams& p = params();
    load_rows<kD>(Shared::queries, p.q, head, this->headdim());
    load_rows<kV>(Shared::grads, b.grad_out, head, this->headdim_v());
    const int mine = threadIdx.x;
    if (mine >= kTileRows) return;
    const int64_t row = row_index(p, p.num_heads, c.batch, head, c.query_token) + mine;
    at<FarRow>(Shared::numbers)[mine] = mine < count
                                            ? FarRow{static_cast<const float*>(p.row_scale)[row],
                                                     work.inverse[row], work.delta[row]}
                                            : FarRow{0.0f, 0.0f, 0.0f};
  }
  __device__ __forceinline__ void load_keys() {
    load_rows<kD>(Shared::keys, params().k, kv_head, this->headdim());
  }
  __device__ __forceinline__ void load_chunk() {
    const LinearAttentionParams& p = params();
    load_keys();
    load_rows<kV>(Shared::values, p.v, kv_head, this->headdim_v());
    load_map(Shared::key_map, 1, kv_head);
    if (kPart != FarPart::kKeys) {
      this->load_state(Shared::state, static_cast<const T*>(a.work.states), place);
    }
    if (kPart != FarPart::kQueries) this->load_state(Shared::reverse, work.reverse, place);
    if (!a.has_decay) return;
    const double* levels = levels_of(a, index, kv_head);
    for (int i = threadIdx.x; i < kTileRows; i += kWalkThreads) {
      at<double>(Shared::levels)[i] = levels[i < count ? i : count - 1];
    }
  }

  // --- features ----------------------------------------------------------------------------------

  __device__ __forceinline__ void key_exponents(float (&u)[kM / 8][4]) const {
    this->exponents(at<T>(Shared::keys), map_at(Shared::key_map), params().fk, kv_head, u);
  }
  __device__ __forceinline__ void store_feature(int tile, int half, int column, unsigned x) const {
    *reinterpret_cast<unsigned*>(at<T>(tile) + tile_offset<kM>(row(half), column)) = x;
  }
  __device__ __forceinline__ unsigned feature(int tile, int half, int column) const {
    return *reinterpret_cast<const unsigned*>(at<T>(tile) + tile_offset<kM>(row(half), column));
  }

  // M', what refers states to it, and the keys' features.
  __device__ __forceinline__ void make_key_features() {
    float u[kM / 8][4];
    key_exponents(u);
    const bool kept[2] = {row(0) < count, row(1) < count};
    leave_out(u, kept);
    store_column_maxima(at<float>(Shared::maxima) + warp * kM, u);
    __syncthreads();
    // Every warp for itself: they all write the same numbers.
    bool all_moderate = true;
    for (int i = lane; i < kM; i += 32) {
      const int64_t feature = place * kM + i;
      const float most = column_maximum<kM>(at<float>(Shared::maxima), i);
      const float top = fmaxf(a.work.scale[feature], ceilf(most));
      const float factor = scale2(1.0f, a.work.scale[feature] - top);
      at<float>(Shared::top)[i] = top;
      all_moderate = all_moderate && (fabsf(top) <= kModerate || top == kEmpty);
      at<float>(Shared::factor)[i] = factor;
      at<float>(Shared::z)[i] = a.work.z[feature] * factor;
      at<float>(Shared::reverse_scale)[i] = work.reverse_scale[feature];
      at<float>(Shared::rho)[i] = work.reverse_z[feature];
    }
    moderate = __all_sync(~0u, all_moderate);
    __syncwarp();
    const float* top = at<float>(Shared::top);
    exp2_tiles<1, true, true>(u, moderate,
                              [&](int t, int e) { return -top[8 * t + 2 * (lane % 4) + e % 2]; });
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        store_feature(Shared::key_features, half, column,
                      pack<T>(u[t][2 * half], u[t][2 * half + 1]));
      }
    }
  }

  // Of the lane's two rows of queries: whether their features overflow relative to M'. What
  // computes the queries' gradients decides: another kernel's roundings might differ.
  __device__ __forceinline__ void find_unsafe(const float (&u)[kM / 8][4], int head,
                                              const FarRow (&numbers)[2], bool (&unsafe)[2]) const {
    unsigned* marks = work.unsafe + (index * params().num_heads + head) * kWalkWarps;
    if (kPart == FarPart::kKeys) {
      const unsigned long long rows = failed_rows(marks);
      unsafe[0] = rows >> row(0) & 1;
      unsafe[1] = rows >> row(1) & 1;
      return;
    }
    const float* top = at<float>(Shared::top);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
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
    if (lane == 0) marks[warp] = first | second << 2;
  }

  // From exponents. Rows whose features overflow relative to M' (those of later keys, or of keys
  // that have decayed since) are left out: fused_far_unsafe.h adds them.
  __device__ __forceinline__ void make_query_features(float (&u)[kM / 8][4], int head) {
    constexpr int kMost = static_cast<int>(kSafeExponent) + 1;
    const float* top = at<float>(Shared::top);
    const FarRow numbers[2] = {at<FarRow>(Shared::numbers)[row(0)],
                               at<FarRow>(Shared::numbers)[row(1)]};
    bool unsafe[2];
    find_unsafe(u, head, numbers, unsafe);
    float times[2];
    bool all = moderate;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      times[half] = unsafe[half] ? 0.0f : numbers[half].inverse;
      all = all && (times[half] == 0.0f || fabsf(numbers[half].scale) <= kModerate);
    }
    exp2_tiles<kMost, true, false>(u, __all_sync(~0u, all), [&](int t, int e) {
      return top[8 * t + 2 * (lane % 4) + e % 2] - at<FarRow>(Shared::numbers)[row(e / 2)].scale;
    });
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const unsigned x = pack<T>(u[t][2 * half] * times[half], u[t][2 * half + 1] * times[half]);
        store_feature(Shared::query_features, half, column, times[half] == 0.0f ? 0 : x);
      }
    }
  }

  // --- queries -----------------------------------------------------------------------------------

  // What the warp's queries have from the state and the chunk's keys; without their own features.
  __device__ __forceinline__ void sum_queries(float (&db)[kM / 8][4]) {
    constexpr bool kHolds = kM <= 64;  // registers have room for all of the gradients
    unsigned grad[kHolds ? kV / 16 : 1][4];
    clear(db);
    DIJIANG_UNROLL()
    for (int k = 0; k < kV; k += 16) {
      auto& left = grad[kHolds ? k / 16 : 0];
      load_left<kV>(left, at<T>(Shared::grads), row0, k);
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        unsigned s[4];
        load_right_transposed<kM>(s, at<T>(Shared::state), i, k);
        multiply_add_16<T>(db[i / 8], db[i / 8 + 1], left, s);
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
        auto& left = grad[kHolds ? k / 16 : 0];
        if (!kHolds) load_left<kV>(left, at<T>(Shared::grads), row0, k);
        unsigned v[4];
        load_right<kV>(v, at<T>(Shared::values) + s * kV, 0, k);
        multiply_add_16<T>(x[0], x[1], left, v);
      }
      const auto each = [&](const auto& take) {
        DIJIANG_UNROLL()
        for (int i = 0; i < 8; ++i) {
          const int half = i % 4 / 2, key = s + i / 4 * 8 + 2 * (lane % 4) + i % 2;
          take(x[i / 4][i % 4], half, key, row(half));
        }
      };
      each([&](float& y, int half, int, int) { y -= delta[half]; });
      if (a.has_decay) {
        each([&](float& y, int, int key, int query) {
          if (key <= query) y *= decay(key, query);
        });
      }
      if (s == row0) each([](float& y, int, int key, int query) { y = key <= query ? y : 0.0f; });
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
      load_right_transposed<kM>(x, tile + s * kM, i, 0);
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
        load_right<kM>(right, at<T>(Shared::query_features) + s * kM, 0, i);
        multiply_add_16<T>(x[0], x[1], left, right);
      }
      if (owns_features()) {
        DIJIANG_UNROLL()
        for (int k = 0; k < kV; k += 16) {
          unsigned left[4], right[4];
          load_left<kV>(left, at<T>(Shared::values), row0, k);
          load_right<kV>(right, at<T>(Shared::grads) + s * kV, 0, k);
          multiply_add_16<T>(y[0], y[1], left, right);
        }
      }
      const auto each = [&](const auto& take) {
        DIJIANG_UNROLL()
        for (int i = 0; i < 8; ++i) {
          const int query = s + i / 4 * 8 + 2 * (lane % 4) + i % 2;
          take(x[i / 4][i % 4], y[i / 4][i % 4], row(i % 4 / 2), query);
        }
      };
      each(
          [&](float&, float& g, int, int query) { g -= at<FarRow>(Shared::numbers)[query].delta; });
      if (a.has_decay) {
        each([&](float& w, float& g, int key, int query) {
          const float times = key <= query ? decay(key, query) : 0.0f;
          w *= times;
          g *= times;
        });
      }
      if (s == row0) {
        each([](float& w, float& g, int key, int query) {
          w = key <= query ? w : 0.0f;
          g = key <= query ? g : 0.0f;
        });
      }
      unsigned w[4];
      pack_left<T>(w, x[0], x[1]);
      DIJIANG_UNROLL()
      for (int k = 0; k < kOwn; k += 16) {
        unsigned grad[4];
        load_right_transposed<kV>(grad, at<T>(Shared::grads) + s * kV, first_own + k, 0);
        multiply_add_16<T>(dv[k / 8], dv[k / 8 + 1], w, grad);
      }
      if (!owns_features()) continue;
      pack_left<T>(w, y[0], y[1]);
      add_rows(da, w, at<T>(Shared::query_features), s);
    }
  }

  // The keys' features as later chunks see them, 2^(a + N), decayed up to the chunk's end: at most
  // 1, where those relative to M' may be nothing beside a 2^(N + M') beyond all bounds, because
  // decay took what was large.
  __device__ __forceinline__ void make_late_features(unsigned (&phi)[kM / 8][2]) {
    constexpr int kMost = 126;  // few, unless weights are not over den
    const float* scale = at<float>(Shared::reverse_scale);
    float u[kM / 8][4], late[2] = {0.0f, 0.0f};
    key_exponents(u);
    if (a.has_decay) {
      const double* levels = at<double>(Shared::levels);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        late[half] = static_cast<float>(levels[kTileRows - 1] - levels[row(half)]);
      }
      add_to_rows(u, late);
    }
    const bool kept[2] = {row(0) < count, row(1) < count};
    leave_out(u, kept);
    // Empty features have scales that make 0 of all.
    exp2_tiles<kMost, false, false>(u, all_moderate(scale, kM), [&](int t, int e) {
      return scale[8 * t + 2 * (lane % 4) + e % 2];
    });
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        phi[t][half] = pack<T>(u[t][2 * half], u[t][2 * half + 1]);
      }
    }
  }

  // Adds what later chunks give, and writes the gradients of values.
  __device__ __forceinline__ void finish_values(const unsigned (&phi)[kM / 8][2]) {
    DIJIANG_UNROLL()
    for (int n = 0; n < kOwn; n += 16) {
      DIJIANG_UNROLL()
      for (int i = 0; i < kM; i += 16) {
        const unsigned left[4] = {phi[i / 8][0], phi[i / 8][1], phi[i / 8 + 1][0],
                                  phi[i / 8 + 1][1]};
        unsigned r[4];
        load_right<kM>(r, at<T>(Shared::reverse), first_own + n, i);
        multiply_add_16<T>(dv[n / 8], dv[n / 8 + 1], left, r);
      }
    }
    const FarSide keys = side(1, kv_head);
    DIJIANG_UNROLL()
    for (int n = 0; n < kOwn / 8; n += 4) {
      this->add_columns(keys, b.grad_v, work.sums_v, this->headdim_v(), first_own + 8 * n,
                        [&](int half, int i) {
                          return make_float2(dv[n + i][2 * half], dv[n + i][2 * half + 1]);
                        });
    }
  }

  // Likewise for the features of keys, with their own.
  __device__ __forceinline__ void finish_keys(const unsigned (&phi)[kM / 8][2]) {
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
    times_features(da, Shared::key_features);
    const float* rho = at<float>(Shared::rho);
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      DIJIANG_UNROLL()
      for (int half = 0; half < 2; ++half) {
        const Pair<T> late = unpack<T>(phi[t][half]);
        da[t][2 * half] += late.first * (x[t][2 * half] - rho[column]);
        da[t][2 * half + 1] += late.second * (x[t][2 * half + 1] - rho[column + 1]);
      }
    }
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

  // --- the chunk ---------------------------------------------------------------------------------

  // All of a head's queries, whose tiles and map are there.
  __device__ __forceinline__ void finish_queries(int head) {
    const Map map = map_at(Shared::query_map);
    const T* tile = at<T>(Shared::queries);
    float u[kM / 8][4], db[kM / 8][4];
    this->exponents(tile, map, params().fq, head, u);
    make_query_features(u, head);
    __syncthreads();
    sum_queries(db);
    times_features(db, Shared::query_features);
    // Read again by the few that want it, rather than kept by all.
    if (params().kind != FeatureKind::kExp) this->exponents(tile, map, params().fq, head, u);
    this->finish_side(side(0, head), tile, map, db, u);
  }
  // Likewise the chunk's keys, when all queries have been added.
  __device__ __forceinline__ void finish_chunk() {
    {
      unsigned phi[kM / 8][2];
      make_late_features(phi);
      finish_values(phi);
      if (!owns_features()) return;
      finish_keys(phi);
    }
    float u[kM / 8][4];
    if (params().kind != FeatureKind::kExp) key_exponents(u);
    this->finish_side(side(1, kv_head), at<T>(Shared::keys), map_at(Shared::key_map), da, u);
  }
  __device__ __forceinline__ static void wait_for_all() {
    wait_copies();
    __syncthreads();
  }

  __device__ __forceinline__ void run_all() {
    const int first = kv_head * a.group;
    load_chunk();
    load_head(first);
    load_map(Shared::query_map, 0, first);
    wait_for_all();
    make_key_features();
    DIJIANG_UNROLL(1)
    for (int h = 0; h < a.group; ++h) {
      if (h > 0) wait_for_all();
      finish_queries(first + h);
      add_queries();
      if (h + 1 == a.group) break;
      __syncthreads();
      load_head(first + h + 1);
      load_map(Shared::query_map, 0, first + h + 1);
    }
    finish_chunk();
  }

  __device__ __forceinline__ void run_queries() {
    const auto head = static_cast<int>(blockIdx.y);
    load_chunk();
    if (!Shared::kShares) load_head(head);
    wait_for_all();
    make_key_features();  // behind its barrier nobody reads the keys and their map
    if (Shared::kShares) load_head(head);
    load_map(Shared::query_map, 0, head);
    wait_for_all();
    finish_queries(head);
  }

  __device__ __forceinline__ void run_keys() {
    const int first = kv_head * a.group;
    load_chunk();
    wait_for_all();
    make_key_features();  // behind its barrier nobody reads the keys' map
    load_map(Shared::query_map, 0, first);
    DIJIANG_UNROLL(1)
    for (int h = 0; h < a.group; ++h) {
      const int head = first + h;
      if (h > 0) __syncthreads();  // nobody reads the last queries any more
      load_head(head);
      wait_for_all();
      {
        float u[kM / 8][4];
        this->exponents(at<T>(Shared::queries), map_at(Shared::query_map), params().fq, head, u);
        make_query_features(u, head);
      }
      __syncthreads();
      if (h + 1 < a.group) {
        load_map(Shared::query_map, 0, head + 1);
      } else {
        if (Shared::kShares) load_keys();
        load_map(Shared::key_map, 1, kv_head);
      }
      add_queries();
    }
    wait_for_all();
    finish_chunk();
  }

  __device__ __forceinline__ void run() {
    if constexpr (kPart == FarPart::kAll) {
      run_all();
    } else if constexpr (kPart == FarPart::kQueries) {
      run_queries();
    } else {
      run_keys();
    }
  }
};

}  // namespace dijiang::cuda
