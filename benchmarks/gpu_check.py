"""The first thing to run on a machine with a GPU: are the CUDA operators right, and how fast?

    python benchmarks/gpu_check.py                 # both; fails (exit 1) if a case does
    python benchmarks/gpu_check.py --no-timing     # correctness alone
    python benchmarks/gpu_check.py --only far      # one group, in this process
    python benchmarks/gpu_check.py --smoke         # a few small cases, under compute-sanitizer say

A group of cases is a child process, so that a fault on the device costs one case: the group goes on
after it in a new process. Each row goes to its CSV (gpu_check.csv, gpu_check_timing.csv,
gpu_check_far.csv) as soon as it is known, with the error's text where there is one.

Correctness, in float32, bfloat16 and float16, against the float64 oracles of dijiang.reference: the
DCT, feature maps, causal_linear_attention and kernelized_attention with their gradients in q, k and
v; in omega, log_weight, beta and log_decay for a few problems (`trained`). Kinds exp, softmax and
elu; windows, sinks and hard keys (their number also by head); decay; two query heads a kv head;
headdim 32 to 256; packed sequences; normalize=False; keys that grow with time, whose rows go exact.
The law: the error is at most twice that of the same formula in plain PyTorch at that dtype, or the
dtype's epsilon (float32: 1e-5 of the largest value, gradients 2e-5). Where plain PyTorch is not
finite, ours has to be.

Not against an oracle: one-token updates and the choice of hard keys (against one call, against the
reference); to the bit: an update replayed from a CUDA graph, a call on another stream, outputs
after a change of later tokens; and problems without elements. Not covered: gradients of states,
seq_bounds, eps beside far keys, the linear update, several devices.

Timing: forward, forward and backward, and one decoded token, against scaled_dot_product_attention
on the same tensors, in turn, with CUDA events. The device sleeps until all launches are queued, so
that the times are the device's; what Python and launches cost is the host's column. One token is
also timed as a replayed CUDA graph.

Far keys alone, near keys alone and both at 16 bits have two forwards each, and two backwards (of
far keys in bfloat16 alone; docs/cuda.md): the fused ones, and the others, which groups with
DIJIANG_CUDA_FUSED=0 check and time on the same problems. Times of far keys alone stand beside a
copy that moves as many bytes as q, k, v and the output have; the others beside softmax attention,
with hard keys chosen and with the same ones given.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dijiang
import torch
import torch.nn.functional as F
from common import RESULTS, machine, table
from dijiang import reference
from dijiang.ops import FeatureParams
from gpu_rows import Case, Group, Suite, rows_of
from gpu_timing import DEVICE, capture, one_line, peak_memory, timed
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMIT_FORWARD, LIMIT_BACKWARD = 1e-5, 2e-5
LIMIT_CHOICE = 0.02  # ties that rounding decides, and what follows from them
HEADS, KV_HEADS = 4, 2

CHECKS = "gpu_check.csv"
TIMINGS = "gpu_check_timing.csv"
FAR_TIMINGS = "gpu_check_far.csv"
COLUMNS = {
    CHECKS: (
        *("group", "operator", "dtype", "error", "plain PyTorch", "gradients", "plain gradients"),
        *("holds", "failure"),
    ),
    TIMINGS: (
        *("group", "what", "tokens", "dijiang ms", "softmax ms", "softmax / dijiang"),
        *("dijiang host ms", "softmax host ms", "dijiang MiB", "softmax MiB", "failure"),
    ),
    FAR_TIMINGS: (
        *("group", "what", "path", "tokens", "ms", "copy ms", "ns a token and head"),
        *("copy / call", "failure"),
    ),
}


class Problem(NamedTuple):
    """An operator and its oracle, which take the same tensors; `inputs` makes them for a dtype."""

    name: str
    op: Callable
    oracle: Callable
    inputs: Callable[[torch.dtype], list[Tensor]]


# ---- errors --------------------------------------------------------------------------------------


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference against the largest value."""
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max().clamp(min=1e-30)).item()


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def errors(problem: Problem, inputs: list[Tensor]) -> tuple[list[float], list[float]]:
    """Of the output and each gradient: the operator's error, and plain PyTorch's at its dtype."""
    wide = leaves(*(t.double() for t in inputs))
    truth = problem.oracle(*wide)
    seed = torch.randn_like(truth)
    seed = seed.to(inputs[0].dtype).double()
    truths = [truth.detach(), *torch.autograd.grad(truth, wide, seed)]

    def measure(function):
        narrow = leaves(*inputs)
        out = function(*narrow)
        grads = torch.autograd.grad(out, narrow, seed.to(out.dtype))
        return [relative(g, t) for g, t in zip([out, *grads], truths, strict=True)]

    ours = measure(problem.op)
    try:
        return ours, measure(problem.oracle)
    except RuntimeError as error:  # what it lacks at a dtype is no fault of ours
        print(f"    plain PyTorch: {one_line(error)}", file=sys.stderr)
        return ours, [math.nan] * len(ours)


def within(ours: float, plain: float, floor: float) -> bool:
    return math.isfinite(ours) and (not math.isfinite(plain) or ours <= max(2 * plain, floor))


def compared(problem: Problem, dtype: torch.dtype) -> dict:
    ours, plain = errors(problem, problem.inputs(dtype))
    low = dtype != torch.float32
    floors = [torch.finfo(dtype).eps if low else LIMIT_FORWARD]
    floors += [torch.finfo(dtype).eps if low else LIMIT_BACKWARD] * (len(ours) - 1)
    return {
        "error": f"{ours[0]:.2e}",
        "plain PyTorch": f"{plain[0]:.2e}",
        # max() would pass over a NaN that does not come first.
        "gradients": f"{torch.tensor(ours[1:]).max():.2e}",
        "plain gradients": f"{torch.tensor(plain[1:]).max():.2e}",
        "holds": said(all(map(within, ours, plain, floors))),
    }


def said(holds: bool) -> str:
    return "yes" if holds else "NO"


def at_most(measure: Callable[[], float], limit: float) -> dict:
    """Of a check that has one number."""
    error = measure()
    return {"error": f"{error:.2e}", "holds": said(error <= limit)}


def equal(pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> dict:
    """Of a check to the bit."""
    wrong = [relative(got, want) for got, want in pairs() if not torch.equal(got, want)]
    return {"error": f"{max(wrong, default=0.0):.2e}", "holds": said(not wrong)}


def every_dtype(name: str, run: Callable[[torch.dtype], dict]) -> Iterator[Case]:
    for label, dtype in DTYPES.items():
        yield Case({"operator": name, "dtype": label}, partial(run, dtype))


def cases_of(problems: Iterator[Problem]) -> Iterator[Case]:
    for problem in problems:
        yield from every_dtype(problem.name, partial(compared, problem))


# ---- problems ------------------------------------------------------------------------------------


def parameters(heads: int, features: int, dim: int, kind: str) -> FeatureParams:
    beta = torch.rand(heads, device=DEVICE) / 2 if kind == "exp" else None
    omega = torch.randn(heads, features, dim, device=DEVICE)
    return FeatureParams(omega, torch.randn(heads, features, device=DEVICE) / 2, beta, kind)


def of_map(heads: int, features: int, dim: int, kind: str) -> FeatureParams:
    """Features that float16 can hold."""
    params = parameters(heads, features, dim, kind)
    return params._replace(omega=params.omega / 2)


def both_parameters(
    features: int, dim: int, kind: str = "exp"
) -> tuple[FeatureParams, FeatureParams] | tuple[None, None]:
    """Of queries and keys; without features none."""
    if features == 0:
        return None, None
    return parameters(HEADS, features, dim, kind), parameters(KV_HEADS, features, dim, kind)


def trainable(params: FeatureParams) -> list[Tensor]:
    return [x for x in params[:3] if x is not None]


def with_tensors(params: FeatureParams, tensors: list[Tensor]) -> FeatureParams:
    """Those of `trainable` in the place of what params has."""
    tensors = iter(tensors)
    return FeatureParams(*(x if x is None else next(tensors) for x in params[:3]), params.kind)


def near_keys(window: int, sinks: int, cache_size: int | tuple[int, ...] = 0) -> dict:
    return {"window": window, "sinks": sinks, "cache_size": cache_size}


def described(options: dict) -> str:
    hard = f", {options['cache_size']} hard keys" if options["cache_size"] else ""
    return f"window {options['window']}, sinks {options['sinks']}{hard}"


def with_hard_keys(q: Tensor, k: Tensor, v: Tensor, options: dict, cu_seqlens=None) -> dict:
    """The options, and the oracle's choice in float64: a tie must not look like an error."""
    if not options["cache_size"]:
        return options
    wide = (x.detach().double() for x in (q, k, v))
    chosen = reference.choose_hard_keys(
        *wide, scale=q.shape[-1] ** -0.5, cu_seqlens=cu_seqlens, **options
    )
    return options | {"hard_keys": chosen}


def random_qkv(dtype: torch.dtype, batch: int, tokens: int, dim: int) -> list[Tensor]:
    # q as a model leaves it: heads inside.
    q = torch.randn(batch, tokens, HEADS, dim, device=DEVICE, dtype=dtype).transpose(1, 2)
    kv = (batch, KV_HEADS, tokens, dim)
    return [q, *(torch.randn(kv, device=DEVICE, dtype=dtype) for _ in "kv")]


def rates(batch: int, tokens: int) -> Tensor:
    return -torch.rand(batch, KV_HEADS, tokens, device=DEVICE) / 10


def attention_problem(
    name: str,
    *,
    kind: str = "exp",
    dim: int = 64,
    features: int = 96,
    near: tuple = (0, 0),
    log_decay: Tensor | None = None,
    batch: int = 2,
    tokens: int = 300,
    grows: bool = False,
    trained: bool = False,
    **options,
) -> Problem:
    """kernelized_attention; grows: keys whose length does, far beyond what a chunk's maxima take;
    trained: gradients of parameters and of log_decay too."""
    fq, fk = both_parameters(features, dim, kind)
    if grows and features:
        fq, fk = fq._replace(beta=None), fk._replace(beta=None)
    near_options = near_keys(*near)
    count = len(trainable(fq)) if features else 0

    def inputs(dtype):
        q, k, v = random_qkv(dtype, batch, tokens, dim)
        if grows:
            k = k * torch.linspace(1, 40, tokens, device=DEVICE, dtype=dtype)[:, None]
        if not trained:
            return [q, k, v]
        return [
            q,
            k,
            v,
            *trainable(fq),
            *trainable(fk),
            *([] if log_decay is None else [log_decay]),
        ]

    def call(function, cast, q, k, v, *more):
        maps, decay = (fq, fk), log_decay
        if more:
            maps = with_tensors(fq, more[:count]), with_tensors(fk, more[count : 2 * count])
            decay = more[2 * count] if log_decay is not None else None
        if cast and decay is not None:
            decay = decay.to(q.dtype)
        kept = with_hard_keys(q, k, v, near_options, options.get("cu_seqlens"))
        return function(q, k, v, *maps, log_decay=decay, **kept, **options)

    return Problem(
        name,
        partial(call, dijiang.ops.kernelized_attention, False),
        partial(call, reference.kernelized_attention, True),
        inputs,
    )


def linear_problem(log_decay: Tensor | None, suffix: str) -> Problem:
    def inputs(dtype):
        q, k, v = random_qkv(dtype, 2, 300, 64)
        return [q.abs(), k.abs(), v]

    def oracle(q, k, v):
        decay = None if log_decay is None else log_decay.to(q.dtype)
        return reference.causal_linear_attention(q, k, v, log_decay=decay)

    op = partial(dijiang.ops.causal_linear_attention, log_decay=log_decay)
    return Problem("causal_linear_attention" + suffix, op, oracle, inputs)


def map_problems() -> Iterator[Problem]:
    for n, kind in itertools.product((8, 64, 96, 256, 1000, 2048, 8192), (2, 3)):
        yield Problem(
            f"dct type {kind}, n {n}",
            partial(dijiang.ops.dct, type=kind),
            partial(reference.dct, type=kind),
            lambda dtype, n=n: [torch.randn(2, 3, 50, n, device=DEVICE, dtype=dtype)],
        )
    sizes = ((96, 64), (256, 128), (64, 256), (60, 20))  # the last is of no whole pieces
    for kind, (features, dim) in itertools.product(("exp", "softmax", "elu"), sizes):
        params = of_map(3, features, dim, kind)

        def inputs(dtype, params=params, dim=dim):
            return [torch.randn(2, 3, 50, dim, device=DEVICE, dtype=dtype), *trainable(params)]

        def call(function, x, *more, params=params):
            return function(x, with_tensors(params, more), scale=0.125)

        yield Problem(
            f"feature_map {kind}, {dim} x {features}, trained",
            partial(call, dijiang.ops.feature_map),
            partial(call, reference.feature_map),
            inputs,
        )


def attention_problems() -> Iterator[Problem]:
    for log_decay, suffix in ((None, ""), (rates(2, 300), ", decay")):
        yield linear_problem(log_decay, suffix)
        for kind in ("exp", "softmax", "elu"):
            for near in ((0, 0), (16, 4), (64, 4), (100, 0), (16, 4, 24), (64, 0, 70)):
                name = f"kernelized_attention {kind}, {described(near_keys(*near))}{suffix}"
                yield attention_problem(name, kind=kind, near=near, log_decay=log_decay)


def far_problems() -> Iterator[Problem]:
    """Sizes that the fused forward takes; those in bfloat16 also the backward."""
    decay = rates(2, 700)
    for kind, dim, features, log_decay, more in (
        ("exp", 64, 64, None, {}),
        ("exp", 64, 64, decay, {}),
        ("softmax", 64, 64, None, {}),
        ("elu", 64, 64, decay, {}),
        ("exp", 128, 128, None, {}),
        ("exp", 128, 64, decay, {}),
        ("exp", 64, 64, None, {"grows": True}),
        ("exp", 64, 64, decay, {"grows": True}),
        ("softmax", 80, 80, decay, {}),
        ("exp", 96, 40, None, {}),
        ("softmax", 64, 64, None, {"trained": True}),
        ("elu", 128, 64, decay, {"trained": True}),
        ("softmax", 80, 40, decay, {"trained": True}),
        # More features than a tile has, and headdim beyond 128.
        ("exp", 64, 256, None, {"trained": True}),
        ("elu", 64, 150, decay, {}),
        ("exp", 128, 512, None, {}),
        ("exp", 64, 150, decay, {"grows": True}),
        ("exp", 256, 256, None, {}),
        ("softmax", 256, 64, None, {"trained": True}),
    ):
        suffix = "".join(
            [", decay"] * (log_decay is not None)
            + [", growing keys"] * ("grows" in more)
            + [", trained"] * ("trained" in more)
        )
        name = f"far keys alone, {kind}, {dim} x {features}{suffix}, {path()}"
        yield attention_problem(
            name, kind=kind, dim=dim, features=features, log_decay=log_decay, tokens=700, **more
        )
    ends = torch.tensor([0, 1, 200, 200, 263, 700], dtype=torch.int32, device=DEVICE)
    name = f"far keys alone, packed sequences, {path()}"
    yield attention_problem(name, features=64, batch=1, tokens=700, cu_seqlens=ends)


def near_problems() -> Iterator[Problem]:
    """No far keys, sizes that the fused near forward and backward take."""
    for dim, near, options in (
        (64, (64, 4), {}),
        (64, (64, 4, 64), {}),
        (64, (64, 4, 256), {}),
        (128, (64, 4, 64), {}),
        (128, (60, 4), {}),
        (80, (64, 4, 64), {}),
        (32, (16, 4), {}),
        (256, (64, 4, 64), {}),
        (64, (16, 70), {}),
        (64, (100, 0), {}),
        (64, (0, 70), {}),
        (64, (16, 4, (96, 0)), {}),
        (64, (64, 4), {"grows": True}),
        (64, (64, 4), {"eps": 0.5}),
        (64, (64, 4), {"normalize": False}),
    ):
        suffix = "".join(f", {name}={value}" for name, value in options.items())
        name = f"near keys alone, headdim {dim}, {described(near_keys(*near))}{suffix}, {path()}"
        yield attention_problem(name, dim=dim, features=0, near=near, tokens=700, **options)
    for near in ((64, 4), (16, 4, 24)):
        ends = torch.tensor([0, 1, 200, 263, 700], dtype=torch.int32, device=DEVICE)
        name = f"near keys alone, packed sequences, {described(near_keys(*near))}, {path()}"
        yield attention_problem(name, features=0, near=near, batch=1, tokens=700, cu_seqlens=ends)


def mixed_problems() -> Iterator[Problem]:
    """Far keys beside near ones, sizes that the fused mixed forward and backward take."""
    decay = rates(2, 700)
    for kind, dim, features, near, options in (
        ("exp", 64, 64, (64, 4), {}),
        ("exp", 64, 64, (64, 4, 64), {}),
        ("exp", 64, 64, (64, 4), {"log_decay": decay}),
        ("softmax", 64, 64, (64, 4, 64), {"log_decay": decay}),
        ("elu", 64, 64, (64, 70), {}),
        ("exp", 128, 64, (64, 4, 64), {}),
        ("exp", 128, 128, (64, 4), {}),
        ("softmax", 80, 80, (64, 4, 64), {}),
        ("elu", 96, 40, (64, 4), {"log_decay": decay}),
        ("exp", 64, 64, (100, 0), {"log_decay": decay}),
        ("exp", 64, 64, (16, 4, (96, 0)), {}),
        ("exp", 64, 64, (64, 4), {"grows": True}),
        ("softmax", 64, 64, (64, 4), {"normalize": False}),
        ("softmax", 64, 64, (64, 4), {"trained": True}),
        ("exp", 128, 128, (64, 4, 64), {"trained": True, "log_decay": decay}),
        ("softmax", 80, 80, (64, 4), {"trained": True, "log_decay": decay}),
        ("exp", 64, 256, (64, 4, 64), {"trained": True}),
        ("elu", 128, 150, (64, 4), {"log_decay": decay}),
        ("exp", 256, 256, (64, 4, 64), {}),
    ):
        suffix = "".join(f", {name}" for name in options)
        sizes = f"{kind}, {dim} x {features}"
        name = f"far beside near, {sizes}, {described(near_keys(*near))}{suffix}, {path()}"
        yield attention_problem(
            name, kind=kind, dim=dim, features=features, near=near, tokens=700, **options
        )
    for near in ((64, 4), (16, 4, 24)):
        ends = torch.tensor([0, 1, 200, 263, 700], dtype=torch.int32, device=DEVICE)
        name = f"far beside near, packed sequences, {described(near_keys(*near))}, {path()}"
        yield attention_problem(name, features=64, near=near, batch=1, tokens=700, cu_seqlens=ends)


def more_problems() -> Iterator[Problem]:
    """What the other groups do not vary, the most important first."""
    decay = rates(2, 300)
    yield attention_problem("headdim 128, window 64, sinks 4", dim=128, features=128, near=(64, 4))
    yield attention_problem("headdim 80", dim=80)
    yield attention_problem("headdim 80, window 16, sinks 4", dim=80, near=(16, 4))
    yield attention_problem("growing keys", grows=True)
    yield attention_problem("growing keys, decay", grows=True, log_decay=decay)
    # With a window: without near keys the gradient of the queries' beta is exactly 0.
    for kind in ("exp", "softmax"):
        yield attention_problem(
            f"trained, {kind}, decay", kind=kind, near=(16, 4), log_decay=decay, trained=True
        )
    for near in ((0, 0), (16, 4), (16, 4, 24)):
        # The reference chooses no hard keys of an empty sequence.
        ends = [0, 1, 120, *([] if len(near) == 3 else [120]), 163, 300]
        ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        name = f"packed sequences, {described(near_keys(*near))}"
        yield attention_problem(name, near=near, batch=1, cu_seqlens=ends)
    for near in ((0, 0), (16, 4)):
        name = f"normalize=False, {described(near_keys(*near))}"
        yield attention_problem(name, kind="softmax", near=near, normalize=False)
    name = f"hard keys by head, {described(near_keys(16, 4, (16, 0)))}"
    yield attention_problem(name, near=(16, 4, (16, 0)))


def path() -> str:
    """Which kernels this process takes where the fused ones apply."""
    return "other kernels" if os.environ.get("DIJIANG_CUDA_FUSED") == "0" else "fused kernels"


# ---- checks of another kind ----------------------------------------------------------------------


class Decoder:
    """A problem, and its tokens one by one from a position on."""

    def __init__(self, dtype: torch.dtype, near: tuple, decay: bool, tokens: int = 200):
        self.q, self.k, self.v = random_qkv(dtype, 2, tokens, 64)
        self.maps = parameters(HEADS, 96, 64, "exp"), parameters(KV_HEADS, 96, 64, "exp")
        self.log_decay = rates(2, tokens) if decay else None
        self.options = near_keys(*near)

    def decay(self, begin: int, end: int) -> Tensor | None:
        return None if self.log_decay is None else self.log_decay[:, :, begin:end]

    def whole(self) -> Tensor:
        return dijiang.ops.kernelized_attention(
            self.q, self.k, self.v, *self.maps, log_decay=self.log_decay, **self.options
        )

    def state_after(self, tokens: int):
        head = [x[:, :, :tokens] for x in (self.q, self.k, self.v)]
        start = dijiang.ops.empty_attention_state(
            2, KV_HEADS, 96, 64, 64, dtype=self.q.dtype, device=DEVICE,
            decay=self.log_decay is not None, **self.options,
        )  # fmt: skip
        return dijiang.ops.kernelized_attention(
            *head, *self.maps, initial_state=start, return_state=True,
            log_decay=self.decay(0, tokens), **self.options,
        )[1]  # fmt: skip

    def token(self, t: int) -> list[Tensor]:
        return [x[:, :, t : t + 1] for x in (self.q, self.k, self.v)]

    def update(self, q: Tensor, k: Tensor, v: Tensor, state, log_decay: Tensor | None) -> Tensor:
        return dijiang.ops.kernelized_attention_update(
            q, k, v, state, *self.maps, log_decay=log_decay, **self.options
        )


def decoding(near: tuple, decay: bool, dtype: torch.dtype) -> dict:
    """Token by token against the same tokens in one call, both on the GPU."""

    def error():
        decoder = Decoder(dtype, near, decay)
        state = decoder.state_after(130)
        steps = [
            decoder.update(*decoder.token(t), state, decoder.decay(t, t + 1))
            for t in range(130, 200)
        ]
        return relative(torch.cat(steps, 2), decoder.whole()[:, :, 130:])

    # Two roundings to the dtype apart at most.
    return at_most(error, max(4 * torch.finfo(dtype).eps, LIMIT_FORWARD))


def replayed(near: tuple, dtype: torch.dtype) -> dict:
    """Updates from a captured CUDA graph against eager ones."""

    def pairs():
        decoder = Decoder(dtype, near, False)
        eager, state = decoder.state_after(130), decoder.state_after(130)
        wanted = [decoder.update(*decoder.token(t), eager, None) for t in range(130, 200)]
        token = [x.clone() for x in decoder.token(130)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing runs yet
            out = decoder.update(*token, state, None)
        for t, want in zip(range(130, 200), wanted, strict=True):
            for to, x in zip(token, decoder.token(t), strict=True):
                to.copy_(x)
            graph.replay()
            yield out.clone(), want

    return equal(pairs)


def on_other_stream(near: tuple, features: int, dtype: torch.dtype) -> dict:
    """Inputs arrive late on a stream of their own: who looks on another one sees NaN."""

    def pairs():
        inputs = random_qkv(dtype, 2, 300, 64)
        fq, fk = both_parameters(features, 64)
        call = partial(dijiang.ops.kernelized_attention, **near_keys(*near))
        want = call(*inputs, fq, fk)
        late = [torch.full_like(x, math.nan) for x in inputs]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # some 50 ms
            for to, x in zip(late, inputs, strict=True):
                to.copy_(x)
            got = call(*late, fq, fk)
        stream.synchronize()
        yield got, want

    return equal(pairs)


def causality(near: tuple, features: int, dtype: torch.dtype) -> dict:
    """Later tokens change, so much that earlier rows go exact: no bit of those may."""

    def pairs():
        inputs = random_qkv(dtype, 2, 300, 64)
        fq, fk = both_parameters(features, 64)
        if features:
            fq, fk = fq._replace(beta=None), fk._replace(beta=None)
        call = partial(dijiang.ops.kernelized_attention, **near_keys(*near))
        want = call(*inputs, fq, fk)
        for t in (1, 37, 150, 299):
            changed = [x.clone() for x in inputs]
            for x in changed:
                x[:, :, t:] = 30 * torch.randn_like(x[:, :, t:])
            yield call(*changed, fq, fk)[:, :, :t], want[:, :, :t]

    return equal(pairs)


def without_elements(dtype: torch.dtype) -> dict:
    """Sizes of 0, whose launches CUDA would refuse."""

    def pairs():
        fq, fk = parameters(HEADS, 96, 64, "exp"), parameters(KV_HEADS, 96, 64, "exp")
        for batch, columns in ((2, 0), (0, 64)):
            q, k, v = random_qkv(dtype, batch, 1, 64)
            q, k, v = leaves(q, k, v[..., :columns])
            for near in ((0, 0), (16, 4)):
                out = dijiang.ops.kernelized_attention(q, k, v, fq, fk, **near_keys(*near))
                yield out, out.new_zeros(batch, HEADS, 1, columns)
                for grad in torch.autograd.grad(out.sum(), (q, k, v)):
                    yield grad, torch.zeros_like(grad)
            options = near_keys(0, 0)  # a window of values without columns is refused
            state = dijiang.ops.empty_attention_state(
                batch, KV_HEADS, 96, 64, columns, dtype=dtype, device=DEVICE, **options
            )
            with torch.no_grad():
                out = dijiang.ops.kernelized_attention_update(q, k, v, state, fq, fk, **options)
            yield out, torch.empty_like(out)

    return equal(pairs)


def choice(near: tuple, dim: int, dtype: torch.dtype) -> dict:
    """Share of the slots, over all blocks, that hold another key than the oracle's."""

    def share():
        tokens = 300
        q, k, v = random_qkv(dtype, 2, tokens, dim)
        options = near_keys(*near)
        _, chosen = dijiang.ops.kernelized_attention(q, k, v, return_hard_keys=True, **options)
        wanted = with_hard_keys(q, k, v, options)["hard_keys"]
        rows = reference.hard_key_rows(q, options["window"])
        blocks = -(-tokens // options["window"])
        used = torch.cat([torch.arange(row, row + blocks) for row in rows[:-1]])
        return (chosen[:, used] != wanted[:, used]).float().mean().item()

    return at_most(share, LIMIT_CHOICE)


FAR_CAUSALITY = (
    ((0, 0), 64),
    ((0, 0), 96),
    ((16, 4), 96),
    ((64, 0), 96),
    ((16, 4, 24), 96),
)
MIXED_CAUSALITY = (((64, 4), 64), ((64, 4, 64), 64), ((16, 70, 24), 64))
NEAR_CAUSALITY = (((64, 4), 0), ((16, 70), 0), ((64, 4, 64), 0))


def causality_cases(problems: tuple) -> Iterator[Case]:
    for near, features in problems:
        name = f"causality, {features} features, {described(near_keys(*near))}, {path()}"
        yield from every_dtype(name, partial(causality, near, features))


def choice_cases() -> Iterator[Case]:
    """Of 16-bit keys the fused choice and the other one; of float32 always the other one."""
    for near, dim in (
        ((16, 4, 24), 64),
        ((64, 0, 70), 64),
        ((8, 9, 3), 64),
        ((16, 4, (90, 0)), 64),
        ((30, 4, 40), 128),
    ):
        name = f"hard keys chosen, headdim {dim}, {described(near_keys(*near))}, {path()}"
        yield from every_dtype(name, partial(choice, near, dim))


def state_cases() -> Iterator[Case]:
    """Updates, graphs, streams, no elements."""
    for near, decay in (
        ((0, 0), False),
        ((16, 4), False),
        ((16, 4), True),
        ((64, 4), False),
        ((16, 4, 24), False),
        ((16, 4, (16, 0)), False),
    ):
        name = f"update, {described(near_keys(*near))}{', decay' * decay}"
        yield from every_dtype(name, partial(decoding, near, decay))
    for near in ((16, 4), (16, 4, 24)):
        name = f"update replayed from a graph, {described(near_keys(*near))}"
        yield from every_dtype(name, partial(replayed, near))
    for near, features in (((0, 0), 64), ((16, 4), 96)):
        name = f"another stream, {features} features, {described(near_keys(*near))}"
        yield from every_dtype(name, partial(on_other_stream, near, features))
    yield from every_dtype("no elements", without_elements)


# ---- timing --------------------------------------------------------------------------------------


def beside_softmax(make: Callable[[], dict[str, Callable]], memory: bool) -> dict:
    """Columns of "dijiang" and "softmax", and how often faster."""
    functions = make()
    times = timed(functions)
    row, failures = {}, []
    for name, function in functions.items():
        if isinstance(times[name], str):
            failures.append(f"{name}: {times[name]}")
            continue
        row[f"{name} ms"] = f"{times[name].median:.4f}"
        row[f"{name} host ms"] = f"{times[name].host:.4f}"
        if memory:
            row[f"{name} MiB"] = f"{peak_memory(function):.0f}"
    if not failures:
        row["softmax / dijiang"] = f"{times['softmax'].median / times['dijiang'].median:.2f}"
    return row | {"failure": "; ".join(failures)}


def long_calls(tokens: int, cache_size: int, train: bool) -> dict[str, Callable]:
    """A whole sequence: 32 query heads of 128, window 64, 4 sinks, 128 features."""
    q, k, v, fq, fk = long_inputs(tokens)
    grad = torch.randn_like(q)

    def ours(q, k, v):
        return dijiang.ops.kernelized_attention(q, k, v, fq, fk, **near_keys(64, 4, cache_size))

    return in_both_ways({"dijiang": ours, "softmax": softmax_attention}, (q, k, v), grad, train)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def in_both_ways(
    functions: dict[str, Callable], inputs: tuple, grad: Tensor, train: bool
) -> dict[str, Callable]:
    """Calls of the functions: forward, or forward and backward."""

    def training(function):
        narrow = leaves(*inputs)
        torch.autograd.grad(function(*narrow), narrow, grad)

    if train:
        return {name: partial(training, function) for name, function in functions.items()}
    return {name: partial(function, *inputs) for name, function in functions.items()}


def window_calls(
    tokens: int, features: int, cache_size: int, given: bool, train: bool, label: str
) -> dict[str, Callable]:
    """As long_calls; given: the choice of hard keys is not timed."""
    q, k, v, *maps = long_inputs(tokens, DTYPES[label], features)
    grad = torch.randn_like(q)
    options = near_keys(64, 4, cache_size)
    if given:
        options["hard_keys"] = dijiang.ops.kernelized_attention(
            q, k, v, return_hard_keys=True, **options
        )[1]

    def ours(q, k, v):
        return dijiang.ops.kernelized_attention(q, k, v, *(maps if features else ()), **options)

    return in_both_ways({"dijiang": ours, "softmax": softmax_attention}, (q, k, v), grad, train)


def long_inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, features: int = 128) -> tuple:
    heads, kv_heads, dim = 32, 8, 128
    tensor = {"device": DEVICE, "dtype": dtype}
    q = torch.randn(1, heads, tokens, dim, **tensor)
    k, v = (torch.randn(1, kv_heads, tokens, dim, **tensor) for _ in "kv")
    maps = (parameters(count, features, dim, "exp") for count in (heads, kv_heads))
    return q, k, v, *maps


def token_calls(tokens: int, captured: bool) -> dict[str, Callable]:
    """One token more, after `tokens` of them where that makes a difference."""
    q, k, v, fq, fk = long_inputs(tokens)
    one = [x[:, :, :1].contiguous() for x in (q, k, v)]
    options = near_keys(64, 4)
    state = dijiang.ops.empty_attention_state(
        1, k.shape[1], 128, 128, 128, device=DEVICE, dtype=q.dtype, **options
    )

    def update():
        dijiang.ops.kernelized_attention_update(*one, state, fq, fk, **options)

    def softmax():
        F.scaled_dot_product_attention(one[0], k, v, enable_gqa=True)

    both = {"dijiang": update, "softmax": softmax}
    return {name: capture(call) for name, call in both.items()} if captured else both


def timing_cases(longest: int) -> Iterator[Case]:
    for tokens in (n for n in (1024, 4096, 16384, 32768, 65536) if n <= longest):
        for what, make, memory in (
            ("forward", partial(long_calls, tokens, 0, False), True),
            ("forward and backward", partial(long_calls, tokens, 0, True), True),
            ("forward, 64 hard keys", partial(long_calls, tokens, 64, False), True),
            ("forward and backward, 64 hard keys", partial(long_calls, tokens, 64, True), True),
            ("one token", partial(token_calls, tokens, False), True),
            ("one token, CUDA graph", partial(token_calls, tokens, True), False),
        ):
            yield Case({"what": what, "tokens": tokens}, partial(beside_softmax, make, memory))


NEAR_TIMINGS = (  # features, dtype, hard keys, given, trained
    (0, "bfloat16", 0, False, False),
    (0, "float16", 0, False, False),
    (0, "bfloat16", 64, False, False),
    (0, "bfloat16", 64, True, False),
    (0, "bfloat16", 256, False, False),
    (0, "bfloat16", 256, True, False),
    (0, "bfloat16", 0, False, True),
)
MIXED_TIMINGS = (
    (64, "bfloat16", 0, False, False),
    (64, "float16", 0, False, False),
    (64, "bfloat16", 64, True, False),
    (64, "bfloat16", 0, False, True),
    (64, "bfloat16", 64, True, True),
    (128, "bfloat16", 0, False, False),
    (128, "bfloat16", 0, False, True),
)


def window_timing_cases(longest: int, timings: tuple) -> Iterator[Case]:
    for tokens in (n for n in (2048, 8192, 32768) if n <= longest):
        for features, label, cache_size, given, train in timings:
            keys = f"far beside near, {features} features" if features else "near keys alone"
            hard = f", {cache_size} hard keys{' given' * given}" if cache_size else ""
            passes = "forward and backward" if train else "forward"
            what = f"{keys}{hard}, {passes}, {label}, {path()}"
            make = partial(window_calls, tokens, features, cache_size, given, train, label)
            yield Case({"what": what, "tokens": tokens}, partial(beside_softmax, make, True))


def time_far(batch: int, heads: int, tokens: int, label: str, train: bool) -> dict:
    """Far keys alone, 64 x 64, against a copy of as many bytes as q, k, v and the output have."""
    tensor = {"device": DEVICE, "dtype": DTYPES[label]}
    q, k, v = (torch.randn(batch, heads, tokens, 64, **tensor) for _ in "qkv")
    fq, fk = (parameters(heads, 64, 64, "exp") for _ in "qk")
    pair = torch.stack((q, k))
    target = torch.empty_like(pair)
    ours = {"ours": lambda q, k, v: dijiang.ops.kernelized_attention(q, k, v, fq, fk)}
    calls = in_both_ways(ours, (q, k, v), torch.randn_like(v), train)
    calls["copy"] = lambda: target.copy_(pair)
    times = timed(calls)
    for failure in (x for x in times.values() if isinstance(x, str)):
        return {"failure": failure}
    call, copy = times["ours"].median, times["copy"].median
    return {
        "ms": f"{call:.4f}",
        "copy ms": f"{copy:.4f}",
        "ns a token and head": f"{1e6 * call / q[..., 0].numel():.3f}",
        "copy / call": f"{copy / call:.2f}",
    }


def far_timing_cases(longest: int) -> Iterator[Case]:
    for (batch, heads), tokens in itertools.product(((1, 32), (16, 32)), (2048, 8192, 32768)):
        if tokens > longest or batch * tokens > 65536:
            continue
        for label, train in (("bfloat16", False), ("float16", False), ("bfloat16", True)):
            passes = "forward and backward" if train else "forward"
            what = f"far keys alone, {passes}, {batch} x {heads} heads, {label}"
            head = {"what": what, "path": path(), "tokens": tokens}
            yield Case(head, partial(time_far, batch, heads, tokens, label, train))


# ---- a few small cases, once ---------------------------------------------------------------------


def attended(
    dtype: torch.dtype, near: tuple, dim: int, features: int, kind: str = "exp", **options
) -> list[Tensor]:
    """kernelized_attention's output and gradients, a few chunks long."""
    q, k, v = leaves(*random_qkv(dtype, 1, 150, dim))
    maps = both_parameters(features, dim, kind)
    out = dijiang.ops.kernelized_attention(q, k, v, *maps, **near_keys(*near), **options)
    return [out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out))]


def updated(dtype: torch.dtype, near: tuple) -> list[Tensor]:
    """Tokens one by one, through the end of a block."""
    decoder = Decoder(dtype, near, True, tokens=70)
    state = decoder.state_after(60)
    return [
        decoder.update(*decoder.token(t), state, decoder.decay(t, t + 1)) for t in range(60, 70)
    ]


def mapped(dtype: torch.dtype) -> list[Tensor]:
    (x,) = leaves(torch.randn(1, 3, 50, 64, dtype=dtype, device=DEVICE))
    out = dijiang.ops.feature_map(x, of_map(3, 96, 64, "exp"), scale=0.125)
    found = [out, *torch.autograd.grad(out.sum(), x)]
    return [*found, *(dijiang.ops.dct(x, type=kind).detach() for kind in (2, 3))]


def smoke_cases() -> Iterator[tuple[str, Callable[[torch.dtype], list[Tensor]]]]:
    """Of each group; 16 bits take the fused kernels, float32 the others."""
    ends = torch.tensor([0, 1, 70, 150], dtype=torch.int32, device=DEVICE)
    yield "maps", mapped
    yield "far keys alone", partial(attended, near=(0, 0), dim=64, features=64)
    yield (
        "far keys alone, decay",
        partial(
            attended, near=(0, 0), dim=80, features=40, kind="softmax", log_decay=rates(1, 150)
        ),
    )
    yield "near keys alone", partial(attended, near=(64, 4), dim=64, features=0)
    yield "hard keys", partial(attended, near=(16, 4, 24), dim=64, features=0)
    yield "far beside near", partial(attended, near=(64, 4), dim=64, features=64)
    yield (
        "far beside near, hard keys, packed",
        partial(attended, near=(16, 4, 24), dim=128, features=64, cu_seqlens=ends),
    )
    yield "updates", partial(updated, near=(16, 4, 24))


def smoke() -> int:
    """Each case once in this process, against nothing: what a sanitizer watches. Exit status."""
    wrong = 0
    for (name, run), (label, dtype) in itertools.product(
        smoke_cases(), (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    ):
        torch.manual_seed(0)
        try:
            sound = all(bool(x.isfinite().all()) for x in run(dtype))
            text = "ran" if sound else "FAILED: not finite"
        except Exception as error:
            sound, text = False, f"FAILED: {one_line(error)}"
        wrong += not sound
        print(f"{name}, {label}: {text}", flush=True)
    return 1 if wrong else 0


# ---- groups of cases, each in processes of its own -----------------------------------------------


def far_cases(_args) -> Iterator[Case]:
    return itertools.chain(cases_of(far_problems()), causality_cases(FAR_CAUSALITY))


def mixed_cases(_args) -> Iterator[Case]:
    return itertools.chain(cases_of(mixed_problems()), causality_cases(MIXED_CAUSALITY))


def near_timings(args) -> Iterator[Case]:
    return window_timing_cases(args.longest, NEAR_TIMINGS)


def mixed_timings(args) -> Iterator[Case]:
    return window_timing_cases(args.longest, MIXED_TIMINGS)


def near_cases(_args) -> Iterator[Case]:
    return itertools.chain(
        cases_of(near_problems()), causality_cases(NEAR_CAUSALITY), choice_cases()
    )


GROUPS = {  # in the order of their running
    "maps": Group(CHECKS, lambda _: cases_of(map_problems()), 60),
    "far": Group(CHECKS, far_cases, 90),
    "near": Group(CHECKS, near_cases, 90),
    "mixed": Group(CHECKS, mixed_cases, 90),
    "more": Group(CHECKS, lambda _: cases_of(more_problems()), 90),
    "states": Group(CHECKS, lambda _: state_cases(), 90),
    "attention": Group(CHECKS, lambda _: cases_of(attention_problems()), 120),
    "far, other kernels": Group(CHECKS, far_cases, 90, fused=False),
    "near, other kernels": Group(CHECKS, near_cases, 90, fused=False),
    "mixed, other kernels": Group(CHECKS, mixed_cases, 90, fused=False),
    "timing, mixed": Group(TIMINGS, mixed_timings, 60),
    "timing, near": Group(TIMINGS, near_timings, 60),
    "timing, far": Group(FAR_TIMINGS, lambda args: far_timing_cases(args.longest), 60),
    "timing": Group(TIMINGS, lambda args: timing_cases(args.longest), 150),
    "timing, far, other kernels": Group(
        FAR_TIMINGS, lambda args: far_timing_cases(args.longest), 60, fused=False
    ),
    "timing, mixed, other kernels": Group(TIMINGS, mixed_timings, 60, fused=False),
    "timing, near, other kernels": Group(TIMINGS, near_timings, 60, fused=False),
}


def failed(row: dict[str, str]) -> bool:
    """Wrong, or without a result; that softmax attention has none is no fault of ours."""
    if "holds" in row:
        return row["holds"] != "yes"
    text = row.get("failure") or ""
    return bool(text) and not text.startswith("softmax:")


def failure(file: str, text: str) -> dict:
    return {"failure": text} | ({"holds": "NO"} if file == CHECKS else {})


SUITE = Suite(
    script=__file__,
    columns=COLUMNS,
    groups=GROUPS,
    options=lambda args: ["--longest", str(args.longest)],
    failed=failed,
    failure=failure,
    header=lambda: f"{torch.cuda.get_device_name()}, {machine()}",
)


def show(path: Path) -> None:
    columns, rows = COLUMNS[path.name], rows_of(path)
    print(table(list(columns), [[row[name] for name in columns] for row in rows]), end="\n\n")


def summary(files: list[Path]) -> int:
    """How many cases failed, and which."""
    rows = [row for path in files for row in rows_of(path)]
    wrong = [row for row in rows if failed(row)]
    for row in wrong:
        print("FAILED " + ", ".join(value for value in row.values() if value))
    for name in GROUPS:
        of_group = [row for row in rows if row["group"] == name]
        if of_group:
            print(f"{name}: {sum(map(failed, of_group))} of {len(of_group)} failed")
    print(f"{len(wrong)} of {len(rows)} cases FAILED" if wrong else "all operators hold")
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-timing", action="store_true", help="correctness alone")
    parts.add_argument("--only-timing", action="store_true", help="timings alone")
    parts.add_argument("--smoke", action="store_true", help="a few small cases, for a sanitizer")
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the longest timing")
    parser.add_argument("--seconds", type=float, default=450, help="for all groups together")
    parser.add_argument("--only", choices=GROUPS, help="this group alone, in this process")
    parser.add_argument("--skip", type=int, default=0, help="cases of --only that are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_check*.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "gpu_check: no CUDA device is visible to torch. This script measures a GPU; run it "
            "where torch.cuda.is_available() is true."
        )
    # What is compared against must not use tf32 behind its back.
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.smoke:
        return smoke()
    if args.only:
        return SUITE.run_here(args.only, args)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    left_out = {"no_timing": (TIMINGS, FAR_TIMINGS), "only_timing": (CHECKS,)}
    left_out = [file for name, files in left_out.items() if getattr(args, name) for file in files]
    names = [name for name, group in GROUPS.items() if group.file not in left_out]
    files = list(dict.fromkeys(args.out / GROUPS[name].file for name in names))
    for path in files:
        SUITE.start(path)
    end = time.monotonic() + args.seconds
    for name in names:
        print(name, file=sys.stderr, flush=True)
        SUITE.run_apart(name, args, end)
    for path in files:
        show(path)
    return 1 if summary(files) else 0


if __name__ == "__main__":
    sys.exit(main())
