"""dct."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import autocast, check_input


def dct(x: Tensor, type: int = 2) -> Tensor:
    """Orthonormal discrete cosine transform of the last dimension, in O(n log n) for n = 2^p.

    Type 2: y_k = a_k sum_j x_j cos(pi (2j + 1) k / 2n) with a_0 = sqrt(1/n), a_k = sqrt(2/n).
    Type 3 is its transpose and its inverse.

    Args:
        x: (..., n), any n, any strides; float32, float64 (CPU), bfloat16 or float16.
        type: 2 or 3.

    Returns:
        (..., n), the dtype of x, contiguous. Differentiable any number of times. Sums form before
        they are scaled: elements beyond the largest number / n may overflow.

    Raises:
        TypeError, ValueError: a wrong dtype or type; RuntimeError: no kernel for the device.

    Source: Ahmed, Natarajan, Rao 1974; the DCT of arXiv 2403.19928, eq. 7.

        >>> x = torch.randn(2, 8)
        >>> torch.allclose(dct(dct(x), type=3), x, atol=1e-5)
        True
    """
    (x,) = autocast(x)
    check_input("dct", "x", x, None, "")
    if x.dim() == 0:
        raise ValueError("dct: x must have at least one dimension, got a scalar")
    if type not in (2, 3):
        raise ValueError(f"dct: type must be 2 or 3, got {type!r}")
    if x.dim() <= 4:
        return torch.ops.dijiang.dct(x, type)
    # Kernels walk three strided dimensions of rows; more of them are merged, copying if they must.
    return torch.ops.dijiang.dct(x.flatten(0, -2), type).view(x.shape)
