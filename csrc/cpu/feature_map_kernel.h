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
  features.allocate(scratch, p.kind, p.num_features, p.headdim, p.feature.dct);
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

template <typename Acc>
class FeatureMapBackward {
 public:
  explicit FeatureMapBackward(const FeatureMapBackwardParams& params)
      : params_(params),
        p_(params.forward),
        dp_(padded<Acc>(p_.headdim)),
        mp_(padded<Acc>(p_.num_features)) {
    features_.allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.feature.dct, true);
    sums_.allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.feature.dct);
    x_ = scratch_.template take<Acc>(kFeatureRows * dp_);
    grad_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    out_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    plain_ = scratch_.template take<Acc>(kFeatureRows * mp_);
    grad_x_ = scratch_.template take<Acc>(kFeatureRows * dp_);
  }

  void run(int64_t task) {
    const int64_t batch = task / p_.num_heads, head = task % p_.num_heads;
    const int64_t m = p_.num_features, d = p_.headdim;
    features_.set(p_.feature, head, p_.scale);
    sums_.begin(feature_map_grads(params_, task), params_.grad);
    for (int64_t t = 0; t < p_.seqlen; t += kFeatureRows) {
      const int64_t rows = p_.seqlen - t < kFeatureRows ? p_.seqlen - t : kFeatureRows;
      load_tile(p_.dtype, p_.x, batch, head, t, rows, d, x_, dp_);
      load_tile(p_.dtype, params_.grad_out, batch, head, t, rows, m, grad_, mp_);
      if (!p_.log) multiply_by_out(task * p_.seqlen + t, rows);
      const bool asks_plain = p_.kind != FeatureKind::kExp || p_.feature.dct;
      if (asks_plain) features_.exponents(x_, rows, out_, plain_);
      fill(grad_x_, rows * dp_, Acc(0));
      features_.backward(x_, rows, grad_, plain_, grad_x_, sums_);
      store_tile(p_.dtype, params_.grad_x, (task * p_.seqlen + t) * d, rows, d, grad_x_, dp_);
    }
    sums_.finish(p_.scale);
  }

 private:
  // The gradient of log phi from that of phi.
  void multiply_by_out(int64_t first_row, int64_t rows) {
    const int64_t m = p_.num_features;
    for (int64_t r = 0; r < rows; ++r) {
      load_row(p_.dtype, p_.out, (first_row + r) * m, 1, m, out_ + r * mp_);
      for (int64_t i = 0; i < m; ++i) grad_[r * mp_ + i] *= out_[r * mp_ + i];
      for (int64_t i = m; i < mp_; ++i) grad_[r * mp_ + i] = 0;
    }
  }

  const FeatureMapBackwardParams& params_;
  const FeatureMapParams& p_;
  int64_t dp_, mp_;
  Scratch scratch_;
  Features<Acc> features_;
  FeatureSums<Acc> sums_;
  Acc* x_;       // (rows, d)
  Acc* grad_;    // (rows, m)
  Acc* out_;     // (rows, m)
  Acc* plain_;   // (rows, m): Features::exponents
  Acc* grad_x_;  // (rows, d)
};

template <typename Acc>
void feature_map_backward_tasks(const FeatureMapBackwardParams& params, int64_t begin,
                                int64_t end) {
  const FlushSubnormals flush;
  FeatureMapBackward<Acc> backward(params);
  for (int64_t task = begin; task < end; ++task) backward.run(task);
}

void feature_map_forward(const FeatureMapParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return feature_map_forward_tasks<double>(params, begin, end);
  feature_map_forward_tasks<float>(params, begin, end);
}

void feature_map_backward(const FeatureMapBackwardParams& params, int64_t begin, int64_t end) {
  if (params.forward.dtype == DType::kFloat64) {
    return feature_map_backward_tasks<double>(params, begin, end);
  }
  feature_map_backward_tasks<float>(params, begin, end);
}

}  // namespace dijiang::cpu::DIJIANG_ISA
