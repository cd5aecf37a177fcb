// The fused backward of near keys, alone or beside far ones, for 16-bit inputs: taken where it
// applies, in the place of backward_near.h and backward_hard.h. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include "cuda/backward_layout.h"

namespace dijiang::cuda {

// Where its rows apply (fused_near.h), for headdim and headdim_v up to 256 and gradients in whole
// pieces.
bool fused_near_backward_applies(const LinearAttentionBackwardParams& params);

// near_q, near_k and the near part of grad_v, but for the sum over the sinks' parts. Row statistics
// are prepared, near_k and grad_v are zeros.
void launch_fused_near_backward(const Backward& b, cudaStream_t stream);

}  // namespace dijiang::cuda
