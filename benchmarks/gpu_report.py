"""What gpu.csv says: the rows as a table, the targets and whether they are met, and plots.

python benchmarks/gpu_report.py benchmarks/results/gpu.csv   # gpu.md and gpu_*.png beside it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import read, table
from dijiang import plots
from gpu import (
    BACKWARD,
    CONVERTED,
    CONVERTED_BACKWARD,
    COPY,
    DCT,
    DECODE,
    FEW_HEADS,
    FLA,
    FLA_BACKWARD,
    FLA_DECAY,
    FLA_FORWARD,
    FORWARD,
    MAP,
    MODEL_MANY,
    MODEL_ONE,
    SHOWN,
    SIZES,
    SIZES_BACKWARD,
    SOFTMAX,
    SUITE,
)

Rows = Sequence[Mapping[str, str]]


class Target(NamedTuple):
    """A figure that is wanted of every row: at_least or at_most; neither: it is reported."""

    what: str
    wanted: str
    values: Callable[[Rows], list[float | None]]  # one a row; None: it has none
    at_least: float | None = None
    at_most: float | None = None


# ---- figures of rows -----------------------------------------------------------------------------


def value(row: Mapping[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def divided(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def scaled(x: float | None, factor: float) -> float | None:
    return None if x is None else factor * x


def of(column: str, *kinds: str, where: Callable = lambda row: True) -> Callable:
    """A column of all rows of these kinds."""

    def values(rows: Rows) -> list[float | None]:
        return [value(row, column) for row in rows if row["kind"] in kinds and where(row)]

    return values


def tokens_from(least: int) -> Callable:
    return lambda row: int(row["tokens"] or 0) >= least


def inverse(values: Callable) -> Callable:
    return lambda rows: [divided(1.0, x) for x in values(rows)]


def few_heads(rows: Rows) -> list[float | None]:
    """Cost a token and head, as a multiple of the filled chip's at that length."""
    column = "ns a token and head"
    found = []
    for row in rows:
        if row["kind"] == FEW_HEADS:
            filled = of(column, FORWARD, where=lambda x, row=row: x["tokens"] == row["tokens"])
            found.append(divided(value(row, column), next(iter(filled(rows)), None)))
    return found


def step_microseconds(rows: Rows) -> list[float | None]:
    found = of("ms", DECODE, where=lambda row: row["batch"] == "1")(rows)
    return [scaled(x, 1e3) for x in found]


def largest_headdim(kind: str) -> Callable:
    """Cost a token of headdim 256 with 256 features, as a multiple of four of 64 with 64."""

    def values(rows: Rows) -> list[float | None]:
        def cost(dim):
            name = f"headdim {dim}, {dim} features"
            return next(iter(of("ms", kind, where=lambda row: name in row["what"])(rows)), None)

        return [divided(cost(256), scaled(cost(64), 4.0))]

    return values


def over_contexts(column: str, kind: str) -> Callable:
    """Of each model, a column at the longest context as a multiple of that at the shortest."""

    def values(rows: Rows) -> list[float | None]:
        found = []
        for own in by_what(rows, kind).values():
            first, last = own[0], own[-1]
            found.append(divided(value(last, column), value(first, column)))
        return found

    return values


def by_what(rows: Rows, kind: str) -> dict[str, list[Mapping[str, str]]]:
    """Rows of a kind by what they are about, in the order of their tokens."""
    found: dict[str, list] = {}
    for row in rows:
        if row["kind"] == kind and row["tokens"]:
            found.setdefault(row["what"], []).append(row)
    return {what: sorted(own, key=lambda row: int(row["tokens"])) for what, own in found.items()}


SOFTMAX_RATIO = f"{SOFTMAX} / ours"
TARGETS = (
    Target("forward, as fast as a copy of q, k, v and o", ">= 0.6",
           of("copy / ours", FORWARD, where=tokens_from(2048)), at_least=0.6),
    Target("forward, times as fast as fla", ">= 2", of("fla / ours", FLA_FORWARD), at_least=2),
    Target("forward with decay, times as fast as fla", "reported", of("fla / ours", FLA_DECAY)),
    Target("forward, times as fast as FlashAttention, from 1K on", "> 1",
           of(SOFTMAX_RATIO, FORWARD, where=tokens_from(1024)), at_least=1),
    Target("forward and backward, times as fast as fla", ">= 2", of("fla / ours", FLA_BACKWARD),
           at_least=2),
    Target("forward and backward, times as fast as FlashAttention, from 2K on", "> 1",
           of(SOFTMAX_RATIO, BACKWARD, where=tokens_from(2048)), at_least=1),
    Target("1 sequence x 8 heads x 32K, cost against the filled chip's", "<= 2", few_heads,
           at_most=2),
    Target("decode, batch 1, microseconds a layer", "<= 15", step_microseconds, at_most=15),
    Target("decode, batch 256, of copy rate", ">= 0.85",
           of("of copy rate", DECODE, where=lambda row: row["batch"] == "256"), at_least=0.85),
    Target("dct, time against a copy's", "<= 1.1", inverse(of("copy / ours", DCT)), at_most=1.1),
    Target("feature map, time against its bytes' copy", "<= 1.15", inverse(of("copy / ours", MAP)),
           at_most=1.15),
    Target("headdim 256, cost against 4 x that of 64, forward", "reported", largest_headdim(SIZES)),
    Target("the same, forward and backward", "reported", largest_headdim(SIZES_BACKWARD)),
    Target("converted model's call, times as fast as FlashAttention, forward", "reported",
           of(SOFTMAX_RATIO, CONVERTED)),
    Target("the same, forward and backward", "reported", of(SOFTMAX_RATIO, CONVERTED_BACKWARD)),
    Target("models, tokens/s at the longest context against the shortest, batch 1", ">= 0.95",
           over_contexts("tokens/s", MODEL_ONE), at_least=0.95),
    Target("the same, largest batch", ">= 0.95", over_contexts("tokens/s", MODEL_MANY),
           at_least=0.95),
    Target("models, cache at the longest context against the shortest", "<= 1.01",
           over_contexts("cache MiB", MODEL_ONE), at_most=1.01),
    Target("models, throughput at 8K against softmax, largest batches", ">= 10",
           of("throughput ratio", MODEL_MANY, where=lambda row: row["tokens"] == "8192"),
           at_least=10),
    Target("models, throughput against softmax, batch 1", "reported",
           of("throughput ratio", MODEL_ONE)),
)  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------


def judged(target: Target, rows: Rows) -> list[str]:
    """Target, measured (the worst and the best of its rows), met."""
    found = target.values(rows)
    known = [x for x in found if x is not None]
    name = f"{target.what}: {target.wanted}"
    if not known:
        return [name, "not measured", ""]
    worst, best = max(known), min(known)
    if target.at_most is None:
        worst, best = best, worst
    text = f"{worst:.3g}" if len(known) == 1 else f"{worst:.3g} to {best:.3g}"
    missing = len(found) - len(known)
    if missing:
        text += f"; {missing} of {len(found)} rows without it"
    return [name, text, met(target, worst, missing)]


def met(target: Target, worst: float, missing: int) -> str:
    if target.at_least is None and target.at_most is None:
        return "reported"
    holds = worst >= target.at_least if target.at_least is not None else worst <= target.at_most
    if not holds:
        return "no"
    return "of what there is" if missing else "yes"


def rows_table(rows: Rows) -> str:
    """Columns that no row has are left out."""
    columns = [name for name in SHOWN if any(row[name] for row in rows)]
    return table(columns, [[row[name] for name in columns] for row in rows])


def targets_table(rows: Rows) -> str:
    return table(("target", "measured", "met"), [judged(target, rows) for target in TARGETS])


# ---- plots ---------------------------------------------------------------------------------------


def points(rows: Iterable, x: str, y: Callable) -> list[tuple[int, float]]:
    """Of the rows that have them."""
    found = ((int(row[x]), y(row)) for row in rows if row[x])
    return sorted((a, b) for a, b in found if b is not None)


def a_token(row: Mapping, column: str) -> float | None:
    """ns a token and head, of ours as it stands, of a rival by its time against ours."""
    own = value(row, "ns a token and head")
    ratio = 1.0 if column == "ms" else value(row, column.replace(" ms", " / ours"))
    return None if own is None or ratio is None else own * ratio


def draw_forward(rows: Rows, folder: Path) -> None:
    series = {}
    for label, column, kind in (
        ("dijiang", "ms", FORWARD),
        ("FlashAttention", f"{SOFTMAX} ms", FORWARD),
        ("fla", f"{FLA} ms", FLA_FORWARD),
        ("copy of q, k, v and o", f"{COPY} ms", FORWARD),
        ("dijiang, and backward", "ms", BACKWARD),
        ("FlashAttention, and backward", f"{SOFTMAX} ms", BACKWARD),
        ("fla, and backward", f"{FLA} ms", FLA_BACKWARD),
    ):
        own = [row for row in rows if row["kind"] == kind]
        series[label] = points(own, "tokens", lambda row, column=column: a_token(row, column))
    save(series, folder / "gpu_forward.png", "Far keys alone, headdim 64, the chip filled",
         "tokens", "ns a token and head, lower is better")  # fmt: skip


def draw_decode(rows: Rows, folder: Path) -> None:
    series = {}
    for batch in sorted({row["batch"] for row in rows if row["kind"] == DECODE}, key=int):
        own = [
            row for row in rows
            if row["kind"] == DECODE and row["batch"] == batch and "headdim 128" in row["what"]
        ]  # fmt: skip
        for label, column in (("dijiang", "ms"), ("FlashAttention", f"{SOFTMAX} ms")):
            series[f"{label}, batch {batch}"] = points(
                own, "tokens", lambda row, column=column: scaled(value(row, column), 1e3)
            )
    save(series, folder / "gpu_decode.png", "One token of a converted layer, headdim 128",
         "context (tokens)", "microseconds, lower is better")  # fmt: skip


def draw_models(rows: Rows, folder: Path) -> None:
    series = {}
    for name, own in by_what(rows, MODEL_MANY).items():
        for label, prefix in (("dijiang", ""), ("softmax", "softmax ")):
            series[f"{name}, {label}"] = points(
                own, "tokens", lambda row, prefix=prefix: best_rate(row, prefix)
            )
    save(series, folder / "gpu_models.png", "Decoding, the largest batch that fits",
         "context (tokens)", "tokens/s, higher is better")  # fmt: skip


def best_rate(row: Mapping, prefix: str) -> float | None:
    """Tokens/s of the faster way."""
    found = (value(row, prefix + column) for column in ("tokens/s", "graph tokens/s"))
    return max((x for x in found if x is not None), default=None)


def save(series: Mapping, path: Path, title: str, xlabel: str, ylabel: str) -> None:
    series = {name: line for name, line in series.items() if line}
    if series:
        plots.lines(series, path, title=title, xlabel=xlabel, ylabel=ylabel)


def write(path: Path) -> int:
    """gpu.md and the plots, beside the CSV. The exit status: 1 where a row failed."""
    first, rows = read(path)
    tables = f"{rows_table(rows)}\n\n{targets_table(rows)}\n"
    path.with_suffix(".md").write_text(f"{first}\n\n{tables}")
    print(tables)
    wrong = [row for row in rows if SUITE.failed(row)]
    for row in wrong:
        print("FAILED " + ", ".join(x for x in row.values() if x))
    try:
        for draw in (draw_forward, draw_decode, draw_models):
            draw(rows, path.parent)
    except ImportError as error:  # what is measured does not need them
        print(f"no plots: {error}", file=sys.stderr)
    print(f"{len(wrong)} of {len(rows)} rows FAILED" if wrong else f"{len(rows)} rows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(write(Path(sys.argv[1])))
