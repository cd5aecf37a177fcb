// One token a sequence: folds what leaves the window, stores the token, reads the state. One block
// a (sequence, kv head), so that state and maxima change in one place; the lengths follow in a
// second kernel, once all blocks have read them.
#include "cuda/attention_rows.h"
#include "cuda/fused_calls.h"
#include "cuda/hard_key_choice.h"
#include "cuda/row_pieces.h"
#include "dijiang/core/linear_attention_cuda.h"

namespace dijiang::cuda {
namespace {

constexpr int kFold = 8;  // keys folded at a time
// How a kernel reads: kHeads query heads of a kv head at once, kWhole: rows in pieces of 16 bytes.
template <class T, bool kWhole_, int kHeads_>
struct Reads {
  static constexpr int kHeads = kHeads_;
  static constexpr int kWidth = kWhole_ ? kPieceWidth<T> : 1;           // of keys and values
  static constexpr int kFloatWidth = kWhole_ ? kPieceWidth<float> : 1;  // of omega and the state
  static constexpr int kColumns = kPieceColumns<kWidth>;
  static_assert(kColumns == kPieceColumns<kFloatWidth> && kHeads <= kFold);
};

// Shared memory, in floats. Pieces first: each begins at a multiple of 4.
struct UpdateTiles {
  float* x;        // (kFold, headdim): keys or queries
  float* values;   // (kFold, headdim_v)
  float* phi;      // (kFold, num_features)
  float* factor;   // (num_features): of the old state
  float* decay;    // (max(window, 1)): of the keys that are folded, up to the last of them
  float* weights;  // (kHeads, near_keys)
  float* partial;  // of add_rows
  float* result;   // (kHeads, kColumns)
  float* ends;     // (kHeads, 2): factor and scale of a row's outputs
  float* scratch;  // (32)
  // With hard keys.
  Choice choice;  // votes and sums are the state's
  int* left;      // (window): candidates that leave

  // At most.
  __host__ __device__ static int64_t near_keys(const LinearAttentionParams& p) {
    return 2 * p.window + p.sinks + p.cache.most;
  }
  template <class Read>
  static int64_t floats(const LinearAttentionParams& p) {
    return kFold * (p.headdim + p.num_features + p.headdim_v) + p.num_features +
           (p.window > 0 ? p.window : 1) + Read::kHeads * (near_keys(p) + Read::kColumns + 2) +
           kPartialFloats<Read::kWidth, Read::kHeads> + 32 +
           (p.cache.most > 0 ? Choice::floats(p) + p.window : 0);
  }
  template <class Read>
  __device__ void take(const LinearAttentionParams& p, float* shared) {
    x = shared;
    values = x + kFold * p.headdim;
    phi = values + kFold * p.headdim_v;
    factor = phi + kFold * p.num_features;
    decay = factor + p.num_features;
    weights = decay + (p.window > 0 ? p.window : 1);
    partial = weights + Read::kHeads * near_keys(p);
    result = partial + kPartialFloats<Read::kWidth, Read::kHeads>;
    ends = result + Read::kHeads * Read::kColumns;
    scratch = ends + 2 * Read::kHeads;
    if (p.cache.most == 0) return;
    choice.take(p, scratch + 32);
    left = choice.held + p.cache.most;
  }
};

// phi[r][i] of `rows` <= kRowsMost rows of x, as compute_features writes them. Barriers before and
// after.
template <int kWidth, int kRowsMost>
__device__ inline void update_features(const LinearAttentionParams& p, const FeatureParams& feature,
                                       int head, int rows, const float* x, float* phi) {
  const int64_t m = p.num_features, d = p.headdim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
  if (p.kind == FeatureKind::kGiven) {
    for (int64_t e = threadIdx.x; e < rows * m; e += kThreads) phi[e] = x[e];
    __syncthreads();
    return;
  }
  const auto* omega = static_cast<const float*>(feature.omega) + head * m * d;
  const auto* log_weight = static_cast<const float*>(feature.log_weight);
  const auto* beta = static_cast<const float*>(feature.beta);
  const float scale = sqrtf(static_cast<float>(p.scale)) * kLog2e;
  float norm[kRowsMost] = {};
  if (beta) {  // every warp for itself
    for (int r = 0; r < rows; ++r) {
      float sum = 0.0f;
      for (int64_t k = lane; k < d; k += 32) sum = fmaf(x[r * d + k], x[r * d + k], sum);
      norm[r] = warp_sum(sum) * beta[head] * score_scale(p);
    }
  }
  multiply_rows_by<kWidth, kRowsMost>(
      x, static_cast<int>(d), static_cast<int>(m), [&](int i) { return omega + i * d; },
      [&](int i, int r, float sum) {
        if (r >= rows) return;
        const float u = sum * scale;
        const float weight = log_weight ? log_weight[head * m + i] * kLog2e : 0.0f;
        float y = u;
        if (p.kind == FeatureKind::kExp) {
          y = u + weight - (beta ? norm[r] : 0.0f);
        } else if (p.kind == FeatureKind::kElu) {
          y = (u > 0.0f ? log1pf(u * kLn2) * kLog2e : u) + weight;
        }
        phi[r * m + i] = y;
      });
  __syncthreads();
  if (p.kind != FeatureKind::kSoftmax) return;
  for (int r = warp; r < rows; r += kThreads / 32) {
    float* row = phi + r * m;
    float top = kEmpty, sum = 0.0f;
    for (int64_t i = lane; i < m; i += 32) top = fmaxf(top, row[i]);
    top = warp_max(top);
    for (int64_t i = lane; i < m; i += 32) sum += exp2f(row[i] - top);
    sum = warp_sum(sum);
    for (int64_t i = lane; i < m; i += 32) {
      const float weight = log_weight ? log_weight[head * m + i] * kLog2e : 0.0f;
      row[i] = (row[i] - top) - log2f(sum) + weight;
    }
  }
  __syncthreads();
}

// kv = factor kv + sum of `rows` phi values.
template <int kWidth>
__device__ inline void fold_values(const LinearAttentionParams& p, const UpdateTiles& tiles,
                                   int rows, float* kv) {
  const int64_t m = p.num_features, dv = p.headdim_v;
  const int pieces = static_cast<int>(dv / kWidth), lanes = lanes_of(pieces);
  const int part = threadIdx.x / lanes, step = kThreads / lanes;
  for (int piece = threadIdx.x % lanes; piece < pieces; piece += lanes) {
    for (int64_t first = part; first < m; first += kPieceRows * step) {
      float sum[kPieceRows][kWidth];
      DIJIANG_UNROLL()
      for (int u = 0; u < kPieceRows; ++u) {
        const int64_t i = first + u * step;
        load_piece(sum[u], kv + (i < m ? i : 0) * dv + piece * kWidth);
      }
      DIJIANG_UNROLL()
      for (int u = 0; u < kPieceRows; ++u) {
        const int64_t i = first + u * step;
        if (i >= m) continue;
        DIJIANG_UNROLL()
        for (int e = 0; e < kWidth; ++e) {
          float x = sum[u][e] * tiles.factor[i];
          for (int r = 0; r < rows; ++r) {
            x = fmaf(tiles.phi[r * m + i], tiles.values[r * dv + piece * kWidth + e], x);
          }
          kv[i * dv + piece * kWidth + e] = x;
        }
      }
    }
  }
}

template <class T, bool kGiven, class Read>
__global__ void __launch_bounds__(kThreads, 2) update_attention(LinearAttentionParams p) {
  DIJIANG_DYNAMIC_SHARED(raw);
  UpdateTiles tiles;
  tiles.take<Read>(p, reinterpret_cast<float*>(raw));
  const int64_t m = p.num_features, d = p.headdim, dv = p.headdim_v, w = p.window, n = p.sinks;
  const int64_t seq = blockIdx.x / p.num_kv_heads;
  const int head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  const int64_t cell = blockIdx.x;
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t pos = p.final.length ? p.final.length[seq] : 0;
  auto* kv = static_cast<float*>(p.final.kv) + cell * m * dv;
  auto* z = static_cast<float*>(p.final.z) + cell * m;
  auto* scale = static_cast<float*>(p.final.log_scale) + cell * m;
  auto* window_k = static_cast<T*>(p.final.window_k) + cell * 2 * w * d;
  auto* window_v = static_cast<T*>(p.final.window_v) + cell * 2 * w * dv;
  auto* sink_k = static_cast<T*>(p.final.sink_k) + cell * n * d;
  auto* sink_v = static_cast<T*>(p.final.sink_v) + cell * n * dv;
  float* window_decay =
      p.final.window_decay ? static_cast<float*>(p.final.window_decay) + cell * 2 * w : nullptr;
  const Row<T> key = view_row<T>(p.k, seq, head, 0), value = view_row<T>(p.v, seq, head, 0);
  const float log_decay =
      p.log_decay
          ? fmaxf(static_cast<const float*>(
                      p.log_decay)[seq * p.log_decay_stride_batch + head * p.log_decay_stride_head],
                  -1e9f)
          : 0.0f;
  const bool has_decay = p.log_decay != nullptr;
  using F = Feature<kGiven>;

  // --- hard keys: which of those that leave the window and of those in the slots stay -----------
  const bool cached = p.cache.most > 0;
  const int64_t size = p.cache.of(head), first_slot = p.cache.slot(seq, head, p.num_kv_heads);
  auto* cache_k = static_cast<T*>(p.final.cache_k) + first_slot * d;
  auto* cache_v = static_cast<T*>(p.final.cache_v) + first_slot * dv;
  float* cache_decay =
      p.final.cache_decay ? static_cast<float*>(p.final.cache_decay) + first_slot : nullptr;
  const bool leaves = w > 0 && pos % w == 0 && pos >= 2 * w;
  if (cached) {
    const int64_t* positions = p.final.cache_position + first_slot;
    tiles.choice.votes =
        static_cast<float*>(p.final.votes) + p.cache.vote(seq, head, p.num_kv_heads, w);
    tiles.choice.sums = static_cast<float*>(p.final.sums) + cell * (d + dv);
    for (int64_t i = tid; i < size; i += kThreads) {
      tiles.choice.held[i] = static_cast<int>(positions[i]);
    }
    __syncthreads();
  }
  const Candidates all(p, cached ? tiles.choice.held : nullptr, size, w > 0 ? pos / w : 0);
  int64_t hard = all.slots;  // filled ones
  // A candidate's row in its buffer.
  const auto candidate = [&](int i, T* slots, T* window, int64_t dim) -> T* {
    return i < all.slots ? slots + i * dim : window + (all.leaving + all.row(i)) % (2 * w) * dim;
  };
  int left = 0;
  if (cached && leaves) {
    choose(p, static_cast<int>(size), all, tiles.choice, [&](float length, float tokens) {
      find_novelty(
          p, all.count, tiles.choice, length, tokens,
          [&](int i) {
            return Row<T>{candidate(i, cache_k, window_k, d), 1};
          },
          [&](int i) {
            return Row<T>{candidate(i, cache_v, window_v, dv), 1};
          });
    });
    left = enumerate(
        all.count, tiles.choice.counts, [&](int i) { return !tiles.choice.kept[i]; },
        [&](int i, int rank) { tiles.left[rank] = i; });
    __syncthreads();
  }

  // --- fold: this token when there is no window, else the keys that leave ---------------------
  const bool folds = m > 0 && (w == 0 || leaves);
  if (folds || (cached && leaves)) {
    const int64_t begin = w == 0 ? pos : pos - 2 * w;
    const int keys = w == 0 ? 1 : static_cast<int>(w);
    double total = 0.0;  // every thread alike
    if (has_decay) {
      if (w == 0) {
        total = double(log_decay) * double(kLog2e);
        if (tid == 0) tiles.decay[0] = 0.0f;
      } else if (window_decay) {
        for (int s = keys - 1; s >= 0; --s) {
          if (tid == 0) tiles.decay[s] = static_cast<float>(total);
          total += double(fmaxf(window_decay[(begin + s) % (2 * w)], -1e9f)) * double(kLog2e);
        }
      } else {
        for (int s = tid; s < keys; s += kThreads) tiles.decay[s] = 0.0f;
      }
    }
    // Rows [skip, count) fold: of the block, or of the list of those that leave.
    const int sinks_of_block = w == 0 ? int(pos < n) : all.skip;
    const int skip = cached ? 0 : sinks_of_block, count = cached ? left : keys;
    const auto source = [&](int s, T* slots, T* window, int64_t dim) -> const T* {
      if (cached) return candidate(tiles.left[s], slots, window, dim);
      return window + (begin + s) % (2 * w) * dim;
    };
    const auto decay_of = [&](int s) {
      if (!cached) return tiles.decay[s];
      const int i = tiles.left[s];
      if (i >= all.slots) return tiles.decay[all.row(i)];
      return static_cast<float>(total +
                                (cache_decay ? double(cache_decay[i]) : 0.0) * double(kLog2e));
    };
    auto decay = static_cast<float>(total);
    int s0 = skip;
    if (folds) {
      do {  // once at least, for the decay
        const int rows = count - s0 < kFold ? count - s0 : kFold;
        __syncthreads();
        for (int64_t e = tid; e < rows * d; e += kThreads) {
          const int64_t k = e % d;
          const int s = s0 + static_cast<int>(e / d);
          tiles.x[e] = w == 0 ? key[k] : to_float(source(s, cache_k, window_k, d)[k]);
        }
        for (int64_t e = tid; e < rows * dv; e += kThreads) {
          const int64_t j = e % dv;
          const int s = s0 + static_cast<int>(e / dv);
          tiles.values[e] = w == 0 ? value[j] : to_float(source(s, cache_v, window_v, dv)[j]);
        }
        update_features<Read::kFloatWidth, kFold>(p, p.fk, head, rows, tiles.x, tiles.phi);
        for (int64_t i = tid; i < m; i += kThreads) {
          // Rounded so that z stays near 1 under any number of mild decays.
          const float whole = z[i] < 1.0f ? floorf(decay) : ceilf(decay);
          const float old = fmaxf(scale[i] + whole, kEmpty);
          float top = old;
          for (int r = 0; r < rows; ++r) {
            const float x = tiles.phi[r * m + i];
            top = fmaxf(top, has_decay ? F::bound(x, decay_of(s0 + r)) : F::bound(x));
          }
          tiles.factor[i] = scale2(exp2f(decay - whole), old - top);
          float sum = z[i] * tiles.factor[i];
          for (int r = 0; r < rows; ++r) {
            float& x = tiles.phi[r * m + i];
            x = has_decay ? F::scaled(x, decay_of(s0 + r), -top) : F::scaled(x, -top);
            sum += x;
          }
          z[i] = sum;
          scale[i] = top;
        }
        __syncthreads();
        fold_values<Read::kFloatWidth>(p, tiles, rows, kv);
        decay = 0.0f;
        s0 += rows;
      } while (s0 < count);
    }
    __syncthreads();
    if (cached) {
      // The keys that enter, from the window to their slots.
      const auto* held = tiles.choice.held;
      int64_t* positions = p.final.cache_position + first_slot;
      const auto enters = [&](int64_t i) { return held[i] >= 0 && held[i] >= begin; };
      for (int64_t e = tid; e < size * d; e += kThreads) {
        if (enters(e / d)) cache_k[e] = window_k[held[e / d] % (2 * w) * d + e % d];
      }
      for (int64_t e = tid; e < size * dv; e += kThreads) {
        if (enters(e / dv)) cache_v[e] = window_v[held[e / dv] % (2 * w) * dv + e % dv];
      }
      for (int64_t i = tid; i < size; i += kThreads) {
        positions[i] = held[i];
        if (!cache_decay) continue;
        const double since = enters(i) ? double(tiles.decay[held[i] - begin])
                                       : total + double(cache_decay[i]) * double(kLog2e);
        cache_decay[i] = static_cast<float>(held[i] < 0 ? 0.0 : since / double(kLog2e));
      }
      carry_votes(p, size, tiles.choice, begin);
      hard = filled_slots(held, size);
    }
  }
  __syncthreads();

  // --- store the token ---------------------------------------------------------------------------
  const int64_t slot = w > 0 ? pos % (2 * w) : 0;
  for (int64_t k = tid; k < d; k += kThreads) {
    const T x = key.data[k * key.stride];
    if (w > 0) window_k[slot * d + k] = x;
    if (pos < n) sink_k[pos * d + k] = x;
  }
  for (int64_t j = tid; j < dv; j += kThreads) {
    const T x = value.data[j * value.stride];
    if (w > 0) window_v[slot * dv + j] = x;
    if (pos < n) sink_v[pos * dv + j] = x;
  }
  if (tid == 0 && w > 0 && window_decay) window_decay[slot] = log_decay;
  for (int64_t j = tid; cached && j < d + dv; j += kThreads) {
    tiles.choice.sums[j] += j < d ? key[j] : value[j - d];
  }
  __syncthreads();

  // --- read --------------------------------------------------------------------------------------
  const int64_t fold_end = w > 0 && pos >= w ? (pos / w - 1) * w : 0;
  const int64_t window_begin = fold_end > n ? fold_end : n;
  const int sinks = static_cast<int>(n < pos + 1 ? n : pos + 1);
  const int kept = sinks + static_cast<int>(hard);
  const int near = kept + (w > 0 && window_begin <= pos ? int(pos + 1 - window_begin) : 0);
  const int ring = static_cast<int>(2 * w);
  const int window_slot = w > 0 ? static_cast<int>(window_begin % ring) : 0;
  const auto near_row = [&](int s, const T* sinks_of, const T* slots, const T* window,
                            int64_t dim) -> const T* {
    if (s < sinks) return sinks_of + s * dim;
    if (s < kept) return slots + (s - sinks) * dim;
    const int at = window_slot + s - kept;
    return window + (at < ring ? at : at - ring) * dim;
  };
  const auto near_key = [&](int s) { return near_row(s, sink_k, cache_k, window_k, d); };
  float row_decay = 0.0f;  // since the last folded token
  if (has_decay && w > 0 && window_decay) {
    double sum = 0.0;
    for (int64_t s = fold_end + lane; s <= pos; s += 32) {
      sum += double(fmaxf(window_decay[s % (2 * w)], -1e9f));
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    row_decay = static_cast<float>(sum * double(kLog2e));
  }

  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const int64_t stride = UpdateTiles::near_keys(p);
  for (int g = 0; g < group; g += Read::kHeads) {
    const int heads = group - g < Read::kHeads ? group - g : Read::kHeads;
    const auto first_head = static_cast<int>(head * group + g);
    __syncthreads();
    for (int64_t e = tid; e < Read::kHeads * d; e += kThreads) {
      const auto h = static_cast<int>(e / d);
      tiles.x[e] = h < heads ? view_row<T>(p.q, seq, first_head + h, 0)[e - h * d] : 0.0f;
    }
    for (int h = 0; m > 0 && h < heads; ++h) {
      update_features<Read::kFloatWidth, 1>(p, p.fq, first_head + h, 1, tiles.x + h * d,
                                            tiles.phi + h * m);
    }
    __syncthreads();
    multiply_rows_by<Read::kWidth, Read::kHeads>(
        tiles.x, static_cast<int>(d), near, near_key,
        [&](int s, int h, float score) { tiles.weights[h * stride + s] = score * score_scale(p); });
    __syncthreads();
    for (int h = 0; h < Read::kHeads; ++h) {
      float* weights = tiles.weights + h * stride;
      float* phi = tiles.phi + h * m;
      if (h >= heads) {  // add_rows does all of them
        for (int s = tid; s < near; s += kThreads) weights[s] = 0.0f;
        for (int64_t i = tid; i < m; i += kThreads) phi[i] = 0.0f;
        continue;
      }
      float top = kEmpty;
      for (int s = tid; s < near; s += kThreads) top = fmaxf(top, ceilf(weights[s]));
      for (int64_t i = tid; i < m; i += kThreads) {
        top = fmaxf(top, F::bound(phi[i], row_decay) + scale[i]);
      }
      top = block_max(top, tiles.scratch);
      if (top < kNone) top = kEmpty;
      float den = 0.0f;
      for (int s = tid; s < near; s += kThreads) {
        weights[s] = exp2_scaled(weights[s], -top);
        den += weights[s];
      }
      if (cached && pos >= w) {
        const float exact = block_sum(den, tiles.scratch);
        for (int s = sinks + tid; s < near && exact > 0.0f; s += kThreads) {
          const int64_t row =
              s < kept ? -1 : window_begin + s - kept - fold_end;  // of the block before
          if (row >= w) continue;
          tiles.choice.votes[s < kept ? s - sinks : size + row] += weights[s] / exact;
        }
      }
      for (int64_t i = tid; i < m; i += kThreads) {
        const float x = top > kNone ? F::scaled(phi[i], row_decay, scale[i] - top) : 0.0f;
        phi[i] = x;
        den = fmaf(x, z[i], den);
      }
      den = block_sum(den, tiles.scratch);
      if (tid != 0) continue;
      const RowEnd end = finish_row(p, den, top);
      tiles.ends[2 * h] = end.factor;
      tiles.ends[2 * h + 1] = top;
      const int64_t at = seq * p.num_heads + first_head + h;
      if (p.row_scale) static_cast<float*>(p.row_scale)[at] = end.scale;
      if (p.row_sum) static_cast<float*>(p.row_sum)[at] = end.sum;
    }
    for (int64_t j0 = 0; j0 < dv; j0 += Read::kColumns) {
      const int columns = dv - j0 < Read::kColumns ? static_cast<int>(dv - j0) : Read::kColumns;
      for (int e = tid; e < Read::kHeads * Read::kColumns; e += kThreads) tiles.result[e] = 0.0f;
      add_rows<Read::kFloatWidth, Read::kHeads>(
          tiles.phi, m, columns, static_cast<int>(m), [&](int i) { return kv + i * dv + j0; },
          tiles.partial, tiles.result);
      add_rows<Read::kWidth, Read::kHeads>(
          tiles.weights, stride, columns, near,
          [&](int s) { return near_row(s, sink_v, cache_v, window_v, dv) + j0; }, tiles.partial,
          tiles.result);
      for (int e = tid; e < heads * Read::kColumns; e += kThreads) {
        const int h = e / Read::kColumns, j = e % Read::kColumns;
        if (j >= columns) continue;
        const RowEnd end{tiles.ends[2 * h], 0.0f, 0.0f};
        static_cast<T*>(p.out)[(seq * p.num_heads + first_head + h) * dv + j0 + j] =
            from_float<T>(row_output(p, tiles.result[e], end, tiles.ends[2 * h + 1]));
      }
      __syncthreads();
    }
  }
}

__global__ void advance_lengths(int64_t* length, int64_t count) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n < count) ++length[n];
}

// Rows of keys, values, omega and state that consist of whole pieces.
template <class T>
bool has_whole_rows(const LinearAttentionParams& p) {
  constexpr int kWidth = kPieceWidth<T>;
  return p.headdim % kWidth == 0 && p.headdim_v % kWidth == 0 && begins_at_pieces(p.final.kv) &&
         begins_at_pieces(p.fq.omega) && begins_at_pieces(p.fk.omega) &&
         state_begins_at_pieces(p.final);
}

template <class T, bool kGiven, class Read>
void launch_read(const LinearAttentionParams& p, cudaStream_t stream) {
  const size_t shared = UpdateTiles::floats<Read>(p) * sizeof(float);
  allow_shared(update_attention<T, kGiven, Read>, shared);
  DIJIANG_LAUNCH((update_attention<T, kGiven, Read>),
                 dim3(static_cast<unsigned>(p.batch * p.num_kv_heads)), kThreads, shared, stream,
                 p);
}

template <class T, bool kGiven>
cudaError_t launch_update(const LinearAttentionParams& p, cudaStream_t stream) {
  using Grouped = Reads<T, true, 4>;
  const auto grouped = static_cast<int64_t>(UpdateTiles::floats<Grouped>(p) * sizeof(float));
  if (p.num_kv_heads > 0 && !has_whole_rows<T>(p)) {
    launch_read<T, kGiven, Reads<T, false, 1>>(p, stream);
  } else if (p.num_heads > p.num_kv_heads &&
             grouped <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    launch_read<T, kGiven, Grouped>(p, stream);
  } else if (p.num_kv_heads > 0) {
    launch_read<T, kGiven, Reads<T, true, 1>>(p, stream);
  }
  if (p.final.length) {
    DIJIANG_LAUNCH(advance_lengths, dim3(static_cast<unsigned>((p.batch + 127) / 128)), 128, 0,
                   stream, p.final.length, p.batch);
  }
  return launch_status();
}

template <class T>
cudaError_t launch_update_kind(const LinearAttentionParams& p, cudaStream_t stream) {
  return p.kind == FeatureKind::kGiven ? launch_update<T, true>(p, stream)
                                       : launch_update<T, false>(p, stream);
}

}  // namespace

cudaError_t linear_attention_update(const LinearAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32: return launch_update_kind<float>(params, stream);
    case DType::kBFloat16: return launch_update_kind<__nv_bfloat16>(params, stream);
    case DType::kFloat16: return launch_update_kind<__half>(params, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace dijiang::cuda
