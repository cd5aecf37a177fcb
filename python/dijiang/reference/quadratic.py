"""Attention by its T x T matrix of weights, in the dtype of q."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .features import log_features
from .hard_keys import choose_hard_keys, held_keys
from .sequences import divide, for_each_sequence, hard_key_rows, repeat_params


def causal_linear_attention(
    q, k, v, *, log_decay=None, cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0
) -> Tensor:
    """o_t = sum_{s<=t} exp(c_t - c_s) (q_t.k_s) v_s / (sum_{s<=t} exp(c_t - c_s) q_t.k_s + eps)."""

    def one_sequence(q, k, v, log_decay):  # (H, T, .), (H, T)
        c = log_decay.cumsum(-1)
        causal = torch.ones(q.shape[1], q.shape[1], device=q.device).tril() > 0
        decay = (c[:, :, None] - c[:, None, :]).masked_fill(~causal, -math.inf).exp()
        w = (q @ k.mT) * decay
        return divide(w @ v, w.sum(-1, keepdim=True) + eps) if normalize else w @ v

    return for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds)


def kernelized_attention(
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, cache_size=0, log_decay=None,
    cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0, hard_keys=None,
) -> Tensor:  # fmt: skip
    """As causal_linear_attention with features of q and k, exact keys weighing exp(scale q.k)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    cached = cache_size != 0
    if cached and hard_keys is None:
        hard_keys = choose_hard_keys(
            q, k, v, scale=scale, window=window, sinks=sinks, cache_size=cache_size,
            cu_seqlens=cu_seqlens, seq_bounds=seq_bounds,
        )  # fmt: skip

    def one_sequence(q, k, v, log_decay, row=0):
        p = torch.arange(q.shape[1], device=q.device)
        t, s = p[:, None], p[None, :]
        causal = s <= t
        near = s < sinks
        if window:
            near = near | (t // window - s // window <= 1)
        if cached:
            held = held_keys(hard_keys[:, row + p // window], len(p))  # (Hkv, T, T)
            near = near | held.repeat_interleave(groups, 0)
        log_w = (scale * (q @ k.mT)).masked_fill(~(near & causal), -math.inf)
        if fq is not None:
            c = log_decay.cumsum(-1)
            b = log_features(q, fq, scale)
            a = log_features(k, repeat_params(fk, groups), scale)
            # Features one row of queries at a time: (H, T, T, m) at once would not fit.
            rows = [torch.logsumexp(b[:, i : i + 1] + a, -1) for i in range(q.shape[1])]
            log_far = torch.stack(rows, 1) if rows else log_w
            log_far = log_far + c[:, :, None] - c[:, None, :]
            log_w = torch.where(near | ~causal, log_w, log_far)
        if not normalize:
            return log_w.exp() @ v
        # Each row relative to its true maximum, so that nothing overflows and den >= 1.
        row_max = log_w.detach().amax(-1, keepdim=True) if q.shape[1] else log_w[..., :1]
        row_max = row_max.clamp(min=math.log(eps) if eps else torch.finfo(q.dtype).min)
        w = (log_w - row_max).exp()
        den = w.sum(-1, keepdim=True)
        return divide(w @ v, den + eps * (-row_max).exp() if eps else den)

    rows = hard_key_rows(q, window, cu_seqlens, seq_bounds) if cached else None
    return for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds, rows)
