"""feature_map."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import FeatureParams
from ._checks import KINDS, autocast, check_input, check_params


def feature_map(
    x: Tensor, params: FeatureParams, *, scale: float = 1.0, log: bool = False
) -> Tensor:
    """Positive features phi(sqrt(scale) x), or their logarithm.

    With u = omega (sqrt(scale) x), log phi_i is u_i + log_weight_i - beta |x|^2 scale ("exp"),
    u_i - logsumexp(u) + log_weight_i ("softmax") or log(1 + elu(u_i)) + log_weight_i ("elu").
    phi saturates at the largest finite value of the dtype.

    Args:
        x: (batch, heads, seqlen, headdim), any strides; float32, float64 (CPU), bfloat16, float16.
        params: one row a head; any floating-point dtype, used in float32 (float64 for float64).
        scale: positive.
        log: return log phi.

    Returns:
        (batch, heads, seqlen, num_features), the dtype of x. Differentiable in x and params.

    Raises:
        TypeError, ValueError: what the message says; RuntimeError: no kernel for the device.

    Source: arXiv 2403.19928, eq. 9, 10 and 12 ("exp"); its published code ("softmax");
    arXiv 2006.16236, eq. 7 ("elu").

        >>> params = FeatureParams(omega=torch.randn(4, 16, 8), kind="exp")
        >>> feature_map(torch.randn(2, 4, 10, 8), params, scale=8**-0.5).shape
        torch.Size([2, 4, 10, 16])
    """
    op = "feature_map"
    (x,) = autocast(x)
    check_input(op, "x", x, 4, "(batch, heads, seqlen, headdim)")
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    omega, log_weight, beta = check_params(op, "params", params, x.shape[1], x.shape[3], x)
    return torch.ops.dijiang.feature_map_fwd(
        x, omega, log_weight, beta, KINDS[params.kind], scale, log
    )
