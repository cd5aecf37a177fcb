"""What docs/evaluate.md shows is run, in its order: Python on a tiny model, commands by the CLI."""

import pathlib
import re
import shlex
import sys

import dijiang
import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from dijiang import cli, data, plots
from dijiang.evaluate import suite
from tiny import tiny_llama, tiny_model, tiny_tokenizer

PAGE = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "evaluate.md").read_text()


def examples() -> list[str]:
    """Indented blocks, without their indent."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, flags=re.M)
    return [re.sub(r"^    ", "", block, flags=re.M).strip("\n") for block in found]


def is_python(block: str) -> bool:
    return not block.startswith(("dijiang ", "pip "))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "notes").mkdir()
    text = "\n\n".join(data.load_text().held_out[:8])
    (folder / "notes" / "all.txt").write_text(text)
    return folder


def test_python(notes, monkeypatch, capsys):
    monkeypatch.chdir(notes)
    tokenizer = tiny_tokenizer()
    model = dijiang.convert(
        tiny_model(vocab_size=len(tokenizer)), dijiang.DiJiangConfig(window=8, gate=0.0)
    )
    known = {"model": model, "tokenizer": tokenizer, "dijiang": dijiang, "plots": plots}
    blocks = [block for block in examples() if is_python(block)]
    assert len(blocks) == 6
    for block in blocks:
        # Lengths for a test's patience; everything else as printed.
        block = block.replace("2048)", "300, blocks=2)").replace("8192)", "600, blocks=1)")
        exec(compile(block.replace("trials=10", "trials=1"), "docs/evaluate.md", "exec"), known)
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].startswith("1 2 ") and printed[9].startswith("512 600 ")
    # The drawing that the text names within a line.
    plots.attention_maps([known["one"], known["two"]], "maps.png")
    assert pathlib.Path("maps.png").exists()
    assert eval(re.search(r"    (evaluate.gap_closed\(.*\))  # 0.6", PAGE)[1], known) == 0.6


def test_commands(notes, monkeypatch, capsys):
    monkeypatch.chdir(notes)
    tiny_llama("folder")
    monkeypatch.setattr(suite, "lm_eval", lambda *args, **options: {"results": {"a": {"b": 0.5}}})
    lines = [line for block in examples() if not is_python(block) for line in block.split("\n")]
    lines = [line for line in lines if line.startswith("dijiang ")]
    assert len(lines) == 2
    small = (
        " --data notes --tokens 64 --lengths 32 --trials 1 --distances 8 --position-length 64"
        " --reach 8"
    )
    for line in ["dijiang convert --model folder --data notes --window 8 --out student", *lines]:
        if " eval " in line:
            line += small
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert cli.main() == 0, (line, capsys.readouterr().err)
    assert pathlib.Path("plots/maps.png").exists()


def test_it_names_every_measurement_and_task():
    for name in {*suite.MEASURES, *suite.TASKS} - {"harness"}:  # which has an option of its own
        assert f"`{name}`" in PAGE or f"## {name.capitalize()}\n" in PAGE, name
