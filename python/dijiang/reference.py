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
    hard_key_row,
)

LOG2E = math.log2(math.e)

# Of hard keys: a NOVEL-th of the slots goes to the most novel ones, and votes count CARRIED times
# when the next choice is made.
NOVEL, CARRIED = 2, 0.5


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
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, cache_size=0, log_decay=None,
    cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0, hard_keys=None,
) -> Tensor:  # fmt: skip
    """As causal_linear_attention with features of q and k, exact keys weighing exp(scale q.k)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    if cache_size and hard_keys is None:
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
        if cache_size:
            held = held_keys(hard_keys[:, row + p // window], len(p))  # (Hkv, T, T)
            near = near | held.repeat_interleave(groups, 0)
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

    rows = hard_key_rows(q, window, cu_seqlens, seq_bounds) if cache_size else None
    return _for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds, rows)


def hard_key_rows(q, window, cu_seqlens=None, seq_bounds=None) -> list[int]:
    """The first row of each sequence in a table of hard keys, and the number of rows."""
    segments = segments_of(q, cu_seqlens, seq_bounds)
    firsts = [b * q.shape[2] + begin for b, begin, _ in segments] + [q.shape[0] * q.shape[2]]
    return [hard_key_row(first, window, n) for n, first in enumerate(firsts)]


def held_keys(slots, length) -> Tensor:
    """Positions by slot (..., cache_size), -1: none -> whether each is held, (..., length) bool."""
    slots = torch.where(slots < 0, length, slots.long())
    held = torch.zeros(*slots.shape[:-1], length + 1, dtype=torch.bool, device=slots.device)
    return held.scatter_(-1, slots, True)[..., :length]


@torch.no_grad()
def choose_hard_keys(
    q, k, v, *, scale, window, sinks, cache_size, cu_seqlens=None, seq_bounds=None
) -> Tensor:  # fmt: skip
    """int32 (Hkv, rows, cache_size): the positions kept beyond the window, a block and kv head.

    When block j begins, block j - 2 leaves the window. Of its keys, sinks excluded, and of those in
    the slots, cache_size stay: first cache_size // NOVEL by novelty, |v - mean v|
    exp(-cos(k, mean k)) with the means over all tokens so far, then the rest by votes: the sum over
    the queries of block j - 1 of their softmax weights among exact keys, and for a key in a slot
    half of what it had when the choice before was made.
    """
    *rows, count = hard_key_rows(q, window, cu_seqlens, seq_bounds)
    table = torch.zeros(k.shape[1], count, cache_size, dtype=torch.int32, device=q.device)
    for row, (b, begin, end) in zip(rows, segments_of(q, cu_seqlens, seq_bounds), strict=True):
        for head in range(k.shape[1]):
            queries = q[b, :, begin:end].unflatten(0, (k.shape[1], -1))[head]
            slots = _hard_keys_of_head(
                queries,
                k[b, head, begin:end],
                v[b, head, begin:end],
                scale,
                window,
                sinks,
                cache_size,
            )
            table[head, row : row + len(slots)] = torch.tensor(slots, dtype=torch.int32)
    return table


def _hard_keys_of_head(q, k, v, scale, window, sinks, cache_size) -> list[list[int]]:
    """q (G, T, d), k (T, d), v (T, dv) -> positions by block and slot, -1 where one is empty."""
    blocks = -(-k.shape[0] // window)
    slots, carried, table = [], {}, []
    for j in range(blocks):
        if j >= 2:
            fresh = list(
                range(max((j - 2) * window, min(sinks, (j - 1) * window)), (j - 1) * window)
            )
            candidates = slots + fresh
            votes = _votes(q, k, candidates, len(slots), j, scale, window, sinks)
            votes += torch.tensor([carried.get(s, 0.0) for s in candidates]).to(votes)
            keep = set(candidates)
            if len(candidates) > cache_size:
                novelty = _novelty(
                    k[candidates], v[candidates], k[: j * window].sum(0), v[: j * window].mean(0)
                )
                keep = {candidates[i] for i in _best(novelty, votes, cache_size)}
            carried = dict(zip(candidates, (CARRIED * votes).tolist(), strict=True))
            entering = [s for s in fresh if s in keep]
            slots = [s if s in keep else None for s in slots]
            slots = [entering.pop(0) if s is None else s for s in slots] + entering
        table.append(slots + [-1] * (cache_size - len(slots)))
    return table


def _votes(q, k, candidates, num_slots, j, scale, window, sinks) -> Tensor:
    """Of block j - 1, among its exact keys: sinks, slots, block j - 2 and the causal part."""
    start = (j - 2) * window
    exact = [*range(min(sinks, start)), *candidates[:num_slots], *range(start, j * window)]
    t = torch.arange(start + window, j * window, device=q.device)
    scores = scale * (q[:, t] @ k[exact].mT)
    later = torch.tensor(exact, device=q.device)[None] > t[:, None]
    votes = scores.masked_fill(later, -math.inf).softmax(-1).sum((0, 1))
    return votes[[exact.index(s) for s in candidates]]


def _novelty(keys, values, key_sum, value_mean):
    cosine = _divide(keys @ key_sum, keys.norm(dim=-1) * key_sum.norm())
    return (values - value_mean).norm(dim=-1) * (-cosine).exp()


def _best(novelty, votes, cache_size) -> list[int]:
    order = lambda x: torch.sort(x, descending=True, stable=True).indices.tolist()  # noqa: E731
    kept = order(novelty)[: cache_size // NOVEL]
    return kept + [i for i in order(votes) if i not in kept][: cache_size - len(kept)]


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
    q, k, v, fq=None, fk=None, *, scale=None, window=0, sinks=0, cache_size=0, log_decay=None,
    initial_state=None, cu_seqlens=None, seq_bounds=None, normalize=True, eps=0.0,
    return_state=False, hard_keys=None, return_hard_keys=False,
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
            dtype=q.dtype, device=q.device, decay=log_decay is not None, cache_size=cache_size,
        )  # fmt: skip
    log_decay = _decay_per_token(log_decay, k)
    # Exponents of features, base 2: (B, H, T, m) and (B, Hkv, T, m).
    no_features = q.new_zeros(1, 1, 1, 0, dtype=acc)
    b = no_features.expand(*q.shape[:3], 0)
    a = no_features.expand(*k.shape[:3], 0)
    if fq is not None:
        b = log_features(q.to(acc), fq, scale) * LOG2E
        a = log_features(k.to(acc), fk, scale) * LOG2E

    table, rows = None, [0] * (len(segments) + 1)
    if cache_size:
        rows = hard_key_rows(q, window, cu_seqlens, seq_bounds)
        table = torch.zeros(kv_heads, rows[-1], cache_size, dtype=torch.int32, device=q.device)
    out, finals = torch.zeros(*q.shape[:-1], dv, dtype=q.dtype, device=q.device), []
    for n, (row, begin, end) in enumerate(segments):
        far = (state.kv[n], state.z[n], state.log_scale[n])
        p0 = int(state.length[n])
        # Slots as lists, replaced and never written, so that autograd sees through them.
        slots_k, slots_v = list(state.window_k[n].unbind(1)), list(state.window_v[n].unbind(1))
        sink_k, sink_v = list(state.sink_k[n].unbind(1)), list(state.sink_v[n].unbind(1))
        slots_decay = None if log_decay is None else list(state.window_decay[n].unbind(1))
        hard = _HardKeys(state, n, window, cache_size) if cache_size else None
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
            keys = sink_k[: p + 1] + (hard.keys if hard else []) + [slots_k[i] for i in near]
            values = sink_v[: p + 1] + (hard.values if hard else []) + [slots_v[i] for i in near]
            keys = torch.stack(keys, 1) if keys else k.new_zeros(kv_heads, 0, d)
            values = torch.stack(values, 1) if values else v.new_zeros(kv_heads, 0, dv)
            query = _by_kv_head(q[row, :, t].to(acc), kv_heads)
            scores = (scale * LOG2E) * (query @ keys.to(acc).mT)
            if hard:
                table[:, block] = hard.padded(hard.position, -1)
                hard.see(torch.cat([new_k, new_v], -1).to(acc), scores, p, sinks)
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
                *(hard.state(state, n) if hard else (None,) * 6),
            )
        )
        if outs:
            out = _put(out, row, begin, end, torch.stack(outs, 1))
    results = [out]
    if return_state:
        final = AttentionState(
            *(None if x[0] is None else torch.stack(x) for x in zip(*finals, strict=True))
        )
        results.append(final if finals else state)
    if return_hard_keys:
        results.append(table)
    return tuple(results) if len(results) > 1 else out


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


def segments_of(q: Tensor, cu_seqlens=None, seq_bounds=None) -> list[tuple[int, int, int]]:
    """(batch row, begin, end) of each sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, begin, end) for begin, end in itertools.pairwise(ends)]
    if seq_bounds is not None:
        return [(row, begin, end) for row, (begin, end) in enumerate(seq_bounds.tolist())]
    return [(row, 0, q.shape[2]) for row in range(q.shape[0])]


class _HardKeys:
    """The slots of one sequence, for all kv heads: they fill up alike and hold different keys."""

    def __init__(self, state, n, window, cache_size):
        self.window, self.size = window, cache_size
        count = int((state.cache_position[n, 0] >= 0).sum())
        self.keys = list(state.cache_k[n, :, :count].unbind(1))
        self.values = list(state.cache_v[n, :, :count].unbind(1))
        self.position = state.cache_position[n, :, :count].clone()
        self.sums = state.cache_sums[n].clone()
        votes = state.cache_votes[n]
        self.votes = torch.cat([votes[:, :count], votes[:, cache_size:]], 1)
        self.since = torch.zeros_like(self.votes[:, :count])
        if state.cache_decay is not None:
            self.since = state.cache_decay[n, :, :count].clone()

    @torch.no_grad()
    def see(self, token, scores, p, sinks):
        """Token p (key and value); scores of the sinks, the slots and the rest of the window."""
        self.sums = self.sums + token
        before = max(0, (p // self.window - 1) * self.window)  # the first of the block before
        if p < self.window:
            return
        weights = torch.softmax(scores / LOG2E, -1).sum(1)
        first, slots = min(sinks, p + 1), len(self.keys)
        skipped = min(max(sinks - before, 0), self.window)
        window = weights[:, first + slots : first + slots + self.window - skipped]
        window = torch.nn.functional.pad(window, (skipped, 0))
        self.votes = self.votes + torch.cat([weights[:, first : first + slots], window], 1)

    def turn_over(self, far, p, slots_k, slots_v, slots_decay, fk, scale, sinks, given=None):
        """Before token p: block p / w - 2 leaves the window. Returns the far state after it."""
        w, acc = self.window, far[0].dtype
        start = p - 2 * w
        fresh = [s for s in range(start, start + w) if s >= sinks]
        at = lambda slots: [slots[s % (2 * w)] for s in range(start, start + w)]  # noqa: E731
        since = torch.zeros(len(self.since), w, dtype=acc, device=self.since.device)
        if slots_decay:
            decay = torch.stack(at(slots_decay), 1)
            far = _decay_far(far, decay.sum(1))
            since = decay.flip(1).cumsum(1).flip(1) - decay
            self.since = self.since + decay.sum(1, keepdim=True)
        skip = w - len(fresh)
        if not fresh and not self.keys:
            self.votes = torch.zeros_like(self.votes)
            return far
        keys = torch.stack(self.keys + at(slots_k)[skip:], 1)
        values = torch.stack(self.values + at(slots_v)[skip:], 1)
        since = torch.cat([self.since, since[:, skip:]], 1)
        position = torch.tensor(fresh, dtype=torch.int64).expand(len(keys), -1)
        position = torch.cat([self.position, position.to(self.position)], 1)
        num_slots = len(self.keys)  # the candidates' votes
        votes = torch.cat([self.votes[:, :num_slots], self.votes[:, num_slots + skip :]], 1)
        if given is None:
            stay = self._choose(keys, values, votes, p)
        else:
            stay = self._take(position, given)
        gone = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        leave = gone.scatter_(1, stay, False).nonzero()[:, 1].reshape(len(keys), -1)
        take = lambda x, i: x.gather(1, i.reshape(*i.shape, *(1,) * (x.dim() - 2)).expand(  # noqa: E731
            *i.shape, *x.shape[2:]))  # fmt: skip
        for key, value, log_decay in zip(
            take(keys, leave).unbind(1), take(values, leave).unbind(1),
            take(since, leave).unbind(1), strict=True,
        ):  # fmt: skip
            exponent = far[1][..., :0]
            if fk is not None:
                exponent = log_features(key[:, None].to(acc), fk, scale)[:, 0]
                exponent = LOG2E * (exponent + log_decay[:, None])
            far = _fold_exponent(far, exponent, value, None, is_sink=False)
        self.keys, self.values = (
            list(take(keys, stay).unbind(1)),
            list(take(values, stay).unbind(1)),
        )
        self.since, self.position = take(since, stay), take(position, stay)
        self.votes = torch.nn.functional.pad(CARRIED * take(votes, stay), (0, w))
        return far

    def _choose(self, keys, values, votes, tokens):
        """Indices of the candidates (Hkv, n) that stay, by slot."""
        num_slots, n = len(self.keys), keys.shape[1]
        stay = []
        for head in range(len(keys)):
            kept = set(range(n))
            if n > self.size:
                head_keys, head_values = (x[head].detach().to(self.sums) for x in (keys, values))
                key_sum, value_sum = self.sums[head].split([keys.shape[2], values.shape[2]])
                novelty = _novelty(head_keys, head_values, key_sum, value_sum / tokens)
                kept = set(_best(novelty, votes[head], self.size))
            entering = [i for i in range(num_slots, n) if i in kept]
            slots = [i if i in kept else entering.pop(0) for i in range(num_slots)
                     if i in kept or entering]  # fmt: skip
            stay.append(slots + entering)
        return torch.tensor(stay, device=keys.device)

    @staticmethod
    def _take(position, given):
        """As _choose, of the positions in a table's row."""
        given = given[:, : int((given[0] >= 0).sum())].long()
        return (position[:, None, :] == given[:, :, None]).int().argmax(-1)

    def padded(self, x, value=0):
        """(Hkv, slots filled) -> (Hkv, slots)."""
        return torch.nn.functional.pad(x, (0, self.size - len(self.keys)), value=value)

    def state(self, state, n):
        count = len(self.keys)
        rows = lambda x, old: torch.cat([torch.stack(x, 1), old[n, :, count:]], 1) if x else old[n]  # noqa: E731
        votes = torch.cat([self.padded(self.votes[:, :count]), self.votes[:, count:]], 1)
        decay = None if state.cache_decay is None else self.padded(self.since)
        return (
            rows(self.keys, state.cache_k), rows(self.values, state.cache_v),
            self.padded(self.position, -1), decay, votes, self.sums,
        )  # fmt: skip


# ---- pieces ------------------------------------------------------------------------------------


def _for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds, rows=None):
    """Runs one_sequence on (H, T, .) slices, kv heads repeated; padding stays 0.

    rows: one more argument for each sequence.
    """
    groups = q.shape[1] // k.shape[1]
    log_decay = _decay_per_token(log_decay, k)
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[:3])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for n, (row, begin, end) in enumerate(segments_of(q, cu_seqlens, seq_bounds)):
        k_, v_, decay_ = (
            x[row, :, begin:end].repeat_interleave(groups, 0) for x in (k, v, log_decay)
        )
        more = () if rows is None else (rows[n],)
        one = one_sequence(q[row, :, begin:end], k_, v_, decay_.to(q.dtype), *more)
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
