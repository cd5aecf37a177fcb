"""KernelizedAttention: an attention layer of one's own."""

import subprocess
import sys

import pytest
import torch
from dijiang import DiJiangConfig, KernelizedAttention
from dijiang.modules import CLOSED, AttentionKernel

CONFIGS = {
    "default": DiJiangConfig(window=4, sinks=1, gate=0.0),
    "without hard keys": DiJiangConfig(window=4, sinks=1, gate=0.0, cache_size=0),
    "closed": DiJiangConfig(window=4, sinks=1, cache_size=0),
    "paper": DiJiangConfig.paper(),
    "published": DiJiangConfig.published(),
    "per token": DiJiangConfig(window=4, sinks=0, gate=0.0, decay="token"),
    "window": DiJiangConfig.window_only(4, 1),
}


def layer_of(config, **settings):
    torch.manual_seed(0)
    return KernelizedAttention(32, 4, **({"num_kv_heads": 2, "config": config} | settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_split_with_state_and_token_by_token(name):
    layer, x = layer_of(CONFIGS[name]), torch.randn(2, 21, 32)
    with torch.no_grad():
        whole = layer(x)
        out, state = layer(x[:, :13], return_state=True)
        parts = [out]
        for t in range(13, 21):
            out, state = layer(x[:, t : t + 1], state=state, return_state=True)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_trains(name):
    layer, x = layer_of(CONFIGS[name]), torch.randn(2, 21, 32)
    layer(x).square().mean().backward()
    kernel = layer.kernel
    without_gradient = {
        key for key, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    if kernel.closed:  # the far keys weigh nothing, so nothing of theirs moves
        assert all("features" in key or "gate" in key for key in without_gradient)
    else:
        assert not without_gradient


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("window", [0, 64])
def test_decay_starts_as_retnets(decay, window):
    config = DiJiangConfig(window=window, decay=decay)
    kernel = AttentionKernel(config, heads=4, kv_heads=2, headdim=8, hidden_size=16)
    rate = kernel.log_decay(torch.randn(1, 1, 16)).detach().flatten()
    lost = torch.tensor([1 / 32, 1 / 512]) / max(window, 1)
    torch.testing.assert_close(rate, torch.log1p(-lost), rtol=1e-3, atol=0)


def test_padding_and_packing():
    layer, x = layer_of(CONFIGS["default"]), torch.randn(2, 14, 32)
    with torch.no_grad():
        alone = [layer(x[:1, :9]), layer(x[1:, :14])]
        bounds = torch.tensor([[5, 14], [0, 14]], dtype=torch.int32)
        padded = torch.cat([torch.cat([torch.randn(1, 5, 32), x[:1, :9]], 1), x[1:]])
        out = layer(padded, seq_bounds=bounds)
        packed = layer(
            torch.cat([x[:1, :9], x[1:]], 1),
            cu_seqlens=torch.tensor([0, 9, 23], dtype=torch.int32),
        )
    torch.testing.assert_close(out[:1, 5:], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1:], alone[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_closed_gate_is_window_and_sinks_alone():
    """To the last bit's rounding, even where far features are large."""
    closed, window = layer_of(CONFIGS["closed"]), layer_of(CONFIGS["window"])
    window.load_state_dict(closed.state_dict(), strict=False)
    assert closed.kernel.closed and bool((closed.kernel.gate == CLOSED).all())
    x = 10 * torch.randn(1, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(closed(x), window(x), rtol=1e-5, atol=1e-6)


def test_shared_features_and_groups():
    kernel = AttentionKernel(DiJiangConfig.paper(), heads=4, kv_heads=2, headdim=8)
    fq, fk = kernel.feature_params()
    assert fq.omega is fk.omega  # read once: a row serves its kv head's query heads
    assert torch.equal(fq.log_weight, fk.log_weight.repeat_interleave(2, 0))
    assert kernel.features_q is None
    apart = AttentionKernel(DiJiangConfig(share_qk=False), heads=4, kv_heads=2, headdim=8)
    assert apart.features_q.heads == 4 and apart.features_k.heads == 2


def test_refuses():
    with pytest.raises(ValueError, match="30 and 4 heads"):
        KernelizedAttention(30, 4)
    with pytest.raises(ValueError, match="4 heads and 3 kv_heads"):
        KernelizedAttention(32, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="hidden_size"):
        AttentionKernel(DiJiangConfig(decay="token"), heads=4, kv_heads=2, headdim=8)


def test_double_precision():
    layer = layer_of(CONFIGS["default"]).double()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    out, state = layer(x, return_state=True)
    assert out.dtype == state.kv.dtype == torch.float64


def test_needs_no_transformers():
    code = (
        "import sys, dijiang; dijiang.KernelizedAttention(8, 2); dijiang.FeatureMap; "
        "dijiang.DiJiangConfig; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_kept_features_follow_their_parameters():
    """Decoding computes them once, and again when a parameter or the device of it changes."""
    layer = KernelizedAttention(32, 4, num_kv_heads=2, config=DiJiangConfig(window=4, gate=0.0))
    kernel, x = layer.kernel.eval(), torch.randn(1, 9, 32)

    def made():
        return None if kernel._kept is None else kernel._kept[1][0].omega

    with torch.no_grad():
        _, state = layer(x[:, :7], return_state=True)
        first = made()
        layer(x[:, 7:8], state=state, return_state=True)
        assert made() is first
        kernel.features_q.matrix.mul_(2)
        layer(x[:, 8:], state=state, return_state=True)
        torch.testing.assert_close(made(), 2 * first)
        kernel.features_q.matrix.data = kernel.features_q.matrix.data / 2
        layer(x[:, 8:], state=state, return_state=True)
        torch.testing.assert_close(made(), first)
        kernel.features_q.matrix.data.mul_(3)  # leaves version and address: the next prompt sees it
        layer(x[:, :7], return_state=True)
        torch.testing.assert_close(made(), 3 * first)
    layer.train()
    assert made() is None
    whole = layer(x)
    whole.sum().backward()
    assert kernel.features_q.matrix.grad is not None and made() is None
