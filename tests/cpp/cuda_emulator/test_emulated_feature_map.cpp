// The feature map kernels under the emulator, against the definition and the CPU kernels.
#include <gtest/gtest.h>

#include <array>

#include "../feature_map_case.h"
#include "cuda/fused_feature_map.h"
#include "dijiang/core/feature_map_cuda.h"
#include "emulated_device.h"

namespace dijiang::testing {
namespace {

FeatureMapKernels emulated_kernels() {
  return {[](const FeatureMapParams& p) {
            std::vector<char> workspace(cuda::feature_map_forward_workspace(p), char(0xff));
            ASSERT_EQ(cuda::feature_map_forward(p, workspace.data(), nullptr), cudaSuccess);
          },
          [](FeatureMapBackwardParams& p) {
            std::vector<char> workspace(cuda::feature_map_backward_workspace(p) + 256, char(0xff));
            p.workspace = workspace.data() + (-reinterpret_cast<uintptr_t>(workspace.data()) & 255);
            ASSERT_EQ(cuda::feature_map_backward(p, nullptr), cudaSuccess);
          }};
}

std::vector<FeatureMapCase> cases() {
  std::vector<FeatureMapCase> result;
  for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (bool log : {false, true}) {
      FeatureMapCase c;
      c.kind = kind;
      c.log = log;
      c.seqlen = 75;
      c.m = 70;
      c.d = 37;
      result.push_back(c);
      c.heads = 1;
      c.m = c.d = 64;
      c.has_weight = c.has_beta = false;
      result.push_back(c);
    }
  }
  return result;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

TEST(EmulatedFeatureMap, EqualsTheDefinition) {
  for (const FeatureMapCase& c : cases()) {
    for (DType dtype : kDTypes) {
      const FeatureMapValues v = FeatureMapValues(c, 1).rounded(dtype);
      const Array out = run_feature_map(c, v, dtype, emulated_kernels()).out;
      const double tolerance = 16 * unit_roundoff(DType::kFloat32) + unit_roundoff(dtype);
      EXPECT_LT(relative_rms(out, feature_map_definition(c, v)), tolerance)
          << c.name() << " dtype " << int(dtype);
    }
  }
}

Array fused(const FeatureMapCase& c, const FeatureMapValues& v, DType dtype) {
  FeatureMapKernels kernels = emulated_kernels();
  kernels.backward = [](FeatureMapBackwardParams&) {};
  return run_feature_map(c, v, dtype, kernels).out;
}

// No more than the output's own rounding may leave.
void check_fused(const FeatureMapCase& c, unsigned seed = 5) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const FeatureMapValues v = FeatureMapValues(c, seed).rounded(dtype);
    emulated::forget_kernels();
    const Array out = fused(c, v, dtype);
    EXPECT_TRUE(emulated::ran("write_features")) << c.name();
    EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0) << c.name();
    EXPECT_LT(relative_rms(out, feature_map_definition(c, v)), unit_roundoff(dtype)) << c.name();
  }
}

FeatureMapCase dense(int64_t d, int64_t m) {
  FeatureMapCase c;
  c.dense = true;
  c.d = d;
  c.m = m;
  c.size = std::fmin(1.0, 4 / std::sqrt(double(d)));  // float16 is to hold phi
  return c;
}

TEST(EmulatedFeatureMap, FusedKinds) {
  for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (bool log : {false, true}) {
      for (bool plain : {false, true}) {
        FeatureMapCase c = dense(64, 64);
        c.kind = kind;
        c.log = log;
        c.has_weight = c.has_beta = !plain;
        check_fused(c);
      }
    }
  }
}

TEST(EmulatedFeatureMap, FusedSizes) {
  for (int multiprocessors : {1, 100}) {  // many pieces a warp, or one
    const emulated::Device device(multiprocessors);
    for (const auto& [d, m] : std::vector<std::array<int64_t, 2>>{
             {8, 8}, {32, 72}, {80, 160}, {128, 128}, {136, 64}, {256, 264}, {64, 320}}) {
      FeatureMapCase c = dense(d, m);
      c.seqlen = d == 32 ? 1 : d == 80 ? 16 : 75;
      check_fused(c);
      c.kind = FeatureKind::kSoftmax;
      if (m <= (d > 128 ? 64 : 128)) check_fused(c);
    }
  }
}

TEST(EmulatedFeatureMap, FusedOnEveryDevice) {
  for (int kilobytes : {99, 163, 227}) {
    const emulated::Device device(4, kilobytes * 1024);
    check_fused(dense(128, 256));
  }
}

TEST(EmulatedFeatureMap, FusedOrderOfThreadsChangesNothing) {
  const FeatureMapCase c = dense(64, 136);
  const FeatureMapValues v = FeatureMapValues(c, 6).rounded(DType::kBFloat16);
  emulated::expect_same_in_any_order([&] { return fused(c, v, DType::kBFloat16); });
}

TEST(EmulatedFeatureMap, FusedAppliesWhereItShould) {
  alignas(16) static char data[64];
  FeatureMapParams p;
  p.dtype = DType::kBFloat16;
  p.batch = p.num_heads = 1;
  p.seqlen = 4;
  p.headdim = p.num_features = 64;
  p.x = {data, 256, 64, 64, 1};
  p.out = data;
  EXPECT_TRUE(cuda::fused_feature_map_applies(p));
  const auto refuses = [&](const std::function<void(FeatureMapParams&)>& change) {
    FeatureMapParams other = p;
    change(other);
    return !cuda::fused_feature_map_applies(other);
  };
  EXPECT_TRUE(refuses([](auto& o) { o.dtype = DType::kFloat32; }));
  EXPECT_TRUE(refuses([](auto& o) { o.headdim = 60; }));
  EXPECT_TRUE(refuses([](auto& o) { o.headdim = 264; }));
  EXPECT_TRUE(refuses([](auto& o) { o.num_features = 60; }));
  EXPECT_TRUE(refuses([](auto& o) { o.num_heads = 65536; }));
  EXPECT_TRUE(refuses([](auto& o) { o.batch = int64_t{1} << 31; }));
  EXPECT_TRUE(refuses([](auto& o) { o.x.stride_dim = 2; }));
  EXPECT_TRUE(refuses([](auto& o) { o.x.stride_seq = 68; }));
  EXPECT_TRUE(refuses([](auto& o) { o.x.data = data + 2; }));
  EXPECT_TRUE(refuses([](auto& o) { o.out = data + 2; }));
  p.kind = FeatureKind::kSoftmax;
  p.num_features = 128;
  EXPECT_TRUE(cuda::fused_feature_map_applies(p));
  EXPECT_TRUE(refuses([](auto& o) { o.num_features = 136; }));
  EXPECT_TRUE(refuses([](auto& o) { o.headdim = 136; }));
}

TEST(EmulatedFeatureMap, GradientsEqualTheCpuKernelsInDouble) {
  for (const FeatureMapCase& c : cases()) {
    for (DType dtype : kDTypes) {
      const FeatureMapValues v = FeatureMapValues(c, 2).rounded(dtype);
      const FeatureMapResult expected = run_feature_map(c, v, DType::kFloat64, cpu_kernels());
      const FeatureMapResult got = run_feature_map(c, v, dtype, emulated_kernels());
      const double tolerance = 16 * unit_roundoff(DType::kFloat32) + 2 * unit_roundoff(dtype);
      EXPECT_LT(relative_rms(got.grad_x, expected.grad_x), tolerance) << c.name();
      EXPECT_LT(relative_rms(got.grad_omega, expected.grad_omega), tolerance) << c.name();
      EXPECT_LT(relative_rms(got.grad_log_weight, expected.grad_log_weight), tolerance) << c.name();
      if (c.kind == FeatureKind::kExp && c.has_beta) {
        EXPECT_LT(relative_rms(got.grad_beta, expected.grad_beta), tolerance) << c.name();
      }
    }
  }
}

TEST(EmulatedFeatureMap, SumsOverManyPartsOfTheRows) {
  FeatureMapCase c;
  c.batch = 3;
  c.heads = 1;
  c.seqlen = 1500;
  c.d = c.m = 4;
  const FeatureMapValues v = FeatureMapValues(c, 3).rounded(DType::kFloat32);
  const FeatureMapResult expected = run_feature_map(c, v, DType::kFloat64, cpu_kernels());
  const FeatureMapResult got = run_feature_map(c, v, DType::kFloat32, emulated_kernels());
  EXPECT_LT(relative_rms(got.grad_omega, expected.grad_omega), 3e-6);
  EXPECT_LT(relative_rms(got.grad_beta, expected.grad_beta), 3e-6);
}

TEST(EmulatedFeatureMap, StaysFiniteForLargeInputs) {
  for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (bool fused : {false, true}) {
      FeatureMapCase c = fused ? dense(24, 40) : FeatureMapCase{};
      c.kind = kind;
      c.seqlen = 20;
      c.size = 1e4;
      for (DType dtype : kDTypes) {
        const FeatureMapResult got =
            run_feature_map(c, FeatureMapValues(c, 4).rounded(dtype), dtype, emulated_kernels());
        for (double value : got.out) ASSERT_TRUE(std::isfinite(value)) << c.name();
      }
    }
  }
}

}  // namespace
}  // namespace dijiang::testing
