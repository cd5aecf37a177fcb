"""How many hard keys each head gets, of so many in all: where they take most of the error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import kernel_mode
from .config import DiJiangConfig
from .conversion import as_batch, convert, is_converted, only_last_logits, restore
from .divergence import kl_divergence
from .modules import kernels_by_layer

#: Cache sizes a head may get, as multiples of the mean; none is the first.
MULTIPLES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)

#: Tokens on which each layer's weight in the model's predictions is measured.
WEIGHED = 1024


@torch.no_grad()
def spread_hard_keys(
    model, ids, config: DiJiangConfig, *, by: str = "head",
    progress: Callable[[int, int], None] | None = None,
) -> DiJiangConfig:  # fmt: skip
    """A config of the same memory, whose hard keys are where this model needs them.

    A layer l alone converted, without hard keys, moves the predictions by KL_l; with c of them the
    squared error of its key/value head h (of the outputs of the query heads that share it) falls
    from e_lh(0) to e_lh(c). Slots are given, the best gain a slot first, to lessen
    ``sum_lh KL_l e_lh(c_lh) / sum_h e_lh(0)`` until the mean of c_lh is ``config.cache_size``.

    Args:
        model: a softmax model, as convert takes it; unchanged afterwards.
        ids: token ids (batch, seqlen) or (seqlen,), rows as long as the contexts it will serve:
            4,096 tokens in all are enough. They are read once, 1,024 of them once for each layer.
        config: what to convert to; its ``cache_size``, a number, becomes the mean over the heads.
        by: "head", or "layer": as many for all heads of a layer, chosen by its whole error.
        progress: called with (forwards done, forwards in all).

    Returns:
        DiJiangConfig: config with the ``cache_size`` of each head, by layer, in ``per_layer``.

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
    if not config.cache_size or not isinstance(config.cache_size, int):
        raise ValueError(
            f"spread_hard_keys: config.cache_size is {config.cache_size!r}: it must be the mean "
            "over the heads, above 0, as in DiJiangConfig(cache_size=64)"
        )
    if is_converted(model):
        raise ValueError(
            "spread_hard_keys: the model is converted. Spread before convert, or restore it first"
        )
    if by not in ("head", "layer"):
        raise ValueError(f"spread_hard_keys: by must be 'head' or 'layer', got {by!r}")
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
        return _spread(model, ids, config, by == "head", progress)
    finally:
        restore(model).train(training)


def _spread(model, ids, config, by_head, progress) -> DiJiangConfig:
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
        for kernel, layer in zip(kernels.values(), alone, strict=True):
            error = sum(head[0] for head in layer)
            kernel.mode = "student"
            part = max(kl(), 0.0)
            weights.append(part / error if error > 0 else 0.0)
            kernel.mode = "softmax"
    if not by_head:
        errors = [[[sum(heads) for heads in zip(*layer, strict=True)]] for layer in errors]
    losses = [
        [weight * e for e in part]
        for weight, layer in zip(weights, errors, strict=True)
        for part in layer
    ]

    def by_layer(sizes):
        if not by_head:
            return list(sizes)
        sizes = iter(sizes)
        return [tuple(itertools.islice(sizes, kernel.kv_heads)) for kernel in kernels.values()]

    def kl_with(chosen):
        for kernel, sizes in zip(kernels.values(), chosen, strict=True):
            kernel.config = kernel.config.replace(cache_size=sizes)
        return kl()

    # Errors of many heads may add up otherwise than they do alone.
    candidates = best_sizes(sizes, losses, mean), [mean] * len(losses)
    chosen = min(map(by_layer, candidates), key=kl_with)
    per_layer = {layer: dict(own) for layer, own in config.per_layer.items()}
    for layer, own in zip(kernels, chosen, strict=True):
        per_layer.setdefault(layer, {})["cache_size"] = own
    return config.replace(per_layer=per_layer)


def _errors_by_size(model, kernels, ids: Tensor, sizes, advance) -> list[list[list[float]]]:
    """[layer][kv head][size]: the output's squared error, relative to the layer's whole output, the
    layers before it exact."""
    sums = 0
    with kernel_mode(model, "compare"):
        for kernel in kernels:
            kernel.compared = tuple(sizes)
        for row in ids.split(1):
            model(input_ids=row, use_cache=False, **only_last_logits(model))
            # (layers, sizes + 1, kv heads)
            sums = sums + torch.stack(
                [
                    kernel.loss.double().unflatten(1, (kernel.kv_heads, -1)).sum(2)
                    for kernel in kernels
                ]
            )
            advance()
    whole = sums[:, -1:].sum(2, keepdim=True)
    return (sums[:, :-1] / whole).mT.tolist()


def best_sizes(sizes: Sequence[int], losses: Sequence[Sequence[float]], mean: float) -> list[int]:
    """A size a head with a small sum of ``losses[head][size's index]``, at most ``mean`` apiece.

    Greedy: of all larger sizes of all heads that still fit, the one that gains most a slot is
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
            ((loss[i] - loss[j]) / (sizes[j] - sizes[i]), head, j)
            for head, (loss, i) in enumerate(zip(losses, at, strict=True))
            for j in range(i + 1, len(sizes))
            if sizes[j] - sizes[i] <= free and loss[j] < loss[i]
        ]
        if not steps:
            return [sizes[i] for i in at]
        _, head, j = max(steps, key=lambda step: step[0])
        free -= sizes[j] - sizes[at[head]]
        at[head] = j
