"""The operators and whole models on a GPU, against a copy, softmax attention and other packages.

    python benchmarks/gpu.py                  # five minutes; benchmarks/results/gpu.csv, gpu*.png
    python benchmarks/gpu.py --only operators # one group, in this process
    python benchmarks/gpu.py --quick --out F  # small sizes, to see it run; without a GPU on the CPU

Every row goes to gpu.csv as soon as it is known; groups run in processes of their own, so that a
fault costs one row. gpu.md has the rows again and which targets they meet. All is bfloat16.

- Times are the device's, by CUDA events around launches that were queued while it slept; medians
  and 10th to 90th percentiles of calls in turn with those of the rivals. Inputs that the L2 cache
  would hold take turns with others.
- copy: a copy that reads and writes as many bytes in all as the call has to; also the fraction of a
  large copy's rate, and of a large matrix product's (`attention_work`, `decode_work` count).
- softmax: scaled_dot_product_attention, which takes FlashAttention.
- fla: flash-linear-attention's chunk_linear_attn (with decay chunk_simple_gla), without its
  denominator, which makes it faster. It takes features: those of a linear layer that all heads
  share and exp, in plain PyTorch, are in its time; "fla given" is the kernel alone. A group of its
  own, for its kernels are compiled and tuned at their first call.
- published: the published code's T x T formula, in plain PyTorch.
- decode: one token of one layer, from a CUDA graph that holds many layers; the graph is replayed
  for a whole block of the window, at whose end keys are folded into the state.
- models: see gpu_models.py.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dijiang
import floor
import formulas
import rivals
import torch
import torch.nn.functional as F
from common import RESULTS, machine
from dijiang.ops import AttentionState
from gpu_check import in_both_ways, near_keys, parameters, softmax_attention
from gpu_rows import Case, Group, Suite, rows_of
from gpu_timing import DEVICE, Times, capture, peak_memory, timed
from torch import Tensor

FILE = "gpu.csv"
PACKAGES = ("flash-linear-attention", "fla-core")
WINDOW, SINKS, HARD_KEYS, FAR_FEATURES = 64, 4, 64, 64

OURS, COPY, SOFTMAX, PUBLISHED = "dijiang", "copy", "softmax", "published"
FLA, FLA_GIVEN = "fla", "fla given"
RIVALS = (COPY, SOFTMAX, FLA, FLA_GIVEN, PUBLISHED)

RATE, FORWARD, BACKWARD, FEW_HEADS = "rate", "forward", "forward and backward", "few heads"
CONVERTED, CONVERTED_BACKWARD = "converted forward", "converted forward and backward"
DECODE, DCT, MAP = "decode", "dct", "feature map"
SIZES, SIZES_BACKWARD = "sizes forward", "sizes forward and backward"
FLA_FORWARD, FLA_BACKWARD = "forward beside fla", "forward and backward beside fla"
FLA_DECAY = "forward with decay beside fla"
MODEL_ONE, MODEL_MANY = "model, batch 1", "model, largest batch"

COLUMNS = (
    *("group", "kind", "what", "tokens", "batch", "ms", "p10 ms", "p90 ms", "host ms"),
    *("ns a token and head", "GB/s", "of copy rate", "TFLOP/s", "of product rate", "MiB"),
    *itertools.chain.from_iterable((f"{name} ms", f"{name} / ours") for name in RIVALS),
    "rivals p10 to p90",
    *("tokens/s", "graph tokens/s", "cache MiB", "peak MiB"),
    *("softmax batch", "softmax tokens/s", "softmax graph tokens/s"),
    *("softmax cache MiB", "softmax peak MiB", "throughput ratio", "note", "failure"),
)
SHOWN = (
    *("kind", "what", "tokens", "batch", "ms", "copy / ours", "softmax / ours", "fla / ours"),
    *("fla given / ours", "published / ours", "of copy rate", "of product rate"),
    *("tokens/s", "throughput ratio", "failure"),
)


class Sizes(NamedTuple):
    """How large all is; `QUICK` for a look."""

    copied: int = 2**30  # bytes of the large copy's source
    product: int = 8192
    lengths: tuple[int, ...] = (2048, 8192, 32768, 1024)  # the most telling first
    contexts: tuple[int, ...] = (8192, 2048, 32768)
    filled: int = 65536  # tokens of all sequences together, that fill the chip
    heads: int = 32
    kv_heads: int = 8  # where heads share them
    few_heads: int = 8
    published: int = 2048  # tokens, of the T x T formula
    batches: tuple[int, ...] = (1, 256)
    dct: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    elements: int = 2**26  # of what the DCT transforms
    dims: tuple[int, ...] = (64, 128, 256)
    rounds: int = 10
    most_layers: int = 64  # of a graph
    tiny_models: bool = False


FULL = Sizes()
QUICK = Sizes(
    copied=2**16, product=64, lengths=(64, 128), contexts=(256, 512), filled=128, heads=2,
    kv_heads=1, few_heads=1, published=64, batches=(1, 2), dct=(64, 8192), elements=2**14,
    rounds=2, most_layers=2, tiny_models=True,
)  # fmt: skip


def sizes(args: argparse.Namespace) -> Sizes:
    return QUICK if args.quick else FULL


# ---- work ----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a call has to do at least."""

    bytes: float  # read and written
    flops: float = 0.0


def keys_seen(near: tuple[int, int, int]) -> float:
    """Exact keys of a query: of its block half on average, and the block before it."""
    window, sinks, hard = near
    return 1.5 * window + sinks + hard


def attention_work(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, features: int,
    near: tuple[int, int, int] = (0, 0, 0), train: bool = False,
) -> Work:  # fmt: skip
    """Of q, k and v read and the output written once, far keys in chunks as floor.py has them.

    A backward reads q, k, v, the output and its gradient, writes three gradients, and multiplies
    twice what the forward does: both together are three forwards.
    """
    shape = floor.Shape(heads, kv_heads, dim, features, dim)
    adds = floor.multiply_adds(tokens, shape) + tokens * heads * keys_seen(near) * 2 * dim
    passes = 3 if train else 1
    return Work(passes * batch * floor.least_bytes(tokens, shape, 2), passes * batch * 2.0 * adds)


def decode_work(
    batch: int, heads: int, kv_heads: int, dim: int, features: int, near: tuple[int, int, int]
) -> Work:
    """Of one token: the state read and written, near keys read, q, k, v and the output.

    With a window the state is written at a block's end alone, once in `window` tokens.
    """
    window, _, hard = near
    state = 4 * features * (dim + 2) * (1 + 1 / max(window, 1))
    keys = keys_seen(near) * 2 * dim * 2
    votes = 2 * 4 * (hard + window + 2 * dim) if hard else 0
    token = 2 * 2 * dim * (2 if window else 1)
    adds = heads * (2 * features * dim + keys_seen(near) * 2 * dim) + kv_heads * features * dim
    moved = kv_heads * (state + keys + votes + token) + heads * 2 * 2 * dim
    return Work(batch * moved, 2.0 * batch * adds)


def rates(args: argparse.Namespace) -> dict[str, float]:
    """What the device does a second, of the rows found so far: bytes copied, products' FLOPs."""
    units = {"copy": ("GB/s", 1e9), "matrix product": ("TFLOP/s", 1e12)}
    found = {}
    for row in rows_of(args.out / FILE):
        if row["kind"] == RATE and not row["failure"]:
            column, unit = units[row["what"]]
            found[row["what"]] = float(row[column]) * unit
    return found


def work_columns(work: Work, milliseconds: float, args: argparse.Namespace) -> dict:
    known = rates(args)
    moved, done = (1e3 * x / milliseconds for x in work)
    row = {"GB/s": number(moved / 1e9)}
    if "copy" in known:
        row["of copy rate"] = number(moved / known["copy"])
    if done:
        row["TFLOP/s"] = number(done / 1e12)
        if "matrix product" in known:
            row["of product rate"] = number(done / known["matrix product"])
    return row


# ---- a row ---------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.4g}"


def measured(
    calls: Mapping[str, Callable],
    work: Work,
    args: argparse.Namespace,
    counts: Mapping[str, int] | None = None,
) -> dict:
    """Columns of ours and of the rivals; counts: how often a call does what the row is about."""
    times = timed(calls, sizes(args).rounds)
    ours = times.pop(OURS)
    if isinstance(ours, str):
        return {"failure": ours}
    counts = counts or {}
    ours = scaled(ours, counts.get(OURS, 1))
    row = {
        "ms": number(ours.median),
        "p10 ms": number(ours.low),
        "p90 ms": number(ours.high),
        "host ms": number(ours.host),
    }
    notes, spreads = [], []
    for name, found in times.items():
        if isinstance(found, str):
            notes.append(f"{name}: {found}")
            continue
        found = scaled(found, counts.get(name, 1))
        row[f"{name} ms"] = number(found.median)
        row[f"{name} / ours"] = number(found.median / ours.median)
        spreads.append(f"{name} {number(found.low)} to {number(found.high)}")
    row["rivals p10 to p90"] = ", ".join(spreads)
    row["note"] = "; ".join(notes)
    return row | work_columns(work, ours.median, args)


def scaled(times: Times, count: int) -> Times:
    return Times(*(x / count for x in times))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def copy_call(moved: float) -> Callable:
    """A copy that reads and writes so many bytes in all."""
    source = random(max(1, int(moved) // 4))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sets_for(nbytes: float, most: int) -> int:
    """How many sets of such inputs the L2 cache does not hold."""
    if DEVICE == "cpu":
        return most
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, math.ceil(2 * cache / nbytes)))


def rotating(make: Callable[[], dict[str, Callable]], nbytes: float) -> dict[str, Callable]:
    """The calls that make() gives, each in turns over sets of inputs that it makes."""
    made = [make() for _ in range(sets_for(nbytes, 8))]

    def in_turn(calls):
        following = itertools.cycle(calls)
        return lambda: next(following)()

    return {name: in_turn([calls[name] for calls in made]) for name in made[0]}


def named(kind: str, what: str, tokens: int | str = "", batch: int | str = "") -> dict:
    return {"kind": kind, "what": what, "tokens": tokens, "batch": batch}


# ---- rates of the machine ------------------------------------------------------------------------


def rate_cases(args: argparse.Namespace) -> Iterator[Case]:
    copied, size = sizes(args).copied, sizes(args).product

    def copy():
        return {OURS: copy_call(2 * copied)}, Work(2 * copied)

    def product():
        a, b, c = (random(size, size) for _ in "abc")
        return {OURS: lambda: torch.mm(a, b, out=c)}, Work(3 * 2 * size**2, 2.0 * size**3)

    for what, make in (("copy", copy), ("matrix product", product)):
        yield Case(named(RATE, what), lambda make=make: measured(*make(), args))


# ---- whole sequences -----------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of the tensors of one attention call."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    features: int

    @property
    def name(self) -> str:
        shared = f" over {self.kv_heads}" if self.kv_heads < self.heads else ""
        return f"{self.heads} heads{shared}, headdim {self.dim}, {self.features} features"

    def per_token_and_head(self, milliseconds: float) -> str:
        return number(1e6 * milliseconds / (self.batch * self.heads * self.tokens))

    def inputs(self) -> list[Tensor]:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [random(self.batch, one, self.tokens, self.dim) for one in heads]


def attend(fq, fk, options: dict) -> Callable:
    """Ours as a function of q, k and v."""
    return lambda q, k, v: dijiang.ops.kernelized_attention(q, k, v, fq, fk, **options)


def attention_calls(
    shape: Shape, near: tuple[int, int, int], train: bool, published: bool, moved: float
) -> dict[str, Callable]:
    q, k, v = shape.inputs()
    fq, fk = (
        parameters(heads, shape.features, shape.dim, "exp")
        for heads in (shape.heads, shape.kv_heads)
    )
    functions = {OURS: attend(fq, fk, near_keys(*near)), SOFTMAX: softmax_attention}
    if published:
        omega = fq.omega.bfloat16() / 8
        functions[PUBLISHED] = lambda q, k, v: formulas.linear_quadratic(q, k, v, omega)
    calls = in_both_ways(functions, (q, k, v), torch.randn_like(q), train)
    return calls | {COPY: copy_call(moved)}


def attention_row(
    shape: Shape, near: tuple, train: bool, published: bool, args: argparse.Namespace
) -> dict:
    work = attention_work(*shape, near, train)
    make = partial(attention_calls, shape, near, train, published, work.bytes)
    calls = rotating(make, attention_work(*shape, near).bytes)
    row = measured(calls, work, args)
    if "ms" in row:
        row["ns a token and head"] = shape.per_token_and_head(float(row["ms"]))
        row["MiB"] = number(peak_memory(calls[OURS]))
    return row


def attention_case(
    kind: str, shape: Shape, args: argparse.Namespace, near: tuple[int, int, int] = (0, 0, 0),
    train: bool = False, published: bool = False,
) -> Case:  # fmt: skip
    head = named(kind, shape.name, shape.tokens, shape.batch)
    return Case(head, partial(attention_row, shape, near, train, published, args))


def batch_of(tokens: int, args: argparse.Namespace, part: int = 1) -> int:
    """Sequences that fill the chip; part: with this fraction of their tokens."""
    return max(1, sizes(args).filled // part // tokens)


def operator_cases(args: argparse.Namespace) -> Iterator[Case]:
    size = sizes(args)
    yield from rate_cases(args)
    for kind, train in ((FORWARD, False), (BACKWARD, True)):
        for tokens in size.lengths:
            shape = Shape(batch_of(tokens, args), size.heads, size.heads, tokens, 64, 64)
            published = tokens == size.published and not train
            yield attention_case(kind, shape, args, train=train, published=published)
    longest = max(size.lengths)
    few = Shape(1, size.few_heads, size.few_heads, longest, 64, 64)
    yield attention_case(FEW_HEADS, few, args)
    near = (WINDOW, SINKS, HARD_KEYS)
    for kind, train in ((CONVERTED, False), (CONVERTED_BACKWARD, True)):
        for tokens, dim in itertools.product(size.contexts, (64, 128)):
            batch = batch_of(tokens, args, 2)
            shape = Shape(batch, size.heads, size.kv_heads, tokens, dim, FAR_FEATURES)
            yield attention_case(kind, shape, args, near, train)


# ---- beside flash-linear-attention ---------------------------------------------------------------


def fla_calls(shape: Shape, train: bool, decay: bool) -> dict[str, Callable]:
    """Both on the same q, k and v, each in the layout that it likes best."""
    q, k, v = shape.inputs()
    fq, fk = (parameters(shape.heads, shape.features, shape.dim, "exp") for _ in "qk")
    log_decay = -torch.rand(shape.batch, shape.heads, shape.tokens, device=DEVICE) / 10
    options = {"log_decay": log_decay} if decay else {}
    ours = in_both_ways({OURS: attend(fq, fk, options)}, (q, k, v), torch.randn_like(v), train)

    weight = random(shape.features, shape.dim) / 8
    layout = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    grad = torch.randn_like(layout[2])
    if decay:
        gates = log_decay.transpose(1, 2).contiguous()
        kernel = partial(rivals.find("fla-core"), g=gates)
    else:
        kernel = partial(rivals.find("flash-linear-attention"), normalize=False)

    def features(x):
        return F.linear(x, weight).exp()

    def mapped(q, k, v):
        return kernel(features(q), features(k), v)[0]

    def given(q, k, v):
        return kernel(q, k, v)[0]

    theirs = in_both_ways({FLA: mapped}, layout, grad, train)
    ready = (features(layout[0]), features(layout[1]), layout[2])
    return ours | theirs | in_both_ways({FLA_GIVEN: given}, ready, grad, train)


def fla_row(shape: Shape, train: bool, decay: bool, args: argparse.Namespace) -> dict:
    calls = fla_calls(shape, train, decay)
    row = measured(calls, attention_work(*shape, train=train), args)
    if "ms" in row:
        row["ns a token and head"] = shape.per_token_and_head(float(row["ms"]))
    return row


def fla_cases(args: argparse.Namespace) -> Iterator[Case]:
    """None where it is not installed, which the first line of the file says."""
    if not all(map(rivals.find, PACKAGES)):
        return
    size = sizes(args)
    for kind, train, decay in (
        (FLA_FORWARD, False, False),
        (FLA_BACKWARD, True, False),
        (FLA_DECAY, False, True),
    ):
        for tokens in size.contexts[:1] if decay else size.contexts:
            shape = Shape(batch_of(tokens, args), size.heads, size.heads, tokens, 64, 64)
            head = named(kind, shape.name, tokens, shape.batch)
            yield Case(head, partial(fla_row, shape, train, decay, args))


# ---- one token -----------------------------------------------------------------------------------


class Layer(NamedTuple):
    """An attention layer that decodes."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    features: int
    near: tuple[int, int, int]


def layers(args: argparse.Namespace) -> list[Layer]:
    size, near = sizes(args), (WINDOW, SINKS, HARD_KEYS)
    shared = (size.heads, size.kv_heads)
    return [
        Layer("far keys alone, headdim 64", size.heads, size.heads, 64, 64, (0, 0, 0)),
        Layer("converted, headdim 64", *shared, 64, FAR_FEATURES, near),
        Layer("converted, headdim 128", *shared, 128, FAR_FEATURES, near),
    ]


def fill(state: AttentionState, context: int, sinks: int) -> AttentionState:
    """Random numbers in the place of what `context` tokens would leave: the cost is the same."""
    for x in (state.kv, state.window_k, state.window_v, state.sink_k, state.sink_v):
        x.normal_()
    state.z.uniform_(1, 2)
    state.log_scale.zero_()
    state.length.fill_(context)
    if state.cache_k is not None:
        for x in (state.cache_k, state.cache_v, state.cache_sums):
            x.normal_()
        state.cache_votes.uniform_()
        slots = torch.arange(state.cache_position.shape[-1], device=state.length.device)
        state.cache_position.copy_(sinks + slots)
    return state


def update_calls(layer: Layer, batch: int, context: int, count: int) -> list[Callable]:
    """Of so many layers, each with a state of its own."""
    options = near_keys(*layer.near)
    heads = (layer.heads, layer.kv_heads, layer.kv_heads)
    q, k, v = (random(batch, one, 1, layer.dim) for one in heads)
    maps = [parameters(one, layer.features, layer.dim, "exp") for one in heads[:2]]

    def update(state):
        dijiang.ops.kernelized_attention_update(q, k, v, state, *maps, **options)

    def state():
        empty = dijiang.ops.empty_attention_state(
            batch, layer.kv_heads, layer.features, layer.dim, layer.dim, device=DEVICE,
            dtype=q.dtype, **options,
        )  # fmt: skip
        return fill(empty, context, layer.near[1])

    return [partial(update, state()) for _ in range(count)]


def softmax_token_call(layer: Layer, batch: int, context: int) -> Callable:
    q = random(batch, layer.heads, 1, layer.dim)
    k, v = (random(batch, layer.kv_heads, context, layer.dim) for _ in "kv")
    shared = layer.kv_heads < layer.heads
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=shared)


def graph_of(calls: Sequence[Callable], replays: int = 1) -> Callable:
    """All of them as one CUDA graph, replayed so often."""

    def run():
        for call in calls:
            call()

    replay = capture(run)

    def repeat():
        for _ in range(replays):
            replay()

    return repeat


def token_row(layer: Layer, batch: int, context: int, args: argparse.Namespace) -> dict:
    work = decode_work(batch, *layer[1:])
    most = sizes(args).most_layers
    count = sets_for(work.bytes, most)
    replays = max(1, layer.near[0])
    calls = {
        OURS: graph_of(update_calls(layer, batch, context, count), replays),
        COPY: graph_of([copy_call(work.bytes) for _ in range(count)]),
    }
    counts = {OURS: count * replays, COPY: count}
    if context:
        counts[SOFTMAX] = sets_for(4 * batch * layer.kv_heads * context * layer.dim, most)
        try:
            makes = range(counts[SOFTMAX])
            calls[SOFTMAX] = graph_of([softmax_token_call(layer, batch, context) for _ in makes])
        except torch.OutOfMemoryError as error:
            text = f"softmax: {type(error).__name__}"
            return measured(calls, work, args, counts) | {"note": text}
    return measured(calls, work, args, counts)


def decode_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Far keys alone have no context: nothing is compared with that has one."""
    size = sizes(args)
    for layer, batch in itertools.product(layers(args), size.batches):
        for context in size.contexts if layer.near[0] else (0,):
            head = named(DECODE, layer.name, context or "", batch)
            yield Case(head, partial(token_row, layer, batch, context, args))


# ---- maps and sizes ------------------------------------------------------------------------------


def dct_row(n: int, args: argparse.Namespace) -> dict:
    x = random(sizes(args).elements // n, n)
    target = torch.empty_like(x)
    calls = {OURS: lambda: dijiang.ops.dct(x), COPY: lambda: target.copy_(x)}
    transform = 2.5 * x.numel() * math.log2(n)  # a real Fourier transform's
    return measured(calls, Work(2 * 2 * x.numel(), transform), args)


def map_row(shape: Shape, args: argparse.Namespace) -> dict:
    x = random(shape.batch, shape.heads, shape.tokens, shape.dim)
    params = parameters(shape.heads, shape.features, shape.dim, "exp")
    outputs = x[..., 0].numel() * shape.features
    work = Work(2 * (x.numel() + outputs), 2.0 * outputs * shape.dim)
    scale = shape.dim**-0.5
    calls = {
        OURS: lambda: dijiang.ops.feature_map(x, params, scale=scale),
        COPY: copy_call(work.bytes),
    }
    return measured(calls, work, args)


def map_cases(args: argparse.Namespace) -> Iterator[Case]:
    size = sizes(args)
    for n in size.dct:
        yield Case(named(DCT, f"n {n}"), partial(dct_row, n, args))
    tokens = size.contexts[0]
    for dim, features in ((64, 64), (64, 128), (128, 128)):
        shape = Shape(batch_of(tokens, args), size.heads, size.heads, tokens, dim, features)
        head = named(MAP, shape.name, tokens, shape.batch)
        yield Case(head, partial(map_row, shape, args))
    for kind, train in ((SIZES, False), (SIZES_BACKWARD, True)):
        for dim, times in ((64, 1), (128, 1), (256, 1), (64, 2), (64, 4), (128, 2), (128, 4)):
            batch = batch_of(tokens, args, 4)
            shape = Shape(batch, size.heads, size.heads, tokens, dim, times * dim)
            yield attention_case(kind, shape, args, train=train)


def decode_and_map_cases(args: argparse.Namespace) -> Iterator[Case]:
    return itertools.chain(decode_cases(args), map_cases(args))


def model_cases(args: argparse.Namespace) -> Iterator[Case]:
    import gpu_models  # here: it needs transformers, whose import the operators need not wait for

    return gpu_models.cases(args)


# ---- groups --------------------------------------------------------------------------------------

GROUPS = {  # in the order of their running; the last has what is left
    "operators": Group(FILE, operator_cases, 75),
    "decode and maps": Group(FILE, decode_and_map_cases, 55),
    "fla": Group(FILE, fla_cases, 60),
    "models": Group(FILE, model_cases, 180),
}


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def header() -> str:
    """Device, driver, versions and the day."""
    name = "no GPU: these figures mean nothing"
    if DEVICE != "cpu":
        name = f"{torch.cuda.get_device_name()}, driver {driver()}, CUDA {torch.version.cuda}"
    today = datetime.date.today().isoformat()
    return f"{name}, {machine()}, {today}, {rivals.note(PACKAGES)}"


def options(args: argparse.Namespace) -> list[str]:
    return ["--budget", str(args.budget), *["--quick"] * args.quick]


SUITE = Suite(
    script=__file__,
    columns={FILE: COLUMNS},
    groups=GROUPS,
    options=options,
    failed=lambda row: bool(row.get("failure")),
    failure=lambda file, text: {"failure": text},
    header=header,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see it run")
    parser.add_argument("--seconds", type=float, default=290, help="for all groups together")
    parser.add_argument("--budget", type=float, default=80, help="memory of a model, 10^9 bytes")
    parser.add_argument("--only", choices=GROUPS, help="this group alone, in this process")
    parser.add_argument("--skip", type=int, default=0, help="cases of --only that are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.csv and the rest")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.quick:
        sys.exit(
            "gpu: no CUDA device is visible to torch. This script measures a GPU; --quick runs it "
            "on the CPU, only to see it run."
        )
    if args.only:
        return SUITE.run_here(args.only, args)
    path = args.out / FILE
    SUITE.start(path)
    end = time.monotonic() + args.seconds
    for name in GROUPS:
        print(name, file=sys.stderr, flush=True)
        SUITE.run_apart(name, args, end)
    return report(path)


def report(path: Path) -> int:
    """Tables and plots of what gpu.csv has. The exit status: 1 where a row failed."""
    import gpu_report  # here: it is of rows, and knows this script's names for them

    return gpu_report.write(path)


if __name__ == "__main__":
    sys.exit(main())
