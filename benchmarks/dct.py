"""The DCT against the matrix product that it replaces and against a plain copy of the data.

    python benchmarks/dct.py                # benchmarks/results/dct.{csv,png}

2**22 numbers in all, float32 in rows of 32 to 4096 of them; rows of 64 also in bfloat16, and by
size, from what a cache holds to what it does not. `copy` writes to memory it has, `clone` to new
memory, as an operator that returns a tensor does. torch-dct is compared with where it is installed
(see rivals.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import rivals
import torch
from common import Timing, arguments, interleaved, table, write
from dijiang import ops, plots, reference
from torch import Tensor

OURS, TORCH_DCT, PRODUCT = "dijiang dct", "torch-dct", "matrix product"
COPY, CLONE = "copy", "clone"
BFLOAT16 = ", bfloat16"
HALF_ROWS = 64  # the row length that is measured in bfloat16 and by size, too


def forms(x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed on the rows of x."""
    out = torch.empty_like(x)
    matrix = reference.dct_matrix(x.shape[-1], torch.float32).to(x.dtype)
    calls = {
        OURS: lambda: ops.dct(x),
        PRODUCT: lambda: torch.mm(x, matrix.mT, out=out),
        COPY: lambda: out.copy_(x),
        CLONE: lambda: x.clone(),
    }
    # Torch's FFT on the CPU, which torch-dct calls, has no bfloat16.
    if x.dtype == torch.float32 and (other := rivals.find(TORCH_DCT)):
        calls[TORCH_DCT] = lambda: other(x, norm="ortho")
    return calls


def calls_at(n: int, total: int) -> dict[str, Callable[[], object]]:
    """All forms for rows of n: they take turns."""
    x = torch.randn(total // n, n)
    calls = forms(x)
    if n == HALF_ROWS:
        calls |= {name + BFLOAT16: call for name, call in forms(x.bfloat16()).items()}
    return calls


def row(n: int, form: str, timings: dict[str, Timing], total: int) -> dict:
    """One line of the CSV; ratios are speeds as multiples of those of the same dtype."""
    timing = timings[form]
    dtype = BFLOAT16 if form.endswith(BFLOAT16) else ""
    size = 2 if dtype else 4
    return {
        "n": n,
        "numbers": total,
        "form": form,
        "median_ms": f"{1e3 * timing.median:.4g}",
        "p10_ms": f"{1e3 * timing.low:.4g}",
        "p90_ms": f"{1e3 * timing.high:.4g}",
        "gb_per_s": f"{2 * size * (total // n) * n / timing.median / 1e9:.3g}",
        "product_ratio": f"{timings[PRODUCT + dtype].median / timing.median:.3g}",
        "copy_ratio": f"{timings[COPY + dtype].median / timing.median:.3g}",
        "clone_ratio": f"{timings[CLONE + dtype].median / timing.median:.3g}",
    }


def main() -> int:
    args = arguments(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    note = rivals.note([TORCH_DCT])
    print(note)
    sizes = (64, 100) if args.quick else (32, 64, 80, 96, 128, 256, 512, 1024, 4096)
    usual = 2**14 if args.quick else 2**22
    cases = [(n, usual) for n in sizes]
    cases += [(HALF_ROWS, total) for total in ((2**12,) if args.quick else (2**20, 2**24))]
    rows = []
    series: dict[str, list] = {}
    for n, total in cases:
        with torch.inference_mode():
            timings = interleaved(calls_at(n, total), seconds=0.01 if args.quick else 1.0)
        for form, timing in timings.items():
            line = row(n, form, timings, total)
            rows.append(line)
            if total == usual and not form.endswith(BFLOAT16):
                series.setdefault(form, []).append((n, float(line["gb_per_s"])))
            print(
                f"n {n:5} {form:25} {1e3 * timing.median:8.3f} ms {line['gb_per_s']:>6} GB/s",
                flush=True,
            )
    write(rows, args.out / "dct.csv", note)
    print()
    print(table(list(rows[0]), [list(line.values()) for line in rows]))
    plots.lines(
        series,
        args.out / "dct.png",
        title=f"DCT-II of float32 rows, {args.threads} threads",
        xlabel="row length n",
        ylabel="read + written (GB/s), higher is better",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
