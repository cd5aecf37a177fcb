"""The DCT against the matrix product that it replaces and against a plain copy of the data.

    python benchmarks/dct.py                # benchmarks/results/dct.{csv,png}

float32, 2**22 numbers in all, rows of 64 to 4096 of them.
"""

from __future__ import annotations

import sys

import torch
from common import arguments, interleaved, table, write
from dijiang import ops, plots, reference

OURS, PRODUCT, COPY = "dijiang dct", "matrix product", "copy"


def main() -> int:
    args = arguments(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    sizes = (64, 100) if args.quick else (64, 80, 96, 128, 256, 512, 1024, 4096)
    total = 2**14 if args.quick else 2**22
    rows = []
    series: dict[str, list] = {OURS: [], PRODUCT: [], COPY: []}
    for n in sizes:
        x = torch.randn(total // n, n)
        out = torch.empty_like(x)
        matrix = reference.dct_matrix(n, torch.float32)
        with torch.inference_mode():
            calls = {
                OURS: lambda x=x: ops.dct(x),
                PRODUCT: lambda x=x, matrix=matrix, out=out: torch.mm(x, matrix.mT, out=out),
                COPY: lambda x=x, out=out: out.copy_(x),
            }
            timings = interleaved(calls, seconds=0.01 if args.quick else 1.0)
        for name, timing in timings.items():
            speed = 2 * 4 * x.numel() / timing.median / 1e9
            series[name].append((n, speed))
            rows.append(
                {
                    "n": n,
                    "form": name,
                    "median_ms": f"{1e3 * timing.median:.4g}",
                    "p10_ms": f"{1e3 * timing.low:.4g}",
                    "p90_ms": f"{1e3 * timing.high:.4g}",
                    "gb_per_s": f"{speed:.3g}",
                    "product_ratio": f"{timings[PRODUCT].median / timing.median:.3g}",
                }
            )
            print(f"n {n:5} {name:15} {1e3 * timing.median:8.3f} ms {speed:7.2f} GB/s", flush=True)
    write(rows, args.out / "dct.csv")
    print()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
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
