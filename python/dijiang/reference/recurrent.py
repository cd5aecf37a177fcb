"""Attention token by token, from and to a state of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import (
    AttentionState,
    LinearAttentionState,
    acc_dtype,
    cache_sizes,
    empty_attention_state,
)
from .by_head import run_by_head
from .far_state import (
    LOG2E,
    empty_far,
    exponent_of,
    fold,
    fold_exponent,
    fold_key,
    mantissa_of,
    read,
)
from .features import log_features
from .sequences import decay_per_token, hard_key_rows, put, segments_of
from .slots import HardKeySlots


def causal_linear_attention_recurrent(
    q, k, v, *, log_decay=None, initial_state=None, cu_seqlens=None, seq_bounds=None,
    normalize=True, eps=0.0, return_state=False,
):  # fmt: skip
    """causal_linear_attention one token at a time, from and to a LinearAttentionState."""
    acc = acc_dtype(q.dtype)
    num_seqs = len(segments_of(q, cu_seqlens, seq_bounds))
    state = initial_state
    if state is None:
        state = LinearAttentionState(
            *empty_far(num_seqs, k.shape[1], k.shape[-1], v.shape[-1], acc, q.device)
        )
    out, finals = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device), []
    log_decay = decay_per_token(log_decay, k)
    for n, (row, begin, end) in enumerate(segments_of(q, cu_seqlens, seq_bounds)):
        far = tuple(x[n] for x in state)
        outs = []
        for t in range(begin, end):
            key = k[row, :, t].to(acc)
            ld = None if log_decay is None else log_decay[row, :, t].to(acc)
            far = fold(far, mantissa_of(key), exponent_of(key), v[row, :, t].to(acc), ld)
            query = _by_kv_head(q[row, :, t].to(acc), k.shape[1])
            near = query.new_zeros(*query.shape[:2], 0)
            shared = (exponent_of(query), near, v.new_zeros(k.shape[1], 0, v.shape[-1]).to(acc))
            outs.append(read(far, mantissa_of(query), *shared, normalize, eps).flatten(0, 1))
        finals.append(far)
        if outs:
            out = put(out, row, begin, end, torch.stack(outs, 1))
    final = (
        LinearAttentionState(*(torch.stack(x) for x in zip(*finals, strict=True)))
        if finals
        else state
    )
    return (out, final) if return_state else out


def kernelized_attention_recurrent(
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, cache_size=0, log_decay=None,
    initial_state=None, cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0,
    return_state=False, hard_keys=None, return_hard_keys=False,
):  # fmt: skip
    """kernelized_attention one token at a time, from and to an AttentionState."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    segments = segments_of(q, cu_seqlens, seq_bounds)
    state = initial_state
    if state is None:
        num_features = 0 if fk is None else fk.omega.shape[1]
        state = empty_attention_state(
            len(segments), k.shape[1], num_features, k.shape[-1], v.shape[-1], window=window,
            sinks=sinks, dtype=q.dtype, device=q.device, decay=log_decay is not None,
            cache_size=cache_size,
        )  # fmt: skip
    log_decay = decay_per_token(log_decay, k)
    sizes = cache_sizes(cache_size)
    rows = [0] * (len(segments) + 1)
    if max(sizes):
        rows = hard_key_rows(q, window, cu_seqlens, seq_bounds)
    settings = (scale, window, sinks, max(sizes), segments, rows, normalize, eps)

    def attend(q, k, v, fq, fk, size, log_decay, state, hard_keys):
        return _recurrent(q, k, v, fq, fk, size, log_decay, state, hard_keys, *settings)

    if len(sizes) == 1:
        size = sizes[0] or None
        out, final, table = attend(q, k, v, fq, fk, size, log_decay, state, hard_keys)
    else:
        out, final, table = run_by_head(
            attend, q, k, v, fq, fk, sizes, window, log_decay, state, hard_keys
        )
    results = [out, final if return_state else None, table if return_hard_keys else None]
    wanted = (True, return_state, return_hard_keys)
    results = [x for x, asked in zip(results, wanted, strict=True) if asked]
    return tuple(results) if len(results) > 1 else out


def _recurrent(
    q, k, v, fq, fk, cache_size, log_decay, state, hard_keys, scale, window, sinks, columns,
    segments, rows, normalize, eps,
):  # fmt: skip
    """(out, state, table of so many columns) of heads with as many slots; None: without a cache."""
    acc = acc_dtype(q.dtype)
    kv_heads, d, dv = k.shape[1], k.shape[-1], v.shape[-1]
    # Exponents of features, base 2: (B, H, T, m) and (B, Hkv, T, m).
    no_features = q.new_zeros(1, 1, 1, 0, dtype=acc)
    b = no_features.expand(*q.shape[:3], 0)
    a = no_features.expand(*k.shape[:3], 0)
    if fq is not None:
        b = log_features(q.to(acc), fq, scale) * LOG2E
        a = log_features(k.to(acc), fk, scale) * LOG2E

    table = None
    if cache_size is not None:
        table = torch.zeros(kv_heads, rows[-1], columns, dtype=torch.int32, device=q.device)
    out, finals = torch.zeros(*q.shape[:-1], dv, dtype=q.dtype, device=q.device), []
    for n, (row, begin, end) in enumerate(segments):
        far = (state.kv[n], state.z[n], state.log_scale[n])
        p0 = int(state.length[n])
        # Slots as lists, replaced and never written, so that autograd sees through them.
        slots_k, slots_v = list(state.window_k[n].unbind(1)), list(state.window_v[n].unbind(1))
        sink_k, sink_v = list(state.sink_k[n].unbind(1)), list(state.sink_v[n].unbind(1))
        slots_decay = None if log_decay is None else list(state.window_decay[n].unbind(1))
        hard = None if cache_size is None else HardKeySlots(state, n, window, cache_size)
        outs = []
        for t in range(begin, end):
            p = p0 + t - begin
            block = rows[n] + p // window - p0 // window if window else 0  # its row in the table
            new_k, new_v = k[row, :, t], v[row, :, t]
            new_decay = None if log_decay is None else log_decay[row, :, t].to(acc)
            if p < sinks:
                sink_k[p], sink_v[p] = new_k, new_v
            if window:
                if p % window == 0 and p >= 2 * window and hard:
                    given = None if hard_keys is None else hard_keys[:, block]
                    far = hard.turn_over(
                        far, p, slots_k, slots_v, slots_decay, fk, scale, sinks, given
                    )
                elif p % window == 0 and p >= 2 * window:
                    for s in range(p - 2 * window, p - window):  # leaves the window
                        i = s % (2 * window)
                        far = fold_key(
                            far, slots_k[i], slots_v[i], slots_decay and slots_decay[i], fk,
                            scale, is_sink=s < sinks,
                        )  # fmt: skip
                slots_k[p % (2 * window)], slots_v[p % (2 * window)] = new_k, new_v
                if slots_decay:
                    slots_decay[p % (2 * window)] = new_decay
                oldest = max(0, (p // window - 1) * window)
                near = [s % (2 * window) for s in range(max(oldest, sinks), p + 1)]
                since_fold = range(oldest, p + 1)
            else:
                far = fold_exponent(far, a[row, :, t], new_v, new_decay, is_sink=p < sinks)
                near, since_fold = [], []
            keys = sink_k[: p + 1] + (hard.keys if hard else []) + [slots_k[i] for i in near]
            values = sink_v[: p + 1] + (hard.values if hard else []) + [slots_v[i] for i in near]
            keys = torch.stack(keys, 1) if keys else k.new_zeros(kv_heads, 0, d)
            values = torch.stack(values, 1) if values else v.new_zeros(kv_heads, 0, dv)
            query = _by_kv_head(q[row, :, t].to(acc), kv_heads)
            scores = (scale * LOG2E) * (query @ keys.to(acc).mT)
            if hard:
                table[:, block] = -1
                table[:, block, : hard.position.shape[1]] = hard.position
                hard.see(torch.cat([new_k, new_v], -1).to(acc), scores, p, sinks)
            exponents = _by_kv_head(b[row, :, t], kv_heads)
            for s in since_fold if slots_decay else []:
                exponents = exponents + LOG2E * slots_decay[s % (2 * window)][:, None, None]
            one = torch.ones_like(exponents)
            outs.append(
                read(far, one, exponents, scores, values.to(acc), normalize, eps).flatten(0, 1)
            )
        stack = lambda slots, old: torch.stack(slots, 1) if slots else old  # noqa: E731
        finals.append(
            AttentionState(
                *far,
                stack(slots_k, state.window_k[n]),
                stack(slots_v, state.window_v[n]),
                None if log_decay is None else stack(slots_decay, state.window_decay[n]),
                stack(sink_k, state.sink_k[n]),
                stack(sink_v, state.sink_v[n]),
                state.length[n] + (end - begin),
                *(hard.state(state, n) if hard else (None,) * 6),
            )
        )
        if outs:
            out = put(out, row, begin, end, torch.stack(outs, 1))
    final = AttentionState(
        *(None if x[0] is None else torch.stack(x) for x in zip(*finals, strict=True))
    ) if finals else state  # fmt: skip
    return out, final, table


def causal_linear_attention_update(
    q, k, v, state, *, log_decay=None, normalize=True, eps=0.0
) -> Tensor:
    """One token a sequence; `state` is written in place."""
    out, final = causal_linear_attention_recurrent(
        q, k, v, log_decay=log_decay, initial_state=state, normalize=normalize, eps=eps,
        return_state=True,
    )  # fmt: skip
    _copy_state(state, final)
    return out


def kernelized_attention_update(
    q, k, v, state, fq=None, fk=None, *, scale=None, window=0, sinks=0, cache_size=0,
    log_decay=None, normalize=True, eps=0.0,
) -> Tensor:  # fmt: skip
    """One token a sequence; `state` is written in place."""
    out, final = kernelized_attention_recurrent(
        q, k, v, fq, fk, scale=scale, window=window, sinks=sinks, cache_size=cache_size,
        log_decay=log_decay, initial_state=state, normalize=normalize, eps=eps, return_state=True,
    )  # fmt: skip
    _copy_state(state, final)
    return out


def _by_kv_head(x, kv_heads):
    return x.unflatten(0, (kv_heads, -1))  # (H, .) -> (Hkv, G, .)


def _copy_state(state, final):
    with torch.no_grad():
        for old, new in zip(state, final, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
