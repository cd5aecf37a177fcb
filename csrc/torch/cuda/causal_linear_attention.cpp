#include "torch/causal_linear_attention.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/cuda_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CUDA, m) {
  using namespace dijiang::binding;
  m.impl("linear_attention_fwd", TORCH_BOX(&linear_attention_fwd<CudaBackend>));
  m.impl("linear_attention_bwd", TORCH_BOX(&linear_attention_bwd<CudaBackend>));
  m.impl("linear_attention_update", TORCH_BOX(&linear_attention_update<CudaBackend>));
}
