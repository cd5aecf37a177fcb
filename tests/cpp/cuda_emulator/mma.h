// nvcuda::wmma: each lane holds rows * cols / 32 elements of a fragment, in an order of no meaning,
// as on the hardware. Operands are narrowed as the matrix units narrow them; sums are float.
#pragma once

#include <cmath>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

namespace detail {
template <class Use, int m, int n, int k>
struct Shape {
  static constexpr int rows = m, cols = n;
};
template <int m, int n, int k>
struct Shape<matrix_a, m, n, k> {
  static constexpr int rows = m, cols = k;
};
template <int m, int n, int k>
struct Shape<matrix_b, m, n, k> {
  static constexpr int rows = k, cols = n;
};
template <class T>
struct Element {
  using type = T;
};
template <>
struct Element<precision::tf32> {
  using type = float;
};
// The matrix unit reads the upper 19 bits of a tf32 operand.
inline float narrow(float x, precision::tf32) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xFFFFE000u;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float narrow(__nv_bfloat16 x, __nv_bfloat16) { return __bfloat162float(x); }
inline float narrow(__half x, __half) { return __half2float(x); }
inline int lane() { return cuda_emulator::block().current->lane; }
}  // namespace detail

inline float __float_to_tf32(float x) {
  if (std::isnan(x)) return x;  // rounding would carry out of poison, and leave 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x1000u) & 0xFFFFE000u;  // to nearest, halves away from zero
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
  using shape = detail::Shape<Use, m, n, k>;
  static constexpr int rows = shape::rows, cols = shape::cols;
  static constexpr int num_elements = rows * cols / 32;
  typename detail::Element<T>::type x[num_elements];
};

template <class Fragment, class T>
void fill_fragment(Fragment& f, T value) {
  for (auto& x : f.x) x = value;
}

template <class Use, int m, int n, int k, class T, class Layout, class P>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f, const P* from, unsigned ld) {
  using F = fragment<Use, m, n, k, T, Layout>;
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0) {
    std::fprintf(stderr, "cuda emulator: wmma pointer is not 32-byte aligned\n");
    std::abort();
  }
  for (int e = 0; e < F::num_elements; ++e) {
    const int index = detail::lane() * F::num_elements + e;
    const int row = index / F::cols, col = index % F::cols;
    f.x[e] = std::is_same_v<Layout, col_major> ? from[col * ld + row] : from[row * ld + col];
  }
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& f, const T* from, unsigned ld,
                      layout_t layout) {
  using F = fragment<accumulator, m, n, k, T>;
  for (int e = 0; e < F::num_elements; ++e) {
    const int index = detail::lane() * F::num_elements + e;
    const int row = index / F::cols, col = index % F::cols;
    f.x[e] = layout == mem_col_major ? from[col * ld + row] : from[row * ld + col];
  }
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* to, const fragment<accumulator, m, n, k, T>& f, unsigned ld,
                       layout_t layout) {
  using F = fragment<accumulator, m, n, k, T>;
  if (reinterpret_cast<uintptr_t>(to) % 32 != 0) {
    std::fprintf(stderr, "cuda emulator: wmma pointer is not 32-byte aligned\n");
    std::abort();
  }
  for (int e = 0; e < F::num_elements; ++e) {
    const int index = detail::lane() * F::num_elements + e;
    const int row = index / F::cols, col = index % F::cols;
    (layout == mem_col_major ? to[col * ld + row] : to[row * ld + col]) = f.x[e];
  }
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& d,
              const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b,
              const fragment<accumulator, m, n, k, float>& c) {
  cuda_emulator::Warp& warp = *cuda_emulator::block().current->warp;
  const int lane = detail::lane();
  const int next = warp.generation & 1;
  for (int e = 0; e < a.num_elements; ++e) {
    warp.tiles[next][0][lane][e] = detail::narrow(a.x[e], T{});
  }
  for (int e = 0; e < b.num_elements; ++e) {
    warp.tiles[next][1][lane][e] = detail::narrow(b.x[e], T{});
  }
  const auto& tiles = warp.tiles[cuda_emulator::warp_exchange(~0u, 0)];
  for (int e = 0; e < d.num_elements; ++e) {
    const int index = lane * d.num_elements + e;
    const int row = index / n, col = index % n;
    float sum = c.x[e];
    for (int j = 0; j < k; ++j) {
      const int ia = row * k + j, ib = j * n + col;
      sum += tiles[0][ia / a.num_elements][ia % a.num_elements] *
             tiles[1][ib / b.num_elements][ib % b.num_elements];
    }
    d.x[e] = sum;
  }
}

}  // namespace nvcuda::wmma
