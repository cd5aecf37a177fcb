"""Which keys stay exact beyond the window (docs/numerics.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._types import cache_sizes
from .sequences import divide, hard_key_rows, segments_of

# A NOVEL-th of the slots goes to the most novel ones, and votes count CARRIED times when the next
# choice is made.
NOVEL, CARRIED = 2, 0.5


def held_keys(slots, length) -> Tensor:
    """Positions by slot (..., cache_size), -1: none -> whether each is held, (..., length) bool."""
    slots = torch.where(slots < 0, length, slots.long())
    held = torch.zeros(*slots.shape[:-1], length + 1, dtype=torch.bool, device=slots.device)
    return held.scatter_(-1, slots, True)[..., :length]


@torch.no_grad()
def choose_hard_keys(
    q, k, v, *, scale, window, sinks, cache_size, cu_seqlens=None, seq_bounds=None
) -> Tensor:  # fmt: skip
    """int32 (Hkv, rows, max(cache_size)): the positions kept beyond the window, by block and head.

    When block j begins, block j - 2 leaves the window. Of its keys, sinks excluded, and of those in
    the slots, cache_size stay: first cache_size // NOVEL by novelty, |v - mean v|
    exp(-cos(k, mean k)) with the means over all tokens so far, then the rest by votes: the sum over
    the queries of block j - 1 of their softmax weights among exact keys, and for a key in a slot
    half of what it had when the choice before was made.
    """
    *rows, count = hard_key_rows(q, window, cu_seqlens, seq_bounds)
    sizes = cache_sizes(cache_size)
    sizes *= k.shape[1] // len(sizes)
    table = torch.zeros(k.shape[1], count, max(sizes), dtype=torch.int32, device=q.device)
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
                sizes[head],
            )
            for i, kept in enumerate(slots):
                filled = kept + [-1] * (max(sizes) - len(kept))
                table[head, row + i] = torch.tensor(filled, dtype=torch.int32)
    return table


def _hard_keys_of_head(q, k, v, scale, window, sinks, cache_size) -> list[list[int]]:
    """q (G, T, d), k (T, d), v (T, dv) -> positions by block and filled slot."""
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
                novelty = novelty_of(
                    k[candidates], v[candidates], k[: j * window].sum(0), v[: j * window].mean(0)
                )
                keep = {candidates[i] for i in best_of(novelty, votes, cache_size)}
            carried = dict(zip(candidates, (CARRIED * votes).tolist(), strict=True))
            entering = [s for s in fresh if s in keep]
            slots = [s if s in keep else None for s in slots]
            slots = [entering.pop(0) if s is None else s for s in slots] + entering
        table.append(slots)
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


def novelty_of(keys, values, key_sum, value_mean):
    cosine = divide(keys @ key_sum, keys.norm(dim=-1) * key_sum.norm())
    return (values - value_mean).norm(dim=-1) * (-cosine).exp()


def best_of(novelty, votes, cache_size) -> list[int]:
    order = lambda x: torch.sort(x, descending=True, stable=True).indices.tolist()  # noqa: E731
    kept = order(novelty)[: cache_size // NOVEL]
    return kept + [i for i in order(votes) if i not in kept][: cache_size - len(kept)]
