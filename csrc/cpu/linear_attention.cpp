// Chooses the instruction set; everything that needs none of its own.
#include "dijiang/core/linear_attention.h"

#include "cpu/cpu_level.h"

#define DIJIANG_DECLARE_KERNELS(isa)                                             \
  namespace isa {                                                                \
  void linear_attention_forward(const LinearAttentionParams&, int64_t, int64_t); \
  void linear_attention_update(const LinearAttentionParams&, int64_t, int64_t);  \
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

int64_t linear_attention_num_tasks(const LinearAttentionParams& params) {
  return (params.segments ? params.num_seqs : params.batch) * params.num_kv_heads;
}

void linear_attention_forward(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(linear_attention_forward, params, begin, end);
}

void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(linear_attention_update, params, begin, end);
}

void linear_attention_update_finish(const LinearAttentionParams& params) {
  if (params.final.length == nullptr) return;
  for (int64_t i = 0; i < params.batch; ++i) ++params.final.length[i];
}

}  // namespace dijiang::cpu
