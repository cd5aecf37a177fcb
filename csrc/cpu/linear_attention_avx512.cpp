// Linear attention for processors with AVX-512.
#include "cpu/isa.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define DIJIANG_ISA avx512
#define DIJIANG_ISA_LEVEL 4

#include "cpu/linear_attention_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
