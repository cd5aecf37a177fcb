// The emulator itself: what it must compute and what it must catch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <mma.h>

#include <cmath>
#include <vector>

#include "cuda/launch.h"

namespace {

__global__ void reverse_through_shared(const float* in, float* out) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  tile[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

TEST(CudaEmulator, RunsBlocksWithBarriers) {
  std::vector<float> in(3 * 96), out(3 * 96);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
  DIJIANG_LAUNCH(reverse_through_shared, 3, 96, 96 * 4, nullptr, in.data(), out.data());
  for (int b = 0; b < 3; ++b) {
    for (int i = 0; i < 96; ++i) EXPECT_EQ(out[b * 96 + i], in[b * 96 + 95 - i]);
  }
}

__global__ void warp_functions(int* out) {
  int sum = int(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  out[threadIdx.x] = sum;
  out[64 + threadIdx.x] = __shfl_up_sync(~0u, int(threadIdx.x), 1);
  out[128 + threadIdx.x] = int(__ballot_sync(~0u, threadIdx.x % 2));
}

TEST(CudaEmulator, WarpFunctions) {
  std::vector<int> out(192);
  DIJIANG_LAUNCH(warp_functions, 1, 64, 0, nullptr, out.data());
  EXPECT_EQ(out[0], 31 * 32 / 2);
  EXPECT_EQ(out[63], 31 * 32 / 2 + 32 * 32);
  EXPECT_EQ(out[64 + 5], 4);
  EXPECT_EQ(out[64 + 32], 32);
  EXPECT_EQ(unsigned(out[128]), 0xAAAAAAAAu);
}

__global__ void diverging_barriers() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missed_barrier() {
  if (threadIdx.x < 16) return;
  __syncthreads();
}
[[maybe_unused]] __global__ void write_behind_shared() {
  DIJIANG_DYNAMIC_SHARED(raw);
  raw[64 + 64 * threadIdx.x] = 1;
}
__global__ void read_unwritten(float* out) {
  DIJIANG_DYNAMIC_SHARED(raw);
  out[threadIdx.x] = reinterpret_cast<float*>(raw)[threadIdx.x];
}

TEST(CudaEmulator, CatchesWrongKernels) {
  EXPECT_THROW(DIJIANG_LAUNCH(diverging_barriers, 1, 32, 0, nullptr), std::runtime_error);
  EXPECT_THROW(DIJIANG_LAUNCH(missed_barrier, 1, 32, 0, nullptr), std::runtime_error);
#if !defined(__SANITIZE_ADDRESS__)  // which would end the program, rightly
  EXPECT_THROW(DIJIANG_LAUNCH(write_behind_shared, 1, 1, 64, nullptr), std::runtime_error);
#endif
  EXPECT_THROW(DIJIANG_LAUNCH(missed_barrier, dim3(1, 70000), 32, 0, nullptr), std::runtime_error);
  float value = 0;
  DIJIANG_LAUNCH(read_unwritten, 1, 1, 4, nullptr, &value);
  EXPECT_TRUE(std::isnan(value));
}

// A neighbour's value read without a barrier: it depends on who runs first.
__global__ void racing(float* out) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[(threadIdx.x + 1) % 32];
}

TEST(CudaEmulator, SchedulesShowRaces) {
  float up[32], down[32];
  DIJIANG_LAUNCH(racing, 1, 32, 128, nullptr, up);
  cuda_emulator::set_schedule(cuda_emulator::Schedule::kDescending);
  DIJIANG_LAUNCH(racing, 1, 32, 128, nullptr, down);
  cuda_emulator::set_schedule(cuda_emulator::Schedule::kAscending);
  EXPECT_TRUE(std::isnan(up[0]));
  EXPECT_EQ(down[0], 1.0f);
}

__global__ void tf32_product(const float* a, const float* b, float* c) {
  namespace wmma = nvcuda::wmma;
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> fc;
  wmma::fill_fragment(fc, 0.0f);
  wmma::load_matrix_sync(fa, a, 8);
  wmma::load_matrix_sync(fb, b, 8);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}

TEST(CudaEmulator, MatrixFragments) {
  alignas(32) float a[128], b[128], c[256];
  for (int i = 0; i < 128; ++i) {
    a[i] = float(i % 7 - 3);
    b[i] = float(i % 5 - 2);
  }
  DIJIANG_LAUNCH(tf32_product, 1, 32, 0, nullptr, a, b, c);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[i * 8 + k] * b[j * 8 + k];
      EXPECT_EQ(c[i * 16 + j], sum);
    }
  }
}

TEST(CudaEmulator, NarrowTypesRoundToNearestEven) {
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(1.00390625f)), 1.0f);  // a tie
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(1.01171875f)), 1.015625f);
  EXPECT_EQ(__half2float(__float2half_rn(1.00048828125f)), 1.0f);  // a tie
  EXPECT_EQ(__half2float(__float2half_rn(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isinf(__half2float(__float2half_rn(65520.0f))));
  for (int bits = 0; bits < 0x7C00; ++bits) {
    const __half x{uint16_t(bits)};
    EXPECT_EQ(__float2half_rn(__half2float(x)).bits, bits);
  }
}

}  // namespace
