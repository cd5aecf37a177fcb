// DCT kernels. The method is that of csrc/cpu/dct_kernel.h: Makhoul's reordering v (even elements
// upwards, then odd ones downwards) makes a DCT of n a real FFT V of n, with
// X_k = a_k Re U_k, X_{n-k} = -a_k Im U_k, U_k = exp(-pi i k / 2n) V_k.
#pragma once

#include "cuda/device_math.h"
#include "dijiang/core/dct.h"

namespace dijiang::cuda {

constexpr int kDctThreads = 256;
constexpr int kDctTilesPerBlock = 8;  // that share one computation of the tables
constexpr int kDctSmallest = 8;       // power of two by FFT: four complex numbers a thread
constexpr int kDctLargest = 2048;
constexpr int kDctDense = 32;  // up to here every other length is a matrix product

struct DctRows {
  ConstView x;
  void* out;
  int64_t rows;
  int64_t heads, seqlen;
  int n;

  __device__ int64_t offset(int64_t row) const {
    const int64_t t = row % seqlen, h = row / seqlen % heads, b = row / seqlen / heads;
    return b * x.stride_batch + h * x.stride_head + t * x.stride_seq;
  }
};

__device__ inline float dct_scale(int k, int n) { return sqrtf((k > 0 ? 2.0f : 1.0f) / n); }

// v[makhoul_place(n, j)] = x[j]
__device__ inline int makhoul_place(int n, int j) { return j % 2 ? n - 1 - j / 2 : j / 2; }

// (cos, sin) of pi x.
__device__ inline float2 turn(float x) {
  float2 r;
  sincospif(x, &r.y, &r.x);
  return r;
}

// --- powers of two -------------------------------------------------------------------------------

// The tables and the rows of a block's tile in shared memory.
struct DctShared {
  float2* roots;    // cos and sin of 2 pi k / m, k < 3m/4, for the FFT of m = n / 2
  float2* turns;    // a_k times those of pi k / 2n, k <= m
  float2* halves;   // those of 2 pi k / n, k <= m
  float* tile;      // (rows, n)
  int64_t* offset;  // of each row in x

  static __host__ __device__ int rows(int n) { return kDctThreads / (n / 8); }
  static __host__ __device__ size_t bytes(int n) {
    const int m = n / 2;
    return (3 * (m / 4) + 2 * (m + 1)) * sizeof(float2) + rows(n) * (n * sizeof(float)) +
           rows(n) * sizeof(int64_t);
  }
  __device__ DctShared(char* raw, int n) {
    const int m = n / 2;
    offset = reinterpret_cast<int64_t*>(raw);
    roots = reinterpret_cast<float2*>(offset + rows(n));
    turns = roots + 3 * (m / 4);
    halves = turns + m + 1;
    tile = reinterpret_cast<float*>(halves + m + 1);
  }
  __device__ void fill(int n) const {
    const int m = n / 2;
    for (int k = threadIdx.x; k < 3 * (m / 4); k += kDctThreads) roots[k] = turn(2.0f * k / m);
    for (int k = threadIdx.x; k <= m; k += kDctThreads) {
      const float2 t = turn(0.5f * k / n);
      turns[k] = make_float2(dct_scale(k, n) * t.x, dct_scale(k, n) * t.y);
      halves[k] = turn(2.0f * k / n);
    }
  }
};

// w is (cos, sin): z exp(-i angle).
__device__ inline float2 rotate(float2 z, float2 w) {
  return make_float2(z.x * w.x + z.y * w.y, z.y * w.x - z.x * w.y);
}
__device__ inline float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float2 subtract(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }

// FFT of m complex numbers by m/4 threads (Stockham, radix 4, a last radix 2 where needed). On
// entry thread j holds z[r] = input[j + r m/4]; the result is in y. Every thread of the block comes
// here, with barriers that make y free to write.
__device__ inline void block_fft(int m, int j, float2 (&z)[4], float2* y, const float2* roots) {
  const int quarter = m / 4;
  for (int length = 1; length < m; length *= 4) {
    const int k = j & (length - 1);
    if (length * 2 == m) {
      const float2 b0 = rotate(z[2], roots[j]), b1 = rotate(z[3], roots[j + quarter]);
      y[j] = add(z[0], b0);
      y[j + quarter] = add(z[1], b1);
      y[j + 2 * quarter] = subtract(z[0], b0);
      y[j + 3 * quarter] = subtract(z[1], b1);
      break;
    }
    const int step = quarter / length;
    const float2 b = rotate(z[1], roots[k * step]);
    const float2 c = rotate(z[2], roots[2 * k * step]);
    const float2 d = rotate(z[3], roots[3 * k * step]);
    const float2 s = add(z[0], c), t = subtract(z[0], c), u = add(b, d), v = subtract(b, d);
    float2* target = y + (j - k) * 4 + k;
    target[0] = add(s, u);
    target[length] = make_float2(t.x + v.y, t.y - v.x);
    target[2 * length] = subtract(s, u);
    target[3 * length] = make_float2(t.x - v.y, t.y + v.x);
    __syncthreads();
    if (length * 4 == m) return;
    for (int r = 0; r < 4; ++r) z[r] = y[j + r * quarter];
    __syncthreads();
  }
  __syncthreads();
}

// V_k of the transpose: a_k exp(pi i k / 2n) (X_k - i X_{n-k}) / 2, without the half for k = 0.
__device__ inline float2 dct3_spectrum(const float* x, int n, int k, float2 t) {
  if (k == 0) return make_float2(t.x * x[0], 0.0f);
  return make_float2(0.5f * (t.x * x[k] + t.y * x[n - k]), 0.5f * (t.y * x[k] - t.x * x[n - k]));
}

template <class T, int kType>
__global__ void __launch_bounds__(kDctThreads) dct_power_of_two(DctRows p) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const int n = p.n, m = n / 2, quarter = m / 4;
  const DctShared shared(raw, n);
  const int tile_rows = DctShared::rows(n);
  const int local = threadIdx.x / quarter, j = threadIdx.x % quarter;
  float* row = shared.tile + local * n;
  auto* y = reinterpret_cast<float2*>(row);
  const auto* x = static_cast<const T*>(p.x.data);
  auto* out = static_cast<T*>(p.out);
  shared.fill(n);

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kDctTilesPerBlock * tile_rows;
  for (int i = 0; i < kDctTilesPerBlock; ++i) {
    const int64_t first = begin + static_cast<int64_t>(i) * tile_rows;
    if (first >= p.rows) break;
    const int count = static_cast<int>(p.rows - first < tile_rows ? p.rows - first : tile_rows);
    __syncthreads();
    for (int r = threadIdx.x; r < count; r += kDctThreads) shared.offset[r] = p.offset(first + r);
    __syncthreads();
    for (int e = threadIdx.x; e < tile_rows * n; e += kDctThreads) {
      const int r = e / n, c = e % n;
      const float value = r < count ? to_float(x[shared.offset[r] + c * p.x.stride_dim]) : 0.0f;
      shared.tile[r * n + (kType == 2 ? makhoul_place(n, c) : c)] = value;
    }
    __syncthreads();

    float2 z[4];
    for (int r = 0; r < 4; ++r) {
      const int k = j + r * quarter;
      if (kType == 2) {
        z[r] = y[k];
        continue;
      }
      const float2 v = dct3_spectrum(row, n, k, shared.turns[k]);
      const float2 w = dct3_spectrum(row, n, m - k, shared.turns[m - k]);
      const float2 h = shared.halves[k];
      const float2 o = make_float2(v.x - w.x, v.y + w.y);
      // Real and imaginary part swapped: an inverse FFT is a forward one between two swaps.
      z[r] =
          make_float2((v.y - w.y) + (h.x * o.x - h.y * o.y), (v.x + w.x) - (h.x * o.y + h.y * o.x));
    }
    __syncthreads();
    block_fft(m, j, z, y, shared.roots);

    if (kType == 2) {
      if (local >= count) continue;
      T* target = out + (first + local) * n;
      for (int k = j; k <= m; k += quarter) {
        const float2 v = y[k & (m - 1)], w = y[(m - k) & (m - 1)];
        const float2 h = shared.halves[k], t = shared.turns[k];
        const float2 o = make_float2(v.y + w.y, w.x - v.x);  // twice that of the odd elements
        const float re = 0.5f * ((v.x + w.x) + (h.x * o.x + h.y * o.y));
        const float im = 0.5f * ((v.y - w.y) + (h.x * o.y - h.y * o.x));
        target[k < m ? k : m] = from_float<T>(t.x * re + t.y * im);
        if (k > 0 && k < m) target[n - k] = from_float<T>(t.y * re - t.x * im);
      }
    } else {
      for (int e = threadIdx.x; e < count * n; e += kDctThreads) {
        const int r = e / n, c = e % n;
        out[first * n + e] = from_float<T>(shared.tile[r * n + (makhoul_place(n, c) ^ 1)]);
      }
    }
  }
}

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

inline DctRows dct_rows(const DctParams& p) {
  return {p.x, p.out, p.batch * p.heads * p.seqlen, p.heads, p.seqlen, static_cast<int>(p.n)};
}

inline bool dct_uses_cufft(int64_t n) {
  const bool power_of_two = (n & (n - 1)) == 0;
  return !(n <= kDctDense || (power_of_two && n <= kDctLargest));
}

// Lengths that need no cuFFT.
template <class T, int kType>
void launch_dct(const DctRows& p, cudaStream_t stream) {
  const bool power_of_two = (p.n & (p.n - 1)) == 0;
  const bool fft = power_of_two && p.n >= kDctSmallest;
  const int64_t block_rows = kDctTilesPerBlock * (fft ? DctShared::rows(p.n) : kDctThreads / p.n);
  const auto grid = static_cast<unsigned>((p.rows + block_rows - 1) / block_rows);
  if (fft) {
    DIJIANG_LAUNCH((dct_power_of_two<T, kType>), grid, kDctThreads, DctShared::bytes(p.n), stream,
                   p);
  } else {
    const size_t shared = (p.n * p.n + kDctThreads) * sizeof(float);
    DIJIANG_LAUNCH((dct_dense<T, kType>), grid, kDctThreads, shared, stream, p);
  }
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
