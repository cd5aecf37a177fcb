// Scalar device functions shared by the kernels: element types, exact powers of two, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/launch.h"
#include "dijiang/core/types.h"

namespace dijiang::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kEmpty = static_cast<float>(kEmptyLogScale);
constexpr float kNone = 0.5f * kEmpty;  // below it: an empty maximum, whatever was added to it

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Brought inside the finite range of T; NaN stays.
template <class T>
__device__ inline float finite(float x) {
  constexpr float kLargest = std::is_same_v<T, float>    ? 3.402823466e38f
                             : std::is_same_v<T, __half> ? 65504.0f
                                                         : 3.3895313892515355e38f;
  x = x > kLargest ? kLargest : x;
  return x < -kLargest ? -kLargest : x;
}
// x, of which the compiler knows nothing any more: what depends on it stays where it stands.
__device__ inline int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^e for a whole e in [-126, 127].
__device__ inline float power_of_two(float e) {
  return __int_as_float((static_cast<int>(e) + 127) << 23);
}

// x 2^e for a whole e of any size, exact, and 0 below the smallest normal number.
__device__ inline float scale2(float x, float e) {
  const float first = fminf(fmaxf(e, -126.0f), 127.0f);
  const float second = fminf(fmaxf(e - first, -126.0f), 127.0f);
  const float y = x * power_of_two(first) * power_of_two(second);
  return fabsf(y) < 1.17549435e-38f ? 0.0f : y;
}

// 2^(x + shift) for a whole shift: a change of shift changes the result by an exact power of two.
__device__ inline float exp2_scaled(float x, float shift) {
  const float n = rintf(x);
  return scale2(exp2f(x - n), n + shift);
}

// The smallest e with |x| < 2^e; kEmpty for 0.
__device__ inline float binary_exponent(float x) {
  if (x == 0.0f) return kEmpty;
  int e;
  frexpf(x, &e);
  return static_cast<float>(e);
}

// A feature as it lies in memory: its base-2 exponent, or (given) the value itself. `decay` <= 0
// is a further exponent, not whole.
template <bool kGiven>
struct Feature {
  // A whole number that the exponent does not exceed.
  __device__ static float bound(float x) { return kGiven ? binary_exponent(x) : ceilf(x); }
  __device__ static float bound(float x, float decay) {
    return kGiven ? binary_exponent(x) + floorf(decay) + 1.0f : ceilf(x + decay);
  }
  // phi 2^shift
  __device__ static float scaled(float x, float shift) {
    return kGiven ? scale2(x, shift) : exp2_scaled(x, shift);
  }
  // phi 2^(decay + shift)
  __device__ static float scaled(float x, float decay, float shift) {
    if (!kGiven) return exp2_scaled(x + decay, shift);
    const float whole = floorf(decay);
    return scale2(x * exp2f(decay - whole), whole + shift);
  }
  // g d phi / d x of phi 2^shift: x is the natural log of phi, or phi itself when given.
  __device__ static float backward(float g, float x, float shift) {
    return kGiven ? scale2(g, shift) : g * exp2_scaled(x, shift);
  }
  __device__ static float backward(float g, float x, float decay, float shift) {
    if (!kGiven) return g * exp2_scaled(x + decay, shift);
    const float whole = floorf(decay);
    return scale2(g * exp2f(decay - whole), whole + shift);
  }
};

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Of the four neighbouring lanes that share a row of a tile.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Over a block of up to 1024 threads; every thread gets the result. scratch: 32 floats.
template <bool kMax>
__device__ inline float block_reduce(float x, float* scratch) {
  x = kMax ? warp_max(x) : warp_sum(x);
  const int warps = (blockDim.x + 31) / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float y = scratch[0];
  for (int i = 1; i < warps; ++i) y = kMax ? fmaxf(y, scratch[i]) : y + scratch[i];
  return y;
}
__device__ inline float block_sum(float x, float* scratch) {
  return block_reduce<false>(x, scratch);
}
__device__ inline float block_max(float x, float* scratch) {
  return block_reduce<true>(x, scratch);
}

}  // namespace dijiang::cuda
