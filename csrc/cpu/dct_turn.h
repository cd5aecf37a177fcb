// Rows turned into tiles and back: element j of kLanes rows is one Vec of the tile.
#pragma once

#include "cpu/narrow.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

#if DIJIANG_ISA_LEVEL == 3
DIJIANG_INLINE Vec<float> load_halves(const float* lower, const float* upper) {
  return (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(lower)),
                                          _mm_loadu_ps(upper), 1);
}
DIJIANG_INLINE Vec<double> load_halves(const double* lower, const double* upper) {
  return (Vec<double>)_mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(lower)),
                                           _mm_loadu_pd(upper), 1);
}
#endif

// What the processor and the memory hand each other.
inline constexpr int64_t kLineBytes = 64;

// Fetches rows that come later, a few lines at a time between other work, in the order of memory.
// (Lines of eight rows in turns are a pattern that the processor does not foresee.) The guess may
// be wrong: no address is refused.
class Prefetch {
 public:
  Prefetch(uintptr_t first_row, int64_t row_bytes, int64_t stride_bytes)
      : row_(first_row), row_bytes_(row_bytes), stride_bytes_(stride_bytes) {}

  DIJIANG_INLINE void lines(int count) {
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(row_ + offset_));
      offset_ += kLineBytes;
      if (offset_ >= row_bytes_) {
        offset_ = 0;
        row_ += stride_bytes_;
      }
    }
  }

 private:
  uintptr_t row_;
  int64_t offset_ = 0, row_bytes_, stride_bytes_;
};

// Numbers [j, j + kLanes) of kLanes rows, turned.
template <typename T>
DIJIANG_INLINE void load_square(const T* const (&row)[kLanes<AccOf<T>>], int64_t j,
                                Vec<AccOf<T>> (&square)[kLanes<AccOf<T>>]) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
#if DIJIANG_ISA_LEVEL == 3
  if constexpr (std::is_same_v<T, Acc>) {
    // Loads of half vectors do what would be one shuffle in three.
    constexpr int H = L / 2;
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
      square[i] = load_halves(row[i] + j, row[i + H] + j);
      square[i + H] = load_halves(row[i] + j + H, row[i + H] + j + H);
    }
    return turn_blocks<Acc>(square);
  }
#endif
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) square[lane] = load_wide<T>(row[lane] + j);
  transpose<Acc>(square);
}

// --- tiles --------------------------------------------------------------------------------------
// Reads kLanes rows of n numbers into the tile (n x kLanes).
template <typename T>
DIJIANG_INLINE void load_turned(const T* const (&row)[kLanes<AccOf<T>>], int64_t n, int64_t stride,
                                Prefetch& later, Vec<AccOf<T>>* tile) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  if (n < L || stride != 1) {
    for (int64_t j = 0; j < n; ++j) {
      for (int lane = 0; lane < L; ++lane) tile[j][lane] = to_acc<T>(row[lane][j * stride]);
    }
    return;
  }
  const auto square_at = [&](int64_t j) {
    Vec<Acc> square[L];
    later.lines(L * L * sizeof(T) / kLineBytes / 2);
    load_square<T>(row, j, square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) tile[j + i] = square[i];
  };
  int64_t j = 0;
  for (; j + L <= n; j += L) square_at(j);
  if (j < n) square_at(n - L);
}

// Columns [0, kLanes) of the tile to rows of n.
template <typename T>
DIJIANG_INLINE void store_square(const Vec<AccOf<T>>* tile, T* out, int64_t n) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  Vec<Acc> square[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) square[i] = tile[i];
  transpose<Acc>(square);
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    const auto v = narrow<T>(square[lane]);
    std::memcpy(out + lane * n, &v, sizeof(v));
  }
}

// The first `rows` lanes of the tile to contiguous rows.
template <typename T>
DIJIANG_INLINE void store_turned(const Vec<AccOf<T>>* tile, int64_t rows, int64_t n,
                                 Prefetch& later, T* out) {
  constexpr int L = kLanes<AccOf<T>>;
  if (n < L || rows < L) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      for (int64_t k = 0; k < n; ++k) out[lane * n + k] = from_acc<T>(tile[k][lane]);
    }
    return;
  }
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    later.lines(L * L * sizeof(T) / kLineBytes / 2);
    store_square<T>(tile + k, out + k, n);
  }
  if (k < n) store_square<T>(tile + n - L, out + n - L, n);
}

// The whole tile, where each row is whole lines.
template <typename T>
DIJIANG_INLINE void stream_turned(const Vec<AccOf<T>>* tile, int64_t n, Prefetch& later, T* out) {
  constexpr int L = kLanes<AccOf<T>>;
  constexpr int kLine = kLineBytes / sizeof(T);
  constexpr int kPieces = kLine / L;
  for (int64_t k = 0; k < n; k += kLine) {
    later.lines(L / 2);
    // A line is written at once: its pieces wait for the last of them.
    decltype(narrow<T>(*tile)) piece[L][kPieces];
#pragma GCC unroll 8
    for (int i = 0; i < kPieces; ++i) {
      Vec<AccOf<T>> square[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) square[j] = tile[k + i * L + j];
      transpose<AccOf<T>>(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) piece[lane][i] = narrow<T>(square[lane]);
    }
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
#pragma GCC unroll 8
      for (int i = 0; i < kPieces; ++i) stream(out + lane * n + k + i * L, piece[lane][i]);
    }
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
