#pragma once

namespace dijiang::cpu {
// The instruction set that the kernels' run-time dispatch selects on this machine: "x86-64-v4"
// (AVX-512), "x86-64-v3" (AVX2, FMA) or "baseline".
const char* cpu_level();
}  // namespace dijiang::cpu
