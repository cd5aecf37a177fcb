// What decides which hard keys stay: the largest scores, the first of equal ones, NaN last.
#include "cpu/keep_best.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace dijiang::cpu {
namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<int64_t> kept(const std::vector<double>& scores, int64_t wanted,
                          const std::vector<int64_t>& before = {}) {
  const auto n = static_cast<int64_t>(scores.size());
  std::vector<int64_t> order(n), result;
  const auto marks = std::make_unique<bool[]>(n);
  for (int64_t i : before) marks[i] = true;
  keep_best(scores.data(), n, wanted, order.data(), marks.get());
  for (int64_t i = 0; i < n; ++i) {
    if (marks[i]) result.push_back(i);
  }
  return result;
}

using Indices = std::vector<int64_t>;

TEST(KeepBest, TheLargest) {
  EXPECT_EQ(kept({3, 1, 4, 1, 5, 9, 2, 6}, 3), (Indices{4, 5, 7}));
  EXPECT_EQ(kept({3, 1, 4}, 0), Indices{});
  EXPECT_EQ(kept({3, 1, 4}, 5), (Indices{0, 1, 2}));
  EXPECT_EQ(kept({}, 2), Indices{});
}

TEST(KeepBest, OfEqualOnesTheFirst) {
  EXPECT_EQ(kept({0, 7, 7, 0, 7}, 2), (Indices{1, 2}));
  EXPECT_EQ(kept({0, 0, 0, 0}, 3), (Indices{0, 1, 2}));
}

TEST(KeepBest, BesideThoseKeptBefore) {
  EXPECT_EQ(kept({9, 8, 7, 6}, 2, {0, 2}), (Indices{0, 1, 2, 3}));
  EXPECT_EQ(kept({9, 8, 7, 6}, 1, {0}), (Indices{0, 1}));
}

TEST(KeepBest, NaNIsBelowEveryNumber) {
  EXPECT_EQ(kept({kNaN, -1e300, kNaN, 0}, 2), (Indices{1, 3}));
  EXPECT_EQ(kept({kNaN, kNaN, -std::numeric_limits<double>::infinity()}, 2), (Indices{0, 1}));
}

TEST(KeepBest, AsASort) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<double> scores(200);
    for (double& x : scores) x = static_cast<double>(random() % 40);
    Indices order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
    Indices expected(order.begin(), order.begin() + 70);
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(kept(scores, 70), expected);
  }
}

}  // namespace
}  // namespace dijiang::cpu
