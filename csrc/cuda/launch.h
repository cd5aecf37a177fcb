// How kernels are started and name their dynamic shared memory. The same sources run on a GPU and
// under tests/cpp/cuda_emulator, which brings its own macros.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef DIJIANG_CUDA_EMULATION
#define DIJIANG_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<(grid), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__)

// Before a loop; no argument: unrolled fully.
#define DIJIANG_PRAGMA(text) _Pragma(#text)
#define DIJIANG_UNROLL(times) DIJIANG_PRAGMA(unroll times)

#define DIJIANG_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
#endif

namespace dijiang::cuda {

// What allow_shared met first in this thread since launch_status was asked last.
inline cudaError_t& shared_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

// Above 48 KB a kernel has to opt in to its dynamic shared memory. A refusal is kept for
// launch_status: that of the launch itself would not say why.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess || shared_error() != cudaSuccess) return;
  // An invalid value here is more than a block can have.
  shared_error() = error == cudaErrorInvalidValue ? cudaErrorNotSupported : error;
}

// Of the launches of this thread since the last call; forgets their errors.
inline cudaError_t launch_status() {
  const cudaError_t launch = cudaGetLastError(), shared = shared_error();
  shared_error() = cudaSuccess;
  return shared != cudaSuccess ? shared : launch;
}

inline unsigned grid_size(int64_t x) { return static_cast<unsigned>(x); }

// Of the current device; 0 when it cannot be asked.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

// Asynchronous copies and products of 16-bit fragments.
inline bool device_is_sm80() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

// Zeroes `count` elements of a buffer that may be null.
template <class X>
void zero(X* buffer, int64_t count, cudaStream_t stream) {
  if (buffer && count > 0) cudaMemsetAsync(buffer, 0, count * sizeof(X), stream);
}

}  // namespace dijiang::cuda
