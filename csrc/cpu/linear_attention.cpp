// Chooses the instruction set; everything that needs none of its own.
#include "dijiang/core/linear_attention.h"

#include <algorithm>

#include "cpu/cpu_level.h"
#include "cpu/dtype.h"
#include "cpu/linear_attention_workspace.h"
#include "cpu/parameter_rows.h"
#include "cpu/sequence.h"

#define DIJIANG_DECLARE_KERNELS(isa)                                                           \
  namespace isa {                                                                              \
  void linear_attention_forward(const LinearAttentionParams&, const AttentionPiece*, int64_t); \
  void linear_attention_update(const LinearAttentionParams&, int64_t, int64_t);                \
  void linear_attention_backward(const LinearAttentionBackwardParams&, BackwardCounts,         \
                                 const BackwardPiece*, int64_t);                               \
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

BackwardCounts counts_of(const std::vector<BackwardPiece>& pieces) {
  BackwardCounts counts;
  for (const BackwardPiece& piece : pieces) {
    ++(piece.half == BackwardHalf::kQueries ? counts.queries : counts.keys);
  }
  return counts;
}

template <typename Acc>
void finish_parameters(const LinearAttentionBackwardParams& params,
                       const std::vector<BackwardPiece>& pieces,
                       const BackwardWorkspace& workspace) {
  const LinearAttentionParams& p = params.forward;
  if (workspace.row_size() == 0) return;
  const int64_t groups = workspace.groups();
  ParameterSums<Acc> queries(p.fq, params.grad_fq, p.num_heads, p.num_features, p.headdim);
  ParameterSums<Acc> keys(p.fk, params.grad_fk, p.num_kv_heads, p.num_features, p.headdim);
  for (const BackwardPiece& piece : pieces) {
    const int64_t head = piece.task % p.num_kv_heads;
    if (piece.half == BackwardHalf::kKeys) {
      if (params.grad_fk.wanted()) keys.add(head, workspace.key_row(piece.slot));
      continue;
    }
    for (int64_t g = 0; params.grad_fq.wanted() && g < groups; ++g) {
      queries.add(head * groups + g, workspace.query_row(piece.slot, g));
    }
  }
  queries.write();
  keys.write();
}

// d log_decay_r = the sum of d c_t over t >= r.
template <typename Acc>
void finish_decay(const LinearAttentionBackwardParams& params, const BackwardWorkspace& workspace) {
  const LinearAttentionParams& p = params.forward;
  if (params.grad_log_decay == nullptr) return;
  for (int64_t task = 0; task < linear_attention_num_tasks(p); ++task) {
    const Sequence tokens(p, task);
    const int64_t head = task % p.num_kv_heads;
    const double* queries = workspace.query_decay(tokens.batch, head);
    const double* keys = workspace.key_decay(tokens.batch, head);
    Acc* grad = static_cast<Acc*>(params.grad_log_decay) +
                (tokens.batch * p.num_kv_heads + head) * p.seqlen;
    double sum = 0;
    for (int64_t t = tokens.end - 1; t >= tokens.begin; --t) {
      grad[t] = static_cast<Acc>(sum += queries[t] + keys[t]);
    }
  }
}

// Gradients of the sinks among the tokens: what the keys' half found, and what queries added.
void finish_sinks(const LinearAttentionBackwardParams& params,
                  const std::vector<BackwardPiece>& pieces, const BackwardWorkspace& workspace) {
  const LinearAttentionParams& p = params.forward;
  const int64_t size = workspace.sinks_size();
  if (size == 0) return;
  std::vector<double> added(linear_attention_num_tasks(p) * size);
  for (const BackwardPiece& piece : pieces) {
    if (piece.half != BackwardHalf::kQueries) continue;
    const double* sinks = workspace.query_sinks(piece.slot);
    for (int64_t i = 0; i < size; ++i) added[piece.task * size + i] += sinks[i];
  }
  for (const BackwardPiece& piece : pieces) {
    if (piece.half != BackwardHalf::kKeys) continue;
    const Sequence tokens(p, piece.task);
    const int64_t first = tokens.first_position(p), head = piece.task % p.num_kv_heads;
    const int64_t last = std::min(p.sinks - first, std::min(piece.end, tokens.length()));
    const auto write = [&](void* target, int64_t dim, int64_t offset) {
      for (int64_t t = piece.begin; t < last; ++t) {
        const int64_t sink = offset + (first + t) * dim;
        const double* found = workspace.key_sinks(piece.slot) + sink;
        const double* more = added.data() + piece.task * size + sink;
        const int64_t row = (tokens.batch * p.num_kv_heads + head) * p.seqlen + tokens.begin + t;
        dispatch_dtype(p.dtype, [&](auto tag) {
          using T = decltype(tag);
          T* out = static_cast<T*>(target) + row * dim;
          for (int64_t j = 0; j < dim; ++j) {
            out[j] = from_acc<T>(static_cast<AccOf<T>>(found[j] + more[j]));
          }
        });
      }
    };
    write(params.grad_k, p.headdim, 0);
    write(params.grad_v, p.headdim_v, p.sinks * p.headdim);
  }
}

template <typename Acc>
void finish(const LinearAttentionBackwardParams& params, const std::vector<BackwardPiece>& pieces) {
  const BackwardWorkspace workspace(params, counts_of(pieces));
  finish_parameters<Acc>(params, pieces, workspace);
  finish_decay<Acc>(params, workspace);
  finish_sinks(params, pieces, workspace);
}

}  // namespace

int64_t linear_attention_num_tasks(const LinearAttentionParams& params) {
  return (params.segments ? params.num_seqs : params.batch) * params.num_kv_heads;
}

void linear_attention_forward(const LinearAttentionParams& params,
                              const std::vector<AttentionPiece>& pieces, int64_t begin,
                              int64_t end) {
  DIJIANG_DISPATCH(linear_attention_forward, params, pieces.data() + begin, end - begin);
}

void linear_attention_forward(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  std::vector<AttentionPiece> pieces;
  for (int64_t task = begin; task < end; ++task) pieces.push_back({task});
  linear_attention_forward(params, pieces, 0, end - begin);
}

size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params,
                                           const std::vector<BackwardPiece>& pieces) {
  return BackwardWorkspace(params, counts_of(pieces)).size() * sizeof(double);
}

void linear_attention_backward(const LinearAttentionBackwardParams& params,
                               const std::vector<BackwardPiece>& pieces, int64_t begin,
                               int64_t end) {
  const BackwardCounts counts = counts_of(pieces);
  DIJIANG_DISPATCH(linear_attention_backward, params, counts, pieces.data() + begin, end - begin);
}

void linear_attention_backward_finish(const LinearAttentionBackwardParams& params,
                                      const std::vector<BackwardPiece>& pieces) {
  if (params.forward.dtype == DType::kFloat64) return finish<double>(params, pieces);
  finish<float>(params, pieces);
}

void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(linear_attention_update, params, begin, end);
}

void linear_attention_update_finish(const LinearAttentionParams& params) {
  if (params.final.length == nullptr) return;
  for (int64_t i = 0; i < params.batch; ++i) ++params.final.length[i];
}

}  // namespace dijiang::cpu
