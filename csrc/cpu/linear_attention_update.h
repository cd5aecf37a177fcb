// One token of decoding, in place: docs/numerics.md with chunks of one token, read from and written
// to the state where it lies. A token that folds a block (one in `window`) goes through the
// forward.
#pragma once

#include "cpu/linear_attention_forward.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class LinearAttentionUpdate {
 public:
  explicit LinearAttentionUpdate(const LinearAttentionParams& params)
      : p_(params),
        groups_(p_.num_heads / p_.num_kv_heads),
        dp_(padded<Acc>(p_.headdim)),
        vp_(padded<Acc>(p_.headdim_v)),
        mp_(padded<Acc>(p_.num_features)),
        near_stride_(padded<Acc>(p_.sinks + p_.cache.most + 2 * p_.window)),
        has_decay_(p_.num_features > 0 && p_.log_decay != nullptr) {
    q_ = scratch_.take<Acc>(groups_ * dp_);
    key_ = scratch_.take<Acc>(dp_);
    value_ = scratch_.take<Acc>(vp_);
    row_ = scratch_.take<Acc>(dp_ > vp_ ? dp_ : vp_);
    near_ = scratch_.take<Acc>(groups_ * near_stride_);
    b_ = scratch_.take<Acc>(groups_ * mp_);
    a_ = scratch_.take<Acc>(mp_);
    log_scale_ = scratch_.take<Acc>(mp_);
    z_ = scratch_.take<Acc>(mp_);
    num_ = scratch_.take<Acc>(groups_ * vp_);
    den_ = scratch_.take<Acc>(padded<Acc>(groups_));
    scale_ = scratch_.take<Acc>(padded<Acc>(groups_));
    map_.allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fk.dct);
  }

  void run(int64_t task) {
    sequence_ = task / p_.num_kv_heads;
    head_ = task % p_.num_kv_heads;
    state_row_ = task;
    position_ = p_.final.length ? p_.final.length[sequence_] : 0;
    slots_ = p_.cache.of(head_);
    first_slot_ = p_.cache.slot(sequence_, head_, p_.num_kv_heads);
    hard_count_ = 0;
    for (const int64_t* held = p_.final.cache_position + first_slot_; hard_count_ < slots_;
         ++hard_count_) {
      if (held[hard_count_] < 0) break;
    }
    const int64_t w = p_.window;
    const bool leaves = w > 0 && position_ % w == 0 && position_ >= 2 * w;
    if (leaves && (p_.num_features > 0 || p_.cache.most > 0)) {
      if (forward_ == nullptr) forward_ = new (storage_) LinearAttentionForward<Acc>(p_);
      forward_->run({task}, p_.final, p_.final);
      return;
    }
    take_token();
    near();
    dispatch_given(p_.kind, [&](auto given) { far<given.value>(); });
    write_rows(p_, query_row(0), groups_, scale_, den_, num_, vp_);
  }

  ~LinearAttentionUpdate() {
    if (forward_) forward_->~LinearAttentionForward<Acc>();
  }
  LinearAttentionUpdate(const LinearAttentionUpdate&) = delete;
  LinearAttentionUpdate& operator=(const LinearAttentionUpdate&) = delete;

 private:
  int64_t query_head(int64_t g) const { return head_ * groups_ + g; }
  int64_t query_row(int64_t g) const { return sequence_ * p_.num_heads + query_head(g); }
  bool is_sink() const { return position_ < p_.sinks; }

  // Loads the token, and puts its key and value where the state holds near ones.
  void take_token() {
    const int64_t d = p_.headdim, dv = p_.headdim_v;
    load_tile(p_.dtype, p_.k, sequence_, head_, 0, 1, d, key_, dp_);
    load_tile(p_.dtype, p_.v, sequence_, head_, 0, 1, dv, value_, vp_);
    for (int64_t g = 0; g < groups_; ++g) {
      load_tile(p_.dtype, p_.q, sequence_, query_head(g), 0, 1, d, q_ + g * dp_, dp_);
    }
    log_decay_ = 0;
    if (has_decay_) {
      const int64_t i = sequence_ * p_.log_decay_stride_batch + head_ * p_.log_decay_stride_head;
      log_decay_ = static_cast<const Acc*>(p_.log_decay)[i];
    }
    if (p_.window > 0) {
      const int64_t slot = state_row_ * 2 * p_.window + position_ % (2 * p_.window);
      store_row(p_.dtype, p_.final.window_k, slot * d, d, key_);
      store_row(p_.dtype, p_.final.window_v, slot * dv, dv, value_);
      if (p_.final.window_decay) {
        static_cast<Acc*>(p_.final.window_decay)[slot] = static_cast<Acc>(log_decay_);
      }
    }
    if (p_.cache.most > 0) {
      Acc* sums = static_cast<Acc*>(p_.final.sums) + state_row_ * (d + dv);
      for (int64_t j = 0; j < d; ++j) sums[j] += key_[j];
      for (int64_t j = 0; j < dv; ++j) sums[d + j] += value_[j];
    }
    if (is_sink()) {
      const int64_t row = state_row_ * p_.sinks + position_;
      store_row(p_.dtype, p_.final.sink_k, row * d, d, key_);
      store_row(p_.dtype, p_.final.sink_v, row * dv, dv, value_);
    }
  }

  // Near positions: sinks before window_start(), then the window. body(column, buffer row).
  int64_t window_start() const {
    if (p_.window == 0) return position_ + 1;
    const int64_t block = position_ / p_.window;
    return block > 0 ? (block - 1) * p_.window : 0;
  }
  int64_t sink_columns() const { return p_.sinks < window_start() ? p_.sinks : window_start(); }
  int64_t kept_columns() const { return sink_columns() + hard_count_; }
  int64_t near_columns() const { return kept_columns() + (position_ + 1 - window_start()); }

  template <typename Body>
  void for_each_near(const void* sinks, const void* hard, const void* window, int64_t dim,
                     const Body& body) {
    const int64_t held = kept_columns(), start = window_start();
    for (int64_t s = 0; s < sink_columns(); ++s) {
      load_row(p_.dtype, sinks, (state_row_ * p_.sinks + s) * dim, 1, dim, row_);
      body(s);
    }
    for (int64_t i = 0; i < hard_count_; ++i) {
      load_row(p_.dtype, hard, (first_slot_ + i) * dim, 1, dim, row_);
      body(sink_columns() + i);
    }
    for (int64_t s = start; s <= position_; ++s) {
      const int64_t slot = state_row_ * 2 * p_.window + s % (2 * p_.window);
      load_row(p_.dtype, window, slot * dim, 1, dim, row_);
      body(held + s - start);
    }
  }

  // Scores of the near keys, and the row scales as far as these go.
  void near() {
    const Acc factor = static_cast<Acc>(p_.scale * kLog2E);
    for_each_near(p_.final.sink_k, p_.final.cache_k, p_.final.window_k, p_.headdim, [&](int64_t s) {
      for (int64_t g = 0; g < groups_; ++g) {
        near_[g * near_stride_ + s] = dot(q_ + g * dp_, row_, p_.headdim) * factor;
      }
    });
    for (int64_t g = 0; g < groups_; ++g) {
      const Acc* near = near_ + g * near_stride_;
      scale_[g] = std::ceil(row_max(near, near_columns(), static_cast<Acc>(kEmptyLogScale)));
      if (p_.normalize && p_.eps > 0) {
        const Acc eps_scale = static_cast<Acc>(std::ceil(std::log2(p_.eps)));
        scale_[g] = eps_scale > scale_[g] ? eps_scale : scale_[g];
      }
    }
  }

  void weigh_near() {
    fill(num_, groups_ * vp_, Acc(0));
    const int64_t columns = near_columns();
    for (int64_t g = 0; g < groups_; ++g) {
      Acc* near = near_ + g * near_stride_;
      for (int64_t s = 0; s < columns; s += kLanes<Acc>) {
        store(near + s, exp2_scaled<Acc>(load(near + s), broadcast(-scale_[g])));
      }
      fill(near + columns, near_stride_ - columns, Acc(0));
      den_[g] = row_sum(near, columns);
      if (p_.cache.most > 0 && position_ >= p_.window && den_[g] > 0) vote(near, den_[g]);
    }
    for_each_near(p_.final.sink_v, p_.final.cache_v, p_.final.window_v, p_.headdim_v,
                  [&](int64_t s) {
                    for (int64_t g = 0; g < groups_; ++g) {
                      const Acc weight = near_[g * near_stride_ + s];
                      for (int64_t j = 0; j < p_.headdim_v; ++j)
                        num_[g * vp_ + j] += weight * row_[j];
                    }
                  });
  }

  // As HardKeys::vote: the first slot's vote, then the block before.
  void vote(const Acc* near, Acc total) {
    const int64_t c = slots_, w = p_.window;
    Acc* votes =
        static_cast<Acc*>(p_.final.votes) + p_.cache.vote(sequence_, head_, p_.num_kv_heads, w);
    const Acc inverse = 1 / total;
    const Acc* weights = near + sink_columns();
    for (int64_t i = 0; i < hard_count_; ++i) votes[i] += weights[i] * inverse;
    for (int64_t r = 0; r < w; ++r) votes[c + r] += weights[hard_count_ + r] * inverse;
  }

  template <bool kGiven>
  void far() {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    const int64_t m = p_.num_features, dv = p_.headdim_v;
    if (m == 0) return weigh_near();
    Acc* kv = static_cast<Acc*>(p_.final.kv) + state_row_ * m * dv;
    Acc* z = static_cast<Acc*>(p_.final.z) + state_row_ * m;
    Acc* log_scale = static_cast<Acc*>(p_.final.log_scale) + state_row_ * m;
    fill(log_scale_, mp_, static_cast<Acc>(kEmptyLogScale));
    fill(z_, mp_, Acc(0));
    std::memcpy(log_scale_, log_scale, m * sizeof(Acc));
    std::memcpy(z_, z, m * sizeof(Acc));
    double since = 0;  // log2 of the decay from the state's time to the token
    if (p_.window == 0) {
      fold<kGiven>(kv);
      std::memcpy(log_scale, log_scale_, m * sizeof(Acc));
      std::memcpy(z, z_, m * sizeof(Acc));
    } else if (has_decay_ && p_.final.window_decay) {
      const Acc* decay = static_cast<const Acc*>(p_.final.window_decay);
      for (int64_t s = window_start(); s <= position_; ++s) {
        since += decay[state_row_ * 2 * p_.window + s % (2 * p_.window)] * kLog2E;
      }
    }

    for (int64_t g = 0; g < groups_; ++g) {
      map_.set(p_.fq, query_head(g), p_.scale, false);
      map_.exponents(q_ + g * dp_, 1, b_ + g * mp_);
      Vec<Acc> top = broadcast(scale_[g]);
      const Acc decay = Decay<Acc>(since).whole;
      for (int64_t i = 0; i < mp_; i += L) {
        top = max(top, F::exponent(load(b_ + g * mp_ + i)) + load(log_scale_ + i) + decay);
      }
      scale_[g] = horizontal_max<Acc>(top);
    }
    weigh_near();
    for (int64_t g = 0; g < groups_; ++g) {
      const Decay<Acc> decay(since, -scale_[g]);
      Acc* f = b_ + g * mp_;
      for (int64_t i = 0; i < mp_; i += L) {
        const Vec<Acc> weight =
            F::scaled(load(f + i), load(log_scale_ + i), broadcast(decay.whole));
        store(f + i, weight * broadcast(decay.fraction));
      }
      den_[g] += dot(f, z_, mp_);
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t g = 0; g < groups_; ++g) {
        const Acc weight = b_[g * mp_ + i];
        for (int64_t j = 0; j < dv; ++j) num_[g * vp_ + j] += weight * kv[i * dv + j];
      }
    }
  }

  // Without a window: the state decays by one token, and takes in the token's key.
  template <bool kGiven>
  void fold(Acc* kv) {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    const int64_t m = p_.num_features, dv = p_.headdim_v;
    map_.set(p_.fk, head_, p_.scale, false);
    map_.exponents(key_, 1, a_);
    if (is_sink()) fill(a_, mp_, F::none());
    const StateDecay<Acc> decay(log_decay_ * kLog2E);
    Acc factor[kLanes<Acc>], feature[kLanes<Acc>];
    for (int64_t i = 0; i < mp_; i += L) {
      const Vec<Acc> old = load(log_scale_ + i), a = load(a_ + i);
      Vec<Acc> decayed = old, fraction = broadcast(Acc(1));
      for (int64_t l = 0; l < L; ++l) {
        const typename StateDecay<Acc>::Step step = decay.of(old[l], z_[i + l]);
        decayed[l] = step.log_scale;
        fraction[l] = step.factor;
      }
      const Vec<Acc> scale = max(decayed, F::exponent(a));
      const Vec<Acc> kept = scale_by<Acc>(fraction, decayed - scale), f = F::scaled(a, -scale);
      store(log_scale_ + i, scale);
      store(z_ + i, load(z_ + i) * kept + f);
      store(factor, kept);
      store(feature, f);
      for (int64_t l = 0; l < L && i + l < m; ++l) {
        Acc* row = kv + (i + l) * dv;
        for (int64_t j = 0; j < dv; ++j) row[j] = row[j] * factor[l] + feature[l] * value_[j];
      }
    }
  }

  const LinearAttentionParams& p_;
  const int64_t groups_, dp_, vp_, mp_, near_stride_;
  const bool has_decay_;
  Scratch scratch_;
  Features<Acc> map_;
  alignas(LinearAttentionForward<Acc>) unsigned char storage_[sizeof(LinearAttentionForward<Acc>)];
  LinearAttentionForward<Acc>* forward_ = nullptr;  // in storage_, once a block folds

  int64_t sequence_ = 0, head_ = 0, state_row_ = 0, position_ = 0;
  int64_t slots_ = 0, first_slot_ = 0;  // the head's
  int64_t hard_count_ = 0;              // hard keys in them
  double log_decay_ = 0;                // natural, of the token
  Acc* q_ = nullptr;                    // (groups, dp)
  Acc* key_ = nullptr;
  Acc* value_ = nullptr;
  Acc* row_ = nullptr;        // one near key or value
  Acc* near_ = nullptr;       // (groups, near_stride)
  Acc* b_ = nullptr;          // (groups, mp)
  Acc* a_ = nullptr;          // (mp)
  Acc* log_scale_ = nullptr;  // (mp), padded copies of the state's
  Acc* z_ = nullptr;
  Acc* num_ = nullptr;    // (groups, vp)
  Acc* den_ = nullptr;    // (groups)
  Acc* scale_ = nullptr;  // (groups)
};

}  // namespace dijiang::cpu::DIJIANG_ISA
