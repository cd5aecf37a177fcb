// Gradients of the hard keys on their way back in time: a key's are gathered from the block that
// let it go to the block that took it up.
#pragma once

#include "cpu/tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class HardKeyGrads {
 public:
  // Those in slots while the queries of a block are gone through, in any order.
  int64_t count = 0;
  Acc* keys = nullptr;    // (count, dp)
  Acc* values = nullptr;  // (count, vp)
  Acc* dk = nullptr;
  Acc* dv = nullptr;

  void allocate(Scratch& scratch, int64_t cache_size, int64_t window, int64_t dp, int64_t vp) {
    size_ = cache_size;
    window_ = window;
    dp_ = dp;
    vp_ = vp;
    keys = scratch.take<Acc>(size_ * dp);
    values = scratch.take<Acc>(size_ * vp);
    dk = scratch.take<Acc>(size_ * dp);
    dv = scratch.take<Acc>(size_ * vp);
    taken_up_ = scratch.take<bool>(window);
    block_dk_ = scratch.take<Acc>(window * dp);
    block_dv_ = scratch.take<Acc>(window * vp);
    row_of_ = scratch.take<int64_t>(size_);
    slot_of_ = scratch.take<int64_t>(size_);
  }

  void clear() {
    count = 0;
    fill(taken_up_, window_, false);
    fill(row_of_, size_, int64_t{-1});
  }

  // A slot's key, and the gradient it has by then.
  void put(int64_t slot, const Acc* key, const Acc* value, const Acc* key_grad,
           const Acc* value_grad) {
    row_of_[slot] = count;
    slot_of_[count] = slot;
    std::memcpy(keys + count * dp_, key, dp_ * sizeof(Acc));
    std::memcpy(values + count * vp_, value, vp_ * sizeof(Acc));
    std::memcpy(dk + count * dp_, key_grad, dp_ * sizeof(Acc));
    std::memcpy(dv + count * vp_, value_grad, vp_ * sizeof(Acc));
    ++count;
  }

  void begin_block() { fill(taken_up_, window_, false); }

  // A slot took its key up from this row of the block.
  void take_up(int64_t slot, int64_t row) {
    const int64_t at = row_of_[slot], last = --count;
    taken_up_[row] = true;
    std::memcpy(block_dk_ + row * dp_, dk + at * dp_, dp_ * sizeof(Acc));
    std::memcpy(block_dv_ + row * vp_, dv + at * vp_, vp_ * sizeof(Acc));
    row_of_[slot] = -1;
    if (at == last) return;
    std::memcpy(keys + at * dp_, keys + last * dp_, dp_ * sizeof(Acc));
    std::memcpy(values + at * vp_, values + last * vp_, vp_ * sizeof(Acc));
    std::memcpy(dk + at * dp_, dk + last * dp_, dp_ * sizeof(Acc));
    std::memcpy(dv + at * vp_, dv + last * vp_, vp_ * sizeof(Acc));
    slot_of_[at] = slot_of_[last];
    row_of_[slot_of_[at]] = at;
  }

  bool taken_up(int64_t row) const { return size_ > 0 && taken_up_[row]; }
  void add_taken_up(int64_t row, Acc* key_grad, Acc* value_grad) const {
    for (int64_t j = 0; j < dp_; ++j) key_grad[j] += block_dk_[row * dp_ + j];
    for (int64_t j = 0; j < vp_; ++j) value_grad[j] += block_dv_[row * vp_ + j];
  }

 private:
  int64_t size_ = 0, window_ = 0, dp_ = 0, vp_ = 0;
  int64_t* row_of_ = nullptr;   // of a slot's key; -1: another piece's, or none
  int64_t* slot_of_ = nullptr;  // of a row
  bool* taken_up_ = nullptr;    // (window): whether a slot took up this row of the block
  Acc* block_dk_ = nullptr;     // (window, dp): what it gathered since
  Acc* block_dv_ = nullptr;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
