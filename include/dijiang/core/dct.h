// Orthonormal discrete cosine transform over the last dimension, types 2 and 3.
//
//   type 2: y_k = a_k sum_j x_j cos(pi (2j + 1) k / (2n)),  a_0 = sqrt(1/n), a_k = sqrt(2/n)
//   type 3: the transpose, which is the inverse
#pragma once

#include <cstddef>
#include <cstdint>

#include "dijiang/core/types.h"

namespace dijiang {

struct DctParams {
  DType dtype = DType::kFloat32;
  int type = 2;   // 2 or 3
  int64_t n = 0;  // length of the transform
  ConstView x;    // (batch, heads, seqlen, n): rows in up to three strided dimensions
  int64_t batch = 1;
  int64_t heads = 1;
  int64_t seqlen = 0;
  void* out = nullptr;  // dtype, contiguous
};

namespace cpu {
// Rows [begin, end) of batch * heads * seqlen.
void dct(const DctParams& params, int64_t begin, int64_t end);
}  // namespace cpu
}  // namespace dijiang
