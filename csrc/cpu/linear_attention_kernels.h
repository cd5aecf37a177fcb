// Entry points of the linear attention kernels, included once per instruction set.
#pragma once

#include "cpu/backward_keys.h"
#include "cpu/linear_attention_forward.h"
#include "cpu/linear_attention_update.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
void forward_tasks(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  LinearAttentionForward<Acc> forward(params);
  for (int64_t task = begin; task < end; ++task) {
    forward.run(task, params.initial, params.final);
    const KeyWalk<Acc>& walk = forward.walk();
    if (params.final.length && walk.head == 0) {
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
void backward_tasks(const LinearAttentionBackwardParams& params, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  BackwardQueries<Acc> queries(params);
  BackwardKeys<Acc> keys(params, queries);
  for (int64_t task = begin; task < end; ++task) {
    queries.run(task);
    keys.run();
  }
}

void linear_attention_forward(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return forward_tasks<double>(params, begin, end);
  forward_tasks<float>(params, begin, end);
}

void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return update_tasks<double>(params, begin, end);
  update_tasks<float>(params, begin, end);
}

void linear_attention_backward(const LinearAttentionBackwardParams& params, int64_t begin,
                               int64_t end) {
  if (params.forward.dtype == DType::kFloat64) return backward_tasks<double>(params, begin, end);
  backward_tasks<float>(params, begin, end);
}

}  // namespace dijiang::cpu::DIJIANG_ISA
