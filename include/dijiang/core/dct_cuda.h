// CUDA launchers of dct.h: every pointer is device memory. kFloat64 is refused with
// cudaErrorNotSupported. Powers of two up to 8192, small lengths and with 16 bits multiples of 8 up
// to 128 are one kernel; the others go through cuFFT, whose plans are made once for each (device,
// length, rows) and kept.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "dijiang/core/dct.h"

namespace dijiang::cuda {

// Of the current device.
size_t dct_workspace(const DctParams& params);
cudaError_t dct(const DctParams& params, void* workspace, cudaStream_t stream);

}  // namespace dijiang::cuda
