// The tables of a DCT of one length, made once in double precision and kept for the life of the
// process. Plain data: the kernels that read it are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace dijiang::cpu {

template <typename Acc>
struct Complex {
  Acc re, im;
};

// cos and sin of one angle.
template <typename Acc>
struct Rotation {
  Acc cos, sin;
};

inline constexpr int kMaxRadix = 31;

// X_k = sum_j x_j exp(-2 pi i j k / n).
template <typename Acc>
struct FftPlan {
  int64_t n = 0;
  int radices[64] = {};                 // their product is n, unless inner is set
  const Complex<Acc>* roots = nullptr;  // exp(-2 pi i k / n), k < n

  // Bluestein, where n has a prime factor above kMaxRadix: jk = (j^2 + k^2 - (k - j)^2) / 2 makes
  // the transform a convolution with a chirp, which transforms of a power of two do.
  const FftPlan* inner = nullptr;
  const Complex<Acc>* chirp = nullptr;   // exp(-pi i j^2 / n), j < n
  const Complex<Acc>* filter = nullptr;  // the conjugate chirp's transform, over inner->n
};

enum class DctMethod { kPowerOfTwo, kDense, kFft };

template <typename Acc>
struct DctPlan {
  int64_t n = 0;
  DctMethod method = DctMethod::kDense;

  // kPowerOfTwo: of pi (2j + 1) / 8m at [m + j], j < m, for every power m <= n / 4, of pi / 4 at
  // [0].
  const Rotation<Acc>* rotations = nullptr;
  const Rotation<Acc>* scaled_rotations = nullptr;  // the same times a_1
  Acc first_scale = 0;                              // a_0
  const Acc* matrix = nullptr;                      // kDense: (n, n)

  // kFft: of length n / 2 for even n, else of length n.
  const FftPlan<Acc>* fft = nullptr;
  const Rotation<Acc>* turns = nullptr;   // a_k times cos and sin of pi k / 2n, k <= n / 2
  const Rotation<Acc>* halves = nullptr;  // cos and sin of 2 pi k / n, k <= n / 2
};

// Thread-safe; the plan is never freed.
template <typename Acc>
const DctPlan<Acc>& dct_plan(int64_t n);

}  // namespace dijiang::cpu
