// linear_attention_*: features given. Argument lists follow schemas.cpp.
#pragma once

#include "torch/attention.h"

namespace dijiang::binding {

inline AttentionArgs linear_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& log_decay, const OptionalTensor& segments,
                                 bool normalize, double eps) {
  AttentionArgs a{q, k, v, {}, {}, log_decay, segments};
  a.normalize = normalize;
  a.eps = eps;
  return a;
}

inline StateTensors linear_state(const OptionalTensor& kv, const OptionalTensor& z,
                                 const OptionalTensor& log_scale) {
  StateTensors state;
  state.kv = kv;
  state.z = z;
  state.log_scale = log_scale;
  return state;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
    const OptionalTensor& segments, const OptionalTensor& kv, const OptionalTensor& z,
    const OptionalTensor& log_scale, bool normalize, double eps, bool return_state) {
  const AttentionArgs a = linear_args(q, k, v, log_decay, segments, normalize, eps);
  const AttentionOutputs o =
      attention_forward<Backend>(a, linear_state(kv, z, log_scale), return_state);
  return {o.out, o.row_scale, o.row_sum, o.kv, o.z, o.log_scale};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& log_decay, const OptionalTensor& segments, const OptionalTensor& kv,
    const OptionalTensor& z, const OptionalTensor& log_scale, const Tensor& out,
    const Tensor& row_scale, const Tensor& row_sum, const OptionalTensor& grad_final_kv,
    const OptionalTensor& grad_final_z, const OptionalTensor& final_kv,
    const OptionalTensor& final_z, const OptionalTensor& final_log_scale, bool normalize,
    double eps, bool grad_initial) {
  const AttentionArgs a = linear_args(q, k, v, log_decay, segments, normalize, eps);
  const ForwardResults f{out,          row_scale, row_sum, grad_final_kv,
                         grad_final_z, final_kv,  final_z, final_log_scale};
  const AttentionGrads g = attention_backward<Backend>(a, linear_state(kv, z, log_scale), grad_out,
                                                       f, /*grad_params=*/false, grad_initial);
  return {g.q, g.k, g.v, g.log_decay, g.kv, g.z};
}

template <class Backend>
Tensor linear_attention_update(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& log_decay, const Tensor& kv, const Tensor& z,
                               const Tensor& log_scale, bool normalize, double eps) {
  const AttentionArgs a = linear_args(q, k, v, log_decay, std::nullopt, normalize, eps);
  return attention_update<Backend>(a, linear_state(kv, z, log_scale));
}

}  // namespace dijiang::binding
