// CUDA launchers of feature_map.h: every pointer is device memory. kFloat64 is refused with
// cudaErrorNotSupported. Launchers never synchronise and allocate nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "dijiang/core/feature_map.h"

namespace dijiang::cuda {

size_t feature_map_forward_workspace(const FeatureMapParams& params);
cudaError_t feature_map_forward(const FeatureMapParams& params, void* workspace,
                                cudaStream_t stream);

// Of params.workspace.
size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params);
cudaError_t feature_map_backward(const FeatureMapBackwardParams& params, cudaStream_t stream);

}  // namespace dijiang::cuda
