"""Writes the measured tables of README.md and of the guides from results/.

    python benchmarks/readme_table.py            # rewrite
    python benchmarks/readme_table.py --check    # exit 1 if a table is not that of its results
    python benchmarks/readme_table.py --demo demo-out    # take a demo's figures and picture first

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. Results come from cpu.py,
memory.py, dct.py, model.py, paper.py, quality.py, maps.py, far.py, tests/families.py, and from
a demo's results.json kept as demo.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import common
import far
import floor
import maps as feature_maps
import quality as recipes
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/performance.md", "docs/quality.md")


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
    rows = [row for row in rows if row["kind"] == kind and row["form"] not in floor.LIMITS]
    lengths, forms = _distinct(rows, "tokens"), _distinct(rows, "form")
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


def attention_floor() -> str:
    """The forward of our linear form against what the machine does at best, with 1 thread, too."""
    machine, rows = common.read(common.RESULTS / "cpu.csv")
    rates = {(row["kind"], row["tokens"], row["threads"], row["form"]): row["rate"] for row in rows}
    cells = {}
    for row in rows:
        key = row["threads"], row["tokens"]
        if row["floor_fraction"] and key not in cells:
            least = float(row["median_ms"]) * float(row["floor_fraction"])
            limits = [rates[row["kind"], row["tokens"], row["threads"], x] for x in floor.LIMITS]
            share = f"{100 * float(row['floor_fraction']):.0f} %"
            cells[key] = [*key, f"{float(row['median_ms']):.3g}", f"{least:.3g}", share, *limits]
    header = ["threads", "tokens", "dijiang, linear, ms", "floor, ms", "floor / dijiang"]
    ordered = [cells[key] for key in sorted(cells, key=lambda key: tuple(map(int, key)))]
    return common.table([*header, *floor.LIMITS], ordered) + "\n\n" + _measured(machine)


def attention_threads() -> str:
    """Times with one thread and with all of them: a row a form, a column a kind and length."""
    machine, rows = common.read(common.RESULTS / "cpu.csv")
    rows = [row for row in rows if row["kind"].endswith(" by threads")]
    threads = sorted(map(int, _distinct(rows, "threads")))
    columns = list(dict.fromkeys((row["kind"], row["tokens"]) for row in rows))
    at = {
        (row["form"], row["kind"], row["tokens"], int(row["threads"])): float(row["median_ms"])
        for row in rows
    }
    cells = []
    for form in _distinct(rows, "form"):
        # Of a limit the time, like the others: not what its name gives the rate in.
        line = [form.partition(",")[0] if form in floor.LIMITS else form]
        for column in columns:
            one, most = (at.get((form, *column, count)) for count in (threads[0], threads[-1]))
            line.append(f"{one:.3g} → {most:.3g} ({one / most:.2f} x)" if one else "-")
        cells.append(line)
    header = [f"ms, 1 → {threads[-1]} threads (gain)"]
    header += [f"{kind.removesuffix(' by threads')} {tokens}" for kind, tokens in columns]
    return common.table(header, cells) + "\n\n" + _measured(machine)


def attention_dtypes() -> str:
    """The forward on float32 and on bfloat16: a row a dtype, a column a length."""
    machine, rows = common.read(common.RESULTS / "cpu.csv")
    rows = [row for row in rows if row["kind"] == "forward by dtype"]
    at = {(row["form"], row["tokens"]): float(row["median_ms"]) for row in rows}
    lengths, forms = _distinct(rows, "tokens"), _distinct(rows, "form")
    cells = [
        [form, *(f"{at[form, n]:.3g} ({at[forms[0], n] / at[form, n]:.3g} x)" for n in lengths)]
        for form in forms
    ]
    table = common.table(["ms at tokens (speed / float32's)", *lengths], cells)
    return table + "\n\n" + _measured(machine)


def memory() -> str:
    machine, rows = common.read(common.RESULTS / "memory.csv")
    lengths, forms = _distinct(rows, "tokens"), _distinct(rows, "form")
    at = {(row["form"], row["tokens"]): row["peak_mib"] for row in rows}
    cells = [[form, *(at.get((form, length), "-") for length in lengths)] for form in forms]
    return common.table(["MiB at tokens", *lengths], cells) + "\n\n" + _measured(machine)


def dct() -> str:
    """Speeds of dct.csv: a row a form, a column a row length."""
    machine, rows = common.read(common.RESULTS / "dct.csv")
    rows = [row for row in rows if row["numbers"] == rows[0]["numbers"]]
    sizes = _distinct(rows, "n")
    at = {(row["form"], row["n"]): row["gb_per_s"] for row in rows}
    forms = [form for form in _distinct(rows, "form") if not form.endswith(", bfloat16")]
    cells = [[form, *(at.get((form, n), "-") for n in sizes)] for form in forms]
    return common.table(["GB/s at n", *sizes], cells) + "\n\n" + _measured(machine)


def dct_sizes() -> str:
    """Our transform of rows of 64, in times of a copy: a row a size and dtype."""
    machine, rows = common.read(common.RESULTS / "dct.csv")
    cells = {}
    for row in rows:
        if row["n"] == "64" and row["form"].startswith("dijiang"):
            dtype = "bfloat16" if row["form"].endswith(", bfloat16") else "float32"
            ratios = [1 / float(row[name]) for name in ("copy_ratio", "clone_ratio")]
            key = dtype, int(row["numbers"])
            cells[key] = [dtype, f"2^{key[1].bit_length() - 1}", *(f"{x:.2f}" for x in ratios)]
    header = ["dtype", "numbers", "time / that of a copy", "time / that of a clone"]
    ordered = [cells[key] for key in sorted(cells, reverse=True)]
    return common.table(header, ordered[::-1]) + "\n\n" + _measured(machine)


def model() -> str:
    """Reading and decoding of a whole model, before and after conversion."""
    machine, rows = common.read(common.RESULTS / "model.csv")
    at = {(row["kind"], row["model"]): row for row in rows}
    cells = []
    for kind in _distinct(rows, "kind"):
        softmax, dijiang = at[kind, "softmax"], at[kind, "dijiang"]
        both = (softmax, dijiang)
        cells.append([
            f"{kind}, {softmax['context']} tokens",
            *(row["median_ms"] for row in both),
            *(row["tokens_per_s"] for row in both),
            dijiang["softmax_ratio"],
            *(row["cache_mib"] or "-" for row in both),
        ])  # fmt: skip
    header = ["", "softmax ms", "dijiang ms", "softmax tokens/s", "dijiang tokens/s", "ratio"]
    header += ["softmax cache MiB", "dijiang cache MiB"]
    return common.table(header, cells) + "\n\n" + _measured(machine)


def paper() -> str:
    """The paper's curves: decoding and a training step, three models side by side."""
    machine, rows = common.read(common.RESULTS / "paper.csv")
    models = _distinct(rows, "model")
    at = {(row["kind"], row["tokens"], row["model"]): row for row in rows}
    cells = []
    for kind, tokens in dict.fromkeys((row["kind"], row["tokens"]) for row in rows):
        own = [at[kind, tokens, model] for model in models]
        times = [f"{row['median_ms']} ({row['softmax_ratio']} x)" for row in own]
        sizes = [row["cache_mib"] or "-" for row in own]
        cells.append([f"{kind}, {tokens} tokens", *times, *sizes])
    header = ["", *(f"{model} ms" for model in models), *(f"{model} MiB" for model in models)]
    return common.table(header, cells) + "\n\n" + _measured(machine)


def maps() -> str:
    """The feature maps on equal terms."""
    machine, rows = common.read(common.RESULTS / "maps.csv")
    return feature_maps.summary(rows) + "\n\n" + _measured(machine)


def far_keys() -> str:
    """What far keys are worth, a layer at a time."""
    machine, rows = common.read(common.RESULTS / "far.csv")
    return far.summary(rows) + "\n\n" + _measured(machine)


def families() -> str:
    """What each family of models was seen to do, by its tests, and with which transformers."""
    with (common.RESULTS / "families.csv").open() as file:
        rows = list(csv.DictReader(file))
    versions = sorted(_distinct(rows, "transformers"), key=Version)
    at = {(row["transformers"], row["family"]): row for row in rows}
    behaviours = [name for name in rows[0] if name not in ("transformers", "family", "refused")]
    lines = []
    for family in _distinct(rows, "family"):
        cells = [family]
        for name in behaviours:
            able = [x for x in versions if at.get((x, family), {}).get(name) == "yes"]
            cells.append("yes" if able == versions else ", ".join(able) or "-")
        refused = at[versions[-1], family]["refused"]
        lines.append([*cells, refused])
    header = ["family", *behaviours, "refused, because"]
    return common.table(header, lines) + f"\n\nWith transformers {' and '.join(versions)}."


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
    "attention floor": attention_floor,
    "attention threads": attention_threads,
    "attention dtypes": attention_dtypes,
    "memory": memory,
    "dct": dct,
    "dct sizes": dct_sizes,
    "model": model,
    "paper": paper,
    "maps": maps,
    "families": families,
    "far": far_keys,
    "recipes": lambda: recipes.language(recipes.results()) + "\n\n" + _recipes_measured(),
    "recipes recall": lambda: recipes.recall(recipes.results()),
}


def _recipes_measured() -> str:
    """The machines of the recipes, but for their load: each a row that took minutes."""
    machines = {row["machine"].partition(", load")[0] for row in recipes.results().values()}
    return f"Measured on {'; '.join(sorted(machines))}."


def _demo() -> dict:
    return json.loads((common.RESULTS / "demo.json").read_text())


def _distinct(rows: Sequence[dict[str, str]], column: str) -> list[str]:
    """The column's values, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


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
