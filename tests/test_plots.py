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

    names = ("softmax", "window", "converted", "distilled")
    return {
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
    names = ["perplexity", "recall", "decode", "training", "summary"]
    assert [path.stem for path in written] == names
    for path in written:
        width, height = size_of_png(path)
        assert width >= 700 and height >= 500
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize("key", ["perplexity", "recall", "decode", "training"])
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


def test_far_off_values_get_a_log_axis():
    near = {"a": [{"length": 512, "perplexity": 30.0}], "b": [{"length": 512, "perplexity": 40.0}]}
    far = {"a": [{"length": 512, "perplexity": 30.0}], "b": [{"length": 512, "perplexity": 4e4}]}
    for rows, scale in ((near, "linear"), (far, "log")):
        _, axes = plots._figure(4, 3)
        plots._perplexity_bars(axes, rows)
        assert axes.get_yscale() == scale


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="none of perplexity, recall, decode, training"):
        plots.draw({"settings": {}}, tmp_path)


def test_lines(tmp_path):
    path = plots.lines(
        {"ours": [(512, 1.0), (1024, 2.0)]}, tmp_path / "x.png", title="t", xlabel="x", ylabel="y"
    )
    assert size_of_png(path)[0] > 700
