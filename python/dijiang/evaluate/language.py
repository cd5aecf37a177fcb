"""How well a model predicts text: perplexity, and perplexity by position in the window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ._models import Progress, check_blocks, device_of, mean_and_error, token_losses


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token given those before it in its window."""

    length: int  # tokens of a window
    tokens: int  # tokens predicted: windows * (length - 1)
    loss: float  # nats a token
    perplexity: float
    standard_error: float  # of `loss`, over windows; nan for a single one


@dataclass(frozen=True)
class PositionBin:
    """Tokens that have at least `begin` and less than `end` tokens before them."""

    begin: int
    end: int
    tokens: int
    loss: float  # nats a token
    perplexity: float
    standard_error: float  # of `loss`, over windows; nan for a single one


@dataclass(frozen=True)
class PositionalPerplexity:
    """Perplexity by how many tokens a prediction sees."""

    length: int  # tokens of a window
    windows: int
    bins: list[PositionBin]


@torch.inference_mode()
def perplexity(
    model: nn.Module, blocks: torch.Tensor, *, progress: Progress | None = None
) -> Perplexity:
    """Perplexity over windows of held-out text: int64 `blocks` (windows, length), one at a time.

    Example: `perplexity(model, dijiang.data.pack(corpus.held_out, tokenizer, 2048))`.
    """
    check_blocks("perplexity", blocks)
    model.eval()
    losses = []
    for index, block in enumerate(blocks.to(device_of(model))):
        losses.append(token_losses(model, block).double().mean().item())
        if progress:
            progress(index + 1, len(blocks))
    return of_windows(losses, blocks.shape[1])


def of_windows(losses: Sequence[float], length: int) -> Perplexity:
    """Perplexity of windows of `length` tokens, each with its mean loss."""
    loss, error = mean_and_error(losses)
    return Perplexity(length, len(losses) * (length - 1), loss, math.exp(loss), error)


@torch.inference_mode()
def perplexity_by_position(
    model: nn.Module,
    blocks: torch.Tensor,
    edges: Sequence[int] | None = None,
    *,
    progress: Progress | None = None,
) -> PositionalPerplexity:
    """Perplexity by the number of tokens before the predicted one: does the far past help?

    Formula: a bin [begin, end) has the mean of -log p(x_t | x_0 .. x_(t-1)) over begin <= t < end
    and all windows. A model that uses its past falls with t; one that has lost what its window
    dropped stays level. Bins hold different tokens: compare models bin by bin, not bins with each
    other, unless the windows are many.

    Args:
        blocks: int64 (windows, length).
        edges: of the bins, growing, from 1 to length at most. None: 1, 2, 4, 8 .. length.

    Raises ValueError when blocks or edges do not fit.

    Example: `perplexity_by_position(model, data.pack(corpus.held_out, tokenizer, 8192)).bins[-1]`.
    """
    check_blocks("perplexity_by_position", blocks)
    length = blocks.shape[1]
    if edges is None:
        edges = [2**i for i in range(length.bit_length()) if 2**i < length] + [length]
    edges = list(edges)
    growing = all(a < b for a, b in itertools.pairwise(edges))
    if len(edges) < 2 or not growing or edges[0] < 1 or edges[-1] > length:
        raise ValueError(
            f"perplexity_by_position: edges must grow from at least 1 to at most the windows' "
            f"length {length}, got {edges}"
        )
    model.eval()
    means: list[list[float]] = []  # a row a window, a column a bin
    for index, block in enumerate(blocks.to(device_of(model))):
        losses = token_losses(model, block).double()  # losses[t - 1] is that of token t
        bins = itertools.pairwise(edges)
        means.append([losses[a - 1 : b - 1].mean().item() for a, b in bins])
        if progress:
            progress(index + 1, len(blocks))
    rows = []
    for column, (begin, end) in enumerate(itertools.pairwise(edges)):
        loss, error = mean_and_error([row[column] for row in means])
        tokens = len(blocks) * (end - begin)
        rows.append(PositionBin(begin, end, tokens, loss, math.exp(loss), error))
    return PositionalPerplexity(length, len(blocks), rows)


def gap_closed(
    teacher: Perplexity | float, baseline: Perplexity | float, student: Perplexity | float
) -> float:
    """Share of the perplexity between a training-free model and the teacher that is won back.

    Formula: (baseline - student) / (baseline - teacher): 0 for a student as good as the baseline,
    1 for one as good as the teacher; below 0 and above 1 are possible.

    Raises ValueError when there is no gap, or when the three were measured on windows of different
    lengths or numbers.

    >>> gap_closed(teacher=10.0, baseline=15.0, student=12.0)
    0.6
    """
    measured = [x for x in (teacher, baseline, student) if isinstance(x, Perplexity)]
    if len({(x.length, x.tokens) for x in measured}) > 1:
        raise ValueError(
            "gap_closed: measure all three on the same windows, got (length, tokens) "
            f"{', '.join(str((x.length, x.tokens)) for x in measured)}"
        )
    best, worst, now = (
        x.perplexity if isinstance(x, Perplexity) else float(x)
        for x in (teacher, baseline, student)
    )
    if not worst > best:
        raise ValueError(
            f"gap_closed: the baseline must be worse than the teacher for a gap to close, got "
            f"perplexities {worst:g} and {best:g}"
        )
    return (worst - now) / (worst - best)
