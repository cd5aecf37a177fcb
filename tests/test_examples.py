"""Every script of examples/ on a tiny model, in two processes where it is for several."""

import pydoc_data.topics
import re
import runpy
import subprocess
import sys
from pathlib import Path

import dijiang
import pytest
import torch
from tiny import tiny_llama, tiny_model

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """--model, --data and small sizes."""
    folder = tmp_path_factory.mktemp("examples")
    topics = pydoc_data.topics.topics
    text = folder / "text.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    model = tiny_llama(folder / "model")
    return ["--model", str(model), "--data", str(text), "--length", "256", "--steps", "4"]


def run(monkeypatch, capsys, name, *arguments) -> list[float]:
    """The losses that the script printed."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return losses(capsys.readouterr().out)


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"\bloss'?:? '?(\d+\.\d+)", output)]


# A thread of torch's gloo that meets the interpreter's end, after all work is done: one run in ten
# of fsdp.py on a busy machine. Whatever else goes wrong fails at once.
EXIT_CRASH = "terminate called without an active exception"


def torchrun(name, *arguments) -> list[float]:
    for _ in range(4):
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", str(EXAMPLES / name), *arguments,
            ],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode == 0 or EXIT_CRASH not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(done.stdout)


def trained(folder) -> None:
    """What lies there is a converted model, no longer the one that it was."""
    model = dijiang.from_pretrained(folder)
    was = dijiang.convert(tiny_model())
    assert not torch.equal(model.lm_head.weight, was.lm_head.weight)
    assert model.generate(torch.arange(2, 12)[None], max_new_tokens=4).shape == (1, 14)


def test_every_script_has_a_test():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert scripts == tested


def test_trainer_goes_on_where_it_was_killed(settings, tmp_path, monkeypatch, capsys):
    whole = run(monkeypatch, capsys, "trainer.py", *settings, "--out", str(tmp_path / "whole"))
    assert len(whole) == 4
    arguments = [*settings, "--out", str(tmp_path / "parts"), "--save-steps", "2"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the first checkpoint
        patch.setattr("transformers.TrainerCallback.on_save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(patch, capsys, "trainer.py", *arguments)
    assert run(monkeypatch, capsys, "trainer.py", *arguments, "--resume") == whole[2:]
    trained(tmp_path / "parts")
    one, other = (dijiang.from_pretrained(tmp_path / x).state_dict() for x in ("whole", "parts"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_lora_loads_again(settings, tmp_path, monkeypatch, capsys):
    from peft import PeftModel
    from transformers import AutoConfig

    main = runpy.run_path(str(EXAMPLES / "lora.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["lora.py", *settings, "--out", str(tmp_path)])
    trained = main().eval()
    assert len(losses(capsys.readouterr().out)) == 4
    ids = torch.arange(2, 302)[None]
    adapted = trained(input_ids=ids, use_cache=False).logits
    with trained.disable_adapter():
        assert not torch.equal(trained(input_ids=ids, use_cache=False).logits, adapted)

    base, _ = dijiang.load_base(settings[1])
    config = dijiang.DiJiangConfig.from_dict(AutoConfig.from_pretrained(tmp_path).dijiang)
    again = PeftModel.from_pretrained(dijiang.convert(base, config), tmp_path).eval()
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, adapted)
    generated = again.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    merged = again.merge_and_unload()
    assert dijiang.is_converted(merged)
    torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, adapted)
    assert torch.equal(merged.generate(ids, max_new_tokens=8, do_sample=False), generated)


def test_packed_fine_tuning(settings, tmp_path, monkeypatch, capsys):
    assert len(run(monkeypatch, capsys, "sft.py", *settings, "--out", str(tmp_path))) == 4
    trained(tmp_path)


def test_sharded_is_data_parallel(settings, tmp_path):
    """FSDP2 and DistributedDataParallel read the same rows and give the same losses."""
    sharded = torchrun("fsdp.py", *settings, "--out", str(tmp_path / "sharded"))
    parallel = torchrun("accelerate_loop.py", *settings, "--out", str(tmp_path / "parallel"))
    assert len(sharded) == 4
    # Printed with four digits after the point; gradients are summed in another order.
    assert sharded == pytest.approx(parallel, abs=2e-4)
    trained(tmp_path / "sharded")
    one, other = (dijiang.from_pretrained(tmp_path / x) for x in ("sharded", "parallel"))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_slices_of_rows(settings, tmp_path):
    assert len(torchrun("sequence_parallel.py", *settings, "--out", str(tmp_path))) == 4
    trained(tmp_path)
