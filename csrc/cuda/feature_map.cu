// phi(x), its logarithm, and the gradients of either (docs/numerics.md, "Backward").
#include "dijiang/core/feature_map_cuda.h"

#include <cmath>
#include <type_traits>

#include "cuda/attention_phases.h"
#include "cuda/fused_feature_map.h"

namespace dijiang::cuda {
namespace {

constexpr int kWarpsPerBlock = kThreads / 32;

FeatureRows feature_rows(const FeatureMapParams& p, FeatureForm form, float* out) {
  FeatureRows f{};
  f.x = p.x;
  f.feature = p.feature;
  f.batch = p.batch;
  f.heads = p.num_heads;
  f.seqlen = p.seqlen;
  f.dim = p.headdim;
  f.features = p.num_features;
  f.scale = static_cast<float>(std::sqrt(p.scale)) * kLog2e;
  f.square_scale = static_cast<float>(p.scale) * kLog2e;
  f.kind = p.kind;
  f.out = out;
  f.form = form;
  return f;
}

// --- forward -------------------------------------------------------------------------------------

// log2 phi -> phi or log phi.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_features(const float* exponents, T* out, int64_t count, FeatureForm form) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    out[i] = from_float<T>(in_form<T>(exponents[i], form));
  }
}

int64_t num_features_out(const FeatureMapParams& p) {
  return p.batch * p.num_heads * p.seqlen * p.num_features;
}

unsigned elementwise_grid(int64_t count) {
  const int64_t blocks = ceil_div(count, kThreads);
  return static_cast<unsigned>(blocks < 65536 ? blocks : 65536);
}

template <class T>
cudaError_t forward(const FeatureMapParams& p, void* workspace, cudaStream_t stream) {
  const FeatureForm form = p.log ? FeatureForm::kLog : FeatureForm::kValue;
  if constexpr (std::is_same_v<T, float>) {
    launch_features<T>(feature_rows(p, form, static_cast<float*>(p.out)), stream);
  } else if (fused_feature_map_applies(p)) {
    return fused_feature_map(p, stream);
  } else {
    auto* exponents = static_cast<float*>(workspace);
    launch_features<T>(feature_rows(p, FeatureForm::kExponent, exponents), stream);
    const int64_t count = num_features_out(p);
    DIJIANG_LAUNCH((finish_features<T>), elementwise_grid(count), kThreads, 0, stream, exponents,
                   static_cast<T*>(p.out), count, form);
  }
  return launch_status();
}

// --- backward ------------------------------------------------------------------------------------

constexpr int64_t kRowsPerPart = 2048;
constexpr int64_t kMostParts = 64;

// Sums over the rows (batch and seqlen together) are formed in parts, then over the parts in
// order: the same result in every run.
struct Backward {
  FeatureMapBackwardParams params;
  int64_t rows;  // batch * seqlen
  int64_t parts, part_rows;
  float scale, root;       // root = sqrt(scale)
  float* grad;             // (batch, heads, seqlen, m): exponents, then the gradient of u
  float* row_sum;          // (batch, heads, seqlen): sum over the features of that of log phi
  float* part_omega;       // (parts, heads, m, d)
  float* part_log_weight;  // (parts, heads, m)
  float* part_beta;        // (parts, heads)

  // Index of row r of a head in a (batch, heads, seqlen) buffer.
  __device__ int64_t index(int64_t head, int64_t r) const {
    const FeatureMapParams& p = params.forward;
    return (r / p.seqlen * p.num_heads + head) * p.seqlen + r % p.seqlen;
  }
  template <class T>
  __device__ Row<T> x(int64_t head, int64_t r) const {
    const FeatureMapParams& p = params.forward;
    return view_row<T>(p.x, r / p.seqlen, head, r % p.seqlen);
  }
  // d loss / d log phi
  template <class T>
  __device__ float log_gradient(int64_t head, int64_t r, int64_t i) const {
    const FeatureMapParams& p = params.forward;
    const float g = view_row<T>(params.grad_out, r / p.seqlen, head, r % p.seqlen)[i];
    if (p.log) return g;
    return g * to_float(static_cast<const T*>(p.out)[index(head, r) * p.num_features + i]);
  }
};

Backward plan_backward(const FeatureMapBackwardParams& params, Arena& arena) {
  const FeatureMapParams& p = params.forward;
  Backward b{};
  b.params = params;
  b.rows = p.batch * p.seqlen;
  b.parts = ceil_div(b.rows, kRowsPerPart);
  if (b.parts > kMostParts) b.parts = kMostParts;
  b.part_rows = b.parts > 0 ? ceil_div(b.rows, b.parts) : 0;
  b.scale = static_cast<float>(p.scale);
  b.root = static_cast<float>(std::sqrt(p.scale));
  const int64_t m = p.num_features, cells = b.parts * p.num_heads;
  b.grad = arena.take<float>(num_features_out(p));
  b.row_sum = arena.take<float>(b.rows * p.num_heads);
  b.part_omega = arena.take<float>(cells * m * p.headdim);
  b.part_log_weight = arena.take<float>(cells * m);
  b.part_beta = arena.take<float>(cells);
  return b;
}

// One warp a row. b.grad holds the exponents log2 phi on entry (not needed for kExp).
template <class T>
__global__ void __launch_bounds__(kThreads) compute_gradients(Backward b) {
  const FeatureMapParams& p = b.params.forward;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
  const int64_t head = blockIdx.y, m = p.num_features;
  if (r >= b.rows) return;
  float* grad = b.grad + b.index(head, r) * m;
  const auto* log_weight = static_cast<const float*>(p.feature.log_weight);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < m; i += 32) sum += b.log_gradient<T>(head, r, i);
  sum = warp_sum(sum);
  for (int64_t i = threadIdx.x % 32; i < m; i += 32) {
    float g = b.log_gradient<T>(head, r, i);
    if (p.kind != FeatureKind::kExp) {
      const float weight = log_weight ? log_weight[head * m + i] * kLog2e : 0.0f;
      const float plain = grad[i] - weight;  // log2 of softmax(u), or of 1 + elu(u)
      if (p.kind == FeatureKind::kSoftmax) g -= exp2f(plain) * sum;
      if (p.kind == FeatureKind::kElu && plain > 0.0f) g *= exp2f(-plain);
    }
    grad[i] = g;
  }
  if (threadIdx.x % 32 == 0) b.row_sum[b.index(head, r)] = sum;
}

// A block: 64 rows, 64 columns of x. dx = sqrt(scale) du omega - 2 beta scale x sum(d log phi).
template <class T>
__global__ void __launch_bounds__(kThreads) compute_grad_x(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* grad_tile = reinterpret_cast<float*>(raw);
  float* omega_tile = grad_tile + kDepthTile;
  float* result = omega_tile + kDepthTile;
  const FeatureMapParams& p = b.params.forward;
  const int64_t m = p.num_features, d = p.headdim, head = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, column = blockIdx.z * kRows;
  const int rows = static_cast<int>(b.rows - first < kRows ? b.rows - first : kRows);
  const auto* omega = static_cast<const float*>(p.feature.omega) + head * m * d;
  const int tid = threadIdx.x;
  TileProduct<T> product;
  for (int64_t i0 = 0; i0 < m; i0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kRows * kDepth; e += kThreads) {
      const int r = e / kDepth, i = e % kDepth;
      grad_tile[r * kDepthStride + i] =
          r < rows && i0 + i < m ? b.grad[b.index(head, first + r) * m + i0 + i] : 0.0f;
      const int k = e / kRows, c = e % kRows;
      omega_tile[k * kRowStride + c] =
          i0 + k < m && column + c < d ? omega[(i0 + k) * d + column + c] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kRowMajor, Order::kRowMajor, true, true>(
        grad_tile, kDepthStride, omega_tile, kRowStride, kDepth);
  }
  product.store(result, kRowStride);
  __syncthreads();
  const auto* beta = static_cast<const float*>(p.feature.beta);
  const float pull = p.kind == FeatureKind::kExp && beta ? 2.0f * beta[head] * b.scale : 0.0f;
  auto* grad_x = static_cast<T*>(b.params.grad_x);
  for (int e = tid; e < rows * kRows; e += kThreads) {
    const int r = e / kRows, c = e % kRows;
    if (column + c >= d) continue;
    const int64_t index = b.index(head, first + r);
    float y = b.root * result[r * kRowStride + c];
    if (pull != 0.0f) y -= pull * b.row_sum[index] * b.x<T>(head, first + r)[column + c];
    grad_x[index * d + column + c] = from_float<T>(y);
  }
}

// A block: 64 features, 64 columns, the rows of one part.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_grad_omega(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* grad_tile = reinterpret_cast<float*>(raw);
  float* x_tile = grad_tile + kDepthTile;
  float* result = x_tile + kDepthTile;
  const FeatureMapParams& p = b.params.forward;
  const int64_t m = p.num_features, d = p.headdim, head = blockIdx.y, part = blockIdx.z;
  const int64_t columns = (d + kRows - 1) / kRows;
  const int64_t i0 = blockIdx.x / columns * kRows, c0 = blockIdx.x % columns * kRows;
  const int64_t begin = part * b.part_rows;
  const int64_t end = begin + b.part_rows < b.rows ? begin + b.part_rows : b.rows;
  const int tid = threadIdx.x;
  TileProduct<T> product;
  for (int64_t r0 = begin; r0 < end; r0 += kDepth) {
    __syncthreads();
    for (int e = tid; e < kDepth * kRows; e += kThreads) {
      const int r = e / kRows, c = e % kRows;
      const bool inside = r0 + r < end;
      grad_tile[r * kRowStride + c] =
          inside && i0 + c < m ? b.grad[b.index(head, r0 + r) * m + i0 + c] : 0.0f;
      x_tile[r * kRowStride + c] = inside && c0 + c < d ? b.x<T>(head, r0 + r)[c0 + c] : 0.0f;
    }
    __syncthreads();
    product.template multiply<Order::kColumnMajor, Order::kRowMajor, true, false>(
        grad_tile, kRowStride, x_tile, kRowStride, kDepth);
  }
  product.store(result, kRowStride);
  __syncthreads();
  for (int e = tid; e < kRows * kRows; e += kThreads) {
    const int i = e / kRows, c = e % kRows;
    if (i0 + i >= m || c0 + c >= d) continue;
    b.part_omega[((part * p.num_heads + head) * m + i0 + i) * d + c0 + c] =
        result[i * kRowStride + c];
  }
}

// A thread: one feature, the rows of one part.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_grad_log_weight(Backward b) {
  const FeatureMapParams& p = b.params.forward;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t m = p.num_features, head = blockIdx.y, part = blockIdx.z;
  if (i >= m) return;
  const int64_t begin = part * b.part_rows;
  const int64_t end = begin + b.part_rows < b.rows ? begin + b.part_rows : b.rows;
  float sum = 0.0f;
  for (int64_t r = begin; r < end; ++r) sum += b.log_gradient<T>(head, r, i);
  b.part_log_weight[(part * p.num_heads + head) * m + i] = sum;
}

// A block: one head, the rows of one part; a warp: every eighth of them.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_grad_beta(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const FeatureMapParams& p = b.params.forward;
  const int64_t head = blockIdx.y, part = blockIdx.z;
  const int64_t begin = part * b.part_rows;
  const int64_t end = begin + b.part_rows < b.rows ? begin + b.part_rows : b.rows;
  float sum = 0.0f;
  for (int64_t r = begin + threadIdx.x / 32; r < end; r += kWarpsPerBlock) {
    const Row<T> x = b.x<T>(head, r);
    float norm = 0.0f;
    for (int64_t j = threadIdx.x % 32; j < p.headdim; j += 32) norm = fmaf(x[j], x[j], norm);
    sum += norm * b.row_sum[b.index(head, r)];
  }
  sum = block_sum(sum, reinterpret_cast<float*>(raw));
  if (threadIdx.x == 0) b.part_beta[part * p.num_heads + head] = sum;
}

// target[i] = factor * the sum over the parts of source (parts, count).
static __global__ void __launch_bounds__(kThreads)
    sum_parts(const float* source, float* target, int64_t parts, int64_t count, float factor) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  double sum = 0.0;
  for (int64_t part = 0; part < parts; ++part) sum += source[part * count + i];
  target[i] = static_cast<float>(factor * sum);
}

void launch_sum(const Backward& b, const float* source, void* target, int64_t count, float factor,
                cudaStream_t stream) {
  DIJIANG_LAUNCH(sum_parts, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream,
                 source, static_cast<float*>(target), b.parts, count, factor);
}

template <class T>
cudaError_t backward(const Backward& b, cudaStream_t stream) {
  const FeatureMapParams& p = b.params.forward;
  const FeatureGrads& grad = b.params.grad;
  const int64_t m = p.num_features, d = p.headdim;
  const auto heads = static_cast<unsigned>(p.num_heads), parts = static_cast<unsigned>(b.parts);
  constexpr int shared = (2 * kDepthTile + kSquareTile) * sizeof(float);
  if (p.kind != FeatureKind::kExp) {
    launch_features<T>(feature_rows(p, FeatureForm::kExponent, b.grad), stream);
  }
  const auto row_blocks = static_cast<unsigned>(ceil_div(b.rows, kWarpsPerBlock));
  DIJIANG_LAUNCH((compute_gradients<T>), dim3(row_blocks, heads), kThreads, 0, stream, b);
  const dim3 tiles(static_cast<unsigned>(ceil_div(b.rows, kRows)), heads,
                   static_cast<unsigned>(ceil_div(d, kRows)));
  DIJIANG_LAUNCH((compute_grad_x<T>), tiles, kThreads, shared, stream, b);
  if (grad.omega) {
    const auto blocks = static_cast<unsigned>(ceil_div(m, kRows) * ceil_div(d, kRows));
    DIJIANG_LAUNCH((sum_grad_omega<T>), dim3(blocks, heads, parts), kThreads, shared, stream, b);
    launch_sum(b, b.part_omega, grad.omega, p.num_heads * m * d, b.root, stream);
  }
  if (grad.log_weight) {
    const auto blocks = static_cast<unsigned>(ceil_div(m, kThreads));
    DIJIANG_LAUNCH((sum_grad_log_weight<T>), dim3(blocks, heads, parts), kThreads, 0, stream, b);
    launch_sum(b, b.part_log_weight, grad.log_weight, p.num_heads * m, 1.0f, stream);
  }
  if (grad.beta) {
    DIJIANG_LAUNCH((sum_grad_beta<T>), dim3(1, heads, parts), kThreads, 32 * sizeof(float), stream,
                   b);
    launch_sum(b, b.part_beta, grad.beta, p.num_heads, -b.scale, stream);
  }
  return cudaGetLastError();
}

// Without rows there is nothing to sum: the parameters' gradients are 0.
cudaError_t zero_gradients(const FeatureMapBackwardParams& params, cudaStream_t stream) {
  const FeatureMapParams& p = params.forward;
  const size_t weights = p.num_heads * p.num_features * sizeof(float);
  cudaError_t error = cudaSuccess;
  const auto zero = [&](void* target, size_t bytes) {
    if (target && error == cudaSuccess) error = cudaMemsetAsync(target, 0, bytes, stream);
  };
  zero(params.grad.omega, weights * p.headdim);
  zero(params.grad.log_weight, weights);
  zero(params.grad.beta, p.num_heads * sizeof(float));
  return error;
}

}  // namespace

size_t feature_map_forward_workspace(const FeatureMapParams& params) {
  if (params.dtype == DType::kFloat32 || fused_feature_map_applies(params)) return 0;
  return num_features_out(params) * sizeof(float);
}

cudaError_t feature_map_forward(const FeatureMapParams& params, void* workspace,
                                cudaStream_t stream) {
  if (params.kind == FeatureKind::kGiven) return cudaErrorInvalidValue;
  if (num_features_out(params) == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32: return forward<float>(params, workspace, stream);
    case DType::kBFloat16: return forward<__nv_bfloat16>(params, workspace, stream);
    case DType::kFloat16: return forward<__half>(params, workspace, stream);
    default: return cudaErrorNotSupported;
  }
}

size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params) {
  Arena arena(nullptr);
  plan_backward(params, arena);
  return arena.used();
}

cudaError_t feature_map_backward(const FeatureMapBackwardParams& params, cudaStream_t stream) {
  if (params.forward.kind == FeatureKind::kGiven) return cudaErrorInvalidValue;
  if (num_features_out(params.forward) == 0) return zero_gradients(params, stream);
  Arena arena(params.workspace);
  const Backward b = plan_backward(params, arena);
  switch (params.forward.dtype) {
    case DType::kFloat32: return backward<float>(b, stream);
    case DType::kBFloat16: return backward<__nv_bfloat16>(b, stream);
    case DType::kFloat16: return backward<__half>(b, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace dijiang::cuda
