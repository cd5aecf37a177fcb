// The tokens of a task's sequence, and how many a kernel takes at a time.
#pragma once

#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

inline constexpr int64_t kTile = 64;  // the most rows of a tile

struct Sequence {
  int64_t index, batch, begin, end;

  Sequence(const LinearAttentionParams& p, int64_t task) : index(task / p.num_kv_heads) {
    const int32_t* segment = p.segments ? p.segments + 3 * index : nullptr;
    batch = segment ? segment[0] : index;
    begin = segment ? segment[1] : 0;
    end = segment ? segment[2] : p.seqlen;
  }
  int64_t length() const { return end - begin; }
  // The position of its first token: those before it are in the initial state.
  int64_t first_position(const LinearAttentionParams& p) const {
    return p.initial.length ? p.initial.length[index] : 0;
  }
};

}  // namespace dijiang::cpu
