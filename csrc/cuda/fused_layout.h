// What the fused forward kernels are told, and what lies in their shared memory.
#pragma once

#include <type_traits>

#include "cuda/fused_features.h"

namespace dijiang::cuda {

// A row's sums over the slices of features so far, over (batch, heads, seqlen).
struct RowSums {
  float* out;    // (.., headdim_v): of weights and values, times 2^-scale
  float* den;    // of weights, likewise
  float* scale;  // whole, or kEmpty
};

// A part is the stretch of a sequence that one block walks over: attention.chunk_size tokens, a
// whole sequence when not split.
struct FusedAttention {
  Attention attention;
  int block_heads;  // query heads of one kv head that a block takes
  bool split;       // the states before the parts lie in the workspace
  int slice;        // of the features, that this call of the rows' kernel takes
  RowSums sums[2];  // those behind slices of even and odd numbers; one slice: none
};

constexpr int kFoldColumns = 64;  // of v, a block of a walk

// Blocks of so many columns that headdim_v takes.
__host__ __device__ inline int64_t column_blocks(const LinearAttentionParams& p, int columns) {
  return (p.headdim_v + columns - 1) / columns;
}
// Slices of so many features that num_features takes. They know nothing of one another: far weights
// are sums over features, and each feature has its own scale and state.
__host__ __device__ inline int64_t feature_slices(const LinearAttentionParams& p, int features) {
  return (p.num_features + features - 1) / features;
}
// Columns of v of a state as tiles.
__host__ __device__ inline int64_t tile_columns(const LinearAttentionParams& p) {
  return (p.headdim_v + kFoldColumns - 1) / kFoldColumns * kFoldColumns;
}

// The sizes are those of tiles, which sizes of a call are rounded up to: what is not there is
// zeros, and a feature that is not there counts nothing. kFeatures: of a slice. kValueDim: columns
// of v that a block takes; with more of them the block's work is done again for the next ones.
template <class T_, int kHeadDim_, int kFeatures_>
struct FusedShape {
  using T = T_;
  using Map = FeatureMap<T, kHeadDim_, kFeatures_>;
  static constexpr int kHeadDim = kHeadDim_, kFeatures = kFeatures_, kValueDim = kFoldColumns;
  static constexpr int kParts = std::is_same_v<T, __half> ? 2 : 1;
};

// Offsets in bytes. Without rows (keys alone) there are no queries and no state to read. Values
// have two stages, so that the next ones come early, but where maps of 256 columns leave no room.
template <class Shape, bool kRows>
struct FusedShared {
  static constexpr int kWidth = 2 * Shape::kHeadDim, kFeatureWidth = 2 * Shape::kFeatures;
  using Map = typename Shape::Map;
  static constexpr int kFloats = Shape::kFeatures * static_cast<int>(sizeof(float));

  static constexpr int key_omega = 0;
  static constexpr int keys = key_omega + Map::kMatrix;
  static constexpr int values = keys + kTileRows * kWidth;
  static constexpr int kValueStages = kRows && Shape::kHeadDim > 128 ? 1 : 2;
  static constexpr int features = values + kValueStages * 2 * kTileRows * Shape::kValueDim;
  static constexpr int state = features + Shape::kParts * kTileRows * kFeatureWidth;
  static constexpr int queries =
      state + (kRows ? Shape::kParts * Shape::kValueDim * kFeatureWidth : 0);
  static constexpr int key_lines = queries + (kRows ? kTileRows * kWidth : 0);
  static constexpr int levels = key_lines + Map::kLines;
  static constexpr int scale = levels + kTileRows * static_cast<int>(sizeof(double));
  static constexpr int z = scale + kFloats;
  static constexpr int rest = z + kFloats;
  static constexpr int top = rest + kFloats;
  static constexpr int factor = top + kFloats;
  static constexpr int top_z = factor + kFloats;
  static constexpr int next_rest = top_z + kFloats;
  static constexpr int maxima = next_rest + kFloats;
  static constexpr int failed = maxima + kWalkWarps * kFloats;
  static constexpr int heads = failed + 2 * kWalkWarps * static_cast<int>(sizeof(unsigned));
  // For each query head of the block: its map.
  static constexpr int kHead = Map::kBytes;
  static constexpr int bytes(int block_heads) { return heads + (kRows ? block_heads * kHead : 0); }
};

}  // namespace dijiang::cuda
