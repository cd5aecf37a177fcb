// All kernels of attention but the update's, compiled into the test: they call one another.
#pragma once

#include "cuda/fused_choice.cu"
#include "cuda/fused_far_backward.cu"
#include "cuda/fused_forward.cu"
#include "cuda/fused_mixed.cu"
#include "cuda/fused_near.cu"
#include "cuda/fused_near_backward.cu"
#include "cuda/fused_states.cu"
#include "cuda/linear_attention_backward.cu"
#include "cuda/linear_attention_forward.cu"
