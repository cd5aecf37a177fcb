"""What the guides of converting, distilling and serving show is run, in its order."""

import pathlib
import re

import dijiang
import pytest
import torch
from dijiang import DiJiangConfig, data, plots
from tiny import tiny_llama
from transformers import TextStreamer

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
#: Lengths and sizes for a tiny model and a test's patience; everything else as printed.
SMALLER = {
    "4096)": "300)", "1024)": "300)", "cache_size=128": "cache_size=8", "65536": "600",
    "max_new_tokens=200": "max_new_tokens=20", "folder, hub id or GGUF file": "tiny",
}  # fmt: skip


def examples(page: str) -> list[str]:
    """The indented blocks of Python, without their indent, but for what has tests of its own."""
    text = (DOCS / page).read_text()
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.M)
    found = [re.sub(r"^    ", "", block, flags=re.M).strip("\n") for block in found]
    return [x for x in found if not re.match(r"dijiang [a-z]|cmake |.*export_decode", x)]


@pytest.mark.parametrize(("page", "count"), [("convert.md", 3), ("distill.md", 2), ("serve.md", 3)])
def test_python(page, count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_llama("tiny")
    (tmp_path / "notes").mkdir()
    text = "\n\n".join(data.load_text().held_out[:8])
    (tmp_path / "notes" / "all.txt").write_text(text)
    ids = torch.randint(2, 500, (1, 300), generator=torch.Generator().manual_seed(0))
    known = {
        "dijiang": dijiang, "data": data, "plots": plots, "torch": torch, "ids": ids,
        "TextStreamer": TextStreamer, "corpus": data.load_text("notes/"), "question": ids[:, :9],
        "prompts": [ids[:, :n] for n in (30, 200, 7, 80)], "another": ids[:, 40:90],
    }  # fmt: skip
    blocks = examples(page)
    assert len(blocks) == count
    for block in blocks:
        model, known["tokenizer"] = dijiang.load_base("tiny")
        if "convert(" not in block:
            dijiang.convert(model, DiJiangConfig(window=8, gate=0.0))
        known["model"] = model
        for printed, smaller in SMALLER.items():
            block = block.replace(printed, smaller)
        if "streamer" in block:  # goes on from one row
            known["cache"], known["ids"] = dijiang.prefill(model, ids), ids[:, :5]
        exec(compile(block, f"docs/{page}", "exec"), known)
