"""Oracles in plain PyTorch: the definition of truth for every kernel.

Two forms of one function (docs/numerics.md, "The function" and "State"):

- ``causal_linear_attention`` and ``kernelized_attention`` build the T x T matrix of weights;
- ``*_recurrent`` and ``*_update`` walk token by token with the constant-size state.

Give float64 tensors for the truth. The quadratic forms compute in the dtype of q, so that the
error of the same formula at a low precision can be measured; the recurrent forms keep their state
in float32 (float64 for float64). All are differentiable by autograd. None is fast.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ._types import (
    EMPTY_LOG_SCALE,
    AttentionState,
    FeatureParams,
    LinearAttentionState,
    acc_dtype,
    empty_attention_state,
)

LOG2E = math.log2(math.e)


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


def causal_linear_attention(
    q, k, v, *, log_decay=None, cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0
) -> Tensor:
    """o_t = sum_{s<=t} exp(c_t - c_s) (q_t.k_s) v_s / (sum_{s<=t} exp(c_t - c_s) q_t.k_s + eps)."""

    def one_sequence(q, k, v, log_decay):  # (H, T, .), (H, T)
        c = log_decay.cumsum(-1)
        causal = torch.ones(q.shape[1], q.shape[1], device=q.device).tril() > 0
        decay = (c[:, :, None] - c[:, None, :]).masked_fill(~causal, -math.inf).exp()
        w = (q @ k.mT) * decay
        return _divide(w @ v, w.sum(-1, keepdim=True) + eps) if normalize else w @ v

    return _for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds)


def kernelized_attention(
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, log_decay=None,
    cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0,
) -> Tensor:  # fmt: skip
    """As causal_linear_attention with features of q and k, near keys weighing exp(scale q.k)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]

    def one_sequence(q, k, v, log_decay):
        p = torch.arange(q.shape[1], device=q.device)
        t, s = p[:, None], p[None, :]
        causal = s <= t
        near = s < sinks
        if window:
            near = near | (t // window - s // window <= 1)
        log_w = (scale * (q @ k.mT)).masked_fill(~(near & causal), -math.inf)
        if fq is not None:
            c = log_decay.cumsum(-1)
            b = log_features(q, fq, scale)
            a = log_features(k, _repeat_params(fk, groups), scale)
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
        return _divide(w @ v, den + eps * (-row_max).exp() if eps else den)

    return _for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds)


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
            *_empty_far(num_seqs, k.shape[1], k.shape[-1], v.shape[-1], acc, q.device)
        )
    out, finals = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device), []
    log_decay = _decay_per_token(log_decay, k)
    for n, (row, begin, end) in enumerate(segments_of(q, cu_seqlens, seq_bounds)):
        far = tuple(x[n] for x in state)
        outs = []
        for t in range(begin, end):
            key = k[row, :, t].to(acc)
            ld = None if log_decay is None else log_decay[row, :, t].to(acc)
            far = _fold(far, _mantissa(key), _exponent(key), v[row, :, t].to(acc), ld)
            query = _by_kv_head(q[row, :, t].to(acc), k.shape[1])
            near = query.new_zeros(*query.shape[:2], 0)
            shared = (_exponent(query), near, v.new_zeros(k.shape[1], 0, v.shape[-1]).to(acc))
            outs.append(_read(far, _mantissa(query), *shared, normalize, eps).flatten(0, 1))
        finals.append(far)
        if outs:
            out = _put(out, row, begin, end, torch.stack(outs, 1))
    final = (
        LinearAttentionState(*(torch.stack(x) for x in zip(*finals, strict=True)))
        if finals
        else state
    )
    return (out, final) if return_state else out


def kernelized_attention_recurrent(
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, log_decay=None,
    initial_state=None, cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0,
    return_state=False,
):  # fmt: skip
    """kernelized_attention one token at a time, from and to an AttentionState."""
    acc = acc_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kv_heads, d, dv = k.shape[1], k.shape[-1], v.shape[-1]
    segments = segments_of(q, cu_seqlens, seq_bounds)
    state = initial_state
    if state is None:
        num_features = 0 if fk is None else fk.omega.shape[1]
        state = empty_attention_state(
            len(segments), kv_heads, num_features, d, dv, window=window, sinks=sinks,
            dtype=q.dtype, device=q.device, decay=log_decay is not None,
        )  # fmt: skip
    log_decay = _decay_per_token(log_decay, k)
    # Exponents of features, base 2: (B, H, T, m) and (B, Hkv, T, m).
    no_features = q.new_zeros(1, 1, 1, 0, dtype=acc)
    b = no_features.expand(*q.shape[:3], 0)
    a = no_features.expand(*k.shape[:3], 0)
    if fq is not None:
        b = log_features(q.to(acc), fq, scale) * LOG2E
        a = log_features(k.to(acc), fk, scale) * LOG2E

    out, finals = torch.zeros(*q.shape[:-1], dv, dtype=q.dtype, device=q.device), []
    for n, (row, begin, end) in enumerate(segments):
        far = (state.kv[n], state.z[n], state.log_scale[n])
        p0 = int(state.length[n])
        # Slots as lists, replaced and never written, so that autograd sees through them.
        slots_k, slots_v = list(state.window_k[n].unbind(1)), list(state.window_v[n].unbind(1))
        sink_k, sink_v = list(state.sink_k[n].unbind(1)), list(state.sink_v[n].unbind(1))
        slots_decay = None if log_decay is None else list(state.window_decay[n].unbind(1))
        outs = []
        for t in range(begin, end):
            p = p0 + t - begin
            new_k, new_v = k[row, :, t], v[row, :, t]
            new_decay = None if log_decay is None else log_decay[row, :, t].to(acc)
            if p < sinks:
                sink_k[p], sink_v[p] = new_k, new_v
            if window:
                if p % window == 0 and p >= 2 * window:
                    for s in range(p - 2 * window, p - window):  # leaves the window
                        i = s % (2 * window)
                        far = _fold_key(
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
                far = _fold_exponent(far, a[row, :, t], new_v, new_decay, is_sink=p < sinks)
                near, since_fold = [], []
            keys = sink_k[: p + 1] + [slots_k[i] for i in near]
            values = sink_v[: p + 1] + [slots_v[i] for i in near]
            keys = torch.stack(keys, 1) if keys else k.new_zeros(kv_heads, 0, d)
            values = torch.stack(values, 1) if values else v.new_zeros(kv_heads, 0, dv)
            query = _by_kv_head(q[row, :, t].to(acc), kv_heads)
            scores = (scale * LOG2E) * (query @ keys.to(acc).mT)
            exponents = _by_kv_head(b[row, :, t], kv_heads)
            for s in since_fold if slots_decay else []:
                exponents = exponents + LOG2E * slots_decay[s % (2 * window)][:, None, None]
            one = torch.ones_like(exponents)
            outs.append(
                _read(far, one, exponents, scores, values.to(acc), normalize, eps).flatten(0, 1)
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
            )
        )
        if outs:
            out = _put(out, row, begin, end, torch.stack(outs, 1))
    if not return_state:
        return out
    final = AttentionState(
        *(None if x[0] is None else torch.stack(x) for x in zip(*finals, strict=True))
    )
    return out, final if finals else state


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
    q, k, v, state, fq=None, fk=None, *, scale=None, window=0, sinks=0, log_decay=None,
    normalize=True, eps=0.0,
) -> Tensor:  # fmt: skip
    """One token a sequence; `state` is written in place."""
    out, final = kernelized_attention_recurrent(
        q, k, v, fq, fk, scale=scale, window=window, sinks=sinks, log_decay=log_decay,
        initial_state=state, normalize=normalize, eps=eps, return_state=True,
    )  # fmt: skip
    _copy_state(state, final)
    return out


def segments_of(q: Tensor, cu_seqlens=None, seq_bounds=None) -> list[tuple[int, int, int]]:
    """(batch row, begin, end) of each sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, begin, end) for begin, end in itertools.pairwise(ends)]
    if seq_bounds is not None:
        return [(row, begin, end) for row, (begin, end) in enumerate(seq_bounds.tolist())]
    return [(row, 0, q.shape[2]) for row in range(q.shape[0])]


# ---- pieces ------------------------------------------------------------------------------------


def _for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds):
    """Runs one_sequence on (H, T, .) slices, kv heads repeated; padding stays 0."""
    groups = q.shape[1] // k.shape[1]
    log_decay = _decay_per_token(log_decay, k)
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[:3])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for row, begin, end in segments_of(q, cu_seqlens, seq_bounds):
        k_, v_, decay_ = (
            x[row, :, begin:end].repeat_interleave(groups, 0) for x in (k, v, log_decay)
        )
        one = one_sequence(q[row, :, begin:end], k_, v_, decay_.to(q.dtype))
        out = _put(out, row, begin, end, one)
    return out


def _put(out, row, begin, end, values):
    out = out.clone()
    out[row, :, begin:end] = values
    return out


def _divide(num, den):
    """num / den, and 0 where nothing has any weight."""
    return torch.where(den == 0, 0.0, num / torch.where(den == 0, 1.0, den))


def _repeat_params(params, groups):
    omega, log_weight, beta = (
        None if x is None else x.repeat_interleave(groups, 0) for x in params[:3]
    )
    return FeatureParams(omega, log_weight, beta, params.kind)


def _decay_per_token(log_decay, k):
    """(Hkv,) or (B, Hkv, T) -> (B, Hkv, T)."""
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay[None, :, None].expand(k.shape[:3])
    return log_decay


def _by_kv_head(x, kv_heads):
    return x.unflatten(0, (kv_heads, -1))  # (H, .) -> (Hkv, G, .)


def _empty_far(num_seqs, kv_heads, num_features, dv, acc, device):
    z = torch.zeros(num_seqs, kv_heads, num_features, dtype=acc, device=device)
    return z[..., None].repeat(1, 1, 1, dv), z, torch.full_like(z, EMPTY_LOG_SCALE)


def _exponent(x):
    """Whole e with |x| <= 2^e, far below every other where x is 0."""
    x = x.detach()
    return torch.where(x == 0, EMPTY_LOG_SCALE, torch.frexp(x)[1].to(x.dtype))


def _mantissa(x):
    return x * torch.exp2(-_exponent(x).clamp(min=-1000))


def _decay_far(far, log_decay):
    kv, z, log_scale = far
    if log_decay is None:
        return far
    d = LOG2E * log_decay[:, None]
    # Whichever whole number keeps z near 1, so that neither end of the range is ever reached.
    whole = torch.where(z < 1, d.floor(), d.ceil()).detach()
    rest = torch.exp2(d - whole)
    return kv * rest[..., None], z * rest, log_scale + whole


def _fold(far, factor, exponent, value, log_decay):
    """Decays the state, then adds the key whose features are factor * 2^exponent."""
    kv, z, old = _decay_far(far, log_decay)
    new = torch.maximum(old, exponent.detach().ceil())
    rescale, phi = torch.exp2(old - new), factor * torch.exp2(exponent - new)
    return kv * rescale[..., None] + phi[..., None] * value[:, None, :], z * rescale + phi, new


def _fold_exponent(far, exponent, value, log_decay, is_sink):
    if is_sink:
        return _decay_far(far, log_decay)
    return _fold(far, torch.ones_like(exponent), exponent, value.to(exponent.dtype), log_decay)


def _fold_key(far, key, value, log_decay, fk, scale, is_sink):
    acc = far[0].dtype
    exponent = far[1][..., :0]
    if fk is not None:
        exponent = log_features(key[:, None].to(acc), fk, scale)[:, 0] * LOG2E
    return _fold_exponent(far, exponent, value, log_decay, is_sink)


def _read(far, factor, exponent, scores, values, normalize, eps):
    """Output for features factor 2^exponent (Hkv, G, m) and near scores (Hkv, G, S), base 2."""
    kv, z, log_scale = far
    exponent = exponent + log_scale[:, None]
    if normalize:
        terms = torch.cat([exponent, scores], -1).detach()
        floor = math.log2(eps) if eps else EMPTY_LOG_SCALE
        row_max = torch.nn.functional.pad(terms, (0, 1), value=floor).amax(-1, keepdim=True)
    else:
        row_max = scores.new_zeros(())
    f, near = factor * torch.exp2(exponent - row_max), torch.exp2(scores - row_max)
    num = f @ kv + near @ values
    if not normalize:
        return num
    den = (f @ z[..., None]) + near.sum(-1, keepdim=True)
    return _divide(num, den + eps * torch.exp2(-row_max) if eps else den)


def _copy_state(state, final):
    with torch.no_grad():
        for old, new in zip(state, final, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
