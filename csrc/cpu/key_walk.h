// One pass over the keys and values of a sequence and kv head in the order of time: what a tile of
// queries sees at each step (near keys, the tile's own far keys, the state of all others), shared
// by the forward, and by the half of the backward that needs the past.
#pragma once

#include "cpu/far_state.h"
#include "cpu/hard_keys.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class KeyWalk {
 public:
  KeyWalk(const LinearAttentionParams& params, Scratch& scratch)
      : p(params),
        given(p.kind == FeatureKind::kGiven),
        has_far(p.num_features > 0),
        intra(has_far && p.window == 0),
        has_decay(has_far && p.log_decay != nullptr),
        groups(p.num_heads / p.num_kv_heads),
        dp(padded<Acc>(p.headdim)),
        vp(padded<Acc>(p.headdim_v)),
        mp(padded<Acc>(p.num_features)),
        hard(p, scratch, dp, vp) {
    const int64_t w = p.window, tile_rows = w > 0 ? 2 * w : kTile;
    keys_ = scratch.take<Acc>(tile_rows * dp);
    values_ = scratch.take<Acc>(tile_rows * vp);
    kept_keys = scratch.take<Acc>((p.sinks + p.cache.most) * dp);
    kept_values = scratch.take<Acc>((p.sinks + p.cache.most) * vp);
    hard.keys = kept_keys + p.sinks * dp;
    hard.values = kept_values + p.sinks * vp;
    log_decay_ = scratch.take<double>(tile_rows);
    fk_.allocate(scratch, p.kind, p.num_features, p.headdim, p.fk.dct);
    if (!has_far) return;
    state.allocate(scratch, mp, vp, false);
    a = scratch.take<Acc>(kTile * mp);
    if (intra) {
      top = scratch.take<Acc>(mp);
      fk = scratch.take<Acc>(kTile * mp);
      chunk_kv = scratch.take<Acc>(mp * vp);
      chunk_z = scratch.take<Acc>(mp);
      if (has_decay) mask = scratch.take<Acc>(kTile * kTile);
    }
  }

  // From the start of the piece's sequence to the piece's end; loads the initial state.
  void begin(const AttentionPiece& piece, const AttentionState& initial) {
    const Sequence tokens(p, piece.task);
    sequence = tokens.index;
    head = piece.task % p.num_kv_heads;
    batch = tokens.batch;
    begin_token = tokens.begin;
    whole_ = piece.end >= tokens.length();
    end_token = whole_ ? tokens.end : tokens.begin + piece.end;
    piece_token_ = tokens.begin + piece.begin;
    first_position = initial.length ? initial.length[sequence] : 0;
    fk_.set(p.fk, head, p.scale);
    position = first_position;
    rows = 0;
    load_state(initial);
    load_near(initial);
    hard.begin(initial, tokens, head, first_position);
  }

  // Takes in the next tile; false at the end. Afterwards rows, token, position and everything
  // below that describes the tile are set.
  bool next() {
    if (rows > 0) leave_tile();
    position += rows;
    token = begin_token + (position - first_position);
    const int64_t w = p.window;
    rows = end_token - token < kTile ? end_token - token : kTile;
    if (rows == 0) return false;
    if (w > 0) {
      if (position % w == 0) advance_block();
      if (position % w == 0 || position == first_position) hard.note(position / w);
      const int64_t left = w - position % w;
      rows = left < rows ? left : rows;
      offset_ = w + position % w;
    }
    tile_keys = keys_ + offset_ * dp;
    tile_values = values_ + offset_ * vp;
    load_tile(p.dtype, p.k, batch, head, token, rows, p.headdim, tile_keys, dp);
    load_tile(p.dtype, p.v, batch, head, token, rows, p.headdim_v, tile_values, vp);
    for (int64_t i = 0; has_decay && i < rows; ++i) log_decay_[offset_ + i] = decay_at(token + i);
    for (int64_t i = 0; i < rows && position + i < p.sinks; ++i) {
      std::memcpy(kept_keys + (position + i) * dp, tile_keys + i * dp, dp * sizeof(Acc));
      std::memcpy(kept_values + (position + i) * vp, tile_values + i * vp, vp * sizeof(Acc));
    }
    hard.see(tile_keys, tile_values, rows);
    enter_near();
    if (has_far) enter_far();
    return true;
  }

  // Whether the tile is the piece's; those before it are walked over for the state.
  bool wanted() const { return token >= piece_token_; }

  // Whether the walk's end is the sequence's.
  bool whole() const { return whole_; }

  // Writes the state after the last tile of a sequence, but for its length.
  void finish(const AttentionState& final) const {
    store_state(final);
    store_near(final);
    hard.write(final, sequence);
  }
  int64_t last_position() const { return first_position + (end_token - begin_token); }

  // Near columns of a tile are the kept keys outside the window (sinks, then hard keys), then the
  // window. Row i sees the first visible(i) of them.
  int64_t near_columns() const { return kept_columns + window_columns; }
  // Row i sees the columns of the window up to window_first() + i.
  int64_t window_first() const { return window_columns - rows; }
  int64_t visible(int64_t i) const {
    if (p.window > 0) return near_columns() - rows + i + 1;
    return kept_columns < position + i + 1 ? kept_columns : position + i + 1;
  }
  // log2 of the decay from the state's time to row i.
  double decay_to(int64_t i) const { return has_decay ? since_state_[i] : 0.0; }
  // log2 of the decay from row s to row t of the tile.
  double decay_between(int64_t s, int64_t t) const {
    double sum = 0;  // from t back: differences of large sums would cancel
    for (int64_t r = t; has_decay && r > s; --r) sum += log_decay_[offset_ + r];
    return sum;
  }
  bool is_sink(int64_t i) const { return position + i < p.sinks; }

  const LinearAttentionParams& p;
  const bool given, has_far, intra, has_decay;
  const int64_t groups, dp, vp, mp;

  int64_t sequence = 0, head = 0, batch = 0, begin_token = 0, end_token = 0, first_position = 0;

  // The tile.
  int64_t rows = 0, token = 0, position = 0;
  Acc* tile_keys = nullptr;    // (rows, dp)
  Acc* tile_values = nullptr;  // (rows, vp)
  int64_t sink_columns = 0, kept_columns = 0, window_columns = 0;
  Acc* kept_keys = nullptr;  // (sinks + slots, dp)
  Acc* kept_values = nullptr;
  const Acc* window_keys = nullptr;  // (window_columns, dp)
  const Acc* window_values = nullptr;

  FarState<Acc> state;  // before the tile; its time is the last folded key's
  HardKeys<Acc> hard;

  // A query's near weights decide, with those of its block, which keys stay.
  void vote(const Acc* near, Acc total) {
    if (hard.voting() && position >= p.window) hard.vote(near + sink_columns, total);
  }

  // Without a window: the tile's own far keys, and the state relative to the maximum over both.
  Acc* a = nullptr;         // (rows, mp): exponents; sinks have none
  Acc* top = nullptr;       // (mp): M'
  Acc* fk = nullptr;        // (rows, mp): 2^(a - M')
  Acc* chunk_kv = nullptr;  // kv 2^(M - M')
  Acc* chunk_z = nullptr;
  Acc* mask = nullptr;  // (kTile, kTile): 2^(c_t - c_s) for s <= t, if has_decay

 private:
  double decay_at(int64_t t) const {
    const int64_t i = batch * p.log_decay_stride_batch + head * p.log_decay_stride_head +
                      t * p.log_decay_stride_seq;
    return static_cast<double>(static_cast<const Acc*>(p.log_decay)[i]) * kLog2E;
  }

  // --- near keys -------------------------------------------------------------------------------
  // With a window, rows [0, w) of keys_ are the block before, rows [w, 2w) the current one.

  // Slot of the window buffers for row r while `position` tokens have been seen.
  int64_t slot_of(int64_t r, int64_t seen) const {
    const int64_t block = (seen - 1) / p.window - 1;
    return (block * p.window + r) % (2 * p.window);
  }
  // Rows [first, last) of keys_ hold the last keys seen.
  struct RowRange {
    int64_t first, last;
  };
  RowRange held_rows(int64_t seen) const {
    if (seen == 0 || p.window == 0) return {0, 0};
    const int64_t first = seen <= p.window ? p.window : 0;
    return {first, p.window + (seen - 1) % p.window + 1};
  }

  void load_near(const AttentionState& initial) {
    if (initial.length == nullptr) return;
    const int64_t row = sequence * p.num_kv_heads + head, d = p.headdim, dv = p.headdim_v;
    const int64_t held = p.sinks < position ? p.sinks : position;
    for (int64_t i = 0; i < held; ++i) {
      load_row(p.dtype, initial.sink_k, (row * p.sinks + i) * d, 1, d, kept_keys + i * dp);
      load_row(p.dtype, initial.sink_v, (row * p.sinks + i) * dv, 1, dv, kept_values + i * vp);
    }
    const auto [first, last] = held_rows(position);
    for (int64_t r = first; r < last; ++r) {
      const int64_t slot = row * 2 * p.window + slot_of(r, position);
      load_row(p.dtype, initial.window_k, slot * d, 1, d, keys_ + r * dp);
      load_row(p.dtype, initial.window_v, slot * dv, 1, dv, values_ + r * vp);
      if (has_decay && initial.window_decay) {
        log_decay_[r] = static_cast<const Acc*>(initial.window_decay)[slot] * kLog2E;
      }
    }
  }

  void store_near(const AttentionState& final) const {
    if (final.length == nullptr) return;
    const int64_t row = sequence * p.num_kv_heads + head, d = p.headdim, dv = p.headdim_v;
    const int64_t seen = last_position();
    const int64_t held = p.sinks < seen ? p.sinks : seen;
    store_tile(p.dtype, final.sink_k, row * p.sinks * d, held, d, kept_keys, dp);
    store_tile(p.dtype, final.sink_v, row * p.sinks * dv, held, dv, kept_values, vp);
    const auto [first, last] = held_rows(seen);
    for (int64_t r = first; r < last; ++r) {
      const int64_t slot = row * 2 * p.window + slot_of(r, seen);
      store_row(p.dtype, final.window_k, slot * d, d, keys_ + r * dp);
      store_row(p.dtype, final.window_v, slot * dv, dv, values_ + r * vp);
      if (final.window_decay) {
        static_cast<Acc*>(final.window_decay)[slot] = static_cast<Acc>(log_decay_[r] / kLog2E);
      }
    }
  }

  void enter_near() {
    if (p.window == 0) {
      kept_columns = sink_columns = p.sinks < position + rows ? p.sinks : position + rows;
      return;
    }
    const int64_t block = position / p.window;
    const int64_t first_row = block > 0 ? 0 : p.window;
    const int64_t window_start = block > 0 ? (block - 1) * p.window : 0;
    sink_columns = p.sinks < window_start ? p.sinks : window_start;
    kept_columns = sink_columns + hard.count;  // hard keys come after all sinks have left
    window_keys = keys_ + first_row * dp;
    window_values = values_ + first_row * vp;
    window_columns = offset_ + rows - first_row;
  }

  // The first token of a block arrives: the block two before it folds into the state.
  void advance_block() {
    const int64_t w = p.window, block = position / w;
    if (block >= 2 && p.cache.most > 0) {
      leave_for_good(block);
    } else if (block >= 2 && has_far) {
      for (int64_t r = 0; r < w; r += kTile) {
        const int64_t n = w - r < kTile ? w - r : kTile, first = (block - 2) * w + r;
        fk_.exponents(keys_ + r * dp, n, a);
        drop_sinks(n, first);
        fold(n, log_decay_ + r, values_ + r * vp);
      }
    }
    std::memcpy(keys_, keys_ + w * dp, w * dp * sizeof(Acc));
    std::memcpy(values_, values_ + w * vp, w * vp * sizeof(Acc));
    std::memcpy(log_decay_, log_decay_ + w, w * sizeof(double));
  }

  // Of the block that leaves and of the hard keys, those that are no longer exact fold in.
  void leave_for_good(int64_t block) {
    hard.turn_over(block, keys_, values_, log_decay_);
    if (!has_far) return;
    double decay = 0;
    for (int64_t r = 0; has_decay && r < p.window; ++r) decay += log_decay_[r];
    state.decay(decay);
    for (int64_t r = 0; r < hard.left; r += kTile) {
      const int64_t n = hard.left - r < kTile ? hard.left - r : kTile;
      fk_.exponents(hard.left_keys + r * dp, n, a);
      add(n, hard.left_since + r, hard.left_values + r * vp);
    }
  }

  // --- far keys --------------------------------------------------------------------------------
  void drop_sinks(int64_t n, int64_t first) {
    const Acc none = given ? Acc(0) : Acc(kLowestExponent);
    for (int64_t i = 0; i < n && first + i < p.sinks; ++i) fill(a + i * mp, mp, none);
  }

  void enter_far() {
    if (has_decay) {
      double sum = 0;
      const int64_t w = p.window;
      for (int64_t r = 0; w > 0 && position >= w && r < w; ++r) sum += log_decay_[r];
      for (int64_t r = w; r < offset_; ++r) sum += log_decay_[r];
      for (int64_t i = 0; i < rows; ++i) since_state_[i] = sum += log_decay_[offset_ + i];
    }
    if (!intra) return;
    fk_.exponents(tile_keys, rows, a);
    drop_sinks(rows, position);
    dispatch_given(p.kind, [this](auto given_tag) { scale_chunk<given_tag.value>(); });
    if (has_decay) decay_mask(rows, log_decay_ + offset_, mask);
  }

  template <bool kGiven>
  void scale_chunk() {
    using F = FeatureOf<Acc, kGiven>;
    constexpr int L = kLanes<Acc>;
    for (int64_t i = 0; i < mp; i += L) {
      const Vec<Acc> old = load(state.log_scale + i);
      Vec<Acc> m = old;
      for (int64_t s = 0; s < rows; ++s) m = max(m, F::exponent(load(a + s * mp + i)));
      for (int64_t s = 0; s < rows; ++s)
        store(fk + s * mp + i, F::scaled(load(a + s * mp + i), -m));
      store(top + i, m);
      store(chunk_z + i, scale_by<Acc>(load(state.z + i), old - m));
    }
    for (int64_t i = 0; i < mp; ++i) {
      scale_row(state.kv + i * vp, vp, state.log_scale[i] - top[i], Acc(1), chunk_kv + i * vp);
    }
  }

  void leave_tile() {
    if (!intra) return;
    if (has_decay) return fold(rows, log_decay_ + offset_, tile_values);
    // Without decay the chunk's scale is the state's next one.
    std::swap(state.kv, chunk_kv);
    std::swap(state.z, chunk_z);
    std::swap(state.log_scale, top);
    for (int64_t s = 0; s < rows; ++s) {
      for (int64_t i = 0; i < mp; i += kLanes<Acc>) {
        store(state.z + i, load(state.z + i) + load(fk + s * mp + i));
      }
    }
    gemm<Operand::kTransposed, Operand::kPlain>(mp, vp, rows, fk, mp, tile_values, vp, state.kv,
                                                vp);
  }

  // Folds n keys with the exponents a, one token each; log_decay is log2 of their own decay.
  void fold(int64_t n, const double* log_decay, const Acc* values) {
    double since[kTile], sum = 0;
    for (int64_t s = n - 1; s >= 0; --s) {
      since[s] = sum;
      sum += has_decay ? log_decay[s] : 0.0;
    }
    state.decay(sum);
    add(n, since, values);
  }

  // Adds n keys with the exponents a; since is log2 of the decay between each and the state's time.
  void add(int64_t n, const double* since, const Acc* values) {
    Acc shift[kTile] = {}, factor[kTile] = {};
    for (int64_t s = 0; s < n; ++s) {
      const Decay<Acc> decay(since[s]);
      shift[s] = decay.whole;
      factor[s] = decay.fraction;
    }
    dispatch_given(p.kind, [&](auto given_tag) {
      state.template fold<given_tag.value>(n, a, shift, factor, values);
    });
  }

  void load_state(const AttentionState& initial) {
    if (!has_far) return;
    const int64_t m = p.num_features, dv = p.headdim_v;
    state.clear();
    if (initial.kv == nullptr) return;
    const int64_t row = sequence * p.num_kv_heads + head;
    std::memcpy(state.z, static_cast<const Acc*>(initial.z) + row * m, m * sizeof(Acc));
    std::memcpy(state.log_scale, static_cast<const Acc*>(initial.log_scale) + row * m,
                m * sizeof(Acc));
    for (int64_t i = 0; i < m; ++i) {
      const Acc* source = static_cast<const Acc*>(initial.kv) + (row * m + i) * dv;
      std::memcpy(state.kv + i * vp, source, dv * sizeof(Acc));
    }
  }

  void store_state(const AttentionState& final) const {
    if (!has_far || final.kv == nullptr) return;
    const int64_t m = p.num_features, dv = p.headdim_v;
    const int64_t row = sequence * p.num_kv_heads + head;
    std::memcpy(static_cast<Acc*>(final.z) + row * m, state.z, m * sizeof(Acc));
    std::memcpy(static_cast<Acc*>(final.log_scale) + row * m, state.log_scale, m * sizeof(Acc));
    for (int64_t i = 0; i < m; ++i) {
      Acc* target = static_cast<Acc*>(final.kv) + (row * m + i) * dv;
      std::memcpy(target, state.kv + i * vp, dv * sizeof(Acc));
    }
  }

  Features<Acc> fk_;
  Acc* keys_ = nullptr;
  Acc* values_ = nullptr;
  double* log_decay_ = nullptr;  // log2, by row of keys_
  double since_state_[kTile] = {};
  int64_t offset_ = 0;  // row of keys_ of the tile's first key
  int64_t piece_token_ = 0;
  bool whole_ = true;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
