"""The tuples that the operators take and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY_LOG_SCALE = -1e30  # of a feature that has seen no key: finite, and exp2 of it is 0


class FeatureParams(NamedTuple):
    """The learned part of a feature map, one row a head (docs/numerics.md, "Exponentials").

    ``u = omega x`` with ``x = sqrt(scale) q`` or ``sqrt(scale) k``, then by ``kind``

    - ``"exp"``: log phi_i = u_i + log_weight_i - beta \\|x\\|^2
    - ``"softmax"``: log phi_i = u_i - logsumexp_j(u_j) + log_weight_i
    - ``"elu"``: log phi_i = log(1 + elu(u_i)) + log_weight_i

    A matrix omega made of rows of the DCT can be given by its frequencies t alone, (heads,
    num_features): u_i = t_i (C x)_{i mod headdim}. The CPU then transforms in O(d log d). Given to
    an attention, omega can have fewer rows than there are heads, a divisor of them: neighbouring
    heads share one, as the query heads of a kv head do, and the CPU reads it once.
    """

    omega: Tensor  # (heads, num_features, headdim), or (heads, num_features): rows t_i C_i
    log_weight: Tensor | None = None  # (heads, num_features)
    beta: Tensor | None = None  # (heads,), "exp" alone
    kind: str = "exp"


class LinearAttentionState(NamedTuple):
    """Constant-size memory: S = kv 2^log_scale, z = z 2^log_scale. float32, or float64."""

    kv: Tensor  # (num_seqs, kv_heads, num_features, headdim_v)
    z: Tensor  # (num_seqs, kv_heads, num_features)
    log_scale: Tensor  # (num_seqs, kv_heads, num_features), whole numbers or EMPTY_LOG_SCALE


class AttentionState(NamedTuple):
    """LinearAttentionState of the far keys, and the exact keys themselves.

    Position p of a sequence lies in slot ``p % (2 window)`` of the window buffers.
    """

    kv: Tensor  # (num_seqs, kv_heads, num_features, headdim_v)
    z: Tensor  # (num_seqs, kv_heads, num_features)
    log_scale: Tensor  # (num_seqs, kv_heads, num_features)
    window_k: Tensor  # (num_seqs, kv_heads, 2 window, headdim)
    window_v: Tensor  # (num_seqs, kv_heads, 2 window, headdim_v)
    window_decay: Tensor | None  # (num_seqs, kv_heads, 2 window) log_decay; None: no decay
    sink_k: Tensor  # (num_seqs, kv_heads, sinks, headdim)
    sink_v: Tensor  # (num_seqs, kv_heads, sinks, headdim_v)
    length: Tensor  # (num_seqs,) int64: tokens seen so far
    # With a cache of hard keys, else None. A head's slots fill up from the first on. Where
    # cache_size differs from head to head, (kv_heads, cache_size) is one dimension of all slots,
    # head behind head, and (kv_heads, cache_size + window) one of all votes.
    cache_k: Tensor | None = None  # (num_seqs, kv_heads, cache_size, headdim)
    cache_v: Tensor | None = None  # (num_seqs, kv_heads, cache_size, headdim_v)
    cache_position: Tensor | None = None  # (num_seqs, kv_heads, cache_size) int64; -1: empty
    cache_decay: Tensor | None = None  # (num_seqs, kv_heads, cache_size) log_decay since the key
    cache_votes: Tensor | None = None  # (num_seqs, kv_heads, cache_size + window)
    cache_sums: Tensor | None = None  # (num_seqs, kv_heads, headdim + headdim_v): of k and of v


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, feature parameters and accumulation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cache_sizes(cache_size: int | Sequence[int]) -> tuple[int, ...]:
    """Of each kv head; a single number is that of all of them.

    >>> cache_sizes(64), cache_sizes([8, 8]), cache_sizes([8, 0])
    ((64,), (8,), (8, 0))
    """
    sizes = (cache_size,) if isinstance(cache_size, int) else tuple(cache_size)
    return sizes[:1] if len(set(sizes)) == 1 else sizes


def slots_shape(sizes: tuple[int, ...], kv_heads: int) -> tuple[int, ...]:
    """Of what a state has a slot: (kv_heads, cache_size), or (all slots,) where heads differ."""
    return (kv_heads, *sizes) if len(sizes) == 1 else (sum(sizes),)


def votes_shape(sizes: tuple[int, ...], kv_heads: int, window: int) -> tuple[int, ...]:
    if len(sizes) == 1:
        return kv_heads, sizes[0] + window
    return (sum(sizes) + kv_heads * window,)


def hard_key_row(first_token, window: int, sequences):
    """A sequence's first row in a table of hard keys; of all tokens and sequences, their number.

    first_token: of those of the whole batch; sequences: how many come before.
    """
    return first_token // window + 2 * sequences


def empty_attention_state(
    batch: int,
    kv_heads: int,
    num_features: int,
    headdim: int,
    headdim_v: int,
    *,
    window: int,
    sinks: int,
    dtype: torch.dtype,
    device,
    decay: bool = False,
    cache_size: int | Sequence[int] = 0,
) -> AttentionState:
    """The AttentionState of `batch` sequences before their first token.

    `dtype` is that of q, k and v; `decay` says whether log_decay will be given. With no far term
    num_features is 0.

        >>> state = empty_attention_state(1, 2, 64, 32, 32, window=16, sinks=4,
        ...                               dtype=torch.float32, device="cpu")
        >>> state.kv.shape
        torch.Size([1, 2, 64, 32])
    """
    acc = acc_dtype(dtype)

    def zeros(*shape, dtype=dtype):
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    z = zeros(kv_heads, num_features, dtype=acc)
    cache = {}
    sizes = cache_sizes(cache_size)
    if max(sizes):
        slots = slots_shape(sizes, kv_heads)
        cache = dict(
            cache_k=zeros(*slots, headdim),
            cache_v=zeros(*slots, headdim_v),
            cache_position=zeros(*slots, dtype=torch.int64) - 1,
            cache_decay=zeros(*slots, dtype=acc) if decay else None,
            cache_votes=zeros(*votes_shape(sizes, kv_heads, window), dtype=acc),
            cache_sums=zeros(kv_heads, headdim + headdim_v, dtype=acc),
        )
    return AttentionState(
        kv=zeros(kv_heads, num_features, headdim_v, dtype=acc),
        z=z,
        log_scale=torch.full_like(z, EMPTY_LOG_SCALE),
        window_k=zeros(kv_heads, 2 * window, headdim),
        window_v=zeros(kv_heads, 2 * window, headdim_v),
        window_decay=zeros(kv_heads, 2 * window, dtype=acc) if decay else None,
        sink_k=zeros(kv_heads, sinks, headdim),
        sink_v=zeros(kv_heads, sinks, headdim_v),
        length=zeros(dtype=torch.int64),
        **cache,
    )
