// The CUDA backward kernels, run by the emulator, against the definition's gradients in double.
#include <gtest/gtest.h>

#include <array>
#include <string>

#include "emulated_gradients.h"

namespace {

using dijiang::FeatureKind;
using emulated::behind;
using emulated::Call;
using emulated::compare;
using emulated::error;
using emulated::Gradients;
using emulated::joined;
using emulated::State;
using oracle::Problem;

template <class T>
double tolerance() {
  return std::is_same_v<T, float> ? 2e-5 : std::is_same_v<T, __half> ? 2e-3 : 1.2e-2;
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  p.fill(seed, emulated::round_to<T>);
  if (p.kind == FeatureKind::kGiven) p.omega_q = p.omega_k = p.weight_q = p.weight_k = {};
  if (p.kind == FeatureKind::kGiven) p.beta_q = p.beta_k = {};
  const oracle::Result want = oracle::run(p, true);
  Call<T> call(p);
  compare(p, call.backward(0, p.seqlen), want, tolerance<T>());
}

std::string name(const Problem& p) {
  return "kind " + std::to_string(int(p.kind)) + " window " + std::to_string(p.window) + " sinks " +
         std::to_string(p.sinks) + " decay " + std::to_string(p.decay) + " seqlen " +
         std::to_string(p.seqlen) + " normalize " + std::to_string(p.normalize);
}

template <class T>
void check_grid(const std::vector<int>& windows) {
  for (const FeatureKind kind :
       {FeatureKind::kGiven, FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const int window : windows) {
      for (const bool decay : {false, true}) {
        Problem p;
        p.kind = kind;
        p.window = window;
        p.decay = decay;
        p.sinks = window % 2 == 0 ? 3 : 0;
        p.seqlen = window >= 64 ? 3 * window + 10 : 75;
        p.beta = kind == FeatureKind::kExp;
        SCOPED_TRACE(name(p));
        check<T>(p);
      }
    }
  }
}

TEST(EmulatedBackward, Float) { check_grid<float>({0, 1, 5, 64, 70}); }
TEST(EmulatedBackward, BFloat16) { check_grid<__nv_bfloat16>({0, 16}); }
TEST(EmulatedBackward, Half) { check_grid<__half>({0, 5}); }

TEST(EmulatedBackward, Shapes) {
  for (const int dim_v : {3, 80}) {
    Problem p;
    p.heads = 4;
    p.kv_heads = 2;
    p.batch = 2;
    p.seqlen = 70;
    p.dim = 33;
    p.dim_v = dim_v;
    p.features = 70;
    p.window = 16;
    p.sinks = 2;
    SCOPED_TRACE(dim_v);
    check<float>(p);
    p.window = 0;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedBackward, HardKeys) {
  for (Problem p : oracle::hard_key_problems()) {
    SCOPED_TRACE(name(p));
    check<float>(p);
    p.decay = true;
    check<float>(p);
    check<__nv_bfloat16>(p);
  }
  Problem packed;
  packed.batch = 2;
  packed.seqlen = 90;
  packed.window = 8;
  packed.cache_size = 6;
  packed.dim_v = 70;
  packed.segments = {{0, 1, 40}, {0, 40, 88}, {1, 7, 90}};
  check<float>(packed);
}

TEST(EmulatedBackward, NoFeaturesNotNormalizedAndEps) {
  Problem p;
  p.features = 0;
  p.window = 16;
  p.sinks = 70;
  check<float>(p);
  Problem raw;
  raw.normalize = false;
  check<float>(raw);
  raw.window = 16;
  check<float>(raw);
  raw.normalize = true;
  raw.eps = 0.5;
  check<float>(raw);
}

TEST(EmulatedBackward, PackedAndPadded) {
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

// Rows whose features overflow beside the chunk's later keys.
TEST(EmulatedBackward, UnsafeRows) {
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
      Call<float> call(p);
      compare(p, call.backward(0, p.seqlen), oracle::run(p, true), 1e-3);
    }
    Problem p;
    p.kind = FeatureKind::kGiven;
    p.decay = decay;
    p.seqlen = 80;
    p.fill(6, emulated::round_to<float>);
    p.omega_q = p.omega_k = p.weight_q = p.weight_k = p.beta_q = p.beta_k = {};
    for (size_t i = 0; i < p.k.size(); ++i)
      p.k[i] *= std::ldexp(1.0, int(i / p.dim % 80) * 3 - 120);
    SCOPED_TRACE(name(p));
    Call<float> call(p);
    const Gradients<float> got = call.backward(0, p.seqlen);
    const oracle::Result want = oracle::run(p, true);
    // Gradients of the small keys are huge: each key by itself.
    for (int t = 0; t < p.seqlen; ++t) {
      const auto row = [&](const std::vector<double>& x) {
        return std::vector<double>(x.begin() + t * p.dim, x.begin() + (t + 1) * p.dim);
      };
      EXPECT_LT(error(row(emulated::widen(got.k)), row(want.grad_k)), 1e-3) << t;
    }
    EXPECT_LT(error(emulated::widen(got.v), want.grad_v), 2e-5);
    EXPECT_LT(error(emulated::widen(got.q), want.grad_q), 2e-5);
  }
}

// A feature that is zero still has its gradient.
TEST(EmulatedBackward, ZeroFeatures) {
  Problem p;
  p.kind = FeatureKind::kGiven;
  p.seqlen = 70;
  p.fill(2, emulated::round_to<float>);
  p.omega_q = p.omega_k = p.weight_q = p.weight_k = p.beta_q = p.beta_k = {};
  for (size_t i = 0; i < p.k.size(); ++i) p.k[i] *= i % 3 != 0 && i % p.dim != 4;
  for (size_t i = 0; i < p.q.size(); ++i) p.q[i] *= i % 5 != 0;
  Call<float> call(p);
  compare(p, call.backward(0, p.seqlen), oracle::run(p, true), 2e-5);
}

TEST(EmulatedBackward, StrongDecay) {
  for (const int window : {0, 5, 16}) {
    Problem p;
    p.window = window;
    p.decay = true;
    p.seqlen = 90;
    p.fill(4, emulated::round_to<float>);
    for (size_t t = 0; t < p.log_decay.size(); ++t) {
      if (t % 11 == 5) p.log_decay[t] = -300.0;
      if (t % 11 == 6) p.log_decay[t] = -90.0;
    }
    for (double& x : p.weight_k) x += 200.0;
    SCOPED_TRACE(name(p));
    Call<float> call(p);
    compare(p, call.backward(0, p.seqlen), oracle::run(p, true), 1e-4);
  }
}

// The gradient of a carried state joins two halves: all gradients are those of the whole.
TEST(EmulatedBackward, ThroughTheState) {
  for (const FeatureKind kind : {FeatureKind::kGiven, FeatureKind::kExp}) {
    for (const bool decay : {false, true}) {
      Problem p;
      p.kind = kind;
      p.decay = decay;
      p.seqlen = 150;
      p.batch = 2;
      p.fill(3, emulated::round_to<float>);
      if (kind == FeatureKind::kGiven) {
        p.omega_q = p.omega_k = p.weight_q = p.weight_k = p.beta_q = p.beta_k = {};
      }
      SCOPED_TRACE(name(p));
      const oracle::Result want = oracle::run(p, true);
      Call<float> call(p);
      State<float> start(p), middle(p), end(p);
      const int cut = 70;
      ASSERT_EQ(call.forward_part(0, cut, start, middle), cudaSuccess);
      const Gradients<float> late = call.backward(cut, p.seqlen, &middle, &end);
      const Gradients<float> early =
          call.backward(0, cut, &start, &middle, late.initial_kv, late.initial_z);
      EXPECT_LT(error(joined(p, early.q, late.q, p.heads, p.dim, cut), want.grad_q), 2e-5);
      EXPECT_LT(error(joined(p, early.k, late.k, p.kv_heads, p.dim, cut), want.grad_k), 2e-5);
      EXPECT_LT(error(joined(p, early.v, late.v, p.kv_heads, p.dim_v, cut), want.grad_v), 2e-5);
      if (decay) {
        EXPECT_LT(error(joined(p, early.log_decay, late.log_decay, p.kv_heads, 1, cut),
                        want.grad_log_decay),
                  5e-5);
      }
      std::vector<double> omega(want.grad_omega_k.size());
      for (size_t i = 0; i < omega.size(); ++i)
        omega[i] = double(early.omega_k[i]) + late.omega_k[i];
      EXPECT_LT(error(omega, want.grad_omega_k), 2e-5);
    }
  }
}

// With a window the state is a constant: q of the second part, and k, v of its own tokens.
TEST(EmulatedBackward, AfterAPrefill) {
  for (const int window : {1, 5, 64}) {
    Problem p;
    p.window = window;
    p.sinks = 6;
    p.decay = true;
    p.seqlen = 160;
    p.fill(3, emulated::round_to<float>);
    SCOPED_TRACE(name(p));
    const int cut = 67;
    Call<float> call(p);
    State<float> start(p), middle(p), end(p);
    ASSERT_EQ(call.forward_part(0, cut, start, middle), cudaSuccess);
    const Gradients<float> got = call.backward(cut, p.seqlen, &middle, &end);
    Problem late = p;  // only the late rows' outputs count
    for (int h = 0; h < p.heads; ++h) {
      std::fill_n(late.grad_out.begin() + p.row(h, p.heads, 0, 0) * p.dim_v, cut * p.dim_v, 0.0);
    }
    const oracle::Result want = oracle::run(late, true);
    EXPECT_LT(error(emulated::widen(got.q), behind(p, want.grad_q, p.heads, p.dim, cut)), 2e-5);
    EXPECT_LT(error(emulated::widen(got.k), behind(p, want.grad_k, p.kv_heads, p.dim, cut)), 2e-5);
    EXPECT_LT(error(emulated::widen(got.v), behind(p, want.grad_v, p.kv_heads, p.dim_v, cut)),
              2e-5);
    EXPECT_LT(
        error(emulated::widen(got.log_decay), behind(p, want.grad_log_decay, p.kv_heads, 1, cut)),
        5e-5);
  }
}

TEST(EmulatedBackward, ExtremesStayFinite) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const int window : {0, 16}) {
      Problem p;
      p.kind = kind;
      p.window = window;
      p.size = 1e4;
      p.seqlen = 90;
      p.fill(7, emulated::round_to<__nv_bfloat16>);
      Call<__nv_bfloat16> call(p);
      SCOPED_TRACE(name(p));
      const Gradients<__nv_bfloat16> got = call.backward(0, p.seqlen);
      const auto finite = [](const auto& x) {
        for (const double e : emulated::widen(x)) {
          if (!std::isfinite(e)) return false;
        }
        return true;
      };
      EXPECT_TRUE(finite(got.q) && finite(got.k) && finite(got.v));
      EXPECT_TRUE(finite(got.omega_q) && finite(got.omega_k) && finite(got.weight_q));
    }
  }
}

TEST(EmulatedBackward, OrderOfThreadsChangesNothing) {
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
      const Gradients<__nv_bfloat16> g = call.backward(0, p.seqlen);
      std::vector<double> all = emulated::widen(g.q);
      for (const auto& x : {emulated::widen(g.k), emulated::widen(g.v), emulated::widen(g.omega_q),
                            emulated::widen(g.omega_k), emulated::widen(g.weight_q),
                            emulated::widen(g.beta_k), emulated::widen(g.log_decay)}) {
        all.insert(all.end(), x.begin(), x.end());
      }
      return all;
    });
  }
}

// The fused forward leaves the statistics that the backward reads: sums of bfloat16 features.
TEST(EmulatedBackward, AfterTheFusedForward) {
  for (const bool decay : {false, true}) {
    Problem p;
    p.decay = decay;
    p.seqlen = 100;
    p.dim = p.dim_v = p.features = 64;
    p.scale = 0.125;
    p.fill(13, emulated::round_to<__nv_bfloat16>);
    cuda_emulator::settings().kernels.clear();
    Call<__nv_bfloat16> call(p, 1);
    const Gradients<__nv_bfloat16> got = call.backward(0, p.seqlen);
    ASSERT_NE(cuda_emulator::settings().kernels[0].find("walk_"), std::string::npos);
    compare(p, got, oracle::run(p, true), 2 * tolerance<__nv_bfloat16>());
  }
}

}  // namespace
