"""convert and restore on tiny random models of many families, and what is refused by name."""

import copy
import warnings

import dijiang
import pytest
import torch
import transformers
from dijiang import DiJiangConfig
from families import tiny
from tiny import tiny_model
from transformers import DynamicCache

NEAR_AND_FAR = DiJiangConfig(window=8, sinks=2, gate=0.0)


@pytest.fixture
def ids():
    return torch.randint(2, 100, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize(
    "config",
    [
        DiJiangConfig(window=8, sinks=2), DiJiangConfig.paper(), DiJiangConfig.published(),
        DiJiangConfig.window_only(8, 2), NEAR_AND_FAR.replace(decay="head"),
        NEAR_AND_FAR.replace(decay="token"), NEAR_AND_FAR.replace(layers=[1]),
        NEAR_AND_FAR.replace(feature_map="elu"), NEAR_AND_FAR.replace(share_qk=True),
        NEAR_AND_FAR.replace(window=0, cache_size=0), NEAR_AND_FAR.replace(cache_size=0),
    ],
    ids=["closed", "paper", "published", "window", "decay", "gated", "mixed", "elu", "shared",
         "sinks", "no hard keys"],
)  # fmt: skip
class TestEveryConfig:
    def test_split_anywhere(self, config, ids):
        model = dijiang.convert(tiny_model(), config)
        whole = logits(model, ids)
        with torch.no_grad():
            for cut in (1, 16, 17, 39):
                cache = dijiang.DiJiangCache(model.config)
                first = model(input_ids=ids[:, :cut], past_key_values=cache).logits
                rest = model(input_ids=ids[:, cut:], past_key_values=cache).logits
                assert cache.get_seq_length() == 40
                both = torch.cat([first, rest], 1)
                torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-5)

    def test_no_future(self, config, ids):
        model = dijiang.convert(tiny_model(), config)
        other = ids.clone()
        other[:, 30:] = ids[:, 30:].flip(0) + 1
        before, after = logits(model, ids), logits(model, other)
        torch.testing.assert_close(before[:, :30], after[:, :30], rtol=1e-5, atol=1e-6)
        assert not torch.equal(before[:, 30:], after[:, 30:])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, config, ids, side):
        model = dijiang.convert(tiny_model(), config)
        alone = logits(model, ids[:1, :27])
        pad = torch.full((1, 13), 1)
        short = torch.cat([pad, ids[:1, :27]] if side == "left" else [ids[:1, :27], pad], 1)
        real = slice(13, 40) if side == "left" else slice(0, 27)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0] = 0
        mask[0, real] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = torch.cat([short, ids[1:]])
        out = logits(model, batch, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(out[:1, real], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[1:], logits(model, ids[1:]), rtol=1e-4, atol=1e-5)

    def test_packed_sequences(self, config, ids):
        model = dijiang.convert(tiny_model(), config)
        alone = torch.cat([logits(model, ids[:1, :17]), logits(model, ids[1:, :23])], 1)
        packed = torch.cat([ids[:1, :17], ids[1:, :23]], 1)
        positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
        out = logits(model, packed, position_ids=positions)
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
        # The same by cu_seq_lens, as transformers' flattening collator gives them.
        lengths = torch.tensor([0, 17, 40], dtype=torch.int32)
        out = logits(model, packed, position_ids=positions, cu_seq_lens_q=lengths)
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


def test_packed_batches(ids):
    """Several rows, each of several sequences."""
    model = dijiang.convert(tiny_model(), NEAR_AND_FAR)
    positions = torch.stack([
        torch.cat([torch.arange(17), torch.arange(23)]),
        torch.cat([torch.arange(30), torch.arange(10)]),
    ])  # fmt: skip
    out = logits(model, ids, position_ids=positions)
    for row, cut in ((0, 17), (1, 30)):
        parts = [logits(model, ids[row : row + 1, :cut]), logits(model, ids[row : row + 1, cut:])]
        torch.testing.assert_close(out[row], torch.cat(parts, 1)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("cache_size", [0, 3])
def test_starts_as_its_exact_keys(ids, cache_size):
    model = tiny_model(initializer_range=0.3)
    config = DiJiangConfig.window_only(8, 2, cache_size=cache_size)
    window = logits(dijiang.convert(copy.deepcopy(model), config), ids)
    dijiang.convert(model, DiJiangConfig(window=8, sinks=2, cache_size=cache_size))
    assert "closed" in model.dijiang_start
    torch.testing.assert_close(logits(model, ids), window, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_size", [0, 3, 40])  # 40: for many queries no key is far
def test_calibration_is_never_worse_than_the_window(ids, cache_size):
    """On the tokens it is calibrated on, a head's output is at least as near the softmax's."""
    from dijiang.attention import kernel_mode

    def errors(model):
        with kernel_mode(model, "transfer") as kernels:
            model(input_ids=ids, use_cache=False)
            return [kernel.loss.item() for kernel in kernels]

    exact = DiJiangConfig.window_only(8, 2, cache_size=cache_size)
    config = DiJiangConfig(window=8, sinks=2, cache_size=cache_size)
    window = errors(dijiang.convert(tiny_model(initializer_range=0.3), exact))
    model = dijiang.convert(tiny_model(initializer_range=0.3), config)
    dijiang.calibrate(model, ids, choose=False)
    hard = f", sinks and {cache_size} hard keys" if cache_size else " and sinks"
    assert f"window{hard}, and far keys calibrated on 80 tokens: " in model.dijiang_start
    calibrated = errors(model)
    assert all(c <= w * (1 + 1e-4) for c, w in zip(calibrated, window, strict=True))
    assert sum(calibrated) < 0.95 * sum(window) or cache_size == 40
    again = dijiang.convert(tiny_model(initializer_range=0.3), config)
    dijiang.calibrate(again, ids, batch_size=1, choose=False)  # batches add up
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter)


def test_layers_of_their_own(ids):
    """Each layer is what its own config says, as if it alone were asked."""
    configs = [
        DiJiangConfig.window_only(8, 2, cache_size=5),
        DiJiangConfig(window=6, gate=-1.0, cache_size=3),
    ]
    mixed = configs[0].replace(
        per_layer={1: {"feature_map": "learned_pm", "window": 6, "sinks": 4, "gate": -1.0,
                       "cache_size": 3}}
    )  # fmt: skip
    model = dijiang.convert(tiny_model(initializer_range=0.3), mixed)
    assert "and 3 to 5 hard keys" in model.dijiang_start
    for layer, config in enumerate(configs):
        whole = dijiang.convert(tiny_model(initializer_range=0.3), config)
        for of in (model, whole):  # the other layer gives the same in both
            of.model.layers[1 - layer].self_attn.dijiang.mode = "softmax"
        assert torch.equal(logits(model, ids), logits(whole, ids))
        model.model.layers[1 - layer].self_attn.dijiang.mode = "student"
    with pytest.raises(dijiang.ConversionError, match="per_layer names layer 2"):
        dijiang.convert(tiny_model(), DiJiangConfig(per_layer={2: {"cache_size": 5}}))


def test_calibrated_model_is_never_worse_than_the_window(ids):
    """By its loss on those tokens, whatever the heads' errors add up to."""

    def loss(model):
        return torch.nn.functional.cross_entropy(
            logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).item()

    for seed in range(3):
        model = tiny_model(seed, initializer_range=0.3)
        exact = DiJiangConfig.window_only(8, 2, cache_size=3)
        window = loss(dijiang.convert(copy.deepcopy(model), exact))
        config = DiJiangConfig(window=8, sinks=2, cache_size=3)
        dijiang.convert(model, config, calibration=ids, spread=False)
        assert loss(model) <= window + 1e-4


def test_gate_moves_far_mass(ids):
    """Calibrated gates follow a shift of the features' own scale."""
    model = tiny_model(initializer_range=0.3)
    dijiang.convert(model, DiJiangConfig(window=8, sinks=2, cache_size=0))
    dijiang.calibrate(model, ids, choose=False)
    kernel = model.model.layers[0].self_attn.dijiang
    before = kernel.gate.clone()
    with torch.no_grad():
        kernel.features_q.log_weight += 3.0
    dijiang.calibrate(model, ids, choose=False)
    torch.testing.assert_close(kernel.gate, before - 3.0, rtol=0, atol=1e-3)


def test_softmax_mode_is_the_teacher(ids):
    model = tiny_model()
    teacher = logits(model, ids)
    dijiang.convert(model, NEAR_AND_FAR)
    with dijiang.softmax_mode(model):
        assert torch.equal(logits(model, ids), teacher)
        cache = model(input_ids=ids).past_key_values
        assert isinstance(cache, DynamicCache) and not isinstance(cache, dijiang.DiJiangCache)
    assert not torch.equal(logits(model, ids), teacher)


def test_copies_are_independent(ids):
    model = dijiang.convert(tiny_model(), NEAR_AND_FAR)
    student = logits(model, ids)
    other = copy.deepcopy(model)
    dijiang.restore(model)
    assert torch.equal(logits(other, ids), student)
    assert other.generate(ids, max_new_tokens=3).shape == (2, 43)


def test_mixed_layers_keep_softmax(ids):
    model = tiny_model()
    first = model.model.layers[0]
    dijiang.convert(model, NEAR_AND_FAR.replace(layers=[1]))
    assert not hasattr(first.self_attn, "dijiang")
    cache = model(input_ids=ids).past_key_values
    assert cache.layers[0].keys.shape[2] == 40 and cache.layers[1].keys is None


def test_gradient_checkpointing(ids):
    model = dijiang.convert(tiny_model(), NEAR_AND_FAR).train()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_compiled(ids):
    """A whole model, traced ahead of time where its graph does not break, padded and not."""
    model = dijiang.convert(tiny_model(), NEAR_AND_FAR).train()
    compiled = torch.compile(model, backend="aot_eager")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(input_ids=ids, attention_mask=attention_mask, labels=ids).loss
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(ids, dtype):
    model = dijiang.convert(tiny_model().to(dtype), NEAR_AND_FAR)
    kernel = model.model.layers[0].self_attn.dijiang
    assert kernel.features_q.matrix.dtype == torch.float32
    out = logits(model, ids)
    exact = logits(dijiang.convert(tiny_model(), NEAR_AND_FAR), ids)
    assert out.dtype == dtype and (out.float() - exact).abs().max() < 0.02


class TestRefusals:
    def refuses(self, model, says, config=None):
        names = set(model.state_dict()) if hasattr(model, "state_dict") else None
        with pytest.raises(dijiang.ConversionError, match=says):
            dijiang.convert(model, config)
        if names is not None:
            assert set(model.state_dict()) == names and not dijiang.is_converted(model)

    @pytest.mark.parametrize("name", ["falcon", "bloom", "gptj", "mpt", "codegen"])
    def test_no_dispatch(self, name):
        overrides = {"rotary_dim": 4} if name in ("gptj", "codegen") else {}
        self.refuses(tiny(name, **overrides), "ForCausalLM.*AttentionInterface")

    def test_sliding_window(self):
        self.refuses(tiny("mistral", sliding_window=16), "sliding window of 16 tokens")

    @pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "exaone4"])
    def test_layers_of_other_kinds(self, name):
        self.refuses(tiny(name, layer_types=["full_attention", "sliding_attention"]), "sliding")

    def test_soft_capping(self):
        model = tiny("gemma2", layer_types=["full_attention"] * 2)
        self.refuses(model, r"Gemma2ForCausalLM.*soft-capped scores \(softcap=50")

    def test_sinks_of_its_own(self):
        model = tiny("gpt_oss", layer_types=["full_attention"] * 2)
        self.refuses(model, "GptOss.*sinks of its own")

    def test_mask_of_its_own(self):
        self.refuses(tiny("doge"), "DogeForCausalLM.*mask that is not causal")

    def test_attends_to_later_tokens(self):
        self.refuses(tiny("bert"), "BertLMHeadModel.*later tokens")

    def test_two_attentions_a_layer(self):
        self.refuses(tiny("diffllama"), "DiffLlamaForCausalLM.*second call")

    def test_encoder_and_decoder(self):
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
        )
        self.refuses(model, "T5ForConditionalGeneration.*encoder")

    def test_more_than_softmax(self, monkeypatch):
        """An attention that does more, without saying so in a keyword argument."""
        from transformers.models.llama import modeling_llama

        def biased(module, query, key, value, mask, scaling=None, **kwargs):
            out, weights = modeling_llama.eager_attention_forward(
                module, query, key, value, mask, scaling=scaling, **kwargs
            )
            return 2 * out, weights

        transformers.AttentionInterface.register("biased", biased)
        transformers.AttentionMaskInterface.register(
            "biased", transformers.masking_utils.eager_mask
        )
        model = tiny_model()
        model.set_attn_implementation("biased")
        self.refuses(model, "LlamaForCausalLM.*more than")
        assert model.config._attn_implementation == "biased"

    def test_no_language_model(self):
        self.refuses(torch.nn.Linear(2, 2), "got Linear")
        self.refuses(tiny_model().model, "got LlamaModel")

    def test_twice(self):
        model = dijiang.convert(tiny_model(), NEAR_AND_FAR)
        with pytest.raises(dijiang.ConversionError, match=r"converted already.*restore"):
            dijiang.convert(model)
        dijiang.restore(model)
        with pytest.raises(ValueError, match="not converted"):
            dijiang.restore(model)

    def test_layers_it_does_not_have(self):
        config = NEAR_AND_FAR.replace(layers=[0, 5])
        self.refuses(tiny_model(), "layer 5, but the model's last is 1", config)

    def test_not_a_config(self):
        with pytest.raises(TypeError, match="DiJiangConfig, got dict"):
            dijiang.convert(tiny_model(), {"window": 8})

    def test_calibration_without_far_keys(self, ids):
        model = dijiang.convert(tiny_model(), DiJiangConfig(window=64))
        with pytest.raises(ValueError, match="no far keys"):
            dijiang.calibrate(model, ids)
        with pytest.raises(TypeError, match="token ids"):
            dijiang.calibrate(model, torch.randn(2, 40))

    @pytest.mark.parametrize(
        ("cache_size", "says"), [(0, "calibrate: .* no far keys"), (8, "no keys beyond the window")]
    )
    def test_failed_calibration_names_the_cause_and_leaves_a_whole_model(
        self, ids, cache_size, says
    ):
        model = tiny_model()
        teacher = logits(model, ids)
        config = DiJiangConfig(window=64, cache_size=cache_size)
        with pytest.raises(ValueError, match=says):
            dijiang.convert(model, config, calibration=ids)
        assert not dijiang.is_converted(model)
        assert torch.equal(logits(model, ids), teacher)

    @pytest.mark.parametrize(
        ("kwargs", "error", "says"),
        [
            ({"past_key_values": DynamicCache()}, TypeError, "must be a DiJiangCache"),
            (
                {"attention_mask": torch.ones(2, 1, 40, 40)},
                NotImplementedError,
                r"\(batch, context",
            ),
            ({"output_attentions": True}, NotImplementedError, "attention weights"),
        ],
        ids=["cache", "mask", "weights"],
    )
    def test_forward(self, ids, kwargs, error, says):
        model = dijiang.convert(tiny_model(), NEAR_AND_FAR)
        with pytest.raises(error, match=says):
            model(input_ids=ids, **kwargs)

    def test_holes_in_a_mask(self, ids):
        model = dijiang.convert(tiny_model(), NEAR_AND_FAR)
        mask = torch.ones_like(ids)
        mask[1, 7] = 0
        with pytest.raises(ValueError, match="hole in row 1"):
            model(input_ids=ids, attention_mask=mask)


def test_attention_dropout_is_applied_where_softmax_stays_and_named_where_not(ids):
    model = tiny_model(attention_dropout=0.5)
    dijiang.convert(model, DiJiangConfig(window=8, sinks=2, layers=(0,))).train()
    with pytest.warns(UserWarning, match=r"attention dropout \(0.5\) is not applied"):
        one = logits(model, ids)
    with pytest.warns(UserWarning):
        assert not torch.equal(one, logits(model, ids))  # layer 1 drops
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model, ids), logits(model, ids))
