"""Rows of gpu.py about whole models: decoding behind a context, converted and with softmax.

Models have the shapes of the paper's and random weights; the softmax model is the converted one
with softmax switched on, so that both share their weights. Nothing reads the contexts: caches are
filled with random keys and values, states with random numbers, for neither's cost depends on the
values and ours not on how many there were. The softmax model's cache has its final size from the
start, and each step writes its token into the last place: nothing is moved, as a growing
DynamicCache would.

A step is one call of the model with one token a row, in two ways: as transformers calls it, queued
by the host as fast as it can, and replayed from a CUDA graph. The throughput that is compared is
that of the faster way of each, at the largest batch that fits into --budget: found from the size of
a sequence's memory, then a tenth smaller until it fits. A converted model decodes a whole block of
the window. Batch 1: both in turn; two large batches do not fit at once, so each has the device
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import dijiang
import torch
from dijiang import DiJiangCache, DiJiangConfig
from dijiang.conversion import only_last_logits, softmax_mode
from dijiang.modules import kernels_by_layer
from gpu import MODEL_MANY, MODEL_ONE, OURS, SOFTMAX, WINDOW, fill, named, number, sizes
from gpu_rows import Case
from gpu_timing import (
    DEVICE,
    allocated,
    capture,
    limit_memory,
    most_allocated,
    one_line,
    percentiles,
    release,
    reset_peak,
    step_milliseconds,
    usable,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

POSITIONS = 2**16
STEPS = {OURS: WINDOW, SOFTMAX: 16}  # keys are folded once in a window
ROUNDS = 4  # of batch 1, in turn
SPARE = 2**31  # bytes of a step's own tensors, and of those of its graph
MODELS = {
    "Pythia 410M": GPTNeoXConfig(
        vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096, max_position_embeddings=POSITIONS,
    ),
    "Pythia 2.8B": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2560, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=10240, max_position_embeddings=POSITIONS,
    ),
    "LLaMA2 7B": LlamaConfig(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=11008, max_position_embeddings=POSITIONS,
    ),
}  # fmt: skip
_TINY = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=POSITIONS,
)  # fmt: skip
TINY_MODELS = {"tiny NeoX": GPTNeoXConfig(**_TINY), "tiny LLaMA": LlamaConfig(**_TINY)}


class FixedLayer(DynamicLayer):
    """Keys and values of a context and one token more, each step's in the same last place."""

    def __init__(self, batch: int, heads: int, context: int, dim: int, dtype: torch.dtype):
        super().__init__()
        shape = (batch, heads, context + 1, dim)
        self.keys, self.values = (
            torch.empty(shape, dtype=dtype, device=DEVICE).normal_() for _ in "kv"
        )
        self.dtype, self.device = dtype, self.keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        return self.keys.shape[2] - 1


class Steps(NamedTuple):
    """Milliseconds of steps: their mean, median, 10th and 90th percentile."""

    mean: float
    median: float
    low: float
    high: float


def steps_of(times: list[float]) -> Steps:
    return Steps(statistics.fmean(times), *percentiles(times))


_held: dict[str, nn.Module] = {}  # one model: two may not fit


def model_of(name: str, budget: float) -> nn.Module:
    if name not in _held:
        _held.clear()
        release()
        limit_memory(budget)
        _held[name] = build(name)
    return _held[name]


def build(name: str) -> nn.Module:
    """Converted, its far keys open, so that no kernel may pass over them."""
    torch.manual_seed(0)
    config = (MODELS | TINY_MODELS)[name]
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return dijiang.convert(model.eval(), DiJiangConfig(window=WINDOW, gate=0.0))


def softmax_cache(model: nn.Module, batch: int, context: int) -> Cache:
    cache = DynamicCache()
    cache.layers = [
        FixedLayer(batch, kernel.kv_heads, context, kernel.headdim, model.dtype)
        for kernel in kernels_by_layer(model).values()
    ]
    return cache


def own_cache(model: nn.Module, batch: int, context: int) -> Cache:
    cache = DiJiangCache(model.config)
    for index, kernel in kernels_by_layer(model).items():
        state = kernel.empty_state(batch, model.dtype, DEVICE)
        cache.layers[index].advance(fill(state, context, kernel.config.sinks), context)
    return cache


CACHES = {OURS: own_cache, SOFTMAX: softmax_cache}


def sequence_bytes(model: nn.Module, name: str, context: int) -> int:
    """What a sequence's cache takes."""
    total = 0
    for kernel in kernels_by_layer(model).values():
        if name == OURS:
            state = kernel.empty_state(1, model.dtype, "meta")
            total += sum(x.numel() * x.element_size() for x in state if x is not None)
        else:
            total += 2 * kernel.kv_heads * (context + 1) * kernel.headdim * model.dtype.itemsize
    return total


@contextlib.contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """Within: the model attends so."""
    if name == OURS:
        yield
        return
    with softmax_mode(model):
        try:
            yield
        finally:
            # Told of the cache, but not asked for it: they would keep its keys in memory.
            for kernel in kernels_by_layer(model).values():
                kernel.cache_layer = None


def step_of(model: nn.Module, name: str, batch: int, context: int) -> Callable:
    cache = CACHES[name](model, batch, context)
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=DEVICE)
    options = only_last_logits(model)

    def step():
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)

    return step


def graph_steps(step: Callable, count: int) -> tuple[Steps | None, str]:
    """Of replays from a CUDA graph; why there are none."""
    try:
        return steps_of(step_milliseconds(capture(step), count)), ""
    except RuntimeError as error:
        if not usable():
            raise
        return None, f"no CUDA graph: {one_line(error)}"


def throughput(name: str, batch: int, eager: Steps, replayed: Steps | None) -> dict:
    columns = prefixed(name, "tokens/s"), prefixed(name, "graph tokens/s")
    found = {columns[0]: number(1e3 * batch / eager.mean)}
    if replayed:
        found[columns[1]] = number(1e3 * batch / replayed.mean)
    return found


def prefixed(name: str, column: str) -> str:
    return column if name == OURS else f"{name} {column}"


def best(row: dict, name: str) -> float:
    """Tokens/s of the faster way."""
    columns = (prefixed(name, "tokens/s"), prefixed(name, "graph tokens/s"))
    return max(float(row[column]) for column in columns if row.get(column))


def cache_size(model: nn.Module, name: str, batch: int, context: int) -> dict:
    size = batch * sequence_bytes(model, name, context) / 2**20
    return {prefixed(name, "cache MiB"): number(size)}


def milliseconds(steps: Steps) -> dict:
    return {
        "ms": number(steps.median),
        "p10 ms": number(steps.low),
        "p90 ms": number(steps.high),
    }


def batch_one(name: str, context: int, budget: float) -> dict:
    """Both in turn, a quarter of their steps at a time."""
    model = model_of(name, budget)
    row, notes, calls, times = {"softmax batch": 1}, [], {}, {}
    for form in CACHES:
        calls[form], times[form] = step_of(model, form, 1, context), []
        with attending(model, form):
            step_milliseconds(calls[form], 3)
        row |= cache_size(model, form, 1, context)
    for _, form in ((i, form) for i in range(ROUNDS) for form in CACHES):
        with attending(model, form):
            times[form] += step_milliseconds(calls[form], STEPS[form] // ROUNDS)
    for form, call in calls.items():
        with attending(model, form):
            replayed, note = graph_steps(call, STEPS[form])
        notes += [f"{form}: {note}"] * bool(note)
        row |= throughput(form, 1, steps_of(times[form]), replayed)
    ours, softmax = steps_of(times[OURS]), steps_of(times[SOFTMAX])
    row |= milliseconds(ours) | {
        "softmax ms": number(softmax.median),
        "softmax / ours": number(softmax.median / ours.median),
        "rivals p10 to p90": f"softmax {number(softmax.low)} to {number(softmax.high)}",
    }
    return row | compared(row) | {"note": "; ".join(notes)}


def compared(row: dict) -> dict:
    return {"throughput ratio": number(best(row, OURS) / best(row, SOFTMAX))}


def at_largest(measure: Callable[[int], dict], start: int) -> tuple[int, dict]:
    """What measure says of the largest batch that it has the memory for, from `start` downwards."""
    batch = start
    while batch > 0:
        with contextlib.suppress(torch.OutOfMemoryError):
            return batch, measure(batch)
        release()  # here: what failed is held by its error until the error is gone
        batch = batch * 9 // 10
    raise MemoryError("not even one sequence fits")


def alone(model: nn.Module, form: str, context: int, batch: int) -> dict:
    """One of the two, at this batch."""
    reset_peak()
    step = step_of(model, form, batch, context)
    with attending(model, form):
        step_milliseconds(step, 3)
        eager = steps_of(step_milliseconds(step, STEPS[form]))
        row = cache_size(model, form, batch, context)
        row[prefixed(form, "peak MiB")] = number(most_allocated())
        replayed, note = graph_steps(step, STEPS[form])
    row |= throughput(form, batch, eager, replayed)
    row |= milliseconds(eager) if form == OURS else {"softmax ms": number(eager.median)}
    return row | {"note": f"{form}: {note}" if note else ""}


def largest_batches(name: str, context: int, budget: float, most: int | None) -> dict:
    model = model_of(name, budget)
    row, notes = {}, []
    for form in CACHES:
        release()  # the one before
        free = budget - allocated() - SPARE
        start = max(1, int(0.97 * free / sequence_bytes(model, form, context)))
        start = min(start, most or start)
        batch, found = at_largest(functools.partial(alone, model, form, context), start)
        notes.append(found.pop("note"))
        row |= found | {prefixed(form, "batch"): batch}
    return row | compared(row) | {"note": "; ".join(filter(None, notes))}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    size, budget = sizes(args), 1e9 * args.budget
    most = 3 if size.tiny_models else None
    for name in TINY_MODELS if size.tiny_models else MODELS:
        for context in size.contexts:
            run = functools.partial(largest_batches, name, context, budget, most)
            yield Case(named(MODEL_MANY, name, context), run)
        for context in size.contexts:
            run = functools.partial(batch_one, name, context, budget)
            yield Case(named(MODEL_ONE, name, context, 1), run)
