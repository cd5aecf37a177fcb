// The fused backward of near keys alone, run by the emulator, against the definition's gradients in
// double.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <string>

#include "cuda/fused_near_backward.h"
#include "emulated_device.h"
#include "emulated_gradients.h"

namespace {

using emulated::behind;
using emulated::Call;
using emulated::Device;
using emulated::error;
using emulated::forget_kernels;
using emulated::Gradients;
using emulated::ran;
using emulated::State;
using oracle::Problem;

void expect_fused(const Problem& p) {
  EXPECT_TRUE(ran("grad_queries<"));
  EXPECT_EQ(ran("grad_window<"), p.window > 0);
  EXPECT_EQ(ran("grad_slots<"), p.cache().most > 0);
  EXPECT_EQ(ran("grad_sinks<"), p.sinks > 0);
  EXPECT_FALSE(ran("grad_near_queries") || ran("grad_near_keys") || ran("grad_hard_keys"));
  EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
}

// Within twice what plain PyTorch at the dtype is off (docs/cuda.md).
template <class T>
constexpr double kTolerance = std::is_same_v<T, __half> ? 1.2e-3 : 8e-3;

Problem problem(int seqlen, int window, int sinks, int slots = 0) {
  Problem p;
  p.batch = 2;
  p.seqlen = seqlen;
  p.dim = p.dim_v = 64;
  p.features = 0;
  p.scale = 0.125;
  p.window = window;
  p.sinks = sinks;
  p.cache_size = slots;
  return p;
}

std::string name(const Problem& p) {
  return "window " + std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " slots " +
         std::to_string(p.cache().most) + " seqlen " + std::to_string(p.seqlen) + " heads " +
         std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) + " dims " +
         std::to_string(p.dim) + ", " + std::to_string(p.dim_v) + " size " + std::to_string(p.size);
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  SCOPED_TRACE(name(p));
  p.fill(seed, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, true);
  forget_kernels();
  Call<T> call(p, 1);
  const Gradients<T> got = call.backward(0, p.seqlen);
  expect_fused(p);
  const double q = error(emulated::widen(got.q), want.grad_q);
  const double k = error(emulated::widen(got.k), want.grad_k);
  const double v = error(emulated::widen(got.v), want.grad_v);
  EXPECT_LT(q, kTolerance<T>) << "q";
  EXPECT_LT(k, kTolerance<T>) << "k";
  EXPECT_LT(v, kTolerance<T>) << "v";
  if (std::getenv("DIJIANG_TEST_ERRORS")) {
    std::printf("%s: q %.2e k %.2e v %.2e\n", name(p).c_str(), q, k, v);
  }
}

// Windows below, at and above a tile, that end in none; more sinks than a tile; ends within a tile.
template <class T>
void check_windows() {
  for (const auto& [window, sinks, seqlen] : std::vector<std::array<int, 3>>{{1, 0, 70},
                                                                             {5, 4, 150},
                                                                             {16, 70, 150},
                                                                             {60, 4, 250},
                                                                             {64, 0, 64},
                                                                             {64, 4, 259},
                                                                             {100, 7, 330},
                                                                             {0, 4, 90},
                                                                             {0, 70, 150}}) {
    check<T>(problem(seqlen, window, sinks));
  }
}
TEST(EmulatedNearBackward, BFloat16) { check_windows<__nv_bfloat16>(); }
TEST(EmulatedNearBackward, Half) { check_windows<__half>(); }

TEST(EmulatedNearBackward, Sizes) {
  for (const auto& [dim, dim_v] : std::vector<std::array<int, 2>>{
           {64, 128}, {128, 64}, {128, 128}, {80, 80}, {32, 32}, {96, 40}, {8, 120}}) {
    Problem p = problem(150, 64, 4);
    p.dim = dim;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    check<__nv_bfloat16>(p);
    p.window = 20;
    p.cache_size = 30;
    check<__half>(p);
  }
}

// Blocks that have 128 columns of the gradients each.
TEST(EmulatedNearBackward, ColumnsInPieces) {
  const Device device(1);
  for (const auto& [dim, dim_v] :
       std::vector<std::array<int, 2>>{{256, 256}, {64, 192}, {136, 40}, {200, 128}}) {
    Problem p = problem(150, 64, 4);
    p.resize(dim, 0, dim_v);
    check<__nv_bfloat16>(p);
    p.window = 20;
    p.cache_size = 30;
    check<__half>(p);
  }
}

TEST(EmulatedNearBackward, GroupedQueries) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{8, 2}, {3, 1}, {4, 4}}) {
    Problem p = problem(140, 30, 3, 20);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedNearBackward, HardKeys) {
  for (Problem p : oracle::hard_key_problems()) {
    p.dim = p.dim_v = 64;
    p.features = 0;
    p.scale = 0.125;
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

TEST(EmulatedNearBackward, NotNormalizedEpsAndLargeScores) {
  for (const int window : {16, 64}) {
    Problem p = problem(100, window, 2, 9);
    p.normalize = false;
    p.size = 0.3;
    check<__nv_bfloat16>(p);
    p.normalize = true;
    p.eps = 0.5;
    check<__half>(p);
    p.eps = 0.0;
    p.size = 4.0;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedNearBackward, PackedAndPadded) {
  for (const int window : {5, 64}) {
    Problem p = problem(150, window, 2, 6);
    p.segments = {{0, 0, 1}, {0, 1, 100}, {0, 100, 100}, {0, 110, 150}, {1, 7, 140}};
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

// Of the last tokens, from the state that the first ones leave: its keys have no gradients here.
TEST(EmulatedNearBackward, AfterAGivenState) {
  for (const auto& [window, sinks, slots] :
       std::vector<std::array<int, 3>>{{16, 3, 0}, {16, 40, 12}, {60, 4, 33}, {0, 5, 0}}) {
    for (const int cut : {30, 64}) {
      Problem p = problem(170, window, sinks, slots);
      SCOPED_TRACE(name(p));
      p.fill(3, emulated::round_to<__half>);
      Problem last = p;  // as if the outputs before the cut did not count
      for (int b = 0; b < p.batch; ++b) {
        for (int h = 0; h < p.heads; ++h) {
          std::fill_n(&last.grad_out[p.row(h, p.heads, b, 0) * p.dim_v], cut * p.dim_v, 0.0);
        }
      }
      const oracle::Result want = oracle::run(last, true);
      Call<__half> call(p, 1);
      State<__half> before(p), state(p), after(p);
      ASSERT_EQ(call.forward_part(0, cut, before, state), cudaSuccess);
      forget_kernels();
      const Gradients<__half> got = call.backward(cut, p.seqlen, &state, &after);
      expect_fused(p);
      EXPECT_LT(error(emulated::widen(got.q), behind(p, want.grad_q, p.heads, p.dim, cut)),
                kTolerance<__half>);
      EXPECT_LT(error(emulated::widen(got.k), behind(p, want.grad_k, p.kv_heads, p.dim, cut)),
                kTolerance<__half>);
      EXPECT_LT(error(emulated::widen(got.v), behind(p, want.grad_v, p.kv_heads, p.dim_v, cut)),
                kTolerance<__half>);
    }
  }
}

// --- what is not seen ----------------------------------------------------------------------------

template <class T>
bool same_row(const std::vector<T>& x, const std::vector<T>& y, int64_t row, int dim) {
  return std::memcmp(&x[row * dim], &y[row * dim], dim * sizeof(T)) == 0;
}

// A query that is NaN, with a NaN gradient, shows in those keys alone that it sees; a key and value
// in those queries that see it.
TEST(EmulatedNearBackward, WhatIsNotSeenShowsInNoBit) {
  for (const auto& [window, sinks] :
       std::vector<std::array<int, 2>>{{16, 3}, {64, 3}, {70, 0}, {0, 9}}) {
    for (const double bad : {double(NAN), double(INFINITY)}) {
      const Device device(1);
      Problem p = problem(260, window, sinks);
      if (window == 70) p.resize(136, 0, 256);
      p.batch = 1;
      SCOPED_TRACE(name(p));
      p.fill(5, emulated::round_to<__nv_bfloat16>);
      Call<__nv_bfloat16> call(p, 1);
      const auto before = call.backward(0, p.seqlen);
      const auto near = [&](int query, int key) {
        return key <= query && (key < sinks || (window > 0 && key / window + 1 >= query / window));
      };
      for (const int t : {1, 77, 130}) {
        Problem changed = p;
        for (int h = 0; h < p.heads; ++h) {
          changed.q[p.row(h, p.heads, 0, t) * p.dim + 5] = bad;
          std::fill_n(&changed.grad_out[p.row(h, p.heads, 0, t) * p.dim_v], p.dim_v, bad);
        }
        Call<__nv_bfloat16> other(changed, 1);
        const auto after = other.backward(0, p.seqlen);
        for (int s = 0; s < p.seqlen; ++s) {
          EXPECT_EQ(same_row(before.k, after.k, s, p.dim), !near(t, s))
              << "key " << s << " of " << t;
          EXPECT_EQ(same_row(before.v, after.v, s, p.dim_v), !near(t, s)) << "value " << s;
          if (s == t) continue;
          EXPECT_TRUE(same_row(before.q, after.q, s, p.dim)) << "query " << s;
        }
        changed = p;
        std::fill_n(&changed.k[t * p.dim], p.dim, bad);
        std::fill_n(&changed.v[t * p.dim_v], p.dim_v, bad);
        Call<__nv_bfloat16> third(changed, 1);
        const auto seen = third.backward(0, p.seqlen);
        for (int s = 0; s < p.seqlen; ++s) {
          EXPECT_EQ(same_row(before.q, seen.q, s, p.dim), !near(s, t))
              << "query " << s << " of " << t;
        }
      }
    }
  }
}

TEST(EmulatedNearBackward, OrderOfThreadsChangesNothing) {
  const Device device(1);
  for (const auto& [window, slots, dim] :
       std::vector<std::array<int, 3>>{{16, 20, 64}, {64, 0, 64}, {16, 20, 256}}) {
    Problem p = problem(140, window, 3, slots);
    p.resize(dim, 0, dim);
    p.batch = 1;
    p.fill(7, emulated::round_to<__nv_bfloat16>);
    emulated::expect_same_in_any_order([&] {
      Call<__nv_bfloat16> call(p, 1);
      const auto got = call.backward(0, p.seqlen);
      std::vector<double> all = emulated::widen(got.q);
      for (const auto* x : {&got.k, &got.v}) {
        const auto more = emulated::widen(*x);
        all.insert(all.end(), more.begin(), more.end());
      }
      return all;
    });
  }
}

TEST(EmulatedNearBackward, AppliesWhereItShould) {
  const Device device(1);
  Problem p = problem(20, 16, 4);
  p.fill(1, emulated::round_to<__half>);
  Call<__half> call(p, 1);
  using Params = dijiang::LinearAttentionBackwardParams;
  const auto applies = [&](const std::function<void(Params&)>& change) {
    Params b;
    b.forward = call.params();
    b.grad_out = call.grad_out.view;
    change(b);
    return dijiang::cuda::fused_near_backward_applies(b);
  };
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim_v = 128; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim = b.forward.headdim_v = 80; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim_v = 192; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim = 256; }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.headdim_v = 264; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.num_features = 64; }));  // beside far keys
  EXPECT_FALSE(applies([](Params& b) { b.forward.dtype = dijiang::DType::kFloat32; }));
  EXPECT_FALSE(applies([](Params& b) { b.grad_out.stride_dim = 2; }));
  EXPECT_FALSE(applies([](Params& b) { b.grad_out.stride_seq += 4; }));
  EXPECT_FALSE(
      applies([](Params& b) { b.grad_out.data = static_cast<const char*>(b.grad_out.data) + 8; }));
  const Device small(1, 163 * 1024);
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_FALSE(applies([](Params& b) { b.forward.headdim = 256; }));
}

}  // namespace
