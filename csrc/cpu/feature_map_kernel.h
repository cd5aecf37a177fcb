// phi(x), its logarithm, and the gradients of either (docs/numerics.md, "Backward").
#pragma once

#include "cpu/features.h"
#include "dijiang/core/feature_map.h"

namespace dijiang::cpu::DIJIANG_ISA {

inline constexpr int64_t kFeatureRows = 64;  // of a tile

inline double largest_finite(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return kLargestFinite<double>;
    case DType::kBFloat16: return kLargestFinite<BFloat16>;
    case DType::kFloat16: return kLargestFinite<Float16>;
    default: return kLargestFinite<float>;
  }
}

// 2^x, +inf only from the last exponent of Acc on.
template <typename Acc>
DIJIANG_INLINE Vec<Acc> exp2_full_range(Vec<Acc> x) {
  // The largest exponent is out of reach of exp2_scaled alone.
  const Vec<Acc> half = x > 0 ? broadcast(Acc(1)) : Vec<Acc>{};
  const Vec<Acc> y = exp2_scaled<Acc>(x, -half) * (Acc(1) + half);
  return x >= Acc(kExponentBias<Acc> + 1) ? broadcast(std::numeric_limits<Acc>::infinity()) : y;
}

// log2 phi -> what the caller asked for, inside the finite range of the output's type; NaN stays.
template <typename Acc>
DIJIANG_INLINE void finish_features(Acc* y, int64_t count, bool log, Acc largest) {
  const Vec<Acc> top = broadcast(largest);
  for (int64_t i = 0; i < count; i += kLanes<Acc>) {
    const Vec<Acc> x = load(y + i);
    const Vec<Acc> value = log ? x * Acc(0.69314718055994530942) : exp2_full_range<Acc>(x);
    const Vec<Acc> below = value > top ? top : value;
    store(y + i, below < -top ? -top : below);
  }
}

template <typename Acc>
void feature_map_forward_tasks(const FeatureMapParams& p, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  const int64_t dp = padded<Acc>(p.headdim), mp = padded<Acc>(p.num_features);
  Scratch scratch;
  Features<Acc> features;
  features.allocate(scratch, p.kind, p.num_features, p.headdim);
  Acc* x = scratch.take<Acc>(kFeatureRows * dp);
  Acc* y = scratch.take<Acc>(kFeatureRows * mp);
  const Acc largest = static_cast<Acc>(largest_finite(p.dtype));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / p.num_heads, head = task % p.num_heads;
    features.set(p.feature, head, p.scale);
    for (int64_t t = 0; t < p.seqlen; t += kFeatureRows) {
      const int64_t rows = p.seqlen - t < kFeatureRows ? p.seqlen - t : kFeatureRows;
      load_tile(p.dtype, p.x, batch, head, t, rows, p.headdim, x, dp);
      features.exponents(x, rows, y);
      finish_features<Acc>(y, rows * mp, p.log, largest);
      store_tile(p.dtype, p.out, (task * p.seqlen + t) * p.num_features, rows, p.num_features, y,
                 mp);
    }
  }
}

// What one task adds to the gradients of its head's parameters, in double.
struct FeatureGradSums {
  double* omega;       // (m, d), without the factor sqrt(scale)
  double* log_weight;  // (m)
  double* beta;        // (1), without the factor -scale

  static int64_t size(const FeatureMapParams& p) {
    return p.num_features * p.headdim + p.num_features + 1;
  }
  FeatureGradSums(const FeatureMapParams& p, void* workspace, int64_t task)
      : omega(static_cast<double*>(workspace) + task * size(p)),
        log_weight(omega + p.num_features * p.headdim),
        beta(log_weight + p.num_features) {}
};

template <typename Acc>
class FeatureMapBackward {
 public:
  explicit FeatureMapBackward(const FeatureMapBackwardParams& params)
      : params_(params),
        p_(params.forward),
        dp_(padded<Acc>(p_.headdim)),
        mp_(padded<Acc>(p_.num_features)) {
    features_.allocate(scratch_, p_.kind, p_.num_features, p_.headdim);
    x_ = scratch_.template take<Acc>(kFeatureRows * dp_);
    grad_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    out_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    plain_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    grad_x_ = scratch_.template take<Acc>(kFeatureRows * dp_);
    grad_omega_ = scratch_.template take<Acc>(p_.num_features * dp_);
  }

  void run(int64_t task) {
    const int64_t batch = task / p_.num_heads, head = task % p_.num_heads;
    const int64_t m = p_.num_features, d = p_.headdim;
    const FeatureGradSums sums(p_, params_.workspace, task);
    std::memset(sums.omega, 0, FeatureGradSums::size(p_) * sizeof(double));
    features_.set(p_.feature, head, p_.scale);
    const Acc* omega = static_cast<const Acc*>(p_.feature.omega) + head * m * d;
    const Acc beta = p_.feature.beta ? static_cast<const Acc*>(p_.feature.beta)[head] : Acc(0);
    const Acc scale = static_cast<Acc>(p_.scale);
    const Acc root = static_cast<Acc>(std::sqrt(p_.scale));
    for (int64_t t = 0; t < p_.seqlen; t += kFeatureRows) {
      const int64_t rows = p_.seqlen - t < kFeatureRows ? p_.seqlen - t : kFeatureRows;
      load_tile(p_.dtype, p_.x, batch, head, t, rows, d, x_, dp_);
      exponent_gradients(batch, head, t, rows, sums);
      fill(grad_x_, rows * dp_, Acc(0));
      gemm<Operand::kPlain, Operand::kPlain>(rows, d, m, grad_, mp_, omega, d, grad_x_, dp_);
      for (int64_t r = 0; r < rows; ++r) {
        const Acc* x = x_ + r * dp_;
        Acc pull = 0;
        if (p_.kind == FeatureKind::kExp && p_.feature.beta) {
          double norm = 0;
          for (int64_t j = 0; j < d; ++j) norm += double(x[j]) * double(x[j]);
          *sums.beta += norm * row_sums_[r];
          pull = 2 * beta * scale * static_cast<Acc>(row_sums_[r]);
        }
        for (int64_t j = 0; j < dp_; ++j) {
          grad_x_[r * dp_ + j] = root * grad_x_[r * dp_ + j] - pull * x[j];
        }
      }
      store_tile(p_.dtype, params_.grad_x, (task * p_.seqlen + t) * d, rows, d, grad_x_, dp_);
      if (params_.grad.omega == nullptr) continue;
      fill(grad_omega_, m * dp_, Acc(0));
      gemm<Operand::kTransposed, Operand::kPlain>(m, d, rows, grad_, mp_, x_, dp_, grad_omega_,
                                                  dp_);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < d; ++j) sums.omega[i * d + j] += double(grad_omega_[i * dp_ + j]);
      }
    }
  }

 private:
  // grad_ = the gradient of u, from grad_out; sums.log_weight and row_sums_ sum that of log phi
  // over rows and over features.
  void exponent_gradients(int64_t batch, int64_t head, int64_t t, int64_t rows,
                          const FeatureGradSums& sums) {
    const int64_t m = p_.num_features;
    load_tile(p_.dtype, params_.grad_out, batch, head, t, rows, m, grad_, mp_);
    if (!p_.log) {
      const int64_t offset = ((batch * p_.num_heads + head) * p_.seqlen + t) * m;
      for (int64_t r = 0; r < rows; ++r) {
        load_row(p_.dtype, p_.out, offset + r * m, 1, m, out_ + r * mp_);
        for (int64_t i = 0; i < m; ++i) grad_[r * mp_ + i] *= out_[r * mp_ + i];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < m; ++i) {
        sum += double(grad_[r * mp_ + i]);
        sums.log_weight[i] += double(grad_[r * mp_ + i]);
      }
      row_sums_[r] = sum;
    }
    if (p_.kind == FeatureKind::kExp) return;
    features_.exponents(x_, rows, out_, plain_);
    for (int64_t r = 0; r < rows; ++r) {
      Acc* grad = grad_ + r * mp_;
      const Acc* plain = plain_ + r * mp_;
      const Acc sum = static_cast<Acc>(row_sums_[r]);
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        const Vec<Acc> g = load(grad + i), u = load(plain + i);
        if (p_.kind == FeatureKind::kSoftmax) {
          store(grad + i, g - exp2_scaled<Acc>(u, Vec<Acc>{}) * sum);
        } else {
          store(grad + i, u > 0 ? g / (u + Acc(1)) : g);
        }
      }
      for (int64_t i = m; i < mp_; ++i) grad[i] = 0;
    }
  }

  const FeatureMapBackwardParams& params_;
  const FeatureMapParams& p_;
  int64_t dp_, mp_;
  Scratch scratch_;
  Features<Acc> features_;
  Acc* x_;           // (rows, d)
  Acc* grad_;        // (rows, m)
  Acc* out_;         // (rows, m)
  Acc* plain_;       // (rows, m): Features::exponents
  Acc* grad_x_;      // (rows, d)
  Acc* grad_omega_;  // (m, d)
  double row_sums_[kFeatureRows];
};

template <typename Acc>
void feature_map_backward_tasks(const FeatureMapBackwardParams& params, int64_t begin,
                                int64_t end) {
  const FlushSubnormals flush;
  FeatureMapBackward<Acc> backward(params);
  for (int64_t task = begin; task < end; ++task) backward.run(task);
}

template <typename Acc>
void feature_map_backward_sum(const FeatureMapBackwardParams& params) {
  const FeatureMapParams& p = params.forward;
  const int64_t m = p.num_features, d = p.headdim;
  const auto sum = [&](void* target, int64_t head, int64_t count, auto member, double factor) {
    if (target == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int64_t batch = 0; batch < p.batch; ++batch) {
        total += (FeatureGradSums(p, params.workspace, batch * p.num_heads + head).*member)[i];
      }
      static_cast<Acc*>(target)[head * count + i] = static_cast<Acc>(factor * total);
    }
  };
  for (int64_t head = 0; head < p.num_heads; ++head) {
    sum(params.grad.omega, head, m * d, &FeatureGradSums::omega, std::sqrt(p.scale));
    sum(params.grad.log_weight, head, m, &FeatureGradSums::log_weight, 1.0);
    sum(params.grad.beta, head, 1, &FeatureGradSums::beta, -p.scale);
  }
}

void feature_map_forward(const FeatureMapParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return feature_map_forward_tasks<double>(params, begin, end);
  feature_map_forward_tasks<float>(params, begin, end);
}

size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params) {
  const FeatureMapParams& p = params.forward;
  return p.batch * p.num_heads * FeatureGradSums::size(p) * sizeof(double);
}

void feature_map_backward(const FeatureMapBackwardParams& params, int64_t begin, int64_t end) {
  if (params.forward.dtype == DType::kFloat64) {
    return feature_map_backward_tasks<double>(params, begin, end);
  }
  feature_map_backward_tasks<float>(params, begin, end);
}

void feature_map_backward_finish(const FeatureMapBackwardParams& params) {
  if (params.forward.dtype == DType::kFloat64) return feature_map_backward_sum<double>(params);
  feature_map_backward_sum<float>(params);
}

}  // namespace dijiang::cpu::DIJIANG_ISA
