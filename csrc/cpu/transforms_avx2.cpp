// dct and feature_map for processors with AVX2 and FMA.
#include "cpu/isa.h"

#include <limits>

#include "cpu/dct_plan.h"
#include "cpu/feature_map_rows.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/feature_map.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define DIJIANG_ISA avx2
#define DIJIANG_ISA_LEVEL 3

#include "cpu/dct_kernel.h"
#include "cpu/feature_map_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
