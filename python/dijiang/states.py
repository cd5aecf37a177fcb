"""What a model has read: as a file to go on from, and as a row of a batch of any lengths."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._types import AttentionState
from .cache import DiJiangCache, DiJiangLayer
from .conversion import check_converted, only_last_logits
from .modules import kernels_by_layer

#: Of the file's layout. A higher one is refused, by its number.
VERSION = 1
_FORMAT = "dijiang-state"

#: Elements of each parameter that tell one model's weights from another's.
_SAMPLES = 64


@torch.no_grad()
def prefill(
    model, ids: Tensor, cache: DiJiangCache | None = None, *, chunk_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> DiJiangCache:  # fmt: skip
    """The cache of a model that has read ids, so many at a time that memory stays bounded.

    Args:
        model: a converted model.
        ids: int64 (batch, n).
        cache: to go on from; None: a new one.
        chunk_size: tokens of a row read at a time.
        progress: called with (tokens read, tokens in all).

    Raises:
        ValueError: the model is not converted, or ids have no token.

    >>> cache = dijiang.prefill(model, ids)                                    # doctest: +SKIP
    """
    check_converted(model, "prefill")
    if ids.ndim != 2 or not ids.numel() or chunk_size < 1:
        raise ValueError(
            f"prefill: ids must have shape (batch, n) with tokens in them and chunk_size be at "
            f"least 1, got {tuple(ids.shape)} and {chunk_size}"
        )
    cache = DiJiangCache(model.config) if cache is None else cache
    done = 0
    for part in ids.to(model.device).split(chunk_size, 1):
        model(input_ids=part, past_key_values=cache, **only_last_logits(model))
        done += part.numel()
        if progress is not None:
            progress(done, ids.numel())
    return cache


def save_state(cache: DiJiangCache, path: str | os.PathLike, model) -> pathlib.Path:
    """Writes what `model` has read into a safetensors file, whose size the context does not change.

    Layers that kept softmax attention have their keys in it too, and these do grow.

    Args:
        cache: after `model` has read, as prefill or ``model(ids, past_key_values=cache)`` leave it.
        path: written whole or not at all.
        model: the converted model; the file is of its configuration and weights alone.

    Raises:
        TypeError: cache is no DiJiangCache.
        ValueError: the model is not converted, or the cache is empty or another model's.

    >>> cache = dijiang.prefill(model, ids)                                    # doctest: +SKIP
    >>> dijiang.save_state(cache, "book.safetensors", model)                   # doctest: +SKIP
    """
    check_converted(model, "save_state")
    check_filled("save_state", "the cache", cache)
    tensors = tensors_by_name(cache)
    check_shapes("save_state", "the cache", tensors, model)
    metadata = {
        "format": _FORMAT,
        "version": str(VERSION),
        "config": json.dumps(model.config.dijiang),
        "model": type(model).__name__,
        "weights": _fingerprint(model),
        "seen": str(cache.get_seq_length()),
    }
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = pathlib.Path(folder) / path.name
        save_file({name: x.contiguous() for name, x in tensors.items()}, made, metadata)
        os.replace(made, path)
    return path


def load_state(path: str | os.PathLike, model) -> DiJiangCache:
    """The cache that save_state wrote, on the model's device; see resume.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the model is not converted, or the file is damaged, of a newer version, or of a
            model of another class, configuration or other weights.

    >>> cache = dijiang.load_state("book.safetensors", model)                  # doctest: +SKIP
    """
    check_converted(model, "load_state")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_state: there is no file {path}")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            _check_model(path, metadata, model)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_state: {path} is damaged: {error}") from error
    check_shapes("load_state", str(path), tensors, model)
    cache = DiJiangCache(model.config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DiJiangLayer):
            fields = {name: tensors.get(f"{index}.{name}") for name in AttentionState._fields}
            layer.advance(AttentionState(**fields), int(metadata["seen"]))
        else:
            layer.update(tensors[f"{index}.keys"], tensors[f"{index}.values"])
    return cache


@torch.no_grad()
def resume(model, cache: DiJiangCache, ids: Tensor, **options) -> Tensor:
    """Goes on from a cache with new tokens, without those that the cache has read.

    Args:
        model: the converted model.
        cache: as the model, or load_state, left it; it goes on with the generation. To start from
            it again, load it again or give a copy.deepcopy.
        ids: int64 (batch, n), n >= 1: what comes after the tokens read.
        options: of ``model.generate``.

    Returns:
        int64 (batch, new tokens): what comes after ids.

    Raises:
        ValueError: the cache is empty, or ids do not fit it.

    >>> cache = dijiang.load_state("book.safetensors", model)                  # doctest: +SKIP
    >>> dijiang.resume(model, cache, question, max_new_tokens=50)              # doctest: +SKIP
    """
    check_converted(model, "resume")
    if not cache.get_seq_length():
        raise ValueError("resume: the cache is empty. Call model.generate")
    lengths = _lengths(cache)
    batch, seen = lengths.shape[0], cache.get_seq_length()
    if ids.ndim != 2 or ids.shape[0] != batch or not ids.shape[1]:
        raise ValueError(
            f"resume: ids must have shape ({batch}, n) (batch of the cache, at least one token), "
            f"got {tuple(ids.shape)}"
        )
    ids = ids.to(model.device)
    # generate() wants all tokens and cuts off those in the cache: any will do in their place.
    # Padding stands on the left, so that a row has read `length` tokens of those seen.
    read = torch.arange(seen, device=ids.device) >= seen - lengths.to(ids.device)[:, None]
    mask = torch.cat([read.to(ids.dtype), torch.ones_like(ids)], 1)
    everything = torch.cat([ids[:, :1].expand(batch, seen), ids], 1)
    out = model.generate(everything, attention_mask=mask, past_key_values=cache, **options)
    return out[:, everything.shape[1] :]


def stack_states(caches: Iterable[DiJiangCache]) -> DiJiangCache:
    """One cache of all rows of several, which may have read different numbers of tokens.

    Each row goes on, in resume, as it would have alone. The caches given are left as they are.

    Args:
        caches: of one model, each after it has read something; padding on the left.

    Raises:
        TypeError: one is no DiJiangCache.
        ValueError: there is none, one is empty, or one is of another configuration, size, dtype or
            device than the first.

    >>> caches = [dijiang.prefill(model, ids[:, :-1]) for ids in prompts]      # doctest: +SKIP
    >>> last = torch.cat([ids[:, -1:] for ids in prompts])                     # doctest: +SKIP
    >>> cache = dijiang.stack_states(caches)                                   # doctest: +SKIP
    >>> dijiang.resume(model, cache, last, max_new_tokens=50)                  # doctest: +SKIP
    """
    caches = list(caches)
    _check_alike(caches)
    seen = max(int(_lengths(cache).max()) for cache in caches)
    stacked = _with_own_layers(caches[0])
    for layer, *layers in zip(stacked.layers, *(cache.layers for cache in caches), strict=True):
        if isinstance(layer, DiJiangLayer):
            fields = zip(*(one.state for one in layers), strict=True)
            layer.state = AttentionState(*(None if x[0] is None else torch.cat(x) for x in fields))
            layer.seen = seen
        else:
            for name in ("keys", "values"):  # those of shorter rows move right, to end together
                rows = (getattr(one, name) for one in layers)
                rows = [F.pad(x, (0, 0, seen - x.shape[2], 0)) for x in rows]
                setattr(layer, name, torch.cat(rows))
    return stacked


def split_states(cache: DiJiangCache) -> list[DiJiangCache]:
    """A cache for each row of one: what stack_states put together, taken apart.

    So rows leave a batch and others take their place. The cache given is left as it is.

    Raises:
        TypeError: cache is no DiJiangCache.
        ValueError: it is empty.

    >>> rows = dijiang.split_states(cache)                                     # doctest: +SKIP
    >>> rows[2] = dijiang.prefill(model, another[:, :-1])                      # doctest: +SKIP
    >>> cache = dijiang.stack_states(rows)                                     # doctest: +SKIP
    """
    check_filled("split_states", "cache", cache)
    rows = []
    for row in range(len(_lengths(cache))):
        one = _with_own_layers(cache)
        one.batch_select_indices(torch.tensor([row]))
        rows.append(stack_states([one]))
    return rows


def _with_own_layers(cache: DiJiangCache) -> DiJiangCache:
    """A copy whose layers can be given other tensors."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _lengths(cache: DiJiangCache) -> Tensor:
    """int64 (batch,): the tokens that each row has read, without padding."""
    return next(x.state.length for x in cache.layers if isinstance(x, DiJiangLayer))


def tensors_by_name(cache: DiJiangCache) -> dict[str, Tensor]:
    """All that the cache holds, by layer and name."""
    tensors = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DiJiangLayer):
            fields = layer.state._asdict()
        else:
            fields = {"keys": layer.keys, "values": layer.values}
        tensors |= {f"{index}.{name}": x for name, x in fields.items() if x is not None}
    return tensors


def check_filled(what: str, name: str, cache) -> None:
    if not isinstance(cache, DiJiangCache):
        raise TypeError(f"{what}: {name} must be a DiJiangCache, got {type(cache).__name__}")
    if not cache.get_seq_length():
        raise ValueError(f"{what}: {name} is empty. Let the model read something first")


def _check_alike(caches: list) -> None:
    if not caches:
        raise ValueError("stack_states: caches must hold at least one cache, got none")
    first = None
    for i, cache in enumerate(caches):
        check_filled("stack_states", f"caches[{i}]", cache)
        if other := _other_fields(cache.config.to_dict(), caches[0].config.to_dict()):
            raise ValueError(
                f"stack_states: caches[{i}] is of another configuration than caches[0]: {other}"
            )
        kinds = {name: _kind(name, x) for name, x in tensors_by_name(cache).items()}
        first = kinds if first is None else first
        for name in first | kinds:
            if first.get(name) != kinds.get(name):
                raise ValueError(
                    f"stack_states: caches[{i}] is of another model than caches[0]: {name} is "
                    f"{kinds.get(name)} and not {first.get(name)}"
                )


def _kind(name: str, x: Tensor) -> str:
    """Shape of a row, without the keys that softmax layers have more or fewer of; dtype; device."""
    shape = list(x.shape[1:])
    if name.endswith((".keys", ".values")):
        shape[1] = "n"
    return f"({', '.join(map(str, shape))}) of {x.dtype} on {x.device}"


def _other_fields(config: dict, own: dict) -> str:
    """The fields of config that differ from our own, in words."""
    other = [key for key in own if own[key] != config.get(key)]
    return ", ".join(f"{key}={config.get(key)!r} and not {own[key]!r}" for key in other)


def _check_model(path, metadata, model) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"load_state: {path} holds no state. save_state writes one")
    version = int(metadata["version"])
    if version > VERSION:
        raise ValueError(
            f"load_state: {path} is of version {version}, this dijiang reads up to {VERSION}"
        )
    name = type(model).__name__
    if metadata["model"] != name:
        raise ValueError(f"load_state: {path} is of a {metadata['model']}, this is a {name}")
    config, own = json.loads(metadata["config"]), json.loads(json.dumps(model.config.dijiang))
    if other := _other_fields(config, own):
        raise ValueError(f"load_state: {path} is of another configuration: {other}")
    if metadata["weights"] != _fingerprint(model):
        raise ValueError(
            f"load_state: {path} is of a {name} with other weights (or of another dtype): the "
            "state it holds would mean nothing here"
        )


def check_shapes(what: str, source: str, tensors: dict[str, Tensor], model) -> None:
    """Every tensor of every layer, in its shape but for the batch's."""
    wanted, layers = {}, kernels_by_layer(model)
    batch = next((x.shape[0] for x in tensors.values()), 1)
    for index in range(model.config.num_hidden_layers):
        if index in layers:
            state = layers[index].empty_state(batch, model.dtype, "meta")._asdict()
            wanted |= {f"{index}.{name}": x.shape for name, x in state.items() if x is not None}
        else:
            wanted |= {f"{index}.keys": None, f"{index}.values": None}
    if wanted.keys() != tensors.keys():
        odd = ", ".join(sorted(wanted.keys() ^ tensors.keys())[:4])
        raise ValueError(f"{what}: {source} is not of this model: lacks or has in excess {odd}")
    for name, shape in wanted.items():
        if shape is not None and tensors[name].shape != shape:
            raise ValueError(
                f"{what}: {name} of {source} must have shape {tuple(shape)}, got "
                f"{tuple(tensors[name].shape)}"
            )


def _fingerprint(model) -> str:
    """Of names, shapes, dtypes and some elements of every parameter: training moves them all."""
    found = hashlib.sha256()
    for name, x in sorted(model.named_parameters()):
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        found.update(f"{name} {tuple(x.shape)} {x.dtype} {some.double().tolist()}".encode())
    return found.hexdigest()
