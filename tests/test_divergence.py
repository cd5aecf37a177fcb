"""KL divergence in slices against the formula on whole tensors."""

import dijiang.divergence
import pytest
import torch
import torch.nn.functional as F
from dijiang.divergence import kl_divergence


def plain(logits, teacher, weight):
    wanted = teacher.double().log_softmax(-1)
    each = F.kl_div(logits.double().log_softmax(-1), wanted, log_target=True, reduction="none")
    return (each.sum(-1) * weight).sum() / weight.sum()


@pytest.fixture(params=[7, 2**22], ids=["slices", "whole"])
def slices(request, monkeypatch):
    monkeypatch.setattr(dijiang.divergence, "_SLICE", request.param * 31)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient(slices, dtype):
    rng = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 2, 9, 31, generator=rng)).to(dtype)
    weight = (torch.rand(2, 9, generator=rng) > 0.3).float()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = kl_divergence(ours, teacher, weight), plain(theirs, teacher, weight)
    (2 * a).backward()
    (2 * b).backward()
    near = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(a.double(), b, rtol=min(near, 1e-6), atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=near, atol=near / 100)
    assert ours.grad[weight == 0].abs().max() == 0


def test_any_strides(slices):
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 31, 9, 2, generator=rng, dtype=torch.float64).permute(
        0, 3, 2, 1
    )
    ours, theirs = logits.detach().requires_grad_(), logits.detach().requires_grad_()
    kl_divergence(ours, teacher, torch.ones(2, 9)).backward()
    plain(theirs, teacher, torch.ones(2, 9)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck(slices):
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 9, 31, generator=rng, dtype=torch.float64)
    weight = torch.rand(9, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: kl_divergence(x, teacher, weight), logits.requires_grad_()
    )


def test_no_weight_is_no_loss():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = kl_divergence(logits, torch.randn(3, 5), torch.zeros(3))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(3, 5))


def test_shapes_that_do_not_fit_are_named():
    x = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\), \(2, 3, 4\) and \(2, 3\)"):
        kl_divergence(x, x[..., :4], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"and \(3, 2\)"):
        kl_divergence(x, x, torch.ones(3, 2))
