"""The results of `dijiang eval` as text: one table a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..console import table


def text(results: Mapping[str, Any]) -> str:
    """Tables of everything that `results` holds, an empty line between them."""
    parts = [
        (("perplexity", "recall"), _quality),
        (("gap_closed",), _gap),
        (("positions",), _positions),
        (("curves",), _curves),
        (("agreement",), _agreement),
        (("attention",), _attention),
        (("harness",), _harness),
    ]
    made = [draw(results) for keys, draw in parts if any(results.get(key) for key in keys)]
    return "\n\n".join(made)


def _quality(results) -> str:
    perplexity, recall = results.get("perplexity", {}), results.get("recall", {})
    header = ["model"]
    for rows in list(perplexity.values())[:1]:
        header += [f"perplexity {row['length']}" for row in rows]
    for rows in list(recall.values())[:1]:
        header += [f"recall {row['distance']}" for row in rows]
    lines = []
    for name in perplexity or recall:
        line = [name, *(f"{row['perplexity']:.2f}" for row in perplexity.get(name, []))]
        lines.append(line + [_percent(row["accuracy"]) for row in recall.get(name, [])])
    return table(header, lines)


def _gap(results) -> str:
    said = (f"{_percent(share)} at {length}" for length, share in results["gap_closed"].items())
    return f"gap to the teacher closed: {', '.join(said)}"


def _positions(results) -> str:
    measured = results["positions"]
    bins = next(iter(measured.values()))["bins"]
    header = ["tokens before", *(f"perplexity, {name}" for name in measured)]
    lines = [
        [
            f"{row['begin']} to {row['end'] - 1}",
            *(f"{one['bins'][i]['perplexity']:.2f}" for one in measured.values()),
        ]
        for i, row in enumerate(bins)
    ]
    return table(header, lines)


def _curves(results) -> str:
    first = next(iter(next(iter(results["curves"].values())).values()))
    header = ["recall", *(f"{row['distance']} back" for row in first)]
    lines = [
        [f"{task}, {name}", *(_percent(row["accuracy"]) for row in rows)]
        for task, models in results["curves"].items()
        for name, rows in models.items()
    ]
    return table(header, lines)


def _agreement(results) -> str:
    header = ["model", "KL to the teacher", "same likeliest token"]
    lines = [
        [
            name,
            f"{row['kl']:.4f} ± {row['kl_standard_error']:.4f}",
            f"{_percent(row['top1'])} ± {100 * row['top1_standard_error']:.1f}",
        ]
        for name, row in results["agreement"].items()
    ]
    return table(header, lines)


def _attention(results) -> str:
    header = ["layer", "attention error", "best head", "worst head"]
    lines = [
        [str(row["layer"]), *(f"{x:.3f}" for x in (row["error"], *_ends(row["heads"])))]
        for rows in results["attention"].values()
        for row in rows
    ]
    return table(header, lines)


def _ends(values) -> tuple[float, float]:
    return min(values), max(values)


def _harness(results) -> str:
    measured = results["harness"]
    header = ["task, metric", *measured]
    lines = [
        [f"{task}, {metric}", *(_figure(one[task].get(metric)) for one in measured.values())]
        for task, metrics in next(iter(measured.values())).items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    return table(header, lines)


def _figure(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
