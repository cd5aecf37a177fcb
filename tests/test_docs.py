"""The site: its guide of feature maps runs, its pages name the whole API, and it builds."""

import pathlib
import re
import subprocess
import sys

import dijiang
import pytest
import torch
from dijiang import ops
from tiny import tiny_llama

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_guide_of_feature_maps(tmp_path):
    page = (DOCS / "feature_map.md").read_text()
    ids = torch.randint(2, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    folder, known = tiny_llama(tmp_path / "tiny"), {"ids": ids}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        code = block.replace("HuggingFaceTB/SmolLM2-135M", str(folder))
        exec(compile(code, "docs/feature_map.md", "exec"), known)
    assert known["losses"][-1] < known["losses"][0] / 2

    model, kernels = known["model"], [x.self_attn.dijiang for x in known["model"].model.layers]
    assert {type(k.features_k) for k in kernels} == {known["LowRank"]}
    for kernel in kernels:
        kernel.gate.data.zero_()  # a random model's calibration keeps them closed
    model(ids, labels=ids).loss.backward()
    assert all(k.features_q.up.grad.abs().sum() > 0 for k in kernels)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    cached = model.generate(ids[:, :120], **options)
    assert torch.equal(cached, model.generate(ids[:, :120], use_cache=False, **options))

    # As the guide says: from_pretrained knows its own maps alone, a state dict does.
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="matrix"):
        dijiang.from_pretrained(tmp_path / "student")


def test_every_page_is_in_the_navigation():
    entries = re.findall(r"- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(entries) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_every_public_name_is_on_a_page():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (dijiang\.[\w.]+)$", pages, flags=re.M))
    for name, module in dijiang._NAMES.items():
        either = {f"dijiang.{module}", f"dijiang.{module}.{name}"}
        assert either & listed, f"docs/api lacks dijiang.{module}.{name}"
    for name in dijiang._MODULES:
        if name != "ops":  # whose functions are named as the files they stand in
            assert f"dijiang.{name}" in listed
    for name in ops.__all__:
        assert any(f"{entry}.".endswith(f".{name}.") for entry in listed), name


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install --group docs")
    pytest.importorskip("mkdocstrings", reason="pip install --group docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
