// One feature_map problem in any dtype, its forward and backward by the given kernels, and the
// definition of both in double. Shared by the tests of the CPU and the CUDA kernels.
#pragma once

#include <functional>
#include <random>
#include <string>

#include "attention_case.h"
#include "dijiang/core/feature_map.h"

namespace dijiang::testing {

struct FeatureMapKernels {
  std::function<void(const FeatureMapParams&)> forward;
  std::function<void(FeatureMapBackwardParams&)> backward;
};

// In two ranges of tasks, with a workspace that holds anything but zeros.
inline FeatureMapKernels cpu_kernels() {
  return {[](const FeatureMapParams& p) {
            const int64_t tasks = cpu::feature_map_num_tasks(p);
            cpu::feature_map_forward(p, 0, tasks / 2);
            cpu::feature_map_forward(p, tasks / 2, tasks);
          },
          [](FeatureMapBackwardParams& p) {
            std::vector<char> workspace(cpu::feature_map_backward_workspace(p), char(0xff));
            p.workspace = workspace.data();
            const int64_t tasks = cpu::feature_map_num_tasks(p.forward);
            cpu::feature_map_backward(p, tasks / 2, tasks);
            cpu::feature_map_backward(p, 0, tasks / 2);
            cpu::feature_map_backward_finish(p);
          }};
}

struct FeatureMapCase {
  FeatureKind kind = FeatureKind::kExp;
  bool log = false;
  int64_t batch = 2, heads = 3, seqlen = 131, d = 19, m = 37;
  double scale = 0.35;
  bool has_weight = true, has_beta = true;
  double size = 1.0;   // of x
  bool dense = false;  // x as (batch, seqlen + 1, heads, d) in memory, else no stride is the usual

  std::string name() const {
    return "kind " + std::to_string(int(kind)) + (log ? " log" : "") + " m " + std::to_string(m) +
           " d " + std::to_string(d) + " seqlen " + std::to_string(seqlen);
  }
};

// The values of a case: x (batch, heads, seqlen, d), parameters, and the gradient of the output.
struct FeatureMapValues {
  Array x, omega, log_weight, beta, grad_out;

  FeatureMapValues(const FeatureMapCase& c, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](Array& a, int64_t count, double factor, bool wanted = true) {
      for (int64_t i = 0; i < (wanted ? count : 0); ++i) a.push_back(factor * normal(generator));
    };
    fill(x, c.batch * c.heads * c.seqlen * c.d, c.size);
    fill(omega, c.heads * c.m * c.d, 2 / std::sqrt(double(c.d)));  // exponents of some units
    fill(log_weight, c.heads * c.m, 0.3, c.has_weight);
    fill(beta, c.heads, 0.2, c.has_beta);
    fill(grad_out, c.batch * c.heads * c.seqlen * c.m, 1.0);
  }

  // Rounded as the kernels see them.
  FeatureMapValues rounded(DType dtype) const {
    FeatureMapValues r = *this;
    r.x = Tensor(dtype, x).values();
    r.grad_out = Tensor(dtype, grad_out).values();
    for (Array* a : {&r.omega, &r.log_weight, &r.beta}) *a = Tensor(acc_of(dtype), *a).values();
    return r;
  }
};

inline Array feature_map_definition(const FeatureMapCase& c, const FeatureMapValues& v) {
  Problem p;
  p.kind = c.kind;
  p.m = c.m;
  p.d = c.d;
  p.scale = c.scale;
  Array out;
  for (int64_t row = 0; row < c.batch * c.heads * c.seqlen; ++row) {
    const int64_t head = row / c.seqlen % c.heads;
    for (double value :
         reference::log_phi(p, &v.x[row * c.d], v.omega, v.log_weight, v.beta, head)) {
      out.push_back(c.log ? value : std::exp(value));
    }
  }
  return out;
}

struct FeatureMapResult {
  Array out, grad_x, grad_omega, grad_log_weight, grad_beta;
};

// x lies in memory as (seqlen + 1, d, heads, batch) unless the case says otherwise.
inline FeatureMapResult run_feature_map(const FeatureMapCase& c, const FeatureMapValues& v,
                                        DType dtype, const FeatureMapKernels& kernels) {
  FeatureMapParams p;
  p.x.stride_batch = 1;
  p.x.stride_head = c.batch;
  p.x.stride_dim = c.batch * c.heads;
  p.x.stride_seq = c.d * p.x.stride_dim;
  if (c.dense) p.x = {nullptr, (c.seqlen + 1) * c.heads * c.d, c.d, c.heads * c.d, 1};
  Array strided((c.seqlen + 1) * c.batch * c.heads * c.d);
  for (int64_t i = 0; i < int64_t(v.x.size()); ++i) {
    const int64_t j = i % c.d, t = i / c.d % c.seqlen, h = i / c.d / c.seqlen % c.heads,
                  b = i / c.d / c.seqlen / c.heads;
    strided[b * p.x.stride_batch + h * p.x.stride_head + t * p.x.stride_seq + j * p.x.stride_dim] =
        v.x[i];
  }
  const DType acc = acc_of(dtype);
  const Tensor x(dtype, strided), omega(acc, v.omega), log_weight(acc, v.log_weight),
      beta(acc, v.beta), grad_out(dtype, v.grad_out);
  Tensor out(dtype, v.grad_out.size()), grad_x(dtype, v.x.size()), grad_omega(acc, v.omega.size()),
      grad_log_weight(acc, c.heads * c.m), grad_beta(acc, c.heads);
  p.dtype = dtype;
  p.kind = c.kind;
  p.batch = c.batch;
  p.num_heads = c.heads;
  p.seqlen = c.seqlen;
  p.headdim = c.d;
  p.num_features = c.m;
  p.x.data = x.data();
  p.feature = {omega.data(), log_weight.data(), beta.data()};
  p.scale = c.scale;
  p.log = c.log;
  p.out = out.data();
  kernels.forward(p);
  FeatureMapBackwardParams b;
  b.forward = p;
  b.grad_out = {grad_out.data(), c.heads * c.seqlen * c.m, c.seqlen * c.m, c.m, 1};
  b.grad_x = grad_x.data();
  b.grad = {grad_omega.data(), grad_log_weight.data(), c.has_beta ? grad_beta.data() : nullptr};
  kernels.backward(b);
  return {out.values(), grad_x.values(), grad_omega.values(), grad_log_weight.values(),
          grad_beta.values()};
}

// Absolute where nothing but zero is expected.
inline double relative_rms(const Array& got, const Array& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(norm > 0 ? error / norm : error);
}

// The derivative of sum(grad_out * out) by one value, by central differences.
inline double finite_difference(const FeatureMapCase& c, FeatureMapValues v,
                                Array FeatureMapValues::*member, int64_t index) {
  constexpr double kStep = 1e-5;
  const auto loss = [&](double offset) {
    FeatureMapValues moved = v;
    (moved.*member)[index] += offset;
    const Array out = feature_map_definition(c, moved);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += v.grad_out[i] * out[i];
    return sum;
  };
  return (loss(kStep) - loss(-kStep)) / (2 * kStep);
}

}  // namespace dijiang::testing
