"""dijiang._core: the kernels on NumPy arrays, without torch."""

import subprocess
import sys

import numpy as np
import pytest

_core = pytest.importorskip("dijiang._core")


def dct_matrix(n):
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    scale = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
    return scale * np.cos(np.pi * (2 * j + 1) * k / (2 * n))


@pytest.mark.parametrize("shape", [(8,), (5, 12), (2, 3, 64), (2, 1, 3, 37), (2, 1, 2, 3, 10)])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_dct(shape, dtype, tolerance):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    y = _core.dct(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, x @ dct_matrix(shape[-1]).T, atol=tolerance)
    np.testing.assert_allclose(_core.dct(y, 3), x, atol=tolerance)


def test_dct_of_a_view():
    x = np.random.default_rng(0).normal(size=(6, 40))[::2, ::-2]
    np.testing.assert_allclose(_core.dct(x), _core.dct(x.copy()), atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_linear_attention(dtype, tolerance, normalize, decay):
    rng = np.random.default_rng(1)
    batch, heads, kv_heads, length, features, values = 2, 4, 2, 70, 8, 5
    q = rng.uniform(0.1, 1, (batch, length, heads, features)).astype(dtype).transpose(0, 2, 1, 3)
    k = rng.uniform(0.1, 1, (batch, kv_heads, length, features)).astype(dtype)
    v = rng.normal(size=(batch, kv_heads, length, values)).astype(dtype)
    log_decay = -rng.uniform(0, 0.2, (batch, kv_heads, length)).astype(dtype)

    w = q @ np.repeat(k, heads // kv_heads, 1).swapaxes(2, 3)
    if decay:
        c = np.repeat(log_decay, heads // kv_heads, 1).astype(np.float64).cumsum(-1)
        w = w * np.exp(c[..., :, None] - c[..., None, :])
    w = np.tril(w)
    expected = w @ np.repeat(v, heads // kv_heads, 1)
    if normalize:
        expected = expected / w.sum(-1, keepdims=True)
    out = _core.linear_attention(
        q, k, v, log_decay=log_decay if decay else None, normalize=normalize
    )
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_build_info():
    info = _core.build_info()
    assert info["version"] == _core.__version__
    assert info["cpu_level"] in (1, 3, 4)
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda a: _core.dct(a, 4), ValueError, "type must be 2 or 3, got 4"),
        (
            lambda a: _core.dct(a.astype(np.int32)),
            TypeError,
            "must be float32 or float64, got int32",
        ),
        (lambda a: _core.dct(a[..., :0]), ValueError, "last dimension of at least 1"),
        (lambda a: _core.linear_attention(a[0], a, a), ValueError, "batch, heads, seqlen"),
        (
            lambda a: _core.linear_attention(a, a[:, :, :2], a),
            ValueError,
            r"k must have shape \(2, any, 3, 4\) .* got \(2, 2, 2, 4\)",
        ),
        (lambda a: _core.linear_attention(a, a, a.astype(np.float32)), TypeError, "dtype of q"),
        (lambda a: _core.linear_attention(a[:, :1], a, a), ValueError, "kv heads of k must divide"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((2, 2, 3, 4)))


def test_needs_no_torch():
    code = "import sys, dijiang._core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
