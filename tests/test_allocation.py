"""spread_hard_keys: the same memory, spent in the layers that need it."""

import doctest
import itertools

import dijiang
import pytest
import torch
from dijiang import DiJiangConfig, allocation
from dijiang.allocation import best_sizes
from tiny import tiny_model

IDS = torch.randint(2, 500, (2, 96), generator=torch.Generator().manual_seed(1))
CONFIG = DiJiangConfig(window=8, sinks=2, cache_size=8)


def model_with_a_lazy_layer(lazy, seed=0):
    """Its `lazy` layer has nothing beyond the window to find: every key's value is the same."""
    model = tiny_model(seed, num_hidden_layers=3, initializer_range=0.3)
    with torch.no_grad():
        model.model.layers[lazy].self_attn.v_proj.weight.zero_()
    return model


def sizes_of(config):
    """Of the two kv heads of each of three layers."""
    sizes = [config.at(layer).cache_size for layer in range(3)]
    return [(size, size) if isinstance(size, int) else size for size in sizes]


@pytest.mark.parametrize("lazy", [0, 1, 2])
def test_slots_go_where_they_are_needed(lazy):
    model = model_with_a_lazy_layer(lazy)
    config = dijiang.spread_hard_keys(model, IDS, CONFIG)
    sizes = sizes_of(config)
    assert sizes[lazy] == (0, 0) and 0 < sum(map(sum, sizes)) <= 3 * 2 * 8
    assert config.replace(per_layer={}) == CONFIG


def test_predictions_are_closer_at_the_same_memory():
    def kl(config):
        model = model_with_a_lazy_layer(1)
        student = dijiang.convert(model_with_a_lazy_layer(1), config)
        return dijiang.evaluate.agreement(student, model, IDS).kl

    exact = CONFIG.replace(feature_map=None)
    spread = dijiang.spread_hard_keys(model_with_a_lazy_layer(1), IDS, exact)
    assert kl(spread) < 0.9 * kl(exact)


def test_never_worse_than_as_many_in_each_layer(monkeypatch):
    """On the tokens it was found on, whatever the layers' errors add up to."""
    exact = CONFIG.replace(feature_map=None)

    def kl(sizes):
        sizes = zip(sizes[::2], sizes[1::2], strict=True)
        per_layer = {layer: {"cache_size": own} for layer, own in enumerate(sizes)}
        student = dijiang.convert(model_with_a_lazy_layer(1), exact.replace(per_layer=per_layer))
        return dijiang.evaluate.agreement(student, model_with_a_lazy_layer(1), IDS[:1]).kl

    kept = set()
    for proposed in ([24, 24, 0, 0, 0, 0], [0, 0, 24, 24, 0, 0], [16, 16, 0, 0, 8, 8]):
        monkeypatch.setattr(allocation, "best_sizes", lambda *args, found=proposed: found)
        config = dijiang.spread_hard_keys(model_with_a_lazy_layer(1), IDS, exact)
        sizes = list(itertools.chain.from_iterable(sizes_of(config)))
        assert kl(sizes) == pytest.approx(min(kl(proposed), kl([8] * 6)), rel=1e-3)
        kept.add(sizes == proposed)
    assert kept == {True, False}


@torch.no_grad()
def test_heads_of_a_layer_get_what_each_needs():
    """One of two heads has nothing to find; by layers, both get as many."""
    model = tiny_model(0, num_hidden_layers=3, initializer_range=0.3)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[16:] = 0
    by_head = sizes_of(dijiang.spread_hard_keys(model, IDS, CONFIG))
    assert all(second == 0 for _, second in by_head) and sum(map(sum, by_head)) > 0
    by_layer = sizes_of(dijiang.spread_hard_keys(model, IDS, CONFIG, by="layer"))
    assert all(first == second for first, second in by_layer)
    assert sum(map(sum, by_layer)) <= 3 * 2 * 8


@torch.no_grad()
def test_convert_spreads_where_there_is_text():
    wanted = dijiang.spread_hard_keys(model_with_a_lazy_layer(1), IDS, CONFIG)
    steps = []
    model = dijiang.convert(
        model_with_a_lazy_layer(1), CONFIG, calibration=IDS, progress=lambda *at: steps.append(at)
    )
    assert DiJiangConfig.from_dict(model.config.dijiang) == wanted and steps
    assert "far keys calibrated" in model.dijiang_start
    own = CONFIG.replace(per_layer={1: {"cache_size": 5}})
    for config, spread in ((CONFIG, False), (own, True), (CONFIG.replace(cache_size=0), True)):
        model = model_with_a_lazy_layer(1)
        dijiang.convert(model, config, calibration=IDS, spread=spread)
        assert DiJiangConfig.from_dict(model.config.dijiang) == config


def test_a_refused_calibration_leaves_the_model_as_it_was():
    model = tiny_model()
    for short in (IDS[:, :12], IDS.float()):
        with pytest.raises((ValueError, TypeError)):
            dijiang.convert(model, CONFIG, calibration=short)
        assert not dijiang.is_converted(model)


def test_leaves_the_model_as_it_was():
    model = model_with_a_lazy_layer(1).train()
    before = {name: x.clone() for name, x in model.named_parameters()}
    steps = []
    dijiang.spread_hard_keys(model, IDS, CONFIG, progress=lambda *at: steps.append(at))
    assert not dijiang.is_converted(model) and model.training
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    assert steps == [(i + 1, steps[-1][1]) for i in range(steps[-1][1])]
    with pytest.raises(RuntimeError, match="stop"):
        dijiang.spread_hard_keys(model, IDS, CONFIG, progress=_stop)
    assert not dijiang.is_converted(model) and model.training


def _stop(done, of):
    raise RuntimeError("stop")


def test_layers_keep_what_is_theirs():
    """Layers left out, without a window, or with a field of their own."""
    config = CONFIG.replace(
        layers=[1, 2], per_layer={1: {"window": 0, "cache_size": 0}, 2: {"sinks": 5}}
    )
    spread = dijiang.spread_hard_keys(model_with_a_lazy_layer(0), IDS, config)
    assert spread.per_layer == {
        1: {"window": 0, "cache_size": 0},
        2: {"sinks": 5, "cache_size": 8},
    }
    dijiang.convert(model_with_a_lazy_layer(0), spread)


def test_refuses():
    model = tiny_model()
    with pytest.raises(ValueError, match="cache_size is 0"):
        dijiang.spread_hard_keys(model, IDS, DiJiangConfig(cache_size=0))
    with pytest.raises(ValueError, match=r"rows of 12 tokens .* at least 64"):
        dijiang.spread_hard_keys(model, IDS[:, :12], CONFIG)
    with pytest.raises(ValueError, match=r"cache_size is \(8, 0\): it must be the mean"):
        dijiang.spread_hard_keys(model, IDS, CONFIG.replace(cache_size=(8, 0)))
    with pytest.raises(ValueError, match="by must be 'head' or 'layer', got 'heads'"):
        dijiang.spread_hard_keys(model, IDS, CONFIG, by="heads")
    with pytest.raises(TypeError, match="got dict"):
        dijiang.spread_hard_keys(model, IDS, {})
    with pytest.raises(TypeError, match="token ids"):
        dijiang.spread_hard_keys(model, IDS.float(), CONFIG)
    with pytest.raises(ValueError, match="restore it first"):
        dijiang.spread_hard_keys(dijiang.convert(model, CONFIG), IDS, CONFIG)


def test_greedy_sizes_are_the_best_of_convex_losses():
    sizes = [0, 4, 8, 12]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        # Each step gains less than the one before it.
        gains = torch.rand(3, 3, generator=draw).sort(1, descending=True).values
        losses = (10 - torch.cat([torch.zeros(3, 1), gains.cumsum(1)], 1)).tolist()

        def total(steps, losses=losses):
            return sum(loss[i] for loss, i in zip(losses, steps, strict=True))

        chosen = best_sizes(sizes, losses, 5)  # 15 in all: three steps
        best = min(total(s) for s in itertools.product(range(4), repeat=3) if sum(s) <= 3)
        assert sum(chosen) == 12
        assert total([sizes.index(c) for c in chosen]) == pytest.approx(best)


def test_examples():
    assert doctest.testmod(allocation).failed == 0


def test_no_gain_no_slots():
    assert best_sizes([0, 4], [[1.0, 1.0], [1.0, 2.0]], 4) == [0, 0]
