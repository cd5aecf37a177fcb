#include "torch/kernelized_attention.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/cuda_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CUDA, m) {
  using namespace dijiang::binding;
  m.impl("kernelized_attention_fwd", TORCH_BOX(&kernelized_attention_fwd<CudaBackend>));
  m.impl("kernelized_attention_bwd", TORCH_BOX(&kernelized_attention_bwd<CudaBackend>));
  m.impl("kernelized_attention_update", TORCH_BOX(&kernelized_attention_update<CudaBackend>));
}
