"""distill on tiny models: what learns, what stays, and going on after a stop."""

import copy

import dijiang
import pytest
import torch
import torch.nn.functional as F
from dijiang import DiJiangConfig
from dijiang.attention import kernel_mode
from tiny import tiny_model

CONFIG = DiJiangConfig(window=8, sinks=2)


@pytest.fixture(scope="module")
def ids():
    """48 rows of 64 tokens that repeat, so that far keys have something to say."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 500, (48, 16), generator=generator).repeat(1, 4)


def student(config=CONFIG):
    return dijiang.convert(tiny_model(initializer_range=0.15), config)


def distill(model, data, transfer=0, lm=0, **settings):
    """With the tokens of each stage; the default numbers if neither is given."""
    if transfer or lm:
        settings |= {"tokens": transfer + lm, "transfer_tokens": transfer}
    return dijiang.distill(model, data, **({"progress": False, "batch_size": 2} | settings))


def mean(values):
    return sum(values) / len(values)


def kernels_of(model):
    return {name: p for name, p in model.named_parameters() if ".dijiang." in name}


def base_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()
            if ".dijiang." not in name}  # fmt: skip


@torch.no_grad()
def transfer_loss(model, ids):
    """Each layer's error against its softmax self, on the same tokens each time."""
    with kernel_mode(model, "transfer") as kernels:
        model(input_ids=ids, use_cache=False)
        return mean([kernel.loss.item() for kernel in kernels])


@torch.no_grad()
def divergence(model, teacher, ids):
    ours, theirs = (x(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                    for x in (model, teacher))  # fmt: skip
    return F.kl_div(ours, theirs, log_target=True, reduction="sum").item() / ids.numel()


def test_attention_transfer_lowers_its_loss_and_moves_only_kernels(ids):
    model = student()
    base = base_of(model)
    dijiang.calibrate(model, ids[:8], choose=False)
    before = transfer_loss(model, ids)
    result = distill(model, ids, transfer=60 * 256, batch_size=4)
    assert len(result.losses()) == 60 and result.tokens == 60 * 256
    assert transfer_loss(model, ids) < 0.9 * before
    for name, parameter in base.items():
        assert torch.equal(model.get_parameter(name), parameter), name
    dijiang.restore(model)
    with torch.no_grad():
        ours = model(input_ids=ids[:4]).logits
        assert torch.equal(ours, tiny_model(initializer_range=0.15)(input_ids=ids[:4]).logits)


def test_stages_divide_the_tokens_by_what_the_model_keeps(ids):
    """KL alone with near keys, transfer first without: the data once."""
    far = CONFIG.replace(window=0, sinks=0, cache_size=0)
    near, alone = (distill(student(config), ids[:8]) for config in (CONFIG, far))
    assert near.losses() == [] and len(near.losses("lm")) == 4
    assert (len(alone.losses()), len(alone.losses("lm"))) == (1, 3)
    assert near.tokens == alone.tokens == ids[:8].numel()


def test_closed_far_keys_are_calibrated_first(ids):
    model = student()
    result = distill(model, ids[:8], transfer=128)
    assert "calibrated on 512 tokens" in result.start
    assert not dijiang.modules.kernels_of(model)[0].closed
    closed = student()
    distill(closed, ids[:8], transfer=128, calibrate=False)
    assert dijiang.modules.kernels_of(closed)[0].closed


def test_leaves_the_model_as_found(ids):
    model = student()
    model.config.use_cache = True
    frozen = next(iter(kernels_of(model).values())).requires_grad_(False)
    distill(model, ids[:4], transfer=128, lm=128)
    assert not model.training and model.config.use_cache
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert all(k.mode == "student" and k.loss is None for k in dijiang.modules.kernels_of(model))


@pytest.mark.parametrize("train", ["dijiang", "attention", "all"])
def test_predictions_follow_the_teacher(ids, train):
    model = student(CONFIG.replace(gate=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    teacher = tiny_model(initializer_range=0.15)
    distance = divergence(model, teacher, ids)
    rate = 1e-2 if train == "dijiang" else 1e-3
    result = distill(model, ids, lm=40 * 256, batch_size=4, train=train, lm_learning_rate=rate)
    assert result.losses() == [] and len(result.losses("lm")) == 40
    assert divergence(model, teacher, ids) < 0.95 * distance
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kernels = set(kernels_of(model))
    attention = {name for name in before if ".self_attn." in name}
    assert kernels < attention
    expected = {"dijiang": kernels, "attention": attention, "all": set(before)}[train]
    assert moved == expected


def test_language_model_loss_and_a_given_teacher(ids):
    teacher = tiny_model(seed=1)
    model = student(CONFIG.replace(gate=0.0))
    result = distill(
        model, ids, lm=8 * 256, batch_size=4, train="all", lm_weight=1.0,
        kl_weight=0.0, lm_learning_rate=1e-2,
    )  # fmt: skip
    losses = result.losses("lm")
    assert mean(losses[-2:]) < mean(losses[:2])
    own = distill(copy.deepcopy(model), ids, lm=128).losses("lm")
    given = distill(model, ids, lm=128, teacher=teacher).losses("lm")
    assert given[0] > own[0]


def test_padding_does_not_count(ids):
    """A padded batch has the loss of its real tokens."""
    rows = [ids[0].tolist(), ids[1, :40].tolist()]
    settings = dict(lm=1, kl_weight=0.0, lm_weight=1.0, lm_learning_rate=0.0)
    model = student(CONFIG.replace(gate=0.0))
    together = distill(model, rows, **settings).losses("lm")[0]
    alone = [distill(model, [row], batch_size=1, **settings).losses("lm")[0] for row in rows]
    weighted = (alone[0] * 63 + alone[1] * 39) / 102
    assert together == pytest.approx(weighted, rel=1e-4)


def test_gradient_accumulation_is_a_larger_batch(ids):
    """By plain gradient descent, which does not blow rounding up as Adam's first steps do."""
    models = []
    for batch_size, steps in ((4, 1), (2, 2)):
        model = student(CONFIG.replace(gate=0.0))
        distill(
            model, ids[:4], lm=512, batch_size=batch_size, lm_learning_rate=1.0,
            gradient_accumulation_steps=steps, trainer_arguments={"optim": "sgd"}, train="all",
        )  # fmt: skip
        models.append(model)
    start = student(CONFIG.replace(gate=0.0))
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(
            models[1].get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name
        )
    assert not torch.equal(models[0].lm_head.weight, start.lm_head.weight)


def test_same_seed_same_result(ids):
    first, second, other = (student() for _ in range(3))
    losses = [
        distill(model, ids, transfer=512, seed=seed).losses()
        for model, seed in ((first, 1), (second, 1), (other, 2))
    ]
    assert losses[0] == losses[1] != losses[2]


class Stopped(Exception):
    pass


def test_resumes_where_it_stopped(ids, tmp_path):
    settings = dict(transfer=10 * 128, lm=4 * 128)
    whole = student()
    expected = distill(whole, ids, **settings)

    def stop(row):
        if row["step"] == 6:
            raise Stopped

    with pytest.raises(Stopped):
        distill(student(), ids, output_dir=tmp_path, save_steps=2, progress=stop, **settings)
    resumed = student()
    result = distill(resumed, ids, output_dir=tmp_path, save_steps=2, resume=True, **settings)
    assert 1 < result.history[0]["step"] <= 6
    assert result.losses() == pytest.approx(expected.losses()[-len(result.losses()) :], rel=1e-4)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
    # All done: nothing is trained again, and the weights are there.
    done = student()
    again = distill(done, ids, output_dir=tmp_path, save_steps=2, resume=True, **settings)
    assert again.history == []
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(done.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_progress_is_told(ids):
    rows = []
    result = distill(student(), ids, transfer=3 * 128, progress=rows.append)
    assert rows == result.history
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["tokens"] == 384 and rows[-1]["steps"] == 3 and rows[-1]["stage"] == "transfer"


@pytest.mark.parametrize("kind", ["tensor", "lists", "one list", "one tensor", "dataset"])
def test_kinds_of_data(ids, kind):
    rows = ids[:4]
    data = {
        "tensor": rows,
        "lists": rows.tolist(),
        "one list": rows.flatten().tolist(),
        "one tensor": rows.flatten(),
        "dataset": [{"input_ids": row.tolist(), "text": "dropped"} for row in rows],
    }[kind]
    result = distill(student(), data, length=64, seed=3)
    assert len(result.history) == 2 and result.tokens == 256
    torch.testing.assert_close(
        result.losses(), distill(student(), rows, seed=3).losses(), rtol=1e-5, atol=0
    )


def test_window_alone_has_nothing_to_learn(ids):
    model = student(DiJiangConfig.window_only(8, 2))
    assert distill(model, ids, transfer=128).history == []
    with pytest.raises(ValueError, match="nothing to train"):
        distill(model, ids, lm=128, train="dijiang")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": "lora"}, "dijiang, attention, all"),
        ({"resume": True}, "output_dir"),
        ({"lm": 10, "kl_weight": 0.0}, "lm_weight or kl_weight"),
        ({"tokens": 10, "transfer_tokens": 20}, "between 0 and tokens=10, got 20"),
    ],
)
def test_refuses_settings(ids, settings, says):
    with pytest.raises(ValueError, match=says):
        distill(student(), ids, **settings)


def test_refuses_data(ids):
    model = student()
    for data, error, says in (
        ([], ValueError, "empty"),
        (torch.randn(2, 64), ValueError, "whole numbers"),
        (list(range(2, 20)), ValueError, "do not fill one row"),
        (7, TypeError, "got int"),
    ):
        with pytest.raises(error, match=says):
            distill(model, data, length=64)
    with pytest.raises(ValueError, match="no far keys"):
        distill(model, ids[:, :12], transfer=24)
    with pytest.raises(ValueError, match="not converted"):
        distill(tiny_model(), ids)


def test_refuses_an_adapter(ids):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(student(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"got PeftModel.*merge_and_unload"):
        dijiang.distill(lora, ids)
