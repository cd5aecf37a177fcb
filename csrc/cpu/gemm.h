// Small dense products for tiles that lie in cache: C (rows x cols) = or += A B, run-time sizes.
// A is read through two strides, so that A^T is as good as A; B^T is turned a panel at a time.
#pragma once

#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

#if DIJIANG_ISA_LEVEL == 4
inline constexpr int kGemmRows = 12;
#else
inline constexpr int kGemmRows = 6;  // 12 sums, 2 of B and 1 of A fill 16 registers
#endif
template <typename T>
inline constexpr int kGemmCols = 2 * kLanes<T>;

// C (R x kGemmCols) = or += A B. A[i, p] = a[i * a_row + p * a_depth].
template <int R, typename T>
DIJIANG_INLINE void gemm_block(bool add, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                               const T* b, int64_t b_row, T* c, int64_t c_row) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    sum[i][0] = add ? load(c + i * c_row) : Vec<T>{};
    sum[i][1] = add ? load(c + i * c_row + L) : Vec<T>{};
  }
  for (int64_t p = 0; p < depth; ++p) {
    const Vec<T> b0 = load(b + p * b_row), b1 = load(b + p * b_row + L);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> ai = broadcast(a[i * a_row + p * a_depth]);
      sum[i][0] = multiply_add(ai, b0, sum[i][0]);
      sum[i][1] = multiply_add(ai, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    store(c + i * c_row, sum[i][0]);
    store(c + i * c_row + L, sum[i][1]);
  }
}

// Rows [i, i + R) of A have zeros outside the depths [i - skip, i + R + reach).
struct DepthRange {
  static constexpr int64_t kAll = int64_t{1} << 40;
  int64_t skip = kAll, reach = kAll;
};

template <int R, typename T>
DIJIANG_INLINE void gemm_rows(int64_t i, bool add, int64_t depth, const T* a, int64_t a_row,
                              int64_t a_depth, const T* b, int64_t b_row, T* c, int64_t c_row,
                              DepthRange range) {
  const int64_t begin = i > range.skip ? i - range.skip : 0;
  const int64_t end = i + R + range.reach < depth ? i + R + range.reach : depth;
  gemm_block<R>(add, end - begin, a + i * a_row + begin * a_depth, a_row, a_depth,
                b + begin * b_row, b_row, c + i * c_row, c_row);
}

// All rows of one panel of kGemmCols columns.
template <typename T>
inline void gemm_panel(bool add, int64_t rows, int64_t depth, const T* a, int64_t a_row,
                       int64_t a_depth, const T* b, int64_t b_row, T* c, int64_t c_row,
                       DepthRange range) {
  int64_t i = 0;
  // Two blocks of 4 rows are faster than one of 6 and one of 2, whose sums wait for each other.
  for (; i + kGemmRows <= rows && (kGemmRows != 6 || rows - i != 8); i += kGemmRows) {
    gemm_rows<kGemmRows>(i, add, depth, a, a_row, a_depth, b, b_row, c, c_row, range);
  }
  for (; i + 4 <= rows; i += 4) {
    gemm_rows<4>(i, add, depth, a, a_row, a_depth, b, b_row, c, c_row, range);
  }
  for (; i + 2 <= rows; i += 2) {
    gemm_rows<2>(i, add, depth, a, a_row, a_depth, b, b_row, c, c_row, range);
  }
  for (; i < rows; ++i) {
    gemm_rows<1>(i, add, depth, a, a_row, a_depth, b, b_row, c, c_row, range);
  }
}

// kLanes columns of n rows at p, zeros after the last row: columns[l] has number l of each.
template <typename T>
DIJIANG_INLINE void load_columns(const T* p, int64_t stride, int64_t n,
                                 Vec<T> (&columns)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<T>; ++l) columns[l] = l < n ? load(p + l * stride) : Vec<T>{};
  transpose<T>(columns);
}

// out (depth x cols, row stride out_stride) = B^T for n <= cols rows of B, zeros after them; cols
// is a multiple of kLanes.
template <typename T>
inline void turn(const T* b, int64_t b_stride, int64_t n, int64_t depth, T* out, int64_t out_stride,
                 int64_t cols) {
  constexpr int L = kLanes<T>;
  for (int64_t j = 0; j < cols; j += L) {
    int64_t p = 0;
    for (; p + L <= depth; p += L) {
      Vec<T> columns[L];
      load_columns(b + j * b_stride + p, b_stride, n - j, columns);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(out + (p + l) * out_stride + j, columns[l]);
    }
    for (; p < depth; ++p) {
      for (int64_t l = 0; l < L; ++l) {
        out[p * out_stride + j + l] = j + l < n ? b[(j + l) * b_stride + p] : T(0);
      }
    }
  }
}

enum class Operand { kPlain, kTransposed };
enum class Result { kAdd, kAssign };

// What a product of causal weights, (queries x keys), may leave out: keys later than first + i for
// query i. kResult: C is such weights, and those elements are not wanted (some are written). kLeft:
// A, as it is stored, is, and they are zero.
struct Causal {
  enum Kind { kNo, kResult, kLeft } kind = kNo;
  int64_t first = 0;
};

// C (rows x cols, row stride c_row) = or += op(A) op(B). Plain A is (rows x depth), transposed A is
// stored (depth x rows); plain B is (depth x cols), transposed B is stored (cols x depth).
template <Operand kA, Operand kB, Result kResult = Result::kAdd, typename T>
void gemm(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_stride, const T* b,
          int64_t b_stride, T* c, int64_t c_stride, Causal causal = {}) {
  constexpr int64_t kDepth = 256;  // a turned panel of B stays in the first-level cache
  constexpr int N = kGemmCols<T>;
  const int64_t a_row = kA == Operand::kPlain ? a_stride : 1;
  const int64_t a_depth = kA == Operand::kPlain ? 1 : a_stride;
  alignas(64) T panel[kDepth * N];
  if (kResult == Result::kAssign && depth == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) c[i * c_stride + j] = T(0);
    }
  }
  for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
    const bool add = kResult == Result::kAdd || p0 > 0;
    const int64_t dp = depth - p0 < kDepth ? depth - p0 : kDepth;
    DepthRange range;
    if (causal.kind == Causal::kLeft && kA == Operand::kPlain) range.reach = causal.first - p0;
    if (causal.kind == Causal::kLeft && kA == Operand::kTransposed) range.skip = causal.first + p0;
    for (int64_t j = 0; j < cols; j += N) {
      const int64_t n = cols - j < N ? cols - j : N;
      int64_t i0 = causal.kind == Causal::kResult && j > causal.first ? j - causal.first : 0;
      if (i0 > rows) i0 = rows;
      const T* ap = a + i0 * a_row + p0 * a_depth;
      const T* bp = panel;
      int64_t b_row = N;
      if constexpr (kB == Operand::kTransposed) {
        turn(b + j * b_stride + p0, b_stride, n, dp, panel, int64_t{N}, int64_t{N});
      } else if (n == N) {
        bp = b + p0 * b_stride + j;
        b_row = b_stride;
      } else {
        for (int64_t p = 0; p < dp; ++p) {
          for (int64_t jj = 0; jj < N; ++jj) {
            panel[p * N + jj] = jj < n ? b[(p0 + p) * b_stride + j + jj] : T(0);
          }
        }
      }
      if (n == N) {
        gemm_panel(add, rows - i0, dp, ap, a_row, a_depth, bp, b_row, c + i0 * c_stride + j,
                   c_stride, range);
        continue;
      }
      // Too narrow for whole vectors: through a strip of its own, a few rows at a time.
      alignas(64) T strip[kGemmRows * N];
      for (int64_t i = 0; i < rows - i0; i += kGemmRows) {
        const int64_t r = rows - i0 - i < kGemmRows ? rows - i0 - i : kGemmRows;
        gemm_panel(false, r, dp, ap + i * a_row, a_row, a_depth, bp, b_row, strip, int64_t{N},
                   DepthRange{range.skip - i, range.reach + i});
        for (int64_t ii = 0; ii < r; ++ii) {
          for (int64_t jj = 0; jj < n; ++jj) {
            T& at = c[(i0 + i + ii) * c_stride + j + jj];
            at = strip[ii * N + jj] + (add ? at : T(0));
          }
        }
      }
    }
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
