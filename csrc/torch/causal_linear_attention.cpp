#include "torch/causal_linear_attention.h"

#include <torch/csrc/stable/library.h>

#include "torch/cpu_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CPU, m) {
  using namespace dijiang::binding;
  m.impl("linear_attention_fwd", TORCH_BOX(&linear_attention_fwd<CpuBackend>));
  m.impl("linear_attention_bwd", TORCH_BOX(&linear_attention_bwd<CpuBackend>));
  m.impl("linear_attention_update", TORCH_BOX(&linear_attention_update<CpuBackend>));
}
