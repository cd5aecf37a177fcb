"""Writes the measured tables of README.md and docs/performance.md from benchmarks/results/.

    python benchmarks/readme_table.py            # rewrite
    python benchmarks/readme_table.py --check    # exit 1 if a table is not that of its results
    python benchmarks/readme_table.py --demo demo-out    # take a demo's figures and picture first

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. Results come from cpu.py,
memory.py and dct.py, and from a demo's results.json kept as demo.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import common

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/performance.md")


def quality() -> str:
    """Perplexity and recall of the demo's models."""
    results = _demo()
    names = list(results["perplexity"])
    header = ["model"]
    header += [f"perplexity {row['length']}" for row in results["perplexity"][names[0]]]
    header += [f"recall {row['distance']}" for row in results["recall"][names[0]]]
    rows = []
    for name in names:
        cells = [f"{row['perplexity']:.2f}" for row in results["perplexity"][name]]
        cells += [f"{100 * row['accuracy']:.0f} %" for row in results["recall"][name]]
        rows.append([name, *cells])
    return common.table(header, rows) + "\n\n" + _measured(results["machine"])


def decode() -> str:
    """Speed and memory of decoding in the demo."""
    results = _demo()
    (_, teacher), (_, student) = results["decode"].items()
    header = ["context", "softmax tokens/s", "dijiang tokens/s", "ratio"]
    header += ["softmax cache MiB", "dijiang cache MiB"]
    rows = []
    for one, two in zip(teacher, student, strict=True):
        speeds = [one["tokens_per_second"], two["tokens_per_second"]]
        sizes = [one["cache_bytes"] / 2**20, two["cache_bytes"] / 2**20]
        rows.append(
            [
                one["context"],
                *(f"{speed:.1f}" for speed in speeds),
                f"{speeds[1] / speeds[0]:.2f}",
                *(f"{size:.1f}" for size in sizes),
            ]
        )
    return common.table(header, rows) + "\n\n" + _measured(results["machine"])


def attention(kind: str) -> str:
    """One kind of cpu.csv: a row a form, a column a length."""
    machine, rows = common.read(common.RESULTS / "cpu.csv")
    rows = [row for row in rows if row["kind"] == kind]
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    at = {(row["form"], row["tokens"]): row for row in rows}
    cells = []
    for form in forms:
        line = [form]
        for length in lengths:
            row = at.get((form, length))
            line.append(f"{float(row['median_ms']):.3g} ({row['sdpa_ratio']} x)" if row else "-")
        cells.append(line)
    unit = "context" if kind == "decode" else "tokens"
    table = common.table([f"ms at {unit} (speed / SDPA's)", *lengths], cells)
    return table + "\n\n" + _measured(machine)


def memory() -> str:
    machine, rows = common.read(common.RESULTS / "memory.csv")
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    at = {(row["form"], row["tokens"]): row["peak_mib"] for row in rows}
    cells = [[form, *(at.get((form, length), "-") for length in lengths)] for form in forms]
    return common.table(["MiB at tokens", *lengths], cells) + "\n\n" + _measured(machine)


def dct() -> str:
    machine, rows = common.read(common.RESULTS / "dct.csv")
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    at = {(row["form"], row["n"]): row["gb_per_s"] for row in rows}
    cells = [[form, *(at[form, n] for n in sizes)] for form in forms]
    return common.table(["GB/s at n", *sizes], cells) + "\n\n" + _measured(machine)


def picture() -> str:
    """The demo's summary plot, once there is one."""
    name = _demo()["settings"]["model"]
    return (
        "![Quality, decoding speed and cache size before and after](docs/images/summary.png)\n\n"
        f"*Measured by `make demo`; model: {name}. The [tables below](#measured) have the figures.*"
    )


TABLES: dict[str, Callable[[], str]] = {
    "picture": picture,
    "quality": quality,
    "decode": decode,
    "attention forward": lambda: attention("forward"),
    "attention forward+backward": lambda: attention("forward+backward"),
    "attention decode": lambda: attention("decode"),
    "memory": memory,
    "dct": dct,
}


def _demo() -> dict:
    return json.loads((common.RESULTS / "demo.json").read_text())


def _measured(machine: str) -> str:
    return f"Measured on {machine}."


def filled(page: str) -> str:
    """`page` with every marked table made anew; one without results is left as it is."""

    def replace(match: re.Match) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}; there are {', '.join(TABLES)}")
        try:
            return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- /table -->"
        except FileNotFoundError as error:
            print(f"{name}: no {error.filename} yet", file=sys.stderr)
            return match.group(0)

    return re.sub(r"<!-- table: ([^>]+?) -->\n.*?<!-- /table -->", replace, page, flags=re.S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--demo", type=Path, help="the folder that `dijiang demo` wrote")
    args = parser.parse_args(arguments)
    check = args.check
    if args.demo:
        shutil.copy(args.demo / "results.json", common.RESULTS / "demo.json")
        pictures = ROOT / "docs" / "images"
        pictures.mkdir(exist_ok=True)
        shutil.copy(args.demo / "summary.png", pictures / "summary.png")
    stale = 0
    for path in (ROOT / name for name in FILES):
        page = path.read_text()
        made = filled(page)
        if made != page:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}")
            if not check:
                path.write_text(made)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
