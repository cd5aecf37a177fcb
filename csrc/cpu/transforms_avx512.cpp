#include "cpu/isa.h"
#include "cpu/dct_plan.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/feature_map.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4")
#define DIJIANG_ISA avx512
#define DIJIANG_ISA_LEVEL 4
#include "cpu/dct_kernel.h"
#endif
