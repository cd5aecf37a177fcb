// Gradients of one head's feature parameters as tasks and pieces leave them, a row each in double:
// omega (m, d) or, of a DCT, (m); log_weight (m); beta. And their sums. No instruction set of its
// own.
#pragma once

#include <vector>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

inline int64_t omega_row_size(const FeatureParams& params, int64_t num_features, int64_t headdim) {
  return num_features * (params.dct ? 1 : headdim);
}
inline int64_t parameter_row_size(const FeatureParams& params, int64_t num_features,
                                  int64_t headdim) {
  return omega_row_size(params, num_features, headdim) + num_features + 1;
}

template <typename Acc>
class ParameterSums {
 public:
  ParameterSums(const FeatureParams& params, const FeatureGrads& grads, int64_t heads,
                int64_t num_features, int64_t headdim)
      : md_(omega_row_size(params, num_features, headdim)),
        m_(num_features),
        group_(params.group),
        grads_(grads),
        omega_(heads / group_ * md_),
        weight_(heads * m_),
        beta_(heads) {}

  void add(int64_t head, const double* row) {
    double* omega = omega_.data() + head / group_ * md_;
    double* weight = weight_.data() + head * m_;
    for (int64_t i = 0; i < md_; ++i) omega[i] += row[i];
    for (int64_t i = 0; i < m_; ++i) weight[i] += row[md_ + i];
    beta_[head] += row[md_ + m_];
  }
  void write() const {
    write(grads_.omega, omega_);
    write(grads_.log_weight, weight_);
    write(grads_.beta, beta_);
  }

 private:
  static void write(void* target, const std::vector<double>& sums) {
    for (size_t i = 0; target != nullptr && i < sums.size(); ++i) {
      static_cast<Acc*>(target)[i] = static_cast<Acc>(sums[i]);
    }
  }

  const int64_t md_, m_, group_;
  const FeatureGrads grads_;
  std::vector<double> omega_, weight_, beta_;
};

}  // namespace dijiang::cpu
