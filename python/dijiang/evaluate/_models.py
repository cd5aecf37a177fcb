"""What the measurements share: windows, logits a slice at a time, means with their errors."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Progress = Callable[[int, int], None]

#: Tokens whose logits are held in float32 at a time.
SLICE = 256


def check_blocks(what: str, blocks: Tensor) -> None:
    """Raises ValueError unless blocks are windows of token ids, (windows, length >= 2)."""
    if blocks.ndim != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(
            f"{what}: blocks must be (windows, length >= 2), got {tuple(blocks.shape)}"
        )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; nan for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def sliced_logits(model: nn.Module, ids: Tensor) -> Callable[[int, int], Tensor]:
    """One forward over ids (n,); returns logits(begin, end), (end - begin, vocabulary).

    Over long windows all logits together are the largest tensor by far (8192 tokens of a vocabulary
    of 49,152: 1.6 GB), so the hidden states are kept instead and the head is applied to a slice of
    them at a time. Where the model does more to its logits than its head (scales or caps them), or
    its head cannot be found, it makes them all at once.
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    head = embeddings() if callable(embeddings) else None
    seen: list[Tensor] = []

    def keep_all_pass_last(module, args):
        seen.append(args[0])
        return (args[0][:, -1:], *args[1:])

    hook = None if head is None else head.register_forward_pre_hook(keep_all_pass_last)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.shape[1] == ids.numel() and not seen:
        return lambda begin, end: logits[0, begin:end]
    if len(seen) == 1 and seen[0].shape[:2] == (1, ids.numel()):
        hidden = seen[0]
        # The same product as a moment ago: any difference is the model's own doing.
        if torch.equal(head(hidden[:, -1:]).to(logits.dtype), logits):
            return lambda begin, end: head(hidden[:, begin:end])[0]
    logits = model(input_ids=ids[None], use_cache=False).logits
    return lambda begin, end: logits[0, begin:end]


def slices(count: int) -> list[tuple[int, int]]:
    """[begin, end) of slices of at most SLICE tokens."""
    return [(begin, min(begin + SLICE, count)) for begin in range(0, count, SLICE)]


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p(ids[t] | ids[:t]) for t = 1 .. n - 1: ids (n,) -> float32 (n - 1,)."""
    logits = sliced_logits(model, ids)
    parts = [
        F.cross_entropy(logits(begin, end).float(), ids[begin + 1 : end + 1], reduction="none")
        for begin, end in slices(ids.numel() - 1)
    ]
    return torch.cat(parts)


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Cross entropy of logits (n, vocabulary) summed over targets (n,), in float32.

    In slices: a float32 copy of all logits would be the largest tensor.
    """
    total = 0.0
    for piece, target in zip(logits.split(SLICE), targets.split(SLICE), strict=True):
        total += F.cross_entropy(piece.float(), target, reduction="sum").item()
    return total


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can be asked for the last logits alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_logits(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Logits (count, vocabulary) of the last `count` tokens of ids (n,)."""
    options = {"logits_to_keep": count} if keeps_logits(model) else {}
    return model(input_ids=ids[None], use_cache=False, **options).logits[0, -count:]


def token_ids(tokenizer, text: str) -> Tensor:
    """Text as int64 (n,), without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
