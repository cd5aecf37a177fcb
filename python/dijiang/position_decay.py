"""The published code's decay: a learned weight of each position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionDecay(nn.Module):
    """The published code's decay: a weight of each position, ``w_ts`` times ``query_t key_s``.

    ``key`` may grow and ``query`` shrink beyond what sums in float32 can hold together, so their
    product is given as ``weight_t weight_v_s exp(sum_{r=s+1..t} log_decay_r)`` relative to the
    largest ``|key|`` up to each position. Beyond the last position, its weights and decay go on.

    Shapes: ``query`` (heads, num_positions), ``key`` (kv_heads, num_positions).
    """

    def __init__(self, heads: int, forget: Tensor, num_positions: int):
        super().__init__()
        log_keep = -torch.log1p(-forget)[:, None] * torch.arange(num_positions)
        log_keep = log_keep.clamp(max=80)  # float32 has no room for more
        groups = heads // len(forget)
        self.query = nn.Parameter(torch.exp(-log_keep).repeat_interleave(groups, 0))
        self.key = nn.Parameter(torch.exp(log_keep))

    def tables(self, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """weight (heads, num_positions), weight_v and log_decay (kv_heads, num_positions)."""
        query, key = self.query.to(dtype), self.key.to(dtype)
        # It cancels out of the product, so it needs no gradient.
        largest = key.detach().abs().cummax(1).values.clamp_min(torch.finfo(dtype).tiny)
        log_decay = F.pad(-largest.double().log().diff(dim=1), (1, 0)).to(dtype)
        groups = query.shape[0] // key.shape[0]
        return query * largest.repeat_interleave(groups, 0), key / largest, log_decay

    @staticmethod
    def take(tables, positions: Tensor) -> tuple[Tensor, ...]:
        """Each table at positions (batch, seqlen): (batch, heads or kv_heads, seqlen)."""
        at = positions.clamp(max=tables[0].shape[1] - 1)
        return tuple(table[:, at].transpose(0, 1) for table in tables)


def positions_of(q: Tensor, state, cu_seqlens, seq_bounds) -> Tensor:
    """(batch, seqlen): of each token in its own sequence; anything for padding."""
    at = torch.arange(q.shape[2], device=q.device)
    if cu_seqlens is not None:
        own = torch.searchsorted(cu_seqlens, at, right=True) - 1
        at = at - cu_seqlens[own]
        return (at if state is None else at + state.length[own])[None]
    at = at[None] if seq_bounds is None else (at - seq_bounds[:, :1]).clamp(min=0)
    at = at if state is None else at + state.length[:, None]
    return at.expand(len(q), -1)
