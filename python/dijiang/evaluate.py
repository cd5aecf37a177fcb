"""What a converted model is worth: perplexity, recall, decoding speed and the size of its memory.

Every function takes any causal language model of transformers, converted or not, and returns a
plain dataclass (`dataclasses.asdict` makes it JSON). `progress(done, total)` is called as the work
goes on.
"""

from __future__ import annotations

import inspect
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token given those before it in its window."""

    length: int  # tokens of a window
    tokens: int  # tokens predicted: windows * (length - 1)
    loss: float  # nats a token
    perplexity: float
    standard_error: float  # of `loss`, over windows; nan for a single one


@dataclass(frozen=True)
class Recall:
    """Share of the answer's tokens that are the most likely ones when a pass key is asked for."""

    distance: int  # tokens of prose between the key and the question
    trials: int
    accuracy: float
    loss: float  # nats a token of the answer


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
def perplexity(
    model: nn.Module, blocks: torch.Tensor, *, progress: Progress | None = None
) -> Perplexity:
    """Perplexity over windows of held-out text: int64 `blocks` (windows, length), one at a time.

    Example: `perplexity(model, dijiang.data.pack(corpus.held_out, tokenizer, 2048))`.
    """
    if blocks.ndim != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(
            f"perplexity: blocks must be (windows, length >= 2), got {tuple(blocks.shape)}"
        )
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for index, block in enumerate(blocks.to(device)):
        logits = model(input_ids=block[None], use_cache=False).logits[0]
        losses.append(summed_loss(logits[:-1], block[1:]) / (block.numel() - 1))
        del logits
        if progress:
            progress(index + 1, len(blocks))
    loss = statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    predicted = blocks.shape[0] * (blocks.shape[1] - 1)
    return Perplexity(blocks.shape[1], predicted, loss, math.exp(loss), error)


@torch.inference_mode()
def pass_key_recall(
    model: nn.Module,
    tokenizer,
    prose: torch.Tensor,
    distance: int,
    *,
    trials: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recall:
    """Says a five-digit pass key twice, then `distance` tokens of prose, then asks for the key.

    prose: int64 (n,), n >= distance: each trial takes its own stretch. The same seed gives every
    model the same keys and stretches.
    """
    if prose.numel() < distance:
        raise ValueError(
            f"pass_key_recall: {distance} tokens of prose are wanted, the text has {prose.numel()}"
        )
    model.eval()
    device = next(model.parameters()).device
    draw = random.Random(seed)
    right, loss = [], []
    for trial in range(trials):
        key = draw.randint(10000, 99999)
        start = draw.randint(0, prose.numel() - distance)
        before = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        answer = _ids(tokenizer, f" {key}")
        prompt = torch.cat(
            [
                _ids(tokenizer, before),
                prose[start : start + distance],
                _ids(tokenizer, "\nWhat is the pass key? The pass key is"),
                answer,
            ]
        ).to(device)
        # The logits before each answer token: the last one's own are of no use.
        logits = _last_logits(model, prompt[None], answer.numel() + 1)[0, :-1].float()
        answer = answer.to(device)
        right.append((logits.argmax(-1) == answer).float().mean().item())
        loss.append(F.cross_entropy(logits, answer).item())
        if progress:
            progress(trial + 1, trials)
    return Recall(distance, trials, statistics.fmean(right), statistics.fmean(loss))


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
        piece = piece[None].to(next(model.parameters()).device)
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
    model: nn.Module, tokenizer, prompt: str, *, max_new_tokens: int = 64, **options
) -> Generation:
    """Continues `prompt`, greedily unless `options` (those of `model.generate`) say otherwise."""
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("generate: the prompt is empty")
    options.setdefault("do_sample", False)
    if tokenizer.pad_token_id is None:
        options.setdefault("pad_token_id", tokenizer.eos_token_id)
    begin = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)[0]
    _synchronize(model)
    seconds = time.perf_counter() - begin
    new = output[inputs["input_ids"].shape[1] :]
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


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Cross entropy of logits (n, vocabulary) summed over targets (n,), in float32.

    In slices: a float32 copy of all logits would be the largest tensor.
    """
    total = 0.0
    for piece, target in zip(logits.split(256), targets.split(256), strict=True):
        total += F.cross_entropy(piece.float(), target, reduction="sum").item()
    return total


def _ids(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _last_logits(model: nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    options = {"logits_to_keep": count} if _keeps_logits(model) else {}
    return model(input_ids=ids, use_cache=False, **options).logits[:, -count:]


def _step(model: nn.Module, ids: torch.Tensor, cache):
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **options).past_key_values


def _synchronize(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decode_point(context: int, times: list[float], size: int) -> DecodePoint:
    ordered = sorted(times)
    median = statistics.median(ordered)
    low = ordered[len(ordered) // 10]
    high = ordered[-1 - len(ordered) // 10]
    return DecodePoint(context, 1.0 / median, 1e3 * median, 1e3 * low, 1e3 * high, size)
