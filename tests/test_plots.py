"""Every plot is drawn from plain dicts into a readable PNG, and what lacks data is refused."""

import json

import pytest

pytest.importorskip("matplotlib")

from dijiang import plots


def results() -> dict:
    def perplexity(length, value):
        return {"length": length, "perplexity": value}

    def point(context, step_ms, size):
        return {
            "context": context,
            "tokens_per_second": 1e3 / step_ms,
            "step_ms": step_ms,
            "step_ms_low": 0.9 * step_ms,
            "step_ms_high": 1.2 * step_ms,
            "cache_bytes": size,
        }

    def bins(scale):
        return [
            {"begin": b, "end": 2 * b, "perplexity": scale / b, "standard_error": 0.1}
            for b in (1, 2, 4)
        ]

    def recalled(accuracy):
        return [
            {"distance": d, "trials": 4, "accuracy": accuracy, "standard_error": 0.1}
            for d in (64, 128)
        ]

    names = ("softmax", "window", "converted", "distilled")
    return {
        "positions": {n: {"windows": 2, "bins": bins(30.0 + i)} for i, n in enumerate(names)},
        "curves": {t: {n: recalled(0.5) for n in names} for t in ("copy", "associative")},
        "attention": {
            "distilled": [
                {"layer": i, "error": 0.1, "standard_error": 0.01, "heads": [0.05, 0.15]}
                for i in range(3)
            ]
        },
        "perplexity": {
            n: [perplexity(512, 30.0 + i), perplexity(2048, 25.0 * 40**i)]
            for i, n in enumerate(names)
        },
        "recall": {n: [{"distance": 200, "trials": 4, "accuracy": 0.5}] for n in names},
        "decode": {
            "softmax": [point(c, 20 + c / 100, 1000 * c) for c in (512, 1024)],
            "distilled": [point(c, 25, 4_000_000) for c in (512, 1024)],
        },
        "training": [
            {"step": i, "loss": 1 / (i + 1), "stage": s} for s in ("a", "b") for i in range(9)
        ],
    }


def size_of_png(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_draws_all_that_there_is(tmp_path):
    # Through JSON, as `dijiang plot` reads them.
    written = plots.draw(json.loads(json.dumps(results())), tmp_path / "plots")
    names = [
        "perplexity", "recall", "positions", "curves", "attention", "decode", "training", "summary",
    ]  # fmt: skip
    assert [path.stem for path in written] == names
    for path in written:
        width, height = size_of_png(path)
        assert width >= 700 and height >= 500
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize("key", plots.DRAWN)
def test_draws_a_part_alone(tmp_path, key):
    assert [p.stem for p in plots.draw({key: results()[key]}, tmp_path)] == [key]


def test_a_model_keeps_its_colour():
    order = ["softmax", "window", "distilled"]
    assert plots._places(["softmax", "distilled"], order) == [0, 2]
    assert plots._places(["a", "b"], []) == [0, 1]


def test_labels_name_units():
    _, axes = plots._figure(4, 3)
    plots._speed_lines(axes, results()["decode"])
    assert "tokens/s" in axes.get_ylabel() and "tokens" in axes.get_xlabel()
    plots._perplexity_bars(plots._figure(4, 3)[1], results()["perplexity"])
    _, axes = plots._figure(4, 3)
    plots._cache_lines(axes, results()["decode"])
    assert "MiB" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["softmax", "distilled"]


def test_a_long_name_does_not_cover_the_plot():
    _, axes = plots._figure(4, 3)
    name = "a/" * 40 + "model"
    plots._lines(axes, {name: [(1, 1.0)], "b": [(1, 2.0)]}, logy=False)
    shown, short = (text.get_text() for text in axes.get_legend().get_texts())
    assert short == "b" and len(shown) == 36 and shown.endswith("a/model") and shown[0] == "…"


def test_far_off_values_get_a_log_axis():
    near = {"a": [{"length": 512, "perplexity": 30.0}], "b": [{"length": 512, "perplexity": 40.0}]}
    far = {"a": [{"length": 512, "perplexity": 30.0}], "b": [{"length": 512, "perplexity": 4e4}]}
    for rows, scale in ((near, "linear"), (far, "log")):
        _, axes = plots._figure(4, 3)
        plots._perplexity_bars(axes, rows)
        assert axes.get_yscale() == scale


def test_nothing_to_draw(tmp_path):
    assert not plots.can_draw({"settings": {}, "positions": {}})
    with pytest.raises(ValueError, match="none of perplexity, recall, decode, training"):
        plots.draw({"settings": {}}, tmp_path)


class Shown(Exception):
    """Carries a finished figure out of a plot."""


def figure_of(monkeypatch, plot, *args):
    """The figure that a plot would have saved."""

    def stop(figure, path):
        raise Shown(figure)

    monkeypatch.setattr(plots, "_save", stop)
    with pytest.raises(Shown) as caught:
        plot(*args, "unused.png")
    return caught.value.args[0]


def test_positions_are_drawn_where_they_begin(monkeypatch):
    rows = results()["positions"]
    axes = figure_of(monkeypatch, plots.positions, rows).axes[0]
    line = axes.get_lines()[1]
    assert line.get_label() == "window"
    assert list(line.get_xdata()) == [1, 2, 4] and list(line.get_ydata()) == [31, 15.5, 7.75]
    rows["window"]["bins"][0]["standard_error"] = float("nan")  # of a single window
    assert figure_of(monkeypatch, plots.positions, rows).axes


def test_a_single_window_and_trial_are_drawn(tmp_path):
    """Standard errors of one are nan, in JSON, too."""
    content = results()
    for one in content["positions"].values():
        for row in one["bins"]:
            row["standard_error"] = float("nan")
    for models in content["curves"].values():
        for points in models.values():
            points[0]["standard_error"] = float("nan")
    for row in content["attention"]["distilled"]:
        row["standard_error"] = float("nan")
    content = {key: content[key] for key in ("positions", "curves", "attention")}
    assert len(plots.draw(json.loads(json.dumps(content)), tmp_path)) == 3


def test_recall_falls_from_panel_to_panel(monkeypatch):
    panels = figure_of(monkeypatch, plots.recall_curves, results()["curves"]).axes
    assert [axes.get_title().split()[0] for axes in panels] == ["copy", "associative"]
    line = next(x for x in panels[0].get_lines() if x.get_label() == "softmax")
    assert list(line.get_xdata()) == [64, 128] and list(line.get_ydata()) == [50, 50]


def test_layers_have_a_bar_and_heads_a_dot(monkeypatch):
    axes = figure_of(monkeypatch, plots.attention_errors, results()["attention"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.1] * 3
    dots = next(x for x in axes.get_lines() if x.get_marker() == ".")
    assert sorted(dots.get_ydata()) == [0.05] * 3 + [0.15] * 3


def test_maps_stand_side_by_side_on_one_scale(monkeypatch, tmp_path):
    import numpy as np
    import torch
    from dijiang.evaluate import AttentionMap

    teacher, student = torch.tensor([[1.0, 0.0], [0.25, 0.75]]), torch.eye(2)
    maps = [AttentionMap(layer, 1, teacher, student) for layer in (0, 3)]
    assert size_of_png(plots.attention_maps(maps[:1], tmp_path / "one.png"))[0] > 700
    figure = figure_of(monkeypatch, plots.attention_maps, maps)
    pairs = figure.axes[:4]
    titles = [axes.get_title() for axes in pairs]
    assert titles[:2] == ["layer 0, head 1: softmax", "layer 0, head 1: kernelised"]
    images = [axes.get_images()[0] for axes in pairs]
    assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 1
    shown = np.ma.filled(images[2].get_array(), np.nan)
    assert np.array_equal(shown, [[1.0, np.nan], [0.25, 0.75]], equal_nan=True)


def test_lines(tmp_path):
    path = plots.lines(
        {"ours": [(512, 1.0), (1024, 2.0)]}, tmp_path / "x.png", title="t", xlabel="x", ylabel="y"
    )
    assert size_of_png(path)[0] > 700
