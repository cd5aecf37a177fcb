// Chooses the instruction set.
#include "dijiang/core/feature_map.h"

#include "cpu/cpu_level.h"
#include "cpu/feature_map_rows.h"

#define DIJIANG_DECLARE_KERNELS(isa)                                            \
  namespace isa {                                                               \
  void feature_map_forward(const FeatureMapParams&, int64_t, int64_t);          \
  void feature_map_backward(const FeatureMapBackwardParams&, int64_t, int64_t); \
  }

namespace dijiang::cpu {

DIJIANG_DECLARE_KERNELS(baseline)
DIJIANG_DECLARE_KERNELS(avx2)
DIJIANG_DECLARE_KERNELS(avx512)

namespace {

template <typename Acc>
void finish(const FeatureMapBackwardParams& params) {
  const FeatureMapParams& p = params.forward;
  ParameterSums<Acc> sums(p.feature, params.grad, p.num_heads, p.num_features, p.headdim);
  for (int64_t task = 0; params.grad.wanted() && task < feature_map_num_tasks(p); ++task) {
    sums.add(task % p.num_heads, feature_map_grads(params, task));
  }
  sums.write();
}

}  // namespace

int64_t feature_map_num_tasks(const FeatureMapParams& params) {
  return params.batch * params.num_heads;
}

void feature_map_forward(const FeatureMapParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(feature_map_forward, params, begin, end);
}

size_t feature_map_backward_workspace(const FeatureMapBackwardParams& params) {
  const FeatureMapParams& p = params.forward;
  return p.batch * p.num_heads * feature_map_row_size(p) * sizeof(double);
}

void feature_map_backward(const FeatureMapBackwardParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(feature_map_backward, params, begin, end);
}

void feature_map_backward_finish(const FeatureMapBackwardParams& params) {
  if (params.forward.dtype == DType::kFloat64) return finish<double>(params);
  finish<float>(params);
}

}  // namespace dijiang::cpu
