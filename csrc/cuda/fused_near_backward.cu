// The fused backward of near keys, alone or beside far ones: which calls it takes, and its kernels
// (fused_near_grads.h is what a block does).
#include "cuda/fused_near_backward.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_near.h"
#include "cuda/fused_near_grads.h"
#include "cuda/hard_keys.h"

namespace dijiang::cuda {
namespace {

// Of the queries beside keys of a NearGradShape.
template <class Shape>
using QueryGrads = NearQueryGrads<NearShape<typename Shape::T, Shape::kD, Shape::kV>>;

// In all grids a third dimension counts pieces of columns.

// Grid: (chunk, tile of 64 queries), query head.
template <class Grads>
__global__ void __launch_bounds__(kWalkThreads, 2)
    grad_queries(const __grid_constant__ Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  QueryTile t;
  if (!find_query_tile(b.forward, t)) return;
  Grads(b, t, raw).run();
}

// A tile of the call's tokens as keys of the window: from the queries of their own block and the
// next. Grid: (chunk, tile of 64 tokens), kv head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks)
    grad_window(const __grid_constant__ Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = b.forward.params;
  QueryTile t;
  if (!find_query_tile<true>(b.forward, t)) return;
  NearKeyGrads<Shape> grads(b, t.chunk, t.kv_head, raw);
  const int64_t key = t.position(0), w = p.window;
  DIJIANG_UNROLL()
  for (int half = 0; half < 2; ++half) {
    const int64_t pos = key + grads.row(half);
    const bool is_near = grads.row(half) < t.rows && pos >= p.sinks;
    grads.first[half] = pos;
    grads.last[half] = is_near ? (pos / w + 2) * w - 1 : -1;
  }
  grads.load_keys(t.rows, [&](int r) { return Place{static_cast<int32_t>(key + r), -1}; });
  const int64_t seen = ((key + t.rows - 1) / w + 2) * w;
  grads.add_queries(t.head, b.forward.group, key, seen < t.chunk.end_pos ? seen : t.chunk.end_pos);
  DIJIANG_UNROLL()
  for (int half = 0; half < 2; ++half) {
    if (grads.row(half) >= t.rows) continue;
    grads.give_row(half, [&](bool is_key, int column, float2 x) {
      *grads.place_of(is_key, key + grads.row(half), column) = x;
    });
  }
}

// What a tile of queries gives the sinks: a part, which sum_sink_gradients adds up. Grid: (chunk,
// tile of 64 queries), query head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks)
    grad_sinks(const __grid_constant__ Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = b.forward.params;
  QueryTile t;
  if (!find_query_tile(b.forward, t)) return;
  const int64_t begin = t.position(0), width = p.headdim + p.headdim_v;
  const int64_t sinks = p.sinks < t.chunk.end_pos ? p.sinks : t.chunk.end_pos;
  float* part =
      b.work.sinks + (static_cast<int64_t>(blockIdx.x) * p.num_heads + t.head) * p.sinks * width;
  for (int64_t key = 0; key < sinks; key += kTileRows) {  // once, but for many sinks
    const int count = static_cast<int>(sinks - key < kTileRows ? sinks - key : kTileRows);
    NearKeyGrads<Shape> grads(b, t.chunk, t.kv_head, raw);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      grads.first[half] = key + grads.row(half);
      grads.last[half] = grads.row(half) < count ? t.chunk.end_pos : -1;
    }
    grads.load_keys(count, [&](int r) { return Place{static_cast<int32_t>(key + r), -1}; });
    grads.add_queries(t.head, 1, begin, begin + t.rows);
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      if (grads.row(half) >= count) continue;
      grads.give_row(half, [&](bool is_key, int column, float2 x) {
        float* to = part + (key + grads.row(half)) * width + (is_key ? 0 : p.headdim) + column;
        *reinterpret_cast<float2*>(to) = x;
      });
    }
  }
}

// Walks back over the blocks of a sequence with 64 slots of a kv head: a key's gradient is complete
// where its slot changes hands. Grid: (sequence, slot tile), kv head.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks)
    grad_slots(const __grid_constant__ Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t slot_tiles = (p.cache.most + kTileRows - 1) / kTileRows;
  const int64_t n = blockIdx.x / slot_tiles;
  const int slot = static_cast<int>(blockIdx.x % slot_tiles) * kTileRows;
  const int head = blockIdx.y;
  const Sequence s = find_sequence(a, n);
  if (s.length == 0) return;
  const Chunk c = whole_sequence(a, n, s);
  NearKeyGrads<Shape> grads(b, c, head, raw);
  int held[2] = {-1, -1};
  for (int64_t block = (c.end_pos - 1) / p.window; block >= s.start_pos / p.window; --block) {
    const int64_t table = row_of(a, c, head, block);
    const int32_t* now = a.work.slots + table * p.cache.most + slot;
    const int64_t filled = a.work.slot_count[table] - slot;
    const int count = static_cast<int>(filled < 0 ? 0 : filled < kTileRows ? filled : kTileRows);
    bool changed = false;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = grads.row(half), next = row < count ? now[row] : -1;
      grads.first[half] = 0;
      grads.last[half] = row < count ? c.end_pos : -1;
      if (next == held[half]) continue;
      grads.flush(half, held[half]);
      held[half] = next;
      changed = true;
    }
    if (count == 0) continue;
    if (__any_sync(~0u, changed)) {  // the warp's own rows
      grads.load_keys(count, [&](int r) { return Place{now[r], slot + r}; });
    }
    const int64_t begin = block * p.window > s.start_pos ? block * p.window : s.start_pos;
    const int64_t end = (block + 1) * p.window < c.end_pos ? (block + 1) * p.window : c.end_pos;
    grads.add_queries(head * a.group, a.group, begin, end);
  }
  // What the first block's slots hold is from before the call.
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(NearGradShape) for the sizes of p; false where there are no kernels for them.
template <class Take>
bool with_grad_shape(const LinearAttentionParams& p, const Take& take) {
  return with_16_bits(p, [&](auto x) {
    using T = std::decay_t<decltype(x)>;
    if (p.headdim > kOwnColumns || p.headdim_v > kOwnColumns) {
      take(NearGradShape<T, 256, 256>{});
      return p.headdim <= 256 && p.headdim_v <= 256;
    }
    return with_tile_size(p.headdim, [&](auto dim) {
      return with_tile_size(p.headdim_v, [&](auto columns) {
        take(NearGradShape<T, dim(), columns()>{});
        return true;
      });
    });
  });
}

}  // namespace

bool fused_near_backward_applies(const LinearAttentionBackwardParams& params) {
  const LinearAttentionParams& p = params.forward;
  if (!near_rows_apply(p) || !has_whole_pieces(params.grad_out)) return false;
  int bytes = 0;
  const bool has_shape = with_grad_shape(p, [&](auto s) {
    using Shape = decltype(s);
    bytes = Shape::kSharedBytes;
    constexpr int queries = QueryGrads<Shape>::kSharedBytes;
    if (queries > bytes) bytes = queries;
  });
  return has_shape && device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

void launch_fused_near_backward(const Backward& b, cudaStream_t stream) {
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const auto tiles = static_cast<unsigned>(a.max_chunks * a.row_tiles);
  const auto heads = static_cast<unsigned>(p.num_heads);
  const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
  with_grad_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    using Queries = QueryGrads<Shape>;
    constexpr unsigned pieces = Shape::kPieces;
    allow_shared(grad_queries<Queries>, Queries::kSharedBytes);
    DIJIANG_LAUNCH(grad_queries<Queries>, dim3(tiles, heads, Queries::kPieces), kWalkThreads,
                   Queries::kSharedBytes, stream, b);
    if (p.window > 0) {
      allow_shared(grad_window<Shape>, Shape::kSharedBytes);
      DIJIANG_LAUNCH(grad_window<Shape>, dim3(tiles, kv_heads, pieces), kWalkThreads,
                     Shape::kSharedBytes, stream, b);
    }
    if (p.cache.most > 0) {
      const int64_t slot_tiles = ceil_div(p.cache.most, kTileRows);
      allow_shared(grad_slots<Shape>, Shape::kSharedBytes);
      DIJIANG_LAUNCH(grad_slots<Shape>,
                     dim3(static_cast<unsigned>(p.num_seqs * slot_tiles), kv_heads, pieces),
                     kWalkThreads, Shape::kSharedBytes, stream, b);
    }
    if (p.sinks > 0) {
      allow_shared(grad_sinks<Shape>, Shape::kSharedBytes);
      DIJIANG_LAUNCH(grad_sinks<Shape>, dim3(tiles, heads, pieces), kWalkThreads,
                     Shape::kSharedBytes, stream, b);
    }
  });
}

}  // namespace dijiang::cuda
