"""The gradients that kernelized_attention's backward leaves out of a slice of a sequence.

It takes the state that it is given for constant. What that leaves out concerns a constant number of
exact keys and the far state; here it is in plain PyTorch, linear in the length of the slice: what
the slice's queries read of the state before (reads), and how the state behind follows from the one
before and from the slice's keys (state_behind).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._types import EMPTY_LOG_SCALE, hard_key_row
from ..reference import log_features
from ._hard_keys import by_head

#: The fields of a state that have a gradient.
CARRIED = (
    "kv", "z", "window_k", "window_v", "window_decay", "sink_k", "sink_v", "cache_k", "cache_v",
    "cache_decay",
)  # fmt: skip
_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_CHUNK = 512  # queries at a time: bounds the memory of their weights for the state's keys


class Layout(NamedTuple):
    start: int  # tokens before the slice
    length: int  # and in it
    scale: float
    window: int
    sinks: int
    normalize: bool
    kind: str | None  # of the features
    sizes: tuple[int, ...]  # hard keys, of all kv heads or of each

    @property
    def end(self) -> int:
        return self.start + self.length

    def first_near(self, seen: int) -> int:
        """Where the window begins after `seen` tokens, and the state's time ends."""
        return max(0, ((seen - 1) // self.window - 1) * self.window) if self.window else seen


class Keys(NamedTuple):
    """Keys beside each other: the state's sinks, its hard keys, the rest of its window, and then
    the slice's own. In the accumulation dtype; decay, natural, in float64 for its differences."""

    k: Tensor  # (B, Hkv, known + T, d)
    v: Tensor  # (B, Hkv, known + T, dv)
    position: Tensor  # (B, Hkv, known + T), int64; -1: an empty slot
    exponent: Tensor  # (B, Hkv, n, m): log2 of the features of those that may fold, the first n
    decayed: Tensor  # (B, Hkv, known + T): from the state's time to the key
    times: Tensor  # (B, Hkv, 1 + ...): from the state's time to itself, and to each token since
    sinks: int
    known: int


def keys_of(layout, state, k, v, fk, log_decay) -> Keys:
    start, end, first = layout.start, layout.end, layout.first_near(layout.start)
    sinks = min(layout.sinks, start)
    later = max(first, sinks)  # a sink in the window is no second key
    acc, shape, device = state.kv.dtype, k.shape[:2], k.device
    window = torch.arange(first, start, device=device) % max(2 * layout.window, 1)
    times = torch.zeros(*shape, 1 + end - first, dtype=torch.float64, device=device)
    if log_decay is not None:
        known = [state.window_decay[:, :, window]] if layout.window else []
        times = F.pad(torch.cat([*known, log_decay], 2).double().cumsum(-1), (1, 0))
    window = window[later - first :]

    def beside(*parts):
        return torch.cat([x for x in parts if x is not None], 2)

    def rows(begin, end):
        return torch.arange(begin, end, device=device).expand(*shape, -1)

    keys = beside(state.sink_k[:, :, :sinks], state.cache_k, state.window_k[:, :, window], k)
    values = beside(state.sink_v[:, :, :sinks], state.cache_v, state.window_v[:, :, window], v)
    position = beside(rows(0, sinks), state.cache_position, rows(later, end))
    known = position.shape[2] - layout.length
    slots = times.new_zeros(*shape, known - sinks - len(window))
    if state.cache_decay is not None:
        slots = -state.cache_decay
    decayed = beside(times.new_zeros(*shape, sinks), slots, times[..., 1 + later - first :])
    keys, values = keys.to(acc), values.to(acc)
    folding = keys[:, :, : known + max(0, layout.first_near(end) - start)]
    exponent = _log2_features(folding, fk, layout.scale)
    return Keys(keys, values, position, exponent, decayed, times, sinks, known)


def _log2_features(x, params, scale) -> Tensor:
    return x[..., :0] if params is None else _LOG2E * log_features(x, params, scale)


def reads(
    layout, keys, state, q, fq, log_decay, table, out, row_scale, row_sum, grad_out
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """What the slice's queries read of the state before it, each with its gradient.

    docs/numerics.md, "Backward": P_ts of the slice's queries t and the state's keys s, R and rho
    for what is far. The queries' own gradients are the operator's.
    """
    acc, heads, known = keys.k.dtype, keys.k.shape[1], keys.known
    k, v, position = keys.k[:, :, :known], keys.v[:, :, :known], keys.position[..., :known]
    last = keys.times[..., layout.start - layout.first_near(layout.start), None]
    since = _LOG2E * (last - keys.decayed[..., :known])
    empty = (position < 0)[..., None]
    exponent = (keys.exponent[:, :, :known] + since[..., None].to(acc)).masked_fill(
        empty, EMPTY_LOG_SCALE
    )
    state_exponent = state.log_scale + (_LOG2E * last).to(acc)
    with torch.no_grad():
        decay = None
        if log_decay is not None:
            decay = (_LOG2E * log_decay.double().cumsum(-1)).to(acc)[..., None]
        dk, dv, da = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(exponent)
        # R and rho relative to 2^top, as large as any of their terms: a key that is far for all of
        # these reads 2^(exponent + top), which is at most 1.
        r, rho = torch.zeros_like(state.kv), torch.zeros_like(state.z)
        top = torch.full_like(state.z, EMPTY_LOG_SCALE)

        def read_far(some):
            fk = torch.exp2(exponent[:, :, some] + top[:, :, None])
            da[:, :, some] += fk * (v[:, :, some] @ r.mT - rho[:, :, None])
            dv[:, :, some] += fk @ r

        # Back in time. A key that is far from some time on for all queries reads R there; before,
        # where it is near for some of them, it is weighed query by query.
        weighed = torch.zeros(known, dtype=torch.bool, device=k.device)
        spans = [(i, min(i + _CHUNK, layout.length)) for i in range(0, layout.length, _CHUNK)]
        while spans:
            begin, end = spans.pop()
            near, far = _near_and_far(layout, position, table, begin, end - begin)
            turning = near.flatten(0, 3).any(0) & ~weighed
            read_far(turning)
            weighed |= turning

            def by_kv_head(x):
                return x[:, :, begin:end].to(acc).unflatten(1, (heads, -1))  # noqa: B023

            scale, inverse = by_kv_head(row_scale[..., None]), 1 / by_kv_head(row_sum[..., None])
            b = _log2_features(q[:, :, begin:end].to(acc), fq, layout.scale)
            b = b.unflatten(1, (heads, -1)) - scale
            if decay is not None:
                b = b + decay[:, :, None, begin:end]
            next_top = torch.maximum(top, b.amax((2, 3)).ceil())
            near, far = near[..., weighed], far[..., weighed]
            fk = exponent[:, :, weighed].masked_fill(~far.any((2, 3))[..., None], -math.inf)
            fk = fk + next_top[:, :, None]
            middle = _block_between(layout, begin, end)
            if begin < middle < end and fk.numel() and fk.amax() > 60:
                # What is far for some of these queries would outweigh all else for others, for
                # which it is still near. Within a block it is either, for all.
                spans += [(begin, middle), (middle, end)]
                continue
            fk = torch.exp2(fk)
            phi = torch.exp2(b - next_top[:, :, None, None]) * inverse
            shrink, top = torch.exp2(top - next_top), next_top

            queries, grad = by_kv_head(q), by_kv_head(grad_out)
            delta = torch.zeros_like(scale)
            if layout.normalize:
                delta = (grad * by_kv_head(out)).sum(-1, keepdim=True)
            weight_grad = grad @ v[:, :, None, weighed].mT - delta
            scores = _LOG2E * layout.scale * (queries @ k[:, :, None, weighed].mT)
            weights = torch.where(near, torch.exp2(scores - scale) * inverse, 0)
            score_grad = layout.scale * weights * weight_grad
            weights += torch.where(far, phi @ fk[:, :, None].mT, 0)

            def summed(weights, x):
                return weights.flatten(2, 3).mT @ x.flatten(2, 3)

            dk[:, :, weighed] += summed(score_grad, queries)
            dv[:, :, weighed] += summed(weights, grad)
            da[:, :, weighed] += fk * summed(torch.where(far, weight_grad, 0), phi)
            r = shrink[..., None] * r + summed(phi, grad)
            rho = shrink * rho + summed(phi, delta)[..., 0]
        read_far(~weighed)
        factor = torch.exp2(state_exponent + top)
        d_kv, d_z = factor[..., None] * r, -factor * rho
        d_state = (d_kv * state.kv).sum(-1) + d_z * state.z
    return [
        (k, dk), (v, dv), (exponent, _LN2 * da), (state.kv, d_kv), (state.z, d_z),
        (state_exponent, _LN2 * d_state),
    ]  # fmt: skip


def _block_between(layout, begin, end) -> int:
    """Where a block of the window begins, near the middle of [begin, end); outside: nowhere."""
    window = layout.window
    if not window:
        return end
    first = begin + window - (layout.start + begin) % window
    return first + (end - first - 1) // window // 2 * window


def _near_and_far(layout, position, table, begin, count) -> tuple[Tensor, Tensor]:
    """Which of the state's keys the queries from `begin` on weigh as near and as far ones: bool
    (B, Hkv, 1, count, known)."""
    near = (position < layout.sinks)[:, :, None]
    window, start = layout.window, layout.start
    if window:
        token = torch.arange(start + begin, start + begin + count, device=position.device)
        block, first = token // window, (start + begin) // window
        near = near | (block[:, None] - (position // window)[:, :, None] <= 1)
        if table.numel():
            blocks = torch.arange(first, (start + begin + count - 1) // window + 1)
            sequence = torch.arange(position.shape[0])
            row = hard_key_row(sequence * layout.length, window, sequence)[:, None]
            row = (row + blocks - start // window).to(table.device)
            slots = table[:, row].transpose(0, 1)  # (B, Hkv, blocks, cache_size)
            held = (slots[..., None] == position[:, :, None, None]).any(-2)
            near = near | held[:, :, block - first]
    near, real = near[:, :, None], (position >= 0)[:, :, None, None]
    return near & real, ~near & real


def state_behind(layout, keys, before, behind) -> list[tuple[Tensor, Callable] | None]:
    """The fields CARRIED of the state behind, as far as they have a gradient, each with what picks
    that part out of a gradient of the whole field."""
    acc, known, start = keys.k.dtype, keys.known, layout.start
    first, old = layout.first_near(layout.end), layout.first_near(start)
    window = torch.arange(first, layout.end if layout.window else first, device=keys.k.device)
    slots = window % max(2 * layout.window, 1)
    sinks = torch.arange(min(layout.sinks, layout.end), device=keys.k.device)

    def at(x, positions):
        return x[:, :, torch.where(positions < keys.sinks, positions, positions - start + known)]

    def in_window(grad):
        return grad[:, :, slots]

    def in_sinks(grad):
        return grad[:, :, : len(sinks)]

    made = {
        "window_k": (at(keys.k, window), in_window),
        "window_v": (at(keys.v, window), in_window),
        "window_decay": (keys.times.diff(dim=-1)[..., window - old], in_window),
        "sink_k": (at(keys.k, sinks), in_sinks),
        "sink_v": (at(keys.v, sinks), in_sinks),
    }
    now = keys.times[..., first - old, None]  # when the state behind was folded last
    since = now - keys.decayed
    folded = (keys.position >= layout.sinks) & (keys.position < first)
    if behind.cache_position is not None:
        position = behind.cache_position
        same = position[..., None] == keys.position[:, :, None, keys.sinks : known]
        index = same.int().argmax(-1) + keys.sinks  # an empty slot finds an empty one
        index = torch.where(position < start, index, position - start + known)
        folded = folded.scatter(2, index, False)

        def held(x):
            return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))

        def filled(grad):
            grad = by_head(grad, layout.sizes)
            return grad * (position >= 0).reshape(*position.shape, *[1] * (grad.dim() - 3))

        made |= {
            "cache_k": (held(keys.k), filled),
            "cache_v": (held(keys.v), filled),
            "cache_decay": (held(since[..., None])[..., 0], filled),
        }
    n = keys.exponent.shape[2]
    to_scale = (_LOG2E * since[..., :n, None]).to(acc) - behind.log_scale[:, :, None]
    never = ~folded[..., :n, None]
    phi = torch.exp2((keys.exponent + to_scale).masked_fill(never, -math.inf))
    kept = torch.exp2(before.log_scale + (_LOG2E * now).to(acc) - behind.log_scale)

    def whole(grad):
        return grad

    made |= {
        "kv": (kept[..., None] * before.kv + phi.mT @ keys.v[:, :, :n], whole),
        "z": (kept * before.z + phi.sum(2), whole),
    }
    return [made.get(name) for name in CARRIED]
