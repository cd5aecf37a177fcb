// feature_map on the CPU against its definition in double and its finite differences.
#include "dijiang/core/feature_map.h"

#include <gtest/gtest.h>

#include "feature_map_case.h"

namespace dijiang::testing {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

std::vector<FeatureMapCase> cases() {
  std::vector<FeatureMapCase> result;
  for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (bool log : {false, true}) {
      FeatureMapCase c;
      c.kind = kind;
      c.log = log;
      result.push_back(c);
      c.m = c.d = 64;
      c.heads = 1;
      c.seqlen = 64;
      c.has_weight = c.has_beta = false;
      result.push_back(c);
      c.m = 1;
      c.d = 1;
      c.seqlen = 1;
      result.push_back(c);
    }
  }
  return result;
}

TEST(FeatureMap, EqualsTheDefinition) {
  for (const FeatureMapCase& c : cases()) {
    for (DType dtype : kDTypes) {
      const FeatureMapValues v = FeatureMapValues(c, 1).rounded(dtype);
      const Array expected = feature_map_definition(c, v);
      const Array out = run_feature_map(c, v, dtype, cpu_kernels()).out;
      // Exponents up to 8 carry that many roundings of Acc into phi, then it is rounded to dtype.
      const double tolerance = 16 * unit_roundoff(acc_of(dtype)) + unit_roundoff(dtype);
      EXPECT_LT(relative_rms(out, expected), tolerance) << c.name() << " dtype " << int(dtype);
    }
  }
}

TEST(FeatureMap, GradientsAreFiniteDifferences) {
  for (FeatureMapCase c : cases()) {
    c.seqlen = std::min<int64_t>(c.seqlen, 66);  // more than one tile
    const FeatureMapValues v(c, 2);
    const FeatureMapResult got = run_feature_map(c, v, DType::kFloat64, cpu_kernels());
    const auto compare = [&](const Array& grad, Array FeatureMapValues::*member) {
      double scale = 0;
      for (double g : grad) scale = std::max(scale, std::abs(g));
      const int64_t count = (v.*member).size();
      for (int64_t i = 0; i < count; i += 1 + count / 7) {
        EXPECT_NEAR(grad[i], finite_difference(c, v, member, i), 1e-7 * (1 + scale))
            << c.name() << " index " << i;
      }
    };
    compare(got.grad_x, &FeatureMapValues::x);
    compare(got.grad_omega, &FeatureMapValues::omega);
    compare(got.grad_log_weight, &FeatureMapValues::log_weight);
    if (c.kind == FeatureKind::kExp) compare(got.grad_beta, &FeatureMapValues::beta);
  }
}

TEST(FeatureMap, GradientsInEveryDType) {
  for (const FeatureMapCase& c : cases()) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const FeatureMapValues v = FeatureMapValues(c, 3).rounded(dtype);
      const FeatureMapResult expected = run_feature_map(c, v, DType::kFloat64, cpu_kernels());
      const FeatureMapResult got = run_feature_map(c, v, dtype, cpu_kernels());
      // The forward's output, rounded to dtype, is a factor of the gradient.
      const double tolerance = 16 * unit_roundoff(DType::kFloat32) + 2 * unit_roundoff(dtype);
      EXPECT_LT(relative_rms(got.grad_x, expected.grad_x), tolerance) << c.name();
      EXPECT_LT(relative_rms(got.grad_omega, expected.grad_omega), tolerance) << c.name();
      EXPECT_LT(relative_rms(got.grad_log_weight, expected.grad_log_weight), tolerance) << c.name();
    }
  }
}

TEST(FeatureMap, StaysFiniteForLargeInputs) {
  for (FeatureMapCase c : cases()) {
    c.size = 1e4;
    for (DType dtype : kDTypes) {
      const FeatureMapResult got =
          run_feature_map(c, FeatureMapValues(c, 4).rounded(dtype), dtype, cpu_kernels());
      for (double value : got.out) EXPECT_TRUE(std::isfinite(value)) << c.name();
    }
  }
}

TEST(FeatureMap, ReachesTheEndsOfTheRange) {
  // phi = exp(x) near the largest and the smallest float.
  FeatureMapCase c;
  c.batch = c.heads = c.d = c.m = 1;
  c.scale = 1;
  c.has_weight = c.has_beta = false;
  FeatureMapValues v(c, 5);
  v.omega = {1.0};
  v.x = {88.0, 88.3, 88.6, 88.72, 88.73, 89.0, 128.0, 200.3, 1e30, -87.0, -87.3, -88.0, -1e30};
  c.seqlen = v.x.size();
  v.grad_out.resize(c.seqlen);
  v = v.rounded(DType::kFloat32);
  const Array out = run_feature_map(c, v, DType::kFloat32, cpu_kernels()).out;
  const double largest = std::numeric_limits<float>::max();
  for (size_t i = 0; i < out.size(); ++i) {
    const double expected = std::exp(v.x[i]);
    if (expected >= largest) {
      EXPECT_EQ(out[i], largest) << v.x[i];
    } else if (expected < std::numeric_limits<float>::min()) {
      EXPECT_EQ(out[i], 0) << v.x[i];
    } else {
      EXPECT_NEAR(out[i] / expected, 1, 2e-5) << v.x[i];
    }
  }
}

TEST(FeatureMap, UnwantedGradientsAreLeftOut) {
  const FeatureMapCase c;
  const FeatureMapValues v(c, 6);
  const FeatureMapResult all = run_feature_map(c, v, DType::kFloat64, cpu_kernels());
  FeatureMapKernels kernels = cpu_kernels();
  kernels.backward = [](FeatureMapBackwardParams& p) {
    p.grad = {};
    cpu_kernels().backward(p);
  };
  const FeatureMapResult some = run_feature_map(c, v, DType::kFloat64, kernels);
  EXPECT_EQ(some.grad_x, all.grad_x);
}

}  // namespace
}  // namespace dijiang::testing
