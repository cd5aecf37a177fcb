// The half of the backward that walks forward in time: gradients of the queries and their feature
// parameters, and of the sinks that lie outside the window. docs/numerics.md, "Backward".
#pragma once

#include "cpu/backward_maps.h"
#include "cpu/key_walk.h"
#include "cpu/query_tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class BackwardQueries {
 public:
  BackwardQueries(const LinearAttentionBackwardParams& params, BackwardCounts counts,
                  const BackwardMaps<Acc>& maps)
      : params_(params),
        p_(params.forward),
        workspace_(params, counts),
        maps_(maps),
        walk_(p_, scratch_) {
    const int64_t mp = walk_.mp, dp = walk_.dp, vp = walk_.vp;
    near_stride_ = padded<Acc>(p_.sinks + p_.cache.most + 2 * p_.window);
    queries_.allocate(scratch_, dp, vp, mp);
    weights_ = scratch_.take<Acc>(kTile * near_stride_);
    grad_weights_ = scratch_.take<Acc>(kTile * near_stride_);
    far_ = scratch_.take<Acc>(kTile * kTile);
    weighed_grad_ = scratch_.take<Acc>(kTile * vp);
    db_ = scratch_.take<Acc>(kTile * mp);
    dq_ = scratch_.take<Acc>(kTile * dp);
    sink_dk_ = scratch_.take<Acc>(p_.sinks * dp);
    sink_dv_ = scratch_.take<Acc>(p_.sinks * vp);
    sums_ = new (scratch_.take<FeatureSums<Acc>>(walk_.groups)) FeatureSums<Acc>[walk_.groups];
    for (int64_t g = 0; g < walk_.groups; ++g) {
      sums_[g].allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fq.dct);
    }
  }

  void run(const BackwardPiece& piece) {
    walk_.begin(piece, p_.initial);
    for (int64_t g = 0; g < walk_.groups; ++g) {
      sums_[g].begin(workspace_.query_row(piece.slot, g), params_.grad_fq);
    }
    fill(sink_dk_, p_.sinks * walk_.dp, Acc(0));
    fill(sink_dv_, p_.sinks * walk_.vp, Acc(0));
    while (walk_.next()) {
      if (!walk_.wanted()) continue;
      for (int64_t t = 0; t < walk_.rows; ++t) decay_[t] = 0;
      for (int64_t g = 0; g < walk_.groups; ++g) {
        dispatch_given(p_.kind, [&](auto given) { head_tile<given.value>(g); });
      }
      if (p_.log_decay == nullptr) continue;
      double* decay = workspace_.query_decay(walk_.batch, walk_.head) + walk_.token;
      for (int64_t t = 0; t < walk_.rows; ++t) decay[t] = decay_[t];
    }
    for (int64_t g = 0; g < walk_.groups; ++g) sums_[g].finish(p_.scale);
    double* sinks = workspace_.query_sinks(piece.slot);
    for (int64_t s = 0; s < p_.sinks; ++s) {
      for (int64_t j = 0; j < p_.headdim; ++j) *sinks++ = sink_dk_[s * walk_.dp + j];
    }
    for (int64_t s = 0; s < p_.sinks; ++s) {
      for (int64_t j = 0; j < p_.headdim_v; ++j) *sinks++ = sink_dv_[s * walk_.vp + j];
    }
  }

 private:
  int64_t query_head(int64_t g) const { return walk_.head * walk_.groups + g; }

  template <bool kGiven>
  void head_tile(int64_t g) {
    const int64_t rows = walk_.rows, dp = walk_.dp, head = query_head(g);
    queries_.load(params_, maps_.query(g), walk_.batch, head, walk_.token, rows);
    fill(dq_, rows * dp, Acc(0));
    near();
    if (walk_.has_far) {
      if (walk_.intra) {
        chunk<kGiven>();
      } else {
        past<kGiven>();
      }
      maps_.query(g).backward(queries_.q, rows, db_, queries_.plain, dq_, sums_[g]);
    }
    const int64_t first = (walk_.batch * p_.num_heads + head) * p_.seqlen + walk_.token;
    store_tile(p_.dtype, params_.grad_q, first * p_.headdim, rows, p_.headdim, dq_, dp);
  }

  void near() {
    const int64_t rows = walk_.rows, dp = walk_.dp, vp = walk_.vp, stride = near_stride_;
    const int64_t sinks = walk_.sink_columns, kept = walk_.kept_columns;
    const int64_t window = walk_.window_columns;
    if (kept + window == 0) return;
    constexpr Operand kPlain = Operand::kPlain, kTransposed = Operand::kTransposed;
    constexpr Result kAssign = Result::kAssign;
    const Causal wanted{Causal::kResult, walk_.window_first()};
    const Causal lower{Causal::kLeft, walk_.window_first()};
    gemm<kPlain, kTransposed, kAssign>(rows, kept, dp, queries_.scaled_q, dp, walk_.kept_keys, dp,
                                       weights_, stride);
    gemm<kPlain, kTransposed, kAssign>(rows, window, dp, queries_.scaled_q, dp, walk_.window_keys,
                                       dp, weights_ + kept, stride, wanted);
    gemm<kPlain, kTransposed, kAssign>(rows, kept, vp, queries_.grad, vp, walk_.kept_values, vp,
                                       grad_weights_, stride);
    gemm<kPlain, kTransposed, kAssign>(rows, window, vp, queries_.grad, vp, walk_.window_values, vp,
                                       grad_weights_ + kept, stride, wanted);
    for (int64_t t = 0; t < rows; ++t) {
      Acc* weight = weights_ + t * stride;
      Acc* grad = grad_weights_ + t * stride;
      const int64_t visible = walk_.visible(t);
      const Vec<Acc> shift = broadcast(-queries_.scale[t]);
      const Acc factor = static_cast<Acc>(p_.scale);
      for (int64_t s = 0; s < visible; s += kLanes<Acc>) {
        const Vec<Acc> weighed = exp2_scaled<Acc>(load(weight + s), shift) * queries_.inverse[t];
        store(weight + s, weighed);
        store(grad + s, weighed * (load(grad + s) - queries_.delta[t]) * factor);
      }
      fill(weight + visible, stride - visible, Acc(0));
      fill(grad + visible, stride - visible, Acc(0));
    }
    gemm<kPlain, kPlain>(rows, dp, kept, grad_weights_, stride, walk_.kept_keys, dp, dq_, dp);
    gemm<kPlain, kPlain>(rows, dp, window, grad_weights_ + kept, stride, walk_.window_keys, dp, dq_,
                         dp, lower);
    gemm<kTransposed, kPlain>(sinks, dp, rows, grad_weights_, stride, queries_.q, dp, sink_dk_, dp);
    gemm<kTransposed, kPlain>(sinks, vp, rows, weights_, stride, queries_.grad, vp, sink_dv_, vp);
  }

  // Far keys in the state alone: db_i = f_i (kv_i . do - delta z_i).
  template <bool kGiven>
  void past() {
    const int64_t rows = walk_.rows, mp = walk_.mp;
    Acc shift[kTile] = {}, factor[kTile] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const Decay<Acc> decay(walk_.decay_to(t), -queries_.scale[t]);
      shift[t] = decay.whole;
      factor[t] = decay.fraction * queries_.inverse[t];
    }
    add_state<Result::kAssign>(walk_.state.kv, walk_.state.z, factor);
    for (int64_t t = 0; t < rows; ++t) {
      multiply_features<kGiven>(t, queries_.b + t * mp, walk_.state.log_scale, shift[t]);
    }
  }

  // db = or += factor (kv . do - delta z)
  template <Result kResult>
  void add_state(const Acc* kv, const Acc* z, const Acc* factor) {
    const int64_t rows = walk_.rows, mp = walk_.mp, vp = walk_.vp;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t j = 0; j < vp; ++j) {
        weighed_grad_[t * vp + j] = factor[t] * queries_.grad[t * vp + j];
      }
    }
    gemm<Operand::kPlain, Operand::kTransposed, kResult>(rows, mp, vp, weighed_grad_, vp, kv, vp,
                                                         db_, mp);
    for (int64_t t = 0; t < rows; ++t) {
      const Vec<Acc> weight = broadcast(-factor[t] * queries_.delta[t]);
      for (int64_t i = 0; i < mp; i += kLanes<Acc>) {
        Acc* at = db_ + t * mp + i;
        store(at, multiply_add(weight, load(z + i), load(at)));
      }
    }
  }

  // db *= phi 2^(scale + shift), and d c_t. Of a feature given, db becomes the gradient of the
  // feature itself, so that a feature 0 has its gradient.
  template <bool kGiven>
  void multiply_features(int64_t t, const Acc* b, const Acc* scale, Acc shift) {
    using F = FeatureOf<Acc, kGiven>;
    Acc* row = db_ + t * walk_.mp;
    Vec<Acc> sum{};
    for (int64_t i = 0; i < walk_.mp; i += kLanes<Acc>) {
      if constexpr (kGiven) {
        const Vec<Acc> d = scale_by<Acc>(load(row + i), load(scale + i) + shift);
        store(row + i, d);
        sum = multiply_add(d, load(b + i), sum);
      } else {
        const Vec<Acc> d =
            load(row + i) * F::scaled(load(b + i), load(scale + i), broadcast(shift));
        store(row + i, d);
        sum += d;
      }
    }
    decay_[t] += horizontal_sum<Acc>(sum);
  }

  // Without a window: the tile's own keys and the state before it.
  template <bool kGiven>
  void chunk() {
    const int64_t rows = walk_.rows, mp = walk_.mp, vp = walk_.vp;
    const bool spread = kGiven && chunk_spreads();
    Acc factor[kTile] = {};
    bool exact[kTile];
    gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(rows, rows, vp, queries_.grad, vp,
                                                                 walk_.tile_values, vp, far_, kTile,
                                                                 {Causal::kResult, 0});
    for (int64_t t = 0; t < rows; ++t) {
      factor[t] = std::exp2(static_cast<Acc>(walk_.decay_to(t))) * queries_.inverse[t];
      Acc* row = far_ + t * kTile;
      for (int64_t s = 0; s <= t; ++s) row[s] = (row[s] - queries_.delta[t]) * queries_.inverse[t];
      fill(row + t + 1, kTile - t - 1, Acc(0));
      exact[t] = spread || too_large<kGiven>(t);
      if (exact[t] || !walk_.has_decay) continue;
      for (int64_t s = 0; s <= t; ++s) row[s] *= walk_.mask[t * kTile + s];
    }
    gemm<Operand::kPlain, Operand::kPlain, Result::kAssign>(rows, mp, rows, far_, kTile, walk_.fk,
                                                            mp, db_, mp, {Causal::kLeft, 0});
    add_state<Result::kAdd>(walk_.chunk_kv, walk_.chunk_z, factor);
    for (int64_t t = 0; t < rows; ++t) {
      if (exact[t]) {
        exact_row<kGiven>(t);
      } else {
        multiply_features<kGiven>(t, queries_.b + t * mp, walk_.top, -queries_.scale[t]);
      }
    }
  }

  // Whether a feature's keys in the tile and the state lie so far apart that fk lost some of them.
  bool chunk_spreads() const {
    using F = FeatureOf<Acc, true>;
    const Vec<Acc> empty = broadcast(static_cast<Acc>(kEmptyLogScale / 2));
    for (int64_t i = 0; i < walk_.mp; i += kLanes<Acc>) {
      const Vec<Acc> top = load(walk_.top + i), old = load(walk_.state.log_scale + i);
      Vec<Acc> low = old > empty ? old : top;
      for (int64_t s = 0; s < walk_.rows; ++s) {
        const Vec<Acc> e = F::exponent(load(walk_.a + s * walk_.mp + i));
        low = min(low, e > empty ? e : top);
      }
      if (horizontal_max<Acc>(top - low) > Acc(kLargestExponent)) return true;
    }
    return false;
  }

  template <bool kGiven>
  bool too_large(int64_t t) const {
    using F = FeatureOf<Acc, kGiven>;
    Vec<Acc> top = broadcast(static_cast<Acc>(kEmptyLogScale));
    for (int64_t i = 0; i < walk_.mp; i += kLanes<Acc>) {
      top = max(top, F::exponent(load(queries_.b + t * walk_.mp + i)) + load(walk_.top + i));
    }
    return horizontal_max<Acc>(top) - queries_.scale[t] > Acc(kLargestExponent);
  }

  // Row t alone, term by term.
  template <bool kGiven>
  void exact_row(int64_t t) {
    using F = FeatureOf<Acc, kGiven>;
    const int64_t mp = walk_.mp, vp = walk_.vp;
    const Acc* b = queries_.b + t * mp;
    const Acc* grad = queries_.grad + t * vp;
    const Decay<Acc> past(walk_.decay_to(t), -queries_.scale[t]);
    Decay<Acc> decay[kTile];
    for (int64_t s = 0; s <= t; ++s) {
      decay[s] = Decay<Acc>(walk_.decay_between(s, t), -queries_.scale[t]);
    }
    Vec<Acc> sum{};
    for (int64_t i = 0; i < mp; i += kLanes<Acc>) {
      const Vec<Acc> bi = load(b + i);
      Vec<Acc> d{}, given{};  // given: without the factor b
      for (int64_t s = 0; s <= t; ++s) {
        const Vec<Acc> shift = broadcast(decay[s].whole);
        const Vec<Acc> weight = broadcast(far_[t * kTile + s] * decay[s].fraction);
        const Vec<Acc> a = load(walk_.a + s * mp + i);
        d += F::product(bi, a, shift) * weight;
        if constexpr (kGiven) given += F::scaled(a, shift) * weight;
      }
      const Vec<Acc> scale = load(walk_.state.log_scale + i);
      const Vec<Acc> shift = broadcast(past.whole);
      Vec<Acc> read;
      for (int64_t l = 0; l < kLanes<Acc>; ++l) {
        const Acc* kv = walk_.state.kv + (i + l) * vp;
        Acc dot = -queries_.delta[t] * walk_.state.z[i + l];
        for (int64_t j = 0; j < vp; ++j) dot += kv[j] * grad[j];
        read[l] = dot * past.fraction * queries_.inverse[t];
      }
      d += F::scaled(bi, scale, shift) * read;
      if constexpr (kGiven) given += scale_by<Acc>(read, scale + shift);
      store(db_ + t * mp + i, kGiven ? given : d);
      sum += d;
    }
    decay_[t] += horizontal_sum<Acc>(sum);
  }

  const LinearAttentionBackwardParams& params_;
  const LinearAttentionParams& p_;
  const BackwardWorkspace workspace_;
  const BackwardMaps<Acc>& maps_;
  Scratch scratch_;
  KeyWalk<Acc> walk_;
  QueryTile<Acc> queries_;
  FeatureSums<Acc>* sums_ = nullptr;
  int64_t near_stride_ = 0;
  Acc* weights_ = nullptr;       // (rows, near_stride): P
  Acc* grad_weights_ = nullptr;  // dS scale
  Acc* far_ = nullptr;           // (rows, kTile): W
  Acc* weighed_grad_ = nullptr;  // (rows, vp)
  Acc* db_ = nullptr;            // (rows, mp)
  Acc* dq_ = nullptr;            // (rows, dp)
  Acc* sink_dk_ = nullptr;       // (sinks, dp)
  Acc* sink_dv_ = nullptr;       // (sinks, vp)
  double decay_[kTile] = {};     // d c_t
};

}  // namespace dijiang::cpu::DIJIANG_ISA
