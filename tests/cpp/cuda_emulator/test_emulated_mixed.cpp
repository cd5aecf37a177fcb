// The fused forward of far keys beside near ones, run by the emulator, against the definition in
// double and against the other path.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <string>

#include "cuda/fused_mixed.h"
#include "emulated_device.h"

namespace {

using dijiang::FeatureKind;
using emulated::Call;
using emulated::Device;
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
constexpr double kTolerance = std::is_same_v<T, __half> ? 8e-4 : 7e-3;
template <class T>
constexpr double kSumTolerance = std::is_same_v<T, __half> ? 1e-4 : 8e-3;
template <class T>
constexpr double kStateTolerance = std::is_same_v<T, __half> ? 1e-4 : 6e-3;

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

// Far keys weigh about as much as near ones: neither hides the other.
template <class T>
void fill(Problem& p, unsigned seed) {
  p.fill(seed, emulated::round_to<T>);
  const double more = p.kind == FeatureKind::kSoftmax ? 4.0
                      : p.kind == FeatureKind::kExp   ? -9.0
                                                      : -4.0;
  for (double& x : p.weight_q) x = float(x + more);
}

// Of the rows that have far keys, which are smaller than the first ones: the error against the
// largest of them alone.
template <class T>
double far_error(const Problem& p, const Call<T>& call, const oracle::Result& want) {
  std::vector<double> got, wanted;
  for (const auto& s : p.sequences()) {
    for (int h = 0; h < p.heads; ++h) {
      for (int t = s[1] + 2 * p.window; t < s[2]; ++t) {
        const int64_t row = p.row(h, p.heads, s[0], t) * p.dim_v;
        for (int j = 0; j < p.dim_v; ++j) {
          got.push_back(emulated::Traits<T>::widen(call.out[row + j]));
          wanted.push_back(want.out[row + j]);
        }
      }
    }
  }
  return error(got, wanted);
}

// The largest error of log row_sum.
template <class T>
double sum_error(const Problem& p, const Call<T>& call, const oracle::Result& want) {
  double most = 0.0;
  for (const auto& s : p.sequences()) {
    for (int h = 0; h < p.heads && p.normalize; ++h) {
      for (int t = s[1]; t < s[2]; ++t) {
        const int64_t row = p.row(h, p.heads, s[0], t);
        EXPECT_GE(call.row_sum[row], 1.0f);
        EXPECT_LT(call.row_sum[row], 2.0f);
        const double got = (std::log2(call.row_sum[row]) + call.row_scale[row]) * std::log(2.0);
        most = std::fmax(most, std::fabs(got - want.log_sum[row]));
      }
    }
  }
  return most;
}

// Outputs, statistics and final state of what has run.
template <class T>
void compare(const Problem& p, const Call<T>& call, const State<T>& state,
             const oracle::Result& want) {
  const double out = error(emulated::widen(call.out), want.out), far = far_error(p, call, want);
  const double sum = sum_error(p, call, want);
  const double kv = error(state.true_kv(p.dim_v), want.kv), z = error(state.true_z(), want.z);
  EXPECT_LT(out, kTolerance<T>);
  EXPECT_LT(far, kTolerance<T>);
  EXPECT_LT(sum, kSumTolerance<T>);
  EXPECT_LT(kv, kStateTolerance<T>);
  EXPECT_LT(z, kStateTolerance<T>);
  if (std::getenv("DIJIANG_TEST_ERRORS")) {
    std::printf("%s: out %.2e far %.2e log sum %.2e kv %.2e z %.2e\n", name(p).c_str(), out, far,
                sum, kv, z);
  }
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  SCOPED_TRACE(name(p));
  fill<T>(p, seed);
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

// The other tests would see little of far keys that weigh nothing.
TEST(EmulatedMixed, BothKindsOfKeysWeigh) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    Problem p = problem(330, 64, 4);
    p.kind = kind;
    fill<__half>(p, 1);
    const oracle::Result all = oracle::run(p, false);
    p.features = 0;
    const oracle::Result near = oracle::run(p, false);
    double share = 0.0;
    const int rows = p.seqlen - 2 * p.window;
    for (int t = 2 * p.window; t < p.seqlen; ++t) {
      share += std::exp(near.log_sum[t] - all.log_sum[t]) / rows;
    }
    EXPECT_GT(share, 0.2) << int(kind);
    EXPECT_LT(share, 0.8) << int(kind);
  }
}

// Tiles that end in none; chunks of several tiles, of the queries and of what they fold; more sinks
// than a tile; slots that fill up at once, late and never.
template <class T>
void check_windows() {
  for (const auto& [window, sinks, cache_size, seqlen] :
       std::vector<std::array<int, 4>>{{64, 0, 0, 64},
                                       {64, 0, 0, 193},
                                       {64, 70, 0, 290},
                                       {80, 4, 0, 400},
                                       {128, 0, 0, 500},
                                       {130, 140, 0, 600},
                                       {64, 70, 40, 300},
                                       {16, 0, 9, 150},
                                       {32, 4, 70, 230},
                                       {32, 70, 5, 200},
                                       {5, 2, 3, 60},
                                       {100, 4, 30, 500}}) {
    for (const bool decay : {false, true}) {
      Problem p = problem(seqlen, window, sinks, cache_size);
      p.decay = decay;
      check<T>(p);
    }
  }
}
TEST(EmulatedMixed, WindowsBFloat16) { check_windows<__nv_bfloat16>(); }
TEST(EmulatedMixed, WindowsHalf) { check_windows<__half>(); }

TEST(EmulatedMixed, Sizes) {
  const Device device(1);
  for (const auto& [dim, dim_v, features] : std::vector<std::array<int, 3>>{{64, 128, 64},
                                                                            {128, 64, 64},
                                                                            {128, 128, 64},
                                                                            {64, 192, 64},
                                                                            {128, 256, 64},
                                                                            {64, 64, 128},
                                                                            {64, 128, 128},
                                                                            {128, 64, 128},
                                                                            {128, 128, 128}}) {
    for (const int cache_size : {0, 12}) {
      Problem p = problem(260, 64, 4, cache_size);
      p.dim = dim;
      p.dim_v = dim_v;
      p.features = features;
      p.scale = 1.0 / std::sqrt(dim);
      p.decay = cache_size > 0;
      check<__nv_bfloat16>(p);
      if (features == 64) check<__half>(p);
    }
  }
}

// Sizes between those of tiles: columns and features that are not there count nothing.
TEST(EmulatedMixed, SizesBetween) {
  for (const int multiprocessors : {1, 64}) {  // in one part and in several
    const Device device(multiprocessors);
    for (const auto& [dim, dim_v, features] : std::vector<std::array<int, 3>>{
             {80, 80, 80}, {32, 32, 32}, {96, 40, 96}, {8, 200, 1}, {120, 136, 63}}) {
      const bool parts = multiprocessors > 1;
      Problem p = problem(parts ? 1700 : 260, 64, 4, dim == 96 ? 0 : 12);
      p.resize(dim, features, dim_v);
      p.heads = parts ? 1 : 2;
      p.kv_heads = 1;
      emulated::check_kinds_of(p, [parts](const Problem& of_kind) {
        if (parts && of_kind.decay != (of_kind.dim == 32)) return;  // long
        check<__nv_bfloat16>(of_kind);
        EXPECT_EQ(ran("fold_parts"), parts);
        const bool in_one = of_kind.features <= 64;
        if (in_one || of_kind.kind != FeatureKind::kSoftmax) check<__half>(of_kind);
      });
    }
  }
}

// More features than a tile has, in slices of 64 or 128.
TEST(EmulatedMixed, Slices) {
  for (const int multiprocessors : {1, 64}) {  // in one part and in several
    const bool parts = multiprocessors > 1;
    const Device device(multiprocessors);
    for (const auto& [dim, dim_v, features] : std::vector<std::array<int, 3>>{
             {64, 64, 256}, {64, 128, 150}, {128, 128, 384}, {80, 200, 129}, {256, 256, 100}}) {
      if (parts && dim_v > 128) continue;  // long
      for (const bool decay : {false, true}) {
        Problem p = problem(parts ? 1700 : 260, 64, 4, decay ? 12 : 0);
        p.resize(dim, features, dim_v);
        p.heads = parts ? 1 : 2;
        p.kv_heads = 1;
        p.kind = decay ? FeatureKind::kElu : FeatureKind::kExp;
        p.decay = decay;
        check<__nv_bfloat16>(p);
        if (features < 200) check<__half>(p);
      }
    }
  }
}

// Where multiprocessors would idle a sequence is cut into parts, whose number they decide.
template <class T>
void check_parts(Problem p, int multiprocessors) {
  const Device device(multiprocessors);
  check<T>(p);
  EXPECT_TRUE(ran("fold_parts"));
}
TEST(EmulatedMixed, WalksInParts) {
  for (const bool decay : {false, true}) {
    Problem p = problem(600, 16, 4, 20);
    p.heads = 1;
    p.decay = decay;
    check_parts<__nv_bfloat16>(p, 2);
    check_parts<__half>(p, 1000);
    p.dim_v = 128;
    p.segments = {{0, 0, 1}, {0, 1, 70}, {0, 80, 600}};
    check_parts<__half>(p, 1000);
    p = problem(1500, 64, 4);
    p.heads = 1;
    p.decay = decay;
    check_parts<__nv_bfloat16>(p, 1000);
    check_parts<__half>(p, 1000);
  }
}

TEST(EmulatedMixed, GroupedQueries) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{8, 2}, {3, 1}, {4, 4}}) {
    Problem p = problem(230, 64, 3);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check<__nv_bfloat16>(p);
    p.window = 16;
    p.decay = true;
    p.cache_sizes.assign(kv_heads, 7);
    if (kv_heads > 1) p.cache_sizes[0] = 0;
    check<__half>(p);
  }
}

TEST(EmulatedMixed, NotNormalizedAndEps) {
  for (const bool decay : {false, true}) {
    Problem p = problem(260, 64, 2);
    p.decay = decay;
    p.size = 0.3;  // sums that float16 holds
    p.normalize = false;
    check<__nv_bfloat16>(p);
    check<__half>(p);
    p.size = 1.0;
    p.normalize = true;
    p.eps = 40.0;
    check<__nv_bfloat16>(p);
    check<__half>(p);
    p.eps = 0.0;
    p.beta = p.log_weight = false;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedMixed, PackedAndPadded) {
  for (const bool decay : {false, true}) {
    Problem p = problem(450, 64, 2);
    p.batch = 2;
    p.decay = decay;
    p.segments = {{0, 0, 1}, {0, 1, 300}, {0, 300, 300}, {0, 310, 450}, {1, 7, 240}};
    check<__nv_bfloat16>(p);
    check<__half>(p);
    p.cache_size = 6;
    check<__half>(p);
    p.window = 16;
    check<__nv_bfloat16>(p);
  }
}

// A table given, not chosen: as the backward's second forward has it.
TEST(EmulatedMixed, GivenTable) {
  Problem p = problem(200, 16, 3, 20);
  fill<__half>(p, 1);
  Call<__half> chooses(p, 1), given(p, 1);
  emulated::choose_and_give(chooses, given);
  expect_fused();
  EXPECT_FALSE(ran("choose_hard_keys"));
  for (size_t i = 0; i < chooses.out.size(); ++i) {
    ASSERT_EQ(chooses.out[i].bits, given.out[i].bits);
  }
  EXPECT_LT(error(emulated::widen(given.out), oracle::run(p, false).out), kTolerance<__half>);
}

// --- given states --------------------------------------------------------------------------------

// Calls behind one another equal one: keys to fold lie in window buffers, in slots and in the call.
template <class T>
void check_split(Problem p, const std::vector<int>& cuts, int multiprocessors = 1) {
  SCOPED_TRACE(name(p));
  fill<T>(p, 3);
  const oracle::Result want = oracle::run(p, false);
  const Device device(multiprocessors);
  Call<T> call(p, 1);
  State<T> state(p);
  ASSERT_EQ(call.forward_parts(cuts, state), cudaSuccess);
  expect_fused();
  EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<T>);
  EXPECT_LT(far_error(p, call, want), kTolerance<T>);
  EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kStateTolerance<T>);
  EXPECT_LT(error(state.true_z(), want.z), kStateTolerance<T>);
  for (const int64_t length : state.length) EXPECT_EQ(length, p.seqlen);
}

TEST(EmulatedMixed, SplitAnywhereWithCarriedState) {
  for (const bool decay : {false, true}) {
    for (const auto& [window, sinks] :
         std::vector<std::array<int, 2>>{{64, 4}, {80, 0}, {64, 70}}) {
      Problem p = problem(400, window, sinks);
      p.decay = decay;
      check_split<__nv_bfloat16>(p, {1, 10, 64, 129, 130, 200, 320, 400});
      p.features = 150;  // slices
      check_split<__half>(p, {80, 161, 400});
    }
  }
}

TEST(EmulatedMixed, HardKeysSplitAnywhere) {
  for (const bool decay : {false, true}) {
    for (const auto& [window, sinks, cache_size] :
         std::vector<std::array<int, 3>>{{16, 3, 9}, {32, 0, 70}, {70, 2, 20}}) {
      Problem p = problem(300, window, sinks, cache_size);
      p.decay = decay;
      check_split<__nv_bfloat16>(p, {1, 10, 16, 33, 48, 130, 211, 300});
      check_split<__half>(p, {4 * window, 4 * window + 1, 300});
    }
  }
}

TEST(EmulatedMixed, SplitCallsInParts) {
  for (const bool decay : {false, true}) {
    Problem p = problem(1000, 16, 3, 20);
    p.heads = 1;
    p.decay = decay;
    p.features = decay ? 150 : 64;
    check_split<__half>(p, {500, 520, 1000}, 1000);
    check_split<__nv_bfloat16>(p, {450, 1000}, 1000);
  }
}

TEST(EmulatedMixed, StateInPlace) {
  Problem p = problem(1800, 64, 4);
  p.heads = 1;
  for (const int dim_v : {64, 128}) {
    p.dim_v = dim_v;
    fill<__nv_bfloat16>(p, 3);
    const oracle::Result want = oracle::run(p, false);
    const Device device(1000);
    Call<__nv_bfloat16> call(p, 1);
    State<__nv_bfloat16> state(p);
    ASSERT_EQ(call.forward_part(0, 100, state, state), cudaSuccess);
    ASSERT_EQ(call.forward_part(100, 1800, state, state), cudaSuccess);
    EXPECT_EQ(ran("fold_states"), dim_v == 64);
    EXPECT_FALSE(ran("fold_parts"));
    EXPECT_LT(far_error(p, call, want), kTolerance<__nv_bfloat16>);
    EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kStateTolerance<__nv_bfloat16>);
  }
}

// A state that is full before the first token, and decays where nothing but sinks leaves the
// window.
TEST(EmulatedMixed, StateFromElsewhere) {
  Problem p = problem(260, 64, 140);
  p.decay = true;
  fill<__half>(p, 5);
  State<__half> from(p), fused_to(p), to(p);
  for (size_t i = 0; i < from.kv.size(); ++i) from.kv[i] = float(i % 7) - 1.0f;
  from.z.assign(from.z.size(), 3.0f);
  from.log_scale.assign(from.z.size(), 14.0f);
  forget_kernels();
  Call<__half> fused(p, 1), other(p, 2);
  ASSERT_EQ(fused.forward_part(0, 260, from, fused_to), cudaSuccess);
  expect_fused();
  ASSERT_EQ(other.forward_part(0, 260, from, to), cudaSuccess);
  EXPECT_TRUE(ran("compute_outputs"));
  EXPECT_LT(error(emulated::widen(fused.out), emulated::widen(other.out)), kTolerance<__half>);
  EXPECT_GT(error(emulated::widen(fused.out), oracle::run(p, false).out), 0.1);
  EXPECT_LT(error(fused_to.true_kv(64), to.true_kv(64)), 1e-3);
  EXPECT_LT(error(fused_to.true_z(), to.true_z()), 1e-3);
}

// The backward takes the statistics that this forward leaves; limits as in its own tests.
template <class T>
void check_gradients(Problem p) {
  SCOPED_TRACE(name(p));
  constexpr double kLimit = std::is_same_v<T, __half> ? 2e-3 : 1.2e-2;
  fill<T>(p, 6);
  const oracle::Result want = oracle::run(p, true);
  forget_kernels();
  Call<T> call(p, 1);
  const auto got = call.backward(0, p.seqlen);
  EXPECT_TRUE(ran("attend_mixed") && ran("fold_states"));
  EXPECT_LT(error(emulated::widen(got.q), want.grad_q), kLimit);
  EXPECT_LT(error(emulated::widen(got.k), want.grad_k), kLimit);
  EXPECT_LT(error(emulated::widen(got.v), want.grad_v), kLimit);
  EXPECT_LT(error(emulated::widen(got.omega_q), want.grad_omega_q), kLimit);
  EXPECT_LT(error(emulated::widen(got.omega_k), want.grad_omega_k), kLimit);
}
TEST(EmulatedMixed, GradientsAfterIt) {
  for (const auto& [window, sinks, cache_size] :
       std::vector<std::array<int, 3>>{{64, 4, 0}, {16, 2, 9}}) {
    Problem p = problem(200, window, sinks, cache_size);
    p.decay = cache_size > 0;
    check_gradients<__nv_bfloat16>(p);
    check_gradients<__half>(p);
  }
}

// --- what inputs may be --------------------------------------------------------------------------

// A row's largest term may be near or far, and the other kind vanish beside it.
TEST(EmulatedMixed, LargeExponents) {
  for (const bool decay : {false, true}) {
    Problem p = problem(260, 64, 3);
    p.decay = decay;
    p.size = 6.0;
    check<__half>(p);
    for (const double weight : {-200.0, 200.0}) {
      p.fill(4, emulated::round_to<__half>);
      for (double& x : p.weight_q) x = float(x + weight);
      const oracle::Result want = oracle::run(p, false);
      forget_kernels();
      Call<__half> call(p, 1);
      ASSERT_EQ(call.forward(), cudaSuccess);
      expect_fused();
      EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__half>);
      EXPECT_LT(sum_error(p, call, want), kSumTolerance<__half>);
    }
  }
}

TEST(EmulatedMixed, StrongDecay) {
  for (const int cache_size : {0, 10}) {
    Problem p = problem(330, 64, 3, cache_size);
    p.decay = true;
    fill<__nv_bfloat16>(p, 4);
    for (size_t t = 0; t < p.log_decay.size(); ++t) {
      if (t % 97 == 5) p.log_decay[t] = float(-300.0);
      if (t % 129 == 6) p.log_decay[t] = -INFINITY;
      if (t % 71 == 6) p.log_decay[t] = float(-20.0);
    }
    forget_kernels();
    Call<__nv_bfloat16> call(p, 1);
    ASSERT_EQ(call.forward(), cudaSuccess);
    expect_fused();
    for (double& x : p.log_decay) x = std::fmax(x, -1e9);
    const oracle::Result want = oracle::run(p, false);
    EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__nv_bfloat16>);
    EXPECT_LT(far_error(p, call, want), kTolerance<__nv_bfloat16>);
    EXPECT_LT(sum_error(p, call, want), kSumTolerance<__nv_bfloat16>);
  }
}

TEST(EmulatedMixed, MildDecayForEver) {
  Problem p = problem(900, 64, 0);
  p.heads = 1;
  p.decay = true;
  fill<__half>(p, 11);
  for (double& x : p.log_decay) x = float(-0.003);
  for (double& x : p.k) x = emulated::round_to<__half>(x * 0.01);  // no key sets a new maximum
  forget_kernels();
  Call<__half> call(p, 1);
  State<__half> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  expect_fused();
  compare(p, call, state, oracle::run(p, false));
  for (const float x : state.z) EXPECT_LT(x, 1000.0f);  // each key adds up to 1
}

// What decay has made as nothing, between parts of a walk.
TEST(EmulatedMixed, StrongDecayBetweenParts) {
  Problem p = problem(600, 16, 0, 10);
  p.heads = 1;
  p.decay = true;
  fill<__half>(p, 4);
  for (size_t t = 0; t < p.log_decay.size(); ++t) {
    p.log_decay[t] = t % 40 == 5 ? -200.0f : t % 7 == 0 ? -4.0f : -0.001f;
  }
  const Device device(1000);
  Call<__half> call(p, 1);
  State<__half> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  expect_fused();
  EXPECT_TRUE(ran("fold_parts"));
  compare(p, call, state, oracle::run(p, false));
}

template <class T>
void check_extremes(FeatureKind kind, double size) {
  Problem p = problem(210, 64, 3);
  p.kind = kind;
  p.size = size;
  p.decay = size == 100.0;
  p.fill(7, emulated::round_to<T>);
  Call<T> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  for (const double x : emulated::widen(call.out)) ASSERT_TRUE(std::fabs(x) < 10.0) << size;
}
TEST(EmulatedMixed, ExtremesStayFinite) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const double size : {100.0, 1e4}) {
      check_extremes<__nv_bfloat16>(kind, size);
      check_extremes<__half>(kind, size);
    }
  }
}

// float16's ends: values near its largest number, and parameters beyond it.
TEST(EmulatedMixed, HalfRange) {
  Problem p = problem(210, 64, 2);
  fill<__half>(p, 12);
  for (double& x : p.v) x = emulated::round_to<__half>(x * 12000.0);
  for (double& x : p.q) x = emulated::round_to<__half>(x * std::ldexp(1.0, -8));
  for (double& x : p.omega_q) x *= std::ldexp(1.0, 18 - 10);
  for (double& x : p.beta_q) x = 0.0;
  const oracle::Result want = oracle::run(p, false);
  Call<__half> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__half>);
  EXPECT_LT(far_error(p, call, want), kTolerance<__half>);
}

// --- causality, races, the choice of path --------------------------------------------------------

// No bit of an output depends on a later token, nor on whether there is one.
template <class T>
void check_future(const Problem& base) {
  SCOPED_TRACE(name(base));
  Problem p = base;
  fill<T>(p, 8);
  Call<T> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  for (const int from : {75, 150, 193}) {
    const auto expect_same = [&](const Problem& changed, const std::string& how) {
      forget_kernels();
      Call<T> other(changed, 1);
      ASSERT_EQ(other.forward(), cudaSuccess);
      expect_fused();
      for (int h = 0; h < p.heads; ++h) {
        for (int t = 0; t < from; ++t) {
          const int64_t row = p.row(h, p.heads, 0, t);
          for (int j = 0; j < p.dim_v; ++j) {
            ASSERT_EQ(call.out[row * p.dim_v + j].bits, other.out[row * p.dim_v + j].bits)
                << how << " from " << from << ", row " << t << " column " << j;
          }
          ASSERT_EQ(call.row_scale[row], other.row_scale[row]);
          ASSERT_EQ(call.row_sum[row], other.row_sum[row]);
        }
      }
    };
    for (const double factor : {-9.0, double(NAN), double(INFINITY)}) {
      Problem changed = p;
      for (int t = from; t < p.seqlen; ++t) {
        for (int j = 0; j < 64; ++j) {
          changed.k[t * 64 + j] *= factor;
          changed.v[t * 64 + j] *= factor;
          for (int h = 0; h < p.heads; ++h) changed.q[p.row(h, p.heads, 0, t) * 64 + j] *= factor;
        }
        if (p.decay) changed.log_decay[t] *= 50.0;
      }
      expect_same(changed, "times " + std::to_string(factor));
    }
    Problem shorter = p;
    shorter.segments = {{0, 0, from}};
    expect_same(shorter, "shorter");
  }
}
TEST(EmulatedMixed, FutureChangesNothing) {
  for (const bool decay : {false, true}) {
    for (const auto& [window, sinks, cache_size] :
         std::vector<std::array<int, 3>>{{64, 4, 0}, {70, 70, 0}, {16, 3, 20}}) {
      Problem p = problem(230, window, sinks, cache_size);
      p.decay = decay;
      check_future<__nv_bfloat16>(p);
      check_future<__half>(p);
    }
  }
}

TEST(EmulatedMixed, OrderOfThreadsChangesNothing) {
  for (const auto& [window, sinks, cache_size] :
       std::vector<std::array<int, 3>>{{64, 4, 0}, {130, 0, 0}, {16, 3, 40}}) {
    Problem p = problem(420, window, sinks, cache_size);
    p.heads = 1;
    p.decay = cache_size > 0;
    p.dim_v = 128;
    fill<__nv_bfloat16>(p, 9);
    emulated::expect_same_in_any_order([&] {
      const Device device(cache_size > 0 ? 1000 : 1);
      Call<__nv_bfloat16> call(p, 1);
      State<__nv_bfloat16> state(p);
      EXPECT_EQ(call.forward(&state), cudaSuccess);
      expect_fused();
      EXPECT_EQ(ran("fold_parts"), cache_size > 0);
      auto all = emulated::widen(call.out);
      all.insert(all.end(), call.row_scale.begin(), call.row_scale.end());
      all.insert(all.end(), call.row_sum.begin(), call.row_sum.end());
      all.insert(all.end(), state.kv.begin(), state.kv.end());
      all.insert(all.end(), state.z.begin(), state.z.end());
      return all;
    });
  }
}

TEST(EmulatedMixed, BothPathsAgree) {
  for (const int cache_size : {0, 20}) {
    Problem p = problem(260, 64, 3, cache_size);
    p.decay = true;
    fill<__nv_bfloat16>(p, 10);
    const oracle::Result want = oracle::run(p, false);
    forget_kernels();
    Call<__nv_bfloat16> fused(p, 1), other(p, 2);  // rows that asynchronous copies cannot take
    State<__nv_bfloat16> state(p), other_state(p);
    ASSERT_EQ(fused.forward(&state), cudaSuccess);
    expect_fused();
    forget_kernels();
    ASSERT_EQ(other.forward(&other_state), cudaSuccess);
    EXPECT_FALSE(ran("attend_mixed") || ran("fold_states"));
    EXPECT_TRUE(ran("compute_outputs"));
    compare(p, fused, state, want);
    compare(p, other, other_state, want);
    EXPECT_EQ(state.cache_position, other_state.cache_position);
    EXPECT_EQ(state.length, other_state.length);
  }
}

TEST(EmulatedMixed, AppliesWhereItShould) {
  const Device device(1);
  Problem p = problem(20, 64, 4);
  p.fill(1, emulated::round_to<__half>);
  Call<__half> call(p, 1);
  State<__half> state(p);
  const auto applies = [&](const std::function<void(dijiang::LinearAttentionParams&)>& change) {
    dijiang::LinearAttentionParams a = call.params();
    a.initial = state.pointers();
    change(a);
    return dijiang::cuda::fused_mixed_applies(a);
  };
  using Params = dijiang::LinearAttentionParams;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_TRUE(applies([](Params& a) { a.sinks = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 128; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 192; }));
  EXPECT_TRUE(applies([](Params& a) { a.window = 200; }));
  EXPECT_FALSE(applies([](Params& a) { a.window = 63; }));
  EXPECT_FALSE(applies([](Params& a) { a.window = 0; }));
  EXPECT_TRUE(applies([](Params& a) {
    a.window = 16;
    a.cache.most = 3;
  }));
  EXPECT_FALSE(applies([](Params& a) { a.num_features = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 17; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 96; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 500; }));
  EXPECT_FALSE(applies([](Params& a) {
    a.num_features = 96;
    a.kind = FeatureKind::kSoftmax;
  }));
  EXPECT_FALSE(applies([](Params& a) { a.kind = FeatureKind::kGiven; }));
  EXPECT_FALSE(applies([](Params& a) { a.dtype = dijiang::DType::kFloat32; }));
  EXPECT_FALSE(applies([](Params& a) { a.num_heads = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 80; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 80; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 76; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 136; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 264; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 76; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 0; }));
  EXPECT_FALSE(applies([](Params& a) { a.q.stride_seq += 4; }));
  EXPECT_FALSE(applies([](Params& a) { a.v.stride_dim = 2; }));
  EXPECT_FALSE(applies([](Params& a) { a.k.data = static_cast<const char*>(a.k.data) + 8; }));
  EXPECT_FALSE(applies([](Params& a) { a.out = static_cast<char*>(a.out) + 8; }));
  EXPECT_FALSE(
      applies([](Params& a) { a.initial.sink_k = static_cast<char*>(a.initial.sink_k) + 2; }));
  const Device small(1, 48 * 1024);
  EXPECT_FALSE(applies([](Params&) {}));
}

// No features of any token, and states of 16 bits.
TEST(EmulatedMixed, WorkspaceIsSmall) {
  Problem p = problem(2048, 64, 4);
  p.fill(1, emulated::round_to<__nv_bfloat16>);
  Call<__nv_bfloat16> call(p, 1), other(p, 2);
  const auto bytes = [](Call<__nv_bfloat16>& x) {
    return dijiang::cuda::linear_attention_forward_workspace(x.params());
  };
  const size_t states = (2048 / 64 + 2) * 64 * (2 * 64 + 2 * 4);
  EXPECT_LT(bytes(call), states + 100 * 1024);
  EXPECT_GT(bytes(other), 5 * states);
}

}  // namespace
