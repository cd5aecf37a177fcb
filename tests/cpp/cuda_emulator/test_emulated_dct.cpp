// The DCT kernels under the emulator, against the definition.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <array>
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

// Rows whose elements are `stride` apart, `gap` more behind each, of a batch of two heads.
template <class T>
struct Problem {
  int64_t n, heads = 2, seqlen, stride, gap;
  std::vector<T> memory, out;
  std::vector<double> x;
  DctParams params;

  Problem(int64_t n_, int64_t seqlen_, int type, int64_t stride_ = 1, int64_t gap_ = 3)
      : n(n_), seqlen(seqlen_), stride(stride_), gap(gap_) {
    std::mt19937 generator(7);
    std::normal_distribution<double> normal;
    const int64_t row = n * stride + gap;
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
  for (int64_t n : {1, 2, 3, 4, 7, 8, 16, 24, 31, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}) {
    for (int type : {2, 3}) {
      Problem<T> problem(n, n < 64 ? 45 : n < 2048 ? 5 : 1, type, n % 3 ? 1 : 2);
      ASSERT_FALSE(dijiang::cuda::dct_uses_cufft(dijiang::cuda::dct_rows(problem.params)));
      launch<T>(problem.params);
      EXPECT_LT(problem.error(), tolerance) << "n = " << n << ", type " << type;
    }
  }
}

TEST(EmulatedDct, Float) { check_one_launch<float>(3e-7); }
TEST(EmulatedDct, BFloat16) { check_one_launch<__nv_bfloat16>(0x1p-9); }
TEST(EmulatedDct, Half) { check_one_launch<__half>(0x1p-12); }

// The same in another order of threads; `kernel` is what ran.
template <class T>
void check(Problem<T> problem, double tolerance, const char* kernel) {
  emulated::forget_kernels();
  emulated::expect_same_in_any_order([&] {
    problem.out.assign(problem.out.size(), Traits<T>::narrow(NAN));
    launch<T>(problem.params);
    return emulated::widen(problem.out);
  });
  EXPECT_TRUE(emulated::ran(kernel)) << problem.n;
  EXPECT_EQ(cuda_emulator::settings().bank_conflicts, 0);
  EXPECT_LT(problem.error(), tolerance) << "n = " << problem.n << ", type " << problem.params.type;
}

// Rows that four elements are read of at a time.
TEST(EmulatedDct, Quads) {
  for (int64_t n : {16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}) {
    for (int type : {2, 3}) {
      const int64_t seqlen = n < 512 ? 70 : 2;
      check(Problem<float>(n, seqlen, type, 1, 4), 3e-7, "dct_in_registers");
      // Up to 128 in whole pieces of 16 bytes it would be a product.
      const int64_t gap = n < 256 ? 4 : 0;
      check(Problem<__nv_bfloat16>(n, seqlen, type, 1, gap), 0x1p-9, "dct_in_registers");
      check(Problem<__half>(n, seqlen, type, 1, 4), 0x1p-12, "dct_in_registers");
    }
  }
}

TEST(EmulatedDct, Products) {
  for (int64_t n : {16, 24, 40, 64, 80, 96, 128}) {
    for (int type : {2, 3}) {
      check(Problem<__nv_bfloat16>(n, n == 64 ? 600 : 23, type, 1, 8), 0x1p-9, "dct_products");
      check(Problem<__half>(n, n == 80 ? 1 : 16, type, 1, 0), 0x1p-12, "dct_products");
    }
  }
}

// An access of four or eight elements at a place that is no multiple of its size is a fault.
TEST(EmulatedDct, WhatLiesTogether) {
  const auto rows = [](int64_t stride, int64_t gap, int64_t shift = 0) {
    Problem<__half> problem(64, 2, 2, stride, gap);
    problem.params.x.data = problem.memory.data() + shift;
    const auto r = dijiang::cuda::dct_rows(problem.params);
    return std::array<bool, 2>{r.quads, r.products};
  };
  using Both = std::array<bool, 2>;
  EXPECT_EQ(rows(1, 8), (Both{true, true}));
  EXPECT_EQ(rows(1, 4), (Both{true, false}));
  EXPECT_EQ(rows(1, 2), (Both{false, false}));
  EXPECT_EQ(rows(2, 8), (Both{false, false}));
  EXPECT_EQ(rows(1, 8, 4), (Both{true, false}));
  EXPECT_EQ(rows(1, 8, 2), (Both{false, false}));
  Problem<__half> problem(64, 2, 2, 1, 8);
  problem.params.out = problem.out.data() + 2;
  EXPECT_FALSE(dijiang::cuda::dct_rows(problem.params).quads);
}

// How many of the groups of 16 lanes of a block reach a bank twice, each lane for number place(j)
// of its row; 8 bytes each.
template <int kLog, class Place>
int bank_conflicts(const Place& place) {
  using Plan = dijiang::cuda::DctPlan<kLog>;
  int count = 0;
  for (int first = 0; first < Plan::kThreads; first += 16) {
    unsigned banks = 0;
    for (int thread = first; thread < first + 16; ++thread) {
      const int row = Plan::row(thread / Plan::kRowThreads), j = thread % Plan::kRowThreads;
      banks |= 1u << (row ^ dijiang::cuda::dct_place(place(j))) % 16;
    }
    count += banks != 0xFFFF;
  }
  return count;
}
template <int kLog>
void check_banks() {
  using Plan = dijiang::cuda::DctPlan<kLog>;
  for (int i = 0; i < 8; ++i) {
    if (Plan::m >= 16) {
      EXPECT_EQ(bank_conflicts<kLog>([&](int j) { return j + i * Plan::kRowThreads; }), 0);
    }
    if (Plan::kRowThreads < 16) continue;  // then two lanes may share one
    for (int pass = 0; pass + 1 < Plan::kPasses; ++pass) {
      const int length = Plan::length(pass);
      const auto written = [&](int j) { return (j - j % length) * 8 + j % length + i * length; };
      EXPECT_EQ(bank_conflicts<kLog>(written), 0)
          << "n " << Plan::n << ", pass " << pass << ", number " << i;
    }
  }
}

TEST(EmulatedDct, Banks) {
  check_banks<5>();
  check_banks<6>();
  check_banks<7>();
  check_banks<8>();
  check_banks<9>();
  check_banks<10>();
  check_banks<11>();
  check_banks<12>();
  check_banks<13>();
}

// Rows that no block takes at once, and the last tile is ragged.
TEST(EmulatedDct, ManyTiles) {
  Problem<float> problem(64, 1300, 2);
  launch<float>(problem.params);
  EXPECT_LT(problem.error(), 3e-7);
}

// Dimensions that lie behind one another become one; others stay.
TEST(EmulatedDct, Dimensions) {
  const auto joined = [](int64_t batch, int64_t heads, int64_t seqlen, dijiang::ConstView x) {
    DctParams p;
    p.n = 16;
    p.batch = batch;
    p.heads = heads;
    p.seqlen = seqlen;
    p.x = x;
    const auto rows = dijiang::cuda::dct_rows(p);
    for (int64_t row = 0; row < batch * heads * seqlen; ++row) {
      const int64_t t = row % seqlen, h = row / seqlen % heads, b = row / seqlen / heads;
      const int64_t want = b * x.stride_batch + h * x.stride_head + t * x.stride_seq;
      EXPECT_EQ(rows.offset(row), want) << row;
      EXPECT_EQ(rows.offset_of(unsigned(row)), want) << row;
    }
    return rows.rows / rows.seqlen;
  };
  EXPECT_EQ(joined(2, 3, 5, {nullptr, 240, 80, 16, 1}), 1);
  EXPECT_EQ(joined(2, 3, 5, {nullptr, 240, 16, 48, 1}), 6);  // heads inside
  EXPECT_EQ(joined(2, 3, 5, {nullptr, 400, 80, 16, 1}), 2);
  EXPECT_EQ(joined(2, 3, 1, {nullptr, 48, 16, 7, 1}), 1);
  EXPECT_EQ(joined(2, 1, 5, {nullptr, 80, 7, 16, 1}), 1);
  EXPECT_EQ(joined(1, 3, 5, {nullptr, 7, 16, 48, 1}), 3);
  EXPECT_EQ(joined(2, 3, 5, {nullptr, 0, 0, 16, 1}), 6);  // expanded
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
  ASSERT_TRUE(dijiang::cuda::dct_uses_cufft(rows));
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
    check_around_cufft<2>(n);
    check_around_cufft<3>(n);
  }
}

}  // namespace
