// Rows that a DCT takes.
#pragma once

#include "cuda/device_math.h"
#include "dijiang/core/dct.h"

namespace dijiang::cuda {

struct DctRows {
  ConstView x;
  void* out;
  int64_t rows;
  int64_t heads, seqlen;
  int n;
  bool quads;     // four elements lie together, at a multiple of their size, in x and in out
  bool products;  // for dct_products.h: 16 bits, few elements, in whole pieces of 16 bytes

  // Of a row in x.
  __device__ int64_t offset(int64_t row) const {
    return begin(row / seqlen) + row % seqlen * x.stride_seq;
  }
  // The same by divisions of 32 bits, which cost a fifth.
  __device__ int64_t offset_of(unsigned row) const {
    const auto length = static_cast<unsigned>(seqlen), each = static_cast<unsigned>(heads);
    const unsigned sequence = row / length;
    return sequence / each * x.stride_batch + sequence % each * x.stride_head +
           row % length * x.stride_seq;
  }
  // Of a sequence: seqlen rows.
  __device__ int64_t begin(int64_t sequence) const {
    return sequence / heads * x.stride_batch + sequence % heads * x.stride_head;
  }
};

// Dimensions that lie behind one another are one.
inline DctRows dct_rows(const DctParams& p) {
  DctRows r{p.x,   p.out, p.batch * p.heads * p.seqlen, p.heads, p.seqlen, static_cast<int>(p.n),
            false, false};
  int64_t batch = p.batch;
  const auto join_heads = [&] {
    if (r.heads > 1 && r.seqlen > 1 && r.x.stride_head != r.seqlen * r.x.stride_seq) return;
    if (r.seqlen == 1) r.x.stride_seq = r.x.stride_head;
    r.seqlen *= r.heads;
    r.heads = batch;
    batch = 1;
    r.x.stride_head = r.x.stride_batch;
  };
  join_heads();
  join_heads();
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto lie_together = [&](int64_t count) {
    const int64_t bytes = count * element;
    return r.x.stride_dim == 1 && r.x.stride_seq % count == 0 && r.x.stride_head % count == 0 &&
           r.x.stride_batch % count == 0 && reinterpret_cast<uintptr_t>(p.x.data) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(p.out) % bytes == 0;
  };
  r.quads = lie_together(4);
  r.products = element == 2 && p.n > 8 && p.n <= 128 && p.n % 8 == 0 && lie_together(8) &&
               r.rows <= INT32_MAX && device_is_sm80();
  return r;
}

__device__ inline float dct_scale(int k, int n) { return sqrtf((k > 0 ? 2.0f : 1.0f) / n); }

// (cos, sin) of pi x.
__device__ inline float2 turn(float x) {
  float2 r;
  sincospif(x, &r.y, &r.x);
  return r;
}

}  // namespace dijiang::cuda
