// What the fused kernels ask of a call and a device, whichever they are. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda/fused_layout.h"
#include "dijiang/core/linear_attention.h"

namespace dijiang::cuda {

// DIJIANG_CUDA_FUSED=0 in the environment, read once: never.
inline bool fused_switched_on() {
  static const bool on = [] {
    const char* text = std::getenv("DIJIANG_CUDA_FUSED");
    return !text || std::strcmp(text, "0") != 0;
  }();
  return on;
}

inline bool begins_at_pieces(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Rows of 16-byte pieces, of 16-bit elements, that begin at multiples of 16 bytes: what
// asynchronous copies can take.
inline bool has_whole_pieces(const ConstView& view) {
  return view.stride_dim == 1 && view.stride_seq % 8 == 0 && view.stride_head % 8 == 0 &&
         view.stride_batch % 8 == 0 && begins_at_pieces(view.data);
}

// Its keys and values.
inline bool state_begins_at_pieces(const AttentionState& state) {
  for (const void* data :
       {state.window_k, state.window_v, state.sink_k, state.sink_v, state.cache_k, state.cache_v}) {
    if (!begins_at_pieces(data)) return false;
  }
  return true;
}

// Whole pieces of 16 bytes in every row.
inline bool sizes_are_pieces(const LinearAttentionParams& p) {
  return p.headdim > 0 && p.headdim % 8 == 0 && p.headdim_v > 0 && p.headdim_v % 8 == 0;
}

// Calls take(size) with the smallest size of tiles that has room for `count`, an integral_constant;
// false where none up to kMost has.
template <int kMost = 128, class Take>
bool with_tile_size(int64_t count, const Take& take) {
  if (count <= 0 || count > kMost) return false;
  if (count <= 64) return take(std::integral_constant<int, 64>{});
  if constexpr (kMost > 128) {
    if (count > 128) return take(std::integral_constant<int, 256>{});
  }
  return take(std::integral_constant<int, 128>{});
}
// Calls take(x) with an x of the type of the inputs; false where they are not of 16 bits. Inside
// further generic lambdas decltype(x) is a reference to g++ 12: std::decay_t.
template <class Take>
bool with_16_bits(const LinearAttentionParams& p, const Take& take) {
  if (p.dtype == DType::kBFloat16) return take(__nv_bfloat16{});
  if (p.dtype == DType::kFloat16) return take(__half{});
  return false;
}

// Whether a slice of the call has 128 features: a last one of up to 64 is not worth it, and shared
// memory must take the largest kernel.
template <class T, int kHeadDim>
bool has_wide_slices(const LinearAttentionParams& p) {
  static_assert(kHeadDim <= 128);
  const int64_t last = p.num_features % 128;
  if (p.num_features <= 64 || (p.num_features > 128 && last > 0 && last <= 64)) return false;
  using Shape = FusedShape<T, kHeadDim, 128>;
  const bool alone = p.window == 0 && p.sinks == 0;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
         (alone ? FusedShared<Shape, true>::bytes(1) : FusedShared<Shape, false>::bytes(0));
}

// Calls take(FusedShape) for the sizes of p; false where there are no kernels for them.
template <class Take>
bool with_fused_shape(const LinearAttentionParams& p, const Take& take) {
  if (!sizes_are_pieces(p) || p.num_features <= 0) return false;
  // A softmax over features needs all of them at once.
  const auto sliceable = p.kind != FeatureKind::kSoftmax;
  if (!sliceable && p.num_features > 128) return false;
  return with_16_bits(p, [&](auto x) {
    using T = std::decay_t<decltype(x)>;
    return with_tile_size<256>(p.headdim, [&](auto dim) {
      // Two parts of 128 features do not fit into registers, nor their maps of 256 columns into
      // shared memory.
      if constexpr (!std::is_same_v<T, __half> && dim() <= 128) {
        if (has_wide_slices<T, dim()>(p)) {
          take(FusedShape<T, dim(), 128>{});
          return true;
        }
      }
      if (!sliceable && p.num_features > 64) return false;
      take(FusedShape<T, dim(), 64>{});
      return true;
    });
  });
}

}  // namespace dijiang::cuda
