// What the fused kernels ask of a call and a device, whichever they are. Host functions alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

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

}  // namespace dijiang::cuda
