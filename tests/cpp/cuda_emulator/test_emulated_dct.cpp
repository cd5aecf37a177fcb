// The DCT kernels under the emulator, against the definition.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <complex>
#include <random>

#include "../dct_definition.h"
#include "cuda/dct_kernels.h"
#include "emulated_attention.h"

namespace {

using dijiang::DctParams;
using dijiang::testing::dct_definition;
using dijiang::testing::relative_error;
using emulated::Traits;

// Rows whose elements are `stride` apart, of a batch of two heads.
template <class T>
struct Problem {
  int64_t n, heads = 2, seqlen, stride;
  std::vector<T> memory, out;
  std::vector<double> x;
  DctParams params;

  Problem(int64_t n_, int64_t seqlen_, int type, int64_t stride_ = 1)
      : n(n_), seqlen(seqlen_), stride(stride_) {
    std::mt19937 generator(7);
    std::normal_distribution<double> normal;
    const int64_t row = n * stride + 3;
    for (int64_t i = 0; i < heads * seqlen * row; ++i) {
      memory.push_back(Traits<T>::narrow(normal(generator)));
    }
    for (int64_t i = 0; i < heads * seqlen; ++i) {
      for (int64_t j = 0; j < n; ++j) x.push_back(Traits<T>::widen(memory[i * row + j * stride]));
    }
    out.assign(x.size(), Traits<T>::narrow(NAN));
    params.dtype = Traits<T>::dtype;
    params.type = type;
    params.n = n;
    params.x = {memory.data(), 0, seqlen * row, row, stride};
    params.heads = heads;
    params.seqlen = seqlen;
    params.out = out.data();
  }
  double error() const {
    return relative_error(emulated::widen(out), dct_definition(x, n, params.type));
  }
};

template <class T>
void launch(const DctParams& p) {
  if (p.type == 2) {
    dijiang::cuda::launch_dct<T, 2>(dijiang::cuda::dct_rows(p), nullptr);
  } else {
    dijiang::cuda::launch_dct<T, 3>(dijiang::cuda::dct_rows(p), nullptr);
  }
}

template <class T>
void check_one_launch(double tolerance) {
  for (int64_t n : {1, 2, 3, 4, 7, 8, 16, 24, 31, 32, 64, 128, 256, 1024, 2048}) {
    for (int type : {2, 3}) {
      Problem<T> problem(n, n < 64 ? 45 : 5, type, n % 3 ? 1 : 2);
      ASSERT_FALSE(dijiang::cuda::dct_uses_cufft(n));
      launch<T>(problem.params);
      EXPECT_LT(problem.error(), tolerance) << "n = " << n << ", type " << type;
    }
  }
}

TEST(EmulatedDct, Float) { check_one_launch<float>(3e-7); }
TEST(EmulatedDct, BFloat16) { check_one_launch<__nv_bfloat16>(0x1p-9); }
TEST(EmulatedDct, Half) { check_one_launch<__half>(0x1p-12); }

// More rows than one block takes: the last tile is ragged.
TEST(EmulatedDct, ManyTiles) {
  Problem<float> problem(64, 300, 2);
  launch<float>(problem.params);
  EXPECT_LT(problem.error(), 3e-7);
}

// Stands in for cuFFT: what CUFFT_R2C and CUFFT_C2R compute.
void real_fft(int type, int64_t n, const dijiang::cuda::DctWork& work) {
  for (int64_t row = 0; row < work.rows; ++row) {
    float* x = work.real + row * n;
    float2* spectrum = work.spectrum + row * (n / 2 + 1);
    if (type == 2) {
      for (int64_t k = 0; k <= n / 2; ++k) {
        std::complex<double> sum;
        for (int64_t j = 0; j < n; ++j)
          sum += double(x[j]) * std::polar(1.0, -2 * M_PI * j * k / n);
        spectrum[k] = {float(sum.real()), float(sum.imag())};
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < n; ++k) {
          const float2 v = spectrum[std::min(k, n - k)];
          const std::complex<double> value(v.x, k <= n / 2 ? v.y : -v.y);
          sum += (value * std::polar(1.0, 2 * M_PI * j * k / n)).real();
        }
        x[j] = float(sum);
      }
    }
  }
}

template <int kType>
void check_around_cufft(int64_t n) {
  Problem<float> problem(n, 5, kType);
  const auto rows = dijiang::cuda::dct_rows(problem.params);
  std::vector<float> real(7 * n);
  std::vector<float2> spectrum(7 * (n / 2 + 1));
  for (int64_t first = 0; first < rows.rows; first += 7) {
    const dijiang::cuda::DctWork work{first, std::min<int64_t>(7, rows.rows - first), real.data(),
                                      spectrum.data()};
    dijiang::cuda::launch_dct_before_fft<float, kType>(rows, work, nullptr);
    real_fft(kType, n, work);
    dijiang::cuda::launch_dct_after_fft<float, kType>(rows, work, nullptr);
  }
  EXPECT_LT(problem.error(), 3e-7) << "n = " << n << ", type " << kType;
}

TEST(EmulatedDct, AroundCufft) {
  for (int64_t n : {33, 80, 96, 127}) {
    ASSERT_TRUE(dijiang::cuda::dct_uses_cufft(n));
    check_around_cufft<2>(n);
    check_around_cufft<3>(n);
  }
  EXPECT_TRUE(dijiang::cuda::dct_uses_cufft(4096));
}

}  // namespace
