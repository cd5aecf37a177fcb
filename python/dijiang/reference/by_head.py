"""Key/value heads one by one, for states whose heads have different numbers of hard keys."""

from __future__ import annotations

import torch

from .._types import AttentionState, FeatureParams

_SLOTS = ("cache_k", "cache_v", "cache_position", "cache_decay")


def run_by_head(attend, q, k, v, fq, fk, sizes, window, log_decay, state, hard_keys):
    """attend(q, k, v, fq, fk, size, log_decay, state, hard_keys) of each kv head, side by side.

    It returns (out, state, hard_keys); log_decay is (B, Hkv, T), as hard_keys perhaps None.
    """
    groups = q.shape[1] // k.shape[1]
    outs, states, tables = [], [], []
    for head, size in enumerate(sizes):
        own, queries = slice(head, head + 1), slice(head * groups, (head + 1) * groups)
        given = None if hard_keys is None else hard_keys[own, :, :size]
        out, after, table = attend(
            q[:, queries], k[:, own], v[:, own], _rows(fq, queries), _rows(fk, own), size,
            None if log_decay is None else log_decay[:, own], _of_head(state, head, sizes, window),
            given,
        )  # fmt: skip
        outs.append(out)
        states.append(after)
        tables.append(table)
    return torch.cat(outs, 1), _joined(states), torch.cat(tables)


def _rows(params, rows):
    if params is None:
        return None
    return FeatureParams(*(None if x is None else x[rows] for x in params[:3]), params.kind)


def _of_head(state, head, sizes, window) -> AttentionState:
    slots = slice(sum(sizes[:head]), sum(sizes[: head + 1]))
    votes = slice(slots.start + head * window, slots.stop + (head + 1) * window)

    def part(name, x):
        if x is None or name == "length":
            return x
        if name in _SLOTS:
            return x[:, None, slots]
        return x[:, None, votes] if name == "cache_votes" else x[:, head : head + 1]

    return AttentionState(*(part(name, x) for name, x in state._asdict().items()))


def _joined(states) -> AttentionState:
    def whole(name, parts):
        if parts[0] is None or name == "length":
            return parts[0]
        if name in (*_SLOTS, "cache_votes"):
            return torch.cat([x[:, 0] for x in parts], 1)
        return torch.cat(parts, 1)

    fields = zip(AttentionState._fields, zip(*states, strict=True), strict=True)
    return AttentionState(*(whole(name, parts) for name, parts in fields))
