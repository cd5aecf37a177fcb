"""DiJiangCache: its size, and everything generate() may do to it."""

import dijiang
import pytest
import torch
from dijiang import DiJiangCache, DiJiangConfig
from tiny import tiny_model

CONFIG = DiJiangConfig(window=8, sinks=2, cache_size=0, gate=0.0)


@pytest.fixture(scope="module")
def model():
    return dijiang.convert(tiny_model(), CONFIG)


def ids_of(batch, length, seed=0):
    return torch.randint(2, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model, ids):
    cache = DiJiangCache(model.config)
    model(input_ids=ids, past_key_values=cache)
    return cache


def test_size_is_constant(model):
    sizes = {length: filled(model, ids_of(1, length)).nbytes() for length in (1, 16, 100, 1000)}
    heads, d, features, near = 2, 16, 16, 2 * 8 + 2
    # kv, z and log_scale in float32, near keys and values in float32, length in int64.
    layer = 4 * heads * (features * d + 2 * features + 2 * near * d) + 8
    assert set(sizes.values()) == {2 * layer}
    assert filled(model, ids_of(3, 10)).nbytes() == 3 * 2 * layer


def test_size_with_hard_keys_is_constant():
    model = dijiang.convert(tiny_model(), CONFIG.replace(cache_size=6))
    assert "6 hard keys" in model.dijiang_start
    sizes = {length: filled(model, ids_of(1, length)).nbytes() for length in (1, 16, 100, 1000)}
    heads, d, features, exact = 2, 16, 16, 2 * 8 + 2 + 6
    # As above; besides, votes for slots and a block and two sums in float32, positions in int64.
    layer = 4 * heads * (features * d + 2 * features + 2 * exact * d)
    layer += heads * (4 * (6 + 8 + 2 * d) + 8 * 6) + 8
    assert set(sizes.values()) == {2 * layer}


def test_decoding_does_not_grow_it(model):
    cache = filled(model, ids_of(2, 5))
    size = cache.nbytes()
    with torch.no_grad():
        for t in range(40):
            assert cache.get_seq_length() == 5 + t
            model(input_ids=ids_of(2, 1, seed=t), past_key_values=cache)
    assert cache.nbytes() == size
    # In place: one token allocates no new state.
    before = [layer.state.kv.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        model(input_ids=ids_of(2, 1), past_key_values=cache)
    assert [layer.state.kv.data_ptr() for layer in cache.layers] == before


def test_low_precision_keeps_its_sums_in_float32():
    model = dijiang.convert(tiny_model().bfloat16(), CONFIG)
    state = filled(model, ids_of(1, 30)).layers[0].state
    assert state.kv.dtype == state.z.dtype == torch.float32
    assert state.window_k.dtype == state.sink_v.dtype == torch.bfloat16


@torch.no_grad()
def test_rows_can_be_picked_repeated_and_reordered(model):
    ids, new = ids_of(3, 21), ids_of(3, 1, seed=1)
    expected = model(input_ids=new, past_key_values=filled(model, ids)).logits
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = filled(model, ids)
        change(cache)
        out = model(input_ids=new[rows], past_key_values=cache).logits
        torch.testing.assert_close(out, expected[rows], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_reset_starts_anew(model):
    cache = filled(model, ids_of(1, 30))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    ids = ids_of(1, 12, seed=1)
    again = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(again, model(input_ids=ids, use_cache=False).logits)


def test_mask_sizes_and_length(model):
    cache = DiJiangCache(model.config)
    assert cache.get_seq_length() == 0 and len(cache) == 2
    cache = filled(model, ids_of(1, 30))
    assert cache.get_mask_sizes(4, 0) == (34, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_croppable and not cache.is_compileable


def test_refuses_to_take_tokens_back(model):
    cache = filled(model, ids_of(1, 30))
    with pytest.raises(NotImplementedError, match="folded into the state"):
        cache.crop(-3)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="assisted"):
        cache.activate_past_recording()


def test_needs_a_converted_models_config():
    with pytest.raises(ValueError, match=r"dijiang\.convert"):
        DiJiangCache(tiny_model().config)


def test_softmax_layers_grow():
    model = dijiang.convert(tiny_model(), CONFIG.replace(layers=[0]))
    small, large = filled(model, ids_of(1, 30)), filled(model, ids_of(1, 60))
    # Layer 1: 2 heads x 16 x (key and value) x 4 bytes a token.
    assert large.nbytes() - small.nbytes() == 30 * 2 * 16 * 2 * 4
    assert large.get_seq_length() == 60


def test_a_failed_forward_leaves_the_cache_as_it_was(model):
    cache = filled(model, ids_of(1, 30))
    with pytest.raises(NotImplementedError):
        model(input_ids=ids_of(1, 4), past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 30
