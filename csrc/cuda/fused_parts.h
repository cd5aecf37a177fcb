// How walks over sequences are cut into parts, so that few sequences fill the device, too: local
// states of the parts (walk_keys), the scan, then all parts at once.
#pragma once

#include "cuda/fused_calls.h"
#include "cuda/fused_walk.h"

namespace dijiang::cuda {

template <class W>
__device__ inline void find_part(W& walk, const Chunk& c, int kv_head, int first_head) {
  walk.batch = c.batch;
  walk.kv_head = kv_head;
  walk.first_head = first_head;
  walk.first_column = static_cast<int>(blockIdx.z) * W::kV;
  walk.token = c.query_token;
  walk.count = c.query_count;
}

// The block's part: a sequence when not split.
__device__ inline bool find_part_chunk(const FusedAttention& f, Chunk& c) {
  if (f.split) return find_chunk(f.attention, blockIdx.x, c);
  c = make_chunk(f.attention, blockIdx.x, find_sequence(f.attention, blockIdx.x), 0);
  return true;
}

// Grid: part, kv head, columns of v. The state of the part's keys alone, as it stands after the
// last.
template <class Shape>
__global__ void __launch_bounds__(kWalkThreads, 2) walk_keys(FusedAttention f) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const Attention& a = f.attention;
  Chunk c;
  if (!find_chunk(a, blockIdx.x, c)) return;
  const int head = blockIdx.y;
  Walk<Shape, false> walk(f, raw);
  find_part(walk, c, head, 0);
  const int64_t cell = cell_of(a, blockIdx.x, head);
  walk.read_state(nullptr, nullptr, nullptr, 0);
  walk.run();
  walk.write_state(a.work.kv, a.work.z, a.work.local_scale, cell);
  if (a.has_decay && blockIdx.z == 0 && threadIdx.x == 0) {
    const_cast<double*>(levels_of(a, blockIdx.x, head))[c.key_count - 1] = walk.decay;
  }
}

constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kLeastPart = 4 * kTileRows;  // so that states cost less than keys and values

// blocks: of one part. Not split unless few sequences ask for it or must_split does.
inline FusedAttention plan_parts(const LinearAttentionParams& p, int64_t blocks, bool must_split,
                                 Arena& arena) {
  FusedAttention f{};
  Attention& a = f.attention;
  a.params = p;
  if (!p.segments) a.params.num_seqs = p.batch;
  a.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  a.row_tiles = 1;
  a.has_decay = p.log_decay != nullptr;
  a.has_inner = true;

  const int64_t wanted =
      kBlocksPerMultiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rounded = ceil_div(p.seqlen, kTileRows) * kTileRows;
  int64_t part = ceil_div(ceil_div(p.batch * p.seqlen * blocks, wanted), kTileRows) * kTileRows;
  if (part < kLeastPart) part = kLeastPart;
  f.split = part < rounded || must_split;
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

inline unsigned parts_of(const FusedAttention& f) {
  return static_cast<unsigned>(f.split ? f.attention.max_chunks : f.attention.params.num_seqs);
}
// Blocks of the scans over parts.
inline dim3 scan_grid(const LinearAttentionParams& p) {
  const int64_t tiles = ceil_div(p.num_features * (p.headdim_v + 1), kThreads);
  return dim3(static_cast<unsigned>(p.num_seqs * tiles), static_cast<unsigned>(p.num_kv_heads));
}

// The states before the parts of a split call, and its final state.
template <class Shape>
void launch_part_states(const FusedAttention& f, cudaStream_t stream) {
  const Attention& a = f.attention;
  const LinearAttentionParams& p = a.params;
  constexpr int shared = FusedShared<Shape, false>::bytes(0);
  const auto columns = static_cast<unsigned>(p.headdim_v / Shape::kValueDim);
  DIJIANG_LAUNCH(build_chunks, 1, kThreads, kThreads * sizeof(int), stream, a);
  allow_shared(walk_keys<Shape>, shared);
  DIJIANG_LAUNCH((walk_keys<Shape>),
                 dim3(parts_of(f), static_cast<unsigned>(p.num_kv_heads), columns), kWalkThreads,
                 shared, stream, f);
  DIJIANG_LAUNCH(scan_states, scan_grid(p), kThreads, 0, stream, a);
}

}  // namespace dijiang::cuda
