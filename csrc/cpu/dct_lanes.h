// The DCT of kLanes rows at once, turned: element j of them is one Vec. Compiled apart, once per
// instruction set.
#pragma once

#include "cpu/dct_plan.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

// Bytes of aligned scratch that a transform works in.
int64_t dct_lanes_workspace(const DctPlan<float>& plan);
int64_t dct_lanes_workspace(const DctPlan<double>& plan);

// Transforms the first plan.n vectors of the workspace, by type 2 or 3; the result lies in it, too.
Vec<float>* dct_lanes(const DctPlan<float>& plan, int type, Vec<float>* workspace);
Vec<double>* dct_lanes(const DctPlan<double>& plan, int type, Vec<double>* workspace);

}  // namespace dijiang::cpu::DIJIANG_ISA
