// The fused forward of near keys alone, run by the emulator, against the definition in double and
// against the other path.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <string>

#include "cuda/fused_near.h"
#include "emulated_attention.h"

namespace {

using emulated::Call;
using emulated::error;
using emulated::forget_kernels;
using emulated::ran;
using emulated::State;
using oracle::Problem;

void expect_fused() {
  EXPECT_TRUE(ran("attend_near"));
  EXPECT_FALSE(ran("find_row_scales") || ran("compute_outputs"));
  EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
}

// The roundings of weights and output: plain PyTorch at the dtype is as far off (docs/cuda.md).
template <class T>
constexpr double kTolerance = std::is_same_v<T, __half> ? 8e-4 : 5e-3;
constexpr double kSumTolerance = 1e-4;  // weights are float there

Problem problem(int seqlen, int window, int sinks) {
  Problem p;
  p.batch = 2;
  p.seqlen = seqlen;
  p.dim = p.dim_v = 64;
  p.features = 0;
  p.scale = 0.125;
  p.window = window;
  p.sinks = sinks;
  return p;
}

std::string name(const Problem& p) {
  return "window " + std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " slots " +
         std::to_string(p.cache().most) + " seqlen " + std::to_string(p.seqlen) + " heads " +
         std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) + " dims " +
         std::to_string(p.dim) + ", " + std::to_string(p.dim_v) + " normalize " +
         std::to_string(p.normalize) + " eps " + std::to_string(p.eps);
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  SCOPED_TRACE(name(p));
  p.fill(seed, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  forget_kernels();
  Call<T> call(p, 1);
  State<T> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  expect_fused();
  const double e = error(emulated::widen(call.out), want.out);
  EXPECT_LT(e, kTolerance<T>);
  if (std::getenv("DIJIANG_TEST_ERRORS")) std::printf("%s: out %.2e\n", name(p).c_str(), e);
  const auto sequences = p.sequences();
  for (size_t n = 0; n < sequences.size(); ++n) {
    const auto& s = sequences[n];
    EXPECT_EQ(state.length[n], s[2] - s[1]);
    for (int h = 0; h < p.heads; ++h) {
      for (int t = s[1]; t < s[2]; ++t) {
        const int64_t row = p.row(h, p.heads, s[0], t);
        if (!p.normalize) {
          ASSERT_EQ(call.row_sum[row], 1.0f);
          ASSERT_EQ(call.row_scale[row], 0.0f);
          continue;
        }
        const double got = (std::log2(call.row_sum[row]) + call.row_scale[row]) * std::log(2.0);
        ASSERT_GE(call.row_sum[row], 1.0f);
        ASSERT_LT(call.row_sum[row], 2.0f);
        ASSERT_NEAR(got, want.log_sum[row], kSumTolerance);
      }
    }
  }
}

// Windows below, at and above a tile, that end in none; more sinks than a tile; ends within a tile.
template <class T>
void check_windows() {
  for (const auto& [window, sinks, seqlen] : std::vector<std::array<int, 3>>{{1, 0, 70},
                                                                             {5, 4, 150},
                                                                             {16, 0, 150},
                                                                             {16, 70, 150},
                                                                             {60, 4, 250},
                                                                             {64, 0, 64},
                                                                             {64, 4, 259},
                                                                             {64, 70, 200},
                                                                             {100, 7, 330},
                                                                             {200, 130, 450},
                                                                             {0, 4, 90},
                                                                             {0, 70, 150}}) {
    check<T>(problem(seqlen, window, sinks));
  }
}
TEST(EmulatedNear, BFloat16) { check_windows<__nv_bfloat16>(); }
TEST(EmulatedNear, Half) { check_windows<__half>(); }

TEST(EmulatedNear, Sizes) {
  for (const auto& [dim, dim_v] : std::vector<std::array<int, 2>>{{64, 128},
                                                                  {128, 64},
                                                                  {128, 128},
                                                                  {64, 192},
                                                                  {128, 256},
                                                                  {80, 80},
                                                                  {32, 32},
                                                                  {96, 200},
                                                                  {8, 136},
                                                                  {120, 40},
                                                                  {256, 256},
                                                                  {200, 72}}) {
    Problem p = problem(150, 64, 4);
    p.dim = dim;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    check<__nv_bfloat16>(p);
    p.window = 20;
    check<__half>(p);
  }
}

TEST(EmulatedNear, GroupedQueries) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{8, 2}, {3, 1}, {4, 4}}) {
    Problem p = problem(100, 30, 3);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedNear, NotNormalizedAndEps) {
  for (const int window : {16, 64}) {
    Problem p = problem(100, window, 2);
    p.normalize = false;
    check<__nv_bfloat16>(p);
    p.size = 0.3;  // sums that float16 holds
    check<__half>(p);
    p.normalize = true;
    p.size = 1.0;
    p.eps = 0.5;
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

TEST(EmulatedNear, PackedAndPadded) {
  for (const int window : {5, 64}) {
    Problem p = problem(150, window, 2);
    p.segments = {{0, 0, 1}, {0, 1, 100}, {0, 100, 100}, {0, 110, 150}, {1, 7, 140}};
    check<__nv_bfloat16>(p);
    check<__half>(p);
    p.cache_size = 6;
    check<__half>(p);
  }
}

// --- hard keys, given states ---------------------------------------------------------------------

std::vector<Problem> hard_key_problems() {
  std::vector<Problem> all = oracle::hard_key_problems();
  for (Problem& p : all) {
    p.dim = p.dim_v = 64;
    p.features = 0;
    p.scale = 0.125;
  }
  return all;
}

TEST(EmulatedNear, HardKeys) {
  for (const Problem& p : hard_key_problems()) {
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

// A table given, not chosen: as the backward's second forward has it.
TEST(EmulatedNear, GivenTable) {
  Problem p = hard_key_problems()[0];
  p.fill(1, emulated::round_to<__half>);
  Call<__half> chooses(p, 1), given(p, 1);
  emulated::choose_and_give(chooses, given);
  expect_fused();
  EXPECT_FALSE(ran("choose_hard_keys"));
  for (size_t i = 0; i < chooses.out.size(); ++i) {
    ASSERT_EQ(chooses.out[i].bits, given.out[i].bits);
  }
  EXPECT_LT(error(emulated::widen(given.out), oracle::run(p, false).out), kTolerance<__half>);
}

template <class T>
void check_split(Problem p, const std::vector<int>& cuts) {
  SCOPED_TRACE(name(p));
  p.fill(3, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  forget_kernels();
  Call<T> call(p, 1);
  State<T> state(p);
  ASSERT_EQ(call.forward_parts(cuts, state), cudaSuccess);
  expect_fused();
  EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<T>);
  for (const int64_t length : state.length) EXPECT_EQ(length, p.seqlen);
}

TEST(EmulatedNear, SplitAnywhereWithCarriedState) {
  for (const auto& [window, sinks] :
       std::vector<std::array<int, 2>>{{1, 0}, {5, 7}, {16, 0}, {60, 4}, {64, 70}, {0, 5}}) {
    check_split<__nv_bfloat16>(problem(200, window, sinks), {1, 2, 10, 64, 65, 130, 200});
    check_split<__half>(problem(170, window, sinks), {15, 80, 170});
  }
}

TEST(EmulatedNear, HardKeysSplitAnywhere) {
  for (const Problem& p : hard_key_problems()) {
    const int n = p.seqlen;
    check_split<__nv_bfloat16>(p, {1, 2, 10, 16, 32, 33, 48, 55, n});
    check_split<__half>(p, {p.window, 3 * p.window, n});
  }
}

// The backward takes the statistics that this forward leaves; limits as in its own tests.
template <class T>
void check_gradients(Problem p) {
  SCOPED_TRACE(name(p));
  constexpr double kLimit = std::is_same_v<T, __half> ? 2e-3 : 1.2e-2;
  p.fill(6, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, true);
  forget_kernels();
  Call<T> call(p, 1);
  const auto got = call.backward(0, p.seqlen);
  expect_fused();
  EXPECT_LT(error(emulated::widen(got.q), want.grad_q), kLimit);
  EXPECT_LT(error(emulated::widen(got.k), want.grad_k), kLimit);
  EXPECT_LT(error(emulated::widen(got.v), want.grad_v), kLimit);
}
TEST(EmulatedNear, GradientsAfterIt) {
  for (const auto& [window, sinks, cache_size] :
       std::vector<std::array<int, 3>>{{64, 4, 0}, {16, 2, 9}}) {
    Problem p = problem(100, window, sinks);
    p.cache_size = cache_size;
    check_gradients<__nv_bfloat16>(p);
    check_gradients<__half>(p);
    p.size = 4.0;
    check_gradients<__nv_bfloat16>(p);
  }
}

// --- what inputs may be --------------------------------------------------------------------------

TEST(EmulatedNear, LargeScores) {
  for (const int window : {16, 64}) {
    Problem p = problem(150, window, 3);
    p.size = 6.0;  // scores of some hundred
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

template <class T>
void check_extremes(double size) {
  Problem p = problem(90, 16, 3);
  p.size = size;
  p.fill(7, emulated::round_to<T>);
  Call<T> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  for (const double x : emulated::widen(call.out)) ASSERT_TRUE(std::fabs(x) < 10.0) << size;
}
TEST(EmulatedNear, ExtremesStayFinite) {
  for (const double size : {100.0, 1e4, 1e12}) check_extremes<__nv_bfloat16>(size);
  for (const double size : {100.0, 1e4}) check_extremes<__half>(size);
}

// Scores beyond 2^24, all alike: float16 weights must not lose their lift there.
TEST(EmulatedNear, WeightsBeyondTwoTo24) {
  Problem p = problem(80, 64, 0);
  p.fill(2, emulated::round_to<__half>);
  std::fill(p.q.begin(), p.q.end(), 60000.0);
  std::fill(p.k.begin(), p.k.end(), 30000.0);
  const oracle::Result want = oracle::run(p, false);
  Call<__half> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__half>);
  for (int t = 0; t < p.seqlen; ++t) {
    EXPECT_NEAR(std::log2(call.row_sum[t]) + call.row_scale[t], want.log_sum[t] / std::log(2.0),
                1e-6 * want.log_sum[t]);
  }
}

// Values near float16's largest number; and weights of 2^-17, which alone have values.
TEST(EmulatedNear, HalfRange) {
  Problem p = problem(90, 64, 2);
  p.fill(12, emulated::round_to<__half>);
  for (double& x : p.v) x = emulated::round_to<__half>(x * 12000.0);
  Call<__half> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  EXPECT_LT(error(emulated::widen(call.out), oracle::run(p, false).out), kTolerance<__half>);

  p.fill(12, emulated::round_to<__half>);
  for (double& x : p.q) x = 1.0;
  for (size_t i = 0; i < p.k.size(); ++i) {
    const bool first = i / p.dim % p.seqlen == 0;
    // Scores of 12 and of 0.2, whose weights float16 holds nearly exactly where it has all its
    // bits.
    p.k[i] = first ? 1.5068359375 : 0.0286712646484375;
  }
  for (size_t i = 0; i < p.v.size(); ++i) p.v[i] = i / p.dim_v % p.seqlen == 0 ? 0.0 : 1024.0;
  Call<__half> small(p, 1);
  ASSERT_EQ(small.forward(), cudaSuccess);
  EXPECT_LT(error(emulated::widen(small.out), oracle::run(p, false).out), kTolerance<__half>);
}

// Where a key that a row sees is NaN or infinite, the definition says what the row is; rows that do
// not see it are as if it were not there.
template <class T>
void check_not_finite(int window, int cache_size) {
  Problem p = problem(150, window, 2);
  p.batch = 1;
  p.fill(13, emulated::round_to<T>);
  p.cache_size = cache_size;
  const auto set = [&](std::vector<double>& x, int token, int column, double to) {
    x[token * 64 + column] = to;  // of the first head
  };
  set(p.v, 20, 3, NAN);
  set(p.v, 37, 9, INFINITY);
  set(p.v, 71, 10, -INFINITY);
  set(p.v, 75, 63, INFINITY);
  set(p.k, 100, 5, NAN);
  set(p.k, 130, 6, -INFINITY);  // scores of both infinities
  set(p.q, 50, 7, NAN);
  SCOPED_TRACE(name(p));
  const oracle::Result want = oracle::run(p, false);
  forget_kernels();
  Call<T> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  expect_fused();
  int finite = 0;
  for (size_t i = 0; i < want.out.size(); ++i) {
    const double x = want.out[i], got = emulated::Traits<T>::widen(call.out[i]);
    const int row = int(i / p.dim_v);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(got)) << "row " << row << " column " << i % p.dim_v;
    } else if (std::isinf(x)) {
      ASSERT_EQ(got, x) << "row " << row << " column " << i % p.dim_v;
    } else {
      ASSERT_NEAR(got, x, 4.0 * kTolerance<T>) << "row " << row << " column " << i % p.dim_v;
      ++finite;
    }
  }
  EXPECT_GT(finite, int(want.out.size() / 2));
  EXPECT_LT(finite, int(want.out.size()));
}
TEST(EmulatedNear, NotFinite) {
  for (const int window : {5, 16, 64, 100}) {
    check_not_finite<__nv_bfloat16>(window, 0);
    check_not_finite<__half>(window, 0);
  }
}

// Rows whose scores all weigh nothing, and rows whose scores are all -infinity: as the other path.
TEST(EmulatedNear, NoWeightAtAll) {
  Problem p = problem(20, 16, 0);
  p.batch = 1;
  p.fill(14, emulated::round_to<__nv_bfloat16>);
  for (double& x : p.q) x = emulated::round_to<__nv_bfloat16>(1e18);
  for (double& x : p.k) x = emulated::round_to<__nv_bfloat16>(-1e18);
  p.k[16 * 64] = -INFINITY;  // the window holds other keys beside it
  Call<__nv_bfloat16> call(p, 1), other(p, 2);
  forget_kernels();
  ASSERT_EQ(call.forward(), cudaSuccess);
  expect_fused();
  ASSERT_EQ(other.forward(), cudaSuccess);
  EXPECT_TRUE(ran("compute_outputs"));
  for (int t = 0; t < 16; ++t) {
    EXPECT_EQ(emulated::Traits<__nv_bfloat16>::widen(other.out[t * 64]), 0.0);
    EXPECT_EQ(emulated::Traits<__nv_bfloat16>::widen(call.out[t * 64]), 0.0);
    EXPECT_EQ(call.row_sum[t], INFINITY);
    EXPECT_EQ(other.row_sum[t], INFINITY);
  }
  p.k[0] = -INFINITY;  // the first row's only key
  Call<__nv_bfloat16> infinite(p, 1), infinite_other(p, 2);
  ASSERT_EQ(infinite.forward(), cudaSuccess);
  ASSERT_EQ(infinite_other.forward(), cudaSuccess);
  EXPECT_TRUE(std::isnan(emulated::Traits<__nv_bfloat16>::widen(infinite.out[0])));
  EXPECT_TRUE(std::isnan(emulated::Traits<__nv_bfloat16>::widen(infinite_other.out[0])));
}

// --- causality, races, the choice of path --------------------------------------------------------

// No bit of an output depends on a later token, nor on whether there is one.
template <class T>
void check_future(const Problem& base) {
  SCOPED_TRACE(name(base));
  Problem p = base;
  p.batch = 1;
  p.fill(8, emulated::round_to<T>);
  Call<T> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  for (const int from : {1, 37, 64, 75, 130}) {
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
      }
      expect_same(changed, "times " + std::to_string(factor));
    }
    Problem shorter = p;
    shorter.segments = {{0, 0, from}};
    expect_same(shorter, "shorter");
  }
}
TEST(EmulatedNear, FutureChangesNothing) {
  for (const double size : {1.0, 6.0}) {
    for (const auto& [window, sinks, cache_size] :
         std::vector<std::array<int, 3>>{{64, 4, 0}, {16, 70, 0}, {100, 0, 0}, {16, 3, 20}}) {
      Problem p = problem(140, window, sinks);
      p.cache_size = cache_size;
      p.size = size;
      check_future<__nv_bfloat16>(p);
      if (size == 1.0) check_future<__half>(p);
    }
  }
}

TEST(EmulatedNear, OrderOfThreadsChangesNothing) {
  for (const auto& [window, sinks, cache_size] :
       std::vector<std::array<int, 3>>{{64, 4, 0}, {16, 70, 0}, {16, 3, 90}}) {
    Problem p = problem(200, window, sinks);
    p.batch = 1;
    p.cache_size = cache_size;
    p.dim_v = 128;
    p.fill(9, emulated::round_to<__nv_bfloat16>);
    emulated::expect_same_in_any_order([&] {
      forget_kernels();
      Call<__nv_bfloat16> call(p, 1);
      State<__nv_bfloat16> state(p);
      EXPECT_EQ(call.forward(&state), cudaSuccess);
      expect_fused();
      auto all = emulated::widen(call.out);
      all.insert(all.end(), call.row_scale.begin(), call.row_scale.end());
      all.insert(all.end(), call.row_sum.begin(), call.row_sum.end());
      return all;
    });
  }
}

template <class T>
void expect_same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  ASSERT_EQ(x.size(), y.size());
  if (!x.empty()) EXPECT_EQ(std::memcmp(x.data(), y.data(), x.size() * sizeof(T)), 0);
}

TEST(EmulatedNear, BothPathsAgree) {
  for (Problem p : hard_key_problems()) {
    if (p.window > 16) continue;
    SCOPED_TRACE(name(p));
    p.fill(10, emulated::round_to<__nv_bfloat16>);
    forget_kernels();
    Call<__nv_bfloat16> fused(p, 1);
    State<__nv_bfloat16> state(p);
    ASSERT_EQ(fused.forward(&state), cudaSuccess);
    expect_fused();
    forget_kernels();
    Call<__nv_bfloat16> other(p, 2);  // rows that asynchronous copies cannot take
    State<__nv_bfloat16> other_state(p);
    ASSERT_EQ(other.forward(&other_state), cudaSuccess);
    EXPECT_FALSE(ran("attend_near"));
    EXPECT_TRUE(ran("compute_outputs"));
    const oracle::Result want = oracle::run(p, false);
    EXPECT_LT(error(emulated::widen(fused.out), want.out), kTolerance<__nv_bfloat16>);
    EXPECT_LT(error(emulated::widen(other.out), want.out), kTolerance<__nv_bfloat16>);
    for (size_t i = 0; i < fused.row_sum.size(); ++i) {
      ASSERT_NEAR(std::log2(fused.row_sum[i]) + fused.row_scale[i],
                  std::log2(other.row_sum[i]) + other.row_scale[i], 2e-3);  // there of tf32 weights
    }
    expect_same_bits(state.window_k, other_state.window_k);
    expect_same_bits(state.window_v, other_state.window_v);
    expect_same_bits(state.sink_k, other_state.sink_k);
    expect_same_bits(state.sink_v, other_state.sink_v);
    expect_same_bits(state.cache_k, other_state.cache_k);
    expect_same_bits(state.cache_v, other_state.cache_v);
    expect_same_bits(state.cache_position, other_state.cache_position);
    EXPECT_LT(error(emulated::widen(state.votes), emulated::widen(other_state.votes)), 1e-5);
    expect_same_bits(state.length, other_state.length);
  }
}

TEST(EmulatedNear, AppliesWhereItShould) {
  Problem p = problem(20, 16, 4);
  p.fill(1, emulated::round_to<__half>);
  Call<__half> call(p, 1);
  State<__half> state(p);
  const auto applies = [&](const std::function<void(dijiang::LinearAttentionParams&)>& change) {
    dijiang::LinearAttentionParams a = call.params();
    a.initial = state.pointers();
    change(a);
    return dijiang::cuda::fused_near_applies(a);
  };
  using Params = dijiang::LinearAttentionParams;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_TRUE(applies([](Params& a) { a.dtype = dijiang::DType::kBFloat16; }));
  EXPECT_TRUE(applies([](Params& a) { a.sinks = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.window = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 128; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 192; }));
  EXPECT_FALSE(applies([](Params& a) { a.window = a.sinks = 0; }));
  EXPECT_FALSE(applies([](Params& a) { a.num_features = 64; }));
  EXPECT_FALSE(applies([](Params& a) { a.dtype = dijiang::DType::kFloat32; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 80; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 80; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 76; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 256; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 264; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 76; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 0; }));
  EXPECT_FALSE(applies([](Params& a) { a.q.stride_seq += 4; }));
  EXPECT_FALSE(applies([](Params& a) { a.v.stride_dim = 2; }));
  EXPECT_FALSE(applies([](Params& a) { a.k.data = static_cast<const char*>(a.k.data) + 8; }));
  EXPECT_FALSE(applies([](Params& a) { a.out = static_cast<char*>(a.out) + 8; }));
  EXPECT_FALSE(
      applies([](Params& a) { a.initial.sink_k = static_cast<char*>(a.initial.sink_k) + 2; }));
  const cuda_emulator::Device before = cuda_emulator::device();
  cuda_emulator::device().shared_bytes = 48 * 1024;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = a.headdim_v = 128; }));
  cuda_emulator::device() = before;
}

}  // namespace
