// phi(x) for x (batch, heads, seqlen, headdim): see FeatureKind. kGiven is not allowed here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dijiang/core/linear_attention.h"
#include "dijiang/core/types.h"

namespace dijiang {

struct FeatureMapParams {
  DType dtype = DType::kFloat32;
  FeatureKind kind = FeatureKind::kExp;
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t seqlen = 0;
  int64_t headdim = 0;
  int64_t num_features = 0;
  ConstView x;            // (batch, num_heads, seqlen, headdim)
  FeatureParams feature;  // num_heads rows
  double scale = 1.0;     // features are those of sqrt(scale) x
  bool log = false;       // write log phi instead of phi
  void* out = nullptr;    // dtype (batch, num_heads, seqlen, num_features), contiguous. phi
                          // saturates at the largest finite value of dtype
};

struct FeatureMapBackwardParams {
  FeatureMapParams forward;  // out as the forward left it
  ConstView grad_out;        // dtype, as out
  void* grad_x = nullptr;    // dtype (batch, num_heads, seqlen, headdim), contiguous
  FeatureGrads grad;         // summed over batch and seqlen; null members: not wanted
  void* workspace = nullptr;
};

namespace cpu {
// A task is one (batch, head).
int64_t feature_map_num_tasks(const FeatureMapParams& params);
void feature_map_forward(const FeatureMapParams& params, int64_t begin, int64_t end);
size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params);
void feature_map_backward(const FeatureMapBackwardParams& params, int64_t begin, int64_t end);
void feature_map_backward_finish(const FeatureMapBackwardParams& params);
}  // namespace cpu
}  // namespace dijiang
