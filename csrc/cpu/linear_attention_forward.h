// The forward of linear attention for one task: docs/numerics.md, "Chunks" and "Blocks".
#pragma once

#include "cpu/key_walk.h"

namespace dijiang::cpu::DIJIANG_ISA {

// A row whose denominator is at least this, relative to its own scale, lost nothing that matters.
inline constexpr double kSafeDenominator = 0x1p-60;

template <typename Acc>
bool all_finite(const Acc* x, int64_t count) {
  Vec<Acc> zero{};
  for (int64_t i = 0; i < count; i += kLanes<Acc>) zero += load(x + i) * Acc(0);
  return horizontal_sum<Acc>(zero) == 0;
}

// out, row_scale and row_sum of rows (batch, head, token) from `first` on, from num (rows, stride)
// and den, both times 2^-scale. den and scale end in whole vectors; num is overwritten.
template <typename Acc>
void write_rows(const LinearAttentionParams& p, int64_t first, int64_t rows, const Acc* scale,
                const Acc* den, Acc* num, int64_t stride) {
  constexpr int64_t L = kLanes<Acc>;
  const auto put = [&](void* target, int64_t row, int64_t n, Vec<Acc> x) {
    if (target != nullptr) std::memcpy(static_cast<Acc*>(target) + row, &x, n * sizeof(Acc));
  };
  for (int64_t t = 0; t < rows; t += L) {
    const int64_t n = rows - t < L ? rows - t : L;
    Vec<Acc> row_scale{}, row_sum = broadcast(Acc(1));
    Acc inverse[L];
    if (p.normalize) {
      const Vec<Acc> r = load(scale + t);
      Vec<Acc> d = load(den + t);
      if (p.eps > 0) d += scale_by<Acc>(broadcast(static_cast<Acc>(p.eps)), -r);
      store(inverse, d == 0 ? Vec<Acc>{} : Acc(1) / d);
      // den's exponent moves into the scale, unless that is too large to take it.
      const Vec<Acc> exponent = exponent_of<Acc>(d, Acc(1)) - Acc(1), moved = r + exponent;
      const auto exact = moved - r == exponent;
      row_scale = exact ? moved : r;
      row_sum = exact ? scale_by<Acc>(d, -exponent) : d;
      row_scale = d == 0 ? Vec<Acc>{} : row_scale;
      row_sum = d == 0 ? broadcast(std::numeric_limits<Acc>::infinity()) : row_sum;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        inverse[i] = 1;
        Acc* row = num + (t + i) * stride;
        for (int64_t j = 0; j < stride; j += L) {
          store(row + j, scale_by<Acc>(load(row + j), broadcast(scale[t + i])));
        }
      }
    }
    put(p.row_scale, first + t, n, row_scale);
    put(p.row_sum, first + t, n, row_sum);
    store_rows(p.dtype, p.out, (first + t) * p.headdim_v, n, p.headdim_v, num + t * stride, stride,
               inverse);
  }
}

template <typename Acc>
class LinearAttentionForward {
 public:
  explicit LinearAttentionForward(const LinearAttentionParams& params)
      : p_(params), walk_(params, scratch_) {
    near_stride_ = padded<Acc>(p_.sinks + p_.cache.most + 2 * p_.window);
    q_ = scratch_.take<Acc>(kTile * walk_.dp);
    scaled_q_ = scratch_.take<Acc>(kTile * walk_.dp);
    near_ = scratch_.take<Acc>(kTile * near_stride_);
    far_ = scratch_.take<Acc>(kTile * kTile);
    b_ = scratch_.take<Acc>(kTile * walk_.mp);
    fq_ = scratch_.take<Acc>(kTile * walk_.mp);
    num_ = scratch_.take<Acc>(kTile * walk_.vp);
    fq_maps_ = new (scratch_.take<Features<Acc>>(walk_.groups)) Features<Acc>[walk_.groups];
    for (int64_t g = 0; g < walk_.groups; ++g) {
      fq_maps_[g].allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fq.dct);
    }
  }

  // final.length is left to the caller.
  void run(const AttentionPiece& piece, const AttentionState& initial,
           const AttentionState& final) {
    walk_.begin(piece, initial);
    for (int64_t g = 0; g < walk_.groups; ++g) {
      const Features<Acc>* before = g > 0 ? &fq_maps_[g - 1] : nullptr;
      fq_maps_[g].set(p_.fq, query_head(g), p_.scale, true, before);
    }
    while (walk_.next()) {
      if (!walk_.wanted()) continue;
      values_finite_ = all_finite(walk_.tile_values, walk_.rows * walk_.vp);
      for (int64_t g = 0; g < walk_.groups; ++g) {
        dispatch_given(p_.kind, [&](auto given) { head_tile<given.value>(g); });
      }
    }
    if (walk_.whole()) walk_.finish(final);
  }

  const KeyWalk<Acc>& walk() const { return walk_; }

 private:
  int64_t query_head(int64_t g) const { return walk_.head * walk_.groups + g; }

  template <bool kGiven>
  void head_tile(int64_t g) {
    const int64_t rows = walk_.rows, dp = walk_.dp;
    load_tile(p_.dtype, p_.q, walk_.batch, query_head(g), walk_.token, rows, p_.headdim, q_, dp);
    if (walk_.has_far) fq_maps_[g].exponents(q_, rows, b_);
    near_scores();
    for (int64_t t = 0; t < rows; ++t) set_scale<kGiven>(t);
    weigh_near();
    if (walk_.has_far) weigh_far<kGiven>();
    for (int64_t t = 0; t < rows; ++t) {
      const bool safe = !walk_.intra || den_[t] >= Acc(kSafeDenominator);
      if (!safe && scale_[t] > Acc(kEmptyLogScale)) exact_row<kGiven>(t);
    }
    const int64_t first = (walk_.batch * p_.num_heads + query_head(g)) * p_.seqlen + walk_.token;
    write_rows(p_, first, rows, scale_, den_, num_, walk_.vp);
  }

  // near_ = q.k scale log2 e, kept keys first, then the window.
  void near_scores() {
    const int64_t rows = walk_.rows, dp = walk_.dp;
    if (walk_.near_columns() == 0) return;
    const Acc factor = static_cast<Acc>(p_.scale * kLog2E);
    for (int64_t i = 0; i < rows * dp; ++i) scaled_q_[i] = q_[i] * factor;
    gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(
        rows, walk_.kept_columns, dp, scaled_q_, dp, walk_.kept_keys, dp, near_, near_stride_);
    gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(
        rows, walk_.window_columns, dp, scaled_q_, dp, walk_.window_keys, dp,
        near_ + walk_.kept_columns, near_stride_, {Causal::kResult, walk_.window_first()});
  }

  // r_t, a whole exponent above every term of row t.
  template <bool kGiven>
  void set_scale(int64_t t) {
    using F = FeatureOf<Acc, kGiven>;
    const Acc* near = near_ + t * near_stride_;
    Acc top = std::ceil(row_max(near, walk_.visible(t), static_cast<Acc>(kEmptyLogScale)));
    if (p_.normalize && p_.eps > 0) {
      const Acc eps_scale = static_cast<Acc>(std::ceil(std::log2(p_.eps)));
      top = eps_scale > top ? eps_scale : top;
    }
    if (walk_.has_far) {
      const Acc* scale = walk_.intra ? walk_.top : walk_.state.log_scale;
      const Acc decay = walk_.intra ? Acc(0) : Decay<Acc>(walk_.decay_to(t)).whole;
      Vec<Acc> far = broadcast(static_cast<Acc>(kEmptyLogScale));
      for (int64_t i = 0; i < walk_.mp; i += kLanes<Acc>) {
        const Vec<Acc> b = load(b_ + t * walk_.mp + i);
        far = max(far, (kGiven ? F::exponent(b) : b) + load(scale + i));  // scale is whole
      }
      const Acc far_top = std::ceil(horizontal_max<Acc>(far)) + decay;
      top = far_top > top ? far_top : top;
    }
    scale_[t] = top;
  }

  // num and den of the near keys; the far keys' are added to them.
  void weigh_near() {
    const int64_t rows = walk_.rows, vp = walk_.vp, columns = walk_.near_columns();
    num_empty_ = columns == 0 && walk_.intra;
    if (!num_empty_) fill(num_, rows * vp, Acc(0));
    for (int64_t t = 0; t < rows; ++t) {
      Acc* row = near_ + t * near_stride_;
      const int64_t visible = walk_.visible(t);
      const Vec<Acc> shift = broadcast(-scale_[t]);
      for (int64_t s = 0; s < visible; s += kLanes<Acc>) {
        store(row + s, exp2_scaled<Acc>(load(row + s), shift));
      }
      fill(row + visible, near_stride_ - visible, Acc(0));
      den_[t] = row_sum(row, visible);
      walk_.vote(row, den_[t]);
    }
    if (columns == 0) return;
    multiply_visible(near_, near_stride_, walk_.kept_columns, 0, walk_.kept_values, {});
    multiply_visible(near_, near_stride_, walk_.window_columns, walk_.kept_columns,
                     walk_.window_values, {Causal::kLeft, walk_.window_first()});
  }

  // num += weights[:, first : first + count] values. A value that is not finite must not reach the
  // rows that do not see it: 0 times it is not 0.
  void multiply_visible(const Acc* weights, int64_t stride, int64_t count, int64_t first,
                        const Acc* values, Causal causal) {
    const int64_t vp = walk_.vp;
    if (values_finite_ && num_empty_) {
      gemm<Operand::kPlain, Operand::kPlain, Result::kAssign>(
          walk_.rows, vp, count, weights + first, stride, values, vp, num_, vp, causal);
      num_empty_ = false;
      return;
    }
    if (num_empty_) fill(num_, walk_.rows * vp, Acc(0));
    num_empty_ = false;
    if (values_finite_) {
      gemm<Operand::kPlain, Operand::kPlain>(walk_.rows, vp, count, weights + first, stride, values,
                                             vp, num_, vp, causal);
      return;
    }
    for (int64_t t = 0; t < walk_.rows; ++t) {
      int64_t visible = (weights == far_ ? t + 1 : walk_.visible(t)) - first;
      visible = visible < count ? visible : count;
      gemm<Operand::kPlain, Operand::kPlain>(1, vp, visible < 0 ? 0 : visible,
                                             weights + t * stride + first, stride, values, vp,
                                             num_ + t * vp, vp);
    }
  }

  template <bool kGiven>
  void weigh_far() {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    const int64_t rows = walk_.rows, mp = walk_.mp, vp = walk_.vp;
    const Acc* scale = walk_.intra ? walk_.top : walk_.state.log_scale;
    const Acc* state = walk_.intra ? walk_.chunk_kv : walk_.state.kv;
    const Acc* state_z = walk_.intra ? walk_.chunk_z : walk_.state.z;
    if (walk_.intra) {
      for (int64_t t = 0; t < rows; ++t) {
        const Vec<Acc> r = broadcast(scale_[t]);
        Vec<Acc> sum{};
        for (int64_t i = 0; i < mp; i += L) {
          const Vec<Acc> f = F::scaled(load(b_ + t * mp + i), load(scale + i), -r);
          store(fq_ + t * mp + i, f);
          sum = multiply_add(f, load(state_z + i), sum);
        }
        if (!walk_.has_decay) den_[t] += horizontal_sum<Acc>(sum);
      }
      gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(
          rows, rows, mp, fq_, mp, walk_.fk, mp, far_, kTile, {Causal::kResult, 0});
      for (int64_t t = 0; t < rows; ++t) {
        Acc* row = far_ + t * kTile;
        for (int64_t s = 0; walk_.has_decay && s <= t; ++s) row[s] *= walk_.mask[t * kTile + s];
        fill(row + t + 1, kTile - t - 1, Acc(0));
        den_[t] += row_sum(row, t + 1);
      }
      multiply_visible(far_, kTile, rows, 0, walk_.tile_values, {Causal::kLeft, 0});
    }
    // The state's decay is the row's; without one fq_ and den_ already hold what is read.
    for (int64_t t = 0; t < rows && (walk_.has_decay || !walk_.intra); ++t) {
      const Decay<Acc> decay(walk_.decay_to(t), -scale_[t]);
      const Vec<Acc> shift = broadcast(decay.whole), fraction = broadcast(decay.fraction);
      Vec<Acc> sum{};
      for (int64_t i = 0; i < mp; i += L) {
        const Vec<Acc> f = F::scaled(load(b_ + t * mp + i), load(scale + i), shift) * fraction;
        store(fq_ + t * mp + i, f);
        sum = multiply_add(f, load(state_z + i), sum);
      }
      den_[t] += horizontal_sum<Acc>(sum);
    }
    gemm<Operand::kPlain, Operand::kPlain>(rows, vp, mp, fq_, mp, state, vp, num_, vp);
  }

  // Row t alone, term by term: a later key of the chunk, or the state's past before a strong
  // decay, is so large that the row's own terms vanished beside it.
  template <bool kGiven>
  void exact_row(int64_t t) {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    const int64_t mp = walk_.mp, vp = walk_.vp, dp = walk_.dp;
    const Acc* b = b_ + t * mp;
    Acc top = static_cast<Acc>(kEmptyLogScale);
    if (p_.normalize && p_.eps > 0) top = static_cast<Acc>(std::ceil(std::log2(p_.eps)));

    Acc* near = near_ + t * near_stride_;
    const int64_t visible = walk_.visible(t);
    // As near_scores, to the same bits: without a window the near keys are sinks.
    gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(
        1, visible, dp, scaled_q_ + t * dp, dp, walk_.kept_keys, dp, near, near_stride_);
    top = std::ceil(row_max(near, visible, top));
    const Decay<Acc> state_decay(walk_.decay_to(t));
    for (int64_t s = -1; s <= t; ++s) {  // -1: the state
      const Acc decay = s < 0 ? state_decay.whole : Decay<Acc>(walk_.decay_between(s, t)).whole;
      Vec<Acc> largest = broadcast(static_cast<Acc>(kEmptyLogScale));
      for (int64_t i = 0; i < mp; i += L) {
        const Vec<Acc> key =
            s < 0 ? load(walk_.state.log_scale + i) : F::exponent(load(walk_.a + s * mp + i));
        largest = max(largest, F::exponent(load(b + i)) + key + decay);
      }
      const Acc far_top = horizontal_max<Acc>(largest);
      top = far_top > top ? far_top : top;
    }
    scale_[t] = top;

    Acc den = 0;
    Acc* num = num_ + t * vp;
    fill(num, vp, Acc(0));
    const auto add = [&](Acc weight, const Acc* value) {
      for (int64_t j = 0; j < vp; ++j) num[j] += weight * value[j];
    };
    for (int64_t s = 0; s < visible; ++s) {
      const Acc weight = exp2_scaled_one(near[s], -top);
      den += weight;
      add(weight, walk_.kept_values + s * vp);
    }
    for (int64_t s = 0; s <= t; ++s) {
      const Decay<Acc> decay(walk_.decay_between(s, t), -top);
      const Vec<Acc> shift = broadcast(decay.whole);
      Vec<Acc> sum{};
      for (int64_t i = 0; i < mp; i += L) {
        sum += F::product(load(b + i), load(walk_.a + s * mp + i), shift);
      }
      const Acc weight = horizontal_sum<Acc>(sum) * decay.fraction;
      den += weight;
      add(weight, walk_.tile_values + s * vp);
    }
    const Decay<Acc> past(walk_.decay_to(t), -top);
    for (int64_t i = 0; i < mp; i += L) {
      const Vec<Acc> scale = load(walk_.state.log_scale + i);
      const Vec<Acc> f =
          F::scaled(load(b + i), scale, broadcast(past.whole)) * broadcast(past.fraction);
      for (int64_t l = 0; l < L; ++l) {
        den += f[l] * walk_.state.z[i + l];
        add(f[l], walk_.state.kv + (i + l) * vp);
      }
    }
    den_[t] = den;
  }

  const LinearAttentionParams& p_;
  Scratch scratch_;
  KeyWalk<Acc> walk_;
  Features<Acc>* fq_maps_ = nullptr;
  int64_t near_stride_ = 0;
  bool values_finite_ = true;  // of the tile's own values
  bool num_empty_ = true;      // nothing was written to num_ yet
  Acc* q_ = nullptr;           // (rows, dp)
  Acc* scaled_q_ = nullptr;    // q scale log2 e
  Acc* near_ = nullptr;        // (rows, near_stride): scores, then weights
  Acc* far_ = nullptr;         // (rows, kTile): weights of the tile's far keys
  Acc* b_ = nullptr;           // (rows, mp): exponents
  Acc* fq_ = nullptr;
  Acc* num_ = nullptr;  // (rows, vp)
  Acc den_[kTile] = {};
  Acc scale_[kTile] = {};  // r
};

}  // namespace dijiang::cpu::DIJIANG_ISA
