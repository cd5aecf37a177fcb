// The fused backward of far keys, alone or beside near ones, for bfloat16: features and their
// gradients nowhere in memory, but for 16-bit ones where omega's gradient is wanted.
// linear_attention_backward takes it where it applies. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cuda {

// What a fused forward takes, of sizes that these kernels are built for.
bool fused_far_backward_applies(const LinearAttentionBackwardParams& params);

size_t fused_far_backward_workspace(const LinearAttentionBackwardParams& params);
cudaError_t fused_far_backward(const LinearAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace dijiang::cuda
