#include "torch/kernelized_attention.h"

#include <torch/csrc/stable/library.h>

#include "torch/cpu_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CPU, m) {
  using namespace dijiang::binding;
  m.impl("kernelized_attention_fwd", TORCH_BOX(&kernelized_attention_fwd<CpuBackend>));
  m.impl("kernelized_attention_bwd", TORCH_BOX(&kernelized_attention_bwd<CpuBackend>));
  m.impl("kernelized_attention_update", TORCH_BOX(&kernelized_attention_update<CpuBackend>));
}
