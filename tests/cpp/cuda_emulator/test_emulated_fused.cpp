// The fused forward for 16-bit inputs, run by the emulator: its instructions' layouts, then the
// kernels against the definition in double and against the other path.
#include <gtest/gtest.h>

#include <array>
#include <string>

#include "cuda/fused_forward.h"
#include "cuda/fused_tiles.h"
#include "cuda/mma_sync.h"
#include "emulated_device.h"

namespace {

using dijiang::FeatureKind;
using emulated::Call;
using emulated::Device;
using emulated::error;
using emulated::kFew;
using emulated::kMany;
using emulated::ran;
using emulated::State;
using oracle::Problem;

// --- instructions --------------------------------------------------------------------------------

using dijiang::cuda::pack;
using dijiang::cuda::tile_offset;
using dijiang::cuda::unpack;

// c (16 x 16) = a (16 x 16) b (16 x 16), every operand laid out both ways; and fragments by the
// table in mma_sync.h, without ldmatrix.
template <class T>
__global__ void products(const T* a, const T* b, float* c) {
  namespace cuda = dijiang::cuda;
  DIJIANG_DYNAMIC_SHARED(raw);
  T* tiles[4];
  for (int i = 0; i < 4; ++i) tiles[i] = reinterpret_cast<T*>(raw) + i * 16 * 64;
  for (int i = threadIdx.x; i < 256; i += 32) {
    const int y = i / 16, x = i % 16;
    tiles[0][tile_offset<64>(y, x)] = a[i];
    tiles[1][tile_offset<64>(x, y)] = a[i];
    tiles[2][tile_offset<64>(x, y)] = b[i];
    tiles[3][tile_offset<64>(y, x)] = b[i];
  }
  __syncthreads();
  const int g = threadIdx.x / 4, j = threadIdx.x % 4;
  for (int way = 0; way < 3; ++way) {
    unsigned fa[4], fb[4];
    if (way == 0) {
      cuda::load_left<64>(fa, tiles[0], 0, 0);
      cuda::load_right<64>(fb, tiles[2], 0, 0);
    } else if (way == 1) {
      cuda::load_left_transposed<64>(fa, tiles[1], 0, 0);
      cuda::load_right_transposed<64>(fb, tiles[3], 0, 0);
    } else {
      const auto pair = [](T x, T y) { return x.bits | unsigned(y.bits) << 16; };
      for (int r = 0; r < 4; ++r) {
        const T* x = a + (g + r % 2 * 8) * 16 + 2 * j + r / 2 * 8;
        fa[r] = pair(x[0], x[1]);
        const T* y = b + (2 * j + r % 2 * 8) * 16 + g + r / 2 * 8;
        fb[r] = pair(y[0], y[16]);
      }
    }
    float fc[2][4] = {};
    cuda::multiply_add_16<T>(fc[0], fc[1], fa, fb);
    for (int t = 0; t < 2; ++t) {
      for (int e = 0; e < 4; ++e) {
        c[way * 256 + (g + e / 2 * 8) * 16 + 8 * t + 2 * j + e % 2] = fc[t][e];
      }
    }
  }
}

template <class T>
void check_products() {
  std::vector<T> a, b;
  for (int i = 0; i < 256; ++i) {
    a.push_back(emulated::Traits<T>::narrow(i % 7 - 3 + i / 64));
    b.push_back(emulated::Traits<T>::narrow(i % 11 - 5));
  }
  std::vector<float> c(3 * 256, NAN);
  DIJIANG_LAUNCH(products<T>, 1, 32, 4 * 16 * 64 * 2, nullptr, a.data(), b.data(), c.data());
  for (int i = 0; i < 3 * 256; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      sum += emulated::widen(a)[i % 256 / 16 * 16 + k] * emulated::widen(b)[k * 16 + i % 16];
    }
    ASSERT_EQ(c[i], sum) << i;
  }
}

TEST(EmulatedMma, FragmentLayouts) {
  check_products<__nv_bfloat16>();
  check_products<__half>();
}

__global__ void late_copies(const int* from, int* to) {
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<int*>(raw);
  dijiang::cuda::copy_async(tile + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x != 3);
  to[threadIdx.x] = tile[4 * threadIdx.x];
  dijiang::cuda::wait_copies();
  __syncthreads();
  to[8 + threadIdx.x] = tile[4 * ((threadIdx.x + 1) % 8) + 1];
}

TEST(EmulatedMma, CopiesArriveWhenWaitedFor) {
  alignas(16) int from[32];
  int to[16];
  for (int i = 0; i < 32; ++i) from[i] = i;
  DIJIANG_LAUNCH(late_copies, 1, 8, 128, nullptr, from, to);
  EXPECT_EQ(to[0], -1);  // what shared memory is full of
  EXPECT_EQ(to[8], 5);
  EXPECT_EQ(to[10], 0);  // outside
}

__global__ void quads(unsigned* transposed, float* maxima, int* tiles) {
  namespace cuda = dijiang::cuda;
  unsigned r[4];
  for (unsigned t = 0; t < 4; ++t) r[t] = t * 100 + threadIdx.x;
  cuda::transpose_quad(r);
  for (int t = 0; t < 4; ++t) transposed[threadIdx.x * 4 + t] = r[t];
  float x[16][2];
  for (int t = 0; t < 16; ++t) {
    for (int e = 0; e < 2; ++e) x[t][e] = float((threadIdx.x / 4 * 5 + t * 3 + e) % 8);
  }
  tiles[threadIdx.x] = cuda::max_over_rows<16>(x);
  for (int i = 0; i < 4; ++i) maxima[threadIdx.x * 4 + i] = x[i / 2][i % 2] + 10.0f * (i / 2);
}

TEST(EmulatedMma, Quads) {
  unsigned transposed[128];
  float maxima[128];
  int tiles[32], seen = 0;
  DIJIANG_LAUNCH(quads, 1, 32, 0, nullptr, transposed, maxima, tiles);
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned t = 0; t < 4; ++t) {
      EXPECT_EQ(transposed[lane * 4 + t], lane % 4 * 100 + lane / 4 * 4 + t);
    }
    for (int i = 0; i < 4; ++i) EXPECT_EQ(maxima[lane * 4 + i], 7 + 10 * (i / 2));
    if (lane % 4 == 0) seen |= 3 << tiles[lane];
  }
  EXPECT_EQ(seen, 0xFFFF);
}

__global__ void powers(const float* x, float shift, float* y) {
  y[threadIdx.x] = dijiang::cuda::exp2_below(x[threadIdx.x], shift);
}

TEST(EmulatedMma, PowersShiftExactly) {
  std::vector<float> x, at_0(32), shifted(32);
  for (int i = 0; i < 32; ++i) x.push_back(-0.37f * float(i * i));
  DIJIANG_LAUNCH(powers, 1, 32, 0, nullptr, x.data(), 0.0f, at_0.data());
  for (int i = 0; i < 32; ++i) {
    EXPECT_NEAR(at_0[i], x[i] < -125.5f ? 0.0 : std::exp2(double(x[i])), 1e-6 * at_0[i]);
    x[i] += 0.0f;
  }
  DIJIANG_LAUNCH(powers, 1, 32, 0, nullptr, x.data(), -40.0f, shifted.data());
  for (int i = 0; i < 12; ++i) EXPECT_EQ(shifted[i], std::ldexp(at_0[i], -40));
  for (const float far : {-3e8f, -1e30f, -INFINITY}) {
    x.assign(32, far);
    DIJIANG_LAUNCH(powers, 1, 32, 0, nullptr, x.data(), 7.0f, shifted.data());
    EXPECT_EQ(shifted[0], 0.0f);
  }
  x.assign(32, NAN);
  DIJIANG_LAUNCH(powers, 1, 32, 0, nullptr, x.data(), 0.0f, shifted.data());
  EXPECT_TRUE(std::isnan(shifted[0]));
}

TEST(EmulatedMma, ModeratePowersAreTheSameBits) {
  using dijiang::cuda::exp2_below;
  using dijiang::cuda::exp2_moderate;
  const auto same = [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); };
  for (const float shift : {0.0f, 1.0f, -37.0f, 131071.0f, -2097151.0f}) {
    const auto check = [&](float x) {
      const float y = exp2_below(x, shift);
      ASSERT_TRUE(same(y, exp2_moderate(x, shift))) << x << " " << shift;
      ASSERT_TRUE(same(y, (exp2_moderate<1, false>(x, shift)))) << x << " " << shift;
    };
    for (int i = 0; i < 4096; ++i) check(-float(i) / 16.0f - shift);
    for (int i = 0; i < 12700; ++i) check(-std::exp2(float(i) / 100.0f) - std::fabs(shift));
    for (const float x : {-INFINITY, NAN, -1e30f}) check(x);
  }
}

// --- attention -----------------------------------------------------------------------------------

// The roundings of features, weights and output: plain PyTorch at the dtype is 7e-3 to 3e-2 off for
// bfloat16, and 1.4e-3 to 6e-3 for float16 (docs/cuda.md).
template <class T>
constexpr double kTolerance = std::is_same_v<T, __half> ? 8e-4 : 7e-3;

Problem problem(int seqlen) {
  Problem p;
  p.batch = 2;
  p.seqlen = seqlen;
  p.dim = p.dim_v = p.features = 64;
  p.scale = 0.125;
  return p;
}

std::string name(const Problem& p) {
  return "kind " + std::to_string(int(p.kind)) + " decay " + std::to_string(p.decay) + " seqlen " +
         std::to_string(p.seqlen) + " heads " + std::to_string(p.heads) + "/" +
         std::to_string(p.kv_heads) + " normalize " + std::to_string(p.normalize);
}

// Outputs, statistics and final state of what has run.
template <class T>
void compare(const Problem& p, const Call<T>& call, const State<T>& state,
             const oracle::Result& want) {
  const double e = error(emulated::widen(call.out), want.out);
  EXPECT_LT(e, kTolerance<T>);
  for (const auto& s : p.sequences()) {
    for (int h = 0; h < p.heads && p.normalize; ++h) {
      for (int t = s[1]; t < s[2]; ++t) {
        const int64_t row = p.row(h, p.heads, s[0], t);
        const double got = (std::log2(call.row_sum[row]) + call.row_scale[row]) * std::log(2.0);
        ASSERT_GE(call.row_sum[row], 1.0f);
        ASSERT_LT(call.row_sum[row], 2.0f);
        // bfloat16: a row of one term alone has the roundings of its two factors.
        ASSERT_NEAR(got, want.log_sum[row], 1e-3 + 2 * kTolerance<T>);
      }
    }
  }
  EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kTolerance<T>);
  EXPECT_LT(error(state.true_z(), want.z), kTolerance<T>);
  if (std::getenv("DIJIANG_TEST_ERRORS")) {
    std::printf("%s: out %.2e kv %.2e z %.2e\n", name(p).c_str(), e,
                error(state.true_kv(p.dim_v), want.kv), error(state.true_z(), want.z));
  }
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  p.fill(seed, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  for (const int multiprocessors : {kFew, kMany}) {
    SCOPED_TRACE(name(p) + " multiprocessors " + std::to_string(multiprocessors));
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    State<T> state(p);
    ASSERT_EQ(call.forward(&state), cudaSuccess);
    EXPECT_TRUE(ran("walk_rows"));
    EXPECT_EQ(ran("walk_keys"), multiprocessors == kMany && p.seqlen > 256);
    EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
    compare(p, call, state, want);
  }
}

template <class T>
void check_kinds() {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const bool decay : {false, true}) {
      for (const int seqlen : {75, 300}) {
        Problem p = problem(seqlen);
        p.kind = kind;
        p.decay = decay;
        check<T>(p);
      }
    }
  }
}

TEST(EmulatedFused, BFloat16) { check_kinds<__nv_bfloat16>(); }
TEST(EmulatedFused, Half) { check_kinds<__half>(); }

TEST(EmulatedFused, LongSequence) {
  Problem p = problem(1500);
  p.batch = 1;
  p.heads = 2;
  p.kv_heads = 2;
  check<__nv_bfloat16>(p);
}

TEST(EmulatedFused, Sizes) {
  for (const auto& [dim, features, dim_v] :
       std::vector<std::array<int, 3>>{{128, 64, 128}, {64, 128, 64}, {128, 128, 128}}) {
    Problem p = problem(dim_v == 64 ? 100 : 280);
    p.dim = dim;
    p.features = features;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    check<__nv_bfloat16>(p);
    if (features == 64) check<__half>(p);
  }
}

// Sizes between those of tiles: columns and features that are not there count nothing.
TEST(EmulatedFused, SizesBetween) {
  for (const auto& [dim, features, dim_v] : std::vector<std::array<int, 3>>{
           {80, 80, 80}, {32, 32, 32}, {96, 96, 40}, {8, 1, 200}, {120, 63, 136}}) {
    Problem p = problem(dim == 32 ? 600 : 140);
    p.resize(dim, features, dim_v);
    emulated::check_kinds_of(p, [](const Problem& of_kind) {
      check<__nv_bfloat16>(of_kind);
      const bool in_one = of_kind.features <= 64;
      if (in_one || of_kind.kind != FeatureKind::kSoftmax) check<__half>(of_kind);
    });
  }
}

// More features than a tile has, in slices of 64 or 128.
constexpr int kThreeSlices = 150;
TEST(EmulatedFused, Slices) {
  for (const auto& [dim, features, dim_v, seqlen] : std::vector<std::array<int, 4>>{
           {64, 256, 64, 140}, {64, 150, 64, 300}, {128, 384, 128, 80}, {80, 129, 200, 80}}) {
    for (const bool decay : {false, true}) {
      Problem p = problem(seqlen);
      p.resize(dim, features, dim_v);
      p.kind = decay ? FeatureKind::kElu : FeatureKind::kExp;
      p.decay = decay;
      check<__nv_bfloat16>(p);
      if (features < 200) check<__half>(p);
    }
  }
}

// Maps of 256 columns leave room for one stage of values; those of two parts for none.
TEST(EmulatedFused, HeadsOf256) {
  for (const bool decay : {false, true}) {
    Problem p = problem(150);
    p.batch = 1;
    p.heads = decay ? 2 : 1;
    p.kv_heads = 1;
    p.resize(decay ? 256 : 200, decay ? 256 : 64, decay ? 64 : 256);
    p.decay = decay;
    check<__nv_bfloat16>(p);
    if (decay) continue;
    p.kind = FeatureKind::kSoftmax;
    check<__nv_bfloat16>(p);
    p.size = 30.0;  // exact rows
    p.kind = FeatureKind::kExp;
    p.beta = false;
    p.fill(5, emulated::round_to<__nv_bfloat16>);
    const Device device(kFew);
    Call<__nv_bfloat16> call(p, 1);
    ASSERT_EQ(call.forward(), cudaSuccess);
    EXPECT_TRUE(ran("walk_rows"));
    EXPECT_LT(error(emulated::widen(call.out), oracle::run(p, false).out), 2e-2);
  }
}

// Shared memory that holds no tile of 128 features: two slices.
TEST(EmulatedFused, SlicesOfSmallDevices) {
  Problem p = problem(90);
  p.resize(128, 128, 64);
  p.fill(1, emulated::round_to<__nv_bfloat16>);
  const Device device(kFew, 163 * 1024);
  Call<__nv_bfloat16> call(p, 1);
  State<__nv_bfloat16> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  EXPECT_TRUE(ran("walk_rows"));
  compare(p, call, state, oracle::run(p, false));
}

// One or two heads of a group in a block; shared memory that holds one alone.
TEST(EmulatedFused, GroupedQueries) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{8, 2}, {3, 1}, {4, 4}}) {
    Problem p = problem(140);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check<__nv_bfloat16>(p);
    p.decay = true;
    check<__half>(p);
    p.fill(1, emulated::round_to<__nv_bfloat16>);
    const Device small(kFew, 99 * 1024);
    Call<__nv_bfloat16> call(p, 1);
    State<__nv_bfloat16> state(p);
    ASSERT_EQ(call.forward(&state), cudaSuccess);
    EXPECT_TRUE(ran("walk_rows"));
    compare(p, call, state, oracle::run(p, false));
  }
}

TEST(EmulatedFused, NotNormalizedAndEps) {
  for (const bool decay : {false, true}) {
    Problem p = problem(90);
    p.decay = decay;
    p.normalize = false;
    check<__nv_bfloat16>(p);
    p.size = 0.3;  // sums that float16 holds
    check<__half>(p);
    p.features = kThreeSlices;
    check<__half>(p);
    p.normalize = true;
    p.eps = 0.5;
    check<__nv_bfloat16>(p);
    p.features = 64;
    check<__nv_bfloat16>(p);
    p.beta = p.log_weight = false;
    check<__nv_bfloat16>(p);
  }
}

TEST(EmulatedFused, PackedAndPadded) {
  for (const bool decay : {false, true}) {
    Problem p = problem(450);
    p.decay = decay;
    p.segments = {{0, 0, 1}, {0, 1, 400}, {0, 400, 400}, {0, 410, 450}, {1, 7, 140}};
    check<__nv_bfloat16>(p);
    check<__half>(p);
    p.features = kThreeSlices;
    check<__nv_bfloat16>(p);
  }
}

template <class T>
void check_split(Problem p, const std::vector<int>& cuts) {
  p.fill(3, emulated::round_to<T>);
  const oracle::Result want = oracle::run(p, false);
  for (const int multiprocessors : {kFew, kMany}) {
    SCOPED_TRACE(name(p) + " multiprocessors " + std::to_string(multiprocessors));
    const Device device(multiprocessors);
    Call<T> call(p, 1);
    State<T> state(p);
    ASSERT_EQ(call.forward_parts(cuts, state), cudaSuccess);
    EXPECT_FALSE(ran("compute_features") || ran("local_states"));
    EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<T>);
    EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kTolerance<T>);
    EXPECT_LT(error(state.true_z(), want.z), kTolerance<T>);
  }
}

TEST(EmulatedFused, SplitAnywhereWithCarriedState) {
  for (const bool decay : {false, true}) {
    Problem p = problem(500);
    p.decay = decay;
    check_split<__nv_bfloat16>(p, {1, 10, 64, 129, 500});
    check_split<__half>(p, {80, 400, 450, 500});
    p.features = kThreeSlices;
    check_split<__nv_bfloat16>(p, {1, 10, 64, 129, 500});
  }
}

// A state updated in place, by one block of a group or by many.
TEST(EmulatedFused, StateInPlace) {
  for (const auto& [shared_bytes, features] :
       std::vector<std::array<int, 2>>{{99, 64}, {227, 64}, {227, kThreeSlices}}) {
    Problem p = problem(130);
    p.features = features;
    p.heads = 4;
    p.fill(3, emulated::round_to<__nv_bfloat16>);
    const oracle::Result want = oracle::run(p, false);
    const Device device(kFew, shared_bytes * 1024);
    Call<__nv_bfloat16> call(p, 1);
    State<__nv_bfloat16> state(p);
    ASSERT_EQ(call.forward_part(0, 60, state, state), cudaSuccess);
    ASSERT_EQ(call.forward_part(60, 130, state, state), cudaSuccess);
    EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__nv_bfloat16>);
    EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), kTolerance<__nv_bfloat16>);
  }
}

// Exponents hundreds apart: rows before a chunk's largest key are done alone. What they lose is the
// exponents' own bits.
TEST(EmulatedFused, ExactRows) {
  for (const auto& [decay, features] :
       std::vector<std::array<int, 2>>{{0, 64}, {1, 64}, {0, kThreeSlices}, {1, kThreeSlices}}) {
    Problem p = problem(150);
    p.batch = 1;
    p.features = features;
    p.decay = decay;
    p.size = 30.0;
    p.beta = false;
    p.fill(5, emulated::round_to<__nv_bfloat16>);
    SCOPED_TRACE(name(p));
    const oracle::Result want = oracle::run(p, false);
    const Device device(kFew);
    Call<__nv_bfloat16> call(p, 1);
    ASSERT_EQ(call.forward(), cudaSuccess);
    EXPECT_LT(error(emulated::widen(call.out), want.out), 2e-2);
    p.fill(5, emulated::round_to<__half>);
    Call<__half> half(p, 1);
    ASSERT_EQ(half.forward(), cudaSuccess);
    EXPECT_LT(error(emulated::widen(half.out), oracle::run(p, false).out), 5e-3);
  }
}

// What decay has made as nothing must not bury the rest, and nothing may pile up.
TEST(EmulatedFused, StrongDecay) {
  for (const auto& [multiprocessors, features] :
       std::vector<std::array<int, 2>>{{kFew, 64}, {kMany, 64}, {kMany, kThreeSlices}}) {
    Problem p = problem(300);
    p.batch = 1;
    p.features = features;
    p.heads = p.kv_heads = 2;
    p.decay = true;
    p.fill(4, emulated::round_to<__nv_bfloat16>);
    for (size_t t = 0; t < p.log_decay.size(); ++t) {
      if (t % 11 == 5) p.log_decay[t] = float(-300.0);
      if (t % 29 == 6) p.log_decay[t] = -INFINITY;
      if (t % 7 == 6) p.log_decay[t] = float(-20.0);
    }
    const Device device(multiprocessors);
    Call<__nv_bfloat16> call(p, 1);
    ASSERT_EQ(call.forward(), cudaSuccess);
    for (double& x : p.log_decay) x = std::fmax(x, -1e9);
    EXPECT_LT(error(emulated::widen(call.out), oracle::run(p, false).out),
              kTolerance<__nv_bfloat16>);
  }
}

TEST(EmulatedFused, MildDecayForEver) {
  for (const int multiprocessors : {kFew, kMany}) {
    Problem p = problem(700);
    p.batch = 1;
    p.heads = p.kv_heads = 2;
    p.decay = true;
    p.fill(11, emulated::round_to<__half>);
    for (double& x : p.log_decay) x = float(-0.003);
    for (double& x : p.k) x *= 0.01;  // no key sets a new maximum
    const oracle::Result want = oracle::run(p, false);
    const Device device(multiprocessors);
    Call<__half> call(p, 1);
    State<__half> state(p);
    ASSERT_EQ(call.forward(&state), cudaSuccess);
    EXPECT_LT(error(emulated::widen(call.out), want.out), kTolerance<__half>);
    EXPECT_LT(error(state.true_kv(p.dim_v), want.kv), 1e-4);
    for (const float x : state.z) EXPECT_LT(x, 1000.0f);  // each key adds up to 1
  }
}

TEST(EmulatedFused, ExtremesStayFinite) {
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    for (const double size : {100.0, 1e4}) {
      Problem p = problem(90);
      p.batch = 1;
      p.kind = kind;
      p.size = size;
      p.decay = size == 100.0;
      p.fill(7, emulated::round_to<__nv_bfloat16>);
      const Device device(kFew);
      Call<__nv_bfloat16> call(p, 1);
      ASSERT_EQ(call.forward(), cudaSuccess);
      for (const double x : emulated::widen(call.out)) ASSERT_TRUE(std::fabs(x) < 10.0);
      if (kind != FeatureKind::kSoftmax) p.features = kThreeSlices;
      p.fill(7, emulated::round_to<__half>);
      Call<__half> half(p, 1);
      ASSERT_EQ(half.forward(), cudaSuccess);
      for (const double x : emulated::widen(half.out)) ASSERT_TRUE(std::fabs(x) < 10.0);
    }
  }
}

// float16's ends: values near its largest number, and parameters beyond it.
TEST(EmulatedFused, HalfRange) {
  Problem p = problem(90);
  p.batch = 1;
  p.fill(12, emulated::round_to<__half>);
  for (double& x : p.v) x = emulated::round_to<__half>(x * 12000.0);
  for (double& x : p.q) x = emulated::round_to<__half>(x * std::ldexp(1.0, -14));
  for (double& x : p.omega_q) x *= std::ldexp(1.0, 18);
  for (double& x : p.beta_q) x = 0.0;
  const oracle::Result want = oracle::run(p, false);
  const Device device(kFew);
  Call<__half> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  EXPECT_LT(error(emulated::widen(call.out), want.out), 2e-3);
}

// No bit of an output depends on a later token, whichever way its row takes.
template <class T>
void check_future(int features) {
  for (const bool decay : {false, true}) {
    for (const double size : {1.0, 20.0}) {
      Problem p = problem(100);
      p.batch = 1;
      p.features = features;
      p.decay = decay;
      p.size = size;
      p.fill(8, emulated::round_to<T>);
      const Device device(kFew);
      Call<T> call(p, 1);
      ASSERT_EQ(call.forward(), cudaSuccess);
      Problem changed = p;
      const int from = 40;
      for (int t = from; t < p.seqlen; ++t) {
        for (int j = 0; j < p.dim; ++j) changed.k[t * p.dim + j] = -9.0 * p.k[t * p.dim + j];
      }
      Call<T> other(changed, 1);
      ASSERT_EQ(other.forward(), cudaSuccess);
      for (int h = 0; h < p.heads; ++h) {
        for (int i = 0; i < from * p.dim_v; ++i) {
          const int64_t at = p.row(h, p.heads, 0, 0) * p.dim_v + i;
          ASSERT_EQ(call.out[at].bits, other.out[at].bits)
              << "size " << size << " row " << i / p.dim_v;
        }
      }
    }
  }
}
TEST(EmulatedFused, FutureChangesNothing) {
  for (const int features : {64, kThreeSlices}) {
    check_future<__nv_bfloat16>(features);
    check_future<__half>(features);
  }
}

// A race would make results depend on the order in which threads run, and on which warp is ahead.
TEST(EmulatedFused, OrderOfThreadsChangesNothing) {
  for (const double size : {1.0, 20.0}) {
    for (const bool decay : {false, true}) {
      Problem p = problem(size > 1.0 ? 100 : 300);
      p.batch = 1;
      p.heads = 4;
      p.features = decay ? kThreeSlices : 64;
      p.decay = decay;
      p.size = size;
      p.fill(9, emulated::round_to<__nv_bfloat16>);
      emulated::expect_same_in_any_order([&] {
        const Device device(kMany);
        Call<__nv_bfloat16> call(p, 1);
        State<__nv_bfloat16> state(p);
        EXPECT_EQ(call.forward(&state), cudaSuccess);
        auto all = emulated::widen(call.out);
        all.insert(all.end(), state.kv.begin(), state.kv.end());
        all.insert(all.end(), state.z.begin(), state.z.end());
        all.insert(all.end(), call.row_sum.begin(), call.row_sum.end());
        return all;
      });
    }
  }
}

// --- the choice of path --------------------------------------------------------------------------

TEST(EmulatedFused, BothPathsAgree) {
  for (const bool decay : {false, true}) {
    Problem p = problem(200);
    p.decay = decay;
    p.fill(10, emulated::round_to<__nv_bfloat16>);
    const Device device(kFew);
    Call<__nv_bfloat16> fused(p, 1);
    ASSERT_EQ(fused.forward(), cudaSuccess);
    EXPECT_TRUE(ran("walk_rows"));
    EXPECT_FALSE(ran("compute_outputs"));
    emulated::forget_kernels();
    Call<__nv_bfloat16> other(p, 2);  // rows that asynchronous copies cannot take
    ASSERT_EQ(other.forward(), cudaSuccess);
    EXPECT_FALSE(ran("walk_rows"));
    EXPECT_TRUE(ran("compute_outputs"));
    EXPECT_LT(error(emulated::widen(fused.out), emulated::widen(other.out)),
              kTolerance<__nv_bfloat16>);
    for (size_t i = 0; i < fused.row_sum.size(); ++i) {
      ASSERT_NEAR(std::log2(fused.row_sum[i]) + fused.row_scale[i],
                  std::log2(other.row_sum[i]) + other.row_scale[i], 1.5e-2);
    }
  }
}

TEST(EmulatedFused, AppliesWhereItShould) {
  const Device device(kFew);
  Problem p = problem(20);
  p.fill(1, emulated::round_to<__half>);
  Call<__half> call(p, 1);
  const auto applies = [&](auto change) {
    dijiang::LinearAttentionParams a = call.params();
    change(a);
    return dijiang::cuda::fused_forward_applies(a);
  };
  using Params = dijiang::LinearAttentionParams;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_FALSE(applies([](Params& a) { a.dtype = dijiang::DType::kFloat32; }));
  EXPECT_FALSE(applies([](Params& a) { a.kind = FeatureKind::kGiven; }));
  EXPECT_FALSE(applies([](Params& a) { a.window = 16; }));
  EXPECT_FALSE(applies([](Params& a) { a.sinks = 4; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 17; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 96; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 500; }));
  for (const int features : {64, 65, 128, 129}) {  // all of a softmax are one tile
    for (const auto dtype : {dijiang::DType::kFloat16, dijiang::DType::kBFloat16}) {
      const int most = dtype == dijiang::DType::kBFloat16 ? 128 : 64;
      EXPECT_EQ(features <= most, applies([&](Params& a) {
                  a.kind = FeatureKind::kSoftmax;
                  a.num_features = features;
                  a.dtype = dtype;
                }));
    }
  }
  EXPECT_FALSE(applies([](Params& a) { a.num_features = 0; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 128; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 80; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 80; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 136; }));  // of float16
  EXPECT_TRUE(applies([](Params& a) {
    a.headdim = 136;
    a.dtype = dijiang::DType::kBFloat16;
  }));
  EXPECT_FALSE(applies([](Params& a) {
    a.headdim = 264;
    a.dtype = dijiang::DType::kBFloat16;
  }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 76; }));
  EXPECT_FALSE(applies([](Params& a) { a.q.stride_seq += 4; }));
  EXPECT_FALSE(applies([](Params& a) { a.v.stride_dim = 2; }));
  EXPECT_FALSE(applies([](Params& a) { a.k.data = static_cast<const char*>(a.k.data) + 8; }));
  cuda_emulator::device().shared_bytes = 48 * 1024;
  EXPECT_FALSE(applies([](Params&) {}));
}

}  // namespace
