// Scratch memory, and tiles of strided tensors of any dtype widened into it. A tile's rows are
// padded with zeros to whole vectors, so that no loop over its columns has a tail.
#pragma once

#include "cpu/gemm.h"
#include "cpu/narrow.h"

namespace dijiang::cpu::DIJIANG_ISA {

// Zeroed, vector-aligned memory that lives as long as the object.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (head_ != nullptr) {
      void* next = *static_cast<void**>(head_);
      std::free(head_);
      head_ = next;
    }
  }

  template <typename T>
  T* take(int64_t count) {
    constexpr size_t kAlign = 64;
    // A vector may be read across the end.
    const size_t bytes = (count * sizeof(T) + 3 * kAlign - 1) / kAlign * kAlign;
    void* block = std::aligned_alloc(kAlign, bytes);
    if (block == nullptr) throw std::bad_alloc();
    std::memset(block, 0, bytes);
    *static_cast<void**>(block) = head_;
    head_ = block;
    return reinterpret_cast<T*>(static_cast<char*>(block) + kAlign);
  }

 private:
  void* head_ = nullptr;
};

template <typename T>
int64_t padded(int64_t n) {
  return (n + kGemmCols<T> - 1) / kGemmCols<T> * kGemmCols<T>;
}

template <typename Acc>
void fill(Acc* x, int64_t count, Acc value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// Sum and maximum of the first `count` numbers of a vector-padded row; the sum wants zeros after
// them, the maximum ignores NaN and is at least `floor`.
template <typename Acc>
Acc row_sum(const Acc* x, int64_t count) {
  Vec<Acc> sum{};
  for (int64_t i = 0; i < count; i += kLanes<Acc>) sum += load(x + i);
  return horizontal_sum<Acc>(sum);
}
template <typename Acc>
Acc row_max(const Acc* x, int64_t count, Acc floor) {
  Vec<Acc> top = broadcast(floor);
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) top = max(top, load(x + i));
  Acc result = horizontal_max<Acc>(top);
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <typename Acc>
Acc dot(const Acc* x, const Acc* y, int64_t count) {
  Vec<Acc> sums{};
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) {
    sums = multiply_add(load(x + i), load(y + i), sums);
  }
  Acc sum = horizontal_sum<Acc>(sums);
  for (; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

// Elements source[0], source[stride], ... widened.
template <typename Acc>
void load_row(DType dtype, const void* source, int64_t offset, int64_t stride, int64_t count,
              Acc* out) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<AccOf<T>, Acc>) {
      const T* p = static_cast<const T*>(source) + offset;
      if (stride == 1 && std::is_same_v<T, Acc>) {
        std::memcpy(out, p, count * sizeof(Acc));
      } else if (stride == 1) {
        int64_t i = 0;
        for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store(out + i, load_wide<T>(p + i));
        for (; i < count; ++i) out[i] = to_acc(p[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = to_acc(p[i * stride]);
      }
    }
  });
}

// Rows of x, each times its factor where there are any, into contiguous rows of `count` elements
// from element `offset` on.
template <typename Acc>
void store_rows(DType dtype, void* target, int64_t offset, int64_t rows, int64_t count,
                const Acc* x, int64_t x_stride, const Acc* factor = nullptr) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<AccOf<T>, Acc>) {
      for (int64_t r = 0; r < rows; ++r) {
        T* p = static_cast<T*>(target) + offset + r * count;
        const Acc* row = x + r * x_stride;
        const Acc one = factor ? factor[r] : Acc(1);
        int64_t i = 0;
        for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) {
          const auto v = narrow<T>(load(row + i) * broadcast(one));
          std::memcpy(p + i, &v, sizeof(v));
        }
        for (; i < count; ++i) p[i] = from_acc<T>(row[i] * one);
      }
    }
  });
}

template <typename Acc>
void store_row(DType dtype, void* target, int64_t offset, int64_t count, const Acc* x) {
  store_rows(dtype, target, offset, 1, count, x, 0);
}

// Rows [t, t + rows) of one (batch, head) of a view, into rows of out_stride elements.
template <typename Acc>
void load_tile(DType dtype, const ConstView& view, int64_t batch, int64_t head, int64_t t,
               int64_t rows, int64_t dim, Acc* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t offset =
        batch * view.stride_batch + head * view.stride_head + (t + i) * view.stride_seq;
    load_row(dtype, view.data, offset, view.stride_dim, dim, out + i * out_stride);
  }
}

// A tile into contiguous rows of dim elements from element `offset` on.
template <typename Acc>
void store_tile(DType dtype, void* target, int64_t offset, int64_t rows, int64_t dim, const Acc* x,
                int64_t x_stride) {
  store_rows(dtype, target, offset, rows, dim, x, x_stride);
}

}  // namespace dijiang::cpu::DIJIANG_ISA
