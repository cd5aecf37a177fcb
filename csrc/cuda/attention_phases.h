// The phases that forward and backward share: chunk table, hard keys, decay levels, features, local
// states and the scan that turns them into the states before each chunk.
#pragma once

#include "cuda/hard_keys.h"

namespace dijiang::cuda {

// --- chunk table ---------------------------------------------------------------------------------

// One block: counts, prefix sums, then every chunk looks for its sequence.
static __global__ void __launch_bounds__(kThreads) build_chunks(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<int*>(raw);
  const int64_t seqs = a.params.num_seqs;
  const int tid = threadIdx.x;
  int total = 0;
  for (int64_t first = 0; first < seqs; first += kThreads) {
    const int64_t n = first + tid;
    sums[tid] = n < seqs ? static_cast<int>(find_sequence(a, n).chunks) : 0;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const int before = tid >= step ? sums[tid - step] : 0;
      __syncthreads();
      sums[tid] += before;
      __syncthreads();
    }
    if (n < seqs) a.work.first_chunk[n + 1] = total + sums[tid];
    total += sums[kThreads - 1];
    __syncthreads();
  }
  if (tid == 0) a.work.first_chunk[0] = 0;
  __syncthreads();
  for (int64_t i = tid; i < total; i += kThreads) {
    int64_t low = 0, high = seqs;  // first_chunk[low] <= i < first_chunk[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (a.work.first_chunk[middle] <= i ? low : high) = middle;
    }
    a.work.chunks[i] = make_chunk(a, low, find_sequence(a, low), i - a.work.first_chunk[low]);
  }
}

// --- decay ---------------------------------------------------------------------------------------

// One warp a (chunk, kv head): inclusive sums of the base-2 decay. A decay of -inf is taken as
// -1e9, which no exponent outweighs.
static __global__ void __launch_bounds__(32) sum_levels(Attention a) {
  Chunk c;
  if (!find_chunk(a, blockIdx.x, c)) return;
  const int head = blockIdx.y, lane = threadIdx.x;
  const Keys<float> keys{a, c, head};
  auto* levels = const_cast<double*>(levels_of(a, blockIdx.x, head));
  const int64_t query_end = c.query_pos + c.query_count, key_end = c.key_pos + c.key_count;
  const int count = static_cast<int>((query_end > key_end ? query_end : key_end) - c.key_pos);
  double carry = 0.0;
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    double x = i < count ? fmax(keys.log_decay(c.key_pos + i), -1e9f) * double(kLog2e) : 0.0;
    for (int step = 1; step < 32; step *= 2) {
      const double before = __shfl_up_sync(~0u, x, step);
      if (lane >= step) x += before;
    }
    if (i < count) levels[i] = carry + x;
    carry += __shfl_sync(~0u, x, 31);
  }
}

// --- features ------------------------------------------------------------------------------------

// What is written of log2 phi: itself, or what feature_map gives.
enum class FeatureForm { kExponent, kLog, kValue };

template <class T>
__device__ inline float in_form(float exponent, FeatureForm form) {
  if (form == FeatureForm::kExponent) return exponent;
  return finite<T>(form == FeatureForm::kLog ? exponent * kLn2 : exp2f(exponent));
}

struct FeatureRows {
  ConstView x;
  FeatureParams feature;
  int64_t batch, heads, seqlen;
  int64_t dim, features;
  float scale;         // sqrt(scale) log2 e
  float square_scale;  // scale log2 e, for beta |x|^2
  FeatureKind kind;
  float* out;         // (batch, heads, seqlen, features)
  int64_t out_batch;  // rows from batch to batch of it; 0: as many as there are
  FeatureForm form;
};

constexpr int kFeatureShared = (2 * kDepthTile + kSquareTile + kRows) * sizeof(float);

// 64 rows a block, all features; softmax normalises its own rows afterwards.
template <class T>
__global__ void __launch_bounds__(kThreads) compute_features(FeatureRows f) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* x_tile = reinterpret_cast<float*>(raw);
  float* omega_tile = x_tile + kDepthTile;
  float* result = omega_tile + kDepthTile;
  float* norms = result + kSquareTile;
  const int64_t tiles = (f.seqlen + kRows - 1) / kRows;
  const int64_t first = blockIdx.x % tiles * kRows;
  const int64_t head = blockIdx.x / tiles % f.heads, batch = blockIdx.x / tiles / f.heads;
  const int rows = static_cast<int>(f.seqlen - first < kRows ? f.seqlen - first : kRows);
  const int64_t out_batch = f.out_batch > 0 ? f.out_batch : f.heads * f.seqlen;
  float* out = f.out + (batch * out_batch + head * f.seqlen + first) * f.features;
  const int tid = threadIdx.x;

  if (f.kind == FeatureKind::kGiven) {
    for (int64_t i = tid; i < rows * f.features; i += kThreads) {
      out[i] = view_row<T>(f.x, batch, head, first + i / f.features)[i % f.features];
    }
    return;
  }

  const auto* omega = static_cast<const float*>(f.feature.omega) + head * f.features * f.dim;
  const auto* log_weight = static_cast<const float*>(f.feature.log_weight);
  const auto* beta = static_cast<const float*>(f.feature.beta);
  const float square = beta ? beta[head] * f.square_scale : 0.0f;
  const bool normalises = f.kind == FeatureKind::kSoftmax;
  for (int64_t i0 = 0; i0 < f.features; i0 += kRows) {
    TileProduct<T> product;
    float norm = 0.0f;
    for (int64_t d0 = 0; d0 < f.dim; d0 += kDepth) {
      __syncthreads();
      for (int e = tid; e < kRows * kDepth; e += kThreads) {
        const int r = e / kDepth, k = e % kDepth;
        const bool inside = d0 + k < f.dim;
        x_tile[r * kDepthStride + k] =
            inside && r < rows ? view_row<T>(f.x, batch, head, first + r)[d0 + k] : 0.0f;
        omega_tile[r * kDepthStride + k] =
            inside && i0 + r < f.features ? omega[(i0 + r) * f.dim + d0 + k] : 0.0f;
      }
      __syncthreads();
      product.template multiply<Order::kRowMajor, Order::kColumnMajor, false, true>(
          x_tile, kDepthStride, omega_tile, kDepthStride, kDepth);
      if (tid < kRows) {
        for (int k = 0; k < kDepth; ++k) {
          const float x = x_tile[tid * kDepthStride + k];
          norm = fmaf(x, x, norm);
        }
      }
    }
    product.store(result, kRowStride);
    if (tid < kRows) norms[tid] = norm;
    __syncthreads();
    for (int e = tid; e < rows * kRows; e += kThreads) {
      const int r = e / kRows, i = e % kRows;
      if (i0 + i >= f.features) continue;
      const float u = result[r * kRowStride + i] * f.scale;
      const float weight = log_weight ? log_weight[head * f.features + i0 + i] * kLog2e : 0.0f;
      float y = u;
      if (f.kind == FeatureKind::kExp) {
        y = u + weight - square * norms[r];
      } else if (f.kind == FeatureKind::kElu) {
        y = (u > 0.0f ? log1pf(u * kLn2) * kLog2e : u) + weight;
      }
      out[r * f.features + i0 + i] =
          in_form<float>(y, normalises ? FeatureForm::kExponent : f.form);
    }
    __syncthreads();
  }

  if (!normalises) return;
  for (int r = tid / 32; r < rows; r += kThreads / 32) {
    float* row = out + r * f.features;
    float top = kEmpty, sum = 0.0f;
    for (int64_t i = tid % 32; i < f.features; i += 32) top = fmaxf(top, row[i]);
    top = warp_max(top);
    for (int64_t i = tid % 32; i < f.features; i += 32) sum += exp2f(row[i] - top);
    sum = warp_sum(sum);
    for (int64_t i = tid % 32; i < f.features; i += 32) {
      const float weight = log_weight ? log_weight[head * f.features + i] * kLog2e : 0.0f;
      row[i] = in_form<float>((row[i] - top) - log2f(sum) + weight, f.form);
    }
  }
}

// --- local states --------------------------------------------------------------------------------

constexpr int kLocalShared = (2 * kDepthTile + 12 * kRows) * sizeof(float);
static_assert(2 * kDepthTile >= kSquareTile);

// One block a (chunk, 64 features), kv head, 64 columns of v: kv, z and their maxima, all of the
// chunk's keys alone and as they stand after its last key.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kThreads) local_states(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* phi = reinterpret_cast<float*>(raw);  // [key][feature]
  float* values = phi + kDepthTile;           // [key][column]
  float* result = phi;
  float* maxima = values + kDepthTile;  // (2, 4, 64), then (64) the final ones
  float* scale = maxima + 8 * kRows;
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v;
  const int64_t feature_tiles = (m + kRows - 1) / kRows;
  const int64_t index = blockIdx.x / feature_tiles, i0 = blockIdx.x % feature_tiles * kRows;
  const int64_t j0 = static_cast<int64_t>(blockIdx.z) * kRows;
  Chunk c;
  if (!find_chunk(a, index, c)) return;
  const int head = blockIdx.y, tid = threadIdx.x;
  const Keys<T> keys{a, c, head};
  const FoldedKeys folded(a, c, index, head);
  const int64_t cell = cell_of(a, index, head);
  using F = Feature<kGiven>;

  {
    const int i = tid % kRows, part = tid / kRows;
    float plain = kEmpty, decayed = kEmpty;
    if (i0 + i < m) {
      for (int s = folded.first + part; s < folded.count; s += 4) {
        const float x = keys.features(folded.pos(s), folded.slot(s))[i0 + i];
        plain = fmaxf(plain, F::bound(x));
        decayed = fmaxf(decayed, folded.levels ? F::bound(x, folded.decay(s)) : F::bound(x));
      }
    }
    maxima[part * kRows + i] = plain;
    maxima[(4 + part) * kRows + i] = fmaxf(decayed, kEmpty);
    __syncthreads();
    if (tid < kRows) {
      for (int q = 1; q < 4; ++q) {
        plain = fmaxf(plain, maxima[q * kRows + i]);
        decayed = fmaxf(decayed, maxima[(4 + q) * kRows + i]);
      }
      scale[i] = decayed;
      if (blockIdx.z == 0 && i0 + i < m) {
        a.work.chunk_scale[cell * m + i0 + i] = plain;
        a.work.local_scale[cell * m + i0 + i] = decayed;
      }
    }
  }

  TileProduct<T> product;
  float z = 0.0f;
  for (int s0 = folded.first; s0 < folded.count; s0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int s = s0 + e / kRows, i = e % kRows;
      const bool inside = s < folded.count;
      float x = 0.0f, v = 0.0f;
      if (inside && i0 + i < m) {
        const float y = keys.features(folded.pos(s), folded.slot(s))[i0 + i];
        x = folded.levels ? F::scaled(y, folded.decay(s), -scale[i]) : F::scaled(y, -scale[i]);
      }
      if (inside && j0 + i < dv) v = keys.value(folded.pos(s), folded.slot(s))[j0 + i];
      phi[e / kRows * kRowStride + i] = operand<T>(x);
      values[e / kRows * kRowStride + i] = v;
    }
    __syncthreads();
    product.template multiply<Order::kColumnMajor, Order::kRowMajor>(phi, kRowStride, values,
                                                                     kRowStride, kDepth);
    if (tid < kRows) {
      for (int k = 0; k < kDepth; ++k) z += phi[k * kRowStride + tid];
    }
  }
  __syncthreads();
  product.store(result, kRowStride);
  if (blockIdx.z == 0 && tid < kRows && i0 + tid < m) a.work.z[cell * m + i0 + tid] = z;
  __syncthreads();
  for (int e = tid; e < kRows * kRows; e += kThreads) {
    const int i = e / kRows, j = e % kRows;
    if (i0 + i < m && j0 + j < dv) {
      a.work.kv[(cell * m + i0 + i) * dv + j0 + j] = result[i * kRowStride + j];
    }
  }
}

// --- scan ----------------------------------------------------------------------------------------

// Decay of a scaled number: whole powers of two go to its scale, the rest to the number. `rest` in
// [0, 1) is what the number holds of it: carried along, so that many mild decays do not add up in
// the number. All columns of a feature start with the same rest.
struct DecayStep {
  float whole;
  float factor;
};
__device__ inline DecayStep step_decay(float decay, float& rest) {
  const float whole = floorf(decay + rest);
  const float next = fminf(fmaxf(decay + rest - whole, 0.0f), 1.0f);
  const float factor = exp2f(decay - whole);
  rest = next;
  return {whole, factor};
}

// One thread an element of (kv | z) of a (sequence, kv head): replaces the chunks' local states by
// the states before the chunks, and writes the final state. Column headdim_v is z, whose thread
// also writes the maxima that all columns of a feature work out alike.
static __global__ void __launch_bounds__(kThreads) scan_states(Attention a) {
  const LinearAttentionParams& p = a.params;
  const int64_t m = p.num_features, dv = p.headdim_v, columns = dv + 1;
  const int64_t tiles = (m * columns + kThreads - 1) / kThreads;
  const int64_t seq = blockIdx.x / tiles;
  const int64_t element = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (element >= m * columns) return;
  const int64_t i = element / columns, j = element % columns;
  const int head = blockIdx.y;
  const int64_t state = (seq * p.num_kv_heads + head) * m + i;
  const bool is_z = j == dv;

  float scale = kEmpty, sum = 0.0f, rest = 0.0f;
  if (p.initial.kv) {
    rest = static_cast<const float*>(p.initial.z)[state] < 1.0f ? 0.0f : 0.999f;
    scale = static_cast<const float*>(p.initial.log_scale)[state];
    sum = is_z ? static_cast<const float*>(p.initial.z)[state]
               : static_cast<const float*>(p.initial.kv)[state * dv + j];
  }
  const int64_t end = a.work.first_chunk[seq + 1];
  for (int64_t index = a.work.first_chunk[seq]; index < end; ++index) {
    const int64_t cell = cell_of(a, index, head);
    float& place = is_z ? a.work.z[cell * m + i] : a.work.kv[(cell * m + i) * dv + j];
    const float local = place, local_scale = a.work.local_scale[cell * m + i];
    place = sum;
    if (is_z) a.work.scale[cell * m + i] = scale;
    const int key_count = a.work.chunks[index].key_count;
    if (a.has_decay && key_count > 0) {
      const float decay = decay_between(levels_of(a, index, head), -1, key_count - 1);
      const DecayStep step = step_decay(decay, rest);
      sum *= step.factor;
      scale = fmaxf(scale + step.whole, kEmpty);
    }
    const float top = fmaxf(scale, local_scale);
    sum = scale2(sum, scale - top) + scale2(local, local_scale - top);
    scale = top;
  }
  if (!p.final.kv) return;
  if (is_z) {
    static_cast<float*>(p.final.z)[state] = sum;
    static_cast<float*>(p.final.log_scale)[state] = scale;
  } else {
    static_cast<float*>(p.final.kv)[state * dv + j] = sum;
  }
}

// --- launching them ------------------------------------------------------------------------------

// Blocks along the columns of v. One at least, as sums without values are theirs too.
inline unsigned column_blocks(int64_t columns, int64_t each) {
  return static_cast<unsigned>(columns > each ? ceil_div(columns, each) : 1);
}

inline cudaError_t check_attention(const LinearAttentionParams& p) {
  if (p.dtype == DType::kFloat64) return cudaErrorNotSupported;
  // Tiles of heads and of columns lie on the short axes of the grid.
  if (p.num_heads > 65535 || p.headdim_v > 65535) return cudaErrorInvalidValue;
  return cudaSuccess;
}

inline FeatureRows feature_rows(const LinearAttentionParams& p, const ConstView& x,
                                const FeatureParams& feature, int64_t heads, float* out) {
  FeatureRows f{};
  f.x = x;
  f.feature = feature;
  f.batch = p.batch;
  f.heads = heads;
  f.seqlen = p.seqlen;
  f.dim = p.headdim;
  f.features = p.num_features;
  f.scale = static_cast<float>(sqrt(p.scale) * 1.4426950408889634);
  f.square_scale = static_cast<float>(p.scale * 1.4426950408889634);
  f.kind = p.kind;
  f.out = out;
  return f;
}

template <class T>
void launch_features(const FeatureRows& f, cudaStream_t stream) {
  const int64_t blocks = ceil_div(f.seqlen, kRows) * f.heads * f.batch;
  if (blocks == 0 || f.features == 0) return;
  DIJIANG_LAUNCH((compute_features<T>), dim3(static_cast<unsigned>(blocks)), kThreads,
                 kFeatureShared, stream, f);
}

// Of the keys in the slots of the given state: heads together where they have as many.
template <class T>
void launch_cache_features(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  const int64_t all = p.cache.all(p.num_kv_heads), heads = p.cache.own ? 1 : p.num_kv_heads;
  for (int64_t head = 0; head < p.num_kv_heads; head += heads) {
    const int64_t slots = p.cache.of(head), first = p.cache.slot(0, head, p.num_kv_heads);
    const ConstView cache{static_cast<const T*>(p.initial.cache_k) + first * p.headdim,
                          all * p.headdim, slots * p.headdim, p.headdim, 1};
    const int64_t m = p.num_features;
    FeatureParams fk = p.fk;
    if (fk.omega) fk.omega = static_cast<const float*>(fk.omega) + head * m * p.headdim;
    if (fk.log_weight) fk.log_weight = static_cast<const float*>(fk.log_weight) + head * m;
    if (fk.beta) fk.beta = static_cast<const float*>(fk.beta) + head;
    FeatureRows f = feature_rows(p, cache, fk, heads, a.work.cache_features + first * m);
    f.batch = p.num_seqs;
    f.seqlen = slots;
    f.out_batch = all;
    launch_features<T>(f, stream);
  }
}

// What all later kernels read: the chunk table, hard keys and decay.
template <class T>
void launch_chunks(const Attention& a, cudaStream_t stream) {
  DIJIANG_LAUNCH(build_chunks, 1, kThreads, kThreads * sizeof(int), stream, a);
  if (a.params.cache.most > 0) launch_hard_keys<T>(a, stream);
  if (!a.has_decay) return;
  const dim3 grid(static_cast<unsigned>(a.max_chunks),
                  static_cast<unsigned>(a.params.num_kv_heads));
  DIJIANG_LAUNCH(sum_levels, grid, 32, 0, stream, a);
}

template <class T, bool kGiven>
void launch_states(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  launch_chunks<T>(a, stream);
  if (p.num_features == 0) return;
  const auto chunks = static_cast<unsigned>(a.max_chunks);
  const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
  launch_features<T>(feature_rows(p, p.q, p.fq, p.num_heads, a.work.query_features), stream);
  launch_features<T>(feature_rows(p, p.k, p.fk, p.num_kv_heads, a.work.key_features), stream);
  if (a.work.window_features) {
    const int64_t slots = 2 * p.window;
    const ConstView window{p.initial.window_k, p.num_kv_heads * slots * p.headdim,
                           slots * p.headdim, p.headdim, 1};
    FeatureRows f = feature_rows(p, window, p.fk, p.num_kv_heads, a.work.window_features);
    f.batch = p.num_seqs;
    f.seqlen = slots;
    launch_features<T>(f, stream);
  }
  if (a.work.cache_features) launch_cache_features<T>(a, stream);
  const auto feature_tiles = static_cast<unsigned>(ceil_div(p.num_features, kRows));
  const unsigned column_tiles = column_blocks(p.headdim_v, kRows);
  DIJIANG_LAUNCH((local_states<T, kGiven>), dim3(chunks * feature_tiles, kv_heads, column_tiles),
                 kThreads, kLocalShared, stream, a);
  const auto element_tiles =
      static_cast<unsigned>(ceil_div(p.num_features * (p.headdim_v + 1), kThreads));
  DIJIANG_LAUNCH(scan_states, dim3(static_cast<unsigned>(p.num_seqs) * element_tiles, kv_heads),
                 kThreads, 0, stream, a);
}

}  // namespace dijiang::cuda
