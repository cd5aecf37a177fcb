// The choice of hard keys, run by the emulator: the selection by itself, then the fused walk
// against the definition in double and against the other one.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <random>
#include <string>

#include "cuda/fused_choice.h"
#include "cuda/hard_key_choice.h"
#include "emulated_device.h"

namespace {

using emulated::Call;
using emulated::Device;
using emulated::error;
using emulated::forget_kernels;
using emulated::ran;
using emulated::State;
using oracle::Problem;

// --- selection -----------------------------------------------------------------------------------

__global__ void run_keep_best(const float* scores, int n, int wanted, int* kept) {
  DIJIANG_DYNAMIC_SHARED(raw);
  dijiang::cuda::Choice choice{};
  choice.kept = reinterpret_cast<int*>(raw);
  choice.entering = choice.kept + n;
  choice.counts = choice.entering + n;
  for (int i = threadIdx.x; i < n; i += dijiang::cuda::kThreads) choice.kept[i] = kept[i];
  __syncthreads();
  dijiang::cuda::keep_best(n, wanted, choice, [&](int i) { return scores[i]; });
  for (int i = threadIdx.x; i < n; i += dijiang::cuda::kThreads) kept[i] = choice.kept[i];
}

using Indices = std::vector<int>;

Indices kept(const std::vector<float>& scores, int wanted, const Indices& before = {}) {
  const int n = int(scores.size());
  std::vector<int> marks(n + 1);
  for (const int i : before) marks[i] = 1;
  DIJIANG_LAUNCH(run_keep_best, 1, dijiang::cuda::kThreads,
                 (2 * n + 2 * dijiang::cuda::kChoiceWarps) * sizeof(int), nullptr, scores.data(), n,
                 wanted, marks.data());
  Indices result;
  for (int i = 0; i < n; ++i) {
    if (marks[i]) result.push_back(i);
  }
  return result;
}

TEST(EmulatedChoice, KeepsTheLargest) {
  EXPECT_EQ(kept({3, 1, 4, 1, 5, 9, 2, 6}, 3), (Indices{4, 5, 7}));
  EXPECT_EQ(kept({-3, -1, -4}, 1), (Indices{1}));
  EXPECT_EQ(kept({3, 1, 4}, 0), Indices{});
  EXPECT_EQ(kept({3, 1, 4}, 3), (Indices{0, 1, 2}));
  EXPECT_EQ(kept({3, 1, 4}, 5), (Indices{0, 1, 2}));
}

TEST(EmulatedChoice, OfEqualOnesTheFirst) {
  EXPECT_EQ(kept({0, 7, 7, 0, 7}, 2), (Indices{1, 2}));
  EXPECT_EQ(kept({0, 0, 0, 0}, 3), (Indices{0, 1, 2}));
  EXPECT_EQ(kept({-0.0f, 0, -0.0f, 0}, 2), (Indices{0, 1}));
  EXPECT_EQ(kept({1, 0, -0.0f, 0}, 3), (Indices{0, 1, 2}));
}

TEST(EmulatedChoice, BesideThoseKeptBefore) {
  EXPECT_EQ(kept({9, 8, 7, 6}, 2, {0, 2}), (Indices{0, 1, 2, 3}));
  EXPECT_EQ(kept({9, 8, 7, 6}, 1, {0}), (Indices{0, 1}));
  EXPECT_EQ(kept({9, 8, 7, 6}, 0, {3}), (Indices{3}));
}

TEST(EmulatedChoice, NaNIsBelowEveryNumber) {
  EXPECT_EQ(kept({NAN, -1e30f, NAN, 0}, 2), (Indices{1, 3}));
  EXPECT_EQ(kept({NAN, NAN, -INFINITY}, 2), (Indices{0, 1}));  // and no lower than -infinity
  EXPECT_EQ(kept({NAN, INFINITY, 1}, 1), (Indices{1}));
  EXPECT_EQ(kept({-NAN, 1, 2}, 2), (Indices{1, 2}));
}

TEST(EmulatedChoice, KeepsAsASortDoes) {
  std::mt19937 random(0);
  for (const auto& [n, wanted, kinds] : std::vector<std::array<int, 3>>{
           {200, 70, 40}, {700, 300, 1 << 20}, {600, 599, 3}, {1000, 1, 1000}, {513, 256, 2}}) {
    std::vector<float> scores(n);
    for (float& x : scores) x = float(int(random() % kinds) - kinds / 2) * 0.37f;
    Indices order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int i, int j) { return scores[i] > scores[j]; });
    Indices expected(order.begin(), order.begin() + wanted);
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(kept(scores, wanted), expected);
  }
}

// Ranks over more than one round of the block's threads.
TEST(EmulatedChoice, OrderOfThreadsKeepsTheSame) {
  std::mt19937 random(1);
  std::vector<float> scores(900);
  for (float& x : scores) x = float(random() % 3);
  emulated::expect_same_in_any_order([&] {
    const Indices result = kept(scores, 500);
    return std::vector<double>(result.begin(), result.end());
  });
}

// --- the walk ------------------------------------------------------------------------------------

template <class T>
struct Walk {
  std::vector<int32_t> table;
  std::vector<float> votes, sums;
  std::vector<int64_t> positions;
};

template <class T>
Walk<T> walk(const Problem& p, bool fused) {
  forget_kernels();
  Call<T> call(p, fused ? 1 : 2);  // the other one for values apart
  State<T> state(p);
  dijiang::LinearAttentionParams a = call.params();
  a.final = state.pointers();
  Walk<T> result;
  result.table.assign(p.kv_heads * a.cache_rows() * p.cache().most, -9);
  a.chosen = result.table.data();
  const size_t bytes = dijiang::cuda::linear_attention_forward_workspace(a);
  std::unique_ptr<char, decltype(&std::free)> workspace(
      static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), &std::free);
  std::memset(workspace.get(), 0xFF, bytes);
  EXPECT_EQ(dijiang::cuda::linear_attention_forward(a, workspace.get(), nullptr), cudaSuccess);
  EXPECT_EQ(ran("choose_hard_keys<Fused>"), fused);
  EXPECT_EQ(ran("choose_hard_keys<Plain>"), !fused);
  result.votes = state.votes;
  result.sums = state.sums;
  result.positions = state.cache_position;
  return result;
}

std::string name(const Problem& p) {
  return "window " + std::to_string(p.window) + " sinks " + std::to_string(p.sinks) + " slots " +
         std::to_string(p.cache().most) + " seqlen " + std::to_string(p.seqlen) + " heads " +
         std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) + " dims " +
         std::to_string(p.dim) + ", " + std::to_string(p.dim_v);
}

// The table against the definition's: a list of positions for every block of every sequence.
template <class T>
void expect_defined(const Problem& p, const Walk<T>& got) {
  const int most = int(p.cache().most);
  dijiang::LinearAttentionParams a;
  a.batch = p.batch;
  a.seqlen = p.seqlen;
  a.window = p.window;
  const auto sequences = p.sequences();
  a.num_seqs = int64_t(sequences.size());
  for (int h = 0; h < p.kv_heads; ++h) {
    for (size_t n = 0; n < sequences.size(); ++n) {
      const auto& s = sequences[n];
      const auto blocks = oracle::hard_keys(p, s[0], s[1], s[2] - s[1], h);
      for (size_t block = 0; block < blocks.size(); ++block) {
        const int64_t row = h * a.cache_rows() +
                            a.cache_row(int64_t(n), int64_t{s[0]} * p.seqlen + s[1]) +
                            int64_t(block);
        for (int i = 0; i < most; ++i) {
          const int want = i < int(blocks[block].size()) ? blocks[block][i] : -1;
          ASSERT_EQ(got.table[row * most + i], want)
              << "head " << h << " sequence " << n << " block " << block << " slot " << i;
        }
      }
    }
  }
}

template <class T>
void check(Problem p, unsigned seed = 1) {
  SCOPED_TRACE(name(p));
  p.fill(seed, emulated::round_to<T>);
  const Walk<T> got = walk<T>(p, true), other = walk<T>(p, false);
  expect_defined(p, got);
  EXPECT_EQ(got.table, other.table);
  EXPECT_EQ(got.positions, other.positions);
  EXPECT_LT(error(emulated::widen(got.votes), emulated::widen(other.votes)), 1e-5);
  EXPECT_EQ(got.sums, other.sums);
}

Problem problem(int seqlen, int window, int sinks, int slots) {
  Problem p;
  p.seqlen = seqlen;
  p.dim = p.dim_v = 64;
  p.features = 0;
  p.scale = 0.125;
  p.size = 1.5;
  p.window = window;
  p.sinks = sinks;
  p.cache_size = slots;
  return p;
}

// Keys for one warp and for all of them twice, rows of queries for one tile and for two batches;
// sinks within a group of keys, and beyond the first blocks.
template <class T>
void check_walks() {
  for (const auto& [window, sinks, slots, seqlen] :
       std::vector<std::array<int, 4>>{{5, 0, 1, 60},
                                       {8, 3, 5, 75},
                                       {6, 8, 12, 75},
                                       {16, 40, 20, 150},
                                       {16, 0, 90, 100},
                                       {60, 4, 33, 320},
                                       {64, 4, 64, 260},
                                       {150, 2, 200, 460}}) {
    check<T>(problem(seqlen, window, sinks, slots));
  }
}
TEST(EmulatedChoice, BFloat16) { check_walks<__nv_bfloat16>(); }
TEST(EmulatedChoice, Half) { check_walks<__half>(); }

TEST(EmulatedChoice, ManySlots) { check<__nv_bfloat16>(problem(700, 32, 4, 500)); }

TEST(EmulatedChoice, Sizes) {
  const Device device(emulated::kMany);
  for (const auto& [dim, dim_v] : std::vector<std::array<int, 2>>{{128, 128},
                                                                  {64, 8},
                                                                  {128, 72},
                                                                  {64, 120},
                                                                  {80, 80},
                                                                  {8, 16},
                                                                  {96, 96},
                                                                  {120, 40},
                                                                  {256, 256},
                                                                  {136, 200}}) {
    Problem p = problem(120, 16, 3, 24);
    p.dim = dim;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(dim);
    check<__nv_bfloat16>(p);
    check<__half>(p);
  }
}

TEST(EmulatedChoice, GroupedQueriesAndSizesByHead) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int, 2>>{{9, 3}, {5, 1}, {3, 3}}) {
    Problem p = problem(210, 20, 3, 30);
    p.heads = heads;
    p.kv_heads = kv_heads;
    check<__nv_bfloat16>(p);
    if (kv_heads != 3) continue;
    p.cache_size = 0;
    p.cache_sizes = {7, 0, 40};
    check<__half>(p);
  }
}

TEST(EmulatedChoice, PackedAndPadded) {
  Problem p = problem(150, 8, 2, 6);
  p.batch = 2;
  p.segments = {{0, 0, 1}, {0, 1, 100}, {0, 100, 100}, {0, 110, 150}, {1, 7, 140}};
  check<__nv_bfloat16>(p);
}

// With far keys, too: those that leave are folded by the list.
TEST(EmulatedChoice, BesideFarKeys) {
  Problem p = problem(130, 16, 2, 20);
  p.features = 10;
  for (const bool decay : {false, true}) {
    p.decay = decay;
    check<__nv_bfloat16>(p);
    forget_kernels();
    p.fill(1, emulated::round_to<__nv_bfloat16>);
    Call<__nv_bfloat16> call(p, 1);
    ASSERT_EQ(call.forward(), cudaSuccess);
    EXPECT_TRUE(ran("choose_hard_keys<Fused>"));
    EXPECT_LT(error(emulated::widen(call.out), oracle::run(p, false).out), 5e-3);
  }
}

TEST(EmulatedChoice, SplitAnywhere) {
  for (const auto& [window, sinks, slots] :
       std::vector<std::array<int, 3>>{{8, 3, 5}, {16, 20, 24}, {40, 4, 33}}) {
    Problem p = problem(170, window, sinks, slots);
    p.fill(4, emulated::round_to<__half>);
    const Walk<__half> whole = walk<__half>(p, true);
    for (const std::vector<int>& cuts : std::vector<std::vector<int>>{
             {1, 2, 10, 33, 64, 80, 81, 160, 170}, {window, 3 * window, 170}}) {
      forget_kernels();
      Call<__half> call(p, 1);
      State<__half> state(p);
      ASSERT_EQ(call.forward_parts(cuts, state), cudaSuccess);
      EXPECT_TRUE(ran("choose_hard_keys<Fused>"));
      EXPECT_FALSE(ran("choose_hard_keys<Plain>"));
      EXPECT_EQ(state.cache_position, whole.positions);
      EXPECT_LT(error(emulated::widen(state.votes), emulated::widen(whole.votes)), 1e-5);
      EXPECT_EQ(state.sums, whole.sums);
    }
  }
}

// Later tokens are seen by no choice, not even NaN.
TEST(EmulatedChoice, FutureChangesNothing) {
  Problem p = problem(110, 16, 3, 20);
  p.fill(5, emulated::round_to<__nv_bfloat16>);
  const Walk<__nv_bfloat16> before = walk<__nv_bfloat16>(p, true);
  const int cut = 70, w = p.window;
  for (int t = cut; t < p.seqlen; ++t) {
    for (int h = 0; h < p.heads; ++h)
      std::fill_n(&p.q[p.row(h, p.heads, 0, t) * p.dim], p.dim, NAN);
    std::fill_n(&p.k[p.row(0, 1, 0, t) * p.dim], p.dim, NAN);
    std::fill_n(&p.v[p.row(0, 1, 0, t) * p.dim_v], p.dim_v, NAN);
  }
  const Walk<__nv_bfloat16> after = walk<__nv_bfloat16>(p, true);
  for (int i = 0; i < (cut / w + 1) * p.cache_size; ++i) {
    ASSERT_EQ(before.table[i], after.table[i]) << "block " << i / p.cache_size;
  }
}

// A row with a NaN or infinite score gives no votes; the others do as ever, here as in the other
// walk.
TEST(EmulatedChoice, RowsThatAreNotFinite) {
  for (const double bad : {double(NAN), double(INFINITY)}) {
    Problem p = problem(110, 16, 3, 20);
    p.fill(6, emulated::round_to<__nv_bfloat16>);
    p.q[p.row(1, p.heads, 0, 50) * p.dim + 3] = bad;
    p.k[p.row(0, 1, 0, 60) * p.dim + 7] = bad;
    const Walk<__nv_bfloat16> got = walk<__nv_bfloat16>(p, true);
    const Walk<__nv_bfloat16> other = walk<__nv_bfloat16>(p, false);
    EXPECT_EQ(got.table, other.table);
    for (const float x : got.votes) EXPECT_TRUE(std::isfinite(x));
    EXPECT_LT(error(emulated::widen(got.votes), emulated::widen(other.votes)), 1e-5);
  }
}

TEST(EmulatedChoice, LargeScores) {
  Problem p = problem(110, 16, 3, 20);
  p.size = 30.0;
  check<__nv_bfloat16>(p);
}

TEST(EmulatedChoice, OrderOfThreadsChangesNothing) {
  Problem p = problem(100, 16, 3, 40);
  p.heads = 5;
  p.fill(7, emulated::round_to<__nv_bfloat16>);
  emulated::expect_same_in_any_order([&] {
    const Walk<__nv_bfloat16> got = walk<__nv_bfloat16>(p, true);
    std::vector<double> all(got.table.begin(), got.table.end());
    all.insert(all.end(), got.votes.begin(), got.votes.end());
    all.insert(all.end(), got.sums.begin(), got.sums.end());
    return all;
  });
}

// Without far keys nothing is listed, and the walk has counted the slots.
TEST(EmulatedChoice, ListsOnlyForFarKeys) {
  Problem p = problem(60, 8, 2, 6);
  p.fill(8, emulated::round_to<__half>);
  forget_kernels();
  Call<__half> call(p, 1);
  ASSERT_EQ(call.forward(), cudaSuccess);
  EXPECT_FALSE(ran("list_leaving"));
  forget_kernels();
  State<__half> state(p);
  ASSERT_EQ(call.forward(&state), cudaSuccess);
  EXPECT_TRUE(ran("list_leaving"));
  EXPECT_LT(error(emulated::widen(call.out), oracle::run(p, false).out), 8e-4);
}

TEST(EmulatedChoice, AppliesWhereItShould) {
  const Device device(emulated::kMany);
  Problem p = problem(20, 16, 4, 8);
  p.fill(1, emulated::round_to<__half>);
  Call<__half> call(p, 1);
  State<__half> state(p);
  const auto applies = [&](const std::function<void(dijiang::LinearAttentionParams&)>& change) {
    dijiang::LinearAttentionParams a = call.params();
    a.initial = state.pointers();
    change(a);
    return dijiang::cuda::fused_choice_applies(a);
  };
  using Params = dijiang::LinearAttentionParams;
  EXPECT_TRUE(applies([](Params&) {}));
  EXPECT_TRUE(applies([](Params& a) { a.dtype = dijiang::DType::kBFloat16; }));
  EXPECT_TRUE(applies([](Params& a) { a.num_features = 64; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 128; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim_v = 72; }));
  EXPECT_FALSE(applies([](Params& a) { a.dtype = dijiang::DType::kFloat32; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = 80; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 76; }));
  EXPECT_TRUE(applies([](Params& a) { a.headdim = a.headdim_v = 256; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim = 264; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 76; }));
  EXPECT_FALSE(applies([](Params& a) { a.headdim_v = 192; }));
  EXPECT_FALSE(applies([](Params& a) { a.q.stride_seq += 4; }));
  EXPECT_FALSE(applies([](Params& a) { a.v.stride_dim = 2; }));
  EXPECT_FALSE(applies([](Params& a) { a.k.data = static_cast<const char*>(a.k.data) + 8; }));
  EXPECT_FALSE(
      applies([](Params& a) { a.initial.cache_k = static_cast<char*>(a.initial.cache_k) + 2; }));
  EXPECT_FALSE(applies([](Params& a) { a.cache.most = 20000; }));
}

}  // namespace
