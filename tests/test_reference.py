"""The oracles agree with each other and with what PyTorch itself computes."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    DECAYS,
    KINDS,
    error,
    make_case,
    one_thread,  # noqa: F401
)
from dijiang import reference
from dijiang.ops import FeatureParams

EXACT = 1e-12
SEQLEN = 37


def recurrent_split(case, cut):
    first, second = case.slice(0, cut), case.slice(cut, case.q.shape[2])
    a, state = first.run(reference, "_recurrent", return_state=True)
    b = second.run(reference, "_recurrent", initial_state=state)
    return torch.cat([a, b], 2)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window,sinks", [(0, 0), (0, 3), (4, 0), (4, 3)])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_quadratic_is_recurrent_is_split(kind, window, sinks, decay):
    for options in ({}, {"normalize": False}, {"eps": 0.1}):
        case = make_case(kind, decay, seqlen=SEQLEN, window=window, sinks=sinks, **options)
        truth = case.run(reference)
        if kind is None and not (window or sinks):
            assert truth.eq(0).all()  # no key has any weight
            assert case.run(reference, "_recurrent").eq(0).all()
            continue
        assert error(case.run(reference, "_recurrent"), truth) < EXACT
        assert error(recurrent_split(case, 13), truth) < EXACT


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"eps": 0.1}])
def test_given_features_quadratic_is_recurrent_is_split(decay, options):
    case = make_case("given", decay, seqlen=SEQLEN, **options)
    case.k[..., 0] = 0
    truth = case.run(reference)
    assert error(case.run(reference, "_recurrent"), truth) < EXACT
    assert error(recurrent_split(case, 13), truth) < EXACT


def test_gradients_agree():
    case = make_case("exp", "token", seqlen=19, window=4, sinks=2).require_grad()
    inputs = case.inputs()
    weight = torch.randn(case.q.shape[:3], dtype=torch.float64)[..., None]
    grads = [
        torch.autograd.grad((weight * case.run(reference, form)).sum(), list(inputs.values()))
        for form in ("", "_recurrent")
    ]
    for quadratic, recurrent in zip(*grads, strict=True):
        assert error(recurrent, quadratic) < EXACT


def test_window_that_holds_everything_is_softmax_attention():
    case = make_case(None, seqlen=SEQLEN, window=64)
    k, v = (x.repeat_interleave(2, 1) for x in (case.k, case.v))
    truth = F.scaled_dot_product_attention(case.q, k, v, is_causal=True)
    assert error(case.run(reference), truth) < EXACT


def test_near_keys_alone_are_masked_softmax_attention():
    case = make_case(None, seqlen=SEQLEN, window=4, sinks=3)
    near = [
        [s <= t and (s < 3 or t // 4 - s // 4 <= 1) for s in range(SEQLEN)] for t in range(SEQLEN)
    ]
    k, v = (x.repeat_interleave(2, 1) for x in (case.k, case.v))
    truth = F.scaled_dot_product_attention(case.q, k, v, attn_mask=torch.tensor(near))
    assert error(case.run(reference), truth) < EXACT


def test_given_features_by_hand():
    q = torch.tensor([[[[1.0, 2.0], [3.0, 1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, 1.0], [0.0, 2.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[5.0], [7.0]]]], dtype=torch.float64)
    out = reference.causal_linear_attention(q, k, v, log_decay=torch.tensor([0.5]).double().log())
    # Second row: weights 0.5 (3 + 1) = 2 and 2.
    assert torch.allclose(out.flatten(), torch.tensor([5.0, 6.0], dtype=torch.float64))


def test_positive_features_estimate_the_exponential():
    # beta = 1/2 and Gaussian rows: E phi(q).phi(k) = exp(q.k).
    torch.manual_seed(0)
    d, m = 4, 200_000
    omega = torch.randn(1, m, d, dtype=torch.float64)
    params = FeatureParams(omega, None, torch.full((1,), 0.5, dtype=torch.float64))
    q, k = 0.3 * torch.randn(2, 1, 8, d, dtype=torch.float64)  # small: variance ~ exp(|q + k|^2)
    phi_q, phi_k = (reference.feature_map(x[None], params) for x in (q, k))
    assert error(phi_q @ phi_k.mT / m, (q @ k.mT).exp()[None]) < 0.02


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_dct_is_the_fourier_transform_of_the_mirrored_signal(n):
    x = torch.randn(3, n, dtype=torch.float64)
    spectrum = torch.fft.fft(torch.cat([x, x.flip(-1)], -1))[..., :n]
    k = torch.arange(n, dtype=torch.float64)
    y = 0.5 * (spectrum * torch.exp(-0.5j * torch.pi * k / n)).real
    y *= torch.where(k == 0, (1 / n) ** 0.5, (2 / n) ** 0.5)
    assert torch.allclose(reference.dct(x), y, atol=1e-12)
    assert torch.allclose(reference.dct(reference.dct(x), 3), x, atol=1e-12)


@pytest.mark.parametrize("form", ["", "_recurrent"])
def test_packed_and_padded(form):
    case = make_case("exp", "token", batch=1, seqlen=20, window=3, sinks=1)
    ends = [0, 6, 6, 20]
    packed = case.run(reference, form, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    alone = [case.slice(a, b).run(reference, form) for a, b in pairwise(ends)]
    assert torch.equal(packed, torch.cat(alone, 2))
    padded = case.run(reference, form, seq_bounds=torch.tensor([[6, 17]], dtype=torch.int32))
    assert torch.equal(padded[:, :, 6:17], case.slice(6, 17).run(reference, form))
    assert padded[:, :, :6].eq(0).all() and padded[:, :, 17:].eq(0).all()


def test_extreme_inputs_stay_finite():
    case = make_case("exp", seqlen=16, size=1e4).require_grad()
    for form in ("", "_recurrent"):
        out = case.run(reference, form)
        grads = torch.autograd.grad(out.sum(), [case.q, case.k, case.v])
        assert all(x.isfinite().all() for x in (out, *grads))
