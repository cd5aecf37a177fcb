"""What a model has read, as a file: prefilled once, gone on from as often as wanted."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import torch
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
    if not isinstance(cache, DiJiangCache):
        raise TypeError(f"save_state: cache must be a DiJiangCache, got {type(cache).__name__}")
    if not cache.get_seq_length():
        raise ValueError("save_state: the cache is empty. Let the model read something first")
    tensors = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DiJiangLayer):
            fields = layer.state._asdict()
        else:
            fields = {"keys": layer.keys, "values": layer.values}
        tensors |= {f"{index}.{name}": x for name, x in fields.items() if x is not None}
    _check_shapes("save_state", "the cache", tensors, model)
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
    _check_shapes("load_state", str(path), tensors, model)
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
    lengths = next(x.state.length for x in cache.layers if isinstance(x, DiJiangLayer))
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
    other = [key for key in own if own[key] != config.get(key)]
    if other:
        said = ", ".join(f"{key}={config.get(key)!r} and not {own[key]!r}" for key in other)
        raise ValueError(f"load_state: {path} is of another configuration: {said}")
    if metadata["weights"] != _fingerprint(model):
        raise ValueError(
            f"load_state: {path} is of a {name} with other weights (or of another dtype): the "
            "state it holds would mean nothing here"
        )


def _check_shapes(what: str, source: str, tensors: dict[str, Tensor], model) -> None:
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
