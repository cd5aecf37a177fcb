"""Sequences in a batch: their bounds, and a formula run on each."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .._types import FeatureParams, hard_key_row


def segments_of(q: Tensor, cu_seqlens=None, seq_bounds=None) -> list[tuple[int, int, int]]:
    """(batch row, begin, end) of each sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, begin, end) for begin, end in itertools.pairwise(ends)]
    if seq_bounds is not None:
        return [(row, begin, end) for row, (begin, end) in enumerate(seq_bounds.tolist())]
    return [(row, 0, q.shape[2]) for row in range(q.shape[0])]


def hard_key_rows(q, window, cu_seqlens=None, seq_bounds=None) -> list[int]:
    """The first row of each sequence in a table of hard keys, and the number of rows."""
    segments = segments_of(q, cu_seqlens, seq_bounds)
    firsts = [b * q.shape[2] + begin for b, begin, _ in segments] + [q.shape[0] * q.shape[2]]
    return [hard_key_row(first, window, n) for n, first in enumerate(firsts)]


def for_each_sequence(one_sequence, q, k, v, log_decay, cu_seqlens, seq_bounds, rows=None):
    """Runs one_sequence on (H, T, .) slices, kv heads repeated; padding stays 0.

    rows: one more argument for each sequence.
    """
    groups = q.shape[1] // k.shape[1]
    log_decay = decay_per_token(log_decay, k)
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[:3])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for n, (row, begin, end) in enumerate(segments_of(q, cu_seqlens, seq_bounds)):
        k_, v_, decay_ = (
            x[row, :, begin:end].repeat_interleave(groups, 0) for x in (k, v, log_decay)
        )
        more = () if rows is None else (rows[n],)
        one = one_sequence(q[row, :, begin:end], k_, v_, decay_.to(q.dtype), *more)
        out = put(out, row, begin, end, one)
    return out


def put(out, row, begin, end, values):
    out = out.clone()
    out[row, :, begin:end] = values
    return out


def divide(num, den):
    """num / den, and 0 where nothing has any weight."""
    return torch.where(den == 0, 0.0, num / torch.where(den == 0, 1.0, den))


def repeat_params(params, groups):
    omega, log_weight, beta = (
        None if x is None else x.repeat_interleave(groups, 0) for x in params[:3]
    )
    return FeatureParams(omega, log_weight, beta, params.kind)


def decay_per_token(log_decay, k):
    """(Hkv,) or (B, Hkv, T) -> (B, Hkv, T)."""
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay[None, :, None].expand(k.shape[:3])
    return log_decay
