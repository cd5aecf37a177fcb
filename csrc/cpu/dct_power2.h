// DCT of power-of-two lengths by the orthogonal split-radix recursion (Plonka and Tasche, "Fast
// and numerically stable algorithms for discrete cosine transforms", 2005): every step is a sum
// and difference or a rotation, so that errors do not grow as they do in Lee's recursion, which
// divides by cosines near zero.
//
// Element j of kLanes rows is one Vec, so that every step is full-width vector work whatever its
// access pattern along j. The transforms here lack the factors a_k:
//   II:  X_k = sum_j x_j cos(pi (2j+1) k / 2n)         even k: II(n/2) of sums,
//                                                      odd k: IV(n/2) of differences
//   III: the transpose of II
//   IV:  X_k = sum_j x_j cos(pi (2j+1)(2k+1) / 4n)     rotations, then two II(n/2)
#pragma once

#include "cpu/dct_plan.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

// Lengths up to this run in one leaf, in registers.
inline constexpr int kDctLeaf = 8;

template <typename Acc, int n>
DIJIANG_INLINE void dct4_leaf(const Vec<Acc>* x, Vec<Acc>* out, const Rotation<Acc>* table);

template <typename Acc, int n>
DIJIANG_INLINE void dct2_leaf(const Vec<Acc>* x, Vec<Acc>* out, const Rotation<Acc>* table) {
  if constexpr (n == 1) {
    out[0] = x[0];
  } else {
    Vec<Acc> sum[n / 2], difference[n / 2], even[n / 2], odd[n / 2];
#pragma GCC unroll 8
    for (int j = 0; j < n / 2; ++j) {
      sum[j] = x[j] + x[n - 1 - j];
      difference[j] = x[j] - x[n - 1 - j];
    }
    dct2_leaf<Acc, n / 2>(sum, even, table);
    dct4_leaf<Acc, n / 2>(difference, odd, table);
#pragma GCC unroll 8
    for (int k = 0; k < n / 2; ++k) {
      out[2 * k] = even[k];
      out[2 * k + 1] = odd[k];
    }
  }
}

template <typename Acc, int n>
DIJIANG_INLINE void dct4_leaf(const Vec<Acc>* x, Vec<Acc>* out, const Rotation<Acc>* table) {
  if constexpr (n == 1) {
    out[0] = x[0] * Acc(0.70710678118654752440);
  } else {
    constexpr int m = n / 2;
    Vec<Acc> u[m], v[m], cosines[m], sines[m];
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      const Rotation<Acc> r = table[m + j];
      u[j] = r.cos * x[j] + r.sin * x[n - 1 - j];
      v[j] = j % 2 ? r.sin * x[j] - r.cos * x[n - 1 - j] : r.cos * x[n - 1 - j] - r.sin * x[j];
    }
    dct2_leaf<Acc, m>(u, cosines, table);
    dct2_leaf<Acc, m>(v, sines, table);
    out[0] = cosines[0];
    out[n - 1] = -sines[0];
#pragma GCC unroll 8
    for (int k = 1; k < m; ++k) {
      out[2 * k] = cosines[k] + sines[m - k];
      out[2 * k - 1] = cosines[k] - sines[m - k];
    }
  }
}

template <typename Acc, int n>
DIJIANG_INLINE void dct3_leaf(const Vec<Acc>* x, Vec<Acc>* out, const Rotation<Acc>* table) {
  if constexpr (n == 1) {
    out[0] = x[0];
  } else {
    Vec<Acc> even[n / 2], odd[n / 2], sum[n / 2], difference[n / 2];
#pragma GCC unroll 8
    for (int k = 0; k < n / 2; ++k) {
      even[k] = x[2 * k];
      odd[k] = x[2 * k + 1];
    }
    dct3_leaf<Acc, n / 2>(even, sum, table);
    dct4_leaf<Acc, n / 2>(odd, difference, table);
#pragma GCC unroll 8
    for (int j = 0; j < n / 2; ++j) {
      out[j] = sum[j] + difference[j];
      out[n - 1 - j] = sum[j] - difference[j];
    }
  }
}

template <int n, int type, typename Acc>
DIJIANG_INLINE void dct_leaf_of(const Vec<Acc>* x, int64_t x_stride, Vec<Acc>* out,
                                int64_t out_stride, const Rotation<Acc>* table) {
  Vec<Acc> in[n], result[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) in[j] = x[j * x_stride];
  if constexpr (type == 2) dct2_leaf<Acc, n>(in, result, table);
  if constexpr (type == 3) dct3_leaf<Acc, n>(in, result, table);
  if constexpr (type == 4) dct4_leaf<Acc, n>(in, result, table);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) out[j * out_stride] = result[j];
}

template <int type, typename Acc>
DIJIANG_INLINE void dct_leaf(int64_t n, const Vec<Acc>* x, int64_t x_stride, Vec<Acc>* out,
                             int64_t out_stride, const Rotation<Acc>* table) {
  static_assert(kDctLeaf == 8);
  switch (n) {
    case 1: return dct_leaf_of<1, type, Acc>(x, x_stride, out, out_stride, table);
    case 2: return dct_leaf_of<2, type, Acc>(x, x_stride, out, out_stride, table);
    case 4: return dct_leaf_of<4, type, Acc>(x, x_stride, out, out_stride, table);
    default: return dct_leaf_of<8, type, Acc>(x, x_stride, out, out_stride, table);
  }
}

// The recursions. x (n values) is destroyed, scratch holds n values, and neither overlaps out.
template <typename Acc>
void dct4(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Vec<Acc>* out, int64_t out_stride,
          const Rotation<Acc>* table);

template <typename Acc>
void dct2(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Vec<Acc>* out, int64_t out_stride,
          const Rotation<Acc>* table) {
  if (n <= kDctLeaf) return dct_leaf<2, Acc>(n, x, 1, out, out_stride, table);
  const int64_t m = n / 2;
  for (int64_t j = 0; j < m; ++j) {
    scratch[j] = x[j] + x[n - 1 - j];
    scratch[m + j] = x[j] - x[n - 1 - j];
  }
  dct2<Acc>(m, scratch, x, out, 2 * out_stride, table);
  dct4<Acc>(m, scratch + m, x + m, out + out_stride, 2 * out_stride, table);
}

template <typename Acc>
void dct4(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Vec<Acc>* out, int64_t out_stride,
          const Rotation<Acc>* table) {
  if (n <= kDctLeaf) return dct_leaf<4, Acc>(n, x, 1, out, out_stride, table);
  const int64_t m = n / 2;
  for (int64_t j = 0; j < m; ++j) {
    const Rotation<Acc> r = table[m + j];
    const Acc sign = j % 2 ? Acc(-1) : Acc(1);
    scratch[j] = r.cos * x[j] + r.sin * x[n - 1 - j];
    scratch[m + j] = (sign * r.cos) * x[n - 1 - j] - (sign * r.sin) * x[j];
  }
  // Cosine sums go to the even places, sine sums backwards to the odd ones: each pair
  // (2k - 1, 2k) then holds what its two results are the difference and the sum of.
  dct2<Acc>(m, scratch, x, out, 2 * out_stride, table);
  dct2<Acc>(m, scratch + m, x + m, out + (n - 1) * out_stride, -2 * out_stride, table);
  for (int64_t k = 1; k < m; ++k) {
    const Vec<Acc> u = out[2 * k * out_stride];
    const Vec<Acc> v = out[(2 * k - 1) * out_stride];
    out[2 * k * out_stride] = u + v;
    out[(2 * k - 1) * out_stride] = u - v;
  }
  out[(n - 1) * out_stride] = -out[(n - 1) * out_stride];
}

// x is strided and kept; out is contiguous.
template <typename Acc>
void dct3(int64_t n, const Vec<Acc>* x, int64_t x_stride, Vec<Acc>* scratch, Vec<Acc>* out,
          const Rotation<Acc>* table) {
  if (n <= kDctLeaf) return dct_leaf<3, Acc>(n, x, x_stride, out, 1, table);
  const int64_t m = n / 2;
  dct3<Acc>(m, x, 2 * x_stride, scratch, out, table);
  for (int64_t k = 0; k < m; ++k) scratch[k] = x[(2 * k + 1) * x_stride];
  dct4<Acc>(m, scratch, scratch + m, out + n - 1, -1, table);
  for (int64_t j = 0; j < m; ++j) {
    const Vec<Acc> a = out[j];
    const Vec<Acc> b = out[n - 1 - j];
    out[j] = a + b;
    out[n - 1 - j] = a - b;
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
