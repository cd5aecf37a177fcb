"""feature_map against the oracle."""

import pytest
import torch
from attention_cases import (
    DEVICES,
    EXACT_DTYPES,
    KINDS,
    LOW_DTYPES,
    assert_close,
    error,
    map_params,
    one_thread,  # noqa: F401
    random_params,
    skip_unsupported,
)
from dijiang import reference
from dijiang.ops import FeatureParams, feature_map

HEADS, HEADDIM, FEATURES = 3, 8, 21


def random_x(*shape):
    return torch.randn(shape or (2, HEADS, 37, HEADDIM), dtype=torch.float64)


def on(params, device, dtype):
    return map_params(params, lambda x: x.to(device, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "dct"])
def test_against_oracle(kind, log, dtype, device):
    skip_unsupported(device, dtype)
    torch.manual_seed(0)
    x, params = (
        random_x().to(dtype),
        on(random_params(HEADS, FEATURES, HEADDIM, kind), "cpu", dtype),
    )
    truth = reference.feature_map(x.double(), on(params, "cpu", torch.float64), scale=0.3, log=log)
    got = feature_map(x.to(device), on(params, device, dtype), scale=0.3, log=log)
    assert_close(got, truth, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "dct"])
def test_low_precision_law(kind, log, dtype, device):
    torch.manual_seed(0)
    x, params = random_x().to(device, dtype), random_params(HEADS, FEATURES, HEADDIM, kind)
    params = on(params, device, dtype)
    truth = reference.feature_map(
        x.double().cpu(), on(params, "cpu", torch.float64), scale=0.3, log=log
    )
    limit = 2 * error(reference.feature_map(x, params, scale=0.3, log=log), truth)
    assert error(feature_map(x, params, scale=0.3, log=log), truth) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_left_out(kind):
    x, params = random_x(), FeatureParams(torch.randn(HEADS, 5, HEADDIM).double(), kind=kind)
    assert_close(feature_map(x, params), reference.feature_map(x, params), torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_expanded_views(device):
    params = on(random_params(HEADS, FEATURES, HEADDIM, "exp"), device, torch.float32)
    x = random_x(2, 37, HEADS, 2 * HEADDIM).float().to(device)
    views = [x.transpose(1, 2)[..., :HEADDIM], x.transpose(1, 2)[..., ::2],
             x[:, :, :1, :HEADDIM].transpose(1, 2).expand(2, HEADS, 37, HEADDIM)]  # fmt: skip
    for view in views:
        truth = reference.feature_map(view.double().cpu(), on(params, "cpu", torch.float64))
        assert_close(feature_map(view, params), truth, torch.float32)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "dct"])
def test_gradients(kind, log):
    torch.manual_seed(0)
    x = random_x(2, 2, 3, 4).requires_grad_()
    omega, log_weight, beta, kind = map_params(
        random_params(2, 5, 4, kind), lambda p: p.requires_grad_()
    )

    def f(x, omega, log_weight, beta=None):
        params = FeatureParams(omega, log_weight, beta, kind)
        return feature_map(x, params, scale=0.7, log=log)

    inputs = [x, omega, log_weight] + ([beta] if beta is not None else [])
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES])
@pytest.mark.parametrize("kind", KINDS)
def test_saturates_at_the_largest_finite_value(kind, dtype, device):
    torch.manual_seed(0)
    x = (1e4 * random_x()).to(device, dtype).requires_grad_()
    params = FeatureParams(torch.randn(HEADS, FEATURES, HEADDIM, device=device), kind=kind)
    out = feature_map(x, params)
    assert out.isfinite().all() and out.ge(0).all()
    if kind == "exp":
        assert out.max() == torch.finfo(dtype).max
    (grad,) = torch.autograd.grad(feature_map(x, params, log=True).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, HEADS, 0, HEADDIM), (0, HEADS, 3, HEADDIM)])
def test_empty(shape):
    x = random_x(*shape).requires_grad_()
    omega = torch.randn(HEADS, 5, HEADDIM, dtype=torch.float64, requires_grad=True)
    out = feature_map(x, FeatureParams(omega))
    assert out.shape == (*shape[:3], 5)
    grad_x, grad_omega = torch.autograd.grad(out.sum(), [x, omega])
    assert grad_x.shape == shape and grad_omega.eq(0).all()


def test_float32_parameters_serve_every_dtype():
    x = random_x()
    params = on(random_params(HEADS, FEATURES, HEADDIM, "exp"), "cpu", torch.float32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert feature_map(x.to(dtype), params).dtype == dtype
