// What both halves of the backward share.
#pragma once

#include "cpu/features.h"

namespace dijiang::cpu::DIJIANG_ISA {

// Products of a query's and a key's features may exceed 1 by this exponent before they are taken
// term by term: what underflows beside it is below 2^-66 of its row.
inline constexpr double kLargestExponent = 60;

// The feature maps of a kv head and of its query heads.
template <typename Acc>
class BackwardMaps {
 public:
  explicit BackwardMaps(const LinearAttentionParams& params)
      : p_(params), groups_(p_.num_heads / p_.num_kv_heads) {
    keys.allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fk.dct, true);
    queries_ = new (scratch_.take<Features<Acc>>(groups_)) Features<Acc>[groups_];
    for (int64_t g = 0; g < groups_; ++g) {
      queries_[g].allocate(scratch_, p_.kind, p_.num_features, p_.headdim, p_.fq.dct, true);
    }
  }
  void set(int64_t head) {
    if (head == head_) return;
    head_ = head;
    keys.set(p_.fk, head, p_.scale);
    for (int64_t g = 0; g < groups_; ++g) {
      const Features<Acc>* before = g > 0 ? &queries_[g - 1] : nullptr;
      queries_[g].set(p_.fq, head * groups_ + g, p_.scale, true, before);
    }
  }
  const Features<Acc>& query(int64_t g) const { return queries_[g]; }

  Features<Acc> keys;

 private:
  const LinearAttentionParams& p_;
  const int64_t groups_;
  Scratch scratch_;
  Features<Acc>* queries_ = nullptr;
  int64_t head_ = -1;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
