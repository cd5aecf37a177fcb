// The fused backward of far keys alone: which calls it takes, and its kernels. Two walks leave the
// states before and behind every chunk (fused_far_walks.h); then all chunks at once
// (fused_far_grads.h), the rows that these leave out (fused_far_unsafe.h), and the parameters
// (fused_far_parameters.h). No atomics: the same bits on every run.
#include "cuda/fused_far_backward.h"

#include "cuda/backward_far.h"
#include "cuda/fused_far_parameters.h"
#include "cuda/fused_far_unsafe.h"
#include "cuda/fused_far_walks.h"
#include "cuda/fused_forward.h"
#include "cuda/fused_parts.h"

namespace dijiang::cuda {
namespace {

// --- kernels -------------------------------------------------------------------------------------

// Grid of the walks: part, kv head, 64 columns of v.
template <class Part>
__global__ void __launch_bounds__(kWalkThreads, 2)
    write_states(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = b.f.attention;
  const LinearAttentionParams& p = a.params;
  Chunk c;
  if (!find_part_chunk(b.f, c)) return;
  StateWalk<Part> walk(b.f, raw);
  find_part(walk, c, blockIdx.y, 0);
  const int64_t cell = cell_of(a, blockIdx.x, blockIdx.y);
  if (b.f.split) {
    walk.read_state(a.work.kv, a.work.z, a.work.scale, cell);
  } else {
    walk.read_state(static_cast<const float*>(p.initial.kv), static_cast<const float*>(p.initial.z),
                    static_cast<const float*>(p.initial.log_scale), cell);
  }
  walk.run_and_write(b.work, b.first_chunk[c.seq] + c.query_pos / kTileRows);
}

// R of a part's queries alone.
template <class Part>
__global__ void __launch_bounds__(kWalkThreads, 2)
    walk_queries_back(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_part_chunk(b.f, c)) return;
  ReverseWalk<Part> walk(b, raw);
  find_part(walk, c, blockIdx.y, 0);
  walk.read_state(nullptr, nullptr, nullptr, 0);
  walk.template run_back<false>(0);
  walk.write_state(b.part_kv, b.part_z, b.part_local,
                   cell_of(b.f.attention, blockIdx.x, blockIdx.y));
}

template <class Part>
__global__ void __launch_bounds__(kWalkThreads, 2)
    write_reverse_states(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_part_chunk(b.f, c)) return;
  ReverseWalk<Part> walk(b, raw);
  find_part(walk, c, blockIdx.y, 0);
  const int64_t cell = cell_of(b.f.attention, blockIdx.x, blockIdx.y);
  if (b.f.split) {
    walk.read_state(b.part_kv, b.part_z, b.part_scale, cell);
  } else {
    walk.read_final(cell);
  }
  walk.template run_back<true>(b.first_chunk[c.seq] + c.query_pos / kTileRows);
  if (!b.f.split) walk.write_initial(cell);
}

// Grid: chunk, kv head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2)
    grad_far_chunks(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_chunk(b.f.attention, blockIdx.x, c)) return;
  FarGrads<Shape>(b, c, raw).run();
}

template <class Shape>
__global__ void __launch_bounds__(kWalkThreads)
    grad_unsafe_far_rows(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_chunk(b.f.attention, blockIdx.x, c)) return;
  UnsafeRows<Shape>(b, c, reinterpret_cast<float*>(raw)).run();
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(FarShape) for the sizes of p; false where there are no kernels for them.
template <class Take>
bool with_far_shape(const LinearAttentionParams& p, const Take& take) {
  if (p.dtype != DType::kBFloat16 || p.num_features != 64) return false;
  if (p.headdim == 64 && p.headdim_v == 64) {
    take(FarShape<64, 64>{});
  } else if (p.headdim == 64 && p.headdim_v == 128) {
    take(FarShape<64, 128>{});
  } else if (p.headdim == 128 && p.headdim_v == 64) {
    take(FarShape<128, 64>{});
  } else if (p.headdim == 128 && p.headdim_v == 128) {
    take(FarShape<128, 128>{});
  } else {
    return false;
  }
  return true;
}

// The most shared memory that a block of any kernel takes.
int most_shared(const LinearAttentionParams& p) {
  const auto group = static_cast<int>(p.num_heads / p.num_kv_heads);
  int bytes = 0;
  with_far_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    const int chunk = FarShared<Shape>::kBytes;
    const int walk = ReverseWalk<typename Shape::Part>::bytes(group);
    bytes = chunk > walk ? chunk : walk;
  });
  return bytes;
}

// --- the workspace -------------------------------------------------------------------------------

struct Plan {
  Attention chunks;           // of 64 tokens
  FarBackward walks;          // parts in the place of chunks
  FarBackward call;           // chunks
  float* parameters[kSides];  // parts of their gradients
  int splits[kSides], split_chunks[kSides];
};

constexpr int64_t kParameterBlocks = 4 * 132;  // wanted

Plan plan_far(const LinearAttentionBackwardParams& params, Arena& arena) {
  Plan plan{};
  LinearAttentionParams p = params.forward;
  p.final = AttentionState{};  // the scan must not write it
  const int64_t columns = p.headdim_v / 64, m = p.num_features;
  FarBackward& b = plan.walks;
  b.f = plan_parts(p, p.num_kv_heads * columns, false, arena);

  Attention& a = plan.chunks;
  a = b.f.attention;
  a.chunk_size = kTileRows;
  a.max_chunks = p.batch * p.seqlen / kTileRows + 2 * a.params.num_seqs;
  const int64_t cells = a.max_chunks * p.num_kv_heads;
  a.work = Workspace{};
  a.work.first_chunk = arena.take<int32_t>(a.params.num_seqs + 1);
  a.work.chunks = arena.take<Chunk>(a.max_chunks);
  a.work.levels = arena.take<double>(a.has_decay ? cells * kTileRows : 0);

  b.first_chunk = a.work.first_chunk;
  b.grad_out = params.grad_out;
  b.grad_x[0] = params.grad_q;
  b.grad_x[1] = params.grad_k;
  b.grad_v = params.grad_v;
  b.grad_feature[0] = params.grad_fq;
  b.grad_feature[1] = params.grad_fk;
  b.grad_final_kv = static_cast<const float*>(params.grad_final_kv);
  b.grad_final_z = static_cast<const float*>(params.grad_final_z);
  b.final_log_scale = static_cast<const float*>(params.final_log_scale);
  b.grad_initial_kv = static_cast<float*>(params.grad_initial_kv);
  b.grad_initial_z = static_cast<float*>(params.grad_initial_z);

  FarWork& w = b.work;
  const int64_t heads[kSides] = {p.num_heads, p.num_kv_heads};
  const int64_t query_rows = p.batch * p.num_heads * p.seqlen;
  for (int side = 0; side < kSides; ++side) {
    const int64_t rows = p.batch * heads[side] * p.seqlen;
    const FeatureGrads& grad = b.grad_feature[side];
    const bool parameters = grad.omega || grad.log_weight;
    w.omega[side] = arena.take<__nv_bfloat16>(heads[side] * 2 * m * p.headdim);
    w.lines[side] = arena.take<FeatureLine>(heads[side] * m);
    w.total[side] = arena.take<float>(rows);
    w.square[side] = arena.take<float>(grad.beta ? rows : 0);
    w.slopes[side] = arena.take<__nv_bfloat16>(parameters ? rows * m : 0);
    w.weights[side] =
        arena.take<float>(grad.log_weight ? a.max_chunks * heads[side] * kWalkWarps * m : 0);
    int64_t splits = ceil_div(kParameterBlocks, heads[side]);
    if (splits > a.max_chunks) splits = a.max_chunks;
    plan.split_chunks[side] = static_cast<int>(ceil_div(a.max_chunks, splits));
    plan.splits[side] = static_cast<int>(ceil_div(a.max_chunks, plan.split_chunks[side]));
    plan.parameters[side] =
        arena.take<float>(parameters ? plan.splits[side] * heads[side] * m * (p.headdim + 1) : 0);
  }
  w.delta = arena.take<float>(query_rows);
  w.inverse = arena.take<float>(query_rows);
  w.state = arena.take<__nv_bfloat16>(cells * m * p.headdim_v);
  w.reverse = arena.take<__nv_bfloat16>(cells * m * p.headdim_v);
  w.scale = arena.take<float>(cells * m);
  w.z = arena.take<float>(cells * m);
  w.top = arena.take<float>(cells * m);
  w.reverse_scale = arena.take<float>(cells * m);
  w.reverse_z = arena.take<float>(cells * m);
  w.unsafe = arena.take<unsigned>(a.max_chunks * p.num_heads * kWalkWarps);
  if (b.f.split) {
    const int64_t parts = b.f.attention.max_chunks * p.num_kv_heads;
    b.part_kv = arena.take<float>(parts * m * p.headdim_v);
    b.part_z = arena.take<float>(parts * m);
    b.part_local = arena.take<float>(parts * m);
    b.part_scale = arena.take<float>(parts * m);
  }
  plan.call = b;
  plan.call.f.attention = a;
  return plan;
}

// What the kernels of the other backward read.
Backward as_backward(const LinearAttentionBackwardParams& params, const FarBackward& b) {
  Backward out{};
  out.params = params;
  out.forward = b.f.attention;
  out.forward.has_inner = false;  // prepare_rows leaves out what it needs features for
  BackwardWork& w = out.work;
  w.delta = b.work.delta;
  w.inverse = b.work.inverse;
  w.query_total = b.work.total[0];
  w.key_total = b.work.total[1];
  w.reverse_kv = b.part_kv;
  w.reverse_z = b.part_z;
  w.reverse_local = b.part_local;
  w.reverse_scale = b.part_scale;
  return out;
}

// --- launching -----------------------------------------------------------------------------------

unsigned narrow_size(int64_t x) { return static_cast<unsigned>(x); }

template <class Part>
void launch_walks(const LinearAttentionBackwardParams& params, const FarBackward& b,
                  cudaStream_t stream) {
  const LinearAttentionParams& p = b.f.attention.params;
  const dim3 grid(parts_of(b.f), narrow_size(p.num_kv_heads), narrow_size(p.headdim_v / 64));
  constexpr int shared = FusedShared<Part, false>::bytes(0);
  const int back = ReverseWalk<Part>::bytes(b.f.attention.group);
  if (b.f.split) {
    launch_part_states<Part>(b.f, stream);
    allow_shared(walk_queries_back<Part>, back);
    DIJIANG_LAUNCH(walk_queries_back<Part>, grid, kWalkThreads, back, stream, b);
    DIJIANG_LAUNCH(scan_reverse_states, scan_grid(p), kThreads, 0, stream, as_backward(params, b));
  }
  allow_shared(write_states<Part>, shared);
  DIJIANG_LAUNCH(write_states<Part>, grid, kWalkThreads, shared, stream, b);
  allow_shared(write_reverse_states<Part>, back);
  DIJIANG_LAUNCH(write_reverse_states<Part>, grid, kWalkThreads, back, stream, b);
}

template <class Shape>
void launch_parameters(const Plan& plan, int number, const FeatureParams& feature,
                       cudaStream_t stream) {
  const FarBackward& b = plan.call;
  const LinearAttentionParams& p = b.f.attention.params;
  const FeatureGrads& grad = b.grad_feature[number];
  FeatureSide side{};
  side.feature = feature;
  side.grad = grad;
  side.heads = number == 0 ? p.num_heads : p.num_kv_heads;
  side.square = b.work.square[number];
  if (grad.omega || grad.log_weight) {
    constexpr int shared = 2 * kTileRows * (Shape::kFeatures + Shape::kHeadDim) * 2;
    allow_shared(sum_omega<Shape>, shared);
    DIJIANG_LAUNCH(sum_omega<Shape>,
                   dim3(narrow_size(plan.splits[number]), narrow_size(side.heads)), kWalkThreads,
                   shared, stream, b, number, plan.split_chunks[number], plan.parameters[number]);
    const int64_t count = side.heads * p.num_features * (p.headdim + 1);
    DIJIANG_LAUNCH(sum_parameters, dim3(narrow_size(ceil_div(count, kThreads))), kThreads, 0,
                   stream, p, side, plan.splits[number], plan.parameters[number]);
  }
  if (!grad.beta) return;
  if (feature.beta && p.kind == FeatureKind::kExp) {
    DIJIANG_LAUNCH(grad_betas, dim3(narrow_size(side.heads)), kThreads, kThreads * sizeof(double),
                   stream, p, side);
  } else {
    cudaMemsetAsync(grad.beta, 0, side.heads * sizeof(float), stream);
  }
}

template <class Shape>
void launch_far_backward(const LinearAttentionBackwardParams& params, const Plan& plan,
                         cudaStream_t stream) {
  const FarBackward& b = plan.call;
  const Attention& a = b.f.attention;
  const LinearAttentionParams& p = a.params;
  const unsigned chunks = narrow_size(a.max_chunks), kv_heads = narrow_size(p.num_kv_heads);
  const Backward other = as_backward(params, b);
  for (int side = 0; side < kSides; ++side) {  // padding
    const int64_t rows = p.batch * (side == 0 ? p.num_heads : p.num_kv_heads) * p.seqlen;
    if (b.work.square[side]) {
      cudaMemsetAsync(b.work.square[side], 0, rows * sizeof(float), stream);
    }
  }
  DIJIANG_LAUNCH(build_chunks, 1, kThreads, kThreads * sizeof(int), stream, a);
  if (a.has_decay) DIJIANG_LAUNCH(sum_levels, dim3(chunks, kv_heads), 32, 0, stream, a);
  DIJIANG_LAUNCH(split_omega<Shape>, dim3(narrow_size(p.num_heads), kSides), kWalkThreads, 0,
                 stream, b);
  DIJIANG_LAUNCH((prepare_rows<__nv_bfloat16, false>), dim3(chunks, narrow_size(p.num_heads)),
                 kThreads, 0, stream, other);
  launch_walks<typename Shape::Part>(params, plan.walks, stream);
  allow_shared(grad_far_chunks<Shape>, FarShared<Shape>::kBytes);
  DIJIANG_LAUNCH(grad_far_chunks<Shape>, dim3(chunks, kv_heads), kWalkThreads,
                 FarShared<Shape>::kBytes, stream, b);
  constexpr int unsafe = UnsafeShared<Shape>::kFloats * static_cast<int>(sizeof(float));
  allow_shared(grad_unsafe_far_rows<Shape>, unsafe);
  DIJIANG_LAUNCH(grad_unsafe_far_rows<Shape>, dim3(chunks, kv_heads), kWalkThreads, unsafe, stream,
                 b);
  launch_parameters<Shape>(plan, 0, p.fq, stream);
  launch_parameters<Shape>(plan, 1, p.fk, stream);
  if (params.grad_log_decay) {
    if (a.has_decay) {
      DIJIANG_LAUNCH(grad_decays, dim3(narrow_size(p.num_seqs), kv_heads), kThreads,
                     kThreads * sizeof(double), stream, other);
    } else {
      cudaMemsetAsync(params.grad_log_decay, 0, p.batch * p.num_kv_heads * p.seqlen * sizeof(float),
                      stream);
    }
  }
}

}  // namespace

bool fused_far_backward_applies(const LinearAttentionBackwardParams& params) {
  LinearAttentionParams p = params.forward;
  if (p.num_heads == 0 || p.headdim_v == 0 || !fused_forward_applies(p)) return false;
  if (!has_whole_pieces(params.grad_out) || !with_far_shape(p, [](auto) {})) return false;
  for (const void* grad : {params.grad_q, params.grad_k, params.grad_v}) {
    if (!begins_at_pieces(grad)) return false;
  }
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= most_shared(p);
}

size_t fused_far_backward_workspace(const LinearAttentionBackwardParams& params) {
  Arena arena(nullptr);
  plan_far(params, arena);
  return arena.used();
}

cudaError_t fused_far_backward(const LinearAttentionBackwardParams& params, cudaStream_t stream) {
  Arena arena(params.workspace);
  const Plan plan = plan_far(params, arena);
  if (plan.chunks.params.num_seqs == 0) return cudaSuccess;
  with_far_shape(params.forward,
                 [&](auto shape) { launch_far_backward<decltype(shape)>(params, plan, stream); });
  return launch_status();
}

}  // namespace dijiang::cuda
