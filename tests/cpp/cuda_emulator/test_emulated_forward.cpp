// The CUDA forward kernels, run by the emulator, against the definition in double.
#include <gtest/gtest.h>

#include <array>
#include <string>

#include "emulated_attention.h"

namespace {

using dijiang::FeatureKind;
using emulated::Call;
using emulated::error;
using emulated::State;
using oracle::Problem;

template <class T>
double tolerance() {
  // The output's own rounding, and float sums.
  return std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, __half> ? 8e-4 : 5e-3;
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  p.fill(seed, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  Call<T> call(p);
  State<T> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  EXPECT_LT(error(emulated::widen(call.out), want.out), tolerance<T>());
  if (p.normalize) {
    for (const auto& s : p.sequences()) {
      for (int h = 0; h < p.heads; ++h) {
        for (int t = s[1]; t < s[2]; ++t) {
          const int64_t row = p.row(h, p.heads, s[0], t);
          if (want.log_sum[row] == INFINITY) {
            EXPECT_EQ(call.row_sum[row], INFINITY);
            continue;
          }
          const double got = (std::log2(call.row_sum[row]) + call.row_scale[row]) * std::log(2.0);
          EXPECT_GE(call.row_sum[row], 1.0f);
          EXPECT_LT(call.row_sum[row], 2.0f);
          EXPECT_NEAR(got, want.log_sum[row], 100 * tolerance<float>() + tolerance<T>());
        }
      }
    }
  }
  EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), tolerance<T>());
  EXPECT_LT(error(state.true_z(), want.z), tolerance<T>());
}

std::string name(const Problem& p) {
  return "kind " + std::to_string(int(p.kind)) + " window " + std::to_string(p.window) + " sinks " +
         std::to_string(p.sinks) + " decay " + std::to_string(p.decay) + " seqlen " +
         std::to_string(p.seqlen) + " normalize " + std::to_string(p.normalize);
}

template <class T>
void check_grid() {
  for (const FeatureKind kind :
       {FeatureKind::kGiven, FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const int window : {0, 1, 5, 16, 64, 70}) {
      for (const bool decay : {false, true}) {
        Problem p;
        p.kind = kind;
        p.window = window;
        p.decay = decay;
        p.sinks = window % 2 == 0 ? 3 : 0;
        p.seqlen = window >= 64 ? 3 * window + 10 : 75;
        SCOPED_TRACE(name(p));
        check<T>(p);
      }
    }
  }
}

TEST(EmulatedForward, Float) { check_grid<float>(); }
TEST(EmulatedForward, BFloat16) { check_grid<__nv_bfloat16>(); }
TEST(EmulatedForward, Half) { check_grid<__half>(); }

TEST(EmulatedForward, HardKeys) {
  for (Problem p : oracle::hard_key_problems()) {
    SCOPED_TRACE(name(p));
    check<float>(p);
    p.decay = true;
    check<float>(p);
    check<__nv_bfloat16>(p);
    p.features = 0;
    p.decay = false;
    check<__half>(p);
  }
}

TEST(EmulatedForward, Shapes) {
  for (const int dim_v : {3, 80, 200}) {
    Problem p;
    p.heads = 4;
    p.kv_heads = 2;
    p.batch = 2;
    p.seqlen = 70;
    p.dim = 33;
    p.dim_v = dim_v;
    p.features = 70;
    p.window = 16;
    SCOPED_TRACE(dim_v);
    check<float>(p);
    p.window = 0;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedForward, NoFeatures) {
  Problem p;
  p.features = 0;
  p.window = 16;
  p.sinks = 4;
  check<float>(p);
  p.window = 0;
  check<float>(p);
}

TEST(EmulatedForward, NotNormalizedAndEps) {
  Problem p;
  p.normalize = false;
  check<float>(p);
  p.window = 16;
  check<float>(p);
  p.normalize = true;
  p.eps = 0.5;
  check<float>(p);
}

TEST(EmulatedForward, PackedAndPadded) {
  for (const int window : {0, 5, 64}) {
    Problem p;
    p.batch = 2;
    p.seqlen = 150;
    p.window = window;
    p.sinks = 2;
    p.decay = true;
    p.segments = {{0, 0, 1}, {0, 1, 100}, {0, 100, 100}, {1, 7, 140}};
    SCOPED_TRACE(name(p));
    check<float>(p);
  }
}

template <class T>
void check_split(Problem p, const std::vector<int>& cuts, bool update_rest) {
  p.fill(3, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  Call<T> call(p);
  State<T> state(p);
  ASSERT_EQ(call.forward_parts(cuts, state), cudaSuccess);
  if (update_rest) {
    for (int t = cuts.empty() ? 0 : cuts.back(); t < p.seqlen; ++t) {
      ASSERT_EQ(call.update(t, state), cudaSuccess);
    }
  }
  EXPECT_LT(error(emulated::widen(call.out), want.out), tolerance<T>());
  EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), tolerance<T>());
  EXPECT_LT(error(state.true_z(), want.z), tolerance<T>());
  for (const int64_t length : state.length) EXPECT_EQ(length, p.seqlen);
}

TEST(EmulatedForward, SplitAnywhereWithCarriedState) {
  for (const int window : {0, 1, 5, 16, 64}) {
    for (const int sinks : {0, 7}) {
      Problem p;
      p.batch = 2;
      p.seqlen = window == 64 ? 200 : 90;
      p.window = window;
      p.sinks = sinks;
      p.decay = true;
      SCOPED_TRACE(name(p));
      const int n = p.seqlen;
      check_split<float>(p, {1, 2, 2, 10, 11, 64, 65, 80, n}, false);
      p.decay = false;
      p.kind = FeatureKind::kGiven;
      check_split<float>(p, {15, 16, n}, false);
      check_split<__nv_bfloat16>(p, {32, 48, n}, false);
    }
  }
}

TEST(EmulatedForward, HardKeysSplitAnywhere) {
  for (Problem p : oracle::hard_key_problems()) {
    p.decay = true;
    SCOPED_TRACE(name(p));
    const int n = p.seqlen;
    check_split<float>(p, {1, 2, 2, 10, 16, 32, 33, 48, 55, n}, false);
    check_split<__nv_bfloat16>(p, {p.window, 3 * p.window, n}, false);
    if (p.window > 16) continue;  // the emulator takes its time
    check_split<float>(p, {}, true);
    check_split<float>(p, {29}, true);
    p.decay = false;
    p.features = 0;
    check_split<__nv_bfloat16>(p, {41}, true);
  }
}

TEST(EmulatedForward, HardKeysPackedAndPadded) {
  Problem p;
  p.batch = 2;
  p.seqlen = 120;
  p.window = 8;
  p.sinks = 2;
  p.cache_size = 6;
  p.decay = true;
  p.segments = {{0, 0, 1}, {0, 1, 70}, {0, 70, 70}, {0, 70, 120}, {1, 7, 110}};
  check<float>(p);
}

// Token by token, from the start and after a prefill that ends anywhere in a block.
template <class T>
void check_updates() {
  for (const int window : {0, 1, 5, 16}) {
    for (const bool decay : {false, true}) {
      Problem p;
      p.kind = window == 5 ? FeatureKind::kSoftmax : FeatureKind::kExp;
      p.batch = 2;
      p.heads = 4;
      p.kv_heads = 2;
      p.window = window;
      p.sinks = decay ? 7 : 0;
      p.decay = decay;
      p.seqlen = 45;
      p.dim_v = 20;
      SCOPED_TRACE(name(p));
      check_split<T>(p, {}, true);
      p.kind = FeatureKind::kGiven;
      check_split<T>(p, {37}, true);
    }
  }
}

TEST(EmulatedUpdate, Float) { check_updates<float>(); }
TEST(EmulatedUpdate, BFloat16) { check_updates<__nv_bfloat16>(); }

// Rows in whole pieces, read for four query heads of a group at once; more columns than a block
// sums.
template <class T>
void check_grouped_updates() {
  for (const auto& [heads, kv_heads, dim, dim_v] :
       std::vector<std::array<int, 4>>{{3, 1, 64, 64}, {12, 2, 16, 136}, {2, 2, 40, 8}}) {
    Problem p;
    p.heads = heads;
    p.kv_heads = kv_heads;
    p.dim = dim;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    p.seqlen = 40;
    p.kind = dim == 16 ? FeatureKind::kSoftmax : FeatureKind::kExp;
    SCOPED_TRACE(name(p));
    check_split<T>(p, {33}, true);
    p.window = 6;
    p.sinks = 2;
    p.decay = true;
    p.cache_size = 5;
    check_split<T>(p, {}, true);
    p.decay = false;
    p.features = 0;
    check_split<T>(p, {21}, true);
  }
}
TEST(EmulatedUpdate, GroupsInPieces) {
  check_grouped_updates<float>();
  check_grouped_updates<__nv_bfloat16>();
  check_grouped_updates<__half>();
}

TEST(EmulatedUpdate, WideValuesEluAndNoFeatures) {
  Problem p;
  p.kind = FeatureKind::kElu;
  p.dim_v = 300;
  p.seqlen = 20;
  p.window = 4;
  check_split<float>(p, {3}, true);
  p.features = 0;
  p.sinks = 2;
  check_split<float>(p, {3}, true);
}

// Far weights that decay has made as nothing must not bury the near ones.
TEST(EmulatedForward, StrongDecay) {
  for (const int window : {0, 5, 16}) {
    Problem p;
    p.window = window;
    p.decay = true;
    p.seqlen = 90;
    p.fill(4, emulated::round_to<float>);
    for (size_t t = 0; t < p.log_decay.size(); ++t) {
      if (t % 11 == 5) p.log_decay[t] = float(-300.0);
      if (t % 11 == 6) p.log_decay[t] = float(-90.0);
    }
    for (double& x : p.weight_k) x += 200.0;  // far above the near scores, before decay
    const oracle::Result want = oracle::run(p, false);
    SCOPED_TRACE(name(p));
    Call<float> call(p);
    ASSERT_EQ(call.forward(), cudaSuccess);
    EXPECT_LT(error(emulated::widen(call.out), want.out), 3e-5);
    Call<float> steps(p);
    State<float> state(p);
    for (int t = 0; t < p.seqlen; ++t) ASSERT_EQ(steps.update(t, state), cudaSuccess);
    EXPECT_LT(error(emulated::widen(steps.out), want.out), 3e-5);
  }
}

// A mild decay again and again, with keys too small to set a new maximum: nothing may pile up.
TEST(EmulatedForward, MildDecayForEver) {
  Problem p;
  p.kind = FeatureKind::kGiven;
  p.dim = 8;
  p.dim_v = 4;
  p.decay = true;
  p.seqlen = 700;
  p.fill(11, emulated::round_to<float>);
  for (double& x : p.log_decay) x = float(-0.003);
  for (size_t i = p.dim; i < p.k.size(); ++i) p.k[i] *= std::ldexp(1.0, -100);
  const oracle::Result want = oracle::run(p, false);
  Call<float> whole(p);
  State<float> final_state(p);
  ASSERT_EQ(whole.forward(&final_state), cudaSuccess);
  EXPECT_LT(error(emulated::widen(whole.out), want.out), 2e-5);
  Call<float> steps(p), calls(p);
  State<float> updated(p), carried(p);
  for (int t = 0; t < p.seqlen; ++t) {
    ASSERT_EQ(steps.update(t, updated), cudaSuccess);
    State<float> next(p);
    ASSERT_EQ(calls.forward_part(t, t + 1, carried, next), cudaSuccess);
    carried = next;
  }
  EXPECT_LT(error(emulated::widen(steps.out), want.out), 1e-4);  // 700 roundings of the state
  EXPECT_LT(error(emulated::widen(calls.out), want.out), 1e-4);
  for (const State<float>* state : {&final_state, &updated, &carried}) {
    EXPECT_LT(error(state->true_kv(p.dim_v), want.kv), 1e-4);
    for (const float x : state->z) EXPECT_LT(x, 4.0f);
  }
}

// 2^60 and more between the features of one chunk: rows before the largest key are exact.
TEST(EmulatedForward, ExactRows) {
  for (const bool decay : {false, true}) {
    for (const int window : {0, 5}) {
      Problem p;
      p.decay = decay;
      p.window = window;
      p.size = 30.0;
      p.beta = false;
      p.seqlen = 80;
      SCOPED_TRACE(name(p));
      p.fill(5, emulated::round_to<float>);
      const oracle::Result want = oracle::run(p, false);
      Call<float> call(p);
      ASSERT_EQ(call.forward(), cudaSuccess);
      // Exponents of a few hundred carry fewer bits behind the point.
      EXPECT_LT(error(emulated::widen(call.out), want.out), 3e-4);
      if (window > 0) continue;
      p.kind = FeatureKind::kGiven;
      p.fill(6, emulated::round_to<float>);
      for (size_t i = 0; i < p.k.size(); ++i)
        p.k[i] *= std::ldexp(1.0, int(i / p.dim % 80) * 3 - 120);
      for (size_t i = 0; i < p.q.size(); ++i) p.q[i] *= std::ldexp(1.0, int(i * 7 % 100) - 50);
      Call<float> given(p);
      ASSERT_EQ(given.forward(), cudaSuccess);
      EXPECT_LT(error(emulated::widen(given.out), oracle::run(p, false).out), 2e-5);
    }
  }
}

TEST(EmulatedForward, ExtremesStayFinite) {
  for (const FeatureKind kind :
       {FeatureKind::kGiven, FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const int window : {0, 16}) {
      Problem p;
      p.kind = kind;
      p.window = window;
      p.size = 1e4;
      p.seqlen = 90;
      p.fill(7, emulated::round_to<__nv_bfloat16>);
      Call<__nv_bfloat16> call(p);
      ASSERT_EQ(call.forward(), cudaSuccess);
      for (const double x : emulated::widen(call.out)) ASSERT_TRUE(std::fabs(x) < 10.0);
    }
  }
}

// No bit of an output depends on a later token.
TEST(EmulatedForward, FutureChangesNothing) {
  for (const int window : {0, 5, 16}) {
    for (const double size : {1.0, 20.0}) {
      Problem p;
      p.window = window;
      p.cache_size = window == 5 ? 4 : 0;
      p.decay = true;
      p.seqlen = 75;
      p.size = size;
      p.fill(8, emulated::round_to<float>);
      Call<float> call(p);
      ASSERT_EQ(call.forward(), cudaSuccess);
      Problem changed = p;
      const int from = 40;
      for (int t = from; t < p.seqlen; ++t) {
        for (int j = 0; j < p.dim; ++j) changed.k[t * p.dim + j] = -9.0 * p.k[t * p.dim + j];
      }
      Call<float> other(changed);
      ASSERT_EQ(other.forward(), cudaSuccess);
      for (int h = 0; h < p.heads; ++h) {
        for (int i = 0; i < from * p.dim_v; ++i) {
          const int64_t at = p.row(h, p.heads, 0, 0) * p.dim_v + i;
          ASSERT_EQ(call.out[at], other.out[at]) << "window " << window << " size " << size;
        }
      }
    }
  }
}

// A race would make results depend on the order in which threads run.
TEST(EmulatedForward, OrderOfThreadsChangesNothing) {
  for (const auto& [window, cache_size] : std::vector<std::array<int, 2>>{{0, 0}, {5, 0}, {5, 6}}) {
    Problem p;
    p.window = window;
    p.cache_size = cache_size;
    p.sinks = 2;
    p.decay = true;
    p.size = cache_size > 0 ? 1.0 : 20.0;
    p.seqlen = 70;
    p.dim_v = 80;
    p.fill(9, emulated::round_to<__nv_bfloat16>);
    emulated::expect_same_in_any_order([&] {
      Call<__nv_bfloat16> call(p);
      State<__nv_bfloat16> state(p);
      EXPECT_EQ(call.forward(&state), cudaSuccess);
      auto all = emulated::widen(call.out);
      all.insert(all.end(), state.kv.begin(), state.kv.end());
      all.insert(all.end(), state.votes.begin(), state.votes.end());
      for (int t = 30; t < 70 && !state.votes.empty(); ++t) call.update(t, state);
      const auto updated = emulated::widen(call.out);
      all.insert(all.end(), updated.begin(), updated.end());
      return all;
    });
  }
}

}  // namespace
