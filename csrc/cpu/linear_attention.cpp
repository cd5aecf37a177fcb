// Chooses the instruction set; everything that needs none of its own.
#include "dijiang/core/linear_attention.h"

#include "cpu/cpu_level.h"
#include "cpu/linear_attention_workspace.h"

#define DIJIANG_DECLARE_KERNELS(isa)                                                      \
  namespace isa {                                                                         \
  void linear_attention_forward(const LinearAttentionParams&, int64_t, int64_t);          \
  void linear_attention_update(const LinearAttentionParams&, int64_t, int64_t);           \
  void linear_attention_backward(const LinearAttentionBackwardParams&, int64_t, int64_t); \
  }

#if defined(__x86_64__)
#define DIJIANG_DISPATCH(function, ...)              \
  switch (cpu_level()) {                             \
    case 4: return avx512::function(__VA_ARGS__);    \
    case 3: return avx2::function(__VA_ARGS__);      \
    default: return baseline::function(__VA_ARGS__); \
  }
#else
#define DIJIANG_DISPATCH(function, ...) return baseline::function(__VA_ARGS__)
#endif

namespace dijiang::cpu {

DIJIANG_DECLARE_KERNELS(baseline)
DIJIANG_DECLARE_KERNELS(avx2)
DIJIANG_DECLARE_KERNELS(avx512)

namespace {

// Sums the double rows row(0), row(1), ... into one head's parameter gradients.
template <typename Acc, typename Row>
void sum_rows(const LinearAttentionParams& p, const FeatureGrads& grads, int64_t head,
              int64_t count, const Row& row) {
  const int64_t m = p.num_features, md = m * p.headdim;
  const auto sum = [&](void* target, int64_t first, int64_t size) {
    if (target == nullptr) return;
    Acc* out = static_cast<Acc*>(target) + head * size;
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t n = 0; n < count; ++n) total += row(n)[first + i];
      out[i] = static_cast<Acc>(total);
    }
  };
  sum(grads.omega, 0, md);
  sum(grads.log_weight, md, m);
  sum(grads.beta, md + m, 1);
}

template <typename Acc>
void finish(const LinearAttentionBackwardParams& params) {
  const LinearAttentionParams& p = params.forward;
  const BackwardWorkspace workspace(params);
  if (workspace.row_size() == 0) return;
  const int64_t groups = workspace.groups();
  for (int64_t head = 0; head < p.num_heads; ++head) {
    sum_rows<Acc>(p, params.grad_fq, head, workspace.num_seqs(),
                  [&](int64_t n) { return workspace.row(n, head / groups, head % groups); });
  }
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    sum_rows<Acc>(p, params.grad_fk, head, workspace.num_seqs(),
                  [&](int64_t n) { return workspace.row(n, head, groups); });
  }
}

}  // namespace

int64_t linear_attention_num_tasks(const LinearAttentionParams& params) {
  return (params.segments ? params.num_seqs : params.batch) * params.num_kv_heads;
}

void linear_attention_forward(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(linear_attention_forward, params, begin, end);
}

size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params) {
  return BackwardWorkspace(params).bytes();
}

void linear_attention_backward(const LinearAttentionBackwardParams& params, int64_t begin,
                               int64_t end) {
  DIJIANG_DISPATCH(linear_attention_backward, params, begin, end);
}

void linear_attention_backward_finish(const LinearAttentionBackwardParams& params) {
  if (params.forward.dtype == DType::kFloat64) return finish<double>(params);
  finish<float>(params);
}

void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(linear_attention_update, params, begin, end);
}

void linear_attention_update_finish(const LinearAttentionParams& params) {
  if (params.final.length == nullptr) return;
  for (int64_t i = 0; i < params.batch; ++i) ++params.final.length[i];
}

}  // namespace dijiang::cpu
