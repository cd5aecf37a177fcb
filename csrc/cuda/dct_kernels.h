// DCT kernels: products with the matrix for small lengths, FFTs in registers for powers of two, and
// what comes before and after cuFFT for the others. The method is that of csrc/cpu/dct_kernel.h:
// Makhoul's reordering v (even elements upwards, then odd ones downwards) makes a DCT of n a real
// FFT V of n, with X_k = a_k Re U_k, X_{n-k} = -a_k Im U_k, U_k = exp(-pi i k / 2n) V_k.
#pragma once

#include "cuda/dct_products.h"
#include "cuda/dct_registers.h"

namespace dijiang::cuda {

constexpr int kDctThreads = 256;
constexpr int kDctTilesPerBlock = 8;  // that share one computation of the matrix
constexpr int kDctDense = 32;         // up to here every length but a power of two is a product

// v[makhoul_place(n, j)] = x[j]
__device__ inline int makhoul_place(int n, int j) { return j % 2 ? n - 1 - j / 2 : j / 2; }

// --- small lengths -------------------------------------------------------------------------------

template <class T, int kType>
__global__ void __launch_bounds__(kDctThreads) dct_dense(DctRows p) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const int n = p.n, tile_rows = kDctThreads / n;
  auto* matrix = reinterpret_cast<float*>(raw);  // (n, n): [element of x][element of out]
  float* tile = matrix + n * n;
  const auto* x = static_cast<const T*>(p.x.data);
  auto* out = static_cast<T*>(p.out);
  for (int e = threadIdx.x; e < n * n; e += kDctThreads) {
    const int from = e / n, to = e % n;
    const int k = kType == 2 ? to : from, i = kType == 2 ? from : to;
    matrix[e] = dct_scale(k, n) * cospif(static_cast<float>((2 * i + 1) * k % (4 * n)) / (2 * n));
  }
  const int r = threadIdx.x / n, c = threadIdx.x % n;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kDctTilesPerBlock * tile_rows;
  for (int i = 0; i < kDctTilesPerBlock; ++i) {
    const int64_t row = begin + static_cast<int64_t>(i) * tile_rows + r;
    const bool active = r < tile_rows && row < p.rows;
    __syncthreads();
    if (active) tile[threadIdx.x] = to_float(x[p.offset(row) + c * p.x.stride_dim]);
    __syncthreads();
    if (!active) continue;
    float sum = 0.0f;
    for (int k = 0; k < n; ++k) sum = fmaf(tile[r * n + k], matrix[k * n + c], sum);
    out[row * n + c] = from_float<T>(sum);
  }
}

// --- before and after cuFFT ----------------------------------------------------------------------

// Both kernels walk over rows [first, first + rows) of p, whose work rows start at 0.
struct DctWork {
  int64_t first, rows;
  float* real;       // (rows, n)
  float2* spectrum;  // (rows, n / 2 + 1)
};

template <class T, int kType>
__global__ void __launch_bounds__(kDctThreads) dct_before_fft(DctRows p, DctWork work) {
  const int n = p.n, width = kType == 2 ? n : n / 2 + 1;
  const auto* x = static_cast<const T*>(p.x.data);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kDctThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kDctThreads + threadIdx.x;
       e < work.rows * width; e += stride) {
    const int64_t row = e / width;
    const int c = static_cast<int>(e % width);
    const T* source = x + p.offset(work.first + row);
    if (kType == 2) {
      work.real[row * n + makhoul_place(n, c)] = to_float(source[c * p.x.stride_dim]);
      continue;
    }
    const float2 t = turn(0.5f * c / n);
    const float a = dct_scale(c, n), here = to_float(source[c * p.x.stride_dim]);
    if (c == 0) {
      work.spectrum[e] = make_float2(a * here, 0.0f);
    } else {
      const float there = to_float(source[(n - c) * p.x.stride_dim]);
      work.spectrum[e] =
          make_float2(0.5f * a * (t.x * here + t.y * there), 0.5f * a * (t.y * here - t.x * there));
    }
  }
}

template <class T, int kType>
__global__ void __launch_bounds__(kDctThreads) dct_after_fft(DctRows p, DctWork work) {
  const int n = p.n, width = kType == 2 ? n / 2 + 1 : n;
  auto* out = static_cast<T*>(p.out) + work.first * n;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kDctThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kDctThreads + threadIdx.x;
       e < work.rows * width; e += stride) {
    const int64_t row = e / width;
    const int c = static_cast<int>(e % width);
    if (kType == 3) {
      out[e] = from_float<T>(work.real[row * n + makhoul_place(n, c)]);
      continue;
    }
    const float2 t = turn(0.5f * c / n), v = work.spectrum[e];
    const float a = dct_scale(c, n);
    out[row * n + c] = from_float<T>(a * (t.x * v.x + t.y * v.y));
    if (c > 0 && 2 * c != n) out[row * n + n - c] = from_float<T>(a * (t.y * v.x - t.x * v.y));
  }
}

// --- launches ------------------------------------------------------------------------------------

inline bool dct_uses_cufft(const DctRows& p) {
  const bool power_of_two = (p.n & (p.n - 1)) == 0;
  return !p.products && p.n > kDctDense && !(power_of_two && p.n <= 1 << kDctRegistersMost);
}

// As many blocks as are on the device at a time, with tiles for each as equal as may be.
inline unsigned dct_grid(int64_t tiles, int blocks_of_multiprocessor) {
  const int64_t most =
      int64_t{blocks_of_multiprocessor} * device_attribute(cudaDevAttrMultiProcessorCount);
  return grid_size(ceil_div(tiles, ceil_div(tiles, most > 0 ? most : 1)));
}

template <class T, int kType, int kWidth>
void launch_dct_products(const DctRows& p, cudaStream_t stream) {
  constexpr int bytes = kDctProductBytes<kWidth>;
  const int64_t tiles = ceil_div(count_pieces(p.rows / p.seqlen, p.seqlen), kWalkWarps);
  allow_shared(dct_products<T, kType, kWidth>, bytes);
  DIJIANG_LAUNCH((dct_products<T, kType, kWidth>), dct_grid(tiles, kDctProductBlocks<kWidth>),
                 kWalkThreads, bytes, stream, p);
}

// False where n is no power of two that goes into registers.
template <class T, int kType, int kLog = kDctRegistersLeast>
bool launch_dct_in_registers(const DctRows& p, cudaStream_t stream) {
  using Plan = DctPlan<kLog>;
  if constexpr (kLog < kDctRegistersMost) {
    if (p.n != Plan::n) return launch_dct_in_registers<T, kType, kLog + 1>(p, stream);
  }
  if (p.n != Plan::n) return false;
  allow_shared(dct_in_registers<T, kType, kLog>, Plan::kBytes);
  DIJIANG_LAUNCH((dct_in_registers<T, kType, kLog>),
                 dct_grid(ceil_div(p.rows, Plan::kRows), Plan::kBlocks), Plan::kThreads,
                 Plan::kBytes, stream, p);
  return true;
}

// Of what needs no cuFFT.
template <class T, int kType>
void launch_dct(const DctRows& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (p.products) {
      return p.n <= 64 ? launch_dct_products<T, kType, 64>(p, stream)
                       : launch_dct_products<T, kType, 128>(p, stream);
    }
  }
  if (launch_dct_in_registers<T, kType>(p, stream)) return;
  const int64_t block_rows = int64_t{kDctTilesPerBlock} * (kDctThreads / p.n);
  const size_t shared = (p.n * p.n + kDctThreads) * sizeof(float);
  DIJIANG_LAUNCH((dct_dense<T, kType>), grid_size(ceil_div(p.rows, block_rows)), kDctThreads,
                 shared, stream, p);
}

inline unsigned dct_elementwise_grid(int64_t count) {
  const int64_t blocks = (count + kDctThreads - 1) / kDctThreads;
  return static_cast<unsigned>(blocks < 65536 ? blocks : 65536);
}
template <class T, int kType>
void launch_dct_before_fft(const DctRows& p, const DctWork& work, cudaStream_t stream) {
  DIJIANG_LAUNCH((dct_before_fft<T, kType>), dct_elementwise_grid(work.rows * p.n), kDctThreads, 0,
                 stream, p, work);
}
template <class T, int kType>
void launch_dct_after_fft(const DctRows& p, const DctWork& work, cudaStream_t stream) {
  DIJIANG_LAUNCH((dct_after_fft<T, kType>), dct_elementwise_grid(work.rows * p.n), kDctThreads, 0,
                 stream, p, work);
}

}  // namespace dijiang::cuda
