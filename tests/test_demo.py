"""The whole demo on a tiny model, its second run, and how it divides the time."""

import dataclasses
import json

import pytest
import torch
from tiny import tiny_llama

pytest.importorskip("matplotlib")

from dijiang import data, demo, evaluate
from dijiang.config import DiJiangConfig


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    notes = folder / "notes"
    notes.mkdir()
    for n in range(10):
        lines = [f"Note {i} of part {n} says that {i * n} is {i} times {n}." for i in range(60)]
        (notes / f"{n}.txt").write_text("\n\n".join(lines))
    return demo.Settings(
        model=str(tiny_llama(folder / "tiny")),
        data=str(notes),
        out=folder / "out",
        minutes=0.15,
        config=DiJiangConfig(window=8, sinks=2),
        lengths=(32, 64),
        distances=(40,),
        contexts=(32, 64),
        train_length=64,
        new_tokens=6,
    )


@pytest.fixture(scope="module")
def results(settings):
    torch.set_num_threads(1)  # tiny products: a second thread only waits
    return demo.run(settings)


def test_results_hold_every_figure(results, settings):
    names = [demo.SOFTMAX, demo.WINDOW, demo.CONVERTED, demo.DISTILLED]
    names += [demo.LINEAR, demo.LINEAR_DISTILLED]
    assert list(results["perplexity"]) == list(results["recall"]) == names
    for name in names:
        assert [row["length"] for row in results["perplexity"][name]] == [32, 64]
        assert [row["distance"] for row in results["recall"][name]] == [40]
        assert all(1 < row["perplexity"] < 1000 for row in results["perplexity"][name])
    assert list(results["students"]) == [demo.DISTILLED, demo.LINEAR_DISTILLED]
    assert all(student["tokens"] > 0 for student in results["students"].values())
    transfer, prediction = demo._STAGES.values()
    assert list(dict.fromkeys(row["stage"] for row in results["training"])) == [
        f"converted: {prediction}", f"far keys alone: {transfer}", f"far keys alone: {prediction}",
    ]  # fmt: skip
    softmax, student = (results["decode"][name] for name in (demo.SOFTMAX, demo.DISTILLED))
    assert softmax[1]["cache_bytes"] > softmax[0]["cache_bytes"]
    assert student[1]["cache_bytes"] == student[0]["cache_bytes"]
    assert len(results["generation"]) == 2
    assert results["settings"]["config"]["window"] == 8


def test_teacher_and_distilled_figures_are_those_of_the_models(results, settings):
    """The report's figures again, from the saved model and from the source."""
    from dijiang import hub

    corpus = data.load_text(settings.data)
    teacher, tokenizer = hub.load_base(settings.model)
    prose = data.tokenize(corpus.held_out, tokenizer)
    blocks = data.cut(prose, 64, blocks=results["plan"]["eval_tokens"] // 64)
    models = {demo.SOFTMAX: teacher}
    for student in demo.students(settings.config, settings.train_length):
        models[student.after] = hub.from_pretrained(settings.out / student.folder)
    for name, model in models.items():
        again = evaluate.perplexity(model, blocks).perplexity
        assert again == pytest.approx(results["perplexity"][name][1]["perplexity"], rel=1e-5)
    losses = [results["perplexity"][name][1]["loss"] for name in (demo.CONVERTED, demo.DISTILLED)]
    assert losses[0] != losses[1]


def test_report_and_plots(results, settings):
    page = (settings.out / "report.md").read_text()
    for words in (demo.SOFTMAX, demo.WINDOW, "perplexity 64", "recall 40", "tokens/s"):
        assert words in page
    for name in ("summary", "perplexity", "recall", "decode", "training"):
        assert f"]({name}.png)" in page
        assert (settings.out / f"{name}.png").stat().st_size > 1000
    assert json.loads((settings.out / "results.json").read_text()) == results
    assert f"{results['perplexity'][demo.DISTILLED][0]['perplexity']:.2f}" in page


def test_second_run_reuses_everything(results, settings, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a second run has nothing to load")

    monkeypatch.setattr(demo, "load_base", refuse)
    monkeypatch.setattr(demo, "from_pretrained", refuse)
    again = demo.run(settings)
    for key in results:
        if key != "seconds":
            assert again[key] == results[key], key


def test_changed_settings_redo_what_they_touch(results, settings, monkeypatch):
    calls = []
    for name in ("perplexity", "pass_key_recall", "decode_speed"):
        function = getattr(evaluate, name)

        def counted(*args, _name=name, _function=function, **kwargs):
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(evaluate, name, counted)
    demo.run(dataclasses.replace(settings, contexts=(16, 32)))
    assert calls == ["decode_speed"]


def test_missing_model_is_trained_again(results, settings, monkeypatch):
    """Results of a model that is gone must not be shown as if it were there."""
    import shutil

    trained = []
    train = demo._Demo._train

    def counted(self, *args):
        trained.append(True)
        return train(self, *args)

    monkeypatch.setattr(demo._Demo, "_train", counted)
    shutil.rmtree(settings.out / "model")
    demo.run(settings)
    assert trained and (settings.out / "model" / "model.safetensors").exists()


def test_too_short_a_text_is_named(settings, tmp_path):
    (tmp_path / "short.txt").write_text("One sentence. And another one.")
    short = dataclasses.replace(settings, data=str(tmp_path / "short.txt"), out=tmp_path / "out")
    with pytest.raises(data.DataError, match=r"short\.txt, .*: too short"):
        demo.run(short)


@pytest.mark.parametrize("speed", [30, 300, 3000])
def test_plan_fits_the_time(speed):
    settings = demo.Settings()
    made = demo.plan(settings, speed)
    passes = demo._MODELS * 1.1 / speed
    perplexity = passes * made.eval_tokens * len(settings.lengths)
    recall = passes * made.trials * sum(d + 40 for d in settings.distances)
    assert made.eval_tokens % max(settings.lengths) == 0 and made.trials >= 2
    if speed >= 300:  # a machine of two slow cores; slower ones measure the least there is
        assert perplexity + recall + made.train_seconds <= 0.8 * 60 * settings.minutes


def test_plan_grows_with_the_machine():
    slow, fast = (demo.plan(demo.Settings(), speed) for speed in (100, 1000))
    assert fast.eval_tokens > slow.eval_tokens and fast.trials > slow.trials
