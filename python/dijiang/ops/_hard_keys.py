"""Checks of a table of hard keys that is given (docs/numerics.md, "Hard keys")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._types import AttentionState, hard_key_row
from ._checks import check_like


def check_hard_keys(
    op: str, table: Tensor, q: Tensor, k: Tensor, segments: Tensor | None, initial_state,
    window: int, sinks: int, sizes: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """The table, contiguous. Of its values the CPU's kernel says what is wrong; elsewhere they are
    asserted on the device, without waiting for it."""
    if not max(sizes):
        raise ValueError(f"{op}: hard_keys belong to cache_size > 0, got cache_size 0")
    sequences = q.shape[0] if segments is None else segments.shape[0]
    rows = hard_key_row(q.shape[0] * q.shape[2], window, sequences)
    check_like(op, "hard_keys", table, (k.shape[1], rows, max(sizes)),
               "(kv heads, rows, cache_size)", q, torch.int32)  # fmt: skip
    if table.is_cuda and not torch.compiler.is_compiling():
        torch._assert_async(
            table_is_possible(table, q, segments, initial_state, window, sinks, sizes),
            f"{op}: hard_keys must hold in each slot the key of the block before, or one of the "
            "block that leaves the window, once, with no empty slot before it",
        )
    return table.contiguous()


def by_head(x: Tensor, sizes: tuple[int, ...], empty: float = 0) -> Tensor:
    """What a state has a slot: all slots in a row -> (num_seqs, kv heads, most slots, ..)."""
    if len(sizes) == 1:
        return x
    beyond = (0, 0) * (x.dim() - 2)
    parts = [F.pad(part, (*beyond, 0, max(sizes) - part.shape[1]), value=empty)
             for part in x.split(sizes, 1)]  # fmt: skip
    return torch.stack(parts, 1)


def slots_by_head(state: AttentionState, sizes: tuple[int, ...]) -> AttentionState:
    """With empty slots, so that all heads have as many."""
    if len(sizes) == 1:
        return state
    return state._replace(
        cache_k=by_head(state.cache_k, sizes),
        cache_v=by_head(state.cache_v, sizes),
        cache_position=by_head(state.cache_position, sizes, -1),
        cache_decay=None if state.cache_decay is None else by_head(state.cache_decay, sizes),
    )


def table_is_possible(table, q, segments, initial_state, window, sinks, sizes) -> Tensor:
    """Whether some choice of hard keys makes this table: a bool tensor of no dimensions."""
    batch, _, seqlen, _ = q.shape
    if segments is None:
        row = torch.arange(batch, device=q.device)
        segments = torch.stack([row, torch.zeros_like(row), torch.full_like(row, seqlen)], 1)
    number = torch.arange(len(segments), device=q.device)
    if not len(segments):
        return torch.ones((), dtype=torch.bool, device=q.device)
    segments = segments.long()
    starts = hard_key_row(segments[:, 0] * seqlen + segments[:, 1], window, number)
    length = segments[:, 2] - segments[:, 1]
    seen = torch.zeros_like(length) if initial_state is None else initial_state.length
    held = torch.full((len(segments), table.shape[0], table.shape[2]), -1, device=q.device)
    if initial_state is not None:
        held = by_head(initial_state.cache_position, sizes, -1)
    slots = torch.tensor(sizes, device=q.device)[:, None, None]  # that a head has
    beyond = torch.arange(table.shape[2], device=q.device) >= slots

    # A row of the table is a block of a sequence, or of none.
    row = torch.arange(table.shape[1], device=q.device)
    n = torch.searchsorted(starts, row, right=True) - 1
    block = seen[n] // window + row - starts[n]
    used = (block * window < seen[n] + length[n]) & (length[n] > 0)
    keys = table.long()
    before = torch.cat([keys[:, :1], keys[:, :-1]], 1)
    before = torch.where((row == starts[n])[:, None], held[n].transpose(0, 1), before)
    turns = (block >= 2) & (block * window >= seen[n])
    leaving = ((block - 2) * window)[:, None]
    enters = turns[:, None] & (keys >= leaving.clamp(min=sinks)) & (keys < leaving + window)
    gap = F.pad(keys[..., :-1] < 0, (1, 0)) & (keys >= 0)
    ordered = keys.sort(-1).values
    twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
    enters = enters & ~beyond
    fits = ((keys == before) | enters).all(-1) & ~gap.any(-1) & ~twice.any(-1)
    return (fits | ~used).all()
