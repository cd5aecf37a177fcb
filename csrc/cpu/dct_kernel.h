// The DCT of tiles of rows: rows are turned so that element j of kLanes rows is one Vec,
// transformed by the plan's method, and turned back.
#pragma once

#include "cpu/dct_plan.h"
#include "cpu/dct_power2.h"
#include "cpu/dtype.h"
#include "cpu/fft.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"

namespace dijiang::cpu::DIJIANG_ISA {

// a_0 b_0 a_1 b_1 ... from the lower or the upper halves of a and b.
template <bool kUpper, typename V, size_t... kIndex>
DIJIANG_INLINE V interleave(V a, V b, std::index_sequence<kIndex...>) {
  constexpr size_t L = sizeof...(kIndex);
  return __builtin_shufflevector(a, b,
                                 ((kUpper ? L / 2 : 0) + kIndex / 2 + (kIndex % 2 ? L : 0))...);
}

// Transposes kLanes vectors: log2(kLanes) rounds of perfect shuffles.
template <typename Acc>
DIJIANG_INLINE void turn_square(Vec<Acc>* v) {
  constexpr int L = kLanes<Acc>;
  const auto lanes = std::make_index_sequence<L>();
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<Acc> w[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      w[2 * i] = interleave<false>(v[i], v[i + L / 2], lanes);
      w[2 * i + 1] = interleave<true>(v[i], v[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = w[i];
  }
}

// Reads rows (lanes beyond them are zero) into tile (n x kLanes).
template <typename T>
DIJIANG_INLINE void load_turned(const T* const* row, int64_t rows, int64_t n, int64_t stride,
                                Vec<AccOf<T>>* tile) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  Acc* flat = reinterpret_cast<Acc*>(tile);
  int64_t j = 0;
  if (rows == L && stride == 1) {
    for (; j + L <= n; j += L) {
      Vec<Acc> square[L];
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        alignas(64) Acc wide[L];
        for (int i = 0; i < L; ++i) wide[i] = to_acc<T>(row[lane][j + i]);
        square[lane] = load(wide);
      }
      turn_square<Acc>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) tile[j + i] = square[i];
    }
  }
  for (; j < n; ++j) {
    for (int lane = 0; lane < L; ++lane) {
      flat[j * L + lane] = lane < rows ? to_acc<T>(row[lane][j * stride]) : Acc(0);
    }
  }
}

template <typename T>
DIJIANG_INLINE void store_turned(const Vec<AccOf<T>>* tile, int64_t rows, int64_t n, T* out) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const Acc* flat = reinterpret_cast<const Acc*>(tile);
  int64_t j = 0;
  if (rows == L) {
    for (; j + L <= n; j += L) {
      Vec<Acc> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = tile[j + i];
      turn_square<Acc>(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        alignas(64) Acc wide[L];
        store(wide, square[lane]);
        for (int i = 0; i < L; ++i) out[lane * n + j + i] = from_acc<T>(wide[i]);
      }
    }
  }
  for (int64_t lane = 0; lane < rows; ++lane) {
    for (int64_t k = j; k < n; ++k) out[lane * n + k] = from_acc<T>(flat[k * L + lane]);
  }
}

template <typename Acc>
DIJIANG_INLINE void dct_dense(const DctPlan<Acc>& plan, int type, const Vec<Acc>* x,
                              Vec<Acc>* out) {
  const int64_t n = plan.n;
  const int64_t k_stride = type == 2 ? n : 1;
  const int64_t j_stride = type == 2 ? 1 : n;
  for (int64_t k = 0; k < n; ++k) {
    Vec<Acc> sum = {};
    const Acc* c = plan.matrix + k * k_stride;
    for (int64_t j = 0; j < n; ++j) sum += c[j * j_stride] * x[j];
    out[k] = sum;
  }
}

template <typename Acc>
DIJIANG_INLINE void dct_power_of_two(const DctPlan<Acc>& plan, int type, Vec<Acc>* x,
                                     Vec<Acc>* scratch, Vec<Acc>* out) {
  const int64_t n = plan.n;
  for (int64_t j = 0; j < n; ++j) x[j] *= plan.scale;
  if (type == 2) {
    dct2<Acc>(n, x, scratch, out, 1, plan.rotations);
    out[0] *= plan.first_scale;
  } else {
    x[0] *= plan.first_scale;
    dct3<Acc>(n, x, 1, scratch, out, plan.rotations);
  }
}

// Makhoul's reordering v (even elements upwards, then odd ones downwards) makes a DCT of n a real
// FFT V of n: X_k = a_k Re U_k and X_{n-k} = -a_k Im U_k with U_k = exp(-pi i k / 2n) V_k.
DIJIANG_INLINE int64_t makhoul(int64_t n, int64_t j) {
  return 2 * j < n ? 2 * j : 2 * (n - 1 - j) + 1;
}

// An even n packs v_{2j} + i v_{2j+1} into a complex FFT W of m = n / 2: with E and O those of the
// even and odd elements, W_k = E_k + i O_k and V_k = E_k + exp(-2 pi i k / n) O_k.
template <typename Acc>
DIJIANG_INLINE void dct2_by_fft(const DctPlan<Acc>& plan, const Vec<Acc>* x, ComplexVec<Acc>* z,
                                ComplexVec<Acc>* spectrum, ComplexVec<Acc>* scratch,
                                Vec<Acc>* out) {
  const int64_t n = plan.n, m = plan.fft->n;
  const bool packed = m != n;
  for (int64_t j = 0; j < m; ++j) {
    z[j].re = x[makhoul(n, packed ? 2 * j : j)];
    z[j].im = packed ? x[makhoul(n, 2 * j + 1)] : Vec<Acc>{};
  }
  fft<Acc>(*plan.fft, z, spectrum, scratch);
  for (int64_t k = 0; k <= n / 2; ++k) {
    ComplexVec<Acc> v = spectrum[k % m];
    if (packed) {
      const ComplexVec<Acc> w = spectrum[(m - k) % m];
      const Rotation<Acc> h = plan.halves[k];
      const Vec<Acc> o_re = v.im + w.im, o_im = w.re - v.re;  // 2 O_k
      v = {Acc(0.5) * ((v.re + w.re) + (h.cos * o_re + h.sin * o_im)),
           Acc(0.5) * ((v.im - w.im) + (h.cos * o_im - h.sin * o_re))};
    }
    const Rotation<Acc> r = plan.turns[k];
    if (k > 0) out[n - k] = r.sin * v.re - r.cos * v.im;
    out[k] = r.cos * v.re + r.sin * v.im;
  }
}

// The transpose: V_k = a_k exp(pi i k / 2n) (X_k - i X_{n-k}) / 2 (without the half for k = 0),
// then the inverse FFT, which is a forward one between two swaps of real and imaginary part.
template <typename Acc>
DIJIANG_INLINE void dct3_by_fft(const DctPlan<Acc>& plan, const Vec<Acc>* x, ComplexVec<Acc>* z,
                                ComplexVec<Acc>* spectrum, ComplexVec<Acc>* scratch,
                                Vec<Acc>* out) {
  const int64_t n = plan.n, m = plan.fft->n;
  const bool packed = m != n;
  for (int64_t k = 0; k <= n / 2; ++k) {
    const Rotation<Acc> r = plan.turns[k];
    if (k == 0) {
      spectrum[0] = {r.cos * x[0], Vec<Acc>{}};
      continue;
    }
    spectrum[k] = {Acc(0.5) * (r.cos * x[k] + r.sin * x[n - k]),
                   Acc(0.5) * (r.sin * x[k] - r.cos * x[n - k])};
  }
  for (int64_t k = 0; k < m; ++k) {
    const bool mirrored = k > n / 2;  // V_{n-k} is the conjugate of V_k
    ComplexVec<Acc> v = spectrum[mirrored ? n - k : k];
    if (mirrored) v.im = -v.im;
    if (packed) {
      const ComplexVec<Acc> w = spectrum[m - k];
      const Rotation<Acc> h = plan.halves[k];
      const Vec<Acc> o_re = v.re - w.re, o_im = v.im + w.im;
      v = {(v.re + w.re) - (h.cos * o_im + h.sin * o_re),
           (v.im - w.im) + (h.cos * o_re - h.sin * o_im)};
    }
    z[k] = {v.im, v.re};
  }
  fft<Acc>(*plan.fft, z, spectrum, scratch);
  for (int64_t j = 0; j < m; ++j) {
    out[makhoul(n, packed ? 2 * j : j)] = spectrum[j].im;
    if (packed) out[makhoul(n, 2 * j + 1)] = spectrum[j].re;
  }
}

// Bytes of scratch for one tile.
template <typename Acc>
int64_t dct_tile_workspace(const DctPlan<Acc>& plan) {
  const int64_t vectors = plan.method == DctMethod::kFft
                              ? 2 * plan.n + 2 * (2 * (plan.n + 1) + fft_scratch(*plan.fft))
                              : 3 * plan.n;
  return vectors * int64_t{sizeof(Vec<Acc>)};
}

template <typename T>
void dct_tile(const DctPlan<AccOf<T>>& plan, int type, const T* const* row, int64_t rows,
              int64_t stride, void* workspace, T* out) {
  using Acc = AccOf<T>;
  const int64_t n = plan.n;
  auto* x = static_cast<Vec<Acc>*>(workspace);
  Vec<Acc>* y = x + n;
  auto* scratch = y + n;
  auto* z = reinterpret_cast<ComplexVec<Acc>*>(scratch);
  load_turned<T>(row, rows, n, stride, x);
  switch (plan.method) {
    case DctMethod::kPowerOfTwo: dct_power_of_two<Acc>(plan, type, x, scratch, y); break;
    case DctMethod::kDense: dct_dense<Acc>(plan, type, x, y); break;
    case DctMethod::kFft:
      if (type == 2) {
        dct2_by_fft<Acc>(plan, x, z, z + n + 1, z + 2 * (n + 1), y);
      } else {
        dct3_by_fft<Acc>(plan, x, z, z + n + 1, z + 2 * (n + 1), y);
      }
  }
  store_turned<T>(y, rows, n, out);
}

template <typename T>
void dct_rows(const DctParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const DctPlan<Acc>& plan = dct_plan<Acc>(p.n);
  constexpr int64_t kDctRows = kLanes<Acc>;
  void* workspace = thread_workspace(dct_tile_workspace(plan));
  const T* row[kDctRows];
  for (int64_t i = begin; i < end; i += kDctRows) {
    const int64_t rows = end - i < kDctRows ? end - i : kDctRows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = (i + r) % p.seqlen;
      const int64_t h = (i + r) / p.seqlen % p.heads;
      const int64_t b = (i + r) / p.seqlen / p.heads;
      row[r] = static_cast<const T*>(p.x.data) + b * p.x.stride_batch + h * p.x.stride_head +
               t * p.x.stride_seq;
    }
    dct_tile<T>(plan, p.type, row, rows, p.x.stride_dim, workspace,
                static_cast<T*>(p.out) + i * p.n);
  }
}

void dct(const DctParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32: return dct_rows<float>(params, begin, end);
    case DType::kFloat64: return dct_rows<double>(params, begin, end);
    case DType::kBFloat16: return dct_rows<BFloat16>(params, begin, end);
    case DType::kFloat16: return dct_rows<Float16>(params, begin, end);
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
