#include "torch/feature_map.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/cuda_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CUDA, m) {
  using namespace dijiang::binding;
  m.impl("feature_map_fwd", TORCH_BOX(&feature_map_fwd<CudaBackend>));
  m.impl("feature_map_bwd", TORCH_BOX(&feature_map_bwd<CudaBackend>));
}
