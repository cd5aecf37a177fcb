// The fused forward of far keys beside near ones, for 16-bit inputs: what a converted model calls.
// linear_attention_forward takes it where it applies; the chunk table, hard keys, decay and the
// window's part of the final state are the other kernels'. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// A window whose chunks have no far keys of their own, sizes that the kernels are built for, and
// rows that asynchronous copies can take. DIJIANG_CUDA_FUSED=0 in the environment: never.
bool fused_mixed_applies(const LinearAttentionParams& params);

// In the place of plan_attention: no features in memory, and states of 16 bits.
Attention plan_fused_mixed(const LinearAttentionParams& params, Arena& arena);

// Outputs and statistics of all rows, and the final state of the far keys. The chunk table, hard
// keys and decay are there.
void launch_fused_mixed(const Attention& a, cudaStream_t stream);

}  // namespace dijiang::cuda
