// The choice of hard keys for 16-bit inputs on the matrix units (fused_votes.h). hard_keys.h takes
// it where it applies. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// Sizes that the kernel is built for, and rows in whole pieces of 16 bytes.
// DIJIANG_CUDA_FUSED=0 in the environment: never.
bool fused_choice_applies(const LinearAttentionParams& params);

// The table, the counts of filled slots, and the final state's votes and sums. The chunk table is
// there.
void launch_fused_choice(const Attention& a, cudaStream_t stream);

}  // namespace dijiang::cuda
