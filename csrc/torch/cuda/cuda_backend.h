// The CUDA kernels on the current stream of the tensors' device. Workspaces come from torch's
// caching allocator, which frees them in the order of that stream: nothing here waits.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "dijiang/core/dct_cuda.h"
#include "dijiang/core/feature_map_cuda.h"
#include "dijiang/core/linear_attention_cuda.h"
#include "torch/tensor.h"

namespace dijiang::binding {

struct CudaBackend {
  static constexpr bool kShortOmega = false;  // tensor cores multiply by a matrix for every head

  static void dct(const DctParams& p, const Tensor& like) {
    const Device device(like);
    const Tensor workspace = new_workspace(like, cuda::dct_workspace(p));
    check_launch("dct", cuda::dct(p, data_of(workspace), device.stream));
  }

  static void feature_map_forward(const FeatureMapParams& p, const Tensor& like) {
    const Device device(like);
    const Tensor workspace = new_workspace(like, cuda::feature_map_forward_workspace(p));
    check_launch("feature_map", cuda::feature_map_forward(p, data_of(workspace), device.stream));
  }

  static void feature_map_backward(FeatureMapBackwardParams& p, const Tensor& like) {
    const Device device(like);
    const Tensor workspace = new_workspace(like, cuda::feature_map_backward_workspace(p));
    p.workspace = data_of(workspace);
    check_launch("feature_map", cuda::feature_map_backward(p, device.stream));
  }

  static void attention_forward(const LinearAttentionParams& p, const Tensor& like) {
    const Device device(like);
    const Tensor workspace = new_workspace(like, cuda::linear_attention_forward_workspace(p));
    check_launch("attention", cuda::linear_attention_forward(p, data_of(workspace), device.stream));
  }

  static void attention_backward(LinearAttentionBackwardParams& p, const Tensor& like) {
    const Device device(like);
    const Tensor workspace = new_workspace(like, cuda::linear_attention_backward_workspace(p));
    p.workspace = data_of(workspace);
    check_launch("attention", cuda::linear_attention_backward(p, device.stream));
  }

  static void attention_update(const LinearAttentionParams& p, const Tensor& like) {
    const Device device(like);
    check_launch("attention update", cuda::linear_attention_update(p, device.stream));
  }

  // Their values lie on the device, and to read them would wait for it: the Python functions
  // assert them there.
  static void check_segments(const Tensor&, int64_t, int64_t, bool) {}
  static void check_hard_keys(const LinearAttentionParams&) {}

 private:
  // Makes a tensor's device current while it lives.
  struct Device {
    explicit Device(const Tensor& t) : guard(t.get_device_index()) {
      void* current = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
      stream = static_cast<cudaStream_t>(current);
    }
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream = nullptr;
  };

  static void check_launch(const char* what, cudaError_t status) {
    check(status != cudaErrorNotSupported, what,
          " on CUDA takes float32, bfloat16 and float16, and sizes that fit in shared memory");
    check(status == cudaSuccess, what, " on CUDA: ", cudaGetErrorString(status));
  }
};

}  // namespace dijiang::binding
