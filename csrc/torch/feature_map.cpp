#include "torch/feature_map.h"

#include <torch/csrc/stable/library.h>

#include "torch/cpu_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CPU, m) {
  using namespace dijiang::binding;
  m.impl("feature_map_fwd", TORCH_BOX(&feature_map_fwd<CpuBackend>));
  m.impl("feature_map_bwd", TORCH_BOX(&feature_map_bwd<CpuBackend>));
}
