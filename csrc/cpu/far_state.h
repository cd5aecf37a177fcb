// The running sum of far keys, S_i = sum_s 2^(a_si) v_s, held as kv_i 2^(M_i): docs/numerics.md,
// "State". The backward holds the sum over queries that runs back in time in the same way.
#pragma once

#include "cpu/features.h"

namespace dijiang::cpu::DIJIANG_ISA {

// 2^(x + shift), x <= 0 and shift whole, as 2^whole fraction. fraction lies in (1/2, 1], unless
// shift is too large to take a whole number up exactly.
template <typename Acc>
struct Decay {
  Acc whole = 0;
  Acc fraction = 1;
  Decay() = default;
  explicit Decay(double x, Acc shift = 0) {
    const double up = std::ceil(x);
    whole = static_cast<Acc>(up) + shift;
    const double lost = static_cast<double>(shift) + up - static_cast<double>(whole);
    fraction = static_cast<Acc>(std::exp2(x - up + lost));
  }
};

// 2^total, total <= 0, as a change of log_scale by a whole number and a factor, so chosen that z
// stays near 1.
template <typename Acc>
class StateDecay {
 public:
  struct Step {
    Acc log_scale, factor;
  };
  explicit StateDecay(double total)
      : total_(total),
        down_(std::floor(total)),
        up_(std::ceil(total)),
        factor_down_(static_cast<Acc>(std::exp2(total - down_))),
        factor_up_(static_cast<Acc>(std::exp2(total - up_))) {}

  Step of(Acc log_scale, Acc z) const {
    if (log_scale <= Acc(kEmptyLogScale)) return {log_scale, Acc(1)};
    const bool small = std::abs(z) < 1;
    const double old = log_scale, whole = small ? down_ : up_;
    const Acc moved = static_cast<Acc>(old + whole);
    if (moved - old == whole) return {moved, small ? factor_down_ : factor_up_};
    // Too large a scale to move by so little: the factor makes up for it.
    return {moved, static_cast<Acc>(std::exp2(total_ - (moved - old)))};
  }

 private:
  double total_, down_, up_;
  Acc factor_down_, factor_up_;
};

// mask[t, s] = the product of the decays of tokens s+1..t, for s <= t < n; log_decay in base 2.
// Sums run from t back: differences of cumulative sums would cancel.
template <typename Acc>
void decay_mask(int64_t n, const double* log_decay, Acc* mask) {
  for (int64_t t = 0; t < n; ++t) {
    Acc* row = mask + t * kTile;
    double sum = 0;
    for (int64_t s = t; s >= 0; --s) {
      row[s] = static_cast<Acc>(sum);
      sum += log_decay[s];
    }
    for (int64_t s = 0; s <= t; s += kLanes<Acc>) {
      store(row + s, exp2_scaled<Acc>(load(row + s), Vec<Acc>{}));
    }
  }
}

// out = row 2^n factor
template <typename Acc>
void scale_row(const Acc* row, int64_t size, Acc n, Acc factor, Acc* out) {
  if (n == 0 && factor == 1) {
    if (out != row) std::memcpy(out, row, size * sizeof(Acc));
    return;
  }
  for (int64_t j = 0; j < size; j += kLanes<Acc>) {
    store(out + j, scale_by<Acc>(load(row + j), broadcast(n)) * factor);
  }
}

template <typename Acc>
class FarState {
 public:
  Acc* kv = nullptr;         // (mp, vp)
  Acc* z = nullptr;          // (mp): the same sum with v = 1
  Acc* log_scale = nullptr;  // (mp): M, whole
  Acc* extra = nullptr;      // (mp), if asked for: the same sum with one more value a row

  void allocate(Scratch& scratch, int64_t mp, int64_t vp, bool with_extra) {
    mp_ = mp;
    vp_ = vp;
    kv = scratch.take<Acc>(mp * vp);
    z = scratch.take<Acc>(mp);
    log_scale = scratch.take<Acc>(mp);
    features_ = scratch.take<Acc>(kTile * mp);
    if (with_extra) extra = scratch.take<Acc>(mp);
  }

  void clear() {
    fill(kv, mp_ * vp_, Acc(0));
    fill(z, mp_, Acc(0));
    fill(log_scale, mp_, static_cast<Acc>(kEmptyLogScale));
    if (extra) fill(extra, mp_, Acc(0));
  }

  // S *= 2^total, total <= 0.
  void decay(double total) {
    if (total == 0) return;
    const StateDecay<Acc> decay(total);
    for (int64_t i = 0; i < mp_; ++i) {
      const typename StateDecay<Acc>::Step step = decay.of(log_scale[i], z[i]);
      log_scale[i] = step.log_scale;
      z[i] *= step.factor;
      if (extra) extra[i] *= step.factor;
      scale_row(kv + i * vp_, vp_, Acc(0), step.factor, kv + i * vp_);
    }
  }

  // S_i += sum_s phi_si 2^(shift_s) factor_s v_s for n rows of features (given by exponents or, for
  // kGiven, as they are), whole shifts and factors <= 1; `extras` holds a row's value for extra.
  template <bool kGiven>
  void fold(int64_t n, const Acc* features, const Acc* shift, const Acc* factor, const Acc* values,
            const Acc* extras = nullptr) {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    for (int64_t i = 0; i < mp_; i += L) {
      const Vec<Acc> old = load(log_scale + i);
      Vec<Acc> scale = old;
      for (int64_t s = 0; s < n; ++s) {
        scale = max(scale, F::exponent(load(features + s * mp_ + i)) + shift[s]);
      }
      store(log_scale + i, scale);
      const Vec<Acc> grown = old - scale;
      Vec<Acc> sum = scale_by<Acc>(load(z + i), grown);
      Vec<Acc> extra_sum{};
      if (extra) extra_sum = scale_by<Acc>(load(extra + i), grown);
      for (int64_t s = 0; s < n; ++s) {
        const Vec<Acc> f = F::scaled(load(features + s * mp_ + i), broadcast(shift[s]), -scale) *
                           broadcast(factor[s]);
        store(features_ + s * mp_ + i, f);
        sum += f;
        if (extra) extra_sum = multiply_add(f, broadcast(extras[s]), extra_sum);
      }
      store(z + i, sum);
      if (extra) store(extra + i, extra_sum);
      for (int64_t l = 0; l < L; ++l) {
        Acc* row = kv + (i + l) * vp_;
        scale_row(row, vp_, grown[l], Acc(1), row);
      }
    }
    gemm<Operand::kTransposed, Operand::kPlain>(mp_, vp_, n, features_, mp_, values, vp_, kv, vp_);
  }

 private:
  int64_t mp_ = 0, vp_ = 0;
  Acc* features_ = nullptr;  // of the rows being folded, relative to the new scale
};

}  // namespace dijiang::cpu::DIJIANG_ISA
