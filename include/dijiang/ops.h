// The operators on LibTorch tensors, by name through torch's dispatcher: link dijiang::torch (or
// load dijiang_ops.so, and dijiang_ops_cuda.so for CUDA tensors) and torch.
//
// Forward and update alone: gradients are registered in Python. Shapes and meaning are those of
// the Python functions; all tensors of one call have one dtype, parameters and states float32
// (float64 for float64), contiguous.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/types.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "dijiang/core/types.h"

namespace dijiang::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct FeatureParams {
  OptionalTensor omega;       // (heads, num_features, headdim); absent: no far term
  OptionalTensor log_weight;  // (heads, num_features)
  OptionalTensor beta;        // (heads), kExp alone
};

// kv, z and log_scale absent: empty.
struct LinearAttentionState {
  OptionalTensor kv;         // (num_seqs, kv heads, num_features, headdim_v)
  OptionalTensor z;          // (num_seqs, kv heads, num_features)
  OptionalTensor log_scale;  // (num_seqs, kv heads, num_features)
};

struct AttentionState : LinearAttentionState {
  OptionalTensor window_k;      // (num_seqs, kv heads, 2 window, headdim)
  OptionalTensor window_v;      // (num_seqs, kv heads, 2 window, headdim_v)
  OptionalTensor window_decay;  // (num_seqs, kv heads, 2 window); absent: no decay
  OptionalTensor sink_k;        // (num_seqs, kv heads, sinks, headdim)
  OptionalTensor sink_v;        // (num_seqs, kv heads, sinks, headdim_v)
  OptionalTensor length;        // (num_seqs) int64; absent without window and sinks
  // Absent without hard keys; c: cache_size. Where heads differ, (kv heads, c) is one dimension of
  // all slots, head behind head, and (kv heads, c + window) one of all votes.
  OptionalTensor cache_k;         // (num_seqs, kv heads, c, headdim)
  OptionalTensor cache_v;         // (num_seqs, kv heads, c, headdim_v)
  OptionalTensor cache_position;  // (num_seqs, kv heads, c) int64; -1: an empty slot
  OptionalTensor cache_decay;     // (num_seqs, kv heads, c); absent: no decay
  OptionalTensor cache_votes;     // (num_seqs, kv heads, c + window)
  OptionalTensor cache_sums;      // (num_seqs, kv heads, headdim + headdim_v)
};

struct LinearAttentionOptions {
  OptionalTensor log_decay;  // (batch, kv heads, seqlen), any strides; absent: none
  OptionalTensor segments;   // int32 (num_seqs, 3): batch row, begin, end; absent: whole rows
  bool normalize = true;
  double eps = 0.0;
};

struct AttentionOptions : LinearAttentionOptions {
  FeatureKind kind = FeatureKind::kExp;
  std::optional<double> scale;  // absent: 1 / sqrt(headdim)
  int64_t window = 0;
  int64_t sinks = 0;
  std::vector<int64_t> cache_size{0};  // hard keys, of every kv head or of each; needs a window
  OptionalTensor hard_keys;  // int32 (kv heads, rows, most slots): kept in place of a choice
};

namespace detail {
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
using Optional = const OptionalTensor&;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Nineteen =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline double scale_of(const AttentionOptions& options, const Tensor& q) {
  return options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
}
}  // namespace detail

// x (..., n), one to four dimensions; type 2 or 3.
inline Tensor dct(const Tensor& x, int64_t type = 2) {
  static const auto op = detail::op<Tensor(const Tensor&, int64_t)>("dijiang::dct");
  return op.call(x, type);
}

// x (batch, heads, seqlen, headdim) -> (batch, heads, seqlen, num_features)
inline Tensor feature_map(const Tensor& x, const FeatureParams& params,
                          FeatureKind kind = FeatureKind::kExp, double scale = 1.0,
                          bool log = false) {
  using F = Tensor(const Tensor&, const Tensor&, detail::Optional, detail::Optional, int64_t,
                   double, bool);
  static const auto op = detail::op<F>("dijiang::feature_map_fwd");
  return op.call(x, params.omega.value(), params.log_weight, params.beta,
                 static_cast<int64_t>(kind), scale, log);
}

// q (B, H, T, m), k (B, Hkv, T, m), v (B, Hkv, T, dv): the output and the final state.
inline std::tuple<Tensor, LinearAttentionState> causal_linear_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const LinearAttentionOptions& options = {},
    const LinearAttentionState& initial = {}) {
  using detail::Optional;
  using F = detail::Six(const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional,
                        Optional, Optional, bool, double, bool);
  static const auto op = detail::op<F>("dijiang::linear_attention_fwd");
  auto r = op.call(q, k, v, options.log_decay, options.segments, initial.kv, initial.z,
                   initial.log_scale, options.normalize, options.eps, /*return_state=*/true);
  return {std::get<0>(r), {std::get<3>(r), std::get<4>(r), std::get<5>(r)}};
}

// T = 1; state is written in place.
inline Tensor causal_linear_attention_update(const Tensor& q, const Tensor& k, const Tensor& v,
                                             LinearAttentionState& state,
                                             const LinearAttentionOptions& options = {}) {
  using F = Tensor(const Tensor&, const Tensor&, const Tensor&, detail::Optional, Tensor&, Tensor&,
                   Tensor&, bool, double);
  static const auto op = detail::op<F>("dijiang::linear_attention_update");
  return op.call(q, k, v, options.log_decay, state.kv.value(), state.z.value(),
                 state.log_scale.value(), options.normalize, options.eps);
}

// q (B, H, T, d), k (B, Hkv, T, d), v (B, Hkv, T, dv): the output and the final state.
inline std::tuple<Tensor, AttentionState> kernelized_attention(const Tensor& q, const Tensor& k,
                                                               const Tensor& v,
                                                               const FeatureParams& fq,
                                                               const FeatureParams& fk,
                                                               const AttentionOptions& options = {},
                                                               const AttentionState& initial = {}) {
  using detail::Optional;
  using F = detail::Nineteen(
      const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional, Optional, Optional,
      Optional, Optional, Optional, Optional, Optional, Optional, Optional, Optional, Optional,
      Optional, Optional, Optional, Optional, Optional, Optional, Optional, Optional, Optional,
      Optional, int64_t, double, int64_t, int64_t, at::IntArrayRef, bool, double, bool);
  static const auto op = detail::op<F>("dijiang::kernelized_attention_fwd");
  auto r = op.call(q, k, v, fq.omega, fq.log_weight, fq.beta, fk.omega, fk.log_weight, fk.beta,
                   options.log_decay, options.segments, initial.kv, initial.z, initial.log_scale,
                   initial.window_k, initial.window_v, initial.window_decay, initial.sink_k,
                   initial.sink_v, initial.length, initial.cache_k, initial.cache_v,
                   initial.cache_position, initial.cache_decay, initial.cache_votes,
                   initial.cache_sums, options.hard_keys, static_cast<int64_t>(options.kind),
                   detail::scale_of(options, q), options.window, options.sinks, options.cache_size,
                   options.normalize, options.eps, /*return_state=*/true);
  AttentionState state;
  state.kv = std::get<3>(r);
  state.z = std::get<4>(r);
  state.log_scale = std::get<5>(r);
  state.window_k = std::get<6>(r);
  state.window_v = std::get<7>(r);
  if (options.log_decay) state.window_decay = std::get<8>(r);
  state.sink_k = std::get<9>(r);
  state.sink_v = std::get<10>(r);
  if (options.window > 0 || options.sinks > 0) state.length = std::get<11>(r);
  if (options.cache_size == std::vector<int64_t>(options.cache_size.size())) {
    return {std::get<0>(r), state};
  }
  state.cache_k = std::get<12>(r);
  state.cache_v = std::get<13>(r);
  state.cache_position = std::get<14>(r);
  if (options.log_decay) state.cache_decay = std::get<15>(r);
  state.cache_votes = std::get<16>(r);
  state.cache_sums = std::get<17>(r);
  return {std::get<0>(r), state};
}

// T = 1; state, as kernelized_attention returns it, is written in place.
inline Tensor kernelized_attention_update(const Tensor& q, const Tensor& k, const Tensor& v,
                                          AttentionState& state, const FeatureParams& fq,
                                          const FeatureParams& fk,
                                          const AttentionOptions& options = {}) {
  using detail::Optional;
  using F =
      Tensor(const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional, Optional,
             Optional, Optional, Optional, Tensor&, Tensor&, Tensor&, Tensor&, Tensor&, Optional,
             Tensor&, Tensor&, Optional, Optional, Optional, Optional, Optional, Optional, Optional,
             int64_t, double, int64_t, int64_t, at::IntArrayRef, bool, double);
  static const auto op = detail::op<F>("dijiang::kernelized_attention_update");
  return op.call(q, k, v, fq.omega, fq.log_weight, fq.beta, fk.omega, fk.log_weight, fk.beta,
                 options.log_decay, state.kv.value(), state.z.value(), state.log_scale.value(),
                 state.window_k.value(), state.window_v.value(), state.window_decay,
                 state.sink_k.value(), state.sink_v.value(), state.length, state.cache_k,
                 state.cache_v, state.cache_position, state.cache_decay, state.cache_votes,
                 state.cache_sums, static_cast<int64_t>(options.kind), detail::scale_of(options, q),
                 options.window, options.sinks, options.cache_size, options.normalize, options.eps);
}

}  // namespace dijiang::ops
