// The feature map of 16-bit inputs on the matrix units: x is read once, phi written once.
// feature_map_forward takes it where it applies. Host functions alone: no kernels here.
#pragma once

#include <cuda_runtime.h>

#include "dijiang/core/feature_map.h"

namespace dijiang::cuda {

// Sizes that the kernel is built for, and rows in whole pieces of 16 bytes.
// DIJIANG_CUDA_FUSED=0 in the environment: never.
bool fused_feature_map_applies(const FeatureMapParams& params);

cudaError_t fused_feature_map(const FeatureMapParams& params, cudaStream_t stream);

}  // namespace dijiang::cuda
