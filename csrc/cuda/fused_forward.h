// The fused forward for 16-bit inputs: raw q, k, v in, outputs out, features nowhere in memory.
// linear_attention_forward takes it where it applies. Host functions alone: no kernels here.
#pragma once

#include <cuda_runtime.h>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cuda {

// Far keys alone, features of a kind computed inside, sizes that the kernels are built for, and
// rows that asynchronous copies can take. DIJIANG_CUDA_FUSED=0 in the environment: never.
bool fused_forward_applies(const LinearAttentionParams& params);

size_t fused_forward_workspace(const LinearAttentionParams& params);
cudaError_t fused_forward(const LinearAttentionParams& params, void* workspace,
                          cudaStream_t stream);

}  // namespace dijiang::cuda
