// CUDA launchers of linear_attention.h. Every pointer, segments and length included, is device
// memory; row statistics, strides and meaning are those of the CPU kernels. kFloat64 is refused
// with cudaErrorNotSupported. Launchers never synchronise and allocate nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cuda {

size_t linear_attention_forward_workspace(const LinearAttentionParams& params);
cudaError_t linear_attention_forward(const LinearAttentionParams& params, void* workspace,
                                     cudaStream_t stream);

size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params);
cudaError_t linear_attention_backward(const LinearAttentionBackwardParams& params,
                                      cudaStream_t stream);

cudaError_t linear_attention_update(const LinearAttentionParams& params, cudaStream_t stream);

}  // namespace dijiang::cuda
