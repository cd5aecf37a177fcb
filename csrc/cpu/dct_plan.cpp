#include "cpu/dct_plan.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace dijiang::cpu {
namespace {

// Up to here a length that is no power of two multiplies by the matrix: an FFT pays only beyond,
// and one with Bluestein's detour later still.
constexpr int64_t kDenseLimit = 24;
constexpr int64_t kDenseLimitBluestein = 100;

bool has_large_prime(int64_t n) {
  for (int p = 2; p <= kMaxRadix; ++p) {
    while (n % p == 0) n /= p;
  }
  return n != 1;
}

// Plans are never destroyed: threads of the caller's pool may outlive static destructors.
template <typename T>
const T* kept(const std::vector<T>& values) {
  T* copy = new T[values.size()];
  std::copy(values.begin(), values.end(), copy);
  return copy;
}

template <typename Acc>
Complex<Acc> rounded(std::complex<double> z) {
  return {static_cast<Acc>(z.real()), static_cast<Acc>(z.imag())};
}

// exp(-pi i k / n)
std::complex<double> half_root(int64_t k, int64_t n) {
  return std::polar(1.0, -M_PI * static_cast<double>(k % (2 * n)) / static_cast<double>(n));
}

// In place, size a power of two: for the tables alone, so plain.
void small_fft(std::vector<std::complex<double>>& x) {
  const size_t n = x.size();
  if (n == 1) return;
  std::vector<std::complex<double>> even, odd;
  for (size_t j = 0; j < n; j += 2) {
    even.push_back(x[j]);
    odd.push_back(x[j + 1]);
  }
  small_fft(even);
  small_fft(odd);
  for (size_t k = 0; k < n / 2; ++k) {
    const std::complex<double> term = half_root(2 * k, n) * odd[k];
    x[k] = even[k] + term;
    x[k + n / 2] = even[k] - term;
  }
}

template <typename Acc>
const FftPlan<Acc>* make_fft(int64_t n) {
  auto* plan = new FftPlan<Acc>;
  plan->n = n;
  int64_t rest = n;
  int count = 0;
  const auto divide_by = [&](int p) {
    for (; rest % p == 0; rest /= p) plan->radices[count++] = p;
  };
  divide_by(4);
  divide_by(2);
  for (int p = 3; p <= kMaxRadix; p += 2) divide_by(p);
  if (rest == 1) {
    std::vector<Complex<Acc>> roots;
    for (int64_t k = 0; k < n; ++k) roots.push_back(rounded<Acc>(half_root(2 * k, n)));
    plan->roots = kept(roots);
    return plan;
  }
  int64_t size = 1;
  while (size < 2 * n - 1) size *= 2;
  plan->inner = make_fft<Acc>(size);
  std::vector<std::complex<double>> wave(size);
  std::vector<Complex<Acc>> chirp, filter;
  for (int64_t j = 0; j < n; ++j) {
    const std::complex<double> w = half_root(j * j % (2 * n), n);
    chirp.push_back(rounded<Acc>(w));
    wave[j] = wave[(size - j) % size] = std::conj(w);
  }
  small_fft(wave);
  for (std::complex<double> w : wave) filter.push_back(rounded<Acc>(w / double(size)));
  plan->chirp = kept(chirp);
  plan->filter = kept(filter);
  return plan;
}

template <typename Acc>
Rotation<Acc> rotation(double angle, double factor) {
  return {static_cast<Acc>(std::cos(angle) * factor), static_cast<Acc>(std::sin(angle) * factor)};
}

template <typename Acc>
const DctPlan<Acc>* make_plan(int64_t n) {
  auto* plan = new DctPlan<Acc>;
  const double scale = std::sqrt(2.0 / static_cast<double>(n));
  const auto a = [&](int64_t k) {
    return k == 0 ? std::sqrt(1.0 / static_cast<double>(n)) : scale;
  };
  plan->n = n;
  if ((n & (n - 1)) == 0) {
    plan->method = DctMethod::kPowerOfTwo;
    const auto rotations = [n](double factor) {
      std::vector<Rotation<Acc>> result = {rotation<Acc>(M_PI / 4, factor)};
      for (int64_t m = 1; m <= n / 4; m *= 2) {
        for (int64_t j = 0; j < m; ++j) {
          result.push_back(rotation<Acc>(M_PI * (2.0 * j + 1) / (8.0 * m), factor));
        }
      }
      return kept(result);
    };
    plan->rotations = rotations(1.0);
    plan->scaled_rotations = rotations(scale);
    plan->first_scale = static_cast<Acc>(a(0));
  } else if (n <= (has_large_prime(n) ? kDenseLimitBluestein : kDenseLimit)) {
    plan->method = DctMethod::kDense;
    std::vector<Acc> matrix;
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = 0; j < n; ++j) {
        const double turn = static_cast<double>((2 * j + 1) * k % (4 * n)) / (2.0 * n);
        matrix.push_back(static_cast<Acc>(a(k) * std::cos(M_PI * turn)));
      }
    }
    plan->matrix = kept(matrix);
  } else {
    plan->method = DctMethod::kFft;
    plan->fft = make_fft<Acc>(n % 2 ? n : n / 2);
    std::vector<Rotation<Acc>> turns, halves;
    for (int64_t k = 0; k <= n / 2; ++k) {
      turns.push_back(rotation<Acc>(M_PI * k / (2.0 * n), a(k)));
      halves.push_back(rotation<Acc>(2 * M_PI * k / n, 1.0));
    }
    plan->turns = kept(turns);
    plan->halves = kept(halves);
  }
  return plan;
}

}  // namespace

template <typename Acc>
const DctPlan<Acc>& dct_plan(int64_t n) {
  static std::mutex mutex;
  static auto& plans = *new std::unordered_map<int64_t, const DctPlan<Acc>*>;
  std::lock_guard<std::mutex> lock(mutex);
  const DctPlan<Acc>*& plan = plans[n];
  if (!plan) plan = make_plan<Acc>(n);
  return *plan;
}

template const DctPlan<float>& dct_plan<float>(int64_t);
template const DctPlan<double>& dct_plan<double>(int64_t);

}  // namespace dijiang::cpu
