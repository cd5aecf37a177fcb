// The fused forward of far keys beside near ones: which calls it takes, and its kernels
// (fused_mixed_rows.h is what a block does).
#include "cuda/fused_mixed.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_mixed_rows.h"
#include "cuda/fused_states.h"

namespace dijiang::cuda {
namespace {

// --- kernels -------------------------------------------------------------------------------------

// Grid: (chunk, tile of 64 queries), query head, columns of v.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks) attend_mixed(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  MixedRows<Shape>(a, t, raw).run();
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(MixedShape) for the sizes of p; false where there is no kernel for them.
template <class Take>
bool with_mixed_shape(const LinearAttentionParams& p, const Take& take) {
  return with_fused_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    using T = typename Shape::T;
    if (tile_columns(p) % 128 == 0) {
      take(MixedShape<T, Shape::kHeadDim, 128, Shape::kFeatures>{});
    } else {
      take(MixedShape<T, Shape::kHeadDim, 64, Shape::kFeatures>{});
    }
  });
}

}  // namespace

bool fused_mixed_applies(const LinearAttentionParams& p) {
  if (!fused_switched_on() || p.kind == FeatureKind::kGiven || p.num_heads == 0) return false;
  const bool has_inner = p.window < kChunk && p.cache.most == 0;
  if (p.window == 0 || has_inner) return false;
  if (!has_whole_pieces(p.q) || !has_whole_pieces(p.k) || !has_whole_pieces(p.v)) return false;
  if (!begins_at_pieces(p.out) || !state_begins_at_pieces(p.initial)) return false;
  if (!folds_apply(p)) return false;
  int bytes = 0;
  with_mixed_shape(p, [&](auto rows) { bytes = decltype(rows)::kSharedBytes; });
  return bytes > 0 && device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

Attention plan_fused_mixed(const LinearAttentionParams& p, Arena& arena) {
  Attention a = plan_chunks(p, arena);
  plan_hard_keys(a, arena);
  plan_folds(a, arena);
  with_mixed_shape(p, [&](auto rows) {
    const int64_t maps = p.num_heads * feature_slices(p, rows.kFeatures);
    a.work.query_maps = arena.take<char>(maps * decltype(rows)::Map::kBytes);
  });
  return a;
}

void launch_fused_mixed(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  launch_folds(a, stream);
  with_mixed_shape(p, [&](auto rows) {
    using Rows = decltype(rows);
    const auto heads = static_cast<unsigned>(p.num_heads);
    DIJIANG_LAUNCH(split_maps<typename Rows::Map>,
                   dim3(grid_size(feature_slices(p, Rows::kFeatures)), heads), kWalkThreads, 0,
                   stream, p, p.fq, a.work.query_maps);
    allow_shared(attend_mixed<Rows>, Rows::kSharedBytes);
    DIJIANG_LAUNCH(attend_mixed<Rows>,
                   dim3(static_cast<unsigned>(a.max_chunks * a.row_tiles), heads,
                        grid_size(column_blocks(p, Rows::kValueDim))),
                   kWalkThreads, Rows::kSharedBytes, stream, a);
  });
}

}  // namespace dijiang::cuda
