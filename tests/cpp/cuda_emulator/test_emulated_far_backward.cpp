// The fused backward of far keys, alone and beside near ones, run by the emulator, against the
// definition's gradients in double.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <string>

#include "cuda/fused_far_backward.h"
#include "emulated_device.h"
#include "emulated_gradients.h"

namespace {

using dijiang::FeatureKind;
using emulated::behind;
using emulated::Call;
using emulated::Device;
using emulated::error;
using emulated::joined;
using emulated::kFew;
using emulated::kMany;
using emulated::ran;
using T = __nv_bfloat16;
using Gradients = emulated::Gradients<T>;
using State = emulated::State<T>;
using oracle::Problem;

// Plain PyTorch at bfloat16 is 1e-2 to 9e-2 off (docs/cuda.md); of 128 features 1.4e-2 to 5.6e-2.
constexpr double kTolerance = 2e-2, kWideTolerance = 2.8e-2;

Problem problem(int seqlen) {
  Problem p;
  p.batch = 2;
  p.seqlen = seqlen;
  p.dim = p.dim_v = p.features = 64;
  p.scale = 0.125;
  return p;
}

// Beside near keys.
Problem mixed(int seqlen, int window, int sinks, int slots = 0) {
  Problem p = problem(seqlen);
  p.window = window;
  p.sinks = sinks;
  p.cache_size = slots;
  return p;
}

std::string name(const Problem& p) {
  return "window " + std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " slots " +
         std::to_string(p.cache().most) + " kind " + std::to_string(int(p.kind)) + " decay " +
         std::to_string(p.decay) + " seqlen " + std::to_string(p.seqlen) + " heads " +
         std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) + " dims " +
         std::to_string(p.dim) + ", " + std::to_string(p.features) + ", " +
         std::to_string(p.dim_v) + " normalize " + std::to_string(p.normalize) + " size " +
         std::to_string(p.size);
}

void expect_fused(const Problem& p) {
  EXPECT_EQ(ran("FarPart::kAll") || ran("FarPart::kKeys"), p.window == 0);
  EXPECT_EQ(ran("FarPart::kQueries"), ran("FarPart::kKeys"));
  EXPECT_EQ(ran("grad_far_queries") && ran("grad_far_keys") && ran("grad_window<"), p.window > 0);
  EXPECT_FALSE(ran("compute_features") || ran("grad_query_features") || ran("grad_inputs") ||
               ran("grad_near_queries"));
  EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
}

void compare(const Problem& p, const Gradients& got, const oracle::Result& want,
             double limit = kTolerance) {
  const emulated::GradientErrors e = emulated::compare(p, got, want, limit);
  if (!std::getenv("DIJIANG_TEST_ERRORS")) return;
  std::printf("%s: inputs %.2e parameters %.2e decay %.2e\n", name(p).c_str(), e.inputs,
              e.parameters, e.decay);
}

void check(Problem p) {
  p.fill(1, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, true);
  for (const int multiprocessors : {kFew, kMany}) {
    SCOPED_TRACE(name(p) + " multiprocessors " + std::to_string(multiprocessors));
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    const Gradients got = call.backward(0, p.seqlen);
    expect_fused(p);
    compare(p, got, want);
  }
}

TEST(EmulatedFarBackward, Kinds) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      for (const int seqlen : {17, 64, 75, 330}) {
        Problem p = problem(seqlen);
        p.kind = kind;
        p.decay = decay;
        check(p);
      }
    }
  }
}

TEST(EmulatedFarBackward, Sizes) {
  for (const auto& [dim, dim_v] :
       std::vector<std::array<int, 2>>{{64, 128}, {128, 64}, {128, 128}}) {
    Problem p = problem(dim_v == 64 ? 280 : 100);
    p.dim = dim;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    check(p);
    p.kind = FeatureKind::kElu;
    p.decay = true;
    check(p);
  }
}

// Of 128 features a block has queries or keys alone; of 64 where shared memory asks for it.
TEST(EmulatedFarBackward, HalvesOfChunks) {
  for (const auto& [dim, features, dim_v] :
       std::vector<std::array<int, 3>>{{64, 128, 64}, {128, 128, 128}, {64, 64, 64}}) {
    for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
      for (const bool decay : {false, true}) {
        Problem p = problem(dim == 128 ? 75 : 150);
        p.batch = 1;
        p.heads = 3;
        p.kind = kind;
        p.decay = decay;
        p.resize(dim, features, dim_v);
        p.fill(1, emulated::round_to<T>);
        SCOPED_TRACE(name(p));
        const Device device(kFew, features == 64 ? 99 * 1024 : 227 * 1024);
        Call<T> call(p, 1);
        const Gradients got = call.backward(0, p.seqlen);
        expect_fused(p);
        EXPECT_TRUE(ran("FarPart::kKeys") && !ran("FarPart::kAll"));
        compare(p, got, oracle::run(p, true), features > 64 ? kWideTolerance : kTolerance);
      }
    }
  }
}

// Sizes between those of tiles: columns and features that are not there count nothing.
TEST(EmulatedFarBackward, SizesBetween) {
  for (const auto& [dim, features, dim_v] : std::vector<std::array<int, 3>>{
           {80, 80, 80}, {32, 32, 32}, {96, 40, 96}, {8, 3, 120}, {120, 63, 40}}) {
    Problem p = problem(dim == 32 ? 330 : 100);
    p.resize(dim, features, dim_v);
    emulated::check_kinds_of(p, [](const Problem& of_kind) { check(of_kind); });
  }
}

// More features than a tile has, in slices of 64 or 128, alone and beside near keys.
constexpr int kThreeSlices = 150;
TEST(EmulatedFarBackward, Slices) {
  for (const int window : {0, 64}) {
    for (const auto& [dim, features, dim_v] : std::vector<std::array<int, 3>>{
             {64, 256, 64}, {64, kThreeSlices, 64}, {128, 384, 128}, {80, 129, 72}}) {
      for (const bool decay : {false, true}) {
        Problem p = mixed(window > 0 || dim == 64 ? 230 : 75, window, window / 16, window / 4);
        p.batch = dim == 128 ? 1 : 2;
        p.heads = 4;
        p.kv_heads = 2;
        p.resize(dim, features, dim_v);
        p.kind = decay ? FeatureKind::kElu : FeatureKind::kExp;
        p.decay = decay;
        if (features == 129) p.segments = {{0, 3, 40}, {1, 0, p.seqlen}};
        check(p);
      }
    }
  }
}

// Queries and keys take turns in one tile, and columns of v have blocks of their own.
TEST(EmulatedFarBackward, HeadsOf256) {
  for (const int window : {0, 64}) {
    for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax}) {
      Problem p = mixed(window > 0 ? 200 : 150, window, window / 16, window / 4);
      p.batch = 1;
      p.heads = 2;
      p.kv_heads = 1;
      const bool exp = kind == FeatureKind::kExp;
      p.resize(exp ? 256 : 136, exp ? 100 : 64, exp ? 256 : 40);
      p.kind = kind;
      p.decay = exp;
      check(p);
    }
  }
}

// Groups of one, of an even and of an odd number: two matrices take turns.
TEST(EmulatedFarBackward, GroupedQueries) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{8, 2}, {3, 1}, {4, 4}}) {
    Problem p = problem(290);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check(p);
    p.decay = true;
    check(p);
  }
}

TEST(EmulatedFarBackward, NotNormalizedEpsAndNoParameters) {
  for (const bool decay : {false, true}) {
    Problem p = problem(90);
    p.decay = decay;
    p.normalize = false;
    p.size = 0.5;
    check(p);
    p.normalize = true;
    p.eps = 0.5;
    check(p);
    p.beta = p.log_weight = false;
    check(p);
  }
}

TEST(EmulatedFarBackward, PackedAndPadded) {
  for (const bool decay : {false, true}) {
    Problem p = problem(450);
    p.decay = decay;
    p.segments = {{0, 0, 1}, {1, 7, 140}, {0, 1, 400}, {0, 400, 400}, {0, 410, 450}};
    check(p);
  }
}

// The gradient of a carried state joins two halves: all gradients are those of the whole.
TEST(EmulatedFarBackward, ThroughTheState) {
  for (const bool decay : {false, true}) {
    for (const int multiprocessors : {kFew, kMany}) {
      Problem p = problem(700);
      p.batch = 1;
      if (multiprocessors == kMany && decay) p.features = kThreeSlices;
      p.decay = decay;
      p.fill(3, emulated::round_to<T>);
      SCOPED_TRACE(name(p) + " multiprocessors " + std::to_string(multiprocessors));
      const Device device(multiprocessors);
      const oracle::Result want = oracle::run(p, true);
      Call<T> call(p, 1);
      State start(p), middle(p), end(p);
      const int cut = 330;
      ASSERT_EQ(call.forward_part(0, cut, start, middle), cudaSuccess);
      const Gradients late = call.backward(cut, p.seqlen, &middle, &end);
      const Gradients early =
          call.backward(0, cut, &start, &middle, late.initial_kv, late.initial_z);
      expect_fused(p);
      const auto sum = [](const std::vector<float>& a, const std::vector<float>& b) {
        std::vector<double> all;
        for (size_t i = 0; i < a.size(); ++i) all.push_back(double(a[i]) + b[i]);
        return all;
      };
      EXPECT_LT(error(joined(p, early.q, late.q, p.heads, p.dim, cut), want.grad_q), kTolerance);
      EXPECT_LT(error(joined(p, early.k, late.k, p.kv_heads, p.dim, cut), want.grad_k), kTolerance);
      EXPECT_LT(error(joined(p, early.v, late.v, p.kv_heads, p.dim_v, cut), want.grad_v),
                kTolerance);
      EXPECT_LT(error(sum(early.omega_k, late.omega_k), want.grad_omega_k), kTolerance);
      EXPECT_LT(error(sum(early.weight_q, late.weight_q), want.grad_weight_q), kTolerance);
      if (decay) {
        EXPECT_LT(error(joined(p, early.log_decay, late.log_decay, p.kv_heads, 1, cut),
                        want.grad_log_decay),
                  kTolerance);
      }
    }
  }
}

std::vector<double> all_gradients(const Gradients& g) {
  std::vector<double> all = emulated::widen(g.q);
  for (const auto& x : {emulated::widen(g.k), emulated::widen(g.v), emulated::widen(g.omega_q),
                        emulated::widen(g.omega_k), emulated::widen(g.weight_q),
                        emulated::widen(g.beta_k), emulated::widen(g.log_decay),
                        emulated::widen(g.initial_kv), emulated::widen(g.initial_z)}) {
    all.insert(all.end(), x.begin(), x.end());
  }
  return all;
}

// Sequences that are walked over in parts, from a given state and with gradients of the last one:
// the same as in one piece.
TEST(EmulatedFarBackward, Parts) {
  Problem ragged = mixed(330, 5, 0, 2);
  ragged.segments = {{0, 0, 1}, {0, 1, 31}, {0, 40, 330}, {1, 3, 200}};
  Problem alone = problem(1650);
  alone.batch = 1;
  for (Problem p : {alone, mixed(330, 8, 3, 6), ragged}) {
    for (const bool decay : {false, true}) {
      p.decay = decay;
      SCOPED_TRACE(name(p));
      p.fill(11, emulated::round_to<T>);
      const bool resumes = p.segments.empty();
      const int cut = resumes ? 50 : 0;
      Call<T> call(p, 1);
      State start(p), middle(p), end(p);
      if (resumes) {
        ASSERT_EQ(call.forward_part(0, cut, start, middle), cudaSuccess);
      }
      std::mt19937 generator(1);
      std::normal_distribution<float> normal;
      std::vector<float> grad_kv(end.kv.size()), grad_z(end.z.size());
      for (float& x : grad_kv) x = normal(generator);
      for (float& x : grad_z) x = normal(generator);
      const auto run = [&](int multiprocessors) {
        const Device device(multiprocessors);
        const Gradients got = resumes ? call.backward(cut, p.seqlen, &middle, &end, grad_kv, grad_z)
                                      : call.backward(0, p.seqlen);
        expect_fused(p);
        EXPECT_EQ(ran("reverse_parts") && ran("fold_parts"), multiprocessors == kMany);
        return got;
      };
      const Gradients whole = run(kFew), cut_up = run(kMany);
      const auto same = [&](const auto& x, const auto& y) {
        return error(emulated::widen(x), emulated::widen(y)) < 4e-3;
      };
      EXPECT_TRUE(same(cut_up.q, whole.q));
      EXPECT_TRUE(same(cut_up.k, whole.k));
      EXPECT_TRUE(same(cut_up.v, whole.v));
      EXPECT_TRUE(same(cut_up.omega_q, whole.omega_q));
      EXPECT_TRUE(same(cut_up.omega_k, whole.omega_k));
      EXPECT_TRUE(same(cut_up.weight_k, whole.weight_k));
      EXPECT_TRUE(same(cut_up.log_decay, whole.log_decay));
      EXPECT_TRUE(same(cut_up.initial_kv, whole.initial_kv));
      EXPECT_TRUE(same(cut_up.initial_z, whole.initial_z));
    }
  }
}

// What a sequence without tokens is given goes through it.
TEST(EmulatedFarBackward, EmptySequence) {
  for (const int multiprocessors : {kFew, kMany}) {
    Problem p = problem(100);
    p.batch = 1;
    p.segments = {{0, 0, 60}, {0, 60, 60}, {0, 60, 100}};
    p.fill(1, emulated::round_to<T>);
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    State from(p), to(p);
    std::fill(from.kv.begin(), from.kv.end(), 0.5f);
    std::fill(from.z.begin(), from.z.end(), 1.5f);
    std::fill(from.log_scale.begin(), from.log_scale.end(), 3.0f);
    const std::vector<float> grad_kv(from.kv.size(), 2.0f), grad_z(from.z.size(), -1.0f);
    const Gradients got = call.backward(0, p.seqlen, &from, &to, grad_kv, grad_z);
    expect_fused(p);
    const size_t kv = from.kv.size() / 3, z = from.z.size() / 3;
    for (size_t i = 0; i < from.kv.size(); ++i) {
      ASSERT_TRUE(std::isfinite(got.initial_kv[i]));
      if (i / kv == 1) {
        ASSERT_EQ(got.initial_kv[i], 2.0f);
      }
    }
    for (size_t i = z; i < 2 * z; ++i) ASSERT_EQ(got.initial_z[i], -1.0f);
  }
}

TEST(EmulatedFarBackward, NoSequences) {
  for (const int window : {0, 64}) {
    Problem p = mixed(30, window, 0);
    p.fill(1, emulated::round_to<T>);
    const Device device(kFew);
    Call<T> call(p, 1);
    const int32_t none[3] = {0, 0, 0};
    dijiang::LinearAttentionBackwardParams b;
    b.forward = call.params();
    b.forward.segments = none;
    b.forward.num_seqs = 0;
    b.grad_out = call.grad_out.view;
    ASSERT_TRUE(dijiang::cuda::fused_far_backward_applies(b));
    std::vector<char> workspace(dijiang::cuda::linear_attention_backward_workspace(b) + 256);
    b.workspace = workspace.data() + 256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256;
    EXPECT_EQ(dijiang::cuda::linear_attention_backward(b, nullptr), cudaSuccess);
  }
}

// Rows whose features overflow beside the chunk's later keys; what the exponents' own bits lose.
TEST(EmulatedFarBackward, UnsafeRows) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      // 40, 100: between tiles; 100 and more: in halves.
      for (const int features : {64, 40, 100, kThreeSlices, 256}) {
        if (features != 64 && !decay) continue;
        Problem p = problem(150);
        p.batch = 1;
        p.kind = kind;
        p.decay = decay;
        if (features != 64) p.resize(features == 256 ? 256 : 80, features, 72);
        p.scale = 0.125;
        p.size = p.dim == 256 ? 15.0 : 30.0;  // exponents alike
        p.beta = false;
        p.fill(5, emulated::round_to<T>);
        SCOPED_TRACE(name(p));
        const Device device(kFew);
        Call<T> call(p, 1);
        compare(p, call.backward(0, p.seqlen), oracle::run(p, true), 5e-2);
      }
    }
  }
}

// One key far above all others makes every row before it unsafe; it has no weight in them.
TEST(EmulatedFarBackward, OneLargeKey) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      Problem p = problem(200);
      p.batch = 1;
      p.heads = 4;
      p.kv_heads = 2;
      p.kind = kind;
      p.decay = decay;
      p.beta = false;
      p.fill(6, emulated::round_to<T>);
      for (int h = 0; h < p.kv_heads; ++h) {
        for (int j = 0; j < p.dim; ++j) {
          double& x = p.k[p.row(h, p.kv_heads, 0, 100) * p.dim + j];
          x = emulated::round_to<T>(x * 100.0);
        }
      }
      SCOPED_TRACE(name(p));
      const Device device(kFew);
      Call<T> call(p, 1);
      const Gradients got = call.backward(0, p.seqlen);
      expect_fused(p);
      const oracle::Result want = oracle::run(p, true);
      // What rows before it get does not hang on it: theirs alone.
      const auto before = [&](const std::vector<double>& x, int heads, int dim) {
        std::vector<double> y;
        for (int h = 0; h < heads; ++h) {
          const auto from = x.begin() + p.row(h, heads, 0, 0) * dim;
          y.insert(y.end(), from, from + 100 * dim);
        }
        return y;
      };
      EXPECT_LT(error(before(emulated::widen(got.q), p.heads, p.dim),
                      before(want.grad_q, p.heads, p.dim)),
                kTolerance);
      EXPECT_LT(error(before(emulated::widen(got.k), p.kv_heads, p.dim),
                      before(want.grad_k, p.kv_heads, p.dim)),
                kTolerance);
      EXPECT_LT(error(emulated::widen(got.v), want.grad_v), kTolerance);
    }
  }
}

TEST(EmulatedFarBackward, StrongDecay) {
  for (const int multiprocessors : {kFew, kMany}) {
    Problem p = problem(300);
    p.batch = 1;
    p.heads = p.kv_heads = 2;
    p.decay = true;
    p.fill(4, emulated::round_to<T>);
    for (size_t t = 0; t < p.log_decay.size(); ++t) {
      if (t % 11 == 5) p.log_decay[t] = float(-300.0);
      if (t % 7 == 6) p.log_decay[t] = float(-20.0);
    }
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    compare(p, call.backward(0, p.seqlen), oracle::run(p, true));
  }
}

// Decay that takes all, within chunks, of exponents far apart: what the chunk's M' says of keys
// before a reset is beyond all that is behind it.
TEST(EmulatedFarBackward, Resets) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax}) {
    Problem p = problem(260);
    p.batch = 1;
    p.kind = kind;
    p.decay = true;
    p.size = 30.0;
    p.beta = false;
    p.fill(11, emulated::round_to<T>);
    for (int t = 9; t < p.seqlen; t += 23) p.log_decay[t] = -1e9;
    const oracle::Result want = oracle::run(p, true);
    const Device device(kFew);
    Call<T> call(p, 1);
    const Gradients got = call.backward(0, p.seqlen);
    expect_fused(p);
    EXPECT_LT(error(emulated::widen(got.k), want.grad_k), kTolerance);
    EXPECT_LT(error(emulated::widen(got.v), want.grad_v), kTolerance);
  }
}

TEST(EmulatedFarBackward, ExtremesStayFinite) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    Problem p = problem(90);
    p.batch = 1;
    p.kind = kind;
    p.size = 1e4;
    p.fill(7, emulated::round_to<T>);
    const Device device(kFew);
    Call<T> call(p, 1);
    SCOPED_TRACE(name(p));
    const Gradients got = call.backward(0, p.seqlen);
    expect_fused(p);
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

std::vector<double> all_gradients(const Problem& p) {
  const Device device(kMany);
  Call<T> call(p, 1);
  return all_gradients(call.backward(0, p.seqlen));
}

TEST(EmulatedFarBackward, OrderOfThreadsChangesNothing) {
  for (const double size : {1.0, 20.0}) {
    Problem p = problem(size > 1.0 ? 100 : 300);
    p.batch = 1;
    p.heads = 2;
    p.decay = true;
    p.size = size;
    p.fill(9, emulated::round_to<T>);
    emulated::expect_same_in_any_order([&] { return all_gradients(p); });
    if (size > 1.0) p.seqlen = 70;
    for (const int features : {128, kThreeSlices}) {  // in halves
      p.features = features;
      p.fill(9, emulated::round_to<T>);
      emulated::expect_same_in_any_order([&] { return all_gradients(p); });
    }
  }
}

// --- beside near keys ----------------------------------------------------------------------------

TEST(EmulatedFarBackward, BesideNearKeys) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      for (const auto& [window, sinks, slots, seqlen] :
           std::vector<std::array<int, 4>>{{64, 4, 0, 330}, {80, 0, 0, 400}, {16, 3, 20, 150}}) {
        Problem p = mixed(seqlen, window, sinks, slots);
        p.kind = kind;
        p.decay = decay;
        check(p);
      }
    }
  }
}

// Windows of several tiles, more sinks than a tile, slots that never fill or many.
TEST(EmulatedFarBackward, WindowsSinksAndSlots) {
  for (const auto& [window, sinks, slots, seqlen] :
       std::vector<std::array<int, 4>>{{130, 70, 0, 600},
                                       {64, 0, 100, 330},
                                       {5, 0, 1, 60},
                                       {70, 2, 100, 500},
                                       {64, 4, 64, 64},
                                       {8, 40, 12, 100}}) {
    Problem p = mixed(seqlen, window, sinks, slots);
    p.decay = sinks % 4 == 0;
    check(p);
  }
}

TEST(EmulatedFarBackward, SizesBesideNearKeys) {
  for (const auto& [dim, features, dim_v] : std::vector<std::array<int, 3>>{
           {64, 128, 64}, {128, 128, 128}, {128, 64, 64}, {64, 64, 128}}) {
    Problem p = mixed(230, 64, 4, dim == dim_v ? 20 : 0);
    p.dim = dim;
    p.features = features;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    p.decay = features == 128;
    check(p);
    p.kind = FeatureKind::kSoftmax;
    check(p);
  }
}

TEST(EmulatedFarBackward, SizesBetweenBesideNearKeys) {
  for (const auto& [dim, features, dim_v] :
       std::vector<std::array<int, 3>>{{80, 80, 80}, {32, 32, 32}, {96, 100, 40}, {8, 3, 120}}) {
    Problem p = mixed(230, 64, 4, dim == dim_v ? 20 : 0);
    p.resize(dim, features, dim_v);
    emulated::check_kinds_of(p, [](const Problem& of_kind) { check(of_kind); });
  }
}

TEST(EmulatedFarBackward, GroupsPackedAndPaddedBesideNearKeys) {
  for (const auto& [window, slots] : std::vector<std::array<int, 2>>{{64, 0}, {20, 12}}) {
    for (const bool decay : {false, true}) {
      Problem p = mixed(300, window, 3, slots);
      p.heads = 6;
      p.kv_heads = 2;
      p.decay = decay;
      p.segments = {{0, 0, 1}, {1, 7, 240}, {0, 1, 200}, {0, 200, 200}, {0, 210, 300}};
      // The table of hard keys asks for the order of memory.
      if (slots > 0) p.segments = {{0, 0, 1}, {0, 1, 200}, {0, 210, 300}, {1, 7, 240}};
      check(p);
    }
  }
  // Token 0 is padding, which keys without a gradient must not meet.
  Problem padded = mixed(300, 64, 3);
  padded.segments = {{0, 5, 300}, {1, 0, 300}};
  check(padded);
  Problem own = mixed(200, 16, 2);  // heads apart, one without slots
  own.heads = 4;
  own.kv_heads = 2;
  own.cache_sizes = {20, 0};
  check(own);
}

TEST(EmulatedFarBackward, NotNormalizedAndEpsBesideNearKeys) {
  Problem p = mixed(250, 64, 2);
  p.normalize = false;
  p.size = 0.5;
  check(p);
  p.normalize = true;
  p.eps = 0.5;
  check(p);
  p.decay = true;
  p.beta = p.log_weight = false;
  check(p);
}

// Of the last tokens, from the state that the first ones leave: its keys have no gradients here.
TEST(EmulatedFarBackward, AfterAGivenState) {
  for (const auto& [window, sinks, slots] :
       std::vector<std::array<int, 3>>{{64, 3, 0}, {16, 4, 20}, {70, 0, 30}}) {
    for (const int cut : {100, 192}) {
      Problem p = mixed(400, window, sinks, slots);
      p.decay = true;
      SCOPED_TRACE(name(p));
      p.fill(3, emulated::round_to<T>);
      Problem last = p;  // as if the outputs before the cut did not count
      for (int b = 0; b < p.batch; ++b) {
        for (int h = 0; h < p.heads; ++h) {
          std::fill_n(&last.grad_out[p.row(h, p.heads, b, 0) * p.dim_v], cut * p.dim_v, 0.0);
        }
      }
      const oracle::Result want = oracle::run(last, true);
      const Device device(kMany);
      Call<T> call(p, 1);
      State before(p), state(p), after(p);
      ASSERT_EQ(call.forward_part(0, cut, before, state), cudaSuccess);
      const Gradients got = call.backward(cut, p.seqlen, &state, &after);
      expect_fused(p);
      EXPECT_LT(error(emulated::widen(got.q), behind(p, want.grad_q, p.heads, p.dim, cut)),
                kTolerance);
      EXPECT_LT(error(emulated::widen(got.k), behind(p, want.grad_k, p.kv_heads, p.dim, cut)),
                kTolerance);
      EXPECT_LT(error(emulated::widen(got.v), behind(p, want.grad_v, p.kv_heads, p.dim_v, cut)),
                kTolerance);
      EXPECT_LT(
          error(emulated::widen(got.log_decay), behind(p, want.grad_log_decay, p.kv_heads, 1, cut)),
          kTolerance);
    }
  }
}

// Hundreds of chunks, each with a little decay, since a query that alone has feature 0: what a
// state's numbers keep of decay must not pile up.
TEST(EmulatedFarBackward, MildDecayForEver) {
  Problem p = mixed(700, 4, 0, 1);
  p.batch = p.heads = 1;
  p.decay = true;
  p.fill(2, emulated::round_to<T>);
  for (double& x : p.log_decay) x = float(-1e-3);
  std::fill_n(p.omega_q.begin(), p.dim, 0.0);
  p.omega_q[0] = 40.0;
  for (int t = 0; t < p.seqlen; ++t) p.q[t * p.dim] = t < p.seqlen - 4 ? -9.0 : 9.0;
  const oracle::Result want = oracle::run(p, true);
  for (const int multiprocessors : {kFew, kMany}) {
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    // What exponents of 180 lose in their own bits.
    compare(p, call.backward(0, p.seqlen), want, 2 * kTolerance);
  }
}

TEST(EmulatedFarBackward, OrderOfThreadsChangesNothingBesideNearKeys) {
  for (const auto& [window, slots] : std::vector<std::array<int, 2>>{{16, 20}, {64, 0}}) {
    Problem p = mixed(window == 16 ? 140 : 260, window, 3, slots);
    p.batch = 1;
    p.decay = true;
    if (slots > 0) p.features = kThreeSlices;
    p.fill(9, emulated::round_to<T>);
    emulated::expect_same_in_any_order([&] { return all_gradients(p); });
  }
}

TEST(EmulatedFarBackward, AppliesWhereItShould) {
  const Device device(kFew);
  Problem p = problem(20);
  p.fill(1, emulated::round_to<T>);
  Call<T> call(p, 1);
  using Params = dijiang::LinearAttentionBackwardParams;
  const auto applies = [&](const std::function<void(Params&)>& change) {
    Params b;
    b.forward = call.params();
    b.grad_out = call.grad_out.view;
    change(b);
    return dijiang::cuda::fused_far_backward_applies(b);
  };
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim_v = 128; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim = b.forward.headdim_v = 80; }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.headdim_v = 192; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.headdim = b.forward.headdim_v = 256; }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.headdim = b.forward.headdim_v = 264; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.num_features = 128; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.num_features = 500; }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.window = 16; }));
  EXPECT_TRUE(applies([](Params& b) { b.forward.window = 64; }));
  EXPECT_TRUE(applies([](Params& b) {
    b.forward.window = 64;
    b.forward.num_features = 128;
  }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.dtype = dijiang::DType::kFloat16; }));
  EXPECT_FALSE(applies([](Params& b) { b.forward.kind = FeatureKind::kGiven; }));
  EXPECT_FALSE(applies([](Params& b) { b.grad_out.stride_dim = 2; }));
  cuda_emulator::device().shared_bytes = 99 * 1024;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_FALSE(applies([](Params& b) { b.forward.headdim_v = 128; }));  // but for the forward
}

}  // namespace
