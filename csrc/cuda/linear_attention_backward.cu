// Backward: the forward's states again, the state run backwards in time, then the gradients of near
// terms, of exponents and of values, and from these those of inputs and parameters. No atomics:
// the same bits on every run.
#include "cuda/attention_phases.h"
#include "cuda/backward_far.h"
#include "cuda/backward_hard.h"
#include "cuda/backward_near.h"
#include "cuda/backward_parameters.h"
#include "cuda/fused_far_backward.h"
#include "cuda/fused_near_backward.h"
#include "dijiang/core/linear_attention_cuda.h"

namespace dijiang::cuda {
namespace {

template <class T, int kColumns>
void launch_near(const Backward& b, cudaStream_t stream) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const unsigned tiles = grid_size(a.max_chunks * a.row_tiles);
  const unsigned key_columns = grid_size(ceil_div(p.headdim, kColumns));
  const unsigned columns = key_columns + grid_size(ceil_div(p.headdim_v, kColumns));
  constexpr size_t shared = NearShared<kColumns>::kFloats * sizeof(float);
  allow_shared(grad_near_queries<T, kColumns>, shared);
  DIJIANG_LAUNCH((grad_near_queries<T, kColumns>), dim3(tiles, grid_size(p.num_heads), key_columns),
                 kThreads, shared, stream, b);
  if (p.window > 0) {
    allow_shared(grad_near_keys<T, kColumns, false>, shared);
    DIJIANG_LAUNCH((grad_near_keys<T, kColumns, false>),
                   dim3(tiles, grid_size(p.num_kv_heads), columns), kThreads, shared, stream, b);
  }
  if (p.cache.most > 0) {
    constexpr size_t hard_shared = HardShared<kColumns>::kFloats * sizeof(float);
    allow_shared(grad_hard_keys<T, kColumns>, hard_shared);
    const int64_t slot_tiles = ceil_div(p.cache.most, kRows);
    DIJIANG_LAUNCH((grad_hard_keys<T, kColumns>),
                   dim3(grid_size(p.num_seqs * slot_tiles), grid_size(p.num_kv_heads), columns),
                   kThreads, hard_shared, stream, b);
  }
  if (p.sinks > 0) {
    allow_shared(grad_near_keys<T, kColumns, true>, shared);
    DIJIANG_LAUNCH((grad_near_keys<T, kColumns, true>),
                   dim3(tiles, grid_size(p.num_heads), columns), kThreads, shared, stream, b);
  }
}

template <class T, bool kGiven>
void launch_far(const Backward& b, cudaStream_t stream) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const unsigned tiles = grid_size(a.max_chunks * a.row_tiles), heads = grid_size(p.num_heads);
  const unsigned kv_heads = grid_size(p.num_kv_heads);
  const unsigned feature_tiles = grid_size(ceil_div(p.num_features, kRows));
  const unsigned value_tiles = column_blocks(p.headdim_v, kRows);
  const unsigned element_tiles = grid_size(ceil_div(p.num_features * (p.headdim_v + 1), kThreads));
  DIJIANG_LAUNCH((local_reverse_states<T, kGiven>),
                 dim3(grid_size(a.max_chunks) * feature_tiles, kv_heads, value_tiles), kThreads,
                 kReverseShared, stream, b);
  DIJIANG_LAUNCH(scan_reverse_states, dim3(grid_size(p.num_seqs) * element_tiles, kv_heads),
                 kThreads, 0, stream, b);
  if (heads > 0) {
    DIJIANG_LAUNCH((grad_query_features<T, kGiven>), dim3(tiles, heads), kThreads, kFarShared,
                   stream, b);
  }
  DIJIANG_LAUNCH((grad_key_features<T, kGiven>), dim3(tiles, kv_heads, feature_tiles), kThreads,
                 kFarShared, stream, b);
  DIJIANG_LAUNCH((grad_far_values<T, kGiven>), dim3(tiles, kv_heads, value_tiles), kThreads,
                 kFarShared, stream, b);
  if (a.has_inner) {
    DIJIANG_LAUNCH((grad_unsafe_rows<T, kGiven>), dim3(grid_size(a.max_chunks), kv_heads), kThreads,
                   kUnsafeShared, stream, b);
  }
}

template <class T, bool kKeys>
void launch_side(const Backward& b, const FeatureSide& side, cudaStream_t stream) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  if (side.heads == 0) return;
  const int64_t rows = p.batch * side.heads * p.seqlen;
  if (p.num_features > 0 && rows > 0) {
    DIJIANG_LAUNCH((sum_slopes<T>), dim3(grid_size(ceil_div(rows, kThreads / 32))), kThreads, 0,
                   stream, p, side);
  }
  DIJIANG_LAUNCH((grad_inputs<T, kKeys>),
                 dim3(grid_size(a.max_chunks * a.row_tiles), grid_size(side.heads),
                      grid_size(ceil_div(p.headdim, kRows))),
                 kThreads, 2 * kDepthTile * sizeof(float), stream, b, side);
  if (p.kind != FeatureKind::kGiven && p.num_features > 0 &&
      (side.grad.omega || side.grad.log_weight)) {
    const int64_t feature_tiles = ceil_div(p.num_features, kRows);
    DIJIANG_LAUNCH((grad_parameters<T>),
                   dim3(grid_size(b.work.splits * feature_tiles), grid_size(side.heads),
                        grid_size(ceil_div(p.headdim, kRows) + 1)),
                   kThreads, 2 * kDepthTile * sizeof(float), stream, p, side, b.work.splits,
                   b.work.parameters);
    const int64_t count = side.heads * p.num_features * (p.headdim + 1);
    DIJIANG_LAUNCH(sum_parameters, dim3(grid_size(ceil_div(count, kThreads))), kThreads, 0, stream,
                   p, side, b.work.splits, b.work.parameters);
  }
  if (side.grad.beta) {
    if (side.feature.beta && p.kind == FeatureKind::kExp && p.num_features > 0) {
      DIJIANG_LAUNCH(grad_betas, dim3(grid_size(side.heads)), kThreads, kThreads * sizeof(double),
                     stream, p, side);
    } else {
      zero(static_cast<float*>(side.grad.beta), side.heads, stream);
    }
  }
}

template <class T, bool kGiven>
cudaError_t backward(const Backward& b, cudaStream_t stream) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const BackwardWork& w = b.work;
  const unsigned tiles = grid_size(a.max_chunks * a.row_tiles);
  const int64_t rows = p.batch * p.num_heads * p.seqlen;
  const int64_t key_rows = p.batch * p.num_kv_heads * p.seqlen;
  // What only some kernels write.
  zero(w.grad_b, rows * p.num_features, stream);      // padding
  zero(w.grad_a, key_rows * p.num_features, stream);  // and keys that are not folded
  zero(w.grad_v, key_rows * p.headdim_v, stream);
  zero(w.near_k, key_rows * p.headdim, stream);

  launch_states<T, kGiven>(a, stream);
  if (p.num_heads > 0) {
    DIJIANG_LAUNCH((prepare_rows<T, kGiven>), dim3(tiles, grid_size(p.num_heads)), kThreads, 0,
                   stream, b);
  }
  if (w.near_q) {
    if (fused_near_backward_applies(b.params)) {
      launch_fused_near_backward(b, stream);
    } else if (p.headdim <= 64 && p.headdim_v <= 64) {
      launch_near<T, 64>(b, stream);
    } else {
      launch_near<T, 128>(b, stream);
    }
    if (p.sinks > 0) {
      DIJIANG_LAUNCH(sum_sink_gradients,
                     dim3(grid_size(p.num_seqs * p.sinks), grid_size(p.num_kv_heads)), kThreads, 0,
                     stream, b);
    }
  }
  if (p.num_features > 0) launch_far<T, kGiven>(b, stream);

  DIJIANG_LAUNCH((write_grad_values<T>), dim3(tiles, grid_size(p.num_kv_heads)), kThreads, 0,
                 stream, b);
  launch_side<T, false>(b,
                        {p.q, p.fq, b.params.grad_fq, p.num_heads, a.work.query_features, w.grad_b,
                         w.near_q, w.query_total, w.query_square, b.params.grad_q},
                        stream);
  launch_side<T, true>(b,
                       {p.k, p.fk, b.params.grad_fk, p.num_kv_heads, a.work.key_features, w.grad_a,
                        w.near_k, w.key_total, w.key_square, b.params.grad_k},
                       stream);
  if (b.params.grad_log_decay) {
    if (a.has_decay) {
      DIJIANG_LAUNCH(grad_decays, dim3(grid_size(p.num_seqs), grid_size(p.num_kv_heads)), kThreads,
                     kThreads * sizeof(double), stream, b);
    } else {
      zero(static_cast<float*>(b.params.grad_log_decay), key_rows, stream);
    }
  }
  return launch_status();
}

template <class T>
cudaError_t backward_kind(const Backward& b, cudaStream_t stream) {
  return b.forward.params.kind == FeatureKind::kGiven ? backward<T, true>(b, stream)
                                                      : backward<T, false>(b, stream);
}

}  // namespace

size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params) {
  if (params.forward.num_kv_heads == 0) return 0;
  if (fused_far_backward_applies(params)) return fused_far_backward_workspace(params);
  Arena arena(nullptr);
  plan_backward(params, arena);
  return arena.used();
}

cudaError_t linear_attention_backward(const LinearAttentionBackwardParams& params,
                                      cudaStream_t stream) {
  if (const cudaError_t error = check_attention(params.forward); error != cudaSuccess) return error;
  if (params.forward.num_kv_heads == 0) return cudaSuccess;  // no gradient has elements
  if (fused_far_backward_applies(params)) return fused_far_backward(params, stream);
  Arena arena(params.workspace);
  Backward b = plan_backward(params, arena);
  b.forward.params.final = AttentionState{};  // the scan must not write it
  if (b.forward.params.num_seqs == 0) return cudaSuccess;
  switch (params.forward.dtype) {
    case DType::kFloat32: return backward_kind<float>(b, stream);
    case DType::kBFloat16: return backward_kind<__nv_bfloat16>(b, stream);
    case DType::kFloat16: return backward_kind<__half>(b, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace dijiang::cuda
