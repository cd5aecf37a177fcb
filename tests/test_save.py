"""save_pretrained and from_pretrained: the same logits in a new process, or a clear error."""

import json
import subprocess
import sys

import dijiang
import pytest
import safetensors.torch
import torch
from dijiang import DiJiangConfig
from tiny import tiny_llama, tiny_model

CONFIG = DiJiangConfig(window=8, sinks=2, gate=-0.5, layers=[1])
IDS = torch.randint(2, 500, (2, 40), generator=torch.Generator().manual_seed(0))

IN_A_NEW_PROCESS = """
import sys, torch, dijiang
model = dijiang.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[3])
"""


def trained(config=CONFIG, **overrides):
    """A converted model none of whose parameters is where it started."""
    model = dijiang.convert(tiny_model(**overrides), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_new_process_same_logits(folder, tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [folder, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    run = [sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, arguments)]
    subprocess.run(run, check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(trained()))


@pytest.mark.parametrize(
    "config",
    [
        DiJiangConfig(), DiJiangConfig.published(), DiJiangConfig.window_only(),
        DiJiangConfig(feature_map="wpff", random_signs=True, decay="token"),
        DiJiangConfig(feature_map="wdcf", random_signs=True, radius="chi", num_features=20),
        DiJiangConfig(per_layer={0: {"cache_size": (16, 4)}, 1: {"feature_map": "wdcf"}}),
    ],
    ids=["default", "published", "window", "wpff", "wdcf", "by layer"],
)  # fmt: skip
def test_every_config(config, tmp_path):
    model = trained(config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dijiang"] == config.to_dict()
    loaded = dijiang.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert dijiang.is_converted(loaded) and not loaded.training
    assert str(tmp_path) in loaded.dijiang_start
    with dijiang.softmax_mode(loaded), dijiang.softmax_mode(model):
        assert torch.equal(logits(loaded), logits(model))
    dijiang.restore(loaded)
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_generates_after_loading(folder):
    new = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(
        dijiang.from_pretrained(folder).generate(IDS, **new), trained().generate(IDS, **new)
    )


def test_low_precision_base_keeps_kernels_in_float32(tmp_path):
    model = dijiang.convert(
        dijiang.load_base(tiny_llama(tmp_path), dtype=torch.bfloat16)[0], CONFIG
    )
    model.save_pretrained(tmp_path)
    loaded = dijiang.from_pretrained(tmp_path)
    kernel = loaded.model.layers[1].self_attn.dijiang
    assert loaded.dtype == torch.bfloat16 and kernel.gate.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert dijiang.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_sharded_checkpoints(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(dijiang.from_pretrained(tmp_path)), logits(model))
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(ValueError, match="lacks model-00002"):
        dijiang.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "empty", "noise in front"])
def test_damaged_weights(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut short": whole[:-100], "empty": b"", "noise in front": b"noise" + whole}[damage]
    )
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        dijiang.from_pretrained(folder)


def change(folder, function):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    function(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


GATE = "model.layers.1.self_attn.dijiang.gate"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x.pop(GATE), f"lack: {GATE}"),
        (lambda x: x.pop("model.norm.weight"), r"lack: model\.norm\.weight"),
        (lambda x: x.update({GATE: torch.zeros(3)}), rf"{GATE} must have shape \(4,\), got \(3,\)"),
        (lambda x: x.update({"model.extra": torch.zeros(3)}), r"have in excess: model\.extra"),
        (lambda x: x.update({GATE + "2": torch.zeros(3)}), f"have in excess: {GATE}2"),
        (lambda x: x.update({"model.norm.weight": torch.zeros(3)}), "damaged|shapes"),
    ],
    ids=["kernel missing", "base missing", "kernel shape", "base excess", "kernel excess",
         "base shape"],
)  # fmt: skip
def test_incomplete_weights(folder, function, says):
    change(folder, function)
    with pytest.raises(ValueError, match=says):
        dijiang.from_pretrained(folder)


def test_damaged_configs(folder):
    config = json.loads((folder / "config.json").read_text())
    for text, error, says in (
        ("{", ValueError, r"config\.json is damaged"),
        (json.dumps(config | {"dijiang": {"window": -1}}), ValueError, "window must be at least 0"),
        (json.dumps(config | {"dijiang": {"magic": 1}}), ValueError, "unknown 'magic'"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(error, match=says):
            dijiang.from_pretrained(folder)


def test_what_is_no_converted_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        dijiang.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        dijiang.from_pretrained(tmp_path / "empty")
    tiny_llama(tmp_path / "base")
    with pytest.raises(ValueError, match=r"not converted.*load_base"):
        dijiang.from_pretrained(tmp_path / "base")


def test_plain_transformers_loads_the_base_and_convert_says_so(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(dijiang.ConversionError, match=r"dijiang\.from_pretrained"):
        dijiang.convert(model)


def test_load_base(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    model, tokenizer = dijiang.load_base(folder)
    assert torch.equal(logits(model), logits(tiny_model(vocab_size=len(tokenizer))))
    assert dijiang.load_base(folder, tokenizer=False)[1] is None
    assert dijiang.load_base(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.gguf"):
        dijiang.load_base(tmp_path / "none.gguf")
