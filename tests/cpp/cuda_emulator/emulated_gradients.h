// A call's gradients beside the definition's.
#pragma once

#include "emulated_attention.h"

namespace emulated {

// The gradient of beta sums |x|^2 times those of log_weight over all features: it may cancel
// exactly, so its error is measured against that sum without signs.
inline double beta_size(const oracle::Problem& p, const std::vector<double>& grad_weight,
                        int heads) {
  double sum = 0.0;
  for (const double e : grad_weight) sum += std::fabs(e) / heads;
  return sum * p.dim * p.scale * p.size * p.size;
}

// The largest errors of inputs' gradients, of parameters', and of the decay's.
struct GradientErrors {
  double inputs, parameters, decay;
};

template <class T>
GradientErrors compare(const oracle::Problem& p, const Gradients<T>& got,
                       const oracle::Result& want, double limit) {
  GradientErrors errors{0.0, 0.0, 0.0};
  const auto one = [&](const char* name, double& most, const auto& x, const std::vector<double>& y,
                       double size = 0.0) {
    const double e = error(widen(x), y, size);
    EXPECT_LT(e, limit) << name;
    most = std::fmax(most, e);
  };
  one("q", errors.inputs, got.q, want.grad_q);
  one("k", errors.inputs, got.k, want.grad_k);
  one("v", errors.inputs, got.v, want.grad_v);
  one("omega_q", errors.parameters, got.omega_q, want.grad_omega_q);
  one("omega_k", errors.parameters, got.omega_k, want.grad_omega_k);
  one("weight_q", errors.parameters, got.weight_q, want.grad_weight_q);
  one("weight_k", errors.parameters, got.weight_k, want.grad_weight_k);
  one("beta_q", errors.parameters, got.beta_q, want.grad_beta_q,
      beta_size(p, want.grad_weight_q, p.heads));
  one("beta_k", errors.parameters, got.beta_k, want.grad_beta_k,
      beta_size(p, want.grad_weight_k, p.kv_heads));
  one("log_decay", errors.decay, got.log_decay, want.grad_log_decay);
  return errors;
}

// Of x, over (batch, heads, seqlen, dim), the tokens from `cut` on.
inline std::vector<double> behind(const oracle::Problem& p, const std::vector<double>& x, int heads,
                                  int dim, int cut) {
  std::vector<double> y;
  for (int row = 0; row < p.batch * heads; ++row) {
    y.insert(y.end(), x.begin() + (int64_t{row} * p.seqlen + cut) * dim,
             x.begin() + int64_t{row + 1} * p.seqlen * dim);
  }
  return y;
}

// The other way: what two calls gave for the tokens before and from `cut` on.
template <class Early, class Late>
std::vector<double> joined(const oracle::Problem& p, const Early& early, const Late& late,
                           int heads, int dim, int cut) {
  const std::vector<double> a = widen(early), b = widen(late);
  const int n = cut * dim, rest = (p.seqlen - cut) * dim;
  std::vector<double> all;
  for (int row = 0; row < p.batch * heads; ++row) {
    all.insert(all.end(), a.begin() + row * n, a.begin() + (row + 1) * n);
    all.insert(all.end(), b.begin() + row * rest, b.begin() + (row + 1) * rest);
  }
  return all;
}

}  // namespace emulated
