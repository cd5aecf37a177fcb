// C (64 x columns) += A (64 x depth) B (depth x columns), all float tiles in shared memory, by a
// block of 256 threads. Float inputs use float FMAs; 16-bit inputs the matrix units in tf32, which
// holds their values exactly; an operand computed in float is rounded, or split in two where its
// full precision matters.
#pragma once

#include <mma.h>

#include "cuda/device_math.h"

namespace dijiang::cuda {

constexpr int kThreads = 256;
constexpr int kRows = 64;              // of a tile of queries, keys or features
constexpr int kDepth = 32;             // of one step of a product
constexpr int kRowStride = kRows + 4;  // in floats; a multiple of 4 for the matrix units
constexpr int kDepthStride = kDepth + 4;

// A tile of 64 x kDepth (either way round) or 64 x 64.
constexpr int kDepthTile =
    kRows * kDepthStride > kDepth* kRowStride ? kRows* kDepthStride : kDepth* kRowStride;
constexpr int kSquareTile = kRows * kRowStride;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTf32 = false;
#else
constexpr bool kHasTf32 = true;
#endif

template <class T>
constexpr bool kUsesMatrixUnits = kHasTf32;
template <>
constexpr bool kUsesMatrixUnits<float> = false;

// What the products will see of a computed operand: sums formed beside a product (denominators)
// then belong to the same numbers.
template <class T>
__device__ inline float operand(float x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (kUsesMatrixUnits<T>) return nvcuda::wmma::__float_to_tf32(x);
#endif
  return x;
}

// How an operand lies in its tile: [row][depth] / [depth][column] is row-major.
enum class Order { kRowMajor, kColumnMajor };

template <int kColumns>
struct FmaAccumulator {
  static constexpr int kPerThread = kColumns / 16;
  float value[4][kPerThread];

  __device__ void clear() {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < kPerThread; ++j) value[i][j] = 0.0f;
    }
  }

  template <Order kA, Order kB>
  __device__ void multiply(const float* a, int lda, const float* b, int ldb, int depth) {
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16;
    DIJIANG_UNROLL(4)
    for (int k = 0; k < depth; ++k) {
      float x[4], y[kPerThread];
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        x[i] = kA == Order::kRowMajor ? a[(row + i) * lda + k] : a[k * lda + row + i];
      }
      DIJIANG_UNROLL()
      for (int j = 0; j < kPerThread; ++j) {
        const int n = column + 16 * j;
        y[j] = kB == Order::kRowMajor ? b[k * ldb + n] : b[n * ldb + k];
      }
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        DIJIANG_UNROLL()
        for (int j = 0; j < kPerThread; ++j) value[i][j] = fmaf(x[i], y[j], value[i][j]);
      }
    }
  }

  __device__ void store(float* c, int ldc) const {
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16;
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      DIJIANG_UNROLL()
      for (int j = 0; j < kPerThread; ++j) c[(row + i) * ldc + column + 16 * j] = value[i][j];
    }
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Eight warps: four bands of 16 rows, two halves of the columns.
template <int kColumns>
struct MatrixAccumulator {
  static constexpr int kPerWarp = kColumns / 32;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 8, float> value[kPerWarp];

  __device__ void clear() {
    for (int j = 0; j < kPerWarp; ++j) nvcuda::wmma::fill_fragment(value[j], 0.0f);
  }

  template <Order kA, Order kB, bool kSplitA, bool kSplitB>
  __device__ void multiply(const float* a, int lda, const float* b, int ldb, int depth) {
    namespace wmma = nvcuda::wmma;
    using LayoutA = std::conditional_t<kA == Order::kRowMajor, wmma::row_major, wmma::col_major>;
    using LayoutB = std::conditional_t<kB == Order::kRowMajor, wmma::row_major, wmma::col_major>;
    const int warp = threadIdx.x / 32;
    const int row = warp % 4 * 16, column = warp / 4 * (kColumns / 2);
    DIJIANG_UNROLL()
    for (int k = 0; k < depth; k += 8) {
      wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, LayoutA> high_a, low_a;
      wmma::load_matrix_sync(high_a, kA == Order::kRowMajor ? a + row * lda + k : a + k * lda + row,
                             lda);
      split<kSplitA>(high_a, low_a);
      DIJIANG_UNROLL()
      for (int j = 0; j < kPerWarp; ++j) {
        wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, LayoutB> high_b, low_b;
        const int n = column + 16 * j;
        wmma::load_matrix_sync(high_b, kB == Order::kRowMajor ? b + k * ldb + n : b + n * ldb + k,
                               ldb);
        split<kSplitB>(high_b, low_b);
        if constexpr (kSplitA) wmma::mma_sync(value[j], low_a, high_b, value[j]);
        if constexpr (kSplitB) wmma::mma_sync(value[j], high_a, low_b, value[j]);
        wmma::mma_sync(value[j], high_a, high_b, value[j]);
      }
    }
  }

  __device__ void store(float* c, int ldc) const {
    const int warp = threadIdx.x / 32;
    const int row = warp % 4 * 16, column = warp / 4 * (kColumns / 2);
    for (int j = 0; j < kPerWarp; ++j) {
      nvcuda::wmma::store_matrix_sync(c + row * ldc + column + 16 * j, value[j], ldc,
                                      nvcuda::wmma::mem_row_major);
    }
  }

 private:
  template <bool kSplit, class Fragment>
  __device__ static void split(Fragment& high, Fragment& low) {
    for (int e = 0; e < high.num_elements; ++e) {
      const float x = high.x[e];
      high.x[e] = nvcuda::wmma::__float_to_tf32(x);
      if constexpr (kSplit) low.x[e] = nvcuda::wmma::__float_to_tf32(x - high.x[e]);
    }
    if constexpr (!kSplit) (void)low;
  }
};
#endif

// T is the type of the attention's inputs. The caller puts barriers around the tiles' reuse.
template <class T, int kColumns = kRows>
struct TileProduct {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  std::conditional_t<kUsesMatrixUnits<T>, MatrixAccumulator<kColumns>, FmaAccumulator<kColumns>>
      sum;
#else
  FmaAccumulator<kColumns> sum;
#endif

  __device__ TileProduct() { sum.clear(); }

  template <Order kA, Order kB, bool kSplitA = false, bool kSplitB = false>
  __device__ void multiply(const float* a, int lda, const float* b, int ldb, int depth) {
    if constexpr (kUsesMatrixUnits<T>) {
      sum.template multiply<kA, kB, kSplitA, kSplitB>(a, lda, b, ldb, depth);
    } else {
      sum.template multiply<kA, kB>(a, lda, b, ldb, depth);
    }
  }

  __device__ void store(float* c, int ldc) const { sum.store(c, ldc); }
};

}  // namespace dijiang::cuda
