// The DCT of tiles of rows: rows are turned so that element j of kLanes rows is one Vec,
// transformed by the plan's method, and turned back.
#pragma once

#include "cpu/dct_lanes.h"
#include "cpu/dct_plan.h"
#include "cpu/dct_power2.h"
#include "cpu/dct_turn.h"
#include "cpu/dtype.h"
#include "cpu/fft.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"

namespace dijiang::cpu::DIJIANG_ISA {

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

// Transforms the tile that the workspace begins with; the result lies in the workspace, too.
template <typename Acc>
Vec<Acc>* dct_tile(const DctPlan<Acc>& plan, int type, Vec<Acc>* workspace) {
  const int64_t n = plan.n;
  Vec<Acc>*x = workspace, *y = x + n, *scratch = y + n;
  auto* z = reinterpret_cast<ComplexVec<Acc>*>(scratch);
  switch (plan.method) {
    case DctMethod::kPowerOfTwo:
      if (type == 2) {
        dct_power_of_two<2, Acc>(plan, x, scratch, y);
      } else {
        dct_power_of_two<3, Acc>(plan, x, scratch, y);
      }
      break;
    case DctMethod::kDense: dct_dense<Acc>(plan, type, x, y); break;
    case DctMethod::kFft:
      if (type == 2) {
        dct2_by_fft<Acc>(plan, x, z, z + n + 1, z + 2 * (n + 1), y);
      } else {
        dct3_by_fft<Acc>(plan, x, z, z + n + 1, z + 2 * (n + 1), y);
      }
  }
  return y;
}

// The rows of the input in their order.
template <typename T>
class RowWalk {
 public:
  RowWalk(const DctParams& p, int64_t index) : p_(p), index_(index) { seek(); }

  DIJIANG_INLINE const T* next() {
    if (left_ == 0) seek();
    const T* row = row_;
    row_ += p_.x.stride_seq;
    --left_;
    ++index_;
    return row;
  }

 private:
  void seek() {
    const int64_t t = index_ % p_.seqlen;
    const int64_t h = index_ / p_.seqlen % p_.heads;
    const int64_t b = index_ / p_.seqlen / p_.heads;
    row_ = static_cast<const T*>(p_.x.data) + b * p_.x.stride_batch + h * p_.x.stride_head +
           t * p_.x.stride_seq;
    left_ = p_.seqlen - t;
  }

  const DctParams& p_;
  int64_t index_, left_ = 0;
  const T* row_ = nullptr;
};

// Outputs of this many bytes are gone from the caches before they are read again.
inline constexpr int64_t kStreamedBytes = int64_t{1} << 22;

// Rows are asked for this much ahead of their use at least.
inline constexpr int64_t kAheadBytes = 2048;

template <typename T>
void dct_rows(const DctParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  constexpr int64_t L = kLanes<Acc>;
  const DctPlan<Acc>& plan = dct_plan<Acc>(p.n);
  const int64_t row_bytes = p.n * int64_t{sizeof(T)};
  const bool streamed = p.batch * p.heads * p.seqlen * row_bytes >= kStreamedBytes &&
                        row_bytes % kLineBytes == 0 &&
                        reinterpret_cast<uintptr_t>(p.out) % kLineBytes == 0;
  auto* workspace = static_cast<Vec<Acc>*>(thread_workspace(dct_tile_workspace(plan)));
  if (begin >= end) return;
  RowWalk<T> walk(p, begin);
  const T* row[L];
  const int64_t stride_bytes = p.x.stride_seq * int64_t{sizeof(T)};
  const int64_t ahead = (1 + kAheadBytes / (L * row_bytes)) * L * stride_bytes;
  for (int64_t i = begin; i < end; i += L) {
    const int64_t rows = end - i < L ? end - i : L;
    for (int64_t r = 0; r < L; ++r) {
      row[r] = r < rows ? walk.next() : row[0];  // a row that is missing is not stored
    }
    Prefetch later(reinterpret_cast<uintptr_t>(row[0]) + ahead, row_bytes, stride_bytes);
    T* out = static_cast<T*>(p.out) + i * p.n;
    load_turned<T>(row, p.n, p.x.stride_dim, later, workspace);
    const Vec<Acc>* tile = dct_tile<Acc>(plan, p.type, workspace);
    if (streamed && rows == L) {
      stream_turned<T>(tile, p.n, later, out);
    } else {
      store_turned<T>(tile, rows, p.n, later, out);
    }
  }
  if (streamed) end_of_stream();
}

int64_t dct_lanes_workspace(const DctPlan<float>& plan) { return dct_tile_workspace(plan); }
int64_t dct_lanes_workspace(const DctPlan<double>& plan) { return dct_tile_workspace(plan); }

Vec<float>* dct_lanes(const DctPlan<float>& plan, int type, Vec<float>* workspace) {
  return dct_tile<float>(plan, type, workspace);
}
Vec<double>* dct_lanes(const DctPlan<double>& plan, int type, Vec<double>* workspace) {
  return dct_tile<double>(plan, type, workspace);
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
