"""Plots of measured results: every function takes plain dicts and writes one PNG.

Colours are those of Okabe and Ito, told apart by the colour-blind; models also differ by hatch or
marker, so that the plots read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
_FAR_OFF = 8  # times the best perplexity: from here on a logarithmic axis
#: The keys of a results.json that have a plot.
DRAWN = ("perplexity", "recall", "decode", "training", "positions", "curves", "attention")
_LONGEST = 36  # characters of a name in a legend
_FAINTEST = 1e-4  # attention weight: less has the same colour
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(results: Mapping, folder: str | Path) -> list[Path]:
    """Draws every plot that `results` (as in a results.json) has data for.

    Returns the files written. Raises ValueError when there is nothing to draw.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if results.get("perplexity"):
        written.append(perplexity(results["perplexity"], folder / "perplexity.png"))
    if results.get("recall"):
        written.append(recall(results["recall"], folder / "recall.png"))
    order = list(results.get("perplexity") or ())
    if results.get("positions"):
        written.append(positions(results["positions"], folder / "positions.png", order))
    if results.get("curves"):
        written.append(recall_curves(results["curves"], folder / "curves.png", order))
    if results.get("attention"):
        written.append(attention_errors(results["attention"], folder / "attention.png"))
    if results.get("decode"):
        written.append(decode(results["decode"], folder / "decode.png", order))
    if results.get("training"):
        written.append(training(results["training"], folder / "training.png"))
    if all(results.get(key) for key in ("perplexity", "decode")):
        written.append(summary(results, folder / "summary.png"))
    if not written:
        raise ValueError(f"nothing to draw: the results have none of {', '.join(DRAWN)}")
    return written


def can_draw(results: Mapping) -> bool:
    """Whether draw would find anything to draw."""
    return any(results.get(key) for key in DRAWN)


def perplexity(rows: Mapping[str, Sequence[Mapping]], path: str | Path) -> Path:
    """Bars of perplexity: {model: [evaluate.Perplexity as dict, ...]}, lower is better."""
    figure, axes = _figure(7.0, 4.0)
    _perplexity_bars(axes, rows)
    return _save(figure, path)


def recall(rows: Mapping[str, Sequence[Mapping]], path: str | Path) -> Path:
    """Bars of pass-key recall: {model: [evaluate.Recall as dict, ...]}, higher is better."""
    figure, axes = _figure(7.0, 4.0)
    distances = [row["distance"] for row in next(iter(rows.values()))]
    values = {name: [100.0 * row["accuracy"] for row in points] for name, points in rows.items()}
    _bars(axes, [f"{distance} tokens back" for distance in distances], values, "{:.0f}")
    axes.set_ylim(0, 112)
    axes.set_ylabel("answer tokens right (%), higher is better")
    trials = next(iter(rows.values()))[0]["trials"]
    axes.set_title(f"Pass-key recall ({trials} trials each)")
    return _save(figure, path)


def decode(
    rows: Mapping[str, Sequence[Mapping]], path: str | Path, order: Sequence[str] = ()
) -> Path:
    """Tokens/s and cache size against the context: {model: [evaluate.DecodePoint as dict, ...]}.

    A model keeps the colour of its place in `order`, that of the other plots of the same run.
    """
    figure, (left, right) = _figure(10.0, 4.0, columns=2)
    _speed_lines(left, rows, order)
    _cache_lines(right, rows, order)
    return _save(figure, path)


def positions(rows: Mapping[str, Mapping], path: str | Path, order: Sequence[str] = ()) -> Path:
    """Perplexity by tokens seen: {model: evaluate.PositionalPerplexity as dict}, with its error.

    A point stands at its bin's first position.
    """
    figure, axes = _figure(7.0, 4.5)
    series = {}
    for index, (name, one) in zip(_places(rows, order), rows.items(), strict=True):
        bins = one["bins"]
        series[name] = [(row["begin"], row["perplexity"]) for row in bins]
        # nan, of a single window, leaves the band out.
        spread = [math.exp(row["standard_error"]) for row in bins]
        axes.fill_between(
            [row["begin"] for row in bins],
            [row["perplexity"] / by for row, by in zip(bins, spread, strict=True)],
            [row["perplexity"] * by for row, by in zip(bins, spread, strict=True)],
            color=COLOURS[index % len(COLOURS)],
            alpha=0.15,
            linewidth=0,
        )
    _lines(axes, series, logy=True, order=order)
    windows = next(iter(rows.values()))["windows"]
    axes.set_xlabel("tokens before the predicted one (at least; to the next mark)")
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title(f"Held-out perplexity by position ({windows} windows, ± standard error)")
    return _save(figure, path)


def recall_curves(
    rows: Mapping[str, Mapping[str, Sequence[Mapping]]],
    path: str | Path,
    order: Sequence[str] = (),
) -> Path:
    """Recall against distance: {task: {model: [evaluate.Recall as dict, ...]}}, a panel a task."""
    figure, axes = _figure(5.0 * len(rows), 4.0, columns=len(rows))
    panels = axes if len(rows) > 1 else [axes]
    for axis, (task, models) in zip(panels, rows.items(), strict=True):
        for index, points in zip(_places(models, order), models.values(), strict=True):
            axis.errorbar(
                [row["distance"] for row in points],
                [100.0 * row["accuracy"] for row in points],
                [100.0 * row["standard_error"] for row in points],
                color=COLOURS[index % len(COLOURS)],
                linestyle="none",
                capsize=3,
                linewidth=1,
            )
        series = {
            name: [(row["distance"], 100.0 * row["accuracy"]) for row in points]
            for name, points in models.items()
        }
        _lines(axis, series, logy=False, order=order)
        trials = next(iter(models.values()))[0]["trials"]
        axis.set_ylim(-5, 105)
        axis.set_xlabel("tokens back")
        axis.set_ylabel("answer tokens right (%), higher is better")
        axis.set_title(f"{task} ({trials} trials, ± standard error)")
    return _save(figure, path)


def attention_errors(rows: Mapping[str, Sequence[Mapping]], path: str | Path) -> Path:
    """Bars of attention output error by layer: {model: [evaluate.LayerError as dict, ...]}.

    A dot is a head, a bar its layer, with its standard error.
    """
    figure, axes = _figure(9.0, 4.0)
    width = 0.8 / len(rows)
    for index, (name, layers) in enumerate(rows.items()):
        colour = COLOURS[index % len(COLOURS)]
        at = [row["layer"] + (index - (len(rows) - 1) / 2) * width for row in layers]
        axes.bar(
            at,
            [row["error"] for row in layers],
            0.92 * width,
            yerr=[row["standard_error"] for row in layers],
            label=_label(name),
            color=colour,
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            error_kw={"linewidth": 1},
        )
        dots = [(x, y) for x, row in zip(at, layers, strict=True) for y in row["heads"]]
        axes.plot(*zip(*dots, strict=True), ".", color="black", markersize=3, alpha=0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer (dots: its heads)")
    axes.set_ylabel("|kernelised - softmax|² / |softmax|²")
    axes.set_title("Error of attention's output, lower is better")
    axes.legend(fontsize=7)
    _grid(axes)
    return _save(figure, path)


def attention_maps(maps: Sequence, path: str | Path) -> Path:
    """Attention maps, softmax left and kernelised right: a row an evaluate.AttentionMap.

    One logarithmic scale for all, so that a colour is the same weight everywhere.
    """
    figure, axes = _figure(7.5, 3.4 * len(maps), columns=2, rows=len(maps))
    from matplotlib.colors import LogNorm

    panels = axes if len(maps) > 1 else [axes]
    norm = LogNorm(_FAINTEST, 1.0, clip=True)
    for (left, right), one in zip(panels, maps, strict=True):
        for axis, name in ((left, "softmax"), (right, "kernelised")):
            weights = one.teacher if name == "softmax" else one.student
            # Later keys are no keys: white, unlike a weight of 0.
            shown = [
                [value if s <= t else math.nan for s, value in enumerate(row)]
                for t, row in enumerate(weights.tolist())
            ]
            image = axis.imshow(shown, cmap="cividis", norm=norm, interpolation="nearest")
            axis.set_title(f"layer {one.layer}, head {one.head}: {name}", fontsize=9)
            axis.set_xlabel("key")
            axis.set_ylabel("query")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    return _save(figure, path)


def training(rows: Sequence[Mapping], path: str | Path) -> Path:
    """Training curve: [{"step", "loss", "stage"}, ...], one panel for each stage."""
    stages: dict[str, list[Mapping]] = {}
    for row in rows:
        stages.setdefault(str(row.get("stage", "training")), []).append(row)
    figure, axes = _figure(5.0 * len(stages), 4.0, columns=len(stages))
    panels = axes if len(stages) > 1 else [axes]
    for index, (axis, (stage, points)) in enumerate(zip(panels, stages.items(), strict=True)):
        steps = [point["step"] for point in points]
        losses = [point["loss"] for point in points]
        axis.plot(steps, losses, color=COLOURS[index], alpha=0.35, linewidth=1)
        axis.plot(steps, _smooth(losses), color=COLOURS[index], linewidth=2)
        if min(losses) > 0:
            _log_scale(axis)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("loss (faint: each step, bold: smoothed)")
        axis.set_title(stage)
        _grid(axis)
    return _save(figure, path)


def summary(results: Mapping, path: str | Path) -> Path:
    """One picture for the README: quality, speed and memory side by side.

    Models that are off by orders of magnitude are left to perplexity.png: they would hide the rest.
    """
    figure, (left, middle, right) = _figure(14.0, 4.0, columns=3)
    rows = results["perplexity"]
    worst = {name: max(row["perplexity"] for row in rows[name]) for name in rows}
    near = [name for name, value in worst.items() if value <= _FAR_OFF * min(worst.values())]
    _perplexity_bars(left, {name: rows[name] for name in near})
    _speed_lines(middle, results["decode"], list(results["perplexity"]))
    _cache_lines(right, results["decode"], list(results["perplexity"]))
    return _save(figure, path)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    logy: bool = True,
) -> Path:
    """Lines over a doubling x: {name: [(x, y), ...]}; what the benchmarks draw."""
    figure, axes = _figure(7.0, 4.5)
    _lines(axes, series, logy=logy)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _save(figure, path)


def _perplexity_bars(axes, rows) -> None:
    labels = [f"{row['length']} tokens" for row in next(iter(rows.values()))]
    values = {name: [row["perplexity"] for row in points] for name, points in rows.items()}
    finite = [v for row in values.values() for v in row if math.isfinite(v)]
    _bars(axes, labels, values, "{:.4g}")
    # A model before its training can be off by orders of magnitude; a line would hide the rest.
    if finite and max(finite) > _FAR_OFF * min(finite):
        _log_scale(axes)
        axes.set_ylim(0.5 * min(finite), 3 * max(finite))
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title("Held-out perplexity by window length")


def _speed_lines(axes, rows, order=()) -> None:
    for index, points in zip(_places(rows, order), rows.values(), strict=True):
        contexts = [point["context"] for point in points]
        axes.fill_between(
            contexts,
            [1e3 / point["step_ms_high"] for point in points],
            [1e3 / point["step_ms_low"] for point in points],
            color=COLOURS[index % len(COLOURS)],
            alpha=0.15,
            linewidth=0,
        )
    series = {
        name: [(point["context"], point["tokens_per_second"]) for point in points]
        for name, points in rows.items()
    }
    _lines(axes, series, logy=False, order=order)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("decoding (tokens/s), higher is better")
    axes.set_title("Decoding speed (median, 10th to 90th percentile)")


def _cache_lines(axes, rows, order=()) -> None:
    series = {
        name: [(point["context"], point["cache_bytes"] / 2**20) for point in points]
        for name, points in rows.items()
    }
    _lines(axes, series, logy=True, order=order)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("cache (MiB), lower is better")
    axes.set_title("Memory of the past")


def _figure(width: float, height: float, columns: int = 1, rows: int = 1):
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'dijiang[plots]'") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would pick a window system and keep every figure alive.
    del matplotlib
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _bars(axes, labels, values: Mapping[str, Sequence[float]], form: str) -> None:
    width = 0.8 / len(values)
    for index, (name, row) in enumerate(values.items()):
        places = [x + (index - (len(values) - 1) / 2) * width for x in range(len(labels))]
        bars = axes.bar(
            places,
            row,
            0.92 * width,
            label=_label(name),
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
        )
        axes.bar_label(bars, [form.format(value) for value in row], fontsize=7, padding=2)
    axes.set_xticks(range(len(labels)), labels)
    # Below the axes: bars fill them.
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.09))
    _grid(axes)


def _places(names, order: Sequence[str]) -> list[int]:
    """The index of each name's colour: its place in `order`, else its own place."""
    return [order.index(name) if name in order else i for i, name in enumerate(names)]


def _lines(
    axes,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    logy: bool,
    order: Sequence[str] = (),
) -> None:
    for index, (name, points) in zip(_places(series, order), series.items(), strict=True):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=_label(name),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            # Past the last colour they come again, dashed.
            linestyle="-" if index < len(COLOURS) else "--",
            markerfacecolor=None if index < len(COLOURS) else "white",
            linewidth=1.8,
        )
    places = sorted({x for points in series.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [_short(place) for place in places])
    axes.minorticks_off()
    if logy:
        _log_scale(axes)
    axes.legend(fontsize=7)
    _grid(axes)


def _log_scale(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(name: str) -> str:
    """A name as legends have it: of a long one, a path say, its end."""
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def _short(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 else f"{count:g}"


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and up to a tenth of the run before it."""
    reach = max(1, len(values) // 10)
    return [
        sum(values[max(0, i - reach) : i + 1]) / (i + 1 - max(0, i - reach))
        for i in range(len(values))
    ]


def _grid(axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path)
    return path
