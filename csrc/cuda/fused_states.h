// States of the far keys before every chunk, in the workspace as 16-bit tiles of shared memory, for
// rows that read them: the fused mixed forward and the fused backward. Host functions alone.
#pragma once

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

// 16-bit inputs of sizes that the kernels are built for, on a device that takes them, and no state
// updated in place under blocks that read it.
bool folds_apply(const LinearAttentionParams& params);

// Parts of the sequences' chunks, and the memory that they need.
FoldParts plan_parts(const Attention& a, Arena& arena);

void plan_folds(Attention& a, Arena& arena);
// The chunk table, hard keys and decay are there. Writes the final state, too.
void launch_folds(const Attention& a, cudaStream_t stream);

}  // namespace dijiang::cuda
