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

// Of the current device; 0 when it cannot be asked.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

// Asynchronous copies and products of 16-bit fragments.
inline bool device_is_sm80() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

// Calls take(FusedShape) for the sizes of p; false where there are no kernels for them.
template <class T, int kDim, class Take>
bool with_fused_features(const LinearAttentionParams& p, const Take& take) {
  if (p.num_features == 64) {
    take(FusedShape<T, kDim, 64>{});
    return true;
  }
  // Two parts of 128 features do not fit into registers.
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.num_features == 128) {
      take(FusedShape<T, kDim, 128>{});
      return true;
    }
  }
  return false;
}
template <class T, class Take>
bool with_fused_dim(const LinearAttentionParams& p, const Take& take) {
  if (p.headdim == 64) return with_fused_features<T, 64>(p, take);
  if (p.headdim == 128) return with_fused_features<T, 128>(p, take);
  return false;
}
template <class Take>
bool with_fused_shape(const LinearAttentionParams& p, const Take& take) {
  if (p.headdim_v <= 0 || p.headdim_v % kFoldColumns != 0) return false;
  if (p.dtype == DType::kBFloat16) return with_fused_dim<__nv_bfloat16>(p, take);
  if (p.dtype == DType::kFloat16) return with_fused_dim<__half>(p, take);
  return false;
}

}  // namespace dijiang::cuda
