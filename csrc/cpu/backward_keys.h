// The half of the backward that walks back in time: gradients of keys, values, their feature
// parameters and the initial state. docs/numerics.md, "Backward".
//
// Seen backwards, queries take the part of keys: 2^(b_ti - r_t) / den_t are the features that fold
// into a state (R, rho), and keys read it.
#pragma once

#include "cpu/backward_maps.h"
#include "cpu/far_state.h"
#include "cpu/hard_key_grads.h"
#include "cpu/query_tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class BackwardKeys {
 public:
  BackwardKeys(const LinearAttentionBackwardParams& params, BackwardCounts counts,
               const BackwardMaps<Acc>& maps)
      : params_(params),
        p_(params.forward),
        workspace_(params, counts),
        maps_(maps),
        groups_(p_.num_heads / p_.num_kv_heads),
        dp_(padded<Acc>(p_.headdim)),
        vp_(padded<Acc>(p_.headdim_v)),
        mp_(padded<Acc>(p_.num_features)),
        has_far_(p_.num_features > 0),
        has_decay_(has_far_ && p_.log_decay != nullptr) {
    // One tile a head without a window; with one, enough for three blocks where they are small.
    const int64_t tiles = p_.window > 0 ? (p_.window + kTile - 1) / kTile : 0;
    slots_ = tiles == 0 ? 1 : 3 * (tiles < 4 ? tiles : 4);
    const int64_t count = slots_ * groups_;
    tiles_ = new (scratch_.take<QueryTile<Acc>>(count)) QueryTile<Acc>[count];
    for (int64_t i = 0; i < count; ++i) tiles_[i].allocate(scratch_, dp_, vp_, mp_);
    keys_ = scratch_.take<Acc>(kTile * dp_);
    values_ = scratch_.take<Acc>(kTile * vp_);
    dk_ = scratch_.take<Acc>(kTile * dp_);
    dv_ = scratch_.take<Acc>(kTile * vp_);
    weights_ = scratch_.take<Acc>(kTile * kTile);
    grad_weights_ = scratch_.take<Acc>(kTile * kTile);
    if (p_.cache.most > 0) {
      hard_.allocate(scratch_, p_.cache.most, p_.window, dp_, vp_);
      block_decay_ = scratch_.take<double>(p_.seqlen / p_.window + 2);
    }
    if (!has_far_) return;
    sums_.allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fk.dct);
    future_.allocate(scratch_, mp_, vp_, true);
    a_ = scratch_.take<Acc>(kTile * mp_);
    plain_ = scratch_.take<Acc>(kTile * mp_);
    fk_ = scratch_.take<Acc>(kTile * mp_);
    fq_ = scratch_.take<Acc>(kTile * mp_);
    da_ = scratch_.take<Acc>(kTile * mp_);
    exact_ = scratch_.take<Acc>(kTile * mp_);
    turned_fk_ = scratch_.take<Acc>(mp_ * kTile);
    turned_values_ = scratch_.take<Acc>(vp_ * kTile);
    top_ = scratch_.take<Acc>(mp_);
    chunk_r_ = scratch_.take<Acc>(mp_ * vp_);
    chunk_rho_ = scratch_.take<Acc>(mp_);
    weighed_ = scratch_.take<Acc>(kTile * vp_);
    mask_ = scratch_.take<Acc>(kTile * kTile);
  }

  void run(const BackwardPiece& piece) {
    const Sequence tokens(p_, piece.task);
    sequence_ = tokens.index;
    batch_ = tokens.batch;
    head_ = piece.task % p_.num_kv_heads;
    begin_ = tokens.begin;
    end_ = tokens.end;
    piece_begin_ = begin_ + piece.begin;
    piece_end_ = piece.end < tokens.length() ? begin_ + piece.end : end_;
    first_position_ = tokens.first_position(p_);
    key_sinks_ = workspace_.key_sinks(piece.slot);
    for (int64_t i = 0; i < slots_ * groups_; ++i) tiles_[i].token = -1;
    if (p_.log_decay) {
      fill(workspace_.key_decay(batch_, head_) + piece_begin_, piece_end_ - piece_begin_, 0.0);
    }
    if (has_far_) {
      sums_.begin(workspace_.key_row(piece.slot), params_.grad_fk);
      begin_future(tokens.index);
    }
    dispatch_given(p_.kind, [&](auto given) {
      if (p_.window > 0) {
        run_blocks<given.value>();
      } else {
        run_chunks<given.value>();
      }
    });
    if (!has_far_) return;
    sums_.finish(p_.scale);
    if (piece_begin_ == begin_) write_initial(tokens.index);
  }

 private:
  // --- the state that runs back in time --------------------------------------------------------
  void begin_future(int64_t sequence) {
    future_.clear();
    if (params_.grad_final_kv == nullptr) return;
    const int64_t m = p_.num_features, dv = p_.headdim_v;
    const int64_t row = sequence * p_.num_kv_heads + head_;
    const auto at = [&](const void* x, int64_t i) { return static_cast<const Acc*>(x)[i]; };
    double decay = 0;  // d c of the last token
    for (int64_t i = 0; i < m; ++i) {
      const Acc scale = at(params_.final_log_scale, row * m + i);
      if (scale <= Acc(kEmptyLogScale)) continue;
      future_.log_scale[i] = -scale;
      future_.z[i] = 1;
      const Acc grad_z = at(params_.grad_final_z, row * m + i);
      future_.extra[i] = -grad_z;
      decay += static_cast<double>(grad_z) * at(params_.final_z, row * m + i);
      for (int64_t j = 0; j < dv; ++j) {
        const Acc grad = at(params_.grad_final_kv, (row * m + i) * dv + j);
        future_.kv[i * vp_ + j] = grad;
        decay += static_cast<double>(grad) * at(params_.final_kv, (row * m + i) * dv + j);
      }
    }
    const bool last = p_.log_decay && piece_end_ == end_ && end_ > begin_;
    if (last) workspace_.key_decay(batch_, head_)[end_ - 1] += decay;
  }

  void write_initial(int64_t sequence) {
    if (params_.grad_initial_kv == nullptr) return;
    const int64_t m = p_.num_features, dv = p_.headdim_v;
    const int64_t row = sequence * p_.num_kv_heads + head_;
    Acc* grad_kv = static_cast<Acc*>(params_.grad_initial_kv) + row * m * dv;
    Acc* grad_z = static_cast<Acc*>(params_.grad_initial_z) + row * m;
    const Acc* scale = static_cast<const Acc*>(p_.initial.log_scale);
    for (int64_t i = 0; i < m; ++i) {
      // With a window the state carries no gradient.
      const bool wanted = p_.window == 0 && scale && scale[row * m + i] > Acc(kEmptyLogScale);
      const Acc shift = wanted ? scale[row * m + i] + future_.log_scale[i] : Acc(0);
      const auto value = [&](Acc x) { return wanted ? scale_by_one(x, shift) : Acc(0); };
      for (int64_t j = 0; j < dv; ++j) grad_kv[i * dv + j] = value(future_.kv[i * vp_ + j]);
      grad_z[i] = value(-future_.extra[i]);
    }
  }

  double decay_at(int64_t t) const {
    if (!has_decay_) return 0;
    const int64_t i = batch_ * p_.log_decay_stride_batch + head_ * p_.log_decay_stride_head +
                      t * p_.log_decay_stride_seq;
    return static_cast<double>(static_cast<const Acc*>(p_.log_decay)[i]) * kLog2E;
  }
  double decay_sum(int64_t from, int64_t to) const {
    double sum = 0;
    for (int64_t t = from; has_decay_ && t < to; ++t) sum += decay_at(t);
    return sum;
  }

  // Folds the loaded queries into R; since: log2 of the decay between R's time and the tile.
  template <bool kGiven>
  void fold_queries(const QueryTile<Acc>& queries, double since) {
    Acc shift[kTile] = {}, factor[kTile] = {};
    for (int64_t t = 0; t < queries.rows; ++t) {
      const Decay<Acc> decay(since += decay_at(queries.token + t), -queries.scale[t]);
      shift[t] = decay.whole;
      factor[t] = decay.fraction * queries.inverse[t];
      if (factor[t] == 0) shift[t] = static_cast<Acc>(kEmptyLogScale);
    }
    future_.template fold<kGiven>(queries.rows, queries.b, shift, factor, queries.grad,
                                  queries.delta);
  }

  // A tile of one head's queries, loaded unless it still is.
  const QueryTile<Acc>& queries(int64_t g, int64_t token, int64_t rows) {
    int64_t slot = 0;
    if (p_.window > 0) {
      const int64_t position = position_of(token), w = p_.window;
      const int64_t tiles = (w + kTile - 1) / kTile;
      slot = (position / w * tiles + position % w / kTile) % slots_;
    }
    QueryTile<Acc>& tile = tiles_[slot * groups_ + g];
    if (tile.token != token) {
      tile.load(params_, maps_.query(g), batch_, head_ * groups_ + g, token, rows);
    }
    return tile;
  }

  // --- a tile of keys --------------------------------------------------------------------------
  int64_t position_of(int64_t token) const { return first_position_ + (token - begin_); }

  void load_keys(int64_t token, int64_t rows) {
    token_ = token;
    rows_ = rows;
    load_tile(p_.dtype, p_.k, batch_, head_, token, rows, p_.headdim, keys_, dp_);
    load_tile(p_.dtype, p_.v, batch_, head_, token, rows, p_.headdim_v, values_, vp_);
    for (int64_t s = 0; s < rows; ++s) {
      tokens_[s] = token + s;
      folds_[s] = !is_sink(s) && !taken_up(s);
    }
    begin_keys();
  }
  void begin_keys() {
    fill(dk_, rows_ * dp_, Acc(0));
    fill(dv_, rows_ * vp_, Acc(0));
    if (!has_far_) return;
    maps_.keys.exponents(keys_, rows_, a_, plain_);
    const Acc none = p_.kind == FeatureKind::kGiven ? Acc(0) : Acc(kLowestExponent);
    for (int64_t s = 0; s < rows_; ++s) {
      if (!folds_[s]) fill(a_ + s * mp_, mp_, none);
    }
  }
  bool is_sink(int64_t s) const { return position_of(tokens_[s]) < p_.sinks; }
  bool taken_up(int64_t s) const {
    return p_.cache.most > 0 && hard_.taken_up(position_of(tokens_[s]) % p_.window);
  }

  // da through the features.
  void far_gradients() {
    for (int64_t s = 0; s < rows_; ++s) {
      if (!folds_[s]) fill(da_ + s * mp_, mp_, Acc(0));
    }
    maps_.keys.backward(keys_, rows_, da_, plain_, dk_, sums_);
  }

  // Adds what came through the features, and writes the tile's gradients.
  void write_keys() {
    if (has_far_) far_gradients();
    for (int64_t s = 0; s < rows_; ++s) {
      if (!taken_up(s)) continue;
      hard_.add_taken_up(position_of(tokens_[s]) % p_.window, dk_ + s * dp_, dv_ + s * vp_);
    }
    for (int64_t s = 0; s < rows_ && is_sink(s); ++s) {
      const int64_t sink = position_of(token_ + s), d = p_.headdim, dv = p_.headdim_v;
      double* dk = key_sinks_ + sink * d;
      double* dvalue = key_sinks_ + p_.sinks * d + sink * dv;
      for (int64_t j = 0; j < d; ++j) dk[j] = dk_[s * dp_ + j];
      for (int64_t j = 0; j < dv; ++j) dvalue[j] = dv_[s * vp_ + j];
    }
    const int64_t first = (batch_ * p_.num_kv_heads + head_) * p_.seqlen + token_;
    store_tile(p_.dtype, params_.grad_k, first * p_.headdim, rows_, p_.headdim, dk_, dp_);
    store_tile(p_.dtype, params_.grad_v, first * p_.headdim_v, rows_, p_.headdim_v, dv_, vp_);
  }

  // da *= phi 2^scale, which features that are not given have in fk_; -d c_s. As
  // BackwardQueries::multiply_features.
  template <bool kGiven>
  void multiply_features(int64_t s, const Acc* scale, Acc shift) {
    Acc* row = da_ + s * mp_;
    Vec<Acc> sum{};
    for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
      if constexpr (kGiven) {
        const Vec<Acc> d = scale_by<Acc>(load(row + i), load(scale + i) + shift);
        store(row + i, d);
        sum = multiply_add(d, load(a_ + s * mp_ + i), sum);
      } else {
        const Vec<Acc> d = load(row + i) * load(fk_ + s * mp_ + i);
        store(row + i, d);
        sum += d;
      }
    }
    if (p_.log_decay) subtract_decay(s, horizontal_sum<Acc>(sum));
  }
  void subtract_decay(int64_t s, Acc sum) {
    if (p_.log_decay && folds_[s]) workspace_.key_decay(batch_, head_)[tokens_[s]] -= sum;
  }

  // da = factor_s (R . v - rho)
  void read_future(const Acc* r, const Acc* rho, const Acc* factor) {
    for (int64_t s = 0; s < rows_; ++s) {
      for (int64_t j = 0; j < vp_; ++j) weighed_[s * vp_ + j] = factor[s] * values_[s * vp_ + j];
    }
    gemm<Operand::kPlain, Operand::kTransposed, Result::kAssign>(rows_, mp_, vp_, weighed_, vp_, r,
                                                                 vp_, da_, mp_);
    for (int64_t s = 0; s < rows_; ++s) {
      const Vec<Acc> weight = broadcast(-factor[s]);
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        Acc* at = da_ + s * mp_ + i;
        store(at, multiply_add(weight, load(rho + i), load(at)));
      }
    }
  }

  // --- with a window ---------------------------------------------------------------------------
  template <bool kGiven>
  void run_blocks() {
    const int64_t w = p_.window;
    if (end_ == begin_) return;
    const int64_t last = position_of(end_ - 1) / w, first = first_position_ / w;
    if (p_.cache.most > 0) begin_hard(first, last);
    for (int64_t block = last; block >= first; --block) {
      const Tokens keys = tokens_of(block), next = tokens_of(block + 1);
      if (keys.end <= piece_begin_) return;
      if (has_far_) {
        // R moves back by a block, and takes in the queries that now see the keys as far.
        const Tokens far = tokens_of(block + 2);
        const double skipped = decay_sum(next.begin, next.end);
        future_.decay(skipped);
        for (int64_t g = 0; g < groups_; ++g) {
          double since = skipped;
          for (int64_t t = far.begin; t < far.end; t += kTile) {
            const int64_t rows = far.end - t < kTile ? far.end - t : kTile;
            fold_queries<kGiven>(queries(g, t, rows), since);
            since += decay_sum(t, t + rows);
          }
        }
      }
      if (p_.cache.most > 0) turn_back<kGiven>(block, last);
      for (int64_t s = keys.begin; s < keys.end; s += kTile) {
        if (s < piece_begin_ || s >= piece_end_) continue;
        load_keys(s, keys.end - s < kTile ? keys.end - s : kTile);
        for (int64_t g = 0; g < groups_; ++g) {
          near_queries(g, {s, keys.end}, tile());
          near_queries(g, next, tile());
        }
        if (has_far_) {
          double since = decay_sum(token_ + rows_, keys.end);
          for (int64_t r = rows_ - 1; r >= 0; --r) {
            since_[r] = since;
            since += decay_at(token_ + r);
          }
          read_block<kGiven>();
        }
        write_keys();
      }
    }
  }

  // --- hard keys -------------------------------------------------------------------------------
  // Those in the slots while the queries of a block run.
  const int32_t* slots_of(int64_t block) const {
    const int64_t row = p_.cache_row(sequence_, batch_ * p_.seqlen + begin_);
    const int64_t first = first_position_ / p_.window;
    return p_.given + (head_ * p_.cache_rows() + row + block - first) * p_.cache.most;
  }
  // The token at a position, if its gradient is this piece's; else -1.
  int64_t token_of_mine(int64_t position) const {
    const int64_t token = begin_ + (position - first_position_);
    return position >= 0 && token >= piece_begin_ && token < piece_end_ ? token : -1;
  }

  void begin_hard(int64_t first, int64_t last) {
    hard_.clear();
    const int32_t* slots = slots_of(last);
    for (int64_t i = 0; i < p_.cache.most; ++i) {
      const int64_t token = token_of_mine(slots[i]);
      if (token < 0) continue;
      rows_ = 0;
      gather(token);
      fill(dk_, dp_, Acc(0));
      fill(dv_, vp_, Acc(0));
      hard_.put(i, keys_, values_, dk_, dv_);
    }
    if (!has_decay_) return;
    for (int64_t block = first; block <= last; ++block) {
      const Tokens tokens = tokens_of(block);
      block_decay_[block - first] = decay_sum(tokens.begin, tokens.end);
    }
  }

  // The queries of block + 2, which R has taken in by now, and the slots before them: keys of
  // `block` that entered a slot then have all of their gradient but the near one, and keys that
  // left a slot then were far from there on.
  template <bool kGiven>
  void turn_back(int64_t block, int64_t last) {
    hard_.begin_block();
    if (block + 2 > last) return;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 0; r < hard_.count; r += kTile) {
        const int64_t n = hard_.count - r < kTile ? hard_.count - r : kTile;
        near_queries(g, tokens_of(block + 2),
                     {hard_.keys + r * dp_, hard_.values + r * vp_, hard_.dk + r * dp_,
                      hard_.dv + r * vp_, n, -1});
      }
    }
    const int32_t* now = slots_of(block + 2);
    const int32_t* before = slots_of(block + 1);
    for (int64_t i = 0; i < p_.cache.most; ++i) {
      if (now[i] == before[i] || token_of_mine(now[i]) < 0) continue;
      hard_.take_up(i, now[i] - block * p_.window);
    }
    rows_ = 0;
    for (int64_t i = 0; i < p_.cache.most; ++i) {
      const int64_t token = token_of_mine(before[i]);
      if (now[i] == before[i] || token < 0) continue;
      left_slots_[rows_] = i;
      gather(token);
      if (rows_ == kTile) leave_slots<kGiven>(block);
    }
    if (rows_ > 0) leave_slots<kGiven>(block);
  }

  // One more row of the tile.
  void gather(int64_t token) {
    load_tile(p_.dtype, p_.k, batch_, head_, token, 1, p_.headdim, keys_ + rows_ * dp_, dp_);
    load_tile(p_.dtype, p_.v, batch_, head_, token, 1, p_.headdim_v, values_ + rows_ * vp_, vp_);
    tokens_[rows_] = token;
    folds_[rows_++] = true;
  }

  // The gathered keys left their slots when `block` left the window.
  template <bool kGiven>
  void leave_slots(int64_t block) {
    begin_keys();
    if (has_far_) {
      for (int64_t s = 0; s < rows_; ++s) since_[s] = decay_until(tokens_[s], block);
      read_block<kGiven>();
      far_gradients();
    }
    for (int64_t s = 0; s < rows_; ++s) {
      hard_.put(left_slots_[s], keys_ + s * dp_, values_ + s * vp_, dk_ + s * dp_, dv_ + s * vp_);
    }
    rows_ = 0;
  }
  // log2 of the decay between a token and the end of a block.
  double decay_until(int64_t token, int64_t block) const {
    if (!has_decay_) return 0;
    const int64_t own = position_of(token) / p_.window, first = first_position_ / p_.window;
    double sum = decay_sum(token + 1, tokens_of(own).end);
    for (int64_t i = own + 1; i <= block; ++i) sum += block_decay_[i - first];
    return sum;
  }

  struct Tokens {
    int64_t begin, end;
  };
  // Keys beside each other, and their gradients so far.
  struct KeyTile {
    const Acc* keys;
    const Acc* values;
    Acc* dk;
    Acc* dv;
    int64_t rows;
    int64_t token;  // of the first one; -1: all lie before the queries
  };
  KeyTile tile() const { return {keys_, values_, dk_, dv_, rows_, token_}; }
  // The tokens of this call that lie in a block; none beyond either end.
  Tokens tokens_of(int64_t block) const {
    const auto inside = [&](int64_t position) {
      const int64_t token = begin_ + (position - first_position_);
      return token < begin_ ? begin_ : token > end_ ? end_ : token;
    };
    return {inside(block * p_.window), inside((block + 1) * p_.window)};
  }

  // Exact weights of a head's queries in `tokens` for some keys.
  void near_queries(int64_t g, Tokens tokens, const KeyTile& keys) {
    constexpr Operand kPlain = Operand::kPlain, kTransposed = Operand::kTransposed;
    constexpr Result kAssign = Result::kAssign;
    const int64_t columns = keys.rows;
    for (int64_t t0 = tokens.begin; t0 < tokens.end; t0 += kTile) {
      const int64_t rows = tokens.end - t0 < kTile ? tokens.end - t0 : kTile;
      const QueryTile<Acc>& tile = queries(g, t0, rows);
      Causal wanted, lower;
      if (keys.token >= 0) {
        wanted = {Causal::kResult, t0 - keys.token};
        lower = {Causal::kLeft, t0 - keys.token};
      }
      gemm<kPlain, kTransposed, kAssign>(rows, columns, dp_, tile.scaled_q, dp_, keys.keys, dp_,
                                         weights_, kTile, wanted);
      gemm<kPlain, kTransposed, kAssign>(rows, columns, vp_, tile.grad, vp_, keys.values, vp_,
                                         grad_weights_, kTile, wanted);
      const Acc factor = static_cast<Acc>(p_.scale);
      for (int64_t t = 0; t < rows; ++t) {
        const int64_t after = keys.token < 0 ? columns : t0 + t - keys.token + 1;
        const int64_t visible = after < columns ? after : columns;
        Acc* weight = weights_ + t * kTile;
        Acc* grad = grad_weights_ + t * kTile;
        const Vec<Acc> shift = broadcast(-tile.scale[t]);
        for (int64_t s = 0; s < visible; s += kLanes<Acc>) {
          const Vec<Acc> weighed = exp2_scaled<Acc>(load(weight + s), shift) * tile.inverse[t];
          store(weight + s, weighed);
          store(grad + s, weighed * (load(grad + s) - tile.delta[t]) * factor);
        }
        fill(weight + visible, kTile - visible, Acc(0));
        fill(grad + visible, kTile - visible, Acc(0));
      }
      gemm<kTransposed, kPlain>(columns, dp_, rows, grad_weights_, kTile, tile.q, dp_, keys.dk, dp_,
                                lower);
      gemm<kTransposed, kPlain>(columns, vp_, rows, weights_, kTile, tile.grad, vp_, keys.dv, vp_,
                                lower);
    }
  }

  // Far gradients of the tile's keys; since_ leads to R's time.
  template <bool kGiven>
  void read_block() {
    using F = FeatureOf<Acc, kGiven>;
    Acc shift[kTile] = {}, factor[kTile] = {};
    for (int64_t s = 0; s < rows_; ++s) {
      const Decay<Acc> decay(since_[s]);
      shift[s] = decay.whole;
      factor[s] = decay.fraction;
    }
    read_future(future_.kv, future_.extra, factor);
    for (int64_t s = 0; s < rows_; ++s) {
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        const Vec<Acc> f =
            F::scaled(load(a_ + s * mp_ + i), load(future_.log_scale + i), broadcast(shift[s]));
        store(fk_ + s * mp_ + i, f);
      }
      multiply_features<kGiven>(s, future_.log_scale, shift[s]);
      for (int64_t i = 0; has_decay_ && i < mp_; ++i) fk_[s * mp_ + i] *= factor[s];
    }
    gemm<Operand::kPlain, Operand::kPlain>(rows_, vp_, mp_, fk_, mp_, future_.kv, vp_, dv_, vp_);
  }

  // --- without a window ------------------------------------------------------------------------
  template <bool kGiven>
  void run_chunks() {
    const int64_t tiles = (end_ - begin_ + kTile - 1) / kTile;
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const int64_t token = begin_ + tile * kTile;
      const int64_t rows = end_ - token < kTile ? end_ - token : kTile;
      if (token < piece_begin_) return;
      if (token >= piece_end_) {
        if (has_far_) fold_chunk<kGiven>(token, rows);
        continue;
      }
      load_keys(token, rows);
      if (has_far_) chunk<kGiven>();
      write_keys();
    }
  }

  // R takes in the queries of a tile, and moves before it.
  template <bool kGiven>
  void fold_chunk(int64_t token, int64_t rows) {
    future_.decay(decay_sum(token, token + rows));
    for (int64_t g = 0; g < groups_; ++g) fold_queries<kGiven>(queries(g, token, rows), 0.0);
  }

  // The tile's keys with its own queries, and with all later ones through R.
  template <bool kGiven>
  void chunk() {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    for (int64_t s = 0; s < rows_; ++s) log_decay_[s] = decay_at(token_ + s);
    if (has_decay_) decay_mask(rows_, log_decay_, mask_);

    // top: a whole exponent above every 2^(b - r), the tile's and R's; keys read relative to it.
    std::memcpy(top_, future_.log_scale, mp_ * sizeof(Acc));
    for (int64_t g = 0; g < groups_; ++g) {
      const QueryTile<Acc>& tile = queries(g, token_, rows_);
      for (int64_t i = 0; i < mp_; i += L) {
        Vec<Acc> top = load(top_ + i);
        for (int64_t t = 0; t < rows_; ++t) {
          if (tile.inverse[t] == 0) continue;
          top = max(top, F::exponent(load(tile.b + t * mp_ + i)) - tile.scale[t]);
        }
        store(top_ + i, top);
      }
    }
    bool exact[kTile];
    const bool spread = kGiven && chunk_spreads();
    Acc factor[kTile] = {};
    for (int64_t s = 0; s < rows_; ++s) {
      exact[s] = spread || too_large<kGiven>(s);
      factor[s] = exact[s] ? Acc(0) : Acc(1);
      if (has_decay_ && !exact[s]) {
        factor[s] = std::exp2(static_cast<Acc>(decay_between(s, rows_ - 1)));
      }
      for (int64_t i = 0; i < mp_; i += L) {
        const Vec<Acc> f = F::scaled(load(a_ + s * mp_ + i), load(top_ + i));
        store(fk_ + s * mp_ + i, exact[s] ? Vec<Acc>{} : f);
      }
    }
    // R relative to top.
    for (int64_t i = 0; i < mp_; ++i) {
      const Acc shift = future_.log_scale[i] - top_[i];
      scale_row(future_.kv + i * vp_, vp_, shift, Acc(1), chunk_r_ + i * vp_);
      chunk_rho_[i] = scale_by_one(future_.extra[i], shift);
    }
    read_future(chunk_r_, chunk_rho_, factor);
    const Acc* reader = fk_;
    if (has_decay_) {
      for (int64_t s = 0; s < rows_; ++s) {
        for (int64_t i = 0; i < mp_; ++i) fq_[s * mp_ + i] = fk_[s * mp_ + i] * factor[s];
      }
      reader = fq_;
    }
    gemm<Operand::kPlain, Operand::kPlain>(rows_, vp_, mp_, reader, mp_, chunk_r_, vp_, dv_, vp_);

    turn(fk_, mp_, rows_, mp_, turned_fk_, kTile, kTile);
    turn(values_, vp_, rows_, vp_, turned_values_, kTile, kTile);
    for (int64_t s = 0; s < rows_; ++s) {
      if (exact[s]) fill(exact_ + s * mp_, mp_, Acc(0));
    }
    for (int64_t g = 0; g < groups_; ++g) {
      const QueryTile<Acc>& tile = queries(g, token_, rows_);
      chunk_queries<kGiven>(tile, exact);
      for (int64_t s = 0; s < rows_; ++s) {
        if (exact[s]) exact_key<kGiven>(tile, s);
      }
      if (!has_decay_) fold_features(tile);
    }
    for (int64_t s = 0; s < rows_; ++s) {
      if (exact[s]) {
        exact_future<kGiven>(s);
      } else {
        multiply_features<kGiven>(s, top_, Acc(0));
      }
    }
    if (has_decay_) return fold_chunk<kGiven>(token_, rows_);
    // Without decay R relative to top is the next one; z, which only a decay asks for, stays.
    std::swap(future_.kv, chunk_r_);
    std::swap(future_.extra, chunk_rho_);
    std::swap(future_.log_scale, top_);
  }

  // Without decay: R, relative to top, takes in the queries whose features are in fq_.
  void fold_features(const QueryTile<Acc>& tile) {
    gemm<Operand::kTransposed, Operand::kPlain>(mp_, vp_, rows_, fq_, mp_, tile.grad, vp_, chunk_r_,
                                                vp_);
    for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
      Vec<Acc> sum = load(chunk_rho_ + i);
      for (int64_t t = 0; t < rows_; ++t) {
        sum = multiply_add(load(fq_ + t * mp_ + i), broadcast(tile.delta[t]), sum);
      }
      store(chunk_rho_ + i, sum);
    }
  }

  double decay_between(int64_t s, int64_t t) const {
    double sum = 0;
    for (int64_t r = t; has_decay_ && r > s; --r) sum += log_decay_[r];
    return sum;
  }

  // W and A of the loaded queries, and what keys get from them by matrix products.
  template <bool kGiven>
  void chunk_queries(const QueryTile<Acc>& tile, const bool* exact) {
    using F = FeatureOf<Acc, kGiven>;
    constexpr Operand kPlain = Operand::kPlain, kTransposed = Operand::kTransposed;
    constexpr Result kAssign = Result::kAssign;
    for (int64_t t = 0; t < rows_; ++t) {
      const Vec<Acc> factor = broadcast(tile.inverse[t]), r = broadcast(-tile.scale[t]);
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        const Vec<Acc> f = F::scaled(load(tile.b + t * mp_ + i), -load(top_ + i), r);
        store(fq_ + t * mp_ + i, f * factor);
      }
      if (tile.inverse[t] == 0) fill(fq_ + t * mp_, mp_, Acc(0));
    }
    const Causal wanted{Causal::kResult, 0}, lower{Causal::kLeft, 0};
    gemm<kPlain, kPlain, kAssign>(rows_, rows_, mp_, fq_, mp_, turned_fk_, kTile, weights_, kTile,
                                  wanted);
    gemm<kPlain, kPlain, kAssign>(rows_, rows_, vp_, tile.grad, vp_, turned_values_, kTile,
                                  grad_weights_, kTile, wanted);
    for (int64_t t = 0; t < rows_; ++t) {
      Acc* weight = weights_ + t * kTile;
      Acc* grad = grad_weights_ + t * kTile;
      for (int64_t s = 0; s <= t; ++s) {
        grad[s] -= tile.delta[t];
        if (!has_decay_ || exact[s]) continue;  // exact_key has a decay of its own
        weight[s] *= mask_[t * kTile + s];
        grad[s] *= mask_[t * kTile + s];
      }
      fill(weight + t + 1, kTile - t - 1, Acc(0));
      fill(grad + t + 1, kTile - t - 1, Acc(0));
    }
    gemm<kTransposed, kPlain>(rows_, mp_, rows_, grad_weights_, kTile, fq_, mp_, da_, mp_, lower);
    gemm<kTransposed, kPlain>(rows_, vp_, rows_, weights_, kTile, tile.grad, vp_, dv_, vp_, lower);
  }

  // The mirror image of BackwardQueries::chunk_spreads, over all heads of the group.
  bool chunk_spreads() {
    using F = FeatureOf<Acc, true>;
    const Vec<Acc> empty = broadcast(static_cast<Acc>(kEmptyLogScale / 2));
    for (int64_t g = 0; g < groups_; ++g) {
      const QueryTile<Acc>& tile = queries(g, token_, rows_);
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        const Vec<Acc> top = load(top_ + i), old = load(future_.log_scale + i);
        Vec<Acc> low = old > empty ? old : top;
        for (int64_t t = 0; t < rows_; ++t) {
          if (tile.inverse[t] == 0) continue;
          const Vec<Acc> e = F::exponent(load(tile.b + t * mp_ + i));
          low = min(low, e > empty ? e - tile.scale[t] : top);
        }
        if (horizontal_max<Acc>(top - low) > Acc(kLargestExponent)) return true;
      }
    }
    return false;
  }

  template <bool kGiven>
  bool too_large(int64_t s) const {
    using F = FeatureOf<Acc, kGiven>;
    Vec<Acc> top = broadcast(static_cast<Acc>(kEmptyLogScale));
    for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
      top = max(top, F::exponent(load(a_ + s * mp_ + i)) + load(top_ + i));
    }
    return horizontal_max<Acc>(top) > Acc(kLargestExponent);
  }

  // Key s and those of the loaded queries that see it, term by term: gradient into exact_, dv.
  template <bool kGiven>
  void exact_key(const QueryTile<Acc>& tile, int64_t s) {
    using F = FeatureOf<Acc, kGiven>;
    for (int64_t t = s; t < rows_; ++t) {
      if (tile.inverse[t] == 0) continue;
      const Decay<Acc> decay(decay_between(s, t), -tile.scale[t]);
      const Acc factor = decay.fraction * tile.inverse[t];
      const Vec<Acc> shift = broadcast(decay.whole);
      const Vec<Acc> grad = broadcast(grad_weights_[t * kTile + s] * factor);
      Vec<Acc> sum{};
      for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
        const Vec<Acc> b = load(tile.b + t * mp_ + i);
        const Vec<Acc> product = F::product(b, load(a_ + s * mp_ + i), shift);
        Acc* at = exact_ + s * mp_ + i;
        store(at, load(at) + (kGiven ? F::scaled(b, shift) : product) * grad);
        sum += product;
      }
      const Acc weight = horizontal_sum<Acc>(sum) * factor;
      for (int64_t j = 0; j < vp_; ++j) dv_[s * vp_ + j] += weight * tile.grad[t * vp_ + j];
    }
  }

  // Key s and R; the whole gradient of s into da_.
  template <bool kGiven>
  void exact_future(int64_t s) {
    using F = FeatureOf<Acc, kGiven>;
    const Decay<Acc> decay(decay_between(s, rows_ - 1));
    const Acc* value = values_ + s * vp_;
    Vec<Acc> sum{};
    for (int64_t i = 0; i < mp_; i += kLanes<Acc>) {
      const Vec<Acc> a = load(a_ + s * mp_ + i);
      const Vec<Acc> scale = load(future_.log_scale + i), shift = broadcast(decay.whole);
      const Vec<Acc> f = F::scaled(a, scale, shift) * broadcast(decay.fraction);
      Vec<Acc> read{};
      for (int64_t l = 0; l < kLanes<Acc>; ++l) {
        const Acc* r = future_.kv + (i + l) * vp_;
        Acc dot = -future_.extra[i + l];
        for (int64_t j = 0; j < vp_; ++j) dot += r[j] * value[j];
        read[l] = dot;
        for (int64_t j = 0; j < vp_; ++j) dv_[s * vp_ + j] += f[l] * r[j];
      }
      const Vec<Acc> given = scale_by<Acc>(read * broadcast(decay.fraction), scale + shift);
      const Vec<Acc> d = load(exact_ + s * mp_ + i) + (kGiven ? given : f * read);
      store(da_ + s * mp_ + i, d);
      sum += kGiven ? d * a : d;
    }
    subtract_decay(s, horizontal_sum<Acc>(sum));
  }

  const LinearAttentionBackwardParams& params_;
  const LinearAttentionParams& p_;
  const BackwardWorkspace workspace_;
  const BackwardMaps<Acc>& maps_;
  const int64_t groups_, dp_, vp_, mp_;
  const bool has_far_, has_decay_;
  Scratch scratch_;

  int64_t sequence_ = 0, batch_ = 0, head_ = 0, begin_ = 0, end_ = 0, first_position_ = 0;
  int64_t piece_begin_ = 0, piece_end_ = 0;  // tokens, as begin_ and end_
  double* key_sinks_ = nullptr;
  FeatureSums<Acc> sums_;
  FarState<Acc> future_;             // kv: R, extra: rho, z: the same sum with 1, log_scale: N
  QueryTile<Acc>* tiles_ = nullptr;  // (slots, groups)
  int64_t slots_ = 1;
  HardKeyGrads<Acc> hard_;
  double* block_decay_ = nullptr;  // log2, of the blocks of this call
  int64_t left_slots_[kTile] = {};

  // The tile.
  int64_t token_ = 0, rows_ = 0;
  int64_t tokens_[kTile] = {};
  bool folds_[kTile] = {};    // whether the key is far from its block's end, or its slot's, on
  double since_[kTile] = {};  // log2 of the decay between the key and R's time
  Acc* keys_ = nullptr;
  Acc* values_ = nullptr;
  Acc* dk_ = nullptr;
  Acc* dv_ = nullptr;
  Acc* a_ = nullptr;  // exponents
  Acc* plain_ = nullptr;
  Acc* fk_ = nullptr;  // 2^(a + top)
  Acc* fq_ = nullptr;  // 2^(b - r - top) / den
  Acc* da_ = nullptr;
  Acc* exact_ = nullptr;      // da of the keys taken term by term, while it is summed over heads
  Acc* turned_fk_ = nullptr;  // (mp, kTile)
  Acc* turned_values_ = nullptr;  // (vp, kTile)
  Acc* top_ = nullptr;
  Acc* chunk_r_ = nullptr;
  Acc* chunk_rho_ = nullptr;
  Acc* weighed_ = nullptr;
  Acc* mask_ = nullptr;
  Acc* weights_ = nullptr;        // (queries, kTile): P or A
  Acc* grad_weights_ = nullptr;   // dS scale or W
  double log_decay_[kTile] = {};  // log2, of the tile's tokens
};

}  // namespace dijiang::cpu::DIJIANG_ISA
