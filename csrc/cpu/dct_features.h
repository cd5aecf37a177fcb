// Features whose matrix is made of rows of the DCT, u_i = t_i (C x)_{i mod d}: kLanes rows of x are
// turned and transformed at a time, and multiplied by t on the way back.
#pragma once

#include "cpu/dct_lanes.h"
#include "cpu/tile.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
class DctFeatures {
 public:
  void allocate(Scratch& scratch, int64_t num_features, int64_t headdim) {
    plan_ = &dct_plan<Acc>(headdim);
    d_ = headdim;
    t_ = scratch.take<Acc>(num_features + L);
    const int64_t vectors = dct_lanes_workspace(*plan_) / int64_t{sizeof(Vec<Acc>)};
    lanes_ = reinterpret_cast<Vec<Acc>*>(scratch.take<Acc>(vectors * L));
  }

  // The frequencies of m features.
  void set(const Acc* t, int64_t m) {
    for (int64_t i = 0; i < m; ++i) t_[i] = t[i];
  }

  // out (rows, out_stride) = factor u_i for i < count; transformed, if wanted and as wide, gets as
  // much of C x in its first columns as there are features. Rows of x end in whole vectors.
  void apply(const Acc* x, int64_t x_stride, int64_t rows, int64_t count, Acc factor, Acc* out,
             int64_t out_stride, Acc* transformed) const {
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t n = rows - r < L ? rows - r : L;
      for (int64_t j = 0; j < d_; j += L) {
        Vec<Acc> columns[L];
        load_columns(x + r * x_stride + j, x_stride, n, columns);
        for (int64_t l = 0; l < L && j + l < d_; ++l) lanes_[j + l] = columns[l];
      }
      const Vec<Acc>* y = dct_lanes(*plan_, 2, lanes_);
      if (transformed) {
        for (int64_t k = 0; k < d_ && k < count; k += L) {
          store_columns(
              n, L, [&](int64_t l) { return k + l < d_ ? y[k + l] : Vec<Acc>{}; },
              transformed + r * out_stride + k, out_stride);
        }
      }
      // In ascending order: a block that ends inside a vector is followed by the next one.
      for (int64_t block = 0; block < count; block += d_) {
        const Acc* t = t_ + block;
        for (int64_t k = 0; k < d_ && block + k < count; k += L) {
          store_columns(
              n, out_stride - block - k,
              [&](int64_t l) {
                return k + l < d_ ? y[k + l] * broadcast(t[k + l] * factor) : Vec<Acc>{};
              },
              out + r * out_stride + block + k, out_stride);
        }
      }
    }
  }

  // dx (rows, dx_stride) += factor sum_i du_i t_i C_{i mod d} over i < count, du (rows, du_stride).
  void apply_transposed(const Acc* du, int64_t du_stride, int64_t rows, int64_t count, Acc factor,
                        Acc* dx, int64_t dx_stride) const {
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t n = rows - r < L ? rows - r : L;
      for (int64_t j = 0; j < d_; ++j) lanes_[j] = Vec<Acc>{};
      for (int64_t block = 0; block < count; block += d_) {
        const int64_t size = count - block < d_ ? count - block : d_;
        for (int64_t k = 0; k < size; k += L) {
          Vec<Acc> columns[L];
          load_columns(du + r * du_stride + block + k, du_stride, n, columns);
          for (int64_t l = 0; l < L && k + l < size; ++l) {
            const Vec<Acc> t = broadcast(t_[block + k + l] * factor);
            lanes_[k + l] = multiply_add(t, columns[l], lanes_[k + l]);
          }
        }
      }
      const Vec<Acc>* y = dct_lanes(*plan_, 3, lanes_);
      for (int64_t j = 0; j < d_; j += L) {
        Vec<Acc> square[L];
        for (int64_t l = 0; l < L; ++l) square[l] = j + l < d_ ? y[j + l] : Vec<Acc>{};
        transpose<Acc>(square);
        for (int64_t l = 0; l < n; ++l) {
          Acc* at = dx + (r + l) * dx_stride + j;
          store(at, load(at) + square[l]);
        }
      }
    }
  }

  // sums_i += sum over rows of du_i (C x)_{i mod d} for i < count, from the `transformed` of apply.
  void sum_gradients(const Acc* du, const Acc* transformed, int64_t stride, int64_t rows,
                     int64_t count, Acc* sums) const {
    for (int64_t block = 0; block < count; block += d_) {
      const int64_t size = count - block < d_ ? count - block : d_;
      int64_t k = 0;
      for (; k + L <= size; k += L) {
        Vec<Acc> sum = load(sums + block + k);
        for (int64_t r = 0; r < rows; ++r) {
          sum = multiply_add(load(du + r * stride + block + k), load(transformed + r * stride + k),
                             sum);
        }
        store(sums + block + k, sum);
      }
      for (; k < size; ++k) {
        for (int64_t r = 0; r < rows; ++r) {
          sums[block + k] += du[r * stride + block + k] * transformed[r * stride + k];
        }
      }
    }
  }

 private:
  static constexpr int64_t L = kLanes<Acc>;

  // kLanes columns of kLanes rows, of which n rows and at most `width` columns are wanted.
  template <typename Column>
  DIJIANG_INLINE static void store_columns(int64_t n, int64_t width, const Column& column, Acc* out,
                                           int64_t stride) {
    Vec<Acc> square[L];
#pragma GCC unroll 16
    for (int64_t l = 0; l < L; ++l) square[l] = column(l);
    transpose<Acc>(square);
    if (width < L) {
      for (int64_t l = 0; l < n; ++l) {
        for (int64_t i = 0; i < width; ++i) out[l * stride + i] = square[l][i];
      }
      return;
    }
    if (n == L) {
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) store(out + l * stride, square[l]);
      return;
    }
    for (int64_t l = 0; l < n; ++l) store(out + l * stride, square[l]);
  }

  const DctPlan<Acc>* plan_ = nullptr;
  int64_t d_ = 0;
  Acc* t_ = nullptr;
  Vec<Acc>* lanes_ = nullptr;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
