// The definition of the DCT, summed more precisely than any kernel does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dijiang::testing {

// a_k cos(pi (2j + 1) k / 2n)
class DctMatrix {
 public:
  explicit DctMatrix(int64_t n) : n_(n), cosines_(4 * n) {
    const long double pi = std::acos(-1.0L);
    for (int64_t i = 0; i < 4 * n; ++i) cosines_[i] = std::cos(pi * i / (2 * n));
  }
  long double operator()(int64_t k, int64_t j) const {
    return std::sqrt((k ? 2.0L : 1.0L) / n_) * cosines_[(2 * j + 1) * k % (4 * n_)];
  }

 private:
  int64_t n_;
  std::vector<long double> cosines_;
};

// Of the rows of x.
inline std::vector<double> dct_definition(const std::vector<double>& x, int64_t n, int type) {
  const DctMatrix c(n);
  const int64_t rows = x.size() / n;
  std::vector<double> out(x.size());
  std::vector<long double> sum(rows);
  for (int64_t k = 0; k < n; ++k) {
    std::fill(sum.begin(), sum.end(), 0.0L);
    for (int64_t j = 0; j < n; ++j) {
      const long double factor = type == 2 ? c(k, j) : c(j, k);
      for (int64_t row = 0; row < rows; ++row) sum[row] += factor * x[row * n + j];
    }
    for (int64_t row = 0; row < rows; ++row) out[row * n + k] = static_cast<double>(sum[row]);
  }
  return out;
}

// In root mean square.
inline double relative_error(const std::vector<double>& got, const std::vector<double>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace dijiang::testing
