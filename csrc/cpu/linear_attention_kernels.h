// Entry points of the linear attention kernels, included once per instruction set.
#pragma once

#include "cpu/backward_keys.h"
#include "cpu/backward_queries.h"
#include "cpu/linear_attention_forward.h"
#include "cpu/linear_attention_update.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
void forward_pieces(const LinearAttentionParams& params, const AttentionPiece* pieces,
                    int64_t count) {
  const FlushSubnormals flush;
  LinearAttentionForward<Acc> forward(params);
  for (int64_t i = 0; i < count; ++i) {
    forward.run(pieces[i], params.initial, params.final);
    const KeyWalk<Acc>& walk = forward.walk();
    if (params.final.length && walk.head == 0 && walk.whole()) {
      params.final.length[walk.sequence] = walk.last_position();
    }
  }
}

template <typename Acc>
void update_tasks(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  LinearAttentionUpdate<Acc> update(params);
  for (int64_t task = begin; task < end; ++task) update.run(task);
}

template <typename Acc>
void backward_pieces(const LinearAttentionBackwardParams& params, BackwardCounts counts,
                     const BackwardPiece* pieces, int64_t count) {
  const FlushSubnormals flush;
  BackwardMaps<Acc> maps(params.forward);
  BackwardQueries<Acc> queries(params, counts, maps);
  BackwardKeys<Acc> keys(params, counts, maps);
  for (int64_t i = 0; i < count; ++i) {
    maps.set(pieces[i].task % params.forward.num_kv_heads);
    if (pieces[i].half == BackwardHalf::kQueries) {
      queries.run(pieces[i]);
    } else {
      keys.run(pieces[i]);
    }
  }
}

void linear_attention_forward(const LinearAttentionParams& params, const AttentionPiece* pieces,
                              int64_t count) {
  if (params.dtype == DType::kFloat64) return forward_pieces<double>(params, pieces, count);
  forward_pieces<float>(params, pieces, count);
}

void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return update_tasks<double>(params, begin, end);
  update_tasks<float>(params, begin, end);
}

void linear_attention_backward(const LinearAttentionBackwardParams& params, BackwardCounts counts,
                               const BackwardPiece* pieces, int64_t count) {
  if (params.forward.dtype == DType::kFloat64) {
    return backward_pieces<double>(params, counts, pieces, count);
  }
  backward_pieces<float>(params, counts, pieces, count);
}

}  // namespace dijiang::cpu::DIJIANG_ISA
