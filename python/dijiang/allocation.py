"""How many hard keys each layer gets, of so many in all: where they take most of the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import kernel_mode
from .config import DiJiangConfig
from .conversion import as_batch, convert, is_converted, only_last_logits, restore
from .divergence import kl_divergence
from .modules import kernels_by_layer

#: Cache sizes a layer may get, as multiples of the mean; none is the first.
MULTIPLES = (0, 0.25, 0.5, 1, 2, 4, 8)

#: Tokens on which each layer's weight in the model's predictions is measured.
WEIGHED = 1024


@torch.no_grad()
def spread_hard_keys(
    model, ids, config: DiJiangConfig, *, progress: Callable[[int, int], None] | None = None
) -> DiJiangConfig:
    """A config of the same memory, whose hard keys are where this model needs them.

    A layer l alone converted, without hard keys, moves the predictions by KL_l; with c of them its
    output's squared error falls from e_l(0) to e_l(c). Slots are given, the best gain a slot first,
    to lessen ``sum_l KL_l e_l(c_l) / e_l(0)`` until the mean of c_l is ``config.cache_size``.

    Args:
        model: a softmax model, as convert takes it; unchanged afterwards.
        ids: token ids (batch, seqlen) or (seqlen,), rows as long as the contexts it will serve:
            4,096 tokens in all are enough. They are read once, 1,024 of them once for each layer.
        config: what to convert to; its ``cache_size`` becomes the mean over the layers.
        progress: called with (forwards done, forwards in all).

    Returns:
        DiJiangConfig: config with a ``cache_size`` for each layer in ``per_layer``.

    Raises:
        ValueError: there are no hard keys to spread, the rows are too short to have keys beyond
            the window, or the model is converted.
        ConversionError: as convert.

    >>> config = dijiang.spread_hard_keys(model, ids, DiJiangConfig(cache_size=64)) # doctest: +SKIP
    >>> dijiang.convert(model, config)                                          # doctest: +SKIP
    """
    if not isinstance(config, DiJiangConfig):
        raise TypeError(
            f"spread_hard_keys: config must be a DiJiangConfig, got {type(config).__name__}"
        )
    if not config.cache_size:
        raise ValueError(
            "spread_hard_keys: config.cache_size is 0: there are no hard keys to spread. Give the "
            "mean over the layers, as in DiJiangConfig(cache_size=64)"
        )
    if is_converted(model):
        raise ValueError(
            "spread_hard_keys: the model is converted. Spread before convert, or restore it first"
        )
    ids = as_batch(ids, "spread_hard_keys").to(model.device)
    training = model.training
    # Far keys would start closed: they have no say in where hard keys are needed.
    windows = {
        layer: {name: own[name] for name in ("window", "sinks") if name in own}
        for layer, own in config.per_layer.items()
    }
    exact = dict(
        feature_map=None, window=config.window, sinks=config.sinks, cache_size=0,
        layers=config.layers, per_layer=windows,
    )  # fmt: skip
    convert(model.eval(), DiJiangConfig(**exact))
    try:
        return _spread(model, ids, config, progress)
    finally:
        restore(model).train(training)


def _spread(model, ids, config, progress) -> DiJiangConfig:
    kernels = {i: kernel for i, kernel in kernels_by_layer(model).items() if kernel.config.window}
    near = max(kernel.config.near_span for kernel in kernels.values())
    if ids.shape[1] <= near:
        raise ValueError(
            f"spread_hard_keys: rows of {ids.shape[1]} tokens have no keys beyond the window of up "
            f"to {near} tokens. Give rows of at least {4 * near}"
        )
    mean = config.cache_size
    sizes = sorted({int(mean * multiple) for multiple in MULTIPLES})
    few = ids[:1, : max(WEIGHED, 2 * near)]
    steps, done = ids.shape[0] + len(kernels) + 4, 0

    def advance():
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    def logits():
        advance()
        return model(input_ids=few, use_cache=False).logits

    def kl():
        return float(kl_divergence(logits(), wanted, wanted.new_ones(few.shape)))

    errors = _errors_by_size(model, kernels.values(), ids, sizes, advance)
    alone = _errors_by_size(model, kernels.values(), few, (0,), advance)
    weights = []
    with kernel_mode(model, "softmax"):
        wanted = logits()
        for kernel, (error,) in zip(kernels.values(), alone, strict=True):
            kernel.mode = "student"
            part = max(kl(), 0.0)
            weights.append(part / error if error > 0 else 0.0)
            kernel.mode = "softmax"
    losses = [[weight * e for e in row] for weight, row in zip(weights, errors, strict=True)]

    def kl_with(chosen):
        for kernel, size in zip(kernels.values(), chosen, strict=True):
            kernel.config = kernel.config.replace(cache_size=size)
        return kl()

    # Errors of many layers may add up otherwise than they do alone.
    chosen = min(best_sizes(sizes, losses, mean), [mean] * len(kernels), key=kl_with)
    per_layer = {layer: dict(own) for layer, own in config.per_layer.items()}
    for layer, size in zip(kernels, chosen, strict=True):
        per_layer.setdefault(layer, {})["cache_size"] = size
    return config.replace(per_layer=per_layer)


def _errors_by_size(model, kernels, ids: Tensor, sizes, advance) -> list[list[float]]:
    """Of each layer's output with each cache size, relative, the layers before it exact."""
    sums = 0
    with kernel_mode(model, "compare"):
        for kernel in kernels:
            kernel.compared = tuple(sizes)
        for row in ids.split(1):
            model(input_ids=row, use_cache=False, **only_last_logits(model))
            sums = sums + torch.stack([kernel.loss.double().sum(1) for kernel in kernels])
            advance()
    return (sums[:, :-1] / sums[:, -1:]).tolist()


def best_sizes(sizes: Sequence[int], losses: Sequence[Sequence[float]], mean: float) -> list[int]:
    """A size a layer with a small sum of ``losses[layer][size's index]``, at most ``mean`` apiece.

    Greedy: of all larger sizes of all layers that still fit, the one that gains most a slot is
    next, until none gains. ``sizes`` ascend from 0.

    >>> best_sizes([0, 4, 8], [[9, 1, 0.5], [2, 1, 1]], 4)
    [4, 4]
    >>> best_sizes([0, 4, 8], [[9, 5, 0], [2, 1, 1]], 4)
    [8, 0]
    """
    at = [0] * len(losses)
    free = mean * len(losses)
    while True:
        steps = [
            ((loss[i] - loss[j]) / (sizes[j] - sizes[i]), layer, j)
            for layer, (loss, i) in enumerate(zip(losses, at, strict=True))
            for j in range(i + 1, len(sizes))
            if sizes[j] - sizes[i] <= free and loss[j] < loss[i]
        ]
        if not steps:
            return [sizes[i] for i in at]
        _, layer, j = max(steps, key=lambda step: step[0])
        free -= sizes[j] - sizes[at[layer]]
        at[layer] = j
