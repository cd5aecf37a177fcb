"""Attention on the CPU: ours, softmax and other linear kernels; forward, backward and decoding.

    python benchmarks/cpu.py                # four minutes; benchmarks/results/cpu.csv, cpu_*.png
    python benchmarks/cpu.py --quick --out /some/folder

The shape is one layer of SmolLM2-135M: 9 query heads over 3 key/value heads of 64, batch 1. The
others get their keys and values repeated for all query heads before the clock starts. Then the
same with one thread and with all, with bfloat16 inputs, and against the machine's own limits.
fast-transformers' kernel is compared with where it is installed (see rivals.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import floor
import formulas
import rivals
import torch
import torch.nn.functional as F
from common import Timing, arguments, interleaved, table, write
from dijiang import ops, plots
from dijiang.features import FeatureMap
from torch import Tensor

HEADS, KV_HEADS, HEADDIM, FEATURES, WINDOW, SINKS = 9, 3, 64, 64, 64, 4
NEAR = {"window": WINDOW, "sinks": SINKS}

HYBRID = "dijiang, window 64 + 4 sinks + linear"
LEARNED = "dijiang, window 64 + 4 sinks + learned_pm"
LINEAR = "dijiang, linear"
WDCF = "dijiang, linear, wdcf"
BFLOAT16 = "dijiang, linear, bfloat16"
GIVEN = "dijiang, features given"
SDPA = "torch scaled_dot_product_attention"
PUBLISHED = "linear, T x T (plain PyTorch)"
CHUNKED = "linear, chunked (plain PyTorch)"
FAST = "fast-transformers, features given"
FORMS = (HYBRID, LEARNED, LINEAR, WDCF, GIVEN, SDPA, PUBLISHED, CHUNKED, FAST)
FAST_PACKAGE = "pytorch-fast-transformers"

FORWARD, BACKWARD, DECODE = "forward", "forward+backward", "decode"
FORWARD_THREADS, BACKWARD_THREADS = "forward by threads", "forward+backward by threads"
DTYPES = "forward by dtype"


class Case(NamedTuple):
    """What is timed in one group of calls, which take turns."""

    form: str
    threads: int


def parameters() -> tuple[ops.FeatureParams, ops.FeatureParams, Tensor]:
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(HEADS, FEATURES, HEADDIM, generator=generator) / 8
    return (
        ops.FeatureParams(omega, None, None),
        ops.FeatureParams(omega[:KV_HEADS], None, None),
        omega,
    )


@torch.no_grad()
def map_parameters(name: str) -> tuple[ops.FeatureParams, ops.FeatureParams]:
    """Of queries and keys: learned_pm with 128 features, omega = [w, -w]; wdcf, the paper's, with
    64, whose omega is rows of the DCT times frequencies."""
    m = 2 * HEADDIM if name == "learned_pm" else HEADDIM
    features = FeatureMap(name, heads=KV_HEADS, headdim=HEADDIM, num_features=m)
    return features.params(HEADS // KV_HEADS), features.params()


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, length, HEADDIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def attention(fq: ops.FeatureParams, fk: ops.FeatureParams, **near) -> Callable:
    """Ours as a function of q, k and v."""
    return lambda q, k, v: ops.kernelized_attention(q, k, v, fq, fk, **near)


def forms(length: int, *, published: bool) -> dict:
    """name -> (function of its inputs, its inputs)."""
    fq, fk, omega = parameters()
    ours = q, k, v = inputs(length)
    repeated = tuple(formulas.repeat_heads(x, HEADS) for x in ours)
    given = (formulas.features(q, omega), formulas.features(k, omega[:KV_HEADS]), v)

    def softmax(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    out = {
        HYBRID: (attention(fq, fk, **NEAR), ours),
        LEARNED: (attention(*map_parameters("learned_pm"), **NEAR), ours),
        LINEAR: (attention(fq, fk), ours),
        WDCF: (attention(*map_parameters("wdcf")), ours),
        GIVEN: (ops.causal_linear_attention, given),
        SDPA: (softmax, repeated),
    }
    if published:
        out[PUBLISHED] = (lambda q, k, v: formulas.linear_quadratic(q, k, v, omega), repeated)
    out[CHUNKED] = (lambda q, k, v: formulas.linear_chunked(q, k, v, omega), repeated)
    if product := rivals.find(FAST_PACKAGE):
        whole = tuple(formulas.repeat_heads(x, HEADS) for x in given)
        out[FAST] = (lambda a, b, v: formulas.linear_product(a, b, v, product), whole)
    return out


def forward_call(function: Callable, tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    def run():
        with torch.inference_mode():
            function(*tensors)

    return run


def backward_call(function: Callable, tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in tensors]

    def run():
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def forward(length: int) -> dict:
    return {name: forward_call(*form) for name, form in forms(length, published=True).items()}


def forward_backward(length: int) -> dict:
    # The T x T formula keeps several T x T matrices a head for its backward: 10 GiB at 8192.
    published = length <= 4096
    return {name: backward_call(*x) for name, x in forms(length, published=published).items()}


def decode(length: int) -> dict:
    """One token behind a context of `length`."""
    fq, fk, omega = parameters()
    q, k, v = inputs(length)
    with torch.inference_mode():
        states = {}
        for name, near in ((HYBRID, NEAR), (LINEAR, {})):
            _, states[name] = ops.kernelized_attention(q, k, v, fq, fk, return_state=True, **near)
    keys, values = (formulas.repeat_heads(x, HEADS) for x in (k, v))
    token = [x[:, :, -1:].contiguous() for x in (q, k, v)]
    whole = [formulas.repeat_heads(x, HEADS) for x in token]
    plain = torch.zeros(1, HEADS, FEATURES, HEADDIM + 1)

    def ours(name, **near):
        def run():
            with torch.inference_mode():
                ops.kernelized_attention_update(*token, states[name], fq, fk, **near)

        return run

    def softmax():
        with torch.inference_mode():
            F.scaled_dot_product_attention(whole[0], keys, values)

    def step():
        with torch.inference_mode():
            formulas.linear_step(*whole, omega, plain)

    return {
        HYBRID: ours(HYBRID, **NEAR),
        LINEAR: ours(LINEAR),
        SDPA: softmax,
        CHUNKED: step,
    }


def scaled(length: int, call: Callable) -> dict:
    """Ours alone, as `call` (forward_call or backward_call) makes them."""
    fq, fk, _ = parameters()
    tensors = inputs(length)
    return {
        HYBRID: call(attention(fq, fk, **NEAR), tensors),
        LINEAR: call(attention(fq, fk), tensors),
    }


def dtypes(length: int) -> dict:
    """The forward on the same inputs in float32 and in bfloat16."""
    fq, fk, _ = parameters()
    tensors = inputs(length)
    half = tuple(x.bfloat16() for x in tensors)
    return {
        LINEAR: forward_call(attention(fq, fk), tensors),
        BFLOAT16: forward_call(attention(fq, fk), half),
    }


def groups(
    limits: Mapping[str, floor.Limit], threads: int, *, quick: bool
) -> Iterator[tuple[str, int, dict[Case, Callable]]]:
    """(kind, tokens, what is timed in turns), each made when the one before it is done."""
    lengths = (128, 256) if quick else (512, 2048, 8192)
    longer = lengths[1:]
    machine = {name: limit.call for name, limit in limits.items()}
    one_and_all = sorted({1, threads})

    def with_threads(calls, counts=(threads,)):
        return {Case(name, n): call for name, call in calls.items() for n in counts}

    for length in lengths:
        yield FORWARD, length, with_threads(forward(length) | machine)
    for length in lengths:
        yield BACKWARD, length, with_threads(forward_backward(length))
    for length in lengths:
        yield DECODE, length, with_threads(decode(length))
    for length in longer:
        calls = scaled(length, forward_call) | machine
        yield FORWARD_THREADS, length, with_threads(calls, one_and_all)
    for length in longer:
        yield BACKWARD_THREADS, length, with_threads(scaled(length, backward_call), one_and_all)
    for length in longer:
        yield DTYPES, length, with_threads(dtypes(length))


def use_threads(case: Case) -> None:
    if torch.get_num_threads() != case.threads:  # setting them empties oneDNN's caches
        torch.set_num_threads(case.threads)


def row(kind: str, tokens: int, case: Case, timings: Mapping[Case, Timing], limits) -> dict:
    """One line of the CSV; the last three columns are empty where they say nothing."""
    timing = timings[case]

    def rate(name):
        return limits[name].work / timings[case._replace(form=name)].median

    sdpa = timings.get(case._replace(form=SDPA))
    fraction = ""
    if case.form == LINEAR and case._replace(form=floor.PRODUCT) in timings:
        shape = floor.Shape(HEADS, KV_HEADS, HEADDIM, FEATURES, HEADDIM)
        least = floor.seconds(tokens, shape, rate(floor.PRODUCT), rate(floor.COPY))
        fraction = f"{least / timing.median:.3g}"
    return {
        "kind": kind,
        "tokens": tokens,
        "form": case.form,
        "threads": case.threads,
        "median_ms": f"{1e3 * timing.median:.5g}",
        "p10_ms": f"{1e3 * timing.low:.5g}",
        "p90_ms": f"{1e3 * timing.high:.5g}",
        "calls": timing.calls,
        "sdpa_ratio": f"{sdpa.median / timing.median:.3g}" if sdpa and case.form in FORMS else "",
        "floor_fraction": fraction,
        "rate": f"{rate(case.form) / 1e9:.3g}" if case.form in limits else "",
    }


def draw(rows: list[dict], folder: Path, threads: int) -> None:
    for kind, name in ((FORWARD, "forward"), (BACKWARD, "backward"), (DECODE, "decode")):
        series: dict[str, list] = {}
        for line in rows:
            if line["kind"] == kind and line["form"] in FORMS:
                point = (line["tokens"], float(line["median_ms"]))
                series.setdefault(line["form"], []).append(point)
        plots.lines(
            series,
            folder / f"cpu_{name}.png",
            title=f"{kind}, one layer of SmolLM2-135M, {threads} threads",
            xlabel="tokens" if kind != DECODE else "context (tokens)",
            ylabel="time (ms), lower is better",
        )


def main() -> int:
    args = arguments(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    note = rivals.note([FAST_PACKAGE])
    print(note)
    limits = floor.limits(128, 2**16) if args.quick else floor.limits()
    rows = []
    for kind, tokens, calls in groups(limits, args.threads, quick=args.quick):
        timings = interleaved(calls, seconds=0.01 if args.quick else 1.0, before=use_threads)
        for case, timing in timings.items():
            rows.append(row(kind, tokens, case, timings, limits))
            print(
                f"{kind:27} {tokens:6} {case.form:42} {case.threads:2} threads "
                f"{1e3 * timing.median:10.3f} ms",
                flush=True,
            )
    torch.set_num_threads(args.threads)  # as the first line of the CSV says
    write(rows, args.out / "cpu.csv", note)
    print()
    print(table(list(rows[0]), [list(line.values()) for line in rows]))
    draw(rows, args.out, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
