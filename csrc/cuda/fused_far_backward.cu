// The fused backward of far keys: which calls it takes, and its kernels. Two walks leave the states
// before and behind every chunk (fused_fold.h, fused_reverse.h); then all chunks at once. With far
// keys alone a block has a chunk, or half of it (fused_far_grads.h), and rows are left out that
// overflow (fused_far_unsafe.h); beside near keys it has 64 queries, or keys (fused_far_sides.h),
// and adds what the near backward has left. Parameters come last (fused_far_parameters.h). No
// atomics: the same bits on every run.
#include "cuda/fused_far_backward.h"

#include "cuda/backward_far.h"
#include "cuda/backward_near.h"
#include "cuda/fused_calls.h"
#include "cuda/fused_far_parameters.h"
#include "cuda/fused_far_sides.h"
#include "cuda/fused_far_unsafe.h"
#include "cuda/fused_forward.h"
#include "cuda/fused_mixed.h"
#include "cuda/fused_near_backward.h"
#include "cuda/fused_reverse.h"
#include "cuda/fused_states.h"

namespace dijiang::cuda {
namespace {

// --- kernels -------------------------------------------------------------------------------------

// Of a state of all parts but the first.
__device__ inline int64_t part_cell(const FarBackward& b, int64_t seq, int part, int head) {
  return (seq * (b.work.parts.count - 1) + part - 1) * b.a.params.num_kv_heads + head;
}

// R of the parts alone, but for the first ones. Grid: (sequence, part), kv head, (slice, columns of
// v).
template <class Part>
__global__ void __launch_bounds__(kWalkThreads, 2)
    reverse_parts(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const int count = b.work.parts.count, part = static_cast<int>(blockIdx.x % (count - 1)) + 1;
  const int64_t seq = blockIdx.x / (count - 1);
  const FoldPart place(b.a, seq, part);
  if (place.first >= place.end) return;
  const int head = blockIdx.y;
  ReverseWalk<Part, false> walk(b, raw, head);
  walk.read_state(nullptr, nullptr, nullptr, 0);
  walk.run(place.first, place.end);
  const FoldParts& out = b.work.parts;
  const int64_t cell = part_cell(b, seq, part, head);
  walk.write_state(out.kv, out.z, out.scale, cell);
  if (blockIdx.z == 0 && threadIdx.x == 0) out.decay[cell] = walk.decay;
}

// R behind all chunks. Grid: (sequence, part), kv head, (slice, columns of v).
template <class Part>
__global__ void __launch_bounds__(kWalkThreads, 2)
    reverse_states(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const FoldPart part(b.a, b.work.parts.count);
  const bool has_chunks = part.first < part.end;
  if (!has_chunks && part.index > 0) return;
  const int head = blockIdx.y;
  const int64_t cell = part.seq * b.a.params.num_kv_heads + head;
  ReverseWalk<Part, true> walk(b, raw, head);
  walk.read_final(cell);
  if (!has_chunks) {  // the gradient goes through a sequence without tokens
    __syncthreads();
    walk.write_initial(cell);
    return;
  }
  for (int later = part.last(b.a); later > part.index; --later) {
    walk.add_part(b.work.parts, part_cell(b, part.seq, later, head));
  }
  walk.run(part.first, part.end);
  if (part.index == 0) walk.write_initial(cell);
}

// Of far keys alone. The keys' half comes after that of the queries, whose unsafe rows it leaves
// out. Grid: chunk, kv head (of the queries' half: query head), of the keys' half columns of v.
template <class Shape, FarPart kPart>
__global__ void __launch_bounds__(kWalkThreads, 2)
    grad_far_chunks(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_chunk(b.a, blockIdx.x, c)) return;
  FarGrads<Shape, kPart>(b, c, raw).run();
}

template <class Shape>
__global__ void __launch_bounds__(kWalkThreads)
    grad_unsafe_far_rows(const __grid_constant__ FarBackward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  Chunk c;
  if (!find_chunk(b.a, blockIdx.x, c)) return;
  UnsafeRows<Shape>(b, c, reinterpret_cast<float*>(raw)).run();
}

// Beside near keys. Grid: (chunk, tile of 64 queries), query head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2)
    grad_far_queries(const __grid_constant__ FarBackward b) {
  using T = typename Shape::T;
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = b.a;
  const LinearAttentionParams& p = a.params;
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  FarSides<Shape, false> rows(b, t.index, blockIdx.x, t.head, raw);
  const double* levels = a.has_decay ? levels_of(a, t.index, t.kv_head) : nullptr;
  const int64_t first = row_index(p, p.num_heads, t.chunk.batch, t.head, t.token(0));
  DIJIANG_UNROLL()
  for (int half = 0; half < 2; ++half) {
    const int row = rows.row(half);
    if (row >= t.rows) continue;
    rows.side.place[half] = first + row;
    if (levels) rows.decay[half] = decay_between(levels, -1, t.position(row) - t.chunk.key_pos);
    rows.shift[half] = -static_cast<const float*>(p.row_scale)[first + row];
    rows.times[half] = b.work.inverse[first + row];
    rows.delta[half] = b.work.delta[first + row];
  }
  const int mine = rows.row0 + rows.lane % 16 < t.rows ? rows.row0 + rows.lane % 16 : 0;
  rows.load(
      view_row<T>(rows.lane < 16 ? p.q : b.grad_out, t.chunk.batch, t.head, t.token(mine)).data,
      t.rows);
  rows.run();
}

// Grid: (chunk, tile of 64 of the keys that it folds), kv head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2)
    grad_far_keys(const __grid_constant__ FarBackward b) {
  using T = typename Shape::T;
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = b.a;
  const LinearAttentionParams& p = a.params;
  FoldedTile t;
  if (!find_folded_tile(a, t)) return;
  FarSides<Shape, true> rows(b, t.index, blockIdx.x, t.kv_head, raw);
  const FoldedKeys folded(a, t.chunk, t.index, t.kv_head);
  // Keys before the call have no gradients.
  const auto has_gradient = [&](int row) {
    return row < t.keys && t.key0 + row >= folded.first &&
           folded.pos(t.key0 + row) >= t.chunk.start_pos;
  };
  DIJIANG_UNROLL()
  for (int half = 0; half < 2; ++half) {
    const int row = rows.row(half), s = t.key0 + row;
    if (!has_gradient(row)) continue;
    rows.side.place[half] =
        row_index(p, p.num_kv_heads, t.chunk.batch, t.kv_head, token_of(t.chunk, folded.pos(s)));
    rows.decay[half] = folded.decay(s);
    rows.times[half] = 1.0f;
  }
  const int mine = rows.row0 + rows.lane % 16;
  // Of a row that counts nothing: any.
  const auto* from = static_cast<const T*>(rows.lane < 16 ? p.k.data : p.v.data);
  if (has_gradient(mine)) {
    const int64_t token = token_of(t.chunk, folded.pos(t.key0 + mine));
    from = view_row<T>(rows.lane < 16 ? p.k : p.v, t.chunk.batch, t.kv_head, token).data;
  }
  rows.load(from, t.keys);
  rows.run();
}

// The near part of a key's gradients, and of its value's, where no far part follows. Grid: (chunk,
// row tile), kv head.
template <class T>
__global__ void __launch_bounds__(kThreads) write_near_keys(const __grid_constant__ FarBackward b) {
  const LinearAttentionParams& p = b.a.params;
  QueryTile t;
  if (!find_query_tile<true>(b.a, t)) return;
  const int64_t row = row_index(p, p.num_kv_heads, t.chunk.batch, t.kv_head, t.token(0));
  const auto write = [&](void* to, const float* near, int64_t width) {
    for (int64_t e = threadIdx.x; e < t.rows * width; e += kThreads) {
      static_cast<T*>(to)[row * width + e] = from_float<T>(near[row * width + e]);
    }
  };
  write(b.grad_x[1], b.work.sums[1], p.headdim);
  write(b.grad_v, b.work.sums_v, p.headdim_v);
}

// --- what applies --------------------------------------------------------------------------------

bool has_near(const LinearAttentionParams& p) { return p.window > 0 || p.sinks > 0; }

// Calls take(FarShape) for the sizes of p; false where there are no kernels for them.
template <class Take>
bool with_far_shape(const LinearAttentionParams& p, const Take& take) {
  if (p.dtype != DType::kBFloat16 || p.headdim_v > (p.headdim > 128 ? 256 : 128)) return false;
  return with_fused_shape(p, [&](auto part) {
    using Part = decltype(part);
    if constexpr (!std::is_same_v<typename Part::T, __nv_bfloat16>) {
      return;
    } else if constexpr (Part::kHeadDim > 128) {
      take(FarShape<Part::kHeadDim, Part::kFeatures, 256>{});
    } else {
      with_tile_size(p.headdim_v, [&](auto columns) {
        take(FarShape<Part::kHeadDim, Part::kFeatures, columns()>{});
        return true;
      });
    }
  });
}

int larger(int x, int y) { return x > y ? x : y; }

// The most shared memory that a block of any kernel has to take.
int most_shared(const LinearAttentionParams& p) {
  int bytes = 0;
  with_far_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    bytes = ReverseWalk<typename Shape::Part, true>::kBytes;
    bytes = larger(bytes, has_near(p) ? SideShared<Shape>::kBytes : FarShared<Shape, true>::kBytes);
  });
  return bytes;
}

// --- the workspace -------------------------------------------------------------------------------

struct Plan {
  FarBackward far;
  Backward near;              // what kernels of the other backward read
  float* parameters[kSides];  // parts of their gradients
  int splits[kSides], split_tiles[kSides];
};

constexpr int64_t kParameterBlocks = 4;  // wanted, a multiprocessor

Plan plan_far(const LinearAttentionBackwardParams& params, Arena& arena) {
  Plan plan{};
  LinearAttentionParams p = params.forward;
  p.final = AttentionState{};  // the folds must not write it
  FarBackward& b = plan.far;
  b.a = plan_chunks(p, arena);
  Attention& a = b.a;
  plan_hard_keys(a, arena);
  plan_folds(a, arena);

  int64_t map_bytes = 0, m = 0;  // m: features of all tiles
  with_far_shape(p, [&](auto shape) {
    map_bytes = decltype(shape)::Map::kBytes;
    b.slices = static_cast<int>(feature_slices(p, shape.kFeatures));
    m = b.slices * shape.kFeatures;
  });
  b.has_near = has_near(p);
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
  const int64_t tiles = a.max_chunks * a.row_tiles;
  const int64_t heads[kSides] = {p.num_heads, p.num_kv_heads};
  for (int side = 0; side < kSides; ++side) {
    const int64_t rows = p.batch * heads[side] * p.seqlen;
    const FeatureGrads& grad = b.grad_feature[side];
    const bool parameters = grad.omega || grad.log_weight;
    w.maps[side] = arena.take<char>(heads[side] * b.slices * map_bytes);
    w.total[side] = arena.take<float>(rows);
    w.square[side] = arena.take<float>(grad.beta ? rows : 0);
    w.slopes[side] = arena.take<__nv_bfloat16>(parameters ? rows * m : 0);
    w.weights[side] = arena.take<float>(grad.log_weight ? tiles * heads[side] * kWalkWarps * m : 0);
    const int64_t wanted = kParameterBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t all = tiles > 0 ? tiles : 1;  // no sequence: none
    int64_t splits = ceil_div(wanted, heads[side] * (m / 64));
    if (splits > all) splits = all;
    if (splits < 1) splits = 1;
    plan.split_tiles[side] = static_cast<int>(ceil_div(all, splits));
    plan.splits[side] = static_cast<int>(ceil_div(all, plan.split_tiles[side]));
    plan.parameters[side] = arena.take<float>(
        parameters ? plan.splits[side] * heads[side] * p.num_features * (p.headdim + 1) : 0);
  }
  const int64_t rows = p.batch * p.num_heads * p.seqlen, cells = a.max_chunks * p.num_kv_heads;
  const int64_t key_rows = p.batch * p.num_kv_heads * p.seqlen;
  w.delta = arena.take<float>(rows);
  w.inverse = arena.take<float>(rows);
  w.reverse = arena.take<__nv_bfloat16>(cells * m * tile_columns(p));
  w.reverse_scale = arena.take<float>(cells * m);
  w.reverse_z = arena.take<float>(cells * m);
  w.parts = plan_parts(a, arena);
  w.unsafe = arena.take<unsigned>(b.has_near ? 0 : tiles * p.num_heads * kWalkWarps);
  const bool has_sums = b.has_near || b.slices > 1;
  w.sums[0] = arena.take<float>(has_sums ? rows * p.headdim : 0);
  w.sums[1] = arena.take<float>(has_sums ? key_rows * p.headdim : 0);
  w.sums_v = arena.take<float>(has_sums ? key_rows * p.headdim_v : 0);

  Backward& near = plan.near;
  near.params = params;
  near.forward = a;
  near.forward.has_inner = false;  // prepare_rows leaves out what it needs features for
  near.work.delta = w.delta;
  near.work.inverse = w.inverse;
  near.work.query_total = w.total[0];
  near.work.key_total = w.total[1];
  if (!b.has_near) return plan;
  near.work.near_q = w.sums[0];
  near.work.near_k = w.sums[1];
  near.work.grad_v = w.sums_v;
  near.work.sinks = arena.take<float>(tiles * p.num_heads * p.sinks * (p.headdim + p.headdim_v));
  return plan;
}

// --- launching -----------------------------------------------------------------------------------

// What not all rows write: padding, tiles without rows, keys that are not folded. m: features of
// all tiles.
void clear_buffers(const Plan& plan, int64_t m, cudaStream_t stream) {
  const FarBackward& b = plan.far;
  const LinearAttentionParams& p = b.a.params;
  const int64_t tokens = p.batch * p.seqlen;
  zero(b.work.square[0], tokens * p.num_heads, stream);
  zero(b.work.square[1], tokens * p.num_kv_heads, stream);
  if (!b.has_near) return;
  const int64_t rows = tokens * p.num_kv_heads;
  zero(b.work.total[1], rows, stream);
  zero(b.work.slopes[1], rows * m, stream);
  const int64_t warps = b.a.max_chunks * b.a.row_tiles * kWalkWarps;
  zero(b.work.weights[0], warps * p.num_heads * m, stream);
  zero(b.work.weights[1], warps * p.num_kv_heads * m, stream);
}

template <class Part>
void launch_reverse(const FarBackward& b, cudaStream_t stream) {
  const LinearAttentionParams& p = b.a.params;
  constexpr int bytes = ReverseWalk<Part, true>::kBytes;
  const int64_t parts = b.work.parts.count;
  const unsigned kv_heads = grid_size(p.num_kv_heads);
  const unsigned pieces = grid_size(column_blocks(p, kFoldColumns) * b.slices);
  if (parts > 1) {
    allow_shared(reverse_parts<Part>, bytes);
    DIJIANG_LAUNCH(reverse_parts<Part>, dim3(grid_size(p.num_seqs * (parts - 1)), kv_heads, pieces),
                   kWalkThreads, bytes, stream, b);
  }
  allow_shared(reverse_states<Part>, bytes);
  DIJIANG_LAUNCH(reverse_states<Part>, dim3(grid_size(p.num_seqs * parts), kv_heads, pieces),
                 kWalkThreads, bytes, stream, b);
}

template <class Shape>
void launch_chunk_grads(const FarBackward& b, cudaStream_t stream) {
  const auto chunks = grid_size(b.a.max_chunks);
  const dim3 heads(chunks, grid_size(b.a.params.num_heads));
  const dim3 kv_heads(chunks, grid_size(b.a.params.num_kv_heads));
  constexpr int whole = FarShared<Shape, false>::kBytes, half = FarShared<Shape, true>::kBytes;
  bool in_one = false;
  // Of larger ones registers hold either queries or keys.
  if constexpr (Shape::kFeatures == 64 && Shape::kValueDim == 64) {
    in_one = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= whole;
    if (in_one) {
      allow_shared(grad_far_chunks<Shape, FarPart::kAll>, whole);
      DIJIANG_LAUNCH((grad_far_chunks<Shape, FarPart::kAll>), kv_heads, kWalkThreads, whole, stream,
                     b);
    }
  }
  if (!in_one) {
    allow_shared(grad_far_chunks<Shape, FarPart::kQueries>, half);
    DIJIANG_LAUNCH((grad_far_chunks<Shape, FarPart::kQueries>), heads, kWalkThreads, half, stream,
                   b);
    allow_shared(grad_far_chunks<Shape, FarPart::kKeys>, half);
    constexpr int own = FarGrads<Shape, FarPart::kKeys>::kOwn;
    DIJIANG_LAUNCH((grad_far_chunks<Shape, FarPart::kKeys>),
                   dim3(kv_heads.x, kv_heads.y, Shape::kValueDim / own), kWalkThreads, half, stream,
                   b);
  }
  constexpr int unsafe = UnsafeShared<Shape>::kFloats * static_cast<int>(sizeof(float));
  allow_shared(grad_unsafe_far_rows<Shape>, unsafe);
  DIJIANG_LAUNCH(grad_unsafe_far_rows<Shape>, kv_heads, kWalkThreads, unsafe, stream, b);
}

template <class T>
void launch_near_grads(const Plan& plan, cudaStream_t stream) {
  const FarBackward& b = plan.far;
  const LinearAttentionParams& p = b.a.params;
  const unsigned kv_heads = grid_size(p.num_kv_heads);
  launch_fused_near_backward(plan.near, stream);
  if (p.sinks > 0) {
    DIJIANG_LAUNCH(sum_sink_gradients, dim3(grid_size(p.num_seqs * p.sinks), kv_heads), kThreads, 0,
                   stream, plan.near);
  }
  DIJIANG_LAUNCH(write_near_keys<T>, dim3(grid_size(b.a.max_chunks * b.a.row_tiles), kv_heads),
                 kThreads, 0, stream, b);
}

template <class Shape>
void launch_side_grads(const FarBackward& b, cudaStream_t stream) {
  const LinearAttentionParams& p = b.a.params;
  const unsigned tiles = grid_size(b.a.max_chunks * b.a.row_tiles);
  const unsigned kv_heads = grid_size(p.num_kv_heads);
  constexpr int bytes = SideShared<Shape>::kBytes;
  allow_shared(grad_far_queries<Shape>, bytes);
  DIJIANG_LAUNCH(grad_far_queries<Shape>, dim3(tiles, grid_size(p.num_heads)), kWalkThreads, bytes,
                 stream, b);
  allow_shared(grad_far_keys<Shape>, bytes);
  DIJIANG_LAUNCH(grad_far_keys<Shape>, dim3(tiles, kv_heads), kWalkThreads, bytes, stream, b);
}

template <class Shape>
void launch_parameters(const Plan& plan, int number, const FeatureParams& feature,
                       cudaStream_t stream) {
  const FarBackward& b = plan.far;
  const LinearAttentionParams& p = b.a.params;
  FeatureSide side{};
  side.feature = feature;
  side.grad = b.grad_feature[number];
  side.heads = number == 0 ? p.num_heads : p.num_kv_heads;
  side.square = b.work.square[number];
  if (side.grad.omega || side.grad.log_weight) {
    constexpr int bytes = 2 * kTileRows * (64 + Shape::kHeadDim) * 2;
    allow_shared(sum_omega<Shape>, bytes);
    const dim3 grid(grid_size(plan.splits[number]), grid_size(side.heads),
                    b.slices * Shape::kFeatures / 64);
    DIJIANG_LAUNCH(sum_omega<Shape>, grid, kWalkThreads, bytes, stream, b, number,
                   plan.split_tiles[number], plan.parameters[number]);
    const int64_t count = side.heads * p.num_features * (p.headdim + 1);
    DIJIANG_LAUNCH(sum_parameters, dim3(grid_size(ceil_div(count, kThreads))), kThreads, 0, stream,
                   p, side, plan.splits[number], plan.parameters[number]);
  }
  if (!side.grad.beta) return;
  if (feature.beta && p.kind == FeatureKind::kExp) {
    DIJIANG_LAUNCH(grad_betas, dim3(grid_size(side.heads)), kThreads, kThreads * sizeof(double),
                   stream, p, side);
  } else {
    zero(static_cast<float*>(side.grad.beta), side.heads, stream);
  }
}

template <class Shape>
void launch_far_backward(const Plan& plan, cudaStream_t stream) {
  using Map = typename Shape::Map;
  FarBackward b = plan.far;
  const Attention& a = b.a;
  const LinearAttentionParams& p = a.params;
  const unsigned heads = grid_size(p.num_heads), kv_heads = grid_size(p.num_kv_heads);
  const unsigned slices = grid_size(b.slices);
  clear_buffers(plan, int64_t{b.slices} * Shape::kFeatures, stream);
  launch_chunks<typename Shape::T>(a, stream);
  DIJIANG_LAUNCH(split_maps<Map>, dim3(slices, heads), kWalkThreads, 0, stream, p, p.fq,
                 b.work.maps[0]);
  DIJIANG_LAUNCH(split_maps<Map>, dim3(slices, kv_heads), kWalkThreads, 0, stream, p, p.fk,
                 b.work.maps[1]);
  DIJIANG_LAUNCH((prepare_rows<typename Shape::T, false>),
                 dim3(grid_size(a.max_chunks * a.row_tiles), heads), kThreads, 0, stream,
                 plan.near);
  launch_folds(a, stream);
  launch_reverse<typename Shape::Part>(b, stream);
  if (b.has_near) launch_near_grads<typename Shape::T>(plan, stream);
  for (b.slice = 0; b.slice < b.slices; ++b.slice) {
    if (b.has_near) {
      launch_side_grads<Shape>(b, stream);
    } else {
      launch_chunk_grads<Shape>(b, stream);
    }
  }
  launch_parameters<Shape>(plan, 0, p.fq, stream);
  launch_parameters<Shape>(plan, 1, p.fk, stream);
  if (!plan.near.params.grad_log_decay) return;
  if (a.has_decay) {
    DIJIANG_LAUNCH(grad_decays, dim3(grid_size(p.num_seqs), kv_heads), kThreads,
                   kThreads * sizeof(double), stream, plan.near);
  } else {
    zero(static_cast<float*>(plan.near.params.grad_log_decay), p.batch * p.num_kv_heads * p.seqlen,
         stream);
  }
}

}  // namespace

bool fused_far_backward_applies(const LinearAttentionBackwardParams& params) {
  LinearAttentionParams p = params.forward;
  p.final = AttentionState{};
  if (p.num_heads == 0 || p.headdim_v == 0) return false;
  if (!(has_near(p) ? fused_mixed_applies(p) && fused_near_backward_applies(params)
                    : fused_forward_applies(p) && folds_apply(p))) {
    return false;
  }
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
  if (plan.far.a.params.num_seqs == 0) return cudaSuccess;
  with_far_shape(params.forward,
                 [&](auto shape) { launch_far_backward<decltype(shape)>(plan, stream); });
  return launch_status();
}

}  // namespace dijiang::cuda
