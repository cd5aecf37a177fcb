#pragma once

namespace dijiang::cpu {

// The x86-64 level that the kernels' run-time dispatch selects on this machine: 4 (AVX-512),
// 3 (AVX2, FMA), or 1 (also on every other architecture).
int cpu_level();

}  // namespace dijiang::cpu

// Inside namespace dijiang::cpu: calls the function of the same name compiled for that level.
#if defined(__x86_64__)
#define DIJIANG_DISPATCH(function, ...)              \
  switch (cpu_level()) {                             \
    case 4: return avx512::function(__VA_ARGS__);    \
    case 3: return avx2::function(__VA_ARGS__);      \
    default: return baseline::function(__VA_ARGS__); \
  }
#else
#define DIJIANG_DISPATCH(function, ...) return baseline::function(__VA_ARGS__)
#endif
