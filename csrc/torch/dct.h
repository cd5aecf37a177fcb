// dct over the last dimension of a tensor of one to four dimensions.
#pragma once

#include "dijiang/core/dct.h"
#include "torch/tensor.h"

namespace dijiang::binding {

template <class Backend>
Tensor dct(const Tensor& x, int64_t type) {
  const int64_t dim = x.dim();
  check(dim >= 1 && dim <= 4, "x must have one to four dimensions, got ", dim);
  check(type == 2 || type == 3, "type must be 2 or 3, got ", type);

  DctParams p;
  p.dtype = core_dtype(x, "x");
  p.type = static_cast<int>(type);
  p.n = x.size(dim - 1);
  p.x.data = x.const_data_ptr();
  p.x.stride_dim = x.stride(dim - 1);
  p.seqlen = 1;
  if (dim >= 2) p.seqlen = x.size(dim - 2), p.x.stride_seq = x.stride(dim - 2);
  if (dim >= 3) p.heads = x.size(dim - 3), p.x.stride_head = x.stride(dim - 3);
  if (dim >= 4) p.batch = x.size(0), p.x.stride_batch = x.stride(0);

  const auto sizes = x.sizes();
  Tensor out = new_tensor(x, Shape(sizes.begin(), sizes.end()), x.scalar_type());
  p.out = data_of(out);
  if (p.out) Backend::dct(p, x);
  return out;
}

}  // namespace dijiang::binding
