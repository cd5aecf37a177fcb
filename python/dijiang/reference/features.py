"""Features, and the DCT they go through."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._types import FeatureParams


def dct_matrix(n: int, dtype=torch.float64, device=None) -> Tensor:
    """C (n, n) with dct(x, 2) = C x: C_kj = a_k cos(pi (2j + 1) k / 2n), orthonormal."""
    j = torch.arange(n, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi * (2 * j[None, :] + 1) * j[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[:1] *= math.sqrt(0.5)
    return matrix.to(dtype)


def omega_matrix(omega: Tensor, headdim: int, heads: int) -> Tensor:
    """FeatureParams.omega as a matrix for each head, (heads, m, headdim)."""
    if omega.shape[0] and omega.shape[0] != heads:
        omega = omega.repeat_interleave(heads // omega.shape[0], 0)
    if omega.dim() == 3:
        return omega
    rows = torch.arange(omega.shape[1], device=omega.device) % headdim
    return omega[..., None] * dct_matrix(headdim, omega.dtype, omega.device)[rows]


def dct(x: Tensor, type: int = 2) -> Tensor:
    """DCT of the last dimension as a matrix product; type 3 is the transpose of type 2."""
    matrix = dct_matrix(x.shape[-1], x.dtype, x.device)
    return x @ (matrix.mT if type == 2 else matrix)


def log_features(x: Tensor, params: FeatureParams, scale: float = 1.0) -> Tensor:
    """log phi(sqrt(scale) x): x (..., heads, T, d) -> (..., heads, T, m), in the dtype of x."""
    omega, log_weight, beta = (
        None if p is None else p.to(x.dtype) for p in (params.omega, params.log_weight, params.beta)
    )
    x = x * math.sqrt(scale)
    u = x @ omega_matrix(omega, x.shape[-1], x.shape[-3]).mT
    if params.kind == "exp":
        log_phi = u if beta is None else u - beta[:, None, None] * (x * x).sum(-1, keepdim=True)
    elif params.kind == "softmax":
        log_phi = u - torch.logsumexp(u, -1, keepdim=True)
    elif params.kind == "elu":
        log_phi = torch.where(u < 0, u, torch.log1p(u.clamp(min=0)))
    else:
        raise ValueError(f"FeatureParams.kind must be 'exp', 'softmax' or 'elu', got {params.kind}")
    return log_phi if log_weight is None else log_phi + log_weight[:, None, :]


def feature_map(x: Tensor, params: FeatureParams, *, scale=1.0, log=False) -> Tensor:
    """phi(sqrt(scale) x), or its logarithm."""
    log_phi = log_features(x, params, scale)
    return log_phi if log else log_phi.exp()
