// The feature map kernels under the emulator, against the definition and the CPU kernels.
#include <gtest/gtest.h>

#include "../feature_map_case.h"
#include "dijiang/core/feature_map_cuda.h"

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
    FeatureMapCase c;
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

}  // namespace
}  // namespace dijiang::testing
