#include "torch/dct.h"

#include <torch/csrc/stable/library.h>

#include "torch/cpu_backend.h"

STABLE_TORCH_LIBRARY_IMPL(dijiang, CPU, m) {
  m.impl("dct", TORCH_BOX(&dijiang::binding::dct<dijiang::binding::CpuBackend>));
}
