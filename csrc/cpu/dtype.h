// The four element types and their conversions, branch-free so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "dijiang/core/types.h"

namespace dijiang::cpu {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

// The type of accumulation, state and parameters.
template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
[[gnu::always_inline]] inline AccOf<T> to_acc(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  } else {
    return static_cast<AccOf<T>>(value);
  }
}

// Rounds to nearest even; NaN stays NaN.
template <typename T>
[[gnu::always_inline]] inline T from_acc(AccOf<T> value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0 : rounded)};
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
inline constexpr double kLargestFinite = std::numeric_limits<float>::max();
template <>
inline constexpr double kLargestFinite<double> = std::numeric_limits<double>::max();
template <>
inline constexpr double kLargestFinite<BFloat16> = 3.3895313892515355e38;
template <>
inline constexpr double kLargestFinite<Float16> = 65504.0;

// Calls body(T{}) with the element type that dtype names.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat64: return body(double{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
  }
}

}  // namespace dijiang::cpu
