"""State files: going on from one is never having stopped, and no other model reads it."""

import copy

import dijiang
import pytest
import torch
from dijiang import DiJiangCache, DiJiangConfig, states
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache, TextStreamer
from transformers.cache_utils import DynamicLayer

CONFIGS = {
    "default": DiJiangConfig(window=8, sinks=2, gate=0.0),
    "decay": DiJiangConfig(window=8, sinks=2, gate=0.0, decay="head"),
    "far alone": DiJiangConfig(window=0, sinks=0),
    "exact alone": DiJiangConfig.window_only(8, 2),
    "mixed": DiJiangConfig(window=8, sinks=2, gate=0.0, layers=[1]),
}


def converted(config=CONFIGS["default"], seed=0, **overrides):
    return dijiang.convert(tiny_model(seed, initializer_range=0.3, **overrides), config)


def ids_of(batch, length, seed=0):
    return torch.randint(2, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, ids, **more):
    cache = DiJiangCache(model.config)
    model(input_ids=ids, past_key_values=cache, **more)
    return cache


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture
def file(model, tmp_path):
    return dijiang.save_state(read(model, ids_of(1, 50)), tmp_path / "state.safetensors", model)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_goes_on_as_if_never_stopped(name, tmp_path):
    model, ids, more = converted(CONFIGS[name]), ids_of(2, 50), ids_of(2, 7, seed=1)
    file = dijiang.save_state(read(model, ids), tmp_path / "state", model)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    expected = model(input_ids=more, past_key_values=read(model, ids)).logits
    loaded = dijiang.load_state(file, model)
    assert loaded.get_seq_length() == 50
    assert torch.equal(model(input_ids=more, past_key_values=loaded).logits, expected)

    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    whole = model.generate(torch.cat([ids, more], 1), **options)[:, 57:]
    new = dijiang.resume(model, dijiang.load_state(file, model), more, **options)
    assert torch.equal(new, whole)


def test_padded_prompts_go_on(model, tmp_path):
    ids, more = ids_of(2, 50), ids_of(2, 7, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
    cache = read(model, ids, attention_mask=mask, position_ids=positions)
    file = dijiang.save_state(cache, tmp_path / "state", model)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    new = dijiang.resume(model, dijiang.load_state(file, model), more, **options)
    for row, start in ((0, 19), (1, 0)):
        alone = torch.cat([ids[row : row + 1, start:], more[row : row + 1]], 1)
        assert torch.equal(new[row], model.generate(alone, **options)[0, alone.shape[1] :])


def test_a_file_can_be_gone_on_from_again(model, file):
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    first = [
        dijiang.resume(model, dijiang.load_state(file, model), ids_of(1, 3, seed), **options)
        for seed in (1, 2, 1)
    ]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


def test_prefill_in_chunks(model):
    ids, steps = ids_of(2, 50), []
    whole = read(model, ids)
    cache = dijiang.prefill(model, ids[:, :31], chunk_size=7)
    cache = dijiang.prefill(
        model, ids[:, 31:], cache, chunk_size=10, progress=lambda *at: steps.append(at)
    )
    assert steps == [(20, 38), (38, 38)] and cache.get_seq_length() == 50
    for one, other in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(one.state.window_k, other.state.window_k)
        torch.testing.assert_close(one.state.z, other.state.z, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"prefill: ids must .* got \(2, 0\)"):
        dijiang.prefill(model, ids[:, :0])


def test_size_is_constant(model, tmp_path):
    sizes = {
        dijiang.save_state(read(model, ids_of(1, n)), tmp_path / str(n), model).stat().st_size
        for n in (10, 100, 999)
    }
    assert max(sizes) - min(sizes) < 16  # the digits of the count


def test_another_model_is_refused_by_what_differs(model, file):
    with pytest.raises(ValueError, match="LlamaForCausalLM with other weights"):
        dijiang.load_state(file, converted(seed=1))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.model.layers[1].self_attn.q_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="other weights"):
        dijiang.load_state(file, trained)
    with pytest.raises(ValueError, match="or of another dtype"):
        dijiang.load_state(file, converted().to(torch.bfloat16))
    config = CONFIGS["default"].replace(window=16, seed=3)
    with pytest.raises(ValueError, match=r"window=8 and not 16, seed=0 and not 3"):
        dijiang.load_state(file, converted(config))
    with pytest.raises(ValueError, match="not converted"):
        dijiang.load_state(file, tiny_model())


def _altered(file, tensors=lambda x: x, **changes):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | changes
    save_file(tensors(load_file(file)), file, metadata)


def test_a_damaged_file_is_refused(model, file):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dijiang.load_state(file.with_name("none"), model)
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="damaged"):
        dijiang.load_state(file, model)
    file.write_bytes(whole)
    _altered(file, lambda x: {name: t for name, t in x.items() if name != "1.kv"})
    with pytest.raises(ValueError, match=r"lacks or has in excess 1\.kv"):
        dijiang.load_state(file, model)
    file.write_bytes(whole)
    _altered(file, lambda x: x | {"0.kv": x["0.kv"][..., :3].contiguous()})
    with pytest.raises(ValueError, match=r"0\.kv of .* must have shape \(1, 2, 16, 16\), got"):
        dijiang.load_state(file, model)
    file.write_bytes(whole)
    _altered(file, version="2")
    with pytest.raises(ValueError, match="version 2, this dijiang reads up to 1"):
        dijiang.load_state(file, model)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="holds no state"):
        dijiang.load_state(file, model)


def test_what_cannot_be_saved_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="the cache is empty"):
        dijiang.save_state(DiJiangCache(model.config), tmp_path / "x", model)
    with pytest.raises(TypeError, match="got dict"):
        dijiang.save_state({}, tmp_path / "x", model)
    other = converted(num_key_value_heads=1)
    with pytest.raises(ValueError, match="must have shape"):
        dijiang.save_state(read(other, ids_of(1, 9)), tmp_path / "x", model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="resume: the cache is empty"):
        dijiang.resume(model, DiJiangCache(model.config), ids_of(1, 3))
    with pytest.raises(ValueError, match=r"resume: ids must have shape \(1, n\)"):
        dijiang.resume(model, read(model, ids_of(1, 9)), ids_of(2, 3))


def test_streams(model, file, capsys):
    tokenizer, ids = tiny_tokenizer(), ids_of(1, 7, seed=1)
    # Of whole characters alone: what a streamer prints of half ones is not what decode() makes.
    odd = [i for i in range(512) if not tokenizer.decode([i]).isascii()]
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, suppress_tokens=odd)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    whole = model.generate(ids, streamer=streamer, **options)
    assert capsys.readouterr().out == tokenizer.decode(whole[0, 7:]) + "\n"
    cache = dijiang.load_state(file, model)
    new = dijiang.resume(model, cache, ids, streamer=streamer, **options)
    assert capsys.readouterr().out == tokenizer.decode(new[0]) + "\n"


# ---- rows of different ages ---------------------------------------------------------------------

GREEDY = dict(do_sample=False, eos_token_id=None)
LENGTHS = (23, 1, 50, 8)


def apart(model, left):
    """The last tokens of some prompts, a cache of each without them, and how each goes on alone."""
    prompts = [ids_of(1, n + left, seed=n) for n in LENGTHS]
    caches = [dijiang.prefill(model, ids[:, :-left]) for ids in prompts]
    alone = [model.generate(x, max_new_tokens=40, **GREEDY)[0, x.shape[1] :] for x in prompts]
    return torch.cat([ids[:, -left:] for ids in prompts]), caches, torch.stack(alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_different_ages_go_on_as_alone(name, tmp_path):
    model = converted(CONFIGS[name])
    last, caches, alone = apart(model, 3)
    before = [copy.deepcopy(cache) for cache in caches]
    stacked = states.stack_states(caches)
    assert stacked.get_seq_length() == 50
    file = dijiang.save_state(stacked, tmp_path / "state", model)
    new = dijiang.resume(model, stacked, last, max_new_tokens=40, **GREEDY)
    assert torch.equal(new, alone) and len(set(map(tuple, alone.tolist()))) == len(LENGTHS)
    loaded = dijiang.load_state(file, model)
    assert torch.equal(dijiang.resume(model, loaded, last, max_new_tokens=40, **GREEDY), alone)
    for cache, kept in zip(caches, before, strict=True):
        assert_same(cache, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_leave_and_others_come(name):
    """Two rows of four are done after 10 tokens; another takes the place of one of them."""
    model = converted(CONFIGS[name])
    last, caches, alone = apart(model, 1)
    cache = states.stack_states(caches[:3])
    first = dijiang.resume(model, cache, last[:3], max_new_tokens=10, **GREEDY)
    rows = states.split_states(cache)
    assert [row.get_seq_length() for row in rows] == [n + 10 for n in LENGTHS[:3]]
    cache = states.stack_states([caches[3], rows[1]])
    ids = torch.cat([last[3:], first[1:2, -1:]])
    new = dijiang.resume(model, cache, ids, max_new_tokens=30, **GREEDY)
    assert torch.equal(first, alone[:3, :10])
    assert torch.equal(new[0], alone[3, :30]) and torch.equal(new[1], alone[1, 10:])


def test_splitting_takes_padding_off(model):
    """A row that was padded is the row that was not."""
    ids = ids_of(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = read(model, ids, attention_mask=mask, position_ids=positions)
    for row, start in ((0, 19), (1, 0)):
        one, alone = states.split_states(together)[row], read(model, ids[row : row + 1, start:])
        assert one.get_seq_length() == alone.get_seq_length() == 50 - start
        assert_same(one, alone, rtol=1e-4, atol=1e-5)  # batches of 1 and 2 round differently


def assert_same(one, other, **tolerance):
    for a, b in zip(one.layers, other.layers, strict=True):
        if isinstance(a, DynamicLayer):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), **tolerance)
        else:
            tensors = [[x for x in layer.state if x is not None] for layer in (a, b)]
            torch.testing.assert_close(*tensors, **tolerance)


def test_only_states_of_one_model_are_stacked(model):
    cache = read(model, ids_of(1, 9))
    other = read(converted(CONFIGS["default"].replace(window=16)), ids_of(1, 9))
    with pytest.raises(ValueError, match=r"caches\[1\] is of another config.* window=16 and not 8"):
        states.stack_states([cache, other])
    wide = read(converted(num_key_value_heads=4), ids_of(1, 9))
    says = r"caches\[2\] is of another model .* 0\.kv is \(4, 16, 16\) of torch.float32 on cpu and"
    with pytest.raises(ValueError, match=says):
        states.stack_states([cache, cache, wide])
    half = read(converted().to(torch.bfloat16), ids_of(1, 9))
    with pytest.raises(ValueError, match=r"0\.window_k is .* of torch.bfloat16"):
        states.stack_states([cache, half])
    deep = read(converted(num_hidden_layers=3), ids_of(1, 9))
    with pytest.raises(ValueError, match=r"2\.kv is .* and not None"):
        states.stack_states([cache, deep])
    with pytest.raises(ValueError, match=r"caches\[1\] is empty"):
        states.stack_states([cache, DiJiangCache(model.config)])
    with pytest.raises(ValueError, match="at least one cache, got none"):
        states.stack_states([])
    with pytest.raises(TypeError, match=r"caches\[0\] must be a DiJiangCache, got DynamicCache"):
        states.stack_states([DynamicCache()])
    with pytest.raises(TypeError, match="split_states: cache must be a DiJiangCache, got list"):
        states.split_states([cache])
