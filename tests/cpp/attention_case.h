// A reference::Problem as the kernels take it: tensors in a dtype, a parameter struct, the runs.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/work_split.h"
#include "reference.h"

namespace dijiang::testing {

using reference::Array;
using reference::Problem;

// Elements of one of the four dtypes.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, size_t count) : dtype_(dtype), count_(count), bytes_(count * 8) {}
  Tensor(DType dtype, const Array& values) : Tensor(dtype, values.size()) {
    cpu::dispatch_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      for (size_t i = 0; i < count_; ++i) {
        static_cast<T*>(data())[i] = cpu::from_acc<T>(static_cast<cpu::AccOf<T>>(values[i]));
      }
    });
  }
  void* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
  const void* data() const { return bytes_.empty() ? nullptr : bytes_.data(); }
  size_t size() const { return count_; }
  Array values() const {
    Array result(count_);
    cpu::dispatch_dtype(dtype_, [&](auto tag) {
      using T = decltype(tag);
      for (size_t i = 0; i < count_; ++i) {
        result[i] = cpu::to_acc(static_cast<const T*>(data())[i]);
      }
    });
    return result;
  }

 private:
  DType dtype_ = DType::kFloat64;
  size_t count_ = 0;
  std::vector<char> bytes_;
};

inline DType acc_of(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0x1p-53;
    case DType::kFloat32: return 0x1p-24;
    case DType::kFloat16: return 0x1p-11;
    case DType::kBFloat16: return 0x1p-8;
  }
  return 0;
}

struct State {
  Tensor kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v;
  std::vector<int64_t> length;

  State() = default;
  State(const Problem& p, DType dtype) {
    const DType acc = acc_of(dtype);
    const int64_t rows = p.num_seqs() * p.kv_heads;
    kv = Tensor(acc, Array(rows * p.m * p.dv));
    z = Tensor(acc, Array(rows * p.m));
    log_scale = Tensor(acc, Array(rows * p.m, kEmptyLogScale));
    if (p.window == 0 && p.sinks == 0) return;
    // What no slot holds yet is unspecified: NaN shows when a kernel reads it.
    const double nan = std::numeric_limits<double>::quiet_NaN();
    window_k = Tensor(dtype, Array(rows * 2 * p.window * p.d, nan));
    window_v = Tensor(dtype, Array(rows * 2 * p.window * p.dv, nan));
    if (!p.log_decay.empty()) window_decay = Tensor(acc, Array(rows * 2 * p.window, nan));
    sink_k = Tensor(dtype, Array(rows * p.sinks * p.d, nan));
    sink_v = Tensor(dtype, Array(rows * p.sinks * p.dv, nan));
    length.assign(p.num_seqs(), 0);
  }

  AttentionState view() {
    AttentionState s;
    s.kv = kv.data();
    s.z = z.data();
    s.log_scale = log_scale.data();
    s.window_k = window_k.data();
    s.window_v = window_v.data();
    s.window_decay = window_decay.data();
    s.sink_k = sink_k.data();
    s.sink_v = sink_v.data();
    s.length = length.empty() ? nullptr : length.data();
    return s;
  }
};

inline ConstView view_of(const Tensor& x, int64_t heads, int64_t seqlen, int64_t dim) {
  return {x.data(), heads * seqlen * dim, seqlen * dim, dim, 1};
}

// The problem's tensors rounded to dtype, and the problem with the rounded values.
class Case {
 public:
  Case(const Problem& problem, DType dtype) : dtype(dtype), p(problem) {
    const DType acc = acc_of(dtype);
    const auto round = [](Array& values, DType to) {
      Tensor tensor(to, values);
      values = tensor.values();
      return tensor;
    };
    q = round(p.q, dtype);
    k = round(p.k, dtype);
    v = round(p.v, dtype);
    omega_q = round(p.omega_q, acc);
    weight_q = round(p.weight_q, acc);
    beta_q = round(p.beta_q, acc);
    omega_k = round(p.omega_k, acc);
    weight_k = round(p.weight_k, acc);
    beta_k = round(p.beta_k, acc);
    log_decay = round(p.log_decay, acc);
    out = Tensor(dtype, Array(p.batch * p.heads * p.seqlen * p.dv));
    row_scale = Tensor(acc, Array(p.batch * p.heads * p.seqlen));
    row_sum = Tensor(acc, Array(p.batch * p.heads * p.seqlen));
    if (!p.kv.empty()) {
      initial = State(p, dtype);
      initial.kv = round(p.kv, acc);
      initial.z = round(p.z, acc);
      initial.log_scale = Tensor(acc, Array(p.z.size()));
    }
    final = State(p, dtype);
  }

  LinearAttentionParams params() {
    LinearAttentionParams s;
    s.dtype = dtype;
    s.kind = p.kind;
    s.batch = p.batch;
    s.num_heads = p.heads;
    s.num_kv_heads = p.kv_heads;
    s.seqlen = p.seqlen;
    s.headdim = p.d;
    s.headdim_v = p.dv;
    s.num_features = p.m;
    s.q = view_of(q, p.heads, p.seqlen, p.d);
    s.k = view_of(k, p.kv_heads, p.seqlen, p.d);
    s.v = view_of(v, p.kv_heads, p.seqlen, p.dv);
    s.fq = {omega_q.data(), weight_q.data(), beta_q.data()};
    s.fk = {omega_k.data(), weight_k.data(), beta_k.data()};
    s.fq.dct = s.fk.dct = dct;
    s.scale = p.scale;
    s.window = p.window;
    s.sinks = p.sinks;
    s.normalize = p.normalize;
    s.eps = p.eps;
    s.log_decay = log_decay.data();
    s.log_decay_stride_batch = p.kv_heads * p.seqlen;
    s.log_decay_stride_head = p.seqlen;
    s.log_decay_stride_seq = 1;
    s.segments = p.segments.empty() ? nullptr : p.segments.data();
    s.num_seqs = p.num_seqs();
    s.initial = initial.view();
    s.final = final.view();
    s.out = out.data();
    s.row_scale = row_scale.data();
    s.row_sum = row_sum.data();
    return s;
  }

  Array forward() {
    const LinearAttentionParams s = params();
    cpu::linear_attention_forward(s, 0, cpu::linear_attention_num_tasks(s));
    return out.values();
  }

  // After forward(). grad_kv and grad_z are gradients of the final state as it is stored.
  void backward(const Array& grad_out, const Array& grad_kv = {}, const Array& grad_z = {},
                int64_t threads = 1) {
    const DType acc = acc_of(dtype);
    LinearAttentionBackwardParams s;
    s.forward = params();
    const Tensor upstream(dtype, grad_out), upstream_kv(acc, grad_kv), upstream_z(acc, grad_z);
    s.grad_out = view_of(upstream, p.heads, p.seqlen, p.dv);
    if (!grad_kv.empty()) {
      s.grad_final_kv = upstream_kv.data();
      s.grad_final_z = upstream_z.data();
      s.final_kv = final.kv.data();
      s.final_z = final.z.data();
      s.final_log_scale = final.log_scale.data();
    }
    const double nan = std::numeric_limits<double>::quiet_NaN();  // everything must be written
    const double padding = p.segments.empty() ? nan : 0.0;
    const auto like = [&](const Tensor& x, DType type, double value) {
      return Tensor(type, Array(x.size(), value));
    };
    dq = like(q, dtype, padding);
    dk = like(k, dtype, padding);
    dv = like(v, dtype, padding);
    domega_q = like(omega_q, acc, nan);
    dweight_q = like(weight_q, acc, nan);
    dbeta_q = like(beta_q, acc, nan);
    domega_k = like(omega_k, acc, nan);
    dweight_k = like(weight_k, acc, nan);
    dbeta_k = like(beta_k, acc, nan);
    dlog_decay = like(log_decay, acc, padding);
    dkv = like(initial.kv, acc, nan);
    dz = like(initial.z, acc, nan);
    s.grad_q = dq.data();
    s.grad_k = dk.data();
    s.grad_v = dv.data();
    s.grad_fq = {domega_q.data(), dweight_q.data(), dbeta_q.data()};
    s.grad_fk = {domega_k.data(), dweight_k.data(), dbeta_k.data()};
    s.grad_log_decay = dlog_decay.data();
    s.grad_initial_kv = dkv.data();
    s.grad_initial_z = dz.data();
    const cpu::Shares<cpu::BackwardPiece> shares = cpu::split_backward(s, threads);
    std::vector<char> workspace(cpu::linear_attention_backward_workspace(s, shares.pieces), 0x7f);
    s.workspace = workspace.data();
    num_pieces = static_cast<int64_t>(shares.pieces.size());
    for (int64_t piece = num_pieces - 1; piece >= 0; --piece) {  // any order will do
      cpu::linear_attention_backward(s, shares.pieces, piece, piece + 1);
    }
    cpu::linear_attention_backward_finish(s, shares.pieces);
  }

  DType dtype;
  Problem p;
  int64_t num_pieces = 0;  // of the last backward
  bool dct = false;        // omega_q and omega_k are frequencies

  Tensor q, k, v, omega_q, weight_q, beta_q, omega_k, weight_k, beta_k, log_decay;
  Tensor out, row_scale, row_sum;
  Tensor dq, dk, dv, domega_q, dweight_q, dbeta_q, domega_k, dweight_k, dbeta_k, dlog_decay, dkv,
      dz;
  State initial, final;
};

// Fills whatever the sizes of p ask for with random numbers.
inline Problem random_problem(Problem p, bool decay = false, bool state = false, int seed = 0) {
  std::mt19937 generator(seed);
  const auto normal = [&](int64_t count, double deviation, bool positive = false) {
    std::normal_distribution<double> distribution(0, deviation);
    Array x(count);
    for (double& e : x) e = positive ? std::exp(distribution(generator)) : distribution(generator);
    return x;
  };
  const bool given = p.kind == FeatureKind::kGiven;
  if (given) p.d = p.m;
  p.q = normal(p.batch * p.heads * p.seqlen * p.d, 1, given);
  p.k = normal(p.batch * p.kv_heads * p.seqlen * p.d, 1, given);
  p.v = normal(p.batch * p.kv_heads * p.seqlen * p.dv, 1);
  if (!given && p.m > 0) {
    p.omega_q = normal(p.heads * p.m * p.d, 0.5);
    p.omega_k = normal(p.kv_heads * p.m * p.d, 0.5);
    p.weight_q = normal(p.heads * p.m, 0.5);
    p.weight_k = normal(p.kv_heads * p.m, 0.5);
    if (p.kind == FeatureKind::kExp) {
      p.beta_q = normal(p.heads, 0.3);
      p.beta_k = normal(p.kv_heads, 0.3);
    }
  }
  if (decay) {
    p.log_decay = normal(p.batch * p.kv_heads * p.seqlen, 0.5);
    for (double& e : p.log_decay) e = -std::abs(e);
  }
  if (state) {
    p.kv = normal(p.num_seqs() * p.kv_heads * p.m * p.dv, 1);
    p.z = normal(p.num_seqs() * p.kv_heads * p.m, 1, true);
  }
  return p;
}

inline std::string describe(const Problem& p, DType dtype) {
  return "kind " + std::to_string(int(p.kind)) + " dtype " + std::to_string(int(dtype)) +
         " window " + std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " groups " +
         std::to_string(p.groups()) + " seqlen " + std::to_string(p.seqlen) + " m " +
         std::to_string(p.m) + " decay " + std::to_string(!p.log_decay.empty()) + " state " +
         std::to_string(!p.kv.empty()) + " normalize " + std::to_string(p.normalize);
}

inline double largest(const Array& x) {
  double top = 0;
  for (double e : x) top = std::max(top, std::abs(e));
  return top;
}

// |got - want| <= tolerance * (1 + the largest |want|), NaN fails. Beyond the range of a float16
// both are infinite.
inline void expect_close(const Array& got, const Array& want, double tolerance,
                         const std::string& what, DType dtype = DType::kFloat64) {
  ASSERT_EQ(got.size(), want.size()) << what;
  const double allowed = tolerance * (1 + largest(want));
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == want[i]) continue;  // infinities too
    if (dtype == DType::kFloat16 && std::abs(want[i]) > 65504 && got[i] * want[i] > 0) {
      ASSERT_TRUE(std::isinf(got[i])) << what << ", element " << i << ": want " << want[i];
      continue;
    }
    ASSERT_LE(std::abs(got[i] - want[i]), allowed)
        << what << ", element " << i << ": got " << got[i] << ", want " << want[i];
    ASSERT_FALSE(std::isnan(got[i])) << what << ", element " << i;
  }
}

}  // namespace dijiang::testing
