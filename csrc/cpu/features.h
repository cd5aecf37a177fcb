// The exponents log2 phi of a tile of rows: docs/numerics.md, "The function".
#pragma once

#include "cpu/dct_features.h"
#include "cpu/tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

inline constexpr double kLog2E = 1.4426950408889634;
// Exponents are kept inside these, so that differences of them are never NaN. Below
// kEmptyLogScale there is no weight at all.
inline constexpr double kLowestExponent = 2 * kEmptyLogScale;
inline constexpr double kHighestExponent = -kEmptyLogScale;

// A feature of kind kGiven is a number, any other is its base-2 logarithm. What the recurrences
// ask of either: a whole exponent above it, and its value times 2^shift.
template <typename Acc, bool kGiven>
struct FeatureOf {
  static constexpr Acc none() { return kGiven ? Acc(0) : Acc(kLowestExponent); }
  DIJIANG_INLINE static Vec<Acc> exponent(Vec<Acc> x) {
    const Vec<Acc> empty = broadcast(Acc(kEmptyLogScale));
    if constexpr (kGiven) return exponent_of<Acc>(x, Acc(kEmptyLogScale));
    return max(empty, ceil_of<Acc>(x));
  }
  DIJIANG_INLINE static Vec<Acc> scaled(Vec<Acc> x, Vec<Acc> shift) {
    if constexpr (kGiven) return scale_by<Acc>(x, shift);
    return exp2_scaled<Acc>(x, shift);
  }
  DIJIANG_INLINE static Vec<Acc> scaled(Vec<Acc> x, Vec<Acc> shift, Vec<Acc> more) {
    if constexpr (kGiven) return scale_by<Acc>(x, shift + more);
    return exp2_scaled<Acc>(x, shift, more);
  }
  // The product of two features times 2^shift, safe when only the whole product is in range.
  DIJIANG_INLINE static Vec<Acc> product(Vec<Acc> x, Vec<Acc> y, Vec<Acc> shift) {
    if constexpr (kGiven) {
      const Vec<Acc> ex = exponent_of<Acc>(x, Acc(0)), ey = exponent_of<Acc>(y, Acc(0));
      return scale_by<Acc>(scale_by<Acc>(x, -ex) * scale_by<Acc>(y, -ey), ex + ey + shift);
    }
    // To the same bits as the product of two scaled features.
    const Vec<Acc> ny = round_even(y);
    return exp2_scaled<Acc>(x, ny, shift) * exp2_fraction(y - ny);
  }
};

template <typename Body>
DIJIANG_INLINE void dispatch_given(FeatureKind kind, Body&& body) {
  if (kind == FeatureKind::kGiven) return body(std::true_type{});
  return body(std::false_type{});
}

// Rows whose gradients of parameters are summed in Acc before they are in double.
inline constexpr int64_t kPendingRows = 4 * kTile;

// Gradients of one head's parameters on their way to the workspace: a few tiles in Acc, the whole
// sequence in double.
template <typename Acc>
struct FeatureSums {
  int64_t m = 0, d = 0, mp = 0, dp = 0;  // d, dp: 1 for the frequencies of a DCT
  Acc* omega = nullptr;                  // (mp, dp), of q or k: sqrt(scale) is missing
  Acc* weight = nullptr;                 // (mp)
  double beta = 0;
  bool wanted = false, want_omega = false, want_beta = false;
  int64_t pending = 0;       // rows in omega and weight
  double* target = nullptr;  // see parameter_rows.h

  void allocate(Scratch& scratch, FeatureKind kind, int64_t num_features, int64_t headdim,
                bool dct) {
    m = kind == FeatureKind::kGiven ? 0 : num_features;
    d = dct ? 1 : headdim;
    mp = padded<Acc>(m);
    dp = dct ? 1 : padded<Acc>(d);
    omega = scratch.take<Acc>(mp * dp);
    weight = scratch.take<Acc>(mp);
  }
  void begin(double* row, const FeatureGrads& grads) {
    target = row;
    beta = 0;
    pending = 0;
    wanted = m > 0 && grads.wanted();
    want_omega = grads.omega != nullptr;
    want_beta = grads.beta != nullptr;
    if (wanted) fill(target, m * (d + 1) + 1, 0.0);
  }
  void flush(double scale) {
    if (!wanted) return;
    const double root = std::sqrt(scale);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; want_omega && j < d; ++j) {
        target[i * d + j] += root * omega[i * dp + j];
      }
      target[m * d + i] += weight[i];
    }
    if (want_omega) fill(omega, mp * dp, Acc(0));
    fill(weight, mp, Acc(0));
    pending = 0;
  }
  void finish(double scale) {
    flush(scale);
    if (wanted) target[m * d + m] = beta;
  }
};

// The parameters of one head, prepared for rows of x.
template <typename Acc>
class Features {
 public:
  void allocate(Scratch& scratch, FeatureKind kind, int64_t num_features, int64_t headdim, bool dct,
                bool with_backward = false) {
    kind_ = kind;
    dct_ = dct;
    m_ = num_features;
    d_ = headdim;
    mp_ = padded<Acc>(m_);
    dp_ = padded<Acc>(d_);
    if (kind_ == FeatureKind::kGiven || m_ == 0) return;
    bias_ = scratch.take<Acc>(mp_);
    if (dct_) return transform_.allocate(scratch, m_, d_);
    own_weight_ = scratch.take<Acc>(dp_ * mp_);
    if (with_backward) own_rows_ = scratch.take<Acc>(mp_ * dp_);
  }

  // Packing omega pays for itself over a tile of rows, not over one. `before`, if given, is set for
  // the head before: where that has the same row of omega, it is packed already.
  void set(const FeatureParams& params, int64_t head, double scale, bool pack = true,
           const Features* before = nullptr) {
    scale_ = static_cast<Acc>(scale);
    if (bias_ == nullptr) return;
    omega_ = static_cast<const Acc*>(params.omega) + head / params.group * m_ * (dct_ ? 1 : d_);
    const double unit = kind_ == FeatureKind::kElu ? 1.0 : kLog2E;
    const Acc root = static_cast<Acc>(std::sqrt(scale));
    factor_ = static_cast<Acc>(std::sqrt(scale) * unit);
    packed_ = pack;
    if (before != nullptr && before->omega_ == omega_ && !dct_) {
      paired_ = before->paired_;
      weight_ = before->weight_;
      rows_ = before->rows_;
    } else {
      paired_ = (pack || dct_) && kind_ == FeatureKind::kExp && is_paired();
      weight_ = own_weight_;
      rows_ = own_rows_;
      if (dct_) {
        transform_.set(omega_, m_);
      } else if (pack) {
        turn(omega_, d_, m_, d_, own_weight_, mp_, mp_);
        for (int64_t i = 0; i < d_ * mp_; ++i) own_weight_[i] *= factor_;
      }
      for (int64_t i = 0; own_rows_ != nullptr && i < m_; ++i) {
        for (int64_t j = 0; j < d_; ++j) own_rows_[i * dp_ + j] = omega_[i * d_ + j] * root;
      }
    }
    const Acc* log_weight = static_cast<const Acc*>(params.log_weight);
    for (int64_t i = 0; i < m_; ++i) {
      bias_[i] = log_weight ? log_weight[head * m_ + i] * static_cast<Acc>(kLog2E) : Acc(0);
    }
    const Acc beta = params.beta ? static_cast<const Acc*>(params.beta)[head] : Acc(0);
    norm_factor_ = beta * static_cast<Acc>(scale * kLog2E);
  }

  // out (rows x padded m) = log2 phi of x (rows x padded d); for kGiven a copy of x. plain, if
  // wanted, holds what the backward needs: log2 softmax(u) for kSoftmax, u for kElu, C x for a DCT.
  void exponents(const Acc* x, int64_t rows, Acc* out, Acc* plain = nullptr) const {
    if (kind_ == FeatureKind::kGiven) {
      std::memcpy(out, x, rows * mp_ * sizeof(Acc));
      return;
    }
    if (dct_) {
      transform_.apply(x, dp_, rows, paired_ ? m_ / 2 : m_, factor_, out, mp_, plain);
    } else if (packed_) {
      gemm<Operand::kPlain, Operand::kPlain, Result::kAssign>(rows, paired_ ? m_ / 2 : mp_, d_, x,
                                                              dp_, weight_, mp_, out, mp_);
    } else {
      for (int64_t i = 0; i < m_; ++i) {
        for (int64_t t = 0; t < rows; ++t) {
          out[t * mp_ + i] = dot(x + t * dp_, omega_ + i * d_, d_) * factor_;
        }
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      Acc* row = out + t * mp_;
      if (kind_ == FeatureKind::kExp) {
        Acc shift = 0;
        if (norm_factor_ != 0) {
          Vec<Acc> sum{};
          for (int64_t j = 0; j < dp_; j += kLanes<Acc>) {
            const Vec<Acc> xj = load(x + t * dp_ + j);
            sum = multiply_add(xj, xj, sum);
          }
          shift = horizontal_sum<Acc>(sum) * norm_factor_;
        }
        if (paired_) {
          for (int64_t i = 0; i < m_ / 2; i += kLanes<Acc>) store(row + m_ / 2 + i, -load(row + i));
        }
        finish_row(row, row, broadcast(shift));
      } else if (kind_ == FeatureKind::kSoftmax) {
        Acc* logits = plain ? plain + t * mp_ : row;
        const Acc shift = log_sum_exp(row);
        for (int64_t i = 0; i < mp_; i += kLanes<Acc>) store(logits + i, load(row + i) - shift);
        finish_row(logits, row, Vec<Acc>{});
      } else {
        if (plain) std::memcpy(plain + t * mp_, row, mp_ * sizeof(Acc));
        for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
          const Vec<Acc> u = load(row + i), positive = max(u, Vec<Acc>{});
          const Vec<Acc> large = min(positive, broadcast(std::numeric_limits<Acc>::max()));
          store(row + i, u < 0 ? u * Acc(kLog2E) : log2_of<Acc>(large + Acc(1)));
        }
        finish_row(row, row, Vec<Acc>{});
      }
    }
  }

  // From db (rows x padded m), the natural gradient of the exponents, and the `plain` of the
  // forward: adds d x to dx (rows x padded d) and the parameters' gradients to grads. Overwrites
  // db.
  void backward(const Acc* x, int64_t rows, Acc* db, const Acc* plain, Acc* dx,
                FeatureSums<Acc>& grads) const {
    constexpr int L = kLanes<Acc>;
    if (kind_ == FeatureKind::kGiven) {
      for (int64_t i = 0; i < rows * mp_; i += L) store(dx + i, load(dx + i) + load(db + i));
      return;
    }
    for (int64_t t = 0; t < rows; ++t) {
      Acc* row = db + t * mp_;
      const Acc* u = plain + t * mp_;
      Vec<Acc> sums{};
      for (int64_t i = 0; i < mp_; i += L) {
        const Vec<Acc> d = load(row + i);
        sums += d;
        store(grads.weight + i, load(grads.weight + i) + d);
      }
      const Acc sum = horizontal_sum<Acc>(sums);
      if (kind_ == FeatureKind::kExp) {
        if (norm_factor_ == 0 && !grads.want_beta) continue;
        const Acc norm = dot(x + t * dp_, x + t * dp_, dp_);
        grads.beta -= static_cast<double>(norm * scale_) * sum;
        const Acc factor = -2 * norm_factor_ / static_cast<Acc>(kLog2E) * sum;
        for (int64_t j = 0; j < dp_; j += L) {
          Acc* at = dx + t * dp_ + j;
          store(at, multiply_add(broadcast(factor), load(x + t * dp_ + j), load(at)));
        }
      } else if (kind_ == FeatureKind::kSoftmax) {
        for (int64_t i = 0; i < mp_; i += L) {
          const Vec<Acc> softmax = exp2_scaled<Acc>(load(u + i), Vec<Acc>{});
          store(row + i, load(row + i) - softmax * sum);
        }
        for (int64_t i = m_; i < mp_; ++i) row[i] = 0;
      } else {
        for (int64_t i = 0; i < m_; ++i) row[i] /= u[i] > 0 ? 1 + u[i] : Acc(1);
      }
    }
    const int64_t half = paired_ ? m_ / 2 : 0;
    if (grads.want_omega && dct_) {
      transform_.sum_gradients(db, plain, mp_, rows, m_, grads.omega);
    } else if (grads.want_omega) {
      gemm<Operand::kTransposed, Operand::kPlain>(mp_, dp_, rows, db, mp_, x, dp_, grads.omega,
                                                  dp_);
    }
    for (int64_t t = 0; t < rows; ++t) {
      Acc* row = db + t * mp_;
      for (int64_t i = 0; i < half; i += L) store(row + i, load(row + i) - load(row + half + i));
    }
    const int64_t different = paired_ ? half : m_;
    if (dct_) {
      const Acc root = static_cast<Acc>(std::sqrt(double{scale_}));
      transform_.apply_transposed(db, mp_, rows, different, root, dx, dp_);
    } else {
      gemm<Operand::kPlain, Operand::kPlain>(rows, dp_, different, db, mp_, rows_, dp_, dx, dp_);
    }
    grads.pending += rows;
    if (grads.pending >= kPendingRows) grads.flush(scale_);
  }

  int64_t padded_features() const { return mp_; }

 private:
  // u - shift + bias inside the range of exponents; the padding has no weight.
  DIJIANG_INLINE void finish_row(const Acc* u, Acc* row, Vec<Acc> shift) const {
    const Vec<Acc> lowest = broadcast(Acc(kLowestExponent));
    const Vec<Acc> highest = broadcast(Acc(kHighestExponent));
    for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
      const Vec<Acc> x = load(u + i) - shift + load(bias_ + i);
      store(row + i, min(max(x, lowest), highest));  // NaN stays
    }
    for (int64_t i = m_; i < mp_; ++i) row[i] = Acc(kLowestExponent);
  }

  // Whether the second half of the features is the first half of -x, as FeatureMap makes them: one
  // product serves both.
  bool is_paired() const {
    const int64_t half = m_ / 2, size = half * (dct_ ? 1 : d_);
    if (m_ % (2 * kLanes<Acc>) != 0 || (dct_ && half % d_ != 0)) return false;
    for (int64_t i = 0; i < size; ++i) {
      if (omega_[size + i] != -omega_[i]) return false;
    }
    return true;
  }

  Acc log_sum_exp(const Acc* u) const {
    const Acc top = row_max(u, m_, std::numeric_limits<Acc>::lowest());
    Vec<Acc> sums{};
    int64_t i = 0;
    for (; i + kLanes<Acc> <= m_; i += kLanes<Acc>) {
      sums += exp2_scaled<Acc>(load(u + i) - top, Vec<Acc>{});
    }
    Acc sum = horizontal_sum<Acc>(sums);
    for (; i < m_; ++i) sum += exp2_scaled_one(u[i] - top, Acc(0));
    return top + std::log2(sum);
  }

  FeatureKind kind_ = FeatureKind::kGiven;
  int64_t m_ = 0, d_ = 0, mp_ = 0, dp_ = 0;
  const Acc* omega_ = nullptr;
  Acc factor_ = 1;
  bool dct_ = false, packed_ = true, paired_ = false;
  DctFeatures<Acc> transform_;
  Acc* bias_ = nullptr;  // (padded m): log_weight log2 e
  // Own memory, and what is used: another head's where it has the same omega.
  Acc *own_weight_ = nullptr, *own_rows_ = nullptr;
  const Acc* weight_ = nullptr;  // (padded d, padded m): omega^T sqrt(scale), times log2 e but for
                                 // kElu
  const Acc* rows_ = nullptr;    // (padded m, padded d), for the backward: omega sqrt(scale)
  Acc scale_ = 1;
  Acc norm_factor_ = 0;  // beta scale log2 e
};

}  // namespace dijiang::cpu::DIJIANG_ISA
