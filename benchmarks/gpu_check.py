"""The first thing to run on a machine with a GPU: are the CUDA operators right, and how fast?

    python benchmarks/gpu_check.py                 # both; fails (exit 1) if an operator is wrong
    python benchmarks/gpu_check.py --no-timing     # correctness alone

Correctness: every operator and its gradients against the float64 oracles of dijiang.reference, in
float32, bfloat16 and float16. The law: at a low precision the error is at most twice that of the
same formula in plain PyTorch at that precision; in float32 it is at most 1e-5 of the largest value
(2e-5 for gradients).

Timing: forward, forward and backward, and one decoded token, against scaled_dot_product_attention
on the same tensors, call by call in turn, with CUDA events. Results go to gpu_check.csv.

Far keys alone at 16 bits have two forwards (docs/cuda.md): the fused one, and the other, which a
second process with DIJIANG_CUDA_FUSED=0 checks and times on the same problems. Their times stand
beside a copy that moves as many bytes as q, k, v and the output have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dijiang
import torch
import torch.nn.functional as F
from common import RESULTS, table, write
from dijiang import reference
from dijiang.ops import FeatureParams
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMIT_FORWARD, LIMIT_BACKWARD = 1e-5, 2e-5
LIMIT_CHOICE = 0.02  # ties that rounding decides, and what follows from them


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference against the largest value."""
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max().clamp(min=1e-30)).item()


def parameters(heads: int, features: int, dim: int, kind: str) -> FeatureParams:
    beta = torch.rand(heads, device="cuda") / 2 if kind == "exp" else None
    omega = torch.randn(heads, features, dim, device="cuda")
    return FeatureParams(omega, torch.randn(heads, features, device="cuda") / 2, beta, kind)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def errors(op: Callable, oracle: Callable, inputs: list[Tensor]) -> tuple[list[float], list[float]]:
    """Of the output and of each gradient: the operator's error, and plain PyTorch's at its dtype.

    Both get the same inputs; `op` and `oracle` take them as arguments.
    """
    wide = leaves(*(t.double() for t in inputs))
    truth = oracle(*wide)
    seed = torch.randn_like(truth)
    seed = seed.to(inputs[0].dtype).double()
    truths = [truth, *torch.autograd.grad(truth, wide, seed)]

    def measure(function):
        narrow = leaves(*inputs)
        out = function(*narrow)
        grads = torch.autograd.grad(out, narrow, seed.to(out.dtype))
        return [relative(g, t) for g, t in zip([out, *grads], truths, strict=True)]

    return measure(op), measure(oracle)


def near_keys(window: int, sinks: int, cache_size: int = 0) -> dict[str, int]:
    return {"window": window, "sinks": sinks, "cache_size": cache_size}


def described(options: dict[str, int]) -> str:
    hard = f", {options['cache_size']} hard keys" if options["cache_size"] else ""
    return f"window {options['window']}, sinks {options['sinks']}{hard}"


def with_hard_keys(q: Tensor, k: Tensor, v: Tensor, options: dict[str, int]) -> dict:
    """The options, and the oracle's choice in float64: a tie must not look like an error."""
    if not options["cache_size"]:
        return options
    wide = (x.detach().double() for x in (q, k, v))
    table = reference.choose_hard_keys(*wide, scale=q.shape[-1] ** -0.5, **options)
    return options | {"hard_keys": table}


def attention_cases() -> Iterator[tuple[str, Callable, Callable, Callable]]:
    """(name, op, oracle, inputs of a dtype)."""
    batch, heads, kv_heads, tokens, dim = 2, 4, 2, 300, 64

    def qkv(dtype):
        shape = (batch, tokens, heads, dim)  # as a model leaves them: heads inside
        q = torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2)
        k, v = (torch.randn(batch, kv_heads, tokens, dim, device="cuda", dtype=dtype) for _ in "kv")
        return [q, k, v]

    decay = -torch.rand(batch, kv_heads, tokens, device="cuda") / 10
    for log_decay in (None, decay):
        suffix = "" if log_decay is None else ", decay"

        def positive(dtype):
            q, k, v = qkv(dtype)
            return [q.abs(), k.abs(), v]

        def wide_decay(x, log_decay=log_decay):
            return None if log_decay is None else log_decay.to(x.dtype)

        yield (
            "causal_linear_attention" + suffix,
            lambda q, k, v, d=log_decay: dijiang.ops.causal_linear_attention(q, k, v, log_decay=d),
            lambda q, k, v, d=wide_decay: reference.causal_linear_attention(
                q, k, v, log_decay=d(q)
            ),
            positive,
        )
        for kind in ("exp", "softmax", "elu"):
            fq = parameters(heads, 96, dim, kind)
            fk = parameters(kv_heads, 96, dim, kind)
            for near in ((0, 0), (16, 4), (64, 4), (100, 0), (16, 4, 24), (64, 0, 70)):
                options = near_keys(*near)

                def op(q, k, v, fq=fq, fk=fk, options=options, d=log_decay):
                    kept = with_hard_keys(q, k, v, options)
                    return dijiang.ops.kernelized_attention(q, k, v, fq, fk, log_decay=d, **kept)

                def oracle(q, k, v, fq=fq, fk=fk, options=options, d=wide_decay):
                    kept = with_hard_keys(q, k, v, options)
                    return reference.kernelized_attention(q, k, v, fq, fk, log_decay=d(q), **kept)

                name = f"kernelized_attention {kind}, {described(options)}{suffix}"
                yield name, op, oracle, qkv


def far_cases() -> Iterator[tuple[str, Callable, Callable, Callable]]:
    """Sizes that the fused forward takes: (name, op, oracle, inputs of a dtype)."""
    batch, heads, kv_heads, tokens = 2, 4, 2, 700
    rates = -torch.rand(batch, kv_heads, tokens, device="cuda") / 10
    for kind, dim, log_decay in (
        ("exp", 64, None),
        ("exp", 64, rates),
        ("softmax", 64, None),
        ("elu", 64, rates),
        ("exp", 128, None),
    ):
        fq, fk = parameters(heads, dim, dim, kind), parameters(kv_heads, dim, dim, kind)

        def qkv(dtype, dim=dim):
            shape = (batch, tokens, heads, dim)
            q = torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2)
            kv = (batch, kv_heads, tokens, dim)
            return [q, *(torch.randn(kv, device="cuda", dtype=dtype) for _ in "kv")]

        def op(q, k, v, fq=fq, fk=fk, d=log_decay):
            return dijiang.ops.kernelized_attention(q, k, v, fq, fk, log_decay=d)

        def oracle(q, k, v, fq=fq, fk=fk, d=log_decay):
            decay = None if d is None else d.to(q.dtype)
            return reference.kernelized_attention(q, k, v, fq, fk, log_decay=decay)

        decay = "" if log_decay is None else ", decay"
        yield f"far keys alone, {kind}, {dim} x {dim}{decay}, {path()}", op, oracle, qkv


def path() -> str:
    """Which forward this process takes where the fused one applies."""
    return "other forward" if os.environ.get("DIJIANG_CUDA_FUSED") == "0" else "fused forward"


def map_cases() -> Iterator[tuple[str, Callable, Callable, Callable]]:
    for n in (64, 96, 4096):
        for kind in (2, 3):

            def rows(dtype, n=n):
                return [torch.randn(2, 3, 50, n, device="cuda", dtype=dtype)]

            yield (
                f"dct type {kind}, n {n}",
                lambda x, kind=kind: dijiang.ops.dct(x, kind),
                lambda x, kind=kind: reference.dct(x, kind),
                rows,
            )
    for kind in ("exp", "softmax", "elu"):
        params = parameters(3, 96, 64, kind)

        def heads(dtype):
            return [torch.randn(2, 3, 50, 64, device="cuda", dtype=dtype)]

        yield (
            f"feature_map {kind}",
            lambda x, p=params: dijiang.ops.feature_map(x, p, scale=0.125),
            lambda x, p=params: reference.feature_map(x, p, scale=0.125),
            heads,
        )


def decoding_errors(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Token by token against the same tokens in one call, both on the GPU."""
    batch, heads, kv_heads, tokens, dim = 2, 4, 2, 200, 64
    q = torch.randn(batch, heads, tokens, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, device="cuda", dtype=dtype) for _ in "kv")
    fq, fk = parameters(heads, 96, dim, "exp"), parameters(kv_heads, 96, dim, "exp")
    for near in ((0, 0), (16, 4), (64, 4), (16, 4, 24)):
        options = near_keys(*near)
        whole = dijiang.ops.kernelized_attention(q, k, v, fq, fk, **options)
        head = [x[:, :, :130] for x in (q, k, v)]
        start = dijiang.ops.empty_attention_state(
            batch, kv_heads, 96, dim, dim, dtype=dtype, device="cuda", **options
        )
        _, state = dijiang.ops.kernelized_attention(
            *head, fq, fk, initial_state=start, return_state=True, **options
        )
        steps = [
            dijiang.ops.kernelized_attention_update(
                q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state, fq, fk, **options
            )
            for t in range(130, tokens)
        ]
        error = relative(torch.cat(steps, 2), whole[:, :, 130:])
        yield f"kernelized_attention_update, {described(options)}", error


def choice_errors(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Share of the slots, over all blocks, that hold another key than the oracle's."""
    batch, heads, kv_heads, tokens, dim = 2, 4, 2, 300, 64
    q = torch.randn(batch, heads, tokens, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, device="cuda", dtype=dtype) for _ in "kv")
    for near in ((16, 4, 24), (64, 0, 70), (8, 9, 3)):
        options = near_keys(*near)
        _, table = dijiang.ops.kernelized_attention(q, k, v, return_hard_keys=True, **options)
        wanted = with_hard_keys(q, k, v, options)["hard_keys"]
        rows = reference.hard_key_rows(q, options["window"])
        blocks = -(-tokens // options["window"])
        used = torch.cat([torch.arange(row, row + blocks) for row in rows[:-1]])
        different = (table[:, used] != wanted[:, used]).float().mean()
        yield f"hard keys chosen, {described(options)}", different.item()


def check_cases(cases: Iterator[tuple[str, Callable, Callable, Callable]]) -> list[dict]:
    rows = []
    torch.manual_seed(0)
    for name, op, oracle, inputs_of in cases:
        print(f"  {name}", file=sys.stderr)
        for label, dtype in DTYPES.items():
            ours, plain = errors(op, oracle, inputs_of(dtype))
            if dtype == torch.float32:
                holds = ours[0] <= LIMIT_FORWARD and max(ours[1:]) <= LIMIT_BACKWARD
            else:
                holds = all(a <= 2 * b for a, b in zip(ours, plain, strict=True))
            rows.append(
                {
                    "operator": name,
                    "dtype": label,
                    "error": f"{ours[0]:.2e}",
                    "plain PyTorch": f"{plain[0]:.2e}",
                    "gradients": f"{max(ours[1:]):.2e}",
                    "plain gradients": f"{max(plain[1:]):.2e}",
                    "holds": "yes" if holds else "NO",
                }
            )
    return rows


def check() -> list[dict]:
    """Rows of the report."""
    rows = check_cases(itertools.chain(map_cases(), attention_cases(), far_cases()))
    for label, dtype in DTYPES.items():
        for name, error in decoding_errors(dtype):
            # Two roundings to the dtype apart at most.
            holds = error <= max(4 * torch.finfo(dtype).eps, LIMIT_FORWARD)
            rows.append(lone_row(name, label, error, holds))
        for name, error in choice_errors(dtype):
            holds = error <= LIMIT_CHOICE
            rows.append(lone_row(name, label, error, holds))
    return rows


def lone_row(name: str, dtype: str, error: float, holds: bool) -> dict:
    """A row of the report where there is no gradient and nothing to stand beside."""
    row = {"operator": name, "dtype": dtype, "error": f"{error:.2e}"}
    row |= dict.fromkeys(("plain PyTorch", "gradients", "plain gradients"), "")
    return row | {"holds": "yes" if holds else "NO"}


def milliseconds(functions: dict[str, Callable], rounds: int = 20) -> dict[str, float]:
    """Median of CUDA event times, the functions in turn."""
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def time_length(tokens: int) -> list[dict]:
    heads, kv_heads, dim, features = 32, 8, 128, 128
    fq, fk = parameters(heads, features, dim, "exp"), parameters(kv_heads, features, dim, "exp")
    options = near_keys(64, 4)
    tensor = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(1, heads, tokens, dim, **tensor)
    k, v = (torch.randn(1, kv_heads, tokens, dim, **tensor) for _ in "kv")
    grad = torch.randn_like(q)
    one = [x[:, :, :1] for x in (q, k, v)]
    state = dijiang.ops.empty_attention_state(1, kv_heads, features, dim, dim, **options, **tensor)

    def ours(q, k, v):
        return dijiang.ops.kernelized_attention(q, k, v, fq, fk, **options)

    def hard(q, k, v):
        return dijiang.ops.kernelized_attention(q, k, v, fq, fk, **near_keys(64, 4, 64))

    def softmax(q, k, v, causal=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def update():
        dijiang.ops.kernelized_attention_update(*one, state, fq, fk, **options)

    def train(function):
        inputs = leaves(q, k, v)
        torch.autograd.grad(function(*inputs), inputs, grad)

    pairs = {
        "forward": (lambda: ours(q, k, v), lambda: softmax(q, k, v)),
        "forward and backward": (lambda: train(ours), lambda: train(softmax)),
        "forward, 64 hard keys": (lambda: hard(q, k, v), lambda: softmax(q, k, v)),
        "forward and backward, 64 hard keys": (lambda: train(hard), lambda: train(softmax)),
        "one token": (update, lambda: softmax(one[0], k, v, causal=False)),
    }
    rows = []
    for what, (dijiang_call, softmax_call) in pairs.items():
        times = milliseconds({"dijiang": dijiang_call, "softmax": softmax_call})
        rows.append(
            {
                "what": what,
                "tokens": tokens,
                "dijiang ms": f"{times['dijiang']:.3f}",
                "softmax ms": f"{times['softmax']:.3f}",
                "softmax / dijiang": f"{times['softmax'] / times['dijiang']:.2f}",
                "dijiang MiB": f"{peak_memory(dijiang_call):.0f}",
                "softmax MiB": f"{peak_memory(softmax_call):.0f}",
            }
        )
    return rows


def time_far(longest: int) -> list[dict]:
    """The forward of far keys alone, 64 x 64, against a copy of as many bytes."""
    rows = []
    for (batch, heads), tokens in itertools.product(((1, 32), (16, 32)), (2048, 8192, 32768)):
        if tokens > longest or batch * tokens > 65536:
            continue
        for label in ("bfloat16", "float16"):
            tensor = {"device": "cuda", "dtype": DTYPES[label]}
            q, k, v = (torch.randn(batch, heads, tokens, 64, **tensor) for _ in "qkv")
            fq, fk = (parameters(heads, 64, 64, "exp") for _ in "qk")
            pair = torch.stack((q, k))
            target = torch.empty_like(pair)

            def forward(q=q, k=k, v=v, fq=fq, fk=fk):
                dijiang.ops.kernelized_attention(q, k, v, fq, fk)

            def copy(target=target, pair=pair):
                target.copy_(pair)

            times = milliseconds({"forward": forward, "copy": copy})
            rows.append(
                {
                    "what": f"far keys alone, {batch} x {heads} heads, {label}",
                    "path": path(),
                    "tokens": tokens,
                    "ms": f"{times['forward']:.3f}",
                    "copy ms": f"{times['copy']:.3f}",
                    "ns a token and head": f"{1e6 * times['forward'] / q[..., 0].numel():.3f}",
                    "copy / forward": f"{times['copy'] / times['forward']:.2f}",
                }
            )
    return rows


def other_forward(args: argparse.Namespace) -> dict[str, list[dict]]:
    """far_cases and time_far where the fused forward is switched off."""
    command = [sys.executable, __file__, "--far-alone", "--longest", str(args.longest)]
    if args.no_timing:
        command.append("--no-timing")
    environment = os.environ | {"DIJIANG_CUDA_FUSED": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def peak_memory(function: Callable) -> float:
    """MiB that a call needs beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def show(rows: list[dict]) -> None:
    print(table(list(rows[0]), [list(row.values()) for row in rows]), end="\n\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-timing", action="store_true", help="correctness alone")
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the longest timing")
    parser.add_argument("--far-alone", action="store_true", help="far keys alone, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_check*.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "gpu_check: no CUDA device is visible to torch. This script measures a GPU; run it "
            "where torch.cuda.is_available() is true."
        )
    # What is compared against must not use tf32 behind its back.
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.far_alone:
        found = {"checks": check_cases(far_cases())}
        found["timings"] = [] if args.no_timing else time_far(args.longest)
        print(json.dumps(found))
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    other = other_forward(args)
    rows = check() + other["checks"]
    show(rows)
    write(rows, args.out / "gpu_check.csv")
    if not args.no_timing:
        lengths = [n for n in (1024, 4096, 16384, 32768, 65536) if n <= args.longest]
        timings = [row for tokens in lengths for row in time_length(tokens)]
        show(timings)
        write(timings, args.out / "gpu_check_timing.csv")
        timings = time_far(args.longest) + other["timings"]
        show(timings)
        write(timings, args.out / "gpu_check_far.csv")
    wrong = sum(row["holds"] != "yes" for row in rows)
    print(f"{wrong} of {len(rows)} checks do NOT hold" if wrong else "all operators hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
