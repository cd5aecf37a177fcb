"""generate() on converted models: with the cache it makes itself, as without."""

import copy

import dijiang
import pytest
import torch
import transformers
from dijiang import DiJiangCache, DiJiangConfig
from tiny import tiny_model
from transformers import DynamicCache

CONFIGS = {
    "near and far": DiJiangConfig(window=8, sinks=2, gate=0.0),
    "paper": DiJiangConfig.paper(),
    "mixed": DiJiangConfig(window=8, sinks=2, gate=0.0, layers=[1]),
    "hard keys": DiJiangConfig(window=8, sinks=2, gate=0.0, cache_size=5),
    "by layer": DiJiangConfig(
        window=8, sinks=2, gate=0.0,
        per_layer={0: {"cache_size": (5, 2)}, 1: {"feature_map": None, "window": 6}},
    ),
    "per token": DiJiangConfig(window=8, sinks=2, gate=0.0, decay="token"),
}  # fmt: skip
NEW = 24


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return dijiang.convert(tiny_model(initializer_range=0.2), CONFIGS[request.param])


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 20, 13 and 5 tokens, padded left."""
    ids = torch.randint(2, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :15] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 1), attention_mask=mask)


def generate(model, prompts, seed=0, **settings):
    torch.manual_seed(seed)
    settings = (
        dict(max_new_tokens=NEW, eos_token_id=None, pad_token_id=1, do_sample=False) | settings
    )
    return model.generate(**prompts, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["greedy", "sampling", "beams", "beams returned", "samples returned", "beam sampling"],
)
def test_cached_is_uncached(model, prompts, settings):
    cached = generate(model, prompts, **settings)
    assert torch.equal(cached, generate(model, prompts, use_cache=False, **settings))
    assert cached.shape == (3 * settings.get("num_return_sequences", 1), 20 + NEW)


def test_left_padding_changes_nothing(model, prompts):
    together = generate(model, prompts)
    for row, length in ((0, 20), (1, 13), (2, 5)):
        alone = generate(model, {"input_ids": prompts["input_ids"][row : row + 1, -length:]})
        assert torch.equal(together[row, 20:], alone[0, length:])


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 reads padded prompts in chunks wrongly, softmax models' too",
)
def test_prompt_in_chunks(model, prompts):
    whole = generate(model, prompts)
    assert torch.equal(generate(model, prompts, prefill_chunk_size=6), whole)


def test_goes_on_from_a_cache(model, prompts):
    """A second turn with the first one's cache, against the whole conversation anew."""
    ids = prompts["input_ids"][:1]
    first = generate(model, {"input_ids": ids}, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DiJiangCache)
    more = torch.cat([first.sequences, torch.randint(2, 500, (1, 9))], 1)
    second = generate(model, {"input_ids": more}, past_key_values=first.past_key_values)
    assert torch.equal(second, generate(model, {"input_ids": more}))


def test_cache_can_be_copied(model, prompts):
    ids = prompts["input_ids"][:1]
    cache = DiJiangCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :12], past_key_values=cache)
        kept = copy.deepcopy(cache)
        first = model(input_ids=ids[:, 12:], past_key_values=cache).logits
        second = model(input_ids=ids[:, 12:], past_key_values=kept).logits
    assert torch.equal(first, second)


def test_stops_at_end_of_sequence(model, prompts):
    """Rows that are done go on as padding and leave the others alone."""
    plain = generate(model, prompts)
    stop = int(plain[0, 24])
    stopped = generate(model, prompts, eos_token_id=stop)
    for row in range(3):
        new = plain[row, 20:].tolist()
        end = new.index(stop) + 1 if stop in new else NEW
        kept = stopped[row, 20:].tolist()
        assert kept[:end] == new[:end][: len(kept)]
        assert all(token == 1 for token in kept[end:])


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "assisted"),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, ValueError, "cache_implementation='quantized'"),
        ({"past_key_values": DynamicCache()}, TypeError, "must be a DiJiangCache"),
    ],
    ids=["lookup", "static", "quantized", "dynamic"],
)
def test_refuses(model, prompts, settings, error, says):
    with pytest.raises(error, match=says):
        generate(model, {"input_ids": prompts["input_ids"][:1]}, **settings)


def test_refuses_an_assistant_and_to_be_one(model, prompts):
    one = {"input_ids": prompts["input_ids"][:1]}
    with pytest.raises(NotImplementedError, match="assisted"):
        generate(model, one, assistant_model=tiny_model())
    with pytest.raises(NotImplementedError, match="assisted"):
        generate(tiny_model(), one, assistant_model=model)


def test_softmax_mode_generates_as_the_teacher(prompts):
    teacher = tiny_model(initializer_range=0.2)
    expected = generate(teacher, prompts)
    student = dijiang.convert(copy.deepcopy(teacher), CONFIGS["near and far"])
    with dijiang.softmax_mode(student):
        assert torch.equal(generate(student, prompts), expected)
    kernels = [m for m in student.modules() if isinstance(m, dijiang.modules.AttentionKernel)]
    assert kernels and all(k.cache_layer is None for k in kernels)  # they hold no keys in memory
    dijiang.restore(student)
    assert torch.equal(generate(student, prompts), expected)
