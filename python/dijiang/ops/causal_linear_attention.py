"""causal_linear_attention and its one-token update."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import LinearAttentionState, acc_dtype
from ._autograd import without_gradient
from ._checks import (
    autocast,
    check_eps,
    check_like,
    check_one_token,
    check_qkv,
    per_token_decay,
    segments_of,
)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    cu_seqlens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Causal attention with given features, in time and memory linear in seqlen.

    o_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + eps),
    w_ts = exp(sum_{r=s+1..t} log_decay_r) (q_t . k_s); normalize=False drops the denominator.

    Args:
        q: (B, H, T, m) features >= 0 of the queries; float32, float64 (CPU), bfloat16, float16.
        k: (B, Hkv, T, m) features >= 0 of the keys, v: (B, Hkv, T, dv); the dtype of q, Hkv
            divides H. Any strides; nothing is copied or repeated.
        log_decay: (Hkv,) or (B, Hkv, T), finite and <= 0.
        initial_state: the state to start from, one row a sequence.
        cu_seqlens: int32 (N + 1), 0 = first, T = last: N sequences packed into B = 1 row.
        seq_bounds: int32 (B, 2), [begin, end) of the real tokens of each row. Outputs of the rest
            are 0.
        eps: added to the denominator. A row without any weight gives 0.
        return_state: return (out, state).

    Returns:
        (B, H, T, dv) in the dtype of q. Differentiable in q, k, v, log_decay and in kv and z of
        the states.

    Raises:
        TypeError, ValueError: what the message says; RuntimeError: no kernel for the device.

    Source: arXiv 2006.16236, eq. 8 to 12; arXiv 2403.19928, eq. 5 and 13; decay: arXiv 2307.08621.

        >>> q, k = torch.rand(1, 4, 10, 16), torch.rand(1, 2, 10, 16)
        >>> out, state = causal_linear_attention(q, k, torch.randn(1, 2, 10, 8), return_state=True)
        >>> out.shape, state.kv.shape
        (torch.Size([1, 4, 10, 8]), torch.Size([1, 2, 16, 8]))
    """
    op = "causal_linear_attention"
    q, k, v = autocast(q, k, v)
    check_qkv(op, q, k, v, "features")
    check_eps(op, eps)
    log_decay = per_token_decay(op, log_decay, q, k)
    segments = segments_of(op, q, cu_seqlens, seq_bounds)
    kv = z = log_scale = None
    if initial_state is not None:
        num_seqs = q.shape[0] if segments is None else segments.shape[0]
        _check_state(op, "initial_state", initial_state, num_seqs, q, k, v)
        kv, z, log_scale = (x.contiguous() for x in initial_state)
    out, _, _, *state = torch.ops.dijiang.linear_attention_fwd(
        q, k, v, log_decay, segments, kv, z, log_scale, normalize, eps, return_state
    )
    return (out, LinearAttentionState(*state)) if return_state else out


def causal_linear_attention_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """One more token of each sequence: causal_linear_attention with T = 1, `state` in place.

    Args:
        q: (B, H, 1, m), k: (B, Hkv, 1, m), v: (B, Hkv, 1, dv), as in causal_linear_attention.
        state: contiguous, one row a sequence; written.
        log_decay: (Hkv,) or (B, Hkv, 1).

    Returns:
        (B, H, 1, dv). It has no gradient: to ask for one is an error.

    Raises what causal_linear_attention does.

        >>> q = torch.rand(1, 2, 5, 16)
        >>> _, state = causal_linear_attention(q, q, q, return_state=True)
        >>> causal_linear_attention_update(q[:, :, :1], q[:, :, :1], q[:, :, :1], state).shape
        torch.Size([1, 2, 1, 16])
    """
    op = "causal_linear_attention_update"
    q, k, v = autocast(q, k, v)
    check_qkv(op, q, k, v, "features")
    check_one_token(op, q)
    check_eps(op, eps)
    log_decay = per_token_decay(op, log_decay, q, k)
    _check_state(op, "state", state, q.shape[0], q, k, v)
    for name, x in zip(state._fields, state, strict=True):
        if not x.is_contiguous():
            raise ValueError(f"{op}: state.{name} must be contiguous: it is written in place")
    return without_gradient(
        op,
        torch.ops.dijiang.linear_attention_update,
        q, k, v, log_decay, *state, normalize, eps,
    )  # fmt: skip


def _check_state(op, name, state, num_seqs, q, k, v):
    if not isinstance(state, LinearAttentionState):
        raise TypeError(f"{op}: {name} must be LinearAttentionState, got {type(state).__name__}")
    acc = acc_dtype(q.dtype)
    shape = (num_seqs, k.shape[1], k.shape[3])
    legend = "(sequences, kv heads, features{})"
    check_like(
        op, f"{name}.kv", state.kv, (*shape, v.shape[3]), legend.format(", headdim_v"), q, acc
    )
    check_like(op, f"{name}.z", state.z, shape, legend.format(""), q, acc)
    check_like(op, f"{name}.log_scale", state.log_scale, shape, legend.format(""), q, acc)
