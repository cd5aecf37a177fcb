"""What decoding costs as the context grows, what a cache holds, and a prompt continued."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ._models import Progress, device_of, keeps_logits


@dataclass(frozen=True)
class DecodePoint:
    """One token at a time behind a context of `context` tokens."""

    context: int
    tokens_per_second: float  # from the median step
    step_ms: float  # median
    step_ms_low: float  # 10th percentile
    step_ms_high: float  # 90th percentile
    cache_bytes: int


@dataclass(frozen=True)
class Generation:
    prompt: str
    text: str  # without the prompt
    tokens: int
    seconds: float


@torch.inference_mode()
def decode_speed(
    models: Mapping[str, nn.Module],
    tokens: torch.Tensor,
    contexts: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    *,
    steps: int = 16,
    prefill: int = 512,
    progress: Progress | None = None,
) -> dict[str, list[DecodePoint]]:
    """Decoding speed and cache size of several models as the context grows.

    Each model reads `tokens`, int64 (n,), repeated when short, in pieces of `prefill`; at each
    context it then decodes `steps` of them one at a time. The models take turns at every step, so
    that whatever else the machine does falls on all of them alike.
    """
    contexts = sorted(contexts)
    need = contexts[-1] + steps
    stream = tokens.repeat(-(-need // tokens.numel()))[:need]
    caches: dict = dict.fromkeys(models)  # None: a model makes its own at its first tokens
    read = 0
    points: dict[str, list[DecodePoint]] = {name: [] for name in models}
    work = len(models) * (contexts[-1] + steps)
    done = 0

    def advance(name: str, piece: torch.Tensor) -> None:
        model = models[name]
        piece = piece[None].to(device_of(model))
        caches[name] = _step(model, piece, caches[name])

    for model in models.values():
        model.eval()
    for context in contexts:
        while read < context:
            size = min(prefill, context - read)
            for name in models:
                advance(name, stream[read : read + size])
                done += size
                if progress:
                    progress(done, work)
            read += size
        times: dict[str, list[float]] = {name: [] for name in models}
        for step in range(steps):
            for name, model in models.items():
                _synchronize(model)
                begin = time.perf_counter()
                advance(name, stream[read + step : read + step + 1])
                _synchronize(model)
                times[name].append(time.perf_counter() - begin)
        read += steps
        done += steps * len(models)
        if progress:
            progress(done, work)
        for name in models:
            points[name].append(_decode_point(context, times[name], cache_bytes(caches[name])))
    return points


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer, prompt: str, *, max_new_tokens: int = 64, cache=None, **options
) -> Generation:
    """Continues `prompt`, greedily unless `options` (those of `model.generate`) say otherwise.

    cache: a DiJiangCache of what stands before the prompt (dijiang.load_state).
    """
    device = device_of(model)
    inputs = tokenizer(
        prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=cache is None
    ).to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("generate: the prompt is empty")
    options.setdefault("do_sample", False)
    if tokenizer.pad_token_id is None:
        options.setdefault("pad_token_id", tokenizer.eos_token_id)
    options["max_new_tokens"] = max_new_tokens
    begin = time.perf_counter()
    if cache is None:
        new = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    else:
        from ..states import resume  # here: it needs transformers

        new = resume(model, cache, inputs["input_ids"], **options)[0]
    _synchronize(model)
    seconds = time.perf_counter() - begin
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(prompt, text, new.numel(), seconds)


def cache_bytes(cache) -> int:
    """Bytes of memory behind the tensors that a cache holds, each storage counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [cache]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
        elif hasattr(item, "__dict__"):
            todo.extend(vars(item).values())
    return sum(storages.values())


def _step(model: nn.Module, ids: torch.Tensor, cache):
    options = {"logits_to_keep": 1} if keeps_logits(model) else {}
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **options).past_key_values


def _synchronize(model: nn.Module) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decode_point(context: int, times: list[float], size: int) -> DecodePoint:
    ordered = sorted(times)
    median = statistics.median(ordered)
    low = ordered[len(ordered) // 10]
    high = ordered[-1 - len(ordered) // 10]
    return DecodePoint(context, 1.0 / median, 1e3 * median, 1e3 * low, 1e3 * high, size)
