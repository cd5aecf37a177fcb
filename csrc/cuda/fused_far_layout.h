// What the kernels of the fused far backward are told, and what they leave to one another.
#pragma once

#include "cuda/fused_layout.h"

namespace dijiang::cuda {

// bfloat16, whose exponents reach as far as those of float. kFeatures: of a slice. kValueDim: all
// columns of v.
template <int kHeadDim_, int kFeatures_, int kValueDim_>
struct FarShape {
  using T = __nv_bfloat16;
  static constexpr int kHeadDim = kHeadDim_, kFeatures = kFeatures_, kValueDim = kValueDim_;
  using Map = FeatureMap<T, kHeadDim, kFeatures>;
  using Part = FusedShape<T, kHeadDim, kFeatures>;  // of the walks, 64 columns of v
  static constexpr int kState = kValueDim * kFeatures;
};

// Side 0: queries; 1: keys.
constexpr int kSides = 2;

struct FarWork {
  char* maps[kSides];  // (heads, slices): omega as tiles in shared memory have it
  // Over (batch, heads, seqlen).
  float* delta;                   // do . o
  float* inverse;                 // 1 / row_sum; 0 for a row without weight
  float* total[kSides];           // sum over features of the exponents' gradients
  float* square[kSides];          // |x|^2 scale times that: what beta gets; null: not wanted
  __nv_bfloat16* slopes[kSides];  // (.., tiles' features): gradient of omega x; null: not wanted
  // What near keys, and all slices but the last, give to the gradients of q, k and v; null: no near
  // keys and one slice.
  float* sums[kSides];
  float* sums_v;
  // Over (chunk, kv heads, slices): the state R of the queries behind a chunk, as Workspace::states
  // has that of the keys before it, its scale N, and rho.
  __nv_bfloat16* reverse;
  float* reverse_scale;
  float* reverse_z;
  FoldParts parts;  // of its walk: of each sequence all but the first
  // Over (chunk, tile of 64 rows, heads, warps).
  float* weights[kSides];  // (.., tiles' features): of log_weight, a warp's rows; null: not wanted
  unsigned* unsafe;        // ballots of rows of a slice, as failed_rows reads them
};

struct FarBackward {
  Attention a;  // with the states before chunks (fused_states.h)
  FarWork work;
  int slice, slices;  // of the features: the one that a call of a kernel of rows takes, and all
  bool has_near;
  ConstView grad_out;
  void* grad_x[kSides];
  void* grad_v;
  FeatureGrads grad_feature[kSides];
  const float *grad_final_kv, *grad_final_z, *final_log_scale;
  float *grad_initial_kv, *grad_initial_z;
};
// What a kernel can be told.
static_assert(sizeof(FarBackward) <= 4096);

}  // namespace dijiang::cuda
