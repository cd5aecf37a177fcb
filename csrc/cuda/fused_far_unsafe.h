// Rows of queries that fused_far_grads.h leaves out, as their features overflow relative to the
// chunk's M': added here term by term, which cannot overflow, one row after another. Rare; data
// that ask for it everywhere are slow.
#pragma once

#include "cuda/backward_parameters.h"
#include "cuda/fused_far_grads.h"

namespace dijiang::cuda {

// In floats.
template <class Shape>
struct UnsafeShared {
  static constexpr int kM = Shape::kFeatures, kV = Shape::kValueDim;
  static constexpr int keys = 0;                             // exponents (64, kM)
  static constexpr int key_grads = keys + kTileRows * kM;    // of them
  static constexpr int values = key_grads + kTileRows * kM;  // gradients (64, kV)
  static constexpr int query = values + kTileRows * kV;      // exponents of the row
  static constexpr int sums = query + kM;                    // (warps, kM)
  static constexpr int slopes = sums + kWalkWarps * kM;      // likewise
  static constexpr int kFloats = slopes + kWalkWarps * kM;
};

template <class Shape>
struct UnsafeRows {
  using T = typename Shape::T;
  using Shared = UnsafeShared<Shape>;
  static constexpr int kD = Shape::kHeadDim, kV = Shape::kValueDim, kM = Shape::kFeatures;
  static constexpr int kOwn = kM / 32;  // features of a lane

  const FarBackward& b;
  const Attention& a;
  Chunk c;
  int64_t index, place;  // place: of the state
  int kv_head, lane, warp;
  float* shared;

  __device__ UnsafeRows(const FarBackward& backward, const Chunk& chunk, float* raw)
      : b(backward),
        a(backward.a),
        c(chunk),
        index(blockIdx.x),
        kv_head(blockIdx.y),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        shared(raw) {
    place = cell_of(a, index, kv_head) * b.slices + b.slice;
  }

  struct Side {
    int number;
    int64_t heads, head;
    const FeatureParams& feature;
    const ConstView& x;
  };
  __device__ Side queries(int64_t head) const {
    return {0, a.params.num_heads, head, a.params.fq, a.params.q};
  }
  __device__ Side keys() const {
    return {1, a.params.num_kv_heads, kv_head, a.params.fk, a.params.k};
  }
  __device__ const float* omega(const Side& side) const {
    return static_cast<const float*>(side.feature.omega) + feature_at(side) * headdim();
  }
  // The slice's.
  __device__ int features() const {
    const auto left = static_cast<int>(a.params.num_features) - b.slice * kM;
    return left < kM ? left : kM;
  }
  __device__ int64_t feature_at(const Side& side) const {
    return side.head * a.params.num_features + b.slice * kM;
  }
  __device__ int headdim() const { return static_cast<int>(a.params.headdim); }
  __device__ int headdim_v() const { return static_cast<int>(a.params.headdim_v); }
  __device__ float log_weight(const Side& side, int i) const {
    const auto* weights = static_cast<const float*>(side.feature.log_weight);
    return weights ? weights[feature_at(side) + i] : 0.0f;
  }
  __device__ float beta(const Side& side) const {
    const auto* betas = static_cast<const float*>(side.feature.beta);
    return betas && a.params.kind == FeatureKind::kExp ? betas[side.head] : 0.0f;
  }
  __device__ Row<T> row_of(const Side& side, int row) const {
    return view_row<T>(side.x, c.batch, side.head, c.query_token + row);
  }
  __device__ float square_of(const Row<T>& x) const {
    float sum = 0.0f;
    for (int k = lane; k < headdim(); k += 32) sum = fmaf(x[k], x[k], sum);
    return warp_sum(sum) * static_cast<float>(a.params.scale);
  }

  // Exponents of a row's features, by a warp; of what is not there, kEmpty.
  __device__ void find_exponents(const Side& side, int row, float* to) const {
    const Row<T> x = row_of(side, row);
    const FeatureKind kind = a.params.kind;
    const float scale = sqrtf(static_cast<float>(a.params.scale)) * kLog2e;
    float u[kOwn], top = kEmpty, sum = 0.0f;
    for (int n = 0; n < kOwn; ++n) {
      u[n] = 0.0f;
      const float* line = omega(side) + (lane + 32 * n) * headdim();
      const int width = lane + 32 * n < features() ? headdim() : 0;
      for (int k = 0; k < width; ++k) u[n] = fmaf(line[k], x[k], u[n]);
      u[n] = width > 0 ? u[n] * scale : kEmpty;
      top = fmaxf(top, u[n]);
    }
    float less = square_of(x) * kLog2e * beta(side);
    if (kind == FeatureKind::kSoftmax) {
      top = warp_max(top);
      for (int n = 0; n < kOwn; ++n) sum += exp2f(u[n] - top);
      less = top + log2f(warp_sum(sum));
    }
    for (int n = 0; n < kOwn; ++n) {
      const int i = lane + 32 * n;
      if (kind == FeatureKind::kElu && u[n] > 0.0f) u[n] = log1pf(u[n] * kLn2) * kLog2e;
      to[i] = i < features() ? u[n] - less + log_weight(side, i) * kLog2e : kEmpty;
    }
  }

  // Adds to a row's results what the gradient g of its exponents u means, by a warp.
  __device__ void finish_row(const Side& side, int row, const float* u, const float* g) const {
    const LinearAttentionParams& p = a.params;
    const int64_t row_at = row_index(p, side.heads, c.batch, side.head, c.query_token + row);
    float* du = shared + Shared::slopes + warp * kM;
    float total = 0.0f;
    for (int n = 0; n < kOwn; ++n) total += g[lane + 32 * n];
    total = warp_sum(total);
    for (int i = lane; i < features(); i += 32) {
      du[i] = linear_slope(p.kind, g[i], u[i], log_weight(side, i), total);
      if (b.work.slopes[side.number]) {
        add_to(b.work.slopes[side.number] + (row_at * b.slices + b.slice) * kM + i, du[i]);
      }
    }
    __syncwarp();
    const Row<T> x = row_of(side, row);
    const float root = sqrtf(static_cast<float>(p.scale));
    const float twice = 2.0f * beta(side) * static_cast<float>(p.scale) * total;
    for (int k = lane; k < headdim(); k += 32) {
      float dx = 0.0f;
      for (int i = 0; i < features(); ++i) dx = fmaf(omega(side)[i * headdim() + k], du[i], dx);
      add_to_gradient(b.grad_x[side.number], b.work.sums[side.number], row_at * headdim() + k,
                      dx * root - twice * x[k]);
    }
    const float square = square_of(x);
    if (lane == 0) {
      b.work.total[side.number][row_at] += total;
      if (b.work.square[side.number]) b.work.square[side.number][row_at] += square * total;
    }
    __syncwarp();
  }
  __device__ static void add_to(T* place, float x) { *place = from_float<T>(to_float(*place) + x); }
  // Where the slice's other rows have gone (FarRows::add_columns).
  __device__ void add_to_gradient(void* to, float* sums, int64_t at, float x) const {
    if (b.slice + 1 == b.slices) {
      add_to(static_cast<T*>(to) + at, x);
    } else {
      sums[at] += x;
    }
  }
  __device__ float& weight_sum(const Side& side, int i) const {
    const int64_t row = (index * side.heads + side.head) * kWalkWarps;
    return b.work.weights[side.number][(row * b.slices + b.slice) * kM + i];
  }

  // All keys' part in a row, and the row's own.
  __device__ void add_row(int64_t head, int row) {
    const LinearAttentionParams& p = a.params;
    const Side side = queries(head);
    const int64_t row_at = row_index(p, p.num_heads, c.batch, head, c.query_token + row);
    const float scale = static_cast<const float*>(p.row_scale)[row_at];
    const float inverse = b.work.inverse[row_at], delta = b.work.delta[row_at];
    const Row<T> grad = view_row<T>(b.grad_out, c.batch, head, c.query_token + row);
    const double* levels = a.has_decay ? levels_of(a, index, kv_head) : nullptr;
    float* query = shared + Shared::query;
    if (warp == 0) find_exponents(side, row, query);
    __syncthreads();

    float db[kOwn] = {};
    for (int s = warp; s <= row; s += kWalkWarps) {
      const Row<T> value = view_row<T>(p.v, c.batch, kv_head, c.query_token + s);
      const float decay = levels ? decay_between(levels, s, row) : 0.0f;
      float term[kOwn], weights = 0.0f, slope = 0.0f;
      for (int n = 0; n < kOwn; ++n) {
        const int i = lane + 32 * n;
        term[n] =
            exp2_scaled(shared[Shared::keys + s * kM + i] + query[i] + decay, -scale) * inverse;
        weights += term[n];
      }
      weights = warp_sum(weights);
      for (int j = lane; j < headdim_v(); j += 32) {
        slope = fmaf(grad[j], value[j], slope);
        shared[Shared::values + s * kV + j] += weights * grad[j];
      }
      slope = warp_sum(slope) - delta;
      for (int n = 0; n < kOwn; ++n) {
        db[n] = fmaf(slope, term[n], db[n]);
        shared[Shared::key_grads + s * kM + lane + 32 * n] += slope * term[n];
      }
    }
    for (int n = 0; n < kOwn; ++n) shared[Shared::sums + warp * kM + lane + 32 * n] = db[n];
    __syncthreads();

    const int i = threadIdx.x;
    if (i < kM) {
      float sum = 0.0f, product = 0.0f;
      for (int w = 0; w < kWalkWarps; ++w) sum += shared[Shared::sums + w * kM + i];
      const T* state = static_cast<const T*>(a.work.states) + place * tile_columns(a.params) * kM;
      for (int j = 0; j < headdim_v(); ++j) {
        product = fmaf(grad[j], to_float(state[tile_offset<kM>(j, i)]), product);
      }
      const float top = a.work.scale[place * kM + i];
      if (top > kNone) {
        const float decay = levels ? decay_between(levels, -1, row) : 0.0f;
        sum += (product - delta * a.work.z[place * kM + i]) * inverse *
               exp2_scaled(query[i] + decay, top - scale);
      }
      shared[Shared::sums + i] = sum;
      if (b.work.weights[0]) weight_sum(side, i) += sum;
    }
    __syncthreads();
    if (warp == 0) finish_row(side, row, query, shared + Shared::sums);
    __syncthreads();
  }

  __device__ void run() {
    const LinearAttentionParams& p = a.params;
    bool any = false;
    for (int h = 0; h < a.group; ++h) {
      const int64_t head = int64_t{kv_head} * a.group + h;
      unsigned long long rows =
          failed_rows(b.work.unsafe + (index * p.num_heads + head) * kWalkWarps);
      if (rows != 0 && !any) {
        any = true;
        for (int e = threadIdx.x; e < Shared::query - Shared::key_grads; e += kWalkThreads) {
          shared[Shared::key_grads + e] = 0.0f;
        }
        for (int s = warp; s < c.query_count; s += kWalkWarps) {
          find_exponents(keys(), s, shared + Shared::keys + s * kM);
        }
        __syncthreads();
      }
      for (; rows != 0; rows &= rows - 1) {
        add_row(head, __ffsll(static_cast<long long>(rows)) - 1);
      }
    }
    if (!any) return;
    for (int s = warp; s < c.query_count; s += kWalkWarps) {
      const int64_t row_at = row_index(p, p.num_kv_heads, c.batch, kv_head, c.query_token + s);
      for (int j = lane; j < headdim_v(); j += 32) {
        add_to_gradient(b.grad_v, b.work.sums_v, row_at * headdim_v() + j,
                        shared[Shared::values + s * kV + j]);
      }
      finish_row(keys(), s, shared + Shared::keys + s * kM, shared + Shared::key_grads + s * kM);
    }
    const int i = threadIdx.x;
    if (!b.work.weights[1] || i >= kM) return;
    for (int s = 0; s < c.query_count; ++s) {
      weight_sum(keys(), i) += shared[Shared::key_grads + s * kM + i];
    }
  }
};

}  // namespace dijiang::cuda
