// The fused forward of near keys alone: which calls it takes, and its kernel (fused_near_rows.h is
// what a block does).
#include "cuda/fused_near.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_near_rows.h"

namespace dijiang::cuda {
namespace {

// Grid: (chunk, tile of 64 queries), query head, columns of v.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks) attend_near(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  NearRows<Shape>(a, t, raw).run();
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(NearShape) for the sizes of p; false where there is no kernel for them. 128 columns of
// v at once where they go into it: for more than a block's the scores are computed again.
template <class Take>
bool with_near_shape(const LinearAttentionParams& p, const Take& take) {
  if (!sizes_are_pieces(p)) return false;
  return with_16_bits(p, [&](auto x) {
    using T = std::decay_t<decltype(x)>;
    return with_tile_size<256>(p.headdim, [&](auto dim) {
      if (tile_columns(p) % 128 == 0) {
        take(NearShape<T, dim(), 128>{});
      } else {
        take(NearShape<T, dim(), 64>{});
      }
      return true;
    });
  });
}

}  // namespace

bool fused_near_applies(const LinearAttentionParams& p) {
  return p.num_features == 0 && near_rows_apply(p);
}

bool near_rows_apply(const LinearAttentionParams& p) {
  if (!fused_switched_on() || p.kind == FeatureKind::kGiven) return false;
  if (p.window == 0 && p.sinks == 0) return false;
  if (!has_whole_pieces(p.q) || !has_whole_pieces(p.k) || !has_whole_pieces(p.v)) return false;
  if (!begins_at_pieces(p.out) || !state_begins_at_pieces(p.initial)) return false;
  int bytes = 0;
  const bool has_shape = with_near_shape(p, [&](auto s) { bytes = decltype(s)::kSharedBytes; });
  return has_shape && device_is_sm80() &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

void launch_fused_near(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  with_near_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(a.max_chunks * a.row_tiles),
                    static_cast<unsigned>(p.num_heads),
                    grid_size(column_blocks(p, Shape::kValueDim)));
    allow_shared(attend_near<Shape>, Shape::kSharedBytes);
    DIJIANG_LAUNCH(attend_near<Shape>, grid, kWalkThreads, Shape::kSharedBytes, stream, a);
  });
}

}  // namespace dijiang::cuda
