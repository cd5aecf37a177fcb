// The fused forward: how sequences are cut into parts, and the kernels (fused_walk.h is what a
// block does). One part a sequence when batch and heads fill the device; else local states of the
// parts, the scan, and all parts at once.
#include "cuda/fused_forward.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_walk.h"

namespace dijiang::cuda {
namespace {

// --- kernels -------------------------------------------------------------------------------------

// Grid: part, kv head, (slice, columns of v). The state of the part's keys alone, as it stands
// after the last.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2) walk_keys(FusedAttention f) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = f.attention;
  Chunk c;
  if (!find_chunk(a, blockIdx.x, c)) return;
  const int head = blockIdx.y;
  Walk<Shape, false> walk(f, raw, c, head, 0);
  const int64_t cell = cell_of(a, blockIdx.x, head);
  walk.read_state(nullptr, nullptr, nullptr, 0);
  walk.run();
  walk.write_state(a.work.kv, a.work.z, a.work.local_scale, cell);
  if (a.has_decay && blockIdx.z == 0 && threadIdx.x == 0) {
    const_cast<double*>(levels_of(a, blockIdx.x, head))[c.key_count - 1] = walk.decay;
  }
}

// One slice of the features. Grid: part (a sequence when not split), block_heads query heads,
// columns of v.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2) walk_rows(FusedAttention f) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = f.attention;
  const LinearAttentionParams& p = a.params;
  const int first_head = blockIdx.y * f.block_heads, kv_head = first_head / a.group;
  Chunk c;
  if (f.split) {
    if (!find_chunk(a, blockIdx.x, c)) return;
  } else {
    c = make_chunk(a, blockIdx.x, find_sequence(a, blockIdx.x), 0);
  }
  Walk<Shape, true> walk(f, raw, c, kv_head, first_head);
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * p.num_kv_heads + kv_head;
  if (f.split) {
    walk.read_state(a.work.kv, a.work.z, a.work.scale, cell);
  } else {
    walk.read_state(static_cast<const float*>(p.initial.kv), static_cast<const float*>(p.initial.z),
                    static_cast<const float*>(p.initial.log_scale), cell);
  }
  walk.run();
  if (!f.split && p.final.kv && first_head % a.group == 0) {
    walk.write_state(static_cast<float*>(p.final.kv), static_cast<float*>(p.final.z),
                     static_cast<float*>(p.final.log_scale), cell);
  }
}

// --- what applies --------------------------------------------------------------------------------

// Query heads of one kv head for a block: as many as leave room for a second block on the
// multiprocessor, as key features are computed once a block. 0: shared memory does not even take
// one.
int heads_of_block(const LinearAttentionParams& p) {
  const int block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024;
  const auto group = static_cast<int>(p.num_heads / p.num_kv_heads);
  int heads = 0;
  with_fused_shape(p, [&](auto shape) {
    using Shared = FusedShared<decltype(shape), true>;
    if (Shared::bytes(1) <= block) heads = 1;
    for (int n = 2; n <= group; ++n) {
      if (group % n == 0 && Shared::bytes(n) <= half) heads = n;
    }
  });
  return heads;
}

// --- parts ---------------------------------------------------------------------------------------

constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kLeastPart = 4 * kTileRows;  // so that states cost less than keys and values

FusedAttention plan_fused(const LinearAttentionParams& p, Arena& arena) {
  FusedAttention f{};
  Attention& a = f.attention;
  a.params = p;
  if (!p.segments) a.params.num_seqs = p.batch;
  a.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  a.row_tiles = 1;
  a.has_decay = p.log_decay != nullptr;
  a.has_inner = true;
  f.block_heads = heads_of_block(p);

  int64_t columns = 0;
  with_fused_shape(p, [&](auto shape) { columns = column_blocks(p, shape.kValueDim); });
  const int64_t blocks = p.num_heads / f.block_heads * columns;
  const int64_t wanted =
      kBlocksPerMultiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rounded = ceil_div(p.seqlen, kTileRows) * kTileRows;
  int64_t part = ceil_div(ceil_div(p.batch * p.seqlen * blocks, wanted), kTileRows) * kTileRows;
  if (part < kLeastPart) part = kLeastPart;
  // A state updated in place must not change under other blocks that read it.
  const bool shared = f.block_heads < a.group || columns > 1;
  const bool in_place = p.initial.kv && p.initial.kv == p.final.kv && shared;
  f.split = part < rounded || in_place;
  a.chunk_size = static_cast<int>(part < rounded ? part : rounded);
  if (!f.split) return f;

  const int64_t m = p.num_features;
  a.max_chunks = p.batch * p.seqlen / a.chunk_size + 2 * a.params.num_seqs;
  const int64_t cells = a.max_chunks * p.num_kv_heads;
  Workspace& w = a.work;
  w.first_chunk = arena.take<int32_t>(a.params.num_seqs + 1);
  w.chunks = arena.take<Chunk>(a.max_chunks);
  w.levels = arena.take<double>(a.has_decay ? cells * a.chunk_size : 0);
  w.local_scale = arena.take<float>(cells * m);
  w.scale = arena.take<float>(cells * m);
  w.kv = arena.take<float>(cells * m * p.headdim_v);
  w.z = arena.take<float>(cells * m);
  return f;
}

// Behind a slice that is not the last.
void plan_sums(FusedAttention& f, Arena& arena) {
  const LinearAttentionParams& p = f.attention.params;
  int64_t slices = 1;
  with_fused_shape(p, [&](auto shape) { slices = feature_slices(p, shape.kFeatures); });
  const int64_t rows = p.batch * p.num_heads * p.seqlen;
  for (int i = 0; i < 2 && i + 1 < slices; ++i) {
    f.sums[i] = {arena.take<float>(rows * p.headdim_v), arena.take<float>(rows),
                 arena.take<float>(rows)};
  }
}

template <class Shape>
void launch(FusedAttention f, cudaStream_t stream) {
  const Attention& a = f.attention;
  const LinearAttentionParams& p = a.params;
  const auto parts = static_cast<unsigned>(f.split ? a.max_chunks : p.num_seqs);
  const unsigned columns = grid_size(column_blocks(p, Shape::kValueDim));
  const auto slices = static_cast<int>(feature_slices(p, Shape::kFeatures));
  if (f.split) {
    constexpr int shared = FusedShared<Shape, false>::bytes(0);
    const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
    DIJIANG_LAUNCH(build_chunks, 1, kThreads, kThreads * sizeof(int), stream, a);
    allow_shared(walk_keys<Shape>, shared);
    DIJIANG_LAUNCH((walk_keys<Shape>), dim3(parts, kv_heads, columns * slices), kWalkThreads,
                   shared, stream, f);
    const int64_t tiles = ceil_div(p.num_features * (p.headdim_v + 1), kThreads);
    DIJIANG_LAUNCH(scan_states, dim3(static_cast<unsigned>(p.num_seqs * tiles), kv_heads), kThreads,
                   0, stream, a);
  }
  const int shared = FusedShared<Shape, true>::bytes(f.block_heads);
  allow_shared(walk_rows<Shape>, shared);
  for (f.slice = 0; f.slice < slices; ++f.slice) {
    DIJIANG_LAUNCH((walk_rows<Shape>),
                   dim3(parts, static_cast<unsigned>(p.num_heads / f.block_heads), columns),
                   kWalkThreads, shared, stream, f);
  }
}

}  // namespace

bool fused_forward_applies(const LinearAttentionParams& p) {
  if (!fused_switched_on() || p.kind == FeatureKind::kGiven) return false;
  if (p.window > 0 || p.sinks > 0 || p.final.length) return false;
  if (p.num_heads > 65535 || p.batch * p.seqlen == 0) return false;
  if (!has_whole_pieces(p.q) || !has_whole_pieces(p.k) || !has_whole_pieces(p.v)) return false;
  if (!begins_at_pieces(p.out)) return false;
  if (!with_fused_shape(p, [](auto) {})) return false;
  return device_is_sm80() && heads_of_block(p) > 0;
}

size_t fused_forward_workspace(const LinearAttentionParams& params) {
  Arena arena(nullptr);
  FusedAttention f = plan_fused(params, arena);
  plan_sums(f, arena);
  return arena.used();
}

cudaError_t fused_forward(const LinearAttentionParams& params, void* workspace,
                          cudaStream_t stream) {
  Arena arena(workspace);
  FusedAttention f = plan_fused(params, arena);
  plan_sums(f, arena);
  if (f.attention.params.num_seqs == 0) return cudaSuccess;
  with_fused_shape(params, [&](auto shape) {
    using Shape = decltype(shape);
    constexpr int kMost = 227 * 1024;  // that a block of any device has: float16 of 256 never fits
    if constexpr (FusedShared<Shape, true>::bytes(1) <= kMost) launch<Shape>(f, stream);
  });
  return cudaGetLastError();
}

}  // namespace dijiang::cuda
