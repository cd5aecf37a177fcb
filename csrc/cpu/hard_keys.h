// Keys that stay exact beyond the window: the slots that hold them, what decides which ones, and
// the keys that go at each block. docs/numerics.md, "Hard keys".
#pragma once

#include "cpu/keep_best.h"
#include "cpu/sequence.h"
#include "cpu/tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class HardKeys {
 public:
  // Slots [0, count) are filled.
  int64_t count = 0;
  Acc* keys = nullptr;    // (slots, dp)
  Acc* values = nullptr;  // (slots, vp)

  // The keys that left at the last block, and log2 of their decay up to its end.
  int64_t left = 0;
  Acc* left_keys = nullptr;    // (window, dp)
  Acc* left_values = nullptr;  // (window, vp)
  double* left_since = nullptr;

  // keys and values: rows for the slots.
  HardKeys(const LinearAttentionParams& params, Scratch& scratch, int64_t dp, int64_t vp)
      : p_(params),
        dp_(dp),
        vp_(vp),
        voting_(p_.cache.most > 0 && (p_.given == nullptr || p_.final.votes != nullptr)) {
    const int64_t most = p_.cache.most, candidates = most + p_.window;
    if (most == 0) return;
    left_keys = scratch.take<Acc>(p_.window * dp);
    left_values = scratch.take<Acc>(p_.window * vp);
    left_since = scratch.take<double>(p_.window);
    position_ = scratch.take<int64_t>(most);
    wanted_ = scratch.take<int64_t>(most);
    since_ = scratch.take<double>(most);
    votes_ = scratch.take<Acc>(candidates);
    key_sum_ = scratch.take<Acc>(dp);
    value_sum_ = scratch.take<Acc>(vp);
    decay_ = scratch.take<double>(p_.window);
    scores_ = scratch.take<double>(candidates);
    order_ = scratch.take<int64_t>(candidates);
    kept_ = scratch.take<bool>(candidates);
  }

  bool voting() const { return voting_; }

  void begin(const AttentionState& initial, const Sequence& tokens, int64_t head,
             int64_t position) {
    count = left = 0;
    head_ = head;
    size_ = p_.cache.of(head);
    if (p_.cache.most == 0) return;
    fill(votes_, size_ + p_.window, Acc(0));
    fill(key_sum_, dp_, Acc(0));
    fill(value_sum_, vp_, Acc(0));
    first_block_ = position / p_.window;
    first_row_ = p_.cache_rows() * head +
                 p_.cache_row(tokens.index, tokens.batch * p_.seqlen + tokens.begin);
    if (initial.cache_position == nullptr) return;
    const int64_t slot = p_.cache.slot(tokens.index, head, p_.num_kv_heads);
    const int64_t* positions = initial.cache_position + slot;
    while (count < size_ && positions[count] >= 0) ++count;
    const int64_t d = p_.headdim, dv = p_.headdim_v;
    for (int64_t i = 0; i < count; ++i) {
      position_[i] = positions[i];
      load_row(p_.dtype, initial.cache_k, (slot + i) * d, 1, d, keys + i * dp_);
      load_row(p_.dtype, initial.cache_v, (slot + i) * dv, 1, dv, values + i * vp_);
      const Acc* decay = static_cast<const Acc*>(initial.cache_decay);
      since_[i] = decay ? decay[slot + i] * kLog2E : 0.0;
    }
    const Acc* votes = static_cast<const Acc*>(initial.votes) + first_vote(tokens.index);
    std::memcpy(votes_, votes, count * sizeof(Acc));
    std::memcpy(votes_ + count, votes + size_, p_.window * sizeof(Acc));
    const int64_t row = tokens.index * p_.num_kv_heads + head;
    const Acc* sums = static_cast<const Acc*>(initial.sums) + row * (d + dv);
    std::memcpy(key_sum_, sums, d * sizeof(Acc));
    std::memcpy(value_sum_, sums + d, dv * sizeof(Acc));
  }

  void write(const AttentionState& final, int64_t sequence) const {
    if (final.cache_position == nullptr) return;
    const int64_t slot = p_.cache.slot(sequence, head_, p_.num_kv_heads);
    const int64_t d = p_.headdim, dv = p_.headdim_v;
    for (int64_t i = 0; i < size_; ++i) {
      final.cache_position[slot + i] = i < count ? position_[i] : -1;
    }
    store_tile(p_.dtype, final.cache_k, slot * d, count, d, keys, dp_);
    store_tile(p_.dtype, final.cache_v, slot * dv, count, dv, values, vp_);
    for (int64_t i = 0; final.cache_decay && i < count; ++i) {
      static_cast<Acc*>(final.cache_decay)[slot + i] = static_cast<Acc>(since_[i] / kLog2E);
    }
    Acc* votes = static_cast<Acc*>(final.votes) + first_vote(sequence);
    std::memcpy(votes, votes_, count * sizeof(Acc));
    std::memcpy(votes + size_, votes_ + count, p_.window * sizeof(Acc));
    const int64_t row = sequence * p_.num_kv_heads + head_;
    Acc* sums = static_cast<Acc*>(final.sums) + row * (d + dv);
    std::memcpy(sums, key_sum_, d * sizeof(Acc));
    std::memcpy(sums + d, value_sum_, dv * sizeof(Acc));
  }

  // New tokens.
  void see(const Acc* new_keys, const Acc* new_values, int64_t rows) {
    if (!voting_) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < p_.headdim; ++j) key_sum_[j] += new_keys[r * dp_ + j];
      for (int64_t j = 0; j < p_.headdim_v; ++j) value_sum_[j] += new_values[r * vp_ + j];
    }
  }

  // A query's weights for the slots and the block before its own, and for all its exact keys.
  void vote(const Acc* weights, Acc total) {
    if (!(total > 0)) return;
    const int64_t columns = count + p_.window;
    const Acc inverse = 1 / total;
    int64_t s = 0;
    for (; s + kLanes<Acc> <= columns; s += kLanes<Acc>) {
      store(votes_ + s, multiply_add(load(weights + s), broadcast(inverse), load(votes_ + s)));
    }
    for (; s < columns; ++s) votes_[s] += weights[s] * inverse;
  }

  // Block `block` begins, and block - 2, whose rows these are, leaves the window: its keys and
  // those in the slots stay or go. log_decay: log2, of the block's tokens.
  void turn_over(int64_t block, const Acc* block_keys, const Acc* block_values,
                 const double* log_decay) {
    const int64_t w = p_.window, first = (block - 2) * w;
    const int64_t rest = p_.sinks > first ? p_.sinks - first : 0, sinks = rest < w ? rest : w;
    if (p_.given != nullptr) {
      const int32_t* given = p_.given + row_of(block) * p_.cache.most;
      for (int64_t i = 0; i < size_; ++i) wanted_[i] = given[i];
    } else {
      choose(block_keys, block_values, sinks, first);
    }
    // decay_[r]: of the block's tokens after row r; decay: of all.
    double decay = 0;
    for (int64_t r = w - 1; r >= 0; --r) {
      decay_[r] = decay;
      decay += log_decay[r];
    }
    fill(kept_, w, false);
    left = 0;
    for (int64_t i = 0; i < size_ && wanted_[i] >= 0; ++i) {
      if (!holds(i, wanted_[i])) kept_[wanted_[i] - first] = true;
    }
    for (int64_t i = 0; i < count; ++i) {
      since_[i] += decay;
      if (position_[i] != wanted_[i]) leave(keys + i * dp_, values + i * vp_, since_[i]);
    }
    for (int64_t r = sinks; r < w; ++r) {
      if (!kept_[r]) leave(block_keys + r * dp_, block_values + r * vp_, decay_[r]);
    }
    int64_t filled = 0;
    for (; filled < size_ && wanted_[filled] >= 0; ++filled) {
      const bool stays = holds(filled, wanted_[filled]);
      const int64_t row = stays ? 0 : wanted_[filled] - first;
      scores_[filled] = kCarriedVotes * votes_[stays ? filled : count + row];
      if (stays) continue;
      std::memcpy(keys + filled * dp_, block_keys + row * dp_, dp_ * sizeof(Acc));
      std::memcpy(values + filled * vp_, block_values + row * vp_, vp_ * sizeof(Acc));
      since_[filled] = decay_[row];
      position_[filled] = wanted_[filled];
    }
    count = filled;
    fill(votes_, size_ + w, Acc(0));
    for (int64_t i = 0; i < count; ++i) votes_[i] = static_cast<Acc>(scores_[i]);
  }

  // Notes which keys the slots hold while the queries of a block run.
  void note(int64_t block) const {
    if (p_.chosen == nullptr) return;
    const int64_t most = p_.cache.most;
    int32_t* row = p_.chosen + row_of(block) * most;
    for (int64_t i = 0; i < most; ++i) row[i] = static_cast<int32_t>(i < count ? position_[i] : -1);
  }

 private:
  // Of the keys in the slots and of rows [sinks, window) of the block, those that are to be in the
  // slots: the most novel ones, and of the others those that queries look at most.
  void choose(const Acc* block_keys, const Acc* block_values, int64_t sinks, int64_t first) {
    const int64_t fresh = p_.window - sinks, n = count + fresh;
    fill(kept_, n, n <= size_);
    if (n > size_ && size_ > 0) {
      const Acc tokens = static_cast<Acc>(first + 2 * p_.window);
      const Acc length = std::sqrt(dot(key_sum_, key_sum_, p_.headdim));
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = sinks + i - count;
        const Acc* key = i < count ? keys + i * dp_ : block_keys + row * dp_;
        const Acc* value = i < count ? values + i * vp_ : block_values + row * vp_;
        scores_[i] = novelty(key, value, length, tokens);
      }
      keep_best(scores_, n, size_ / kNovelSlots, order_, kept_);
      for (int64_t i = 0; i < n; ++i) scores_[i] = votes_[i < count ? i : i + sinks];
      keep_best(scores_, n, size_ - size_ / kNovelSlots, order_, kept_);
    }
    // The kept keys of the block go, in order, where a key leaves and behind the filled slots.
    int64_t next = count;
    for (int64_t i = 0; i < size_; ++i) {
      if (i < count && kept_[i]) {
        wanted_[i] = position_[i];
        continue;
      }
      while (next < n && !kept_[next]) ++next;
      wanted_[i] = next < n ? first + sinks + next - count : -1;
      ++next;
    }
  }

  // |v - mean v| exp(-cos(k, mean k)); length: of the sum of keys.
  double novelty(const Acc* key, const Acc* value, Acc length, Acc tokens) const {
    const Acc norm = std::sqrt(dot(key, key, p_.headdim)) * length;
    const Acc cosine = norm > 0 ? dot(key, key_sum_, p_.headdim) / norm : Acc(0);
    Acc square = 0;
    for (int64_t j = 0; j < p_.headdim_v; ++j) {
      const Acc difference = value[j] - value_sum_[j] / tokens;
      square += difference * difference;
    }
    return std::sqrt(square) * std::exp(-cosine);
  }

  bool holds(int64_t slot, int64_t position) const {
    return slot < count && position_[slot] == position;
  }
  void leave(const Acc* key, const Acc* value, double since) {
    std::memcpy(left_keys + left * dp_, key, dp_ * sizeof(Acc));
    std::memcpy(left_values + left * vp_, value, vp_ * sizeof(Acc));
    left_since[left++] = since;
  }
  int64_t row_of(int64_t block) const { return first_row_ + block - first_block_; }
  int64_t first_vote(int64_t sequence) const {
    return p_.cache.vote(sequence, head_, p_.num_kv_heads, p_.window);
  }

  const LinearAttentionParams& p_;
  const int64_t dp_, vp_;
  const bool voting_;
  int64_t head_ = 0, size_ = 0;  // the head's slots
  int64_t first_row_ = 0, first_block_ = 0;
  int64_t* position_ = nullptr;  // of the keys in the slots
  int64_t* wanted_ = nullptr;    // of those to be in them
  double* since_ = nullptr;      // log2 of the decay of the keys in the slots
  double* decay_ = nullptr;      // (window)
  double* scores_ = nullptr;     // of candidates
  int64_t* order_ = nullptr;
  bool* kept_ = nullptr;  // candidates that stay; rows of the block that go into a slot
  Acc* votes_ = nullptr;  // (count + window)
  Acc* key_sum_ = nullptr;
  Acc* value_sum_ = nullptr;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
