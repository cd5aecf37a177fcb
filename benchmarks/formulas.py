"""Attention in plain PyTorch, to compare with: the formulas a model would use without kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, T, d) -> (B, heads, T, d), in memory, as models of transformers do it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def features(x: Tensor, omega: Tensor) -> Tensor:
    """exp(omega x), shifted by its maximum over the sequence: x (B, H, T, d), omega (H, m, d)."""
    logits = x @ omega.mT
    return (logits - logits.amax((-1, -2), keepdim=True)).exp()


def linear_quadratic(q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """The published code's shape of the computation: all T x T weights, masked, a head at a time.

    q, k, v (B, H, T, d) with as many key/value heads as query heads.
    """
    causal = torch.ones(q.shape[2], q.shape[2], dtype=q.dtype, device=q.device).tril_()
    outputs = []
    for head in range(q.shape[1]):
        fq = features(q[:, head : head + 1], omega[head : head + 1])
        fk = features(k[:, head : head + 1], omega[head : head + 1])
        weights = (fq @ fk.mT) * causal
        outputs.append(weights @ v[:, head : head + 1] / (weights.sum(-1, keepdim=True) + 1e-6))
    return torch.cat(outputs, dim=1)


def linear_chunked(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, chunk: int = 128) -> Tensor:
    """The same function in O(T): a loop over chunks that carries the state."""
    fq, fk = features(q, omega), features(k, omega)
    v = F.pad(v, (0, 1), value=1.0)  # a column of ones sums the weights
    causal = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril_()
    state = q.new_zeros(*fq.shape[:2], fq.shape[-1], v.shape[-1])
    outputs = []
    for begin in range(0, q.shape[2], chunk):
        a, b, c = (x[:, :, begin : begin + chunk] for x in (fq, fk, v))
        size = a.shape[2]
        outputs.append((a @ b.mT) * causal[:size, :size] @ c + a @ state)
        state = state + b.mT @ c
    out = torch.cat(outputs, dim=2)
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def linear_product(fq: Tensor, fk: Tensor, v: Tensor, product: Callable) -> Tensor:
    """The same from given features, by a kernel for sum_{s<=t} (fq_t . fk_s) v_s.

    The denominator is what fast-transformers' CausalLinearAttention puts beside its product.
    """
    return product(fq, fk, v) / ((fq * fk.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


def linear_step(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, state: Tensor) -> Tensor:
    """One token, state (B, H, m, dv + 1) in place."""
    fq, fk = (q @ omega.mT).exp(), (k @ omega.mT).exp()
    state += fk.mT * F.pad(v, (0, 1), value=1.0)
    out = fq @ state
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def softmax_quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with its T x T weights in memory (the `eager` of transformers)."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
