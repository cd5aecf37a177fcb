"""kernelized_attention and its one-token update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .._types import (
    AttentionState,
    FeatureParams,
    acc_dtype,
    cache_sizes,
    slots_shape,
    votes_shape,
)
from ._autograd import without_gradient
from ._checks import (
    KINDS,
    autocast,
    check_eps,
    check_like,
    check_one_token,
    check_params,
    check_qkv,
    per_token_decay,
    segments_of,
)
from ._hard_keys import check_hard_keys


def kernelized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: FeatureParams | None = None,
    fk: FeatureParams | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    cache_size: int | Sequence[int] = 0,
    log_decay: Tensor | None = None,
    initial_state: AttentionState | None = None,
    cu_seqlens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    return_state: bool = False,
    hard_keys: Tensor | None = None,
    return_hard_keys: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention, near keys exact and far keys by features, linear in seqlen.

    o_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + eps), where key s is near (a sink: one of the
    first `sinks` tokens of its sequence; or in the block of `window` tokens of t or the block
    before it) and w_ts = exp(scale q_t.k_s), or far and w_ts = exp(sum_{r=s+1..t} log_decay_r)
    phi(q_t).phi(k_s). Blocks count from the first token of each sequence.

    Args:
        q: (B, H, T, d); float32, float64 (CPU), bfloat16, float16.
        k: (B, Hkv, T, d), v: (B, Hkv, T, dv); the dtype of q, Hkv divides H. Any strides; nothing
            is copied or repeated.
        fq, fk: feature maps of the queries (H rows) and of the keys (Hkv rows), of one kind; a
            gate on the far keys is added to fq.log_weight. Both None: near keys alone.
        scale: of q.k; None: 1 / sqrt(d).
        window: block length; 0: no window, and the token itself is far.
        sinks: tokens that stay exact for ever.
        cache_size: hard keys that stay exact beyond the window, of every kv head or a sequence of
            Hkv numbers, of each; needs a window.
        log_decay: (Hkv,) or (B, Hkv, T), finite and <= 0, of far keys alone.
        initial_state: the state to start from, one row a sequence.
        cu_seqlens: int32 (N + 1), 0 = first, T = last: N sequences packed into B = 1 row.
        seq_bounds: int32 (B, 2), [begin, end) of the real tokens of each row. Outputs of the rest
            are 0.
        normalize: False drops the denominator.
        eps: added to the denominator. A row without any weight gives 0.
        return_state: return (out, state).
        hard_keys: int32 (Hkv, rows, max(cache_size)), positions to be kept instead of those that
            the operator would choose: see `return_hard_keys` and docs/numerics.md, "Hard keys".
        return_hard_keys: return hard_keys too, last. Row T_b // window + 2 n + j is about block j
            of sequence n, whose first token is number T_b of all in memory; -1 is an empty slot.

    Returns:
        (B, H, T, dv) in the dtype of q. Differentiable in q, k, v, fq, fk and log_decay, and
        without window and sinks in kv and z of the states.

    Raises:
        TypeError, ValueError: what the message says; RuntimeError: no kernel for the device.

    Source: arXiv 2403.19928, eq. 5 and 9 to 13; exact window with a linear far term:
    arXiv 2402.18668; sinks: arXiv 2309.17453.

        >>> q, k = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
        >>> fq, fk = FeatureParams(torch.randn(4, 16, 8)), FeatureParams(torch.randn(2, 16, 8))
        >>> kernelized_attention(q, k, k, fq, fk, window=8, sinks=2).shape
        torch.Size([1, 4, 40, 8])
    """
    op = "kernelized_attention"
    q, k, v = autocast(q, k, v)
    sizes = cache_sizes(cache_size)
    params, log_decay, kind, scale = prepare(
        op, q, k, v, fq, fk, scale, window, sinks, sizes, log_decay, eps
    )
    segments = segments_of(op, q, cu_seqlens, seq_bounds)
    num_seqs = q.shape[0] if segments is None else segments.shape[0]
    initial = AttentionState(*(None,) * 9)
    if initial_state is not None:
        check_state(op, "initial_state", initial_state, num_seqs, q, k, v, fk, window, sinks,
                    sizes, log_decay)  # fmt: skip
        _check_no_gradient(op, initial_state, window, sinks)
        initial = AttentionState(*(None if x is None else x.contiguous() for x in initial_state))
        if not (window or sinks):
            initial = initial._replace(length=None)  # positions matter to window and sinks alone
    if hard_keys is not None:
        hard_keys = check_hard_keys(op, hard_keys, q, k, segments, initial_state, window, sinks,
                                    sizes)  # fmt: skip
    out, _, _, *state, chosen = torch.ops.dijiang.kernelized_attention_fwd(
        q, k, v, *params, log_decay, segments, *initial, hard_keys, kind, scale, window, sinks,
        sizes, normalize, eps, return_state,
    )  # fmt: skip
    results = [out]
    if return_state:
        results.append(finished_state(state, initial_state, q, segments, window, sinks, sizes,
                                      log_decay))  # fmt: skip
    if return_hard_keys:
        results.append(chosen if hard_keys is None else hard_keys)
    return tuple(results) if len(results) > 1 else out


def finished_state(state, initial_state, q, segments, window, sinks, sizes, log_decay):
    """What kernelized_attention_fwd returned as the final state, with None where nothing is."""
    state = AttentionState(*state)
    if not max(sizes):
        state = AttentionState(*state[:9])
    if log_decay is None:
        state = state._replace(window_decay=None, cache_decay=None)
    if not (window or sinks):
        if segments is None:
            length = torch.full((q.shape[0],), q.shape[2], dtype=torch.int64, device=q.device)
        else:
            length = (segments[:, 2] - segments[:, 1]).to(torch.int64)
        if initial_state is not None:
            length = length + initial_state.length
        state = state._replace(length=length)
    return state


def kernelized_attention_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    fq: FeatureParams | None = None,
    fk: FeatureParams | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    cache_size: int | Sequence[int] = 0,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """One more token of each sequence: kernelized_attention with T = 1, `state` in place.

    Each row of the batch has a length of its own (state.length).

    Args:
        q: (B, H, 1, d), k: (B, Hkv, 1, d), v: (B, Hkv, 1, dv), as in kernelized_attention.
        state: contiguous, one row a sequence; written. empty_attention_state makes one.
        The others: as in kernelized_attention.

    Returns:
        (B, H, 1, dv). It has no gradient: to ask for one is an error.

    Raises what kernelized_attention does.

        >>> from dijiang.ops import empty_attention_state
        >>> state = empty_attention_state(1, 2, 0, 8, 8, window=4, sinks=1, dtype=torch.float32,
        ...                               device="cpu")
        >>> x = torch.randn(1, 2, 1, 8)
        >>> out = kernelized_attention_update(x, x, x, state, window=4, sinks=1)
        >>> torch.allclose(out, x)  # a first token sees itself alone
        True
    """
    op = "kernelized_attention_update"
    q, k, v = autocast(q, k, v)
    # A step takes as long as its checks: those of a call like one before are passed over.
    sizes = cache_sizes(cache_size)
    settings = (scale, window, sinks, *sizes, normalize, eps)
    key = _signature((q, k, v, log_decay), state, fq, fk, settings)
    if key in _PASSED:
        kind, scale = _PASSED[key]
        params = _params_of(fq, fk)
    else:
        given_decay = log_decay
        params, log_decay, kind, scale = prepare(
            op, q, k, v, fq, fk, scale, window, sinks, sizes, log_decay, eps
        )
        check_one_token(op, q)
        check_state(op, "state", state, q.shape[0], q, k, v, fk, window, sinks, sizes,
                    log_decay)  # fmt: skip
        for name, x in zip(state._fields, state, strict=True):
            if x is not None and not x.is_contiguous():
                raise ValueError(f"{op}: state.{name} must be contiguous: it is written in place")
        given = (*_params_of(fq, fk), given_decay)
        as_given = all(x is y for x, y in zip((*params, log_decay), given, strict=True))
        if key is not None and as_given:
            if len(_PASSED) >= 256:
                _PASSED.clear()
            _PASSED[key] = kind, scale
    near = bool(window or sinks)
    out = without_gradient(
        op,
        torch.ops.dijiang.kernelized_attention_update,
        q, k, v, *params, log_decay, *state[:8], state.length if near else None, *state[9:], kind,
        scale, window, sinks, sizes, normalize, eps,
    )  # fmt: skip
    if not near:
        state.length.add_(1)  # no kernel needs it, but callers count on it
    return out


_PASSED: dict[tuple, tuple[int, float]] = {}  # signature of a call -> kind, scale


def _signature(tensors, state, fq, fk, settings):
    """All that the checks ask of a call, hashable; None: of one like this nothing is remembered."""
    groups = state, fq, fk
    if torch.compiler.is_compiling() or any(type(x) not in _GROUPS for x in groups):
        return None
    parts = [type(x) for x in groups]
    for x in (*tensors, *(x for group in groups for x in group or ())):
        if type(x) in (Tensor, Parameter):
            parts.append((x.shape, x.dtype, x.device, x.is_contiguous()))
        elif x is None or type(x) is str:
            parts.append(x)
        else:
            return None
    for x in settings:  # by value: a tensor's would be another one the next time
        if type(x) not in _PLAIN:
            return None
        parts.append((type(x), x))
    return tuple(parts)


_GROUPS = (AttentionState, FeatureParams, type(None))
_PLAIN = (int, float, bool, type(None))


def _params_of(fq, fk):
    return (None,) * 6 if fq is None else (*fq[:3], *fk[:3])


def prepare(op, q, k, v, fq, fk, scale, window, sinks, sizes, log_decay, eps):
    check_qkv(op, q, k, v, "headdim")
    check_eps(op, eps)
    scale = q.shape[3] ** -0.5 if scale is None and q.shape[3] else scale
    if scale is None or not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if len(sizes) not in (1, k.shape[1]):
        raise ValueError(
            f"{op}: cache_size must be a number or one for each of the {k.shape[1]} kv heads, got "
            f"{len(sizes)} of them"
        )
    counts = {"window": window, "sinks": sinks, "cache_size": min(sizes)}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {count}")
    if max(sizes) and not window:
        raise ValueError(
            f"{op}: cache_size={_said(sizes)} is of keys that leave a window, and window is 0. "
            "Give a window, or cache_size=0"
        )
    log_decay = per_token_decay(op, log_decay, q, k)
    params, kind = (None,) * 6, KINDS["exp"]
    if (fq is None) != (fk is None):
        missing = "fq" if fq is None else "fk"
        raise ValueError(f"{op}: fq and fk must be given together, {missing} is None")
    if fq is not None:
        params_q = check_params(op, "fq", fq, q.shape[1], q.shape[3], q, shared=True)
        params_k = check_params(op, "fk", fk, k.shape[1], k.shape[3], q, shared=True)
        if fq.kind != fk.kind or fq.omega.shape[1] != fk.omega.shape[1]:
            raise ValueError(
                f"{op}: fq and fk must be of one kind and have as many features, got {fq.kind!r} "
                f"with {fq.omega.shape[1]} and {fk.kind!r} with {fk.omega.shape[1]}"
            )
        if fq.omega.dim() != fk.omega.dim():
            raise ValueError(
                f"{op}: fq.omega and fk.omega must both be matrices or both frequencies, got "
                f"shapes {tuple(fq.omega.shape)} and {tuple(fk.omega.shape)}"
            )
        params, kind = (*params_q, *params_k), KINDS[fq.kind]
    return params, log_decay, kind, scale


def _said(sizes):
    return sizes[0] if len(sizes) == 1 else list(sizes)


def check_state(op, name, state, num_seqs, q, k, v, fk, window, sinks, sizes, log_decay):
    if not isinstance(state, AttentionState):
        raise TypeError(f"{op}: {name} must be AttentionState, got {type(state).__name__}")
    acc = acc_dtype(q.dtype)
    heads, headdim, headdim_v = k.shape[1], k.shape[3], v.shape[3]
    features = 0 if fk is None else fk.omega.shape[1]
    if window and (state.window_decay is None) != (log_decay is None):
        wanted = "without" if log_decay is None else "with"
        raise ValueError(
            f"{op}: {name} must be one {wanted} decay, as log_decay is: "
            f"empty_attention_state(..., decay={log_decay is not None})"
        )
    own = len(sizes) > 1
    slots = 0 if state.cache_k is None else state.cache_k.shape[1 if own else 2]
    if slots != sum(sizes):
        raise ValueError(
            f"{op}: {name} must have {sum(sizes)} slots for hard keys, as cache_size says, got "
            f"{slots}: empty_attention_state(..., cache_size={_said(sizes)})"
        )
    expected = {
        "kv": ((heads, features, headdim_v), "kv heads, features, headdim_v", acc),
        "z": ((heads, features), "kv heads, features", acc),
        "log_scale": ((heads, features), "kv heads, features", acc),
        "window_k": ((heads, 2 * window, headdim), "kv heads, 2 window, headdim", q.dtype),
        "window_v": ((heads, 2 * window, headdim_v), "kv heads, 2 window, headdim_v", q.dtype),
        "window_decay": ((heads, 2 * window), "kv heads, 2 window", acc),
        "sink_k": ((heads, sinks, headdim), "kv heads, sinks, headdim", q.dtype),
        "sink_v": ((heads, sinks, headdim_v), "kv heads, sinks, headdim_v", q.dtype),
    }
    if max(sizes):
        at, votes = slots_shape(sizes, heads), votes_shape(sizes, heads, window)
        legend = "slots of all kv heads" if own else "kv heads, cache_size"
        votes_legend = "votes of all kv heads" if own else "kv heads, cache_size + window"
        expected |= {
            "cache_k": ((*at, headdim), f"{legend}, headdim", q.dtype),
            "cache_v": ((*at, headdim_v), f"{legend}, headdim_v", q.dtype),
            "cache_position": (at, legend, torch.int64),
            "cache_decay": (at, legend, acc),
            "cache_votes": (votes, votes_legend, acc),
            "cache_sums": ((heads, headdim + headdim_v), "kv heads, headdim + headdim_v", acc),
        }
        required = [n for n in expected if n.startswith("cache") and n != "cache_decay"]
        required += [] if log_decay is None else ["cache_decay"]
        for field in required:
            if getattr(state, field) is None:
                raise ValueError(f"{op}: {name}.{field} must be a tensor, got None")
    for field, (shape, legend, dtype) in expected.items():
        x = getattr(state, field)
        if x is not None:
            check_like(op, f"{name}.{field}", x, (num_seqs, *shape), f"(sequences, {legend})", q,
                       dtype)  # fmt: skip
    check_like(op, f"{name}.length", state.length, (num_seqs,), "(sequences)", q, torch.int64)


def _check_no_gradient(op, state, window, sinks):
    if not torch.is_grad_enabled():
        return
    near = (x for x in state[3:] if x is not None)
    if any(x.requires_grad for x in (state if window else near) if x is not None):
        raise ValueError(
            f"{op}: with window or sinks initial_state carries no gradient: detach its tensors"
        )
