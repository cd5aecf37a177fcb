// Chooses the instruction set.
#include "dijiang/core/feature_map.h"

#include "cpu/cpu_level.h"

#define DIJIANG_DECLARE_KERNELS(isa)                                            \
  namespace isa {                                                               \
  void feature_map_forward(const FeatureMapParams&, int64_t, int64_t);          \
  size_t feature_map_backward_workspace(const FeatureMapBackwardParams&);       \
  void feature_map_backward(const FeatureMapBackwardParams&, int64_t, int64_t); \
  void feature_map_backward_finish(const FeatureMapBackwardParams&);            \
  }

namespace dijiang::cpu {

DIJIANG_DECLARE_KERNELS(baseline)
DIJIANG_DECLARE_KERNELS(avx2)
DIJIANG_DECLARE_KERNELS(avx512)

int64_t feature_map_num_tasks(const FeatureMapParams& params) {
  return params.batch * params.num_heads;
}

void feature_map_forward(const FeatureMapParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(feature_map_forward, params, begin, end);
}

size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params) {
  DIJIANG_DISPATCH(feature_map_backward_workspace, params);
}

void feature_map_backward(const FeatureMapBackwardParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(feature_map_backward, params, begin, end);
}

void feature_map_backward_finish(const FeatureMapBackwardParams& params) {
  DIJIANG_DISPATCH(feature_map_backward_finish, params);
}

}  // namespace dijiang::cpu
