// __half: IEEE binary16, rounded to nearest even, subnormals included.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float y;
  if (exponent == 31) {
    y = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    y = std::ldexp(float(mantissa), -24);
  } else {
    y = std::ldexp(float(mantissa + 1024), exponent - 25);
  }
  return sign ? -y : y;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7FFF};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  if (size < 6.103515625e-05f) {  // subnormal: whole multiples of 2^-24
    return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))))};
  }
  int exponent;
  const float fraction = std::frexp(size, &exponent);                  // in [0.5, 1)
  const int mantissa = int(std::nearbyint(std::ldexp(fraction, 11)));  // in [1024, 2048]
  return {uint16_t(sign | uint16_t(((exponent + 14) << 10) + (mantissa - 1024)))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
