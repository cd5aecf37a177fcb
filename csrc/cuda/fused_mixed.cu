// The fused forward of far keys beside near ones: which calls it takes, and its kernels
// (fused_fold.h and fused_mixed_rows.h are what blocks do).
#include "cuda/fused_mixed.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_fold.h"
#include "cuda/fused_mixed_rows.h"

namespace dijiang::cuda {
namespace {

constexpr int kFoldColumns = 64;  // of v, a block

// --- kernels -------------------------------------------------------------------------------------

// Once a call, as each query head has many blocks. Grid: query head.
template <class Map>
__global__ void __launch_bounds__(kWalkThreads) split_query_maps(Attention a) {
  char* to = a.work.query_maps + static_cast<int64_t>(blockIdx.x) * Map::kBytes;
  Map::store(a.params, a.params.fq, static_cast<int>(blockIdx.x), to, to + Map::kMatrix);
}

// Of the blocks of `parts` parts a sequence: which part of the chunk table this one has.
struct FoldPart {
  int64_t seq;
  int index, first, end;
  bool is_last;

  __device__ FoldPart(const Attention& a, int parts)
      : seq(blockIdx.x / parts), index(static_cast<int>(blockIdx.x % parts)) {
    const int chunks = a.work.parts.chunks, behind = a.work.first_chunk[seq + 1];
    first = a.work.first_chunk[seq] + index * chunks;
    is_last = first + chunks >= behind;
    end = is_last ? behind : first + chunks;
  }
  // Of a state of all parts but the last.
  __device__ int64_t cell(const Attention& a, int part, int head) const {
    return (seq * (a.work.parts.count - 1) + part) * a.params.num_kv_heads + head;
  }
};

// The states of parts alone, but for the last ones. Grid: (sequence, part), kv head, columns of v.
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

// States before all chunks. Grid: (sequence, part), kv head, columns of v.
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

// Grid: (chunk, tile of 64 queries), query head, columns of v.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, Shape::kBlocks) attend_mixed(Attention a) {
  DIJIANG_DYNAMIC_SHARED(raw);
  QueryTile t;
  if (!find_query_tile(a, t)) return;
  MixedRows<Shape>(a, t, raw).run();
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(FusedShape, MixedShape) for the sizes of p, for fold and rows; false where there is no
// kernel for them.
template <class T, int kDim, int kFeatures, class Take>
void with_columns(const LinearAttentionParams& p, const Take& take) {
  const FusedShape<T, kDim, kFeatures> fold;
  static_assert(fold.kValueDim == kFoldColumns);
  if (p.headdim_v % 128 == 0) {
    take(fold, MixedShape<T, kDim, 128, kFeatures>{});
  } else {
    take(fold, MixedShape<T, kDim, 64, kFeatures>{});
  }
}
template <class T, int kFeatures, class Take>
bool with_dim(const LinearAttentionParams& p, const Take& take) {
  if (p.headdim == 64) {
    with_columns<T, 64, kFeatures>(p, take);
  } else if (p.headdim == 128) {
    with_columns<T, 128, kFeatures>(p, take);
  } else {
    return false;
  }
  return true;
}
template <class Take>
bool with_mixed_shape(const LinearAttentionParams& p, const Take& take) {
  if (p.headdim_v <= 0 || p.headdim_v % 64 != 0) return false;
  if (p.dtype == DType::kBFloat16) {
    if (p.num_features == 64) return with_dim<__nv_bfloat16, 64>(p, take);
    if (p.num_features == 128) return with_dim<__nv_bfloat16, 128>(p, take);
  } else if (p.dtype == DType::kFloat16) {
    // Two parts of 128 features do not fit into registers.
    if (p.num_features == 64) return with_dim<__half, 64>(p, take);
  }
  return false;
}

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

FoldParts plan_parts(const Attention& a, Arena& arena) {
  const LinearAttentionParams& p = a.params;
  FoldParts parts{};
  const int64_t chunks = p.seqlen / a.chunk_size + 2;  // of a sequence at most
  const int64_t blocks = p.num_seqs * p.num_kv_heads * (p.headdim_v / kFoldColumns);
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

}  // namespace

bool fused_mixed_applies(const LinearAttentionParams& p) {
  if (!fused_switched_on() || p.kind == FeatureKind::kGiven || p.num_heads == 0) return false;
  const bool has_inner = p.window < kChunk && p.cache.most == 0;
  if (p.window == 0 || has_inner || updates_shared_state(p)) return false;
  if (!has_whole_pieces(p.q) || !has_whole_pieces(p.k) || !has_whole_pieces(p.v)) return false;
  if (!begins_at_pieces(p.out) || !state_begins_at_pieces(p.initial)) return false;
  int bytes = 0;
  const bool has_shape = with_mixed_shape(p, [&](auto fold, auto rows) {
    constexpr int fold_bytes = FusedShared<decltype(fold), false>::bytes(0);
    constexpr int row_bytes = decltype(rows)::kSharedBytes;
    bytes = fold_bytes > row_bytes ? fold_bytes : row_bytes;
  });
  return has_shape && device_is_sm80() &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

Attention plan_fused_mixed(const LinearAttentionParams& p, Arena& arena) {
  Attention a = plan_chunks(p, arena);
  plan_hard_keys(a, arena);
  const int64_t m = p.num_features, cells = a.max_chunks * p.num_kv_heads;
  Workspace& w = a.work;
  w.scale = arena.take<float>(cells * m);
  w.z = arena.take<float>(cells * m);
  with_mixed_shape(p, [&](auto, auto rows) {
    using Shape = decltype(rows);
    w.query_maps = arena.take<char>(p.num_heads * Shape::Map::kBytes);
    w.states = arena.take<uint16_t>(cells * Shape::kParts * p.headdim_v * m);
  });
  w.parts = plan_parts(a, arena);
  return a;
}

void launch_fused_mixed(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  with_mixed_shape(p, [&](auto fold, auto rows) {
    using Fold = decltype(fold);
    using Rows = decltype(rows);
    const auto heads = static_cast<unsigned>(p.num_heads);
    DIJIANG_LAUNCH(split_query_maps<typename Rows::Map>, heads, kWalkThreads, 0, stream, a);
    constexpr int fold_bytes = FusedShared<Fold, false>::bytes(0);
    const auto parts = static_cast<unsigned>(a.work.parts.count);
    const auto seqs = static_cast<unsigned>(p.num_seqs);
    const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const auto columns = static_cast<unsigned>(p.headdim_v / kFoldColumns);
    if (parts > 1) {
      allow_shared(fold_parts<Fold>, fold_bytes);
      DIJIANG_LAUNCH(fold_parts<Fold>, dim3(seqs * (parts - 1), kv_heads, columns), kWalkThreads,
                     fold_bytes, stream, a);
    }
    allow_shared(fold_states<Fold>, fold_bytes);
    DIJIANG_LAUNCH(fold_states<Fold>, dim3(seqs * parts, kv_heads, columns), kWalkThreads,
                   fold_bytes, stream, a);
    allow_shared(attend_mixed<Rows>, Rows::kSharedBytes);
    DIJIANG_LAUNCH(attend_mixed<Rows>,
                   dim3(static_cast<unsigned>(a.max_chunks * a.row_tiles), heads,
                        static_cast<unsigned>(p.headdim_v / Rows::kValueDim)),
                   kWalkThreads, Rows::kSharedBytes, stream, a);
  });
}

}  // namespace dijiang::cuda
