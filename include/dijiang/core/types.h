// Types shared by every kernel. This header and all of core/ know nothing of torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIJIANG_HOST_DEVICE __host__ __device__
#else
#define DIJIANG_HOST_DEVICE
#endif

namespace dijiang {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A strided (batch, heads, seqlen, dim) view. Strides are in elements, not bytes, and may be
// zero (expanded) or leave dim non-contiguous: kernels take any view without copying it.
struct View {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_seq = 0;
  int64_t stride_dim = 1;
};

struct ConstView {
  const void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_seq = 0;
  int64_t stride_dim = 1;
};

// How u = omega x (x = sqrt(scale) q or sqrt(scale) k) becomes the exponent log phi:
//   kGiven    q and k are the features themselves (any map, values >= 0); omega is unused
//   kExp      log phi_i = u_i + log_weight_i - beta |x|^2
//   kSoftmax  log phi_i = u_i - logsumexp_j(u_j) + log_weight_i
//   kElu      log phi_i = log(1 + elu(u_i)) + log_weight_i
enum class FeatureKind : int32_t { kGiven = 0, kExp = 1, kSoftmax = 2, kElu = 3 };

// The log_scale of a feature that has seen no key. Finite, so that differences of two of them
// are 0 and not NaN, and far below any exponent, so that exp2 of it is 0.
constexpr double kEmptyLogScale = -1e30;

}  // namespace dijiang
