#include "torch/dct.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/cuda_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CUDA, m) {
  m.impl("dct", TORCH_BOX(&dijiang::binding::dct<dijiang::binding::CudaBackend>));
}
