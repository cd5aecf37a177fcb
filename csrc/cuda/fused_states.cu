// The states before all chunks: which calls have them, and the kernels (fused_fold.h is what a
// block does).
#include "cuda/fused_states.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_fold.h"

namespace dijiang::cuda {
namespace {

// --- kernels -------------------------------------------------------------------------------------

// The states of parts alone, but for the last ones. Grid: (sequence, part), kv head, (slice,
// columns of v).
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2) fold_parts(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const FoldPart part(a, a.work.parts.count - 1);
  if (part.is_last) return;
  const int head = blockIdx.y;
  FoldWalk<Shape, false> walk(a, raw, head, part.seq);
  walk.read_state(nullptr, nullptr, nullptr, 0);
  walk.run(part.first, part.end);
  const FoldParts& out = a.work.parts;
  const int64_t cell = part.cell(a, part.index, head);
  walk.write_state(out.kv, out.z, out.scale, cell);
  if (blockIdx.z == 0 && threadIdx.x == 0) out.decay[cell] = walk.decay;
}

// States before all chunks. Grid: (sequence, part), kv head, (slice, columns of v).
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2) fold_states(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = a.params;
  const FoldPart part(a, a.work.parts.count);
  if (part.first >= part.end) return;
  const int head = blockIdx.y;
  FoldWalk<Shape, true> walk(a, raw, head, part.seq);
  const int64_t cell = part.seq * p.num_kv_heads + head;
  walk.read_state(static_cast<const float*>(p.initial.kv), static_cast<const float*>(p.initial.z),
                  static_cast<const float*>(p.initial.log_scale), cell);
  for (int before = 0; before < part.index; ++before) {
    walk.add_part(a.work.parts, part.cell(a, before, head));
  }
  walk.run(part.first, part.end);
  if (!p.final.kv || !part.is_last) return;
  walk.write_state(static_cast<float*>(p.final.kv), static_cast<float*>(p.final.z),
                   static_cast<float*>(p.final.log_scale), cell);
}

// --- what applies --------------------------------------------------------------------------------

bool updates_in_place(const LinearAttentionParams& p) {
  return p.initial.kv && p.initial.kv == p.final.kv;
}
// The block of the first columns writes scales and z that others may still have to read.
bool updates_shared_state(const LinearAttentionParams& p) {
  return updates_in_place(p) && p.headdim_v > kFoldColumns;
}

// A walk is nothing but latency: where sequences and heads leave multiprocessors idle, it is cut.
// Its parts are walked over twice, so two of them gain nothing; each adds up the states of those
// before.
constexpr int64_t kFoldBlocks = 2;  // a multiprocessor
constexpr int64_t kLeastChunks = 8, kLeastParts = 3, kMostParts = 32;

}  // namespace

FoldParts plan_parts(const Attention& a, Arena& arena) {
  const LinearAttentionParams& p = a.params;
  FoldParts parts{};
  const int64_t chunks = p.seqlen / a.chunk_size + 2;  // of a sequence at most
  int64_t blocks = p.num_seqs * p.num_kv_heads * column_blocks(p, kFoldColumns);
  with_fused_shape(p, [&](auto shape) { blocks *= feature_slices(p, shape.kFeatures); });
  const int64_t wanted = kFoldBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  int64_t count = blocks > 0 ? wanted / blocks : 1;
  if (count > chunks / kLeastChunks) count = chunks / kLeastChunks;
  if (count > kMostParts) count = kMostParts;
  // A state updated in place must not change under parts that read it.
  if (count < kLeastParts || updates_in_place(p)) count = 1;
  parts.count = static_cast<int>(count);
  parts.chunks = static_cast<int>(ceil_div(chunks, count));
  const int64_t cells = p.num_seqs * (count - 1) * p.num_kv_heads, m = p.num_features;
  parts.kv = arena.take<float>(cells * m * p.headdim_v);
  parts.z = arena.take<float>(cells * m);
  parts.scale = arena.take<float>(cells * m);
  parts.decay = arena.take<double>(cells);
  return parts;
}

bool folds_apply(const LinearAttentionParams& p) {
  if (updates_shared_state(p)) return false;
  int bytes = 0;
  const bool has_shape = with_fused_shape(
      p, [&](auto shape) { bytes = FusedShared<decltype(shape), false>::bytes(0); });
  return has_shape && device_is_sm80() &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

void plan_folds(Attention& a, Arena& arena) {
  const LinearAttentionParams& p = a.params;
  const int64_t cells = a.max_chunks * p.num_kv_heads;
  int64_t m = 0;  // features of all tiles
  with_fused_shape(p,
                   [&](auto shape) { m = feature_slices(p, shape.kFeatures) * shape.kFeatures; });
  Workspace& w = a.work;
  w.scale = arena.take<float>(cells * m);
  w.z = arena.take<float>(cells * m);
  with_fused_shape(p, [&](auto shape) {
    w.states = arena.take<uint16_t>(cells * shape.kParts * tile_columns(p) * m);
  });
  w.parts = plan_parts(a, arena);
}

void launch_folds(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  with_fused_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    constexpr int bytes = FusedShared<Shape, false>::bytes(0);
    const auto parts = static_cast<unsigned>(a.work.parts.count);
    const auto seqs = static_cast<unsigned>(p.num_seqs);
    const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const unsigned pieces =
        grid_size(column_blocks(p, kFoldColumns) * feature_slices(p, Shape::kFeatures));
    if (parts > 1) {
      allow_shared(fold_parts<Shape>, bytes);
      DIJIANG_LAUNCH(fold_parts<Shape>, dim3(seqs * (parts - 1), kv_heads, pieces), kWalkThreads,
                     bytes, stream, a);
    }
    allow_shared(fold_states<Shape>, bytes);
    DIJIANG_LAUNCH(fold_states<Shape>, dim3(seqs * parts, kv_heads, pieces), kWalkThreads, bytes,
                   stream, a);
  });
}

}  // namespace dijiang::cuda
