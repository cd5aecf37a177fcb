"""What the README and the guides show is run: Python on a tiny model, commands through the CLI."""

import pathlib
import re
import shlex
import subprocess
import sys

import dijiang
import pytest
import torch

pytest.importorskip("typer")

from dijiang import cli, hub
from tiny import tiny_llama

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def tiny_default(tmp_path_factory, monkeypatch, tmp_path):
    """The default model is a tiny one, and the working folder an empty one."""
    folder = tiny_llama(tmp_path_factory.mktemp("default") / "tiny")
    monkeypatch.setattr(hub, "default_model", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_block_is_of_a_kind_that_is_run():
    fences = re.findall(r"^```(\w*)$", README, flags=re.M)
    assert fences[1::2] == [""] * (len(fences) // 2)  # every second one closes
    assert set(fences[::2]) == {"diff", "python", "sh"}


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python(index, tiny_default, capsys):
    code = blocks("python")[index].replace("meta-llama/Llama-3.2-1B", str(tiny_default))
    # The whole of Python's help takes long even on a tiny model: the first rows do.
    code = code.replace("distill(model, train,", "distill(model, train[:4096],")
    code = code.replace("tokenizer, 1024)", "tokenizer, 1024, blocks=4)").replace("65536", "2048")
    exec(compile(code, f"README.md, Python block {index}", "exec"), {})


def test_lines_of_a_script(tiny_default):
    """The script as the diff leaves it."""
    (diff,) = blocks("diff")
    code = re.sub(r"^[+ ]", "", re.sub(r"^-.*\n", "", diff, flags=re.M), flags=re.M)
    rows = torch.randint(2, 500, (2, 300), generator=torch.Generator().manual_seed(0))
    known = {
        "name": tiny_default, "rows": rows,
        "dataset": [{"input_ids": row, "labels": row} for row in rows],
        "arguments": dict(max_steps=1, report_to="none", use_cpu=True, save_strategy="no"),
    }  # fmt: skip
    exec(compile(code, "README.md, diff", "exec"), known)
    assert dijiang.is_converted(known["model"])


def shell_lines() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.split("\n")]
    return [line for line in lines if line]


def test_commands(tiny_default, monkeypatch, capsys):
    """In the README's order: what one writes the next reads."""
    lines = [line for line in shell_lines() if line.startswith("dijiang ")]
    assert len(lines) >= 5
    pathlib.Path("book.txt").write_text("The cat sat on the mat. " * 30)
    for line in lines:
        # Sizes for a tiny model and a test's patience; everything else as printed.
        line = line.replace("65536", "2048").replace("512,8192", "64,128")
        line = line.replace("--lengths 512,2048", "--lengths 64,128 --tokens 256 --trials 1")
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert cli.main() == 0, (line, capsys.readouterr().err)


def test_make_targets_exist():
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.M)
            assert anchor in [h.lower().replace(" ", "-") for h in headings]


def test_folders_named_exist():
    rooms = README[README.index("## Rooms") :]
    for name in re.findall(r"`([a-z/]+)/?`", rooms.split("\n\n")[1]):
        candidates = [ROOT / name, ROOT / "include" / "dijiang" / name]
        if "/" in name or name in ("tests", "benchmarks", "docs"):
            assert any(c.exists() for c in candidates), name


def test_bash_names_in_guides_are_commands():
    """The guides' indented examples name commands and functions that exist."""
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\bdijiang\.([a-zA-Z_]+)\(", page.read_text()):
            assert hasattr(dijiang, name), f"{page.name}: dijiang.{name}"
        for name in re.findall(r"^    dijiang ([a-z]+)", page.read_text(), flags=re.M):
            assert name in {c.name or c.callback.__name__ for c in cli.app.registered_commands}
