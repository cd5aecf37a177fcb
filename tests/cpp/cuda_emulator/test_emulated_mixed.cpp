// The fused forward of far keys beside near ones, run by the emulator, against the definition in
// double and against the other path.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <string>

#include "cuda/fused_choice.cu"
#include "cuda/fused_forward.cu"
#include "cuda/fused_mixed.cu"
#include "cuda/fused_near.cu"
#include "cuda/fused_near_backward.cu"
#include "cuda/linear_attention_backward.cu"
#include "cuda/linear_attention_forward.cu"
#include "emulated_attention.h"

namespace {

using dijiang::FeatureKind;
using emulated::Call;
using emulated::error;
using emulated::forget_kernels;
using emulated::ran;
using emulated::State;
using oracle::Problem;

void expect_fused() {
  EXPECT_TRUE(ran("attend_mixed") && ran("fold_states"));
  EXPECT_FALSE(ran("compute_features") || ran("local_states") || ran("scan_states"));
  EXPECT_FALSE(ran("find_row_scales") || ran("compute_outputs") || ran("attend_near"));
  EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
}

// The roundings of features, weights, states and output (docs/cuda.md).
template <class T>
constexpr double kTolerance = std::is_same_v<T, __half> ? 8e-4 : 6e-3;

Problem problem(int seqlen, int window, int sinks, int cache_size = 0) {
  Problem p;
  p.seqlen = seqlen;
  p.dim = p.dim_v = p.features = 64;
  p.scale = 0.125;
  p.window = window;
  p.sinks = sinks;
  p.cache_size = cache_size;
  return p;
}

std::string name(const Problem& p) {
  return "kind " + std::to_string(int(p.kind)) + " decay " + std::to_string(p.decay) + " window " +
         std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " slots " +
         std::to_string(p.cache().most) + " seqlen " + std::to_string(p.seqlen) + " heads " +
         std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) + " dims " +
         std::to_string(p.dim) + ", " + std::to_string(p.dim_v) + " features " +
         std::to_string(p.features) + " normalize " + std::to_string(p.normalize);
}

// Outputs, statistics and final state of what has run.
template <class T>
void compare(const Problem& p, const Call<T>& call, const State<T>& state,
             const oracle::Result& want) {
  const double e = error(emulated::widen(call.out), want.out);
  EXPECT_LT(e, kTolerance<T>);
  double most = 0.0;
  for (const auto& s : p.sequences()) {
    for (int h = 0; h < p.heads && p.normalize; ++h) {
      for (int t = s[1]; t < s[2]; ++t) {
        const int64_t row = p.row(h, p.heads, s[0], t);
        const double got = (std::log2(call.row_sum[row]) + call.row_scale[row]) * std::log(2.0);
        ASSERT_GE(call.row_sum[row], 1.0f);
        ASSERT_LT(call.row_sum[row], 2.0f);
        most = std::fmax(most, std::fabs(got - want.log_sum[row]));
      }
    }
  }
  EXPECT_LT(most, kTolerance<T>);
  EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kTolerance<T>);
  EXPECT_LT(error(state.true_z(), want.z), kTolerance<T>);
  if (std::getenv("DIJIANG_TEST_ERRORS")) {
    std::printf("%s: out %.2e log sum %.2e kv %.2e z %.2e\n", name(p).c_str(), e, most,
                error(state.true_kv(p.dim_v), want.kv), error(state.true_z(), want.z));
  }
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  SCOPED_TRACE(name(p));
  p.fill(seed, emulated::round_to<T>);
  forget_kernels();
  Call<T> call(p, 1);
  State<T> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  expect_fused();
  compare(p, call, state, oracle::run(p, false));
}

template <class T>
void check_kinds() {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      for (const int cache_size : {0, 20}) {
        Problem p = problem(330, 64, 4, cache_size);
        p.kind = kind;
        p.decay = decay;
        check<T>(p);
      }
    }
  }
}
TEST(EmulatedMixed, BFloat16) { check_kinds<__nv_bfloat16>(); }
TEST(EmulatedMixed, Half) { check_kinds<__half>(); }

}  // namespace
