// What the kernels of the fused far backward are told, and what they leave to one another.
#pragma once

#include "cuda/fused_layout.h"

namespace dijiang::cuda {

// bfloat16, whose exponents reach as far as those of float. kValueDim: all columns of v.
template <int kHeadDim_, int kValueDim_>
struct FarShape {
  using T = __nv_bfloat16;
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_, kFeatures = 64;
  using Part = FusedShape<T, kHeadDim, kFeatures>;          // of the walks, 64 columns of v
  static constexpr int kMatrix = 2 * kFeatures * kHeadDim;  // elements of omega's two parts
  static constexpr int kState = kValueDim * kFeatures;
};

// Side 0: queries; 1: keys.
constexpr int kSides = 2;

struct FarWork {
  // Of each head: omega in two parts, as tiles (fused_tiles.h), and the lines of its features.
  __nv_bfloat16* omega[kSides];
  FeatureLine* lines[kSides];
  // Over (batch, heads, seqlen).
  float* delta;                   // do . o
  float* inverse;                 // 1 / row_sum; 0 for a row without weight
  float* total[kSides];           // sum over features of the exponents' gradients
  float* square[kSides];          // |x|^2 scale times that: what beta gets
  __nv_bfloat16* slopes[kSides];  // (.., features): gradient of omega x; null: not wanted
  // Over (chunk, kv heads): the state before a chunk and that of the queries behind it (R),
  // transposed, as tiles; their scales M and N, z and rho; M' of the chunk.
  __nv_bfloat16* state;
  __nv_bfloat16* reverse;
  float* scale;
  float* z;
  float* top;
  float* reverse_scale;
  float* reverse_z;
  // Over (chunk, heads, warps).
  float* weights[kSides];  // (.., features): of log_weight, a warp's rows; null: not wanted
  unsigned* unsafe;        // ballots of rows, as Walk::failed_rows reads them
};

struct FarBackward {
  FusedAttention f;            // the walks' chunks are parts, those of the other kernels 64 tokens
  const int32_t* first_chunk;  // of chunks of 64 tokens
  FarWork work;
  ConstView grad_out;
  void* grad_x[kSides];
  void* grad_v;
  FeatureGrads grad_feature[kSides];
  const float *grad_final_kv, *grad_final_z, *final_log_scale;
  float *grad_initial_kv, *grad_initial_z;
  // Of parts, when split: R, rho and N of their queries alone, then behind them.
  float *part_kv, *part_z, *part_local, *part_scale;
};
// What a kernel can be told.
static_assert(sizeof(FarBackward) <= 4096);

}  // namespace dijiang::cuda
