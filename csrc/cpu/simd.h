// Vectors of the widest kind the target has, 2^x with an exact change of scale, and the processor
// mode the kernels run in.
#pragma once

#include "cpu/isa.h"

namespace dijiang::cpu::DIJIANG_ISA {

#if DIJIANG_ISA_LEVEL == 4
inline constexpr int kVectorBytes = 64;
#elif DIJIANG_ISA_LEVEL == 3
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecOf {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef Bits bits __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

#define DIJIANG_INLINE [[gnu::always_inline]] inline

template <typename T>
DIJIANG_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <typename T>
DIJIANG_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}
template <typename T>
DIJIANG_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// Of two rows of a square of lanes, swaps the off-diagonal blocks of kBlock lanes.
template <int kBlock, typename T, size_t... kLane>
DIJIANG_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::index_sequence<kLane...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> upper =
      __builtin_shufflevector(a, b, (kLane & kBlock ? L + kLane - kBlock : kLane)...);
  const Vec<T> lower =
      __builtin_shufflevector(a, b, (kLane & kBlock ? L + kLane : kLane + kBlock)...);
  a = upper;
  b = lower;
}

// a_0 b_0 a_1 b_1 ... from the lower or the upper halves of each 16 bytes of a and b, which is one
// instruction on x86.
template <bool kUpper, typename T, size_t... kLane>
DIJIANG_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<kLane...>) {
  constexpr size_t L = kLanes<T>, K = 16 / sizeof(T);
  return __builtin_shufflevector(
      a, b, (kLane / K * K + (kUpper ? K / 2 : 0) + kLane % K / 2 + (kLane % 2 ? L : 0))...);
}

// Transposes the squares of 16 bytes' width inside kLanes vectors by rounds of perfect shuffles.
template <typename T>
DIJIANG_INLINE void turn_blocks(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>, K = 16 / sizeof(T);
  const auto lanes = std::make_index_sequence<L>();
#pragma GCC unroll 2
  for (int round = 1; round < K; round *= 2) {
    Vec<T> w[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2) {
      const int from = i / K * K + i % K / 2;
      w[i] = interleave<false, T>(v[from], v[from + K / 2], lanes);
      w[i + 1] = interleave<true, T>(v[from], v[from + K / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = w[i];
  }
}

// Turns a square of lanes about its diagonal: blocks of 16 bytes first, then what is in each.
template <typename T, int kBlock = kLanes<T> / 2>
DIJIANG_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (kBlock * sizeof(T) >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kBlock) == 0) {
        swap_blocks<kBlock, T>(v[i], v[i + kBlock], std::make_index_sequence<kLanes<T>>());
      }
    }
    transpose<T, kBlock / 2>(v);
  } else {
    turn_blocks<T>(v);
  }
}

// max and min keep a: a NaN in b is passed over, a NaN in a stays. That is what the instructions
// do, but compilers make a comparison and a blend of b > a ? b : a.
template <typename V>
DIJIANG_INLINE V max(V a, V b) {
#if DIJIANG_ISA_LEVEL == 4
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return (V)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);
  } else {
    return (V)_mm512_maskz_max_pd(0xff, (__m512d)b, (__m512d)a);
  }
#elif DIJIANG_ISA_LEVEL == 3
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return (V)_mm256_max_ps((__m256)b, (__m256)a);
  } else {
    return (V)_mm256_max_pd((__m256d)b, (__m256d)a);
  }
#else
  return b > a ? b : a;
#endif
}
template <typename V>
DIJIANG_INLINE V min(V a, V b) {
#if DIJIANG_ISA_LEVEL == 4
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return (V)_mm512_maskz_min_ps(0xffff, (__m512)b, (__m512)a);
  } else {
    return (V)_mm512_maskz_min_pd(0xff, (__m512d)b, (__m512d)a);
  }
#elif DIJIANG_ISA_LEVEL == 3
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return (V)_mm256_min_ps((__m256)b, (__m256)a);
  } else {
    return (V)_mm256_min_pd((__m256d)b, (__m256d)a);
  }
#else
  return b < a ? b : a;
#endif
}

// Lane i gets lane i + kBy.
template <int kBy, typename T, size_t... kLane>
DIJIANG_INLINE Vec<T> rotate_lanes(Vec<T> x, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(x, x, ((kLane + kBy) % kLanes<T>)...);
}
// Over all lanes, by halves, quarters, ...
template <typename T, int kHalf = kLanes<T> / 2>
DIJIANG_INLINE T horizontal_sum(Vec<T> x) {
  x += rotate_lanes<kHalf, T>(x, std::make_index_sequence<kLanes<T>>{});
  if constexpr (kHalf > 1) return horizontal_sum<T, kHalf / 2>(x);
  return x[0];
}
template <typename T, int kHalf = kLanes<T> / 2>
DIJIANG_INLINE T horizontal_max(Vec<T> x) {
  x = max(x, rotate_lanes<kHalf, T>(x, std::make_index_sequence<kLanes<T>>{}));
  if constexpr (kHalf > 1) return horizontal_max<T, kHalf / 2>(x);
  return x[0];
}

// a b + c in one rounding where the target can.
template <typename V>
DIJIANG_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;  // contracted by -ffp-contract=fast
}

DIJIANG_INLINE Vec<float> round_even(Vec<float> x) {
#if DIJIANG_ISA_LEVEL == 4
  return (Vec<float>)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif DIJIANG_ISA_LEVEL == 3
  return (Vec<float>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Beyond 2^23 every float is whole.
  const Vec<float> magic = broadcast(8388608.0f);
  const Vec<float> up = (x + magic) - magic, down = (x - magic) + magic;
  const Vec<float> r = x < 0 ? down : up;
  return (x < magic) & (x > -magic) ? r : x;
#endif
}
DIJIANG_INLINE Vec<double> round_even(Vec<double> x) {
#if DIJIANG_ISA_LEVEL == 4
  return (Vec<double>)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEAREST_INT);
#elif DIJIANG_ISA_LEVEL == 3
  return (Vec<double>)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec<double> magic = broadcast(4503599627370496.0);
  const Vec<double> up = (x + magic) - magic, down = (x - magic) + magic;
  const Vec<double> r = x < 0 ? down : up;
  return (x < magic) & (x > -magic) ? r : x;
#endif
}

// 2^f for |f| <= 1/2 by its Taylor series; the first term left out is below half a unit in the
// last place. 2^0 is exactly 1.
DIJIANG_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = broadcast(1.5252733804e-5f);
  p = multiply_add(p, f, broadcast(1.5403530393e-4f));
  p = multiply_add(p, f, broadcast(1.3333558146e-3f));
  p = multiply_add(p, f, broadcast(9.6181291076e-3f));
  p = multiply_add(p, f, broadcast(5.5504108665e-2f));
  p = multiply_add(p, f, broadcast(2.4022650696e-1f));
  p = multiply_add(p, f, broadcast(6.9314718056e-1f));
  return multiply_add(p, f, broadcast(1.0f));
}
DIJIANG_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  Vec<double> p = broadcast(1.3691488853904128e-12);
  p = multiply_add(p, f, broadcast(2.5678435993488206e-11));
  p = multiply_add(p, f, broadcast(4.4455382718708116e-10));
  p = multiply_add(p, f, broadcast(7.0549116208011231e-9));
  p = multiply_add(p, f, broadcast(1.0178086009239699e-7));
  p = multiply_add(p, f, broadcast(1.3215486790144307e-6));
  p = multiply_add(p, f, broadcast(1.5252733804059841e-5));
  p = multiply_add(p, f, broadcast(1.5403530393381609e-4));
  p = multiply_add(p, f, broadcast(1.3333558146428443e-3));
  p = multiply_add(p, f, broadcast(9.6181291076284772e-3));
  p = multiply_add(p, f, broadcast(5.5504108664821580e-2));
  p = multiply_add(p, f, broadcast(2.4022650695910071e-1));
  p = multiply_add(p, f, broadcast(6.9314718055994531e-1));
  return multiply_add(p, f, broadcast(1.0));
}

template <typename T>
inline constexpr int kExponentBias = sizeof(T) == 4 ? 127 : 1023;

// 2^n for whole n, 0 from the first subnormal on, the largest power of two above the range.
template <typename T>
DIJIANG_INLINE Vec<T> power_of_two(Vec<T> n) {
  constexpr int kBias = kExponentBias<T>;
  constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  n = max(broadcast(T(-kBias)), min(broadcast(T(kBias)), n));
  // The sum's low mantissa bits hold n + bias: shifted up they are the exponent field.
  const Vec<T> magic = broadcast(T(1.5) * T(int64_t{1} << kMantissaBits) + T(kBias));
  typename VecOf<T>::bits bits;
  const Vec<T> sum = n + magic;
  std::memcpy(&bits, &sum, sizeof(bits));
  bits <<= kMantissaBits;
  Vec<T> result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

// 2^(x + shift) for finite x and whole shift: a change of shift scales the result by an exact
// power of two. NaN in x stays NaN.
template <typename T>
DIJIANG_INLINE Vec<T> exp2_scaled(Vec<T> x, Vec<T> shift) {
  const Vec<T> n = round_even(x);
  return exp2_fraction(x - n) * power_of_two<T>(n + shift);
}

// The same with a shift in two parts, whose sum need not be a T: exponents of 10^9 make sums beyond
// 2^24, and a shift rounded there would be off by a factor of 2^32.
template <typename T>
DIJIANG_INLINE Vec<T> exp2_scaled(Vec<T> x, Vec<T> shift, Vec<T> more) {
  const Vec<T> n = round_even(x);
  const Vec<T> sum = shift + more, part = sum - shift;
  const Vec<T> rest = (shift - (sum - part)) + (more - part);  // exactly what the sum lost
  return exp2_fraction(x - n) * power_of_two<T>((n + sum) + rest);
}

// x 2^n for whole n, in two steps, so that the whole range of T can be crossed.
template <typename T>
DIJIANG_INLINE Vec<T> scale_by(Vec<T> x, Vec<T> n) {
  const Vec<T> limit = broadcast(T(kExponentBias<T> - 1));
  const Vec<T> first = max(-limit, min(limit, n));
  return x * power_of_two<T>(first) * power_of_two<T>(n - first);
}

// The binary exponent e of x, 2^(e-1) <= |x| < 2^e, rounded up as docs/numerics.md rounds maxima;
// `zero` for x = 0, subnormal x and NaN.
template <typename T>
DIJIANG_INLINE Vec<T> exponent_of(Vec<T> x, T zero) {
  constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  using Bits = typename VecOf<T>::Bits;
  typename VecOf<T>::bits bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits >> kMantissaBits) & Bits(2 * kExponentBias<T> + 1);
  // As in power_of_two, the other way round: small whole numbers become T through the mantissa.
  const Vec<T> magic = broadcast(T(int64_t{1} << kMantissaBits));
  typename VecOf<T>::bits magic_bits;
  std::memcpy(&magic_bits, &magic, sizeof(bits));
  bits |= magic_bits;
  Vec<T> biased;
  std::memcpy(&biased, &bits, sizeof(bits));
  biased -= magic;
  return (biased > 0) & (x == x) ? biased - T(kExponentBias<T> - 1) : broadcast(zero);
}

template <typename T>
DIJIANG_INLINE Vec<T> ceil_of(Vec<T> x) {
  const Vec<T> r = round_even(x);
  return r < x ? r + T(1) : r;
}

// log2 of a normal x > 0, to half a unit of 1; NaN stays NaN.
template <typename T>
DIJIANG_INLINE Vec<T> log2_of(Vec<T> x) {
  // x = 2^e m, m in [sqrt(1/2), sqrt(2)), log2 m = 2 log2(e) atanh(s), s = (m - 1) / (m + 1).
  Vec<T> e = exponent_of<T>(x, T(0));
  Vec<T> m = scale_by<T>(x, -e);
  const auto low = m < T(0.70710678118654752);
  m = low ? m + m : m;
  e = low ? e - T(1) : e;
  const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  Vec<T> p{};
  for (int k = sizeof(T) == 4 ? 9 : 21; k > 0; k -= 2) {
    p = multiply_add(p, s2, broadcast(T(2.8853900817779268) / T(k)));
  }
  return multiply_add(p, s, e);
}

// One number at a time, by the same code.
template <typename T>
DIJIANG_INLINE T exp2_scaled_one(T x, T shift) {
  return exp2_scaled<T>(broadcast(x), broadcast(shift))[0];
}
template <typename T>
DIJIANG_INLINE T scale_by_one(T x, T n) {
  return scale_by<T>(broadcast(x), broadcast(n))[0];
}
template <typename T>
DIJIANG_INLINE T exponent_of_one(T x, T zero) {
  return exponent_of<T>(broadcast(x), zero)[0];
}

// Subnormal numbers count as zero while an object of this type lives: exponents far apart are the
// rule here, and subnormal arithmetic is many times slower.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() : saved_(__builtin_aarch64_get_fpcr()) {
    __builtin_aarch64_set_fpcr(saved_ | (1u << 24));
  }
  ~FlushSubnormals() { __builtin_aarch64_set_fpcr(saved_); }

 private:
  unsigned saved_;
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
