// DCT against the O(n^2) sum in double.
#include "dijiang/core/dct.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dtype.h"
#include "dct_definition.h"

namespace dijiang {
namespace {

using cpu::AccOf;
using cpu::BFloat16;
using cpu::Float16;
using testing::dct_definition;
using testing::DctMatrix;
using testing::relative_error;

// What a test knows of an element type. (Not the type itself, which may lack run-time type
// information: _Float16.)
template <typename T>
struct Case;
template <>
struct Case<float> {
  using Value = float;
  static constexpr DType dtype = DType::kFloat32;
  // In root mean square, relative. A matrix product in float has 5e-8 sqrt(n) / 3 or so.
  static constexpr double tolerance = 3e-7;
};
template <>
struct Case<double> {
  using Value = double;
  static constexpr DType dtype = DType::kFloat64;
  static constexpr double tolerance = 1e-15;
};
template <>
struct Case<BFloat16> {
  using Value = BFloat16;
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr double tolerance = 0x1p-9;  // the rounding of the result alone
};
template <>
struct Case<Float16> {
  using Value = Float16;
  static constexpr DType dtype = DType::kFloat16;
  static constexpr double tolerance = 0x1p-12;
};

template <typename T>
std::vector<T> random_values(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values;
  for (int64_t i = 0; i < size; ++i) {
    values.push_back(cpu::from_acc<T>(static_cast<AccOf<T>>(normal(generator))));
  }
  return values;
}

template <typename T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> result;
  for (T value : values) result.push_back(cpu::to_acc<T>(value));
  return result;
}

template <typename T>
std::vector<T> transformed(const std::vector<T>& x, int64_t n, int type) {
  std::vector<T> out(x.size());
  DctParams p;
  p.dtype = Case<T>::dtype;
  p.type = type;
  p.n = n;
  p.seqlen = x.size() / n;
  p.x = {x.data(), static_cast<int64_t>(x.size()), static_cast<int64_t>(x.size()), n, 1};
  p.out = out.data();
  cpu::dct(p, 0, p.seqlen);
  return out;
}

std::vector<int64_t> lengths() {
  std::vector<int64_t> result;
  for (int64_t n = 1; n <= 70; ++n) result.push_back(n);
  for (int64_t n : {96, 100, 127, 128, 255, 256, 777, 1000, 1024, 4096}) result.push_back(n);
  return result;
}

template <typename T>
class Dct : public ::testing::Test {};
using Types = ::testing::Types<Case<float>, Case<double>, Case<BFloat16>, Case<Float16>>;
TYPED_TEST_SUITE(Dct, Types);

TYPED_TEST(Dct, EqualsTheSum) {
  for (int64_t n : lengths()) {
    const int64_t rows = n <= 256 ? 37 : 3;  // more than one tile, and a ragged end
    const auto x = random_values<typename TypeParam::Value>(rows * n, 1);
    for (int type : {2, 3}) {
      const auto got = widened(transformed(x, n, type));
      EXPECT_LT(relative_error(got, dct_definition(widened(x), n, type)), TypeParam::tolerance)
          << "n = " << n << ", type " << type;
    }
  }
}

TYPED_TEST(Dct, Type3InvertsType2) {
  for (int64_t n : lengths()) {
    const auto x = random_values<typename TypeParam::Value>(5 * n, 2);
    const auto back = transformed(transformed(x, n, 2), n, 3);
    EXPECT_LT(relative_error(widened(back), widened(x)), 2 * TypeParam::tolerance) << "n = " << n;
  }
}

TYPED_TEST(Dct, TakesAnyStrides) {
  for (int64_t n : {5, 16, 64, 96, 127}) {
    const int64_t batch = 2, heads = 3, seqlen = 7;
    // Memory in the order (seqlen, dim, batch, heads), each dimension padded by one.
    DctParams p;
    p.dtype = TypeParam::dtype;
    p.n = n;
    p.batch = batch;
    p.heads = heads;
    p.seqlen = seqlen;
    p.x.stride_head = 1;
    p.x.stride_batch = heads + 1;
    p.x.stride_dim = (batch + 1) * p.x.stride_batch;
    p.x.stride_seq = (n + 1) * p.x.stride_dim;
    const auto memory = random_values<typename TypeParam::Value>((seqlen + 1) * p.x.stride_seq, 3);
    p.x.data = memory.data();
    std::vector<typename TypeParam::Value> rows, out(batch * heads * seqlen * n);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < seqlen; ++t) {
          for (int64_t j = 0; j < n; ++j) {
            rows.push_back(memory[b * p.x.stride_batch + h * p.x.stride_head + t * p.x.stride_seq +
                                  j * p.x.stride_dim]);
          }
        }
      }
    }
    p.out = out.data();
    cpu::dct(p, 0, 20);  // any split of the rows gives the same
    cpu::dct(p, 20, batch * heads * seqlen);
    EXPECT_EQ(widened(out), widened(transformed(rows, n, 2))) << "n = " << n;
  }
}

template <typename T>
void expect_same_bits(const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const AccOf<T> a = cpu::to_acc<T>(got[i]), b = cpu::to_acc<T>(expected[i]);
    ASSERT_TRUE(std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)))
        << a << " is not " << b << " at " << i;
  }
}

TYPED_TEST(Dct, RowsDoNotDependOnTheirNeighbours) {
  // Alone a row is rounded number by number, among others by vectors. Its values reach over the
  // whole range of the type, infinities and NaN among them.
  using T = typename TypeParam::Value;
  for (int64_t n : {16, 48, 64, 96}) {
    auto x = random_values<T>(37 * n, 7);
    const int digits = std::numeric_limits<AccOf<T>>::max_exponent;
    for (int64_t i = 0; i < 37 * n; ++i) {
      const AccOf<T> value = std::ldexp(cpu::to_acc<T>(x[i]), i / n * 2 * digits / 36 - digits);
      x[i] = cpu::from_acc<T>(i / n == 18 ? AccOf<T>(NAN) : value);
    }
    for (int type : {2, 3}) {
      std::vector<T> expected;
      for (int64_t row = 0; row < 37; ++row) {
        const std::vector<T> alone(x.begin() + row * n, x.begin() + (row + 1) * n);
        const auto result = transformed(alone, n, type);
        expected.insert(expected.end(), result.begin(), result.end());
      }
      expect_same_bits(transformed(x, n, type), expected);
    }
  }
}

TYPED_TEST(Dct, LongOutputsAreThoseOfTheirParts) {
  // Long outputs are written another way where they are aligned.
  using T = typename TypeParam::Value;
  for (int64_t n : {16, 64, 80}) {
    const int64_t rows = (int64_t{1} << 22) / (n * sizeof(T)) + 3, part = rows / 4;
    const auto x = random_values<T>(rows * n, 8);
    std::vector<T> expected;
    for (int64_t begin = 0; begin < rows; begin += part) {
      const int64_t end = std::min(begin + part, rows);
      const auto result =
          transformed(std::vector<T>(x.begin() + begin * n, x.begin() + end * n), n, 2);
      expected.insert(expected.end(), result.begin(), result.end());
    }
    std::vector<T> memory(rows * n + 128);
    for (int64_t shift : {0, 1}) {
      const int64_t address = reinterpret_cast<intptr_t>(memory.data()) / sizeof(T);
      T* out = memory.data() + (64 - address % 64) + shift;
      DctParams p;
      p.dtype = TypeParam::dtype;
      p.n = n;
      p.seqlen = rows;
      p.x = {x.data(), rows * n, rows * n, n, 1};
      p.out = out;
      cpu::dct(p, 0, rows / 2);
      cpu::dct(p, rows / 2, rows);
      expect_same_bits(std::vector<T>(out, out + rows * n), expected);
    }
  }
}

TEST(DctFloat, IsAsPreciseAsTheMatrixProduct) {
  // The yardstick is the plain float product with the rounded matrix.
  for (int64_t n : {37, 64, 96, 100, 103, 127, 128, 256, 1000, 1024, 4096}) {
    const int64_t rows = 8;
    const auto x = random_values<float>(rows * n, 4);
    const auto expected = dct_definition(widened(x), n, 2);
    const DctMatrix c(n);
    std::vector<double> product(rows * n);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < n; ++k) {
        float sums[8] = {};  // eight partial sums, as a vectorised product has
        for (int64_t j = 0; j < n; ++j) {
          sums[j % 8] += static_cast<float>(c(k, j)) * x[row * n + j];
        }
        product[row * n + k] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                               ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      }
    }
    const double ours = relative_error(widened(transformed(x, n, 2)), expected);
    const double theirs = relative_error(product, expected);
    EXPECT_LT(ours, 2 * theirs) << "n = " << n;
    RecordProperty("error_" + std::to_string(n), std::to_string(ours / theirs));
  }
}

TEST(DctFloat, KeepsNonFiniteValuesInTheirRow) {
  for (int64_t n : {20, 64, 90, 99, 127}) {
    auto x = random_values<float>(20 * n, 5);
    for (int type : {2, 3}) {
      const auto clean = transformed(x, n, type);
      auto spoilt = x;
      spoilt[3 * n + 7] = INFINITY;
      const auto got = transformed(spoilt, n, type);
      for (int64_t i = 0; i < 20 * n; ++i) {
        if (i / n == 3) {
          EXPECT_FALSE(std::isfinite(got[i]));
        } else {
          EXPECT_EQ(got[i], clean[i]);
        }
      }
    }
  }
}

TEST(DctFloat, RunsOnManyThreads) {
  const int64_t n = 77;
  const auto x = random_values<float>(64 * n, 6);
  const auto expected = transformed(x, n, 2);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] { result = transformed(x, n, 2); });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, expected);
}

}  // namespace
}  // namespace dijiang
