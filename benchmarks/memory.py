"""Peak memory of one attention layer, forward and backward, as the sequence grows.

    python benchmarks/memory.py             # benchmarks/results/memory.{csv,png}

Each point is a process of its own, which reports how far its peak of resident memory rose above
what it held with its inputs made and a short sequence run. Shape as in cpu.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import arguments, table, write

HYBRID = "dijiang, window 64 + 4 sinks + linear"
SDPA = "torch scaled_dot_product_attention"
EAGER = "softmax, T x T (plain PyTorch)"
PUBLISHED = "linear, T x T (plain PyTorch)"
FORMS = (HYBRID, SDPA, EAGER, PUBLISHED)
QUADRATIC = (EAGER, PUBLISHED)


def peak_mib() -> float:
    """This program's own peak: getrusage's would count its parent's from before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(form: str, length: int) -> None:
    """One forward and backward, all sums in float32."""
    import cpu
    import formulas

    fq, fk, omega = cpu.parameters()
    tensors = cpu.inputs(length)
    if form != HYBRID:
        tensors = tuple(formulas.repeat_heads(x, cpu.HEADS) for x in tensors)
    leaves = [x.requires_grad_() for x in tensors]
    call = {
        HYBRID: lambda q, k, v: cpu.ops.kernelized_attention(
            q, k, v, fq, fk, window=cpu.WINDOW, sinks=cpu.SINKS
        ),
        SDPA: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        EAGER: formulas.softmax_quadratic,
        PUBLISHED: lambda q, k, v: formulas.linear_quadratic(q, k, v, omega),
    }[form]
    out = call(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def measure(form: str, length: int, threads: int) -> None:
    """Prints {"mib": ...}: the child's side."""
    torch.set_num_threads(threads)
    run(form, 128)
    before = peak_mib()
    run(form, length)
    print(json.dumps({"mib": peak_mib() - before}))


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--longest-quadratic", type=int, default=4096, help="tokens of T x T forms")
    parser.add_argument("--longest-sdpa", type=int, default=16384, help="its time is quadratic")
    parser.add_argument("--child", nargs=2, metavar=("FORM", "TOKENS"), help="used by the script")
    args = parser.parse_args()
    if args.child:
        measure(args.child[0], int(args.child[1]), args.threads)
        return 0

    lengths = (512,) if args.quick else tuple(1024 * 2**i for i in range(7))
    rows, series = [], {}
    for form in FORMS:
        for length in lengths:
            if form in QUADRATIC and length > args.longest_quadratic:
                continue
            if form == SDPA and length > args.longest_sdpa:
                continue
            child = [sys.executable, __file__, "--threads", str(args.threads), "--child", form]
            done = subprocess.run([*child, str(length)], capture_output=True, text=True)
            if done.returncode:  # out of memory, most likely: longer ones would be too
                reason = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
                print(f"{form} at {length} tokens: {reason[0]}", file=sys.stderr)
                if form == HYBRID:
                    return 1
                break
            mib = json.loads(done.stdout)["mib"]
            rows.append({"form": form, "tokens": length, "peak_mib": f"{mib:.1f}"})
            series.setdefault(form, []).append((length, max(mib, 0.1)))
            print(f"{form:42} {length:6} tokens {mib:10.1f} MiB", flush=True)
    write(rows, args.out / "memory.csv")
    print()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    from dijiang import plots

    plots.lines(
        series,
        args.out / "memory.png",
        title="Forward and backward of one layer of SmolLM2-135M, float32",
        xlabel="tokens",
        ylabel="peak memory above the start (MiB), lower is better",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
