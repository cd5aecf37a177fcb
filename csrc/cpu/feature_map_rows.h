// Where the tasks of feature_map's backward leave the gradients of their head's parameters.
#pragma once

#include "cpu/parameter_rows.h"
#include "dijiang/core/feature_map.h"

namespace dijiang::cpu {

inline int64_t feature_map_row_size(const FeatureMapParams& p) {
  return parameter_row_size(p.feature, p.num_features, p.headdim);
}
inline double* feature_map_grads(const FeatureMapBackwardParams& params, int64_t task) {
  return static_cast<double*>(params.workspace) + task * feature_map_row_size(params.forward);
}

}  // namespace dijiang::cpu
