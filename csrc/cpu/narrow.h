// Vectors of the four element types: kLanes elements widened and narrowed as to_acc and from_acc do
// one by one, and stores that pass the caches by.
#pragma once

#include "cpu/dtype.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <typename T>
DIJIANG_INLINE Vec<AccOf<T>> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, AccOf<T>>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    HalfWords bits;
    std::memcpy(&bits, p, sizeof(bits));
#if DIJIANG_ISA_LEVEL == 3  // g++ 12 would convert half by half
    return (Vec<float>)((Words)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
    return (Vec<float>)(__builtin_convertvector(bits, Words) << 16);
#endif
  } else {
#if DIJIANG_ISA_LEVEL == 4
    return (Vec<float>)_mm512_maskz_cvtph_ps(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif DIJIANG_ISA_LEVEL == 3
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> wide;
    for (int i = 0; i < kLanes<float>; ++i) wide[i] = to_acc<T>(p[i]);
    return wide;
#endif
  }
}

template <typename T>
DIJIANG_INLINE auto narrow(Vec<AccOf<T>> x) {
  if constexpr (std::is_same_v<T, AccOf<T>>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words result = x == x ? rounded : Words{} + 0x7fc0;
#if DIJIANG_ISA_LEVEL == 3
    const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
    return (HalfWords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(result, HalfWords);
#endif
  } else {
#if DIJIANG_ISA_LEVEL == 4
    return (HalfWords)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif DIJIANG_ISA_LEVEL == 3
    return (HalfWords)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    T values[kLanes<float>];
    for (int i = 0; i < kLanes<float>; ++i) values[i] = from_acc<T>(x[i]);
    HalfWords half;
    std::memcpy(&half, values, sizeof(half));
    return half;
#endif
  }
}

// Writes past the caches: what is written is not read first, and pushes nothing out. p is aligned.
template <typename V>
DIJIANG_INLINE void stream(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(v) == 8) {
    _mm_stream_si64(static_cast<long long*>(p), (long long)v);
  } else if constexpr (sizeof(v) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  }
#if DIJIANG_ISA_LEVEL >= 3
  if constexpr (sizeof(v) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if DIJIANG_ISA_LEVEL >= 4
  if constexpr (sizeof(v) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}

// Orders what was streamed before all that follows.
DIJIANG_INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace dijiang::cpu::DIJIANG_ISA
