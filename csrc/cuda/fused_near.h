// The fused forward of near keys alone, for 16-bit inputs: sinks, hard keys and the window, no far
// keys. linear_attention_forward takes it for the rows where it applies; the chunk table, the
// choice of hard keys and the final state are the other kernels'. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// No features, and what near rows ask.
bool fused_near_applies(const LinearAttentionParams& params);
// Near keys of sizes that the kernels are built for, and rows that asynchronous copies can take.
// DIJIANG_CUDA_FUSED=0 in the environment: never.
bool near_rows_apply(const LinearAttentionParams& params);

// Outputs and statistics of all rows. The chunk table and the slots of hard keys are there.
void launch_fused_near(const Attention& a, cudaStream_t stream);

}  // namespace dijiang::cuda
