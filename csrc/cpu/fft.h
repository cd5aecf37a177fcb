// Complex FFT of any length on kLanes transforms at a time: mixed radix, and Bluestein's chirp
// transform for lengths with a large prime factor (FftPlan).
#pragma once

#include "cpu/dct_plan.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
struct ComplexVec {
  Vec<Acc> re, im;
};

template <typename Acc>
DIJIANG_INLINE ComplexVec<Acc> operator+(const ComplexVec<Acc>& a, const ComplexVec<Acc>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename Acc>
DIJIANG_INLINE ComplexVec<Acc> operator-(const ComplexVec<Acc>& a, const ComplexVec<Acc>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <typename Acc>
DIJIANG_INLINE ComplexVec<Acc> operator*(Complex<Acc> w, const ComplexVec<Acc>& a) {
  return {w.re * a.re - w.im * a.im, w.re * a.im + w.im * a.re};
}

// p transforms of length m stand one after another in out; combines them in place.
// roots[k * root_stride] = exp(-2 pi i k / pm).
template <typename Acc>
DIJIANG_INLINE void fft_combine(int p, int64_t m, ComplexVec<Acc>* out, const Complex<Acc>* roots,
                                int64_t root_stride) {
  for (int64_t k = 0; k < m; ++k) {
    if (p == 4) {
      const ComplexVec<Acc> a = out[k];
      const ComplexVec<Acc> b = roots[k * root_stride] * out[m + k];
      const ComplexVec<Acc> c = roots[2 * k * root_stride] * out[2 * m + k];
      const ComplexVec<Acc> d = roots[3 * k * root_stride] * out[3 * m + k];
      const ComplexVec<Acc> s = a + c, t = a - c, u = b + d, v = b - d;
      out[k] = s + u;
      out[m + k] = {t.re + v.im, t.im - v.re};  // t - i v
      out[2 * m + k] = s - u;
      out[3 * m + k] = {t.re - v.im, t.im + v.re};
      continue;
    }
    if (p == 2) {
      const ComplexVec<Acc> a = out[k];
      const ComplexVec<Acc> b = roots[k * root_stride] * out[m + k];
      out[k] = a + b;
      out[m + k] = a - b;
      continue;
    }
    // Odd p: the terms r and p - r share their cosine, and their sines differ in sign.
    ComplexVec<Acc> sum[kMaxRadix / 2 + 1], difference[kMaxRadix / 2 + 1];
    const int half = p / 2;
    const ComplexVec<Acc> first = out[k];
    ComplexVec<Acc> total = first;
    for (int r = 1; r <= half; ++r) {
      const ComplexVec<Acc> a = roots[r * k * root_stride] * out[r * m + k];
      const ComplexVec<Acc> b = roots[(p - r) * k * root_stride] * out[(p - r) * m + k];
      sum[r] = a + b;
      difference[r] = a - b;
      total = total + sum[r];
    }
    out[k] = total;
    for (int q = 1; q <= half; ++q) {
      ComplexVec<Acc> even = first;
      ComplexVec<Acc> odd = {Vec<Acc>{}, Vec<Acc>{}};
      for (int r = 1; r <= half; ++r) {
        const Complex<Acc> w = roots[(r * q % p) * m * root_stride];
        even.re += w.re * sum[r].re;
        even.im += w.re * sum[r].im;
        odd.re += w.im * difference[r].im;
        odd.im += w.im * difference[r].re;
      }
      out[q * m + k] = {even.re - odd.re, even.im + odd.im};
      out[(p - q) * m + k] = {even.re + odd.re, even.im - odd.im};
    }
  }
}

template <typename Acc>
void fft_recurse(int64_t n, const int* radices, const ComplexVec<Acc>* x, int64_t x_stride,
                 ComplexVec<Acc>* out, const Complex<Acc>* roots, int64_t root_stride) {
  const int p = radices[0];
  const int64_t m = n / p;
  for (int r = 0; r < p; ++r) {
    if (m == 1) {
      out[r] = x[r * x_stride];
    } else {
      fft_recurse<Acc>(m, radices + 1, x + r * x_stride, x_stride * p, out + r * m, roots,
                       root_stride * p);
    }
  }
  switch (p) {  // the common radices are unrolled
    case 2: return fft_combine<Acc>(2, m, out, roots, root_stride);
    case 3: return fft_combine<Acc>(3, m, out, roots, root_stride);
    case 4: return fft_combine<Acc>(4, m, out, roots, root_stride);
    case 5: return fft_combine<Acc>(5, m, out, roots, root_stride);
    default: return fft_combine<Acc>(p, m, out, roots, root_stride);
  }
}

// In units of ComplexVec.
template <typename Acc>
int64_t fft_scratch(const FftPlan<Acc>& plan) {
  return plan.inner ? 2 * plan.inner->n : 0;
}

// x and out do not overlap; x is kept. plan.n > 1.
template <typename Acc>
void fft(const FftPlan<Acc>& plan, const ComplexVec<Acc>* x, ComplexVec<Acc>* out,
         ComplexVec<Acc>* scratch) {
  if (!plan.inner) return fft_recurse<Acc>(plan.n, plan.radices, x, 1, out, plan.roots, 1);
  const int64_t size = plan.inner->n;
  ComplexVec<Acc>* padded = scratch;
  ComplexVec<Acc>* transformed = scratch + size;
  for (int64_t j = 0; j < plan.n; ++j) padded[j] = plan.chirp[j] * x[j];
  for (int64_t j = plan.n; j < size; ++j) padded[j] = {Vec<Acc>{}, Vec<Acc>{}};
  fft<Acc>(*plan.inner, padded, transformed, nullptr);
  // An inverse transform is a forward one between two swaps of real and imaginary part.
  for (int64_t j = 0; j < size; ++j) {
    const ComplexVec<Acc> product = plan.filter[j] * transformed[j];
    padded[j] = {product.im, product.re};
  }
  fft<Acc>(*plan.inner, padded, transformed, nullptr);
  for (int64_t k = 0; k < plan.n; ++k) {
    out[k] = plan.chirp[k] * ComplexVec<Acc>{transformed[k].im, transformed[k].re};
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
