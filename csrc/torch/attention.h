// The body that causal_linear_attention and kernelized_attention share: tensors in, checked and
// turned into LinearAttentionParams; outputs allocated; one call of the backend.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "dijiang/core/linear_attention.h"
#include "torch/feature_map.h"
#include "torch/tensor.h"

namespace dijiang::binding {

struct FeatureTensors {
  OptionalTensor omega, log_weight, beta;
};

struct StateTensors {
  OptionalTensor kv, z, log_scale;
  OptionalTensor window_k, window_v, window_decay;
  OptionalTensor sink_k, sink_v, length;
  OptionalTensor cache_k, cache_v, cache_position, cache_decay, cache_votes, cache_sums;
};

struct AttentionArgs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  FeatureTensors fq, fk;
  const OptionalTensor& log_decay;
  OptionalTensor segments;
  FeatureKind kind = FeatureKind::kGiven;
  double scale = 1.0;
  int64_t window = 0;
  int64_t sinks = 0;
  std::vector<int64_t> cache_size{0};  // of every kv head, or of each
  OptionalTensor hard_keys{};
  bool normalize = true;
  double eps = 0.0;
};

// ---- params ------------------------------------------------------------------------------------

inline CacheSizes cache_sizes(const std::vector<int64_t>& sizes, int64_t heads) {
  const auto given = static_cast<int64_t>(sizes.size());
  check(given == 1 || given == heads, "cache_size must be one number or one a kv head (", heads,
        "), got ", given, " numbers");
  CacheSizes out;
  out.own = std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) != sizes.end();
  check(!out.own || heads <= CacheSizes::kMostHeads, "cache_size can differ over ",
        CacheSizes::kMostHeads, " kv heads, got ", heads);
  int64_t all = 0;
  for (int64_t i = 0; i < given; ++i) {
    check(sizes[i] >= 0, "cache_size must not be negative, got ", sizes[i]);
    out.most = std::max(out.most, sizes[i]);
    all += sizes[i];
    if (!out.own) continue;
    check(all <= std::numeric_limits<int32_t>::max(), "cache_size must be below 2^31 in all");
    out.first[i + 1] = static_cast<int32_t>(all);
  }
  return out;
}

// Of what a state has a slot: (n, kv heads, c, dims), or (n, all slots, dims) where c differs.
inline Shape slots_shape(const LinearAttentionParams& p, int64_t n,
                         std::initializer_list<int64_t> dims) {
  Shape shape{n, p.num_kv_heads, p.cache.most};
  if (p.cache.own) shape = {n, p.cache.all(p.num_kv_heads)};
  shape.insert(shape.end(), dims);
  return shape;
}
inline Shape votes_shape(const LinearAttentionParams& p, int64_t n) {
  const int64_t h = p.num_kv_heads;
  if (p.cache.own) return {n, p.cache.all(h) + h * p.window};
  return {n, h, p.cache.most + p.window};
}

inline AttentionState state_data(const StateTensors& s, const LinearAttentionParams& p,
                                 const Tensor& like) {
  const ScalarType acc = acc_type(like), dtype = like.scalar_type();
  const int64_t n = p.num_seqs, h = p.num_kv_heads, m = p.num_features, slots = 2 * p.window;
  AttentionState out;
  out.kv = mutable_contiguous_data(s.kv, "kv", like, acc, {n, h, m, p.headdim_v});
  out.z = mutable_contiguous_data(s.z, "z", like, acc, {n, h, m});
  out.log_scale = mutable_contiguous_data(s.log_scale, "log_scale", like, acc, {n, h, m});
  check(!out.kv || (out.z && out.log_scale), "a state needs kv, z and log_scale together");
  out.window_k =
      mutable_contiguous_data(s.window_k, "window_k", like, dtype, {n, h, slots, p.headdim});
  out.window_v =
      mutable_contiguous_data(s.window_v, "window_v", like, dtype, {n, h, slots, p.headdim_v});
  out.window_decay =
      mutable_contiguous_data(s.window_decay, "window_decay", like, acc, {n, h, slots});
  out.sink_k = mutable_contiguous_data(s.sink_k, "sink_k", like, dtype, {n, h, p.sinks, p.headdim});
  out.sink_v =
      mutable_contiguous_data(s.sink_v, "sink_v", like, dtype, {n, h, p.sinks, p.headdim_v});
  out.length = static_cast<int64_t*>(
      mutable_contiguous_data(s.length, "length", like, ScalarType::Long, {n}));
  const bool any = (s.kv && n * h > 0) || out.length;
  check(!any || p.num_features == 0 || p.headdim_v == 0 || out.kv, "a state needs kv");
  check(!any || p.window == 0 || h == 0 ||
            (out.window_k && out.window_v && out.length &&
             (out.window_decay != nullptr) == (p.log_decay != nullptr)),
        "a state with a window needs window_k, window_v, length, and window_decay if and only if "
        "there is log_decay");
  check(!any || p.sinks == 0 || h == 0 || (out.sink_k && out.sink_v && out.length),
        "a state with sinks needs sink_k, sink_v and length");
  if (p.cache.most == 0) return out;
  out.cache_k =
      mutable_contiguous_data(s.cache_k, "cache_k", like, dtype, slots_shape(p, n, {p.headdim}));
  out.cache_v =
      mutable_contiguous_data(s.cache_v, "cache_v", like, dtype, slots_shape(p, n, {p.headdim_v}));
  out.cache_position = static_cast<int64_t*>(mutable_contiguous_data(
      s.cache_position, "cache_position", like, ScalarType::Long, slots_shape(p, n, {})));
  out.cache_decay =
      mutable_contiguous_data(s.cache_decay, "cache_decay", like, acc, slots_shape(p, n, {}));
  out.votes = mutable_contiguous_data(s.cache_votes, "cache_votes", like, acc, votes_shape(p, n));
  out.sums = mutable_contiguous_data(s.cache_sums, "cache_sums", like, acc,
                                     {n, h, p.headdim + p.headdim_v});
  const bool complete = s.cache_k && s.cache_v && s.cache_position && s.cache_votes && s.cache_sums;
  check(
      !any || (complete && s.cache_decay.has_value() == (p.log_decay != nullptr)),
      "a state with hard keys needs cache_k, cache_v, cache_position, cache_votes, cache_sums, and "
      "cache_decay if and only if there is log_decay");
  return out;
}

template <class Backend>
LinearAttentionParams attention_params(const AttentionArgs& a) {
  check(a.q.dim() == 4 && a.k.dim() == 4 && a.v.dim() == 4,
        "q, k and v must have four dimensions (batch, heads, seqlen, dim)");
  LinearAttentionParams p;
  p.dtype = core_dtype(a.q, "q");
  p.kind = a.kind;
  p.batch = a.q.size(0);
  p.num_heads = a.q.size(1);
  p.num_kv_heads = a.k.size(1);
  p.seqlen = a.q.size(2);
  p.headdim = a.q.size(3);
  p.headdim_v = a.v.size(3);
  p.num_features = a.kind == FeatureKind::kGiven ? p.headdim : a.fq.omega ? a.fq.omega->size(1) : 0;
  check(p.num_kv_heads > 0 ? p.num_heads % p.num_kv_heads == 0 : p.num_heads == 0,
        "the heads of k (", p.num_kv_heads, ") must divide those of q (", p.num_heads, ")");
  p.q = view4(a.q, "q", a.q, {p.batch, p.num_heads, p.seqlen, p.headdim});
  p.k = view4(a.k, "k", a.q, {p.batch, p.num_kv_heads, p.seqlen, p.headdim});
  p.v = view4(a.v, "v", a.q, {p.batch, p.num_kv_heads, p.seqlen, p.headdim_v});
  if (a.kind != FeatureKind::kGiven) {
    check(a.fq.omega.has_value() == a.fk.omega.has_value(),
          "q_omega and k_omega must be given together");
    p.fq = feature_params(a.fq.omega, a.fq.log_weight, a.fq.beta, a.q, p.num_heads, p.num_features,
                          p.headdim);
    p.fk = feature_params(a.fk.omega, a.fk.log_weight, a.fk.beta, a.q, p.num_kv_heads,
                          p.num_features, p.headdim);
    check_omega<Backend>(p.fq, a.kind);
    check_omega<Backend>(p.fk, a.kind);
    check(p.fq.dct == p.fk.dct, "q_omega and k_omega must have as many dimensions");
  }
  check(a.scale > 0, "scale must be positive, got ", a.scale);
  check(a.window >= 0 && a.sinks >= 0, "window and sinks must not be negative");
  p.cache = cache_sizes(a.cache_size, p.num_kv_heads);
  check(p.cache.most == 0 || a.window > 0, "hard keys (cache_size ", p.cache.most,
        ") need a window to leave");
  check(a.eps >= 0, "eps must not be negative, got ", a.eps);
  p.scale = a.scale;
  p.window = a.window;
  p.sinks = a.sinks;
  p.normalize = a.normalize;
  p.eps = a.eps;

  if (a.log_decay) {
    const Tensor& d = *a.log_decay;
    check_like(d, "log_decay", a.q, acc_type(a.q), {p.batch, p.num_kv_heads, p.seqlen});
    // Null means no decay, and an empty tensor has no data: without tokens nothing is read.
    static const double no_token = 0;
    p.log_decay = d.numel() ? d.const_data_ptr() : &no_token;
    p.log_decay_stride_batch = d.stride(0);
    p.log_decay_stride_head = d.stride(1);
    p.log_decay_stride_seq = d.stride(2);
  }
  p.num_seqs = p.batch;
  if (a.segments) {
    check(a.segments->dim() == 2, "segments must have two dimensions");
    p.num_seqs = a.segments->size(0);
    p.segments = static_cast<const int32_t*>(
        contiguous_data(a.segments, "segments", a.q, ScalarType::Int, {p.num_seqs, 3}));
    Backend::check_segments(*a.segments, p.batch, p.seqlen, p.cache.most > 0);
  }
  return p;
}

inline Shape hard_keys_shape(const LinearAttentionParams& p) {
  return {p.num_kv_heads, p.cache.most > 0 ? p.cache_rows() : 0, p.cache.most};
}

// The hard keys given, once p.initial is set.
template <class Backend>
void give_hard_keys(LinearAttentionParams& p, const AttentionArgs& a) {
  if (!a.hard_keys || p.cache.most == 0) return;
  p.given = static_cast<const int32_t*>(
      contiguous_data(a.hard_keys, "hard_keys", a.q, ScalarType::Int, hard_keys_shape(p)));
  if (p.given != nullptr) Backend::check_hard_keys(p);
}

// ---- forward -----------------------------------------------------------------------------------

struct AttentionOutputs {
  Tensor out, row_scale, row_sum;
  Tensor kv, z, log_scale;
  Tensor window_k, window_v, window_decay;
  Tensor sink_k, sink_v, length;
  Tensor cache_k, cache_v, cache_position, cache_decay, cache_votes, cache_sums;
  Tensor hard_keys;
};

// Zeros where a kernel leaves gaps: padding between segments, window slots not yet filled.
template <class Backend>
AttentionOutputs attention_forward(const AttentionArgs& a, const StateTensors& initial,
                                   bool return_state) {
  LinearAttentionParams p = attention_params<Backend>(a);
  p.initial = state_data(initial, p, a.q);
  give_hard_keys<Backend>(p, a);
  const ScalarType acc = acc_type(a.q), dtype = a.q.scalar_type();
  const Shape rows{p.batch, p.num_heads, p.seqlen};
  const bool padded = a.segments.has_value();

  AttentionOutputs o;
  o.out = new_tensor(a.q, {p.batch, p.num_heads, p.seqlen, p.headdim_v}, dtype, padded);
  o.row_scale = new_tensor(a.q, rows, acc, padded);
  o.row_sum = new_tensor(a.q, rows, acc, padded);
  const int64_t n = return_state ? p.num_seqs : 0, h = p.num_kv_heads, m = p.num_features;
  o.kv = new_tensor(a.q, {n, h, m, p.headdim_v}, acc);
  o.z = new_tensor(a.q, {n, h, m}, acc);
  o.log_scale = new_tensor(a.q, {n, h, m}, acc);
  o.window_k = new_tensor(a.q, {n, h, 2 * p.window, p.headdim}, dtype, true);
  o.window_v = new_tensor(a.q, {n, h, 2 * p.window, p.headdim_v}, dtype, true);
  o.window_decay = new_tensor(a.q, {n, h, p.log_decay ? 2 * p.window : 0}, acc, true);
  o.sink_k = new_tensor(a.q, {n, h, p.sinks, p.headdim}, dtype, true);
  o.sink_v = new_tensor(a.q, {n, h, p.sinks, p.headdim_v}, dtype, true);
  o.length = new_tensor(a.q, {p.window || p.sinks ? n : 0}, ScalarType::Long);
  const int64_t cached = p.cache.most > 0 ? n : 0;
  o.cache_k = new_tensor(a.q, slots_shape(p, n, {p.headdim}), dtype, true);
  o.cache_v = new_tensor(a.q, slots_shape(p, n, {p.headdim_v}), dtype, true);
  o.cache_position = new_tensor(a.q, slots_shape(p, n, {}), ScalarType::Long);
  o.cache_decay = new_tensor(a.q, slots_shape(p, p.log_decay ? n : 0, {}), acc, true);
  o.cache_votes = new_tensor(a.q, votes_shape(p, cached), acc, true);
  o.cache_sums = new_tensor(a.q, {cached, h, p.headdim + p.headdim_v}, acc);
  o.hard_keys = a.hard_keys && p.cache.most > 0
                    ? no_tensor(a.q, ScalarType::Int)
                    : new_tensor(a.q, hard_keys_shape(p), ScalarType::Int, true);

  p.out = data_of(o.out);
  p.row_scale = data_of(o.row_scale);
  p.row_sum = data_of(o.row_sum);
  p.final.kv = data_of(o.kv);
  p.final.z = data_of(o.z);
  p.final.log_scale = data_of(o.log_scale);
  p.final.window_k = data_of(o.window_k);
  p.final.window_v = data_of(o.window_v);
  p.final.window_decay = data_of(o.window_decay);
  p.final.sink_k = data_of(o.sink_k);
  p.final.sink_v = data_of(o.sink_v);
  p.final.length = static_cast<int64_t*>(data_of(o.length));
  p.final.cache_k = data_of(o.cache_k);
  p.final.cache_v = data_of(o.cache_v);
  p.final.cache_position = static_cast<int64_t*>(data_of(o.cache_position));
  p.final.cache_decay = data_of(o.cache_decay);
  p.final.votes = data_of(o.cache_votes);
  p.final.sums = data_of(o.cache_sums);
  p.chosen = static_cast<int32_t*>(data_of(o.hard_keys));
  Backend::attention_forward(p, a.q);
  return o;
}

// ---- backward ----------------------------------------------------------------------------------

struct ForwardResults {
  const Tensor& out;
  const Tensor& row_scale;
  const Tensor& row_sum;
  const OptionalTensor& grad_final_kv;
  const OptionalTensor& grad_final_z;
  const OptionalTensor& final_kv;
  const OptionalTensor& final_z;
  const OptionalTensor& final_log_scale;
};

struct FeatureGradTensors {
  Tensor omega, log_weight, beta;
};

struct AttentionGrads {
  Tensor q, k, v;
  FeatureGradTensors fq, fk;
  Tensor log_decay, kv, z;
};

inline FeatureGradTensors new_feature_grads(const FeatureTensors& f, const Tensor& like,
                                            int64_t heads, int64_t m, int64_t d, bool wanted) {
  const ScalarType acc = acc_type(like);
  const auto one = [&](const OptionalTensor& t, const Shape& shape) {
    return t && wanted ? new_tensor(like, shape, acc, true) : no_tensor(like, acc);
  };
  const Shape omega = f.omega ? omega_shape(*f.omega, m, d) : Shape{};
  return {one(f.omega, omega), one(f.log_weight, {heads, m}), one(f.beta, {heads})};
}

inline FeatureGrads data_of(const FeatureGradTensors& g) {
  return {data_of(g.omega), data_of(g.log_weight), data_of(g.beta)};
}

template <class Backend>
AttentionGrads attention_backward(const AttentionArgs& a, const StateTensors& initial,
                                  const Tensor& grad_out, const ForwardResults& f, bool grad_params,
                                  bool grad_initial) {
  LinearAttentionBackwardParams b;
  b.forward = attention_params<Backend>(a);
  LinearAttentionParams& p = b.forward;
  p.initial = state_data(initial, p, a.q);
  give_hard_keys<Backend>(p, a);
  check(p.cache.most == 0 || a.hard_keys, "the backward needs the hard keys of the forward");
  const ScalarType acc = acc_type(a.q), dtype = a.q.scalar_type();
  const Shape rows{p.batch, p.num_heads, p.seqlen};
  const Shape out_shape{p.batch, p.num_heads, p.seqlen, p.headdim_v};
  p.out = mutable_contiguous_data(f.out, "out", a.q, dtype, out_shape);
  p.row_scale = mutable_contiguous_data(f.row_scale, "row_scale", a.q, acc, rows);
  p.row_sum = mutable_contiguous_data(f.row_sum, "row_sum", a.q, acc, rows);
  b.grad_out = view4(grad_out, "grad_out", a.q, out_shape);

  const Shape kv_shape{p.num_seqs, p.num_kv_heads, p.num_features, p.headdim_v};
  const Shape z_shape{p.num_seqs, p.num_kv_heads, p.num_features};
  b.grad_final_kv = contiguous_data(f.grad_final_kv, "grad_final_kv", a.q, acc, kv_shape);
  b.grad_final_z = contiguous_data(f.grad_final_z, "grad_final_z", a.q, acc, z_shape);
  if (b.grad_final_kv || b.grad_final_z) {
    check(p.window == 0, "with a window the final state has no gradient");
    b.final_kv = contiguous_data(f.final_kv, "final_kv", a.q, acc, kv_shape);
    b.final_z = contiguous_data(f.final_z, "final_z", a.q, acc, z_shape);
    b.final_log_scale = contiguous_data(f.final_log_scale, "final_log_scale", a.q, acc, z_shape);
    check(b.grad_final_kv && b.grad_final_z && b.final_kv && b.final_z && b.final_log_scale,
          "the gradient of a final state needs grad_final_kv, grad_final_z, final_kv, final_z and "
          "final_log_scale together");
  }
  check(!grad_initial || (p.initial.kv && p.window == 0) || p.num_features == 0,
        "grad_initial needs an initial state and window 0");

  const bool padded = a.segments.has_value();
  AttentionGrads g;
  g.q = new_tensor(a.q, {p.batch, p.num_heads, p.seqlen, p.headdim}, dtype, padded);
  g.k = new_tensor(a.q, {p.batch, p.num_kv_heads, p.seqlen, p.headdim}, dtype, padded);
  g.v = new_tensor(a.q, {p.batch, p.num_kv_heads, p.seqlen, p.headdim_v}, dtype, padded);
  g.fq = new_feature_grads(a.fq, a.q, p.num_heads, p.num_features, p.headdim, grad_params);
  g.fk = new_feature_grads(a.fk, a.q, p.num_kv_heads, p.num_features, p.headdim, grad_params);
  g.log_decay = p.log_decay ? new_tensor(a.q, {p.batch, p.num_kv_heads, p.seqlen}, acc, padded)
                            : no_tensor(a.q, acc);
  g.kv = grad_initial ? new_tensor(a.q, kv_shape, acc) : no_tensor(a.q, acc);
  g.z = grad_initial ? new_tensor(a.q, z_shape, acc) : no_tensor(a.q, acc);

  b.grad_q = data_of(g.q);
  b.grad_k = data_of(g.k);
  b.grad_v = data_of(g.v);
  b.grad_fq = data_of(g.fq);
  b.grad_fk = data_of(g.fk);
  b.grad_log_decay = data_of(g.log_decay);
  b.grad_initial_kv = data_of(g.kv);
  b.grad_initial_z = data_of(g.z);
  Backend::attention_backward(b, a.q);
  return g;
}

// ---- update ------------------------------------------------------------------------------------

template <class Backend>
Tensor attention_update(const AttentionArgs& a, const StateTensors& state) {
  LinearAttentionParams p = attention_params<Backend>(a);
  check(p.seqlen == 1, "an update takes one token a sequence, got ", p.seqlen);
  p.final = state_data(state, p, a.q);
  Tensor out = new_tensor(a.q, {p.batch, p.num_heads, 1, p.headdim_v}, a.q.scalar_type());
  p.out = data_of(out);
  if (p.batch > 0) Backend::attention_update(p, a.q);
  return out;
}

}  // namespace dijiang::binding
