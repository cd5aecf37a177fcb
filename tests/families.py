"""What must hold for every family of models alike, on a tiny random model of each.

python tests/families.py    # the rows of benchmarks/results/families.csv for this transformers
"""

from __future__ import annotations

import copy
import csv
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable

import dijiang
import torch
import transformers
from dijiang import DiJiangConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONFIG = DiJiangConfig(window=8, sinks=2, cache_size=3, gate=0.0)
SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
    eos_token_id=1, pad_token_id=1, attention_dropout=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    embd_pdrop=0.0, dropout=0.0, hidden_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
    initializer_range=0.2, init_std=0.2,
)  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
#: The table's name -> (the type in transformers, what its config has of its own).
FAMILIES: dict[str, tuple[str, dict]] = {
    "LLaMA, TinyLlama, SmolLM": ("llama", {}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "Pythia 2.8B: heads of 80": ("gpt_neox", {"hidden_size": 160, "num_attention_heads": 2}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "OPT 350M: post-norm, projected embeddings": (
        "opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mixtral": ("mixtral", {"sliding_window": None}),
    "Qwen2": ("qwen2", FULL),
    "Qwen3": ("qwen3", {"head_dim": 8} | FULL),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma2": ("gemma2", {"head_dim": 8} | FULL),
    "Phi": ("phi", {}),
    "Phi3": ("phi3", {"sliding_window": None}),
    "GPT-2": ("gpt2", {}),
    "GPT-BigCode": ("gpt_bigcode", {}),
    "OLMo": ("olmo", {}),
    "OLMo2": ("olmo2", {}),
    "StarCoder2": ("starcoder2", {"sliding_window": None}),
    "StableLM": ("stablelm", {}),
    "Cohere": ("cohere", {}),
    "SmolLM3": ("smollm3", FULL),
    "Granite": ("granite", {}),
    "Falcon": ("falcon", {}),
    "Bloom": ("bloom", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "MPT": ("mpt", {}),
}  # fmt: skip
RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "families.csv"


def tiny(kind: str, **overrides):
    """A tiny random model; sizes go by whatever names its config has for them."""
    config = CONFIG_MAPPING[kind]()
    for key, value in (SIZES | overrides).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def family(name: str):
    kind, own = FAMILIES[name]
    return tiny(kind, **own)


def token_ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(2, 100, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def close(ours, theirs, rounding: float = 0.0) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=max(1e-5, 2 * rounding))


# ---- behaviours: each takes a converted model and its softmax self -------------------------------


def starts_as_its_near_keys(model, teacher) -> None:
    """Nothing is far in the first two blocks: there the model is its teacher; later it is not."""
    ids = token_ids()
    student, softmax = logits(model, ids), logits(teacher, ids)
    close(student[:, :16], softmax[:, :16])
    assert not torch.allclose(student[:, 16:], softmax[:, 16:], rtol=0, atol=1e-6)
    names = set(teacher.state_dict())
    new = set(model.state_dict()) - names
    assert new and all(".dijiang." in key for key in new) and names <= set(model.state_dict())


@torch.no_grad()
def by_steps(model, ids):
    """The logits of 21 tokens at once and then of one at a time, and the cache."""
    out = model(input_ids=ids[:, :21], use_cache=True)
    parts = [out.logits]
    for t in range(21, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    return torch.cat(parts, 1), out.past_key_values


def cached_is_uncached(model, teacher) -> None:
    """As nearly as it is in the softmax model: wide ones round more."""
    ids = token_ids()
    steps, cache = by_steps(model, ids)
    assert isinstance(cache, dijiang.DiJiangCache)
    rounding = (by_steps(teacher, ids)[0] - logits(teacher, ids)).abs().max().item()
    assert rounding < 1e-4
    close(steps, logits(model, ids), rounding)


def _generate(model, ids, **settings):
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None) | settings
    return model.generate(ids, pad_token_id=1, **settings)


def generates(model, teacher) -> None:
    ids = token_ids()
    assert torch.equal(_generate(model, ids), _generate(model, ids, use_cache=False))


def searches_beams(model, teacher) -> None:
    ids = token_ids()
    beams = [_generate(model, ids, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def pads_left(model, teacher) -> None:
    """A row padded left is the row alone, in a forward and in what is generated after it."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    batch = ids.masked_fill(mask == 0, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Bloom and MPT have no positions to give; they never come here.
    out = logits(model, batch, attention_mask=mask, position_ids=positions)
    close(out[:1, 13:], logits(model, ids[:1, 13:]))
    close(out[1:], logits(model, ids[1:]))
    together = _generate(model, batch, attention_mask=mask)
    assert torch.equal(together[0, 40:], _generate(model, ids[:1, 13:])[0, 27:])
    assert torch.equal(together[1], _generate(model, ids[1:])[0])


def trains(model, teacher) -> None:
    """A step through gradient checkpointing too: the same gradients, and then other logits."""
    ids = token_ids()
    before = logits(model, ids)
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        # An expert that no token went to has none.
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(n in grads[0] for n, _ in model.named_parameters() if ".dijiang." in n)
    for name, grad in grads[0].items():
        assert bool(grad.isfinite().all()), name
        close(grads[1][name], grad)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    assert not torch.equal(logits(model, ids), before)


def saves(model, teacher) -> None:
    ids = token_ids()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(logits(dijiang.from_pretrained(folder), ids), logits(model, ids))


def restores(model, teacher) -> None:
    ids = token_ids()
    assert dijiang.restore(model) is model and not dijiang.is_converted(model)
    assert set(model.state_dict()) == set(teacher.state_dict())
    assert torch.equal(logits(model, ids), logits(teacher, ids))


#: The table's column -> what must hold.
BEHAVIOURS: dict[str, Callable] = {
    "converts": starts_as_its_near_keys,
    "cache": cached_is_uncached,
    "generates": generates,
    "beams": searches_beams,
    "left padding": pads_left,
    "trains": trains,
    "saves": saves,
    "restores": restores,
}


def check(name: str, behaviour: str) -> None:
    """Raises what fails; ConversionError where the family is refused."""
    teacher = family(name)
    model = dijiang.convert(copy.deepcopy(teacher), CONFIG)
    BEHAVIOURS[behaviour](model, teacher)


def table() -> list[dict[str, str]]:
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def committed() -> dict[str, dict[str, str]]:
    """The table's rows for this transformers, by family; empty if it was not measured with it."""
    return {
        row["family"]: row for row in table() if row["transformers"] == transformers.__version__
    }


def main() -> None:
    rows = table() if RESULTS.exists() else []
    rows = [row for row in rows if row["transformers"] != transformers.__version__]
    for name in FAMILIES:
        row = {"transformers": transformers.__version__, "family": name, "refused": ""}
        for behaviour in BEHAVIOURS:
            try:
                check(name, behaviour)
                row[behaviour] = "yes"
            except dijiang.ConversionError as error:
                row["refused"] = str(error).partition(" cannot be converted: ")[2]
                break
            except Exception as error:
                row[behaviour] = "no"
                print(f"{name}, {behaviour}: {error}", file=sys.stderr)
        rows.append(row)
        print(row)
    with RESULTS.open("w", newline="") as file:
        columns = ["transformers", "family", *BEHAVIOURS, "refused"]
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
