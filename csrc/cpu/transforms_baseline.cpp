// dct and feature_map for any processor.
#include "cpu/isa.h"

#include <limits>

#include "cpu/dct_plan.h"
#include "cpu/feature_map_rows.h"
#include "cpu/workspace.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/feature_map.h"

#define DIJIANG_ISA baseline
#define DIJIANG_ISA_LEVEL 1

#include "cpu/dct_kernel.h"
#include "cpu/feature_map_kernel.h"
