// Kernels are compiled once per instruction set. Each kernel header puts its code in the namespace
// DIJIANG_ISA; a source file per instruction set includes this header, sets the target, DIJIANG_ISA
// and DIJIANG_ISA_LEVEL (the x86-64 level, 1 elsewhere: g++ 12 does not define __AVX2__ by a target
// pragma), and then includes the kernels, so that whole kernels are inlined and vectorised for it.
// Everything from outside must be included here, before the target is set: an inline function
// of the standard library compiled for AVX-512 could otherwise be the one the linker keeps.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/dtype.h"
#include "cpu/keep_best.h"
#include "cpu/linear_attention_workspace.h"
#include "cpu/sequence.h"
#include "dijiang/core/linear_attention.h"
#include "dijiang/core/types.h"
