"""Agreement, attention errors and maps, against the models' own logits and the reference's sums."""

import copy

import dijiang
import pytest
import torch
import torch.nn.functional as F
from dijiang import evaluate, reference
from dijiang.attention import kernel_mode
from tiny import tiny_model

WINDOW, SINKS = 8, 2


def plain(seed: int = 0, **overrides):
    """Weights large enough for attention that is not a mere mean."""
    return tiny_model(seed, initializer_range=0.15, **overrides)


def converted(seed: int = 0, **overrides):
    """Far keys open, so that they have a part in everything."""
    model = plain(seed)
    settings = dict(window=WINDOW, sinks=SINKS, cache_size=0, gate=0.0) | overrides
    return dijiang.convert(model, dijiang.DiJiangConfig(**settings))


@pytest.fixture
def blocks():
    return torch.randint(0, 512, (3, 60), generator=torch.Generator().manual_seed(1))


def log_probabilities(model, row):
    return model(row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)


@torch.no_grad()
def test_agreement_is_that_of_the_two_models_logits(blocks):
    student, teacher = converted(), plain(1)
    made = evaluate.agreement(student, teacher, blocks)
    kl, same, losses = [], [], []
    for row in blocks:
        s, t = log_probabilities(student, row), log_probabilities(teacher, row)
        kl.append((t.exp() * (t - s)).sum(-1).mean())
        same.append((s.argmax(-1) == t.argmax(-1)).double().mean())
        losses.append([F.nll_loss(x, row[1:]) for x in (s, t)])
    kl, same, losses = torch.stack(kl), torch.stack(same), torch.tensor(losses)
    assert made.kl == pytest.approx(kl.mean().item(), rel=1e-4) and made.kl > 0.1
    assert made.kl_standard_error == pytest.approx(kl.std().item() / 3**0.5, rel=1e-3)
    assert made.top1 == pytest.approx(same.mean().item()) and 0 <= made.top1 < 1
    assert made.top1_standard_error == pytest.approx(same.std().item() / 3**0.5)
    assert made.student.loss == pytest.approx(losses[:, 0].mean().item(), rel=1e-5)
    assert made.teacher.loss == pytest.approx(losses[:, 1].mean().item(), rel=1e-5)
    assert (made.length, made.tokens) == (60, 177)
    assert made.student == evaluate.perplexity(student, blocks)


def test_agreement_over_more_than_a_slice():
    """The window's slices are put together again, whatever their lengths."""
    block = torch.randint(0, 512, (1, 300), generator=torch.Generator().manual_seed(2))
    student, teacher = converted(), plain(1)
    made = evaluate.agreement(student, teacher, block)
    with torch.no_grad():
        s, t = log_probabilities(student, block[0]), log_probabilities(teacher, block[0])
    assert made.kl == pytest.approx((t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-4)
    assert made.top1 == pytest.approx((s.argmax(-1) == t.argmax(-1)).double().mean().item())


def test_agreement_with_its_own_softmax(blocks):
    student = converted()
    own = evaluate.agreement(student, None, blocks)
    teacher = dijiang.restore(copy.deepcopy(student))
    assert own == evaluate.agreement(student, teacher, blocks)
    assert own.kl > 0.01 and dijiang.is_converted(student)
    # The student's attention is back as it was, not left as softmax.
    assert evaluate.perplexity(student, blocks) == own.student != own.teacher


def test_agreement_with_itself_is_perfect(blocks):
    model = plain()
    made = evaluate.agreement(model, model, blocks)
    assert made.kl == pytest.approx(0.0, abs=1e-6) and made.top1 == 1.0


def test_agreement_refuses(blocks):
    with pytest.raises(ValueError, match=r"not converted\. Call dijiang\.convert"):
        evaluate.agreement(plain(), None, blocks)
    with pytest.raises(ValueError, match="share one vocabulary, got 512 and 600 tokens"):
        evaluate.agreement(plain(), plain(vocab_size=600), blocks)
    with pytest.raises(ValueError, match=r"agreement: blocks must be \(windows, length >= 2\)"):
        evaluate.agreement(plain(), plain(), blocks[0])


def inputs_under_softmax(model, row) -> dict:
    """{layer: (q, k, v)} as they reach each layer of the unconverted model."""
    seen = {}
    layers = model.model.layers
    hooks = [
        layer.self_attn.dijiang.register_forward_pre_hook(
            lambda kernel, args, i=i: seen.setdefault(i, args)
        )
        for i, layer in enumerate(layers)
    ]
    with kernel_mode(model, "transfer"), torch.no_grad():
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def outputs(kernel, q, k, v):
    """(softmax, kernelised) in float64 by the formulas, (heads, n, headdim)."""
    q, k, v = (x.double() for x in (q, k, v))
    kernelised = reference.kernelized_attention(
        q, k, v, *kernel.feature_params(torch.float64), scale=kernel.scale, window=WINDOW,
        sinks=SINKS,
    )  # fmt: skip
    softmax = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=kernel.scale, enable_gqa=True
    )
    return softmax[0], kernelised[0]


@torch.no_grad()
def test_attention_errors_by_the_formulas(blocks):
    model = converted()
    rows = evaluate.attention_errors(model, blocks)
    assert [row.layer for row in rows] == [0, 1]
    for row in rows:
        kernel = model.model.layers[row.layer].self_attn.dijiang
        error, size = [], []
        for block in blocks:
            softmax, ours = outputs(kernel, *inputs_under_softmax(model, block)[row.layer])
            error.append((ours - softmax).square().sum((1, 2)))
            size.append(softmax.square().sum((1, 2)))
        error, size = torch.stack(error), torch.stack(size)
        assert row.error == pytest.approx((error.sum() / size.sum()).item(), rel=1e-3)
        assert row.error > 0.01
        assert row.heads == pytest.approx((error.sum(0) / size.sum(0)).tolist(), rel=1e-3)
        ratios = error.sum(1) / size.sum(1)
        assert row.standard_error == pytest.approx(ratios.std().item() / 3**0.5, rel=1e-2)


def test_attention_error_is_what_transfer_lowers(blocks):
    model = converted()
    with kernel_mode(model, "transfer") as kernels:
        model(blocks[:1], use_cache=False)
        losses = [kernel.loss.item() for kernel in kernels]
    rows = evaluate.attention_errors(model, blocks[:1])
    assert [row.error for row in rows] == pytest.approx(losses, rel=1e-5)


def test_no_layer_answers_for_another(blocks):
    model = converted()
    before = evaluate.attention_errors(model, blocks)
    with torch.no_grad():
        model.model.layers[0].self_attn.dijiang.gate.add_(4.0)
    after = evaluate.attention_errors(model, blocks)
    assert after[0].error != pytest.approx(before[0].error, rel=0.1)
    assert after[1] == before[1]


def test_a_window_that_holds_everything_has_no_error(blocks):
    model = dijiang.convert(plain(), dijiang.DiJiangConfig(window=64, sinks=0))
    assert max(row.error for row in evaluate.attention_errors(model, blocks)) < 1e-10


def test_a_layer_without_output_has_no_error(blocks):
    model = plain()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.v_proj.weight)
    dijiang.convert(model, dijiang.DiJiangConfig(window=WINDOW, sinks=SINKS))
    silent, other = evaluate.attention_errors(model, blocks)
    assert silent.error == 0 and silent.standard_error == 0 and set(silent.heads) == {0}
    assert other.error > 0


def test_attention_errors_of_some_layers(blocks):
    model = converted(layers=(1,))
    assert [row.layer for row in evaluate.attention_errors(model, blocks)] == [1]
    with pytest.raises(ValueError, match="not converted"):
        evaluate.attention_errors(plain(), blocks)


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides", [{}, {"decay": "token"}, {"window": 0, "sinks": 0}, {"cache_size": 3}]
)
def test_maps_make_the_outputs(blocks, overrides):
    """Weights times values are what each attention gives out."""
    model = converted(**overrides)
    ids = blocks[0]
    heads = [(1, 3), (0, 0), (1, 0)]
    maps = evaluate.attention_maps(model, ids, heads)
    assert [(one.layer, one.head) for one in maps] == heads
    seen = inputs_under_softmax(model, ids)
    hidden = {}
    with kernel_mode(model, "transfer"):
        hooks = [
            layer.self_attn.dijiang.register_forward_hook(
                lambda kernel, args, out, i=i: hidden.setdefault(i, out)
            )
            for i, layer in enumerate(model.model.layers)
        ]
        model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for one in maps:
        q, k, v = seen[one.layer]
        values = v[0, one.head // 2]
        softmax = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.allclose(one.teacher @ values, softmax[0, one.head], atol=1e-5)
        assert torch.allclose(one.student @ values, hidden[one.layer][0, one.head], atol=1e-5)
        for weights in (one.teacher, one.student):
            assert torch.allclose(weights.sum(-1), torch.ones(60), atol=1e-5)
            assert float(weights.triu(1).abs().max()) == 0.0
        assert not torch.allclose(one.teacher, one.student, atol=1e-3)


@torch.no_grad()
def test_the_teachers_map_is_the_unconverted_models(blocks):
    model = plain()
    model.set_attn_implementation("eager")
    theirs = model(blocks[:1], output_attentions=True, use_cache=False).attentions
    for one in evaluate.attention_maps(converted(), blocks[0], [(0, 1), (1, 2)]):
        assert torch.allclose(one.teacher, theirs[one.layer][0, one.head], atol=1e-5)


def test_maps_refuse(blocks):
    model = converted(layers=(1,))
    with pytest.raises(ValueError, match=r"converted layer \(1\) and one of its 4 heads, got"):
        evaluate.attention_maps(model, blocks[0], [(0, 0)])
    with pytest.raises(ValueError, match=r"got \(1, 4\)"):
        evaluate.attention_maps(model, blocks[0], [(1, 4)])
    with pytest.raises(ValueError, match="2 to 256 tokens, got"):
        evaluate.attention_maps(model, torch.zeros(257, dtype=torch.int64), [(1, 0)])
    with pytest.raises(ValueError, match="not converted"):
        evaluate.attention_maps(plain(), blocks[0], [(0, 0)])
