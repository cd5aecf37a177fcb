"""DiJiangConfig: what is accepted, what is refused and how, and its way through config.json."""

import dataclasses
import json

import pytest
from dijiang import DiJiangConfig
from dijiang.config import FEATURE_MAPS


@pytest.mark.parametrize(
    ("field", "value", "error", "says"),
    [
        ("feature_map", "cosine", ValueError, "'wdcf'"),
        ("num_features", 0, ValueError, "at least 1, got 0"),
        ("num_features", 7, ValueError, "even, got 7"),
        ("radius", "uniform", ValueError, "'normal', 'chi'"),
        ("sampling", "sobol", ValueError, "'stratified', 'iid'"),
        ("init", "zeros", ValueError, "'identity', 'dct'"),
        ("window", -1, ValueError, "at least 0, got -1"),
        ("window", 1.5, TypeError, "whole number, got 1.5"),
        ("window", True, TypeError, "whole number, got True"),
        ("sinks", -4, ValueError, "at least 0, got -4"),
        ("beta", "learnable", TypeError, "'auto' or a number"),
        ("gate", None, TypeError, "'auto' or a number"),
        ("decay", "layer", ValueError, "'head', 'token'"),
        ("normalize", 1, TypeError, "bool, got 1"),
        ("layers", "some", ValueError, "'all' or a list"),
        ("layers", [], ValueError, "at least one"),
        ("layers", [1, 1], ValueError, "once"),
        ("layers", [0, -1], ValueError, "at least 0, got -1"),
        ("seed", 0.5, TypeError, "whole number"),
        ("per_layer", [1], TypeError, "a dict of dicts"),
        ("per_layer", {0: 64}, TypeError, r"per_layer\[0\] must be a dict, got 64"),
        ("per_layer", {-1: {}}, ValueError, "at least 0, got -1"),
        ("per_layer", {"first": {}}, TypeError, "whole number, got 'first'"),
        ("per_layer", {2: {"layers": [0]}}, ValueError, r"per_layer\[2\] cannot have 'layers'"),
        ("per_layer", {2: {"sink": 1}}, ValueError, "cannot have 'sink', only .*'sinks'"),
        ("per_layer", {2: {"window": -1}}, ValueError, r"per_layer\[2\]: window .* got -1"),
    ],
)
def test_refuses(field, value, error, says):
    with pytest.raises(error, match=says) as caught:
        DiJiangConfig(**{field: value})
    assert field in str(caught.value)


def test_hard_keys_need_a_window():
    with pytest.raises(ValueError, match="cache_size=64 is of keys that leave a window"):
        DiJiangConfig(cache_size=64, window=0)


def test_no_far_keys_needs_near_ones():
    with pytest.raises(ValueError, match="window=64"):
        DiJiangConfig(feature_map=None, window=0, sinks=0)
    for field, value in (("decay", "head"), ("num_features", 64)):
        with pytest.raises(ValueError, match=f"{field}='?{value}"):
            DiJiangConfig.window_only(**{field: value})


@pytest.mark.parametrize("make", [DiJiangConfig, DiJiangConfig.paper, DiJiangConfig.published,
                                  DiJiangConfig.window_only])  # fmt: skip
def test_survives_json(make):
    config = make(layers=[3, 1])
    assert config.layers == (1, 3)
    again = DiJiangConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'windows'.*'window'"):
        DiJiangConfig.from_dict({"windows": 64})
    with pytest.raises(TypeError, match="a dict"):
        DiJiangConfig.from_dict("wdcf")


def test_presets():
    paper = DiJiangConfig.paper()
    assert (paper.feature_map, paper.window, paper.sinks, paper.beta) == ("wdcf", 0, 0, 0.0)
    assert paper.share_qk and paper.normalize
    published = DiJiangConfig.published(decay=None)
    assert published.feature_map == "softmax" and published.decay is None
    assert not published.normalize and published.group_norm and published.output_gate
    assert DiJiangConfig.window_only(32, 2).window == 32


def test_replace_checks_again_and_nothing_can_be_set():
    config = DiJiangConfig()
    assert config.replace(window=128).window == 128
    with pytest.raises(ValueError, match="window"):
        config.replace(window=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3


def test_as_many_hard_keys_as_the_window_has():
    assert DiJiangConfig().cache_size == 64
    assert DiJiangConfig(window=8).cache_size == 8
    assert DiJiangConfig(window=8, cache_size=0).cache_size == 0
    assert DiJiangConfig(window=0).cache_size == DiJiangConfig.window_only().cache_size == 0
    assert DiJiangConfig.paper(window=8).cache_size == 0
    with pytest.raises(ValueError, match="cache_size=64 is of keys that leave a window"):
        DiJiangConfig().replace(window=0)


def test_layers():
    assert DiJiangConfig().converts(7)
    some = DiJiangConfig(layers=[0, 2])
    assert [some.converts(i) for i in range(3)] == [True, False, True]


def test_per_layer():
    config = DiJiangConfig(per_layer={3: {"cache_size": 8}, 1: {"window": 32, "cache_size": 4}})
    assert [config.at(i).cache_size for i in range(4)] == [64, 4, 64, 8]
    assert [config.at(i).window for i in range(4)] == [64, 32, 64, 64]
    assert config.at(0) == DiJiangConfig()
    assert DiJiangConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert {config, config.replace()} == {config}  # hashable
    own = DiJiangConfig(per_layer={0: {"cache_size": [8, 0]}, 1: {"cache_size": (4, 4)}})
    assert own.per_layer == {0: {"cache_size": (8, 0)}, 1: {"cache_size": 4}}
    assert DiJiangConfig.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert DiJiangConfig(cache_size=[2, 1]).at(5).cache_size == (2, 1)
    for wrong, kind in (
        ((8, -1), ValueError),
        ((8, 0.5), TypeError),
        ((), TypeError),
        ("8", TypeError),
    ):
        with pytest.raises(kind, match="cache_size must be"):
            DiJiangConfig(cache_size=wrong)
    with pytest.raises(ValueError, match="layers leaves as it is"):
        DiJiangConfig(layers=[0], per_layer={1: {"window": 32}})


def test_every_map_has_a_config():
    for name in FEATURE_MAPS:
        assert DiJiangConfig(feature_map=name).feature_map == name
