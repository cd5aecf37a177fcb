"""Every command of `dijiang` on a tiny model: what it prints, where, and with which exit code."""

import json
import subprocess
import sys

import pytest
import torch

typer = pytest.importorskip("typer")

from dijiang import cli  # noqa: E402
from tiny import tiny_llama  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    lines = [
        f"Note {i} says that {i * i} is the square of {i}, as everyone knows." for i in range(400)
    ]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) -> (exit code, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dijiang", *map(str, words)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_error_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("demo", "convert", "distill", "eval", "generate", "bench", "plot", "info"):
        assert f" {name} " in out


@pytest.mark.parametrize(
    "command", ["demo", "convert", "distill", "eval", "generate", "bench", "plot", "info"]
)
def test_help_of_each_command_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out and "Example" in out and f"dijiang {command}" in out


def test_info(run):
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["cpu_kernels"] == "built"
    assert facts["usable"] in ("cpu", "cpu, cuda")
    code, out, _ = run("info")
    assert code == 0 and "cuda kernels" in out


def test_convert_then_eval_generate_bench(run, folder, text, tmp_path):
    out_folder = tmp_path / "converted"
    code, out, err = run(
        "convert", "--model", folder, "--data", text, "--window", 16, "--cache-size", 4,
        "--out", out_folder, "--json",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(out)
    assert made["config"]["window"] == 16 and made["config"]["cache_size"] == 4
    assert "calibrated" in made["start"]
    spread = [own["cache_size"] for own in made["config"]["per_layer"].values()]
    sizes = [(size, size) if isinstance(size, int) else size for size in spread]
    assert len(sizes) == 2 and sum(map(sum, sizes)) <= 2 * 2 * 4
    assert (out_folder / "model.safetensors").exists()

    code, out, err = run(
        "convert", "--model", folder, "--data", text, "--window", 16, "--even", "--json",
        "--out", tmp_path / "even",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads(out)["config"]
    assert config["cache_size"] == 16 and config["per_layer"] == {}

    code, out, err = run(
        "eval", "--model", out_folder, "--teacher", folder, "--data", text, "--lengths", "64,128",
        "--tokens", 256, "--distances", 50, "--trials", 2, "--json",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(out)
    assert set(made["perplexity"]) == {str(out_folder), str(folder)}
    rows = made["perplexity"][str(folder)]
    assert [row["length"] for row in rows] == [64, 128]
    assert all(300 < row["perplexity"] < 800 for row in rows)  # a random model over 512 tokens
    assert made["recall"][str(folder)][0]["trials"] == 2

    code, out, err = run("generate", "--model", out_folder, "Note 3", "--max-new-tokens", 4)
    assert code == 0, err
    assert out.startswith("Note 3")

    notes, state = tmp_path / "notes.txt", tmp_path / "notes.safetensors"
    notes.write_text("Note 1 says that 3 is 1 times 3. " * 20)
    code, out, err = run("read", notes, "--model", out_folder, "--out", state, "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == state.stat().st_size
    prompt = "Note 3"
    code, whole, err = run(
        "generate", "--model", out_folder, notes.read_text() + prompt, "--max-new-tokens", 9
    )
    code, out, err = run(
        "generate", "--model", out_folder, "--state", state, prompt, "--max-new-tokens", 9
    )
    assert code == 0, err
    assert whole == notes.read_text() + out
    code, out, err = run("generate", "--model", folder, "--state", state, prompt)
    assert code == 2 and "not converted" in err

    code, out, err = run("bench", "--model", folder, "--contexts", "64,128", "--steps", 2, "--json")
    assert code == 0, err
    decode = json.loads(out)["decode"]
    assert set(decode) == {"softmax", "converted"}
    sizes = {name: [row["cache_bytes"] for row in rows] for name, rows in decode.items()}
    assert sizes["softmax"][1] > sizes["softmax"][0]
    assert sizes["converted"][1] == sizes["converted"][0]


def test_tables_are_readable(run, folder, text):
    code, out, _ = run(
        "eval", "--model", folder, "--data", text, "--lengths", "64", "--tokens", 64,
        "--distances", "20", "--trials", 1,
    )  # fmt: skip
    assert code == 0
    head, row = out.splitlines()
    assert head.split() == ["model", "perplexity", "64", "recall", "20"]
    assert row.startswith(str(folder)) and row.endswith("%")


def test_eval_measures_everything(run, folder, text, tmp_path):
    """Student, teacher and training-free window side by side, in JSON and in pictures."""
    pytest.importorskip("matplotlib")
    from dijiang.evaluate.suite import BASELINE

    student = tmp_path / "converted"
    assert (
        run("convert", "--model", folder, "--data", text, "--window", 8, "--out", student)[0] == 0
    )
    small = (
        "--data", text, "--lengths", "64", "--tokens", 256, "--distances", 50, "--trials", 2,
        "--position-length", 128, "--reach", "8,64", "--measure", "all",
    )  # fmt: skip
    plots = tmp_path / "plots"
    code, out, err = run(
        "eval", "--model", student, "--teacher", folder, "--baseline", *small, "--plots", plots,
        "--heads", "1:3", "--json",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(out)
    names = [str(student), str(folder), BASELINE]
    assert list(made["perplexity"]) == list(made["positions"]) == list(made["recall"]) == names
    assert set(made["curves"]) == {"pass-key", "associative", "copy"}
    for models in made["curves"].values():
        assert [[row["distance"] for row in models[name]] for name in names] == [[8, 64]] * 3
    assert [row["end"] for row in made["positions"][names[0]]["bins"]][-1] == 128
    assert [row["layer"] for row in made["attention"][names[0]]] == [0, 1]
    # The teacher of the agreement is the one of the positions: the same windows, the same loss.
    agreement = made["agreement"][names[0]]
    bins = made["positions"][names[1]]["bins"]
    loss = sum(row["loss"] * row["tokens"] for row in bins) / sum(row["tokens"] for row in bins)
    assert agreement["teacher"]["loss"] == pytest.approx(loss, rel=1e-5)
    teacher, window = (made["perplexity"][name][0]["perplexity"] for name in names[1:])
    assert set(made["gap_closed"]) == ({"64"} if window > teacher else set())
    files = ["perplexity", "recall", "positions", "curves", "attention", "maps"]
    assert made["plots"] == [str(plots / f"{name}.png") for name in files]
    assert all((plots / f"{name}.png").exists() for name in files)

    # The teacher in the student itself, and a table for a person.
    code, out, err = run("eval", "--model", student, *small)
    assert code == 0, err
    for words in ("perplexity 64", "tokens before", "copy, ", "KL to the teacher", "worst head"):
        assert words in out
    assert not (tmp_path / "maps.png").exists()

    # What a model that is not converted has no answer to is left out of "all" alone.
    code, out, err = run("eval", "--model", folder, *small, "--json")
    assert code == 0, err
    assert list(json.loads(out)) == ["data", "perplexity", "recall", "positions", "curves"]
    code, _, err = run("eval", "--model", folder, *small[:-1], "attention,agreement")
    assert code == 2
    assert f"{folder} is not converted, which agreement, attention asks for" in one_error_line(err)

    code, out, err = run("eval", "--model", folder, "--teacher", student, "--baseline", *small)
    assert code == 2 and out == ""
    assert f"{student} is converted: give the model it was converted from" in one_error_line(err)

    alone = tmp_path / "far-alone"
    assert run("convert", "--model", folder, "--preset", "paper", "--out", alone)[0] == 0
    code, out, err = run("eval", "--model", alone, "--teacher", folder, "--baseline", *small)
    assert code == 2 and out == ""
    assert "takes its window and sinks from the student, which has neither" in one_error_line(err)


def test_eval_on_tasks_of_the_harness(run, folder, text, monkeypatch):
    from dijiang.evaluate import suite

    seen = []

    def measured(model, tokenizer, tasks, limit=None):
        seen.append((tasks, limit))
        return {"results": {"piqa": {"acc,none": 0.25, "alias": "piqa"}}, "versions": {}}

    monkeypatch.setattr(suite, "lm_eval", measured)
    code, out, err = run(
        "eval", "--model", folder, "--data", text, "--measure", "", "--lm-eval", "piqa,arc_easy",
        "--limit", 5,
    )  # fmt: skip
    assert code == 0, err
    assert seen == [(("piqa", "arc_easy"), 5)]
    head, row = out.splitlines()
    assert head.split() == ["task,", "metric", str(folder)]
    assert row.split() == ["piqa,", "acc,none", "0.25"]


def test_distill(run, folder, text, tmp_path):
    code, out, err = run(
        "distill", "--model", folder, "--data", text, "--window", 16, "--tokens", 512,
        "--length", 128, "--out", tmp_path / "student", "--json",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(out)
    assert made["training"] and all(row["loss"] > 0 for row in made["training"])
    code, out, _ = run(
        "generate", "--model", tmp_path / "student", "Note", "--max-new-tokens", 2, "--json"
    )
    assert code == 0 and json.loads(out)["tokens"] <= 2


def test_distill_on_repeats(run, folder, text, tmp_path, monkeypatch):
    from dijiang import data, distillation

    rows, distill = [], distillation.distill
    monkeypatch.setattr(
        distillation,
        "distill",
        lambda model, blocks, **options: rows.append(blocks) or distill(model, blocks, **options),
    )
    words = ("distill", "--model", folder, "--data", text, "--window", 16, "--tokens", 256)
    for more in ((), ("--repeats",)):
        code, _, err = run(*words, "--length", 256, "--out", tmp_path / f"student{more}", *more)
        assert code == 0, err
    assert torch.equal(rows[1], data.with_repeats(rows[0]))
    assert not torch.equal(rows[1], rows[0])
    code, _, err = run(*words, "--length", 128, "--repeats", "--out", tmp_path / "short")
    assert code == 2 and "passage must be" in err


def test_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results.json"
    rows = {"a": [{"length": 512, "perplexity": 30.0}]}
    results.write_text(json.dumps({"perplexity": rows}))
    code, out, _ = run("plot", results, "--out", tmp_path / "plots", "--json")
    assert code == 0
    assert json.loads(out)["files"] == [str(tmp_path / "plots" / "perplexity.png")]
    assert (tmp_path / "plots" / "perplexity.png").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["convert"], "Missing option '--out'"),
        (["eval", "--tokens", "many"], "'--tokens'"),
        (["eval", "--lengths", "512,x"], "--lengths takes whole numbers by comma, got '512,x'"),
        (["eval", "--lengths", "1"], "--lengths must be at least 2"),
        (["eval", "--trials", "0"], "--trials and --tokens must be positive"),
        (["eval", "--measure", "beauty"], "--measure must be among perplexity, recall, positions"),
        (["eval", "--measure", ""], "--measure names nothing to measure"),
        (["eval", "--measure", "maps"], "--measure maps draws pictures: say where, by --plots"),
        (["eval", "--baseline"], "--baseline is made of the teacher: give --teacher"),
        (["eval", "--tasks", "poetry"], "tasks must be among pass-key, associative, copy, got"),
        (["eval", "--heads", "1"], "--heads takes layer:head by comma, got '1'"),
        (["eval", "--reach", "0"], "--reach must be at least 1"),
        (["eval", "--position-length", "1"], "--position-length must be at least 2, got 1"),
        (["eval", "--data", "gone.txt"], "gone.txt: no such file or folder"),
        (["eval", "--model", "./gone"], "gone"),
        (["generate", "--model", "./gone.gguf", "x"], "gone.gguf"),
        (["generate", "x", "--temperature", "-1"], "--temperature at least 0"),
        (["bench", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["bench", "--contexts", "0"], "--contexts must be at least 1"),
        (["convert", "--out", "x", "--feature-map", "magic"], "feature_map must be one of"),
        (["plot", "gone.json"], "gone.json: no such file"),
        (["demo", "--minutes", "0"], "--minutes must be positive, got 0"),
        (["demo", "--data", "gone.txt"], "gone.txt: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2, err
    assert message in one_error_line(err)
    assert out == ""


def test_bad_results_files(run, tmp_path):
    bad = tmp_path / "bad.json"
    for content in ("{", "[1]", "{}", '{"perplexity": {"a": [{"length": 3}]}}'):
        bad.write_text(content)
        code, _, err = run("plot", bad, "--out", tmp_path)
        assert code == 2
        assert str(bad) in one_error_line(err) or "nothing to draw" in err


def test_text_too_short(run, folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("One sentence. Another sentence.")
    code, _, err = run("eval", "--model", folder, "--data", path, "--lengths", 512)
    assert code == 2
    assert "short.txt, held-out part: too short" in one_error_line(err)


def test_a_failure_is_exit_code_1(run, monkeypatch, folder):
    from dijiang import hub

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(hub, "load_base", fail)
    code, _, err = run("generate", "--model", folder, "x")
    assert code == 1
    assert one_error_line(err) == "error: the disk is full"


def test_json_owns_standard_output(folder, text):
    """In a process of its own: nothing but the JSON may come out, notes of libraries included."""
    command = [sys.executable, "-m", "dijiang.cli", "eval", "--model", str(folder), "--data"]
    options = [str(text), "--lengths", "64", "--tokens", "64", "--distances", "", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["data", "perplexity"]


def test_without_typer(tmp_path):
    """One line names the extra to install."""
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from dijiang.cli import main; raise SystemExit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the command line needs typer and rich: pip install 'dijiang[cli]'\n"
    )
