"""dct against the transform matrix."""

import pytest
import torch
from attention_cases import (
    DEVICES,
    EXACT_DTYPES,
    LOW_DTYPES,
    assert_close,
    error,
    one_thread,  # noqa: F401
    skip_unsupported,
)
from dijiang import reference
from dijiang.ops import dct

SIZES = [1, 2, 3, 4, 5, 8, 12, 16, 17, 31, 32, 60, 64, 96, 97, 100, 127, 128, 256, 512, 576, 1000,
         1024, 2048]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("type", [2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_against_matrix(n, type, dtype, device):
    skip_unsupported(device, dtype)
    x = torch.randn(2, 3, 5, n, dtype=dtype)
    assert_close(dct(x.to(device), type), reference.dct(x.double(), type), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("type", [2, 3])
@pytest.mark.parametrize("n", [17, 64, 96, 128])
def test_low_precision_law(n, type, dtype, device):
    x = torch.randn(64, n).to(dtype)
    truth = reference.dct(x.double(), type)
    limit = 2 * error(reference.dct(x.to(device), type), truth)
    assert error(dct(x.to(device), type), truth) <= limit


@pytest.mark.parametrize("device", DEVICES)
def test_type_3_inverts_type_2(device):
    x = torch.randn(7, 48, device=device)
    assert torch.allclose(dct(dct(x, 2), 3), x, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 3, 4, 16), (2, 2, 2, 3, 16)])
def test_any_rank(shape, device):
    x = torch.randn(shape, device=device)
    got = dct(x)
    assert got.shape == shape
    assert_close(got, reference.dct(x.double().cpu()), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_expanded_views(device):
    x = torch.randn(4, 32, 3, 6, device=device)
    views = [
        x.transpose(1, 3),
        x.permute(3, 2, 0, 1),
        x[..., ::2],
        x[:, :1].expand(4, 5, 3, 6),
        x.permute(1, 0, 2, 3)[::3, :, 1:],
        x[:, 0, 0, :1].expand(4, 16),
    ]
    for view in views:
        assert_close(dct(view), reference.dct(view.double().cpu()), torch.float32)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4, 8)])
def test_empty(shape):
    assert dct(torch.randn(shape)).shape == shape


def test_gradients():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    for type in (2, 3):
        assert torch.autograd.gradcheck(lambda x, type=type: dct(x, type), x)
        assert torch.autograd.gradgradcheck(lambda x, type=type: dct(x, type), x)
