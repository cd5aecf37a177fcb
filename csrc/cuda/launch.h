// How kernels are started and name their dynamic shared memory. The same sources run on a GPU and
// under tests/cpp/cuda_emulator, which brings its own macros.
#pragma once

#include <cuda_runtime.h>

#ifndef DIJIANG_CUDA_EMULATION
#define DIJIANG_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<(grid), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__)

// Before a loop; no argument: unrolled fully.
#define DIJIANG_PRAGMA(text) _Pragma(#text)
#define DIJIANG_UNROLL(times) DIJIANG_PRAGMA(unroll times)

#define DIJIANG_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
#endif

namespace dijiang::cuda {

// Above 48 KB a kernel has to opt in to its dynamic shared memory.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(bytes));
  }
}

}  // namespace dijiang::cuda
