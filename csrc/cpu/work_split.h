// Attention cut into shares of equal cost, one a thread. A share takes whole tasks in their order
// and cuts the one where it ends: the next goes on there, once it has walked over what lies before.
#pragma once

#include <cstdint>
#include <vector>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

// Share i is pieces [first[i], first[i + 1]).
template <typename Piece>
struct Shares {
  std::vector<Piece> pieces;
  std::vector<int64_t> first = {0};
  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
};

Shares<AttentionPiece> split_forward(const LinearAttentionParams& params, int64_t num_threads);
Shares<BackwardPiece> split_backward(const LinearAttentionBackwardParams& params,
                                     int64_t num_threads);

}  // namespace dijiang::cpu
