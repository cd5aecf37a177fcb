#include "cpu/isa.h"
#include "cpu/dct_plan.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/feature_map.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#define DIJIANG_ISA avx2
#define DIJIANG_ISA_LEVEL 3
#include "cpu/dct_kernel.h"
#endif
