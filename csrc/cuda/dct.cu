// Launchers of the DCT, and the cache of cuFFT plans.
#include "dijiang/core/dct_cuda.h"

#include <cufft.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/dct_kernels.h"

namespace dijiang::cuda {
namespace {

// Rows of one cuFFT call: at most this many elements, so that the workspace stays bounded.
constexpr int64_t kElementsPerCall = int64_t{1} << 26;

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Rounded up to three significant bits, so that few plans serve every number of rows.
int64_t rounded_rows(int64_t rows) {
  int64_t unit = 1;
  while (rows > 8 * unit) unit *= 2;
  return (rows + unit - 1) / unit * unit;
}

int64_t rows_per_call(const DctParams& p) {
  const int64_t rows = p.batch * p.heads * p.seqlen;
  const int64_t most = kElementsPerCall / p.n > 0 ? kElementsPerCall / p.n : 1;
  return rounded_rows(rows < most ? rows : most);
}

struct Plan {
  cufftHandle handle = 0;
  size_t work_bytes = 0;
};

// A plan's stream and work area are set for each call: that and the call happen under the mutex.
class PlanCache {
 public:
  std::mutex mutex;

  // Null when cuFFT cannot make the plan.
  const Plan* find(int type, int64_t n, int64_t rows) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
    const auto [place, is_new] = plans_.try_emplace({device, type, n, rows});
    if (!is_new) return &place->second;
    Plan& plan = place->second;
    int length = static_cast<int>(n);
    const bool made = cufftCreate(&plan.handle) == CUFFT_SUCCESS &&
                      cufftSetAutoAllocation(plan.handle, 0) == CUFFT_SUCCESS &&
                      cufftMakePlanMany(plan.handle, 1, &length, nullptr, 1, 0, nullptr, 1, 0,
                                        type == 2 ? CUFFT_R2C : CUFFT_C2R, static_cast<int>(rows),
                                        &plan.work_bytes) == CUFFT_SUCCESS;
    if (made) return &plan;
    if (plan.handle != 0) cufftDestroy(plan.handle);
    plans_.erase(place);
    return nullptr;
  }

 private:
  std::map<std::tuple<int, int, int64_t, int64_t>, Plan> plans_;
};

// Never destroyed: at exit the driver may be gone before the plans.
PlanCache& plan_cache() {
  static auto& cache = *new PlanCache;
  return cache;
}

template <class T, int kType>
cudaError_t dct_by_cufft(const DctParams& params, void* workspace, cudaStream_t stream) {
  // dct_workspace could not make the plan. One made now would write behind what was allocated.
  if (!workspace) return cudaErrorMemoryAllocation;
  const DctRows p = dct_rows(params);
  const int64_t rows = rows_per_call(params);
  auto* bytes = static_cast<char*>(workspace);
  DctWork work{};
  work.real = reinterpret_cast<float*>(bytes);
  bytes += aligned(rows * params.n * sizeof(float));
  work.spectrum = reinterpret_cast<float2*>(bytes);
  bytes += aligned(rows * (params.n / 2 + 1) * sizeof(float2));

  PlanCache& cache = plan_cache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const Plan* plan = cache.find(kType, params.n, rows);
  if (!plan) return cudaErrorMemoryAllocation;
  if (cufftSetStream(plan->handle, stream) != CUFFT_SUCCESS ||
      cufftSetWorkArea(plan->handle, bytes) != CUFFT_SUCCESS) {
    return cudaErrorUnknown;
  }
  for (work.first = 0; work.first < p.rows; work.first += rows) {
    work.rows = p.rows - work.first < rows ? p.rows - work.first : rows;
    launch_dct_before_fft<T, kType>(p, work, stream);
    auto* spectrum = reinterpret_cast<cufftComplex*>(work.spectrum);
    const cufftResult result = kType == 2 ? cufftExecR2C(plan->handle, work.real, spectrum)
                                          : cufftExecC2R(plan->handle, spectrum, work.real);
    if (result != CUFFT_SUCCESS) return cudaErrorUnknown;
    launch_dct_after_fft<T, kType>(p, work, stream);
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t run(const DctParams& params, void* workspace, cudaStream_t stream) {
  const DctRows p = dct_rows(params);
  if (dct_uses_cufft(p)) {
    return params.type == 2 ? dct_by_cufft<T, 2>(params, workspace, stream)
                            : dct_by_cufft<T, 3>(params, workspace, stream);
  }
  if (params.type == 2) {
    launch_dct<T, 2>(p, stream);
  } else {
    launch_dct<T, 3>(p, stream);
  }
  return launch_status();
}

}  // namespace

// 0 where a workspace is needed but cuFFT cannot say how large: dct refuses a null one.
size_t dct_workspace(const DctParams& params) {
  if (params.batch * params.heads * params.seqlen == 0 || !dct_uses_cufft(dct_rows(params)))
    return 0;
  const int64_t rows = rows_per_call(params);
  PlanCache& cache = plan_cache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const Plan* plan = cache.find(params.type, params.n, rows);
  if (!plan) return 0;
  return aligned(rows * params.n * sizeof(float)) +
         aligned(rows * (params.n / 2 + 1) * sizeof(float2)) + plan->work_bytes;
}

cudaError_t dct(const DctParams& params, void* workspace, cudaStream_t stream) {
  if (params.batch * params.heads * params.seqlen == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32: return run<float>(params, workspace, stream);
    case DType::kBFloat16: return run<__nv_bfloat16>(params, workspace, stream);
    case DType::kFloat16: return run<__half>(params, workspace, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace dijiang::cuda
