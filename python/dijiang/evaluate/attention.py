"""What conversion does to each layer's attention: its output's error, and its map of weights.

Both look at a layer with the inputs it has in the softmax model, so that no layer answers for the
ones before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import reference
from ._models import Progress, check_blocks, device_of, mean_and_error

#: Tokens of the longest map: the reference formulas keep a weight for each pair.
MAP_TOKENS = 256


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of one layer's attention output, before its output projection."""

    layer: int
    error: float
    standard_error: float  # over windows; nan for a single one
    heads: list[float]  # each head's own


@dataclass(frozen=True)
class AttentionMap:
    """Weights (query, key) of one head, rows summing to 1: softmax's and the kernelised ones."""

    layer: int
    head: int
    teacher: Tensor
    student: Tensor


@torch.no_grad()
def attention_errors(
    model: nn.Module, blocks: Tensor, *, progress: Progress | None = None
) -> list[LayerError]:
    """Error of each converted layer's attention output against softmax, with the same inputs.

    Formula: |kernelised - softmax|^2 / |softmax|^2, both sums over the tokens of all windows, and
    over the channels of all heads or of each. What attention transfer lowers, without its mean over
    layers: 0 is softmax attention, 1 as wrong as no attention at all.

    Shapes: blocks int64 (windows, length).

    Raises ValueError when the model is not converted, or blocks do not fit.

    Example: `max(attention_errors(model, blocks), key=lambda row: row.error).layer`.
    """
    check_blocks("attention_errors", blocks)
    kernels = _kernels(model, "attention_errors")
    from ..attention import kernel_mode  # here: it needs transformers
    from ..conversion import only_last_logits

    model.eval()
    windows: list[list[Tensor]] = []  # a row a window, a (2, heads) a layer
    with kernel_mode(model, "compare"):
        for index, block in enumerate(blocks.to(device_of(model))):
            model(input_ids=block[None], use_cache=False, **only_last_logits(model))
            windows.append([kernel.loss.double().cpu() for kernel in kernels.values()])
            if progress:
                progress(index + 1, len(blocks))
    rows = []
    for layer, sums in zip(kernels, zip(*windows, strict=True), strict=True):
        error, size = torch.stack(sums).sum(0)  # (heads,)
        _, deviation = mean_and_error([float(e.sum() / s.sum()) for e, s in sums])
        rows.append(
            LayerError(layer, float(error.sum() / size.sum()), deviation, (error / size).tolist())
        )
    return rows


@torch.no_grad()
def attention_maps(
    model: nn.Module, ids: Tensor, heads: Iterable[tuple[int, int]]
) -> list[AttentionMap]:
    """Maps of attention weights, softmax beside kernelised, of the same queries and keys.

    Formula: w_ts / sum_s w_ts with w_ts = exp(q_t.k_s scale) for softmax, and for the student as
    dijiang.reference.kernelized_attention has it: the same for near keys, phi(q_t).phi(k_s) for far
    ones, with the model's own features and gates.

    Args:
        model: a converted model.
        ids: int64 (n,), at most 256 tokens: a map has a weight for each pair.
        heads: (layer, head) pairs.

    Raises ValueError when the model is not converted, or ids or a pair do not fit.

    Example: `attention_maps(model, blocks[0, :256], [(0, 0), (15, 3)])`.
    """
    if ids.ndim != 1 or not 2 <= ids.numel() <= MAP_TOKENS:
        raise ValueError(
            f"attention_maps: ids must be (n,) with 2 to {MAP_TOKENS} tokens, got "
            f"{tuple(ids.shape)}"
        )
    kernels = _kernels(model, "attention_maps")
    heads = list(heads)
    for layer, head in heads:
        if layer not in kernels or not 0 <= head < kernels[layer].heads:
            count = next(iter(kernels.values())).heads
            raise ValueError(
                f"attention_maps: a head is (layer, head) of a converted layer "
                f"({', '.join(map(str, kernels))}) and one of its {count} heads, got "
                f"({layer}, {head})"
            )
    from ..attention import kernel_mode
    from ..conversion import only_last_logits

    seen = {}

    def keep(layer):
        def hook(kernel, args, kwargs):
            seen[layer] = (*args, kwargs.get("hidden"))

        return hook

    model.eval()
    wanted = sorted({layer for layer, _ in heads})
    hooks = [
        kernels[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in wanted
    ]
    try:
        with kernel_mode(model, "compare"):
            ids = ids.to(device_of(model))
            model(input_ids=ids[None], use_cache=False, **only_last_logits(model))
    finally:
        for hook in hooks:
            hook.remove()
    maps = {layer: _weights(kernels[layer], *seen[layer]) for layer in wanted}
    return [
        AttentionMap(layer, head, *(weights[head].cpu() for weights in maps[layer]))
        for layer, head in heads
    ]


def _weights(kernel, q, k, v, hidden) -> tuple[Tensor, Tensor]:
    """(teacher, student), each (heads, n, n): what an attention makes of the identity as values."""
    q, k = q.float(), k.float()
    n = q.shape[2]
    one_hot = torch.eye(n, device=q.device).expand(1, k.shape[1], n, n)
    fq, fk = kernel.feature_params()
    by_position = kernel.decay_position
    if by_position is None:
        log_decay = kernel.log_decay(hidden)
    else:
        positions = torch.arange(n, device=q.device)[None]
        _, weight, log_decay = by_position.take(by_position.tables(), positions)
        one_hot = one_hot * weight[..., None]
    student = reference.kernelized_attention(
        q, k, one_hot, fq, fk, scale=kernel.scale, window=kernel.config.window,
        sinks=kernel.config.sinks, cache_size=kernel.config.cache_size,
        hard_keys=kernel.hard_keys(q, k, v.float()), log_decay=log_decay,
    )[0]  # fmt: skip
    if by_position is not None:  # its weights are not in the denominator
        student = student / student.sum(-1, keepdim=True)
    scores = kernel.scale * (q @ k.repeat_interleave(kernel.groups, 1).mT)[0]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1), student


def _kernels(model: nn.Module, what: str) -> dict:
    """{layer: AttentionKernel} of a converted model."""
    from ..modules import kernels_by_layer

    kernels = kernels_by_layer(model)
    if not kernels:
        raise ValueError(
            f"{what}: this {type(model).__name__} is not converted. Call dijiang.convert(model) "
            "first"
        )
    return kernels
