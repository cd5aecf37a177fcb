// phi(x) or log phi(x), x (batch, heads, seqlen, headdim), and its gradients.
#pragma once

#include <tuple>

#include "dijiang/core/feature_map.h"
#include "torch/tensor.h"

namespace dijiang::binding {

// A matrix, or the frequencies of rows of the DCT, for each head or for each group of heads.
inline Shape omega_shape(const Tensor& omega, int64_t num_features, int64_t headdim) {
  if (omega.dim() == 2) return {omega.size(0), num_features};
  return {omega.size(0), num_features, headdim};
}

// Rows of parameters, one a head; omega present means num_features = omega.size(1).
inline FeatureParams feature_params(const OptionalTensor& omega, const OptionalTensor& log_weight,
                                    const OptionalTensor& beta, const Tensor& like, int64_t heads,
                                    int64_t num_features, int64_t headdim) {
  const ScalarType acc = acc_type(like);
  FeatureParams p;
  if (omega) {
    const int64_t rows = omega->size(0);
    check(rows == heads || (rows > 0 && heads % rows == 0), "the rows of omega (", rows,
          ") must divide the heads (", heads, ")");
    p.omega =
        contiguous_data(omega, "omega", like, acc, omega_shape(*omega, num_features, headdim));
    p.dct = omega->dim() == 2;
    p.group = rows > 0 ? heads / rows : 1;
  }
  p.log_weight = contiguous_data(log_weight, "log_weight", like, acc, {heads, num_features});
  p.beta = contiguous_data(beta, "beta", like, acc, {heads});
  return p;
}

template <class Backend>
void check_omega(const FeatureParams& f, FeatureKind kind) {
  check(!f.dct || (Backend::kShortOmega && kind == FeatureKind::kExp),
        "omega must have three dimensions (heads, features, headdim), but for kind exp on the CPU; "
        "got two");
  check(f.group == 1 || Backend::kShortOmega,
        "omega must have a row for every head on this device");
}

inline FeatureKind feature_kind(int64_t kind) {
  check(kind >= 1 && kind <= 3, "kind must be 1 (exp), 2 (softmax) or 3 (elu), got ", kind);
  return static_cast<FeatureKind>(kind);
}

inline FeatureMapParams feature_map_params(const Tensor& x, const Tensor& omega,
                                           const OptionalTensor& log_weight,
                                           const OptionalTensor& beta, int64_t kind, double scale,
                                           bool log) {
  check(x.dim() == 4, "x must have four dimensions, got ", x.dim());
  check(omega.dim() == 2 || omega.dim() == 3,
        "omega must have three dimensions (or two, on the CPU), got ", omega.dim());
  check(scale > 0, "scale must be positive, got ", scale);
  FeatureMapParams p;
  p.dtype = core_dtype(x, "x");
  p.kind = feature_kind(kind);
  p.batch = x.size(0);
  p.num_heads = x.size(1);
  p.seqlen = x.size(2);
  p.headdim = x.size(3);
  p.num_features = omega.size(1);
  p.x = view4(x, "x", x, {p.batch, p.num_heads, p.seqlen, p.headdim});
  p.feature = feature_params(omega, log_weight, beta, x, p.num_heads, p.num_features, p.headdim);
  p.scale = scale;
  p.log = log;
  return p;
}

template <class Backend>
Tensor feature_map_fwd(const Tensor& x, const Tensor& omega, const OptionalTensor& log_weight,
                       const OptionalTensor& beta, int64_t kind, double scale, bool log) {
  FeatureMapParams p = feature_map_params(x, omega, log_weight, beta, kind, scale, log);
  check_omega<Backend>(p.feature, p.kind);
  check(p.feature.group == 1, "feature_map: omega must have a row for every head");
  Tensor out = new_tensor(x, {p.batch, p.num_heads, p.seqlen, p.num_features}, x.scalar_type());
  p.out = data_of(out);
  if (p.out) Backend::feature_map_forward(p, x);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> feature_map_bwd(const Tensor& grad_out, const Tensor& x,
                                                           const Tensor& out, const Tensor& omega,
                                                           const OptionalTensor& log_weight,
                                                           const OptionalTensor& beta, int64_t kind,
                                                           double scale, bool log) {
  FeatureMapBackwardParams p;
  p.forward = feature_map_params(x, omega, log_weight, beta, kind, scale, log);
  const FeatureMapParams& f = p.forward;
  check_omega<Backend>(f.feature, f.kind);
  check(f.feature.group == 1, "feature_map: omega must have a row for every head");
  const Shape out_shape{f.batch, f.num_heads, f.seqlen, f.num_features};
  p.forward.out = mutable_contiguous_data(out, "out", x, x.scalar_type(), out_shape);
  p.grad_out = view4(grad_out, "grad_out", x, out_shape);

  const ScalarType acc = acc_type(x);
  const bool empty = p.forward.out == nullptr;  // then all sums are over nothing
  Tensor grad_x =
      new_tensor(x, {f.batch, f.num_heads, f.seqlen, f.headdim}, x.scalar_type(), empty);
  Tensor grad_omega = new_tensor(x, omega_shape(omega, f.num_features, f.headdim), acc, empty);
  Tensor grad_log_weight =
      log_weight ? new_tensor(x, {f.num_heads, f.num_features}, acc, empty) : no_tensor(x, acc);
  Tensor grad_beta = beta ? new_tensor(x, {f.num_heads}, acc, empty) : no_tensor(x, acc);
  p.grad_x = data_of(grad_x);
  p.grad = {data_of(grad_omega), data_of(grad_log_weight), data_of(grad_beta)};
  if (!empty) Backend::feature_map_backward(p, x);
  return {grad_x, grad_omega, grad_log_weight, grad_beta};
}

}  // namespace dijiang::binding
