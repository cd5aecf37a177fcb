// kernelized_attention_*: features computed inside, near keys exact. Argument lists follow
// schemas.cpp.
#pragma once

#include "torch/attention.h"

namespace dijiang::binding {

inline AttentionArgs kernelized_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                     FeatureTensors fq, FeatureTensors fk,
                                     const OptionalTensor& log_decay,
                                     const OptionalTensor& segments, int64_t kind, double scale,
                                     int64_t window, int64_t sinks, std::vector<int64_t> cache_size,
                                     const OptionalTensor& hard_keys, bool normalize, double eps) {
  AttentionArgs a{q, k, v, std::move(fq), std::move(fk), log_decay, segments};
  a.kind = feature_kind(kind);
  a.scale = scale;
  a.window = window;
  a.sinks = sinks;
  a.cache_size = std::move(cache_size);
  a.hard_keys = hard_keys;
  a.normalize = normalize;
  a.eps = eps;
  return a;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
kernelized_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_omega,
    const OptionalTensor& q_log_weight, const OptionalTensor& q_beta, const OptionalTensor& k_omega,
    const OptionalTensor& k_log_weight, const OptionalTensor& k_beta,
    const OptionalTensor& log_decay, const OptionalTensor& segments, const OptionalTensor& kv,
    const OptionalTensor& z, const OptionalTensor& log_scale, const OptionalTensor& window_k,
    const OptionalTensor& window_v, const OptionalTensor& window_decay,
    const OptionalTensor& sink_k, const OptionalTensor& sink_v, const OptionalTensor& length,
    const OptionalTensor& cache_k, const OptionalTensor& cache_v,
    const OptionalTensor& cache_position, const OptionalTensor& cache_decay,
    const OptionalTensor& cache_votes, const OptionalTensor& cache_sums,
    const OptionalTensor& hard_keys, int64_t kind, double scale, int64_t window, int64_t sinks,
    std::vector<int64_t> cache_size, bool normalize, double eps, bool return_state) {
  const AttentionArgs a = kernelized_args(
      q, k, v, {q_omega, q_log_weight, q_beta}, {k_omega, k_log_weight, k_beta}, log_decay,
      segments, kind, scale, window, sinks, std::move(cache_size), hard_keys, normalize, eps);
  const AttentionOutputs o = attention_forward<Backend>(
      a,
      {kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k, cache_v,
       cache_position, cache_decay, cache_votes, cache_sums},
      return_state);
  return {o.out,         o.row_scale,   o.row_sum,    o.kv,           o.z,
          o.log_scale,   o.window_k,    o.window_v,   o.window_decay, o.sink_k,
          o.sink_v,      o.length,      o.cache_k,    o.cache_v,      o.cache_position,
          o.cache_decay, o.cache_votes, o.cache_sums, o.hard_keys};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
kernelized_attention_bwd(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                         const OptionalTensor& q_omega, const OptionalTensor& q_log_weight,
                         const OptionalTensor& q_beta, const OptionalTensor& k_omega,
                         const OptionalTensor& k_log_weight, const OptionalTensor& k_beta,
                         const OptionalTensor& log_decay, const OptionalTensor& segments,
                         const OptionalTensor& kv, const OptionalTensor& z,
                         const OptionalTensor& log_scale, const OptionalTensor& window_k,
                         const OptionalTensor& window_v, const OptionalTensor& window_decay,
                         const OptionalTensor& sink_k, const OptionalTensor& sink_v,
                         const OptionalTensor& length, const OptionalTensor& cache_k,
                         const OptionalTensor& cache_v, const OptionalTensor& cache_position,
                         const OptionalTensor& cache_decay, const OptionalTensor& cache_votes,
                         const OptionalTensor& cache_sums, const Tensor& hard_keys,
                         const Tensor& out, const Tensor& row_scale, const Tensor& row_sum,
                         const OptionalTensor& grad_final_kv, const OptionalTensor& grad_final_z,
                         const OptionalTensor& final_kv, const OptionalTensor& final_z,
                         const OptionalTensor& final_log_scale, int64_t kind, double scale,
                         int64_t window, int64_t sinks, std::vector<int64_t> cache_size,
                         bool normalize, double eps, bool grad_params, bool grad_initial) {
  const AttentionArgs a = kernelized_args(
      q, k, v, {q_omega, q_log_weight, q_beta}, {k_omega, k_log_weight, k_beta}, log_decay,
      segments, kind, scale, window, sinks, std::move(cache_size), hard_keys, normalize, eps);
  const ForwardResults f{out,          row_scale, row_sum, grad_final_kv,
                         grad_final_z, final_kv,  final_z, final_log_scale};
  const AttentionGrads g = attention_backward<Backend>(
      a,
      {kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k, cache_v,
       cache_position, cache_decay, cache_votes, cache_sums},
      grad_out, f, grad_params, grad_initial);
  return {g.q,
          g.k,
          g.v,
          g.fq.omega,
          g.fq.log_weight,
          g.fq.beta,
          g.fk.omega,
          g.fk.log_weight,
          g.fk.beta,
          g.log_decay,
          g.kv,
          g.z};
}

template <class Backend>
Tensor kernelized_attention_update(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_omega,
    const OptionalTensor& q_log_weight, const OptionalTensor& q_beta, const OptionalTensor& k_omega,
    const OptionalTensor& k_log_weight, const OptionalTensor& k_beta,
    const OptionalTensor& log_decay, const Tensor& kv, const Tensor& z, const Tensor& log_scale,
    const Tensor& window_k, const Tensor& window_v, const OptionalTensor& window_decay,
    const Tensor& sink_k, const Tensor& sink_v, const OptionalTensor& length,
    const OptionalTensor& cache_k, const OptionalTensor& cache_v,
    const OptionalTensor& cache_position, const OptionalTensor& cache_decay,
    const OptionalTensor& cache_votes, const OptionalTensor& cache_sums, int64_t kind, double scale,
    int64_t window, int64_t sinks, std::vector<int64_t> cache_size, bool normalize, double eps) {
  const AttentionArgs a =
      kernelized_args(q, k, v, {q_omega, q_log_weight, q_beta}, {k_omega, k_log_weight, k_beta},
                      log_decay, std::nullopt, kind, scale, window, sinks, std::move(cache_size),
                      std::nullopt, normalize, eps);
  return attention_update<Backend>(
      a, {kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k,
          cache_v, cache_position, cache_decay, cache_votes, cache_sums});
}

}  // namespace dijiang::binding
