"""Attention on the CPU: ours, softmax and plain PyTorch, forward, backward and decoding.

    python benchmarks/cpu.py                # about five minutes; benchmarks/results/cpu.{csv,png}
    python benchmarks/cpu.py --quick --out /some/folder

The shape is one layer of SmolLM2-135M: 9 query heads over 3 key/value heads of 64, batch 1. The
others get their keys and values repeated for all query heads before the clock starts.
"""

from __future__ import annotations

import sys

import formulas
import torch
import torch.nn.functional as F
from common import arguments, interleaved, table, write
from dijiang import ops, plots
from torch import Tensor

HEADS, KV_HEADS, HEADDIM, FEATURES, WINDOW, SINKS = 9, 3, 64, 64, 64, 4

HYBRID = "dijiang, window 64 + 4 sinks + linear"
LINEAR = "dijiang, linear"
SDPA = "torch scaled_dot_product_attention"
PUBLISHED = "linear, T x T (plain PyTorch)"
CHUNKED = "linear, chunked (plain PyTorch)"


def parameters() -> tuple[ops.FeatureParams, ops.FeatureParams, Tensor]:
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(HEADS, FEATURES, HEADDIM, generator=generator) / 8
    return (
        ops.FeatureParams(omega, None, None),
        ops.FeatureParams(omega[:KV_HEADS], None, None),
        omega,
    )


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, length, HEADDIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def forms(length: int, *, published: bool) -> dict:
    """name -> (function of its inputs, its inputs)."""
    fq, fk, omega = parameters()
    ours = inputs(length)
    repeated = tuple(formulas.repeat_heads(x, HEADS) for x in ours)

    def hybrid(q, k, v):
        return ops.kernelized_attention(q, k, v, fq, fk, window=WINDOW, sinks=SINKS)

    def linear(q, k, v):
        return ops.kernelized_attention(q, k, v, fq, fk)

    def softmax(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    out = {HYBRID: (hybrid, ours), LINEAR: (linear, ours), SDPA: (softmax, repeated)}
    if published:
        out[PUBLISHED] = (lambda q, k, v: formulas.linear_quadratic(q, k, v, omega), repeated)
    out[CHUNKED] = (lambda q, k, v: formulas.linear_chunked(q, k, v, omega), repeated)
    return out


def forward(length: int) -> dict:
    def call(function, tensors):
        def run():
            with torch.inference_mode():
                function(*tensors)

        return run

    return {name: call(*form) for name, form in forms(length, published=True).items()}


def forward_backward(length: int) -> dict:
    def call(function, tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]

        def run():
            out = function(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    # The T x T formula keeps several T x T matrices a head for its backward: 10 GiB at 8192.
    published = length <= 4096
    return {name: call(*form) for name, form in forms(length, published=published).items()}


def decode(length: int) -> dict:
    """One token behind a context of `length`."""
    fq, fk, omega = parameters()
    q, k, v = inputs(length)
    with torch.inference_mode():
        states = {}
        for name, near in ((HYBRID, {"window": WINDOW, "sinks": SINKS}), (LINEAR, {})):
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
        HYBRID: ours(HYBRID, window=WINDOW, sinks=SINKS),
        LINEAR: ours(LINEAR),
        SDPA: softmax,
        CHUNKED: step,
    }


def main() -> int:
    args = arguments(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    lengths = (128, 256) if args.quick else (512, 2048, 8192)
    seconds = 0.01 if args.quick else 1.0
    rows = []
    for kind, make in (
        ("forward", forward),
        ("forward+backward", forward_backward),
        ("decode", decode),
    ):
        for length in lengths:
            timings = interleaved(make(length), seconds=seconds)
            for name, timing in timings.items():
                rows.append(
                    {
                        "kind": kind,
                        "tokens": length,
                        "form": name,
                        "median_ms": f"{1e3 * timing.median:.5g}",
                        "p10_ms": f"{1e3 * timing.low:.5g}",
                        "p90_ms": f"{1e3 * timing.high:.5g}",
                        "calls": timing.calls,
                        "sdpa_ratio": f"{timings[SDPA].median / timing.median:.3g}",
                    }
                )
                print(f"{kind:17} {length:6} {name:42} {1e3 * timing.median:10.3f} ms", flush=True)
    write(rows, args.out / "cpu.csv")
    print()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    for kind, name in (
        ("forward", "forward"),
        ("forward+backward", "backward"),
        ("decode", "decode"),
    ):
        series: dict[str, list] = {}
        for row in rows:
            if row["kind"] == kind:
                series.setdefault(row["form"], []).append((row["tokens"], float(row["median_ms"])))
        plots.lines(
            series,
            args.out / f"cpu_{name}.png",
            title=f"{kind}, one layer of SmolLM2-135M, {args.threads} threads",
            xlabel="tokens" if kind != "decode" else "context (tokens)",
            ylabel="time (ms), lower is better",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
