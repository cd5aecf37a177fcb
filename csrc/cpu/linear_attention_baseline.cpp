// Linear attention for the instruction set that the compiler's own flags choose.
#include "cpu/isa.h"

#define DIJIANG_ISA baseline
#define DIJIANG_ISA_LEVEL 1

#include "cpu/linear_attention_kernels.h"
