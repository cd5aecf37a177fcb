"""causal_linear_attention and its update: every form is one function."""

import attention_laws as laws
import pytest
import torch
from attention_cases import (
    DECAYS,
    DEVICES,
    EXACT_DTYPES,
    KV_HEADS,
    LOW_DTYPES,
    assert_close,
    make_case,
    one_thread,  # noqa: F401
    skip_unsupported,
    true_state,
)
from dijiang import reference
from dijiang.ops import LinearAttentionState, causal_linear_attention

devices = pytest.mark.parametrize("device", DEVICES)
decays = pytest.mark.parametrize("decay", DECAYS)
exact = pytest.mark.parametrize("dtype", EXACT_DTYPES)


@devices
@exact
@decays
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"eps": 0.1}])
def test_all_forms(options, decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_all_forms(make_case("given", decay, **options), dtype, device)


@devices
@exact
@decays
def test_final_state(decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_final_state(make_case("given", decay), dtype, device)


@devices
@exact
@decays
def test_packed(decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_packed(make_case("given", decay, batch=1), dtype, device)


@devices
@exact
@decays
def test_padding(decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_padding(make_case("given", decay), dtype, device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_no_output_depends_on_the_future(normalize, dtype, device):
    laws.check_causal(make_case("given", "token", normalize=normalize), dtype, device)


@devices
@exact
@decays
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"eps": 0.1}])
def test_gradients_against_oracle(options, decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_gradients(make_case("given", decay, **options), dtype, device)


@devices
@decays
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_low_precision_law(decay, dtype, device):
    laws.check_low_precision_law(make_case("given", decay), dtype, device)


@pytest.mark.parametrize("normalize", [True, False])
@decays
def test_gradcheck_states_included(decay, normalize):
    case = make_case("given", decay, batch=1, seqlen=7).require_grad()
    kv = torch.rand(1, KV_HEADS, case.q.shape[3], case.v.shape[3]).double().requires_grad_()
    z = torch.rand(1, KV_HEADS, case.q.shape[3]).double().requires_grad_()
    log_scale = torch.full_like(z, 2.0).detach()

    def f(q, k, v, kv, z, log_decay=None):
        state = LinearAttentionState(kv, z, log_scale)
        out, final = causal_linear_attention(
            q, k, v, log_decay=log_decay, initial_state=state, normalize=normalize, eps=0.1,
            return_state=True,
        )  # fmt: skip
        return out, *true_state(final)  # the stored value may change its scale under a difference

    inputs = [case.q, case.k, case.v, kv, z, *([] if decay is None else [case.log_decay])]
    assert torch.autograd.gradcheck(f, inputs)


def test_gradient_flows_through_a_split():
    case = make_case("given", "token").to(torch.float64).require_grad()
    inputs = list(case.inputs().values())
    whole = torch.autograd.grad(case.run().square().sum(), inputs)
    pieces = torch.autograd.grad(laws.split(case, [37, 64, 101])[0].square().sum(), inputs)
    laws.assert_same_gradients(case, pieces, whole, torch.float64)


@devices
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_zero_features(sparsity, device):
    case = make_case("given", "head").to(torch.float32, device)
    case.q *= torch.rand_like(case.q) > sparsity
    case.k *= torch.rand_like(case.k) > sparsity
    truth = case.double().run(reference)
    assert_close(case.run(), truth, torch.float32)
    case = case.require_grad()
    grads = torch.autograd.grad(case.run().sum(), list(case.inputs().values()))
    assert all(grad.isfinite().all() for grad in grads)


def test_rows_without_weight_are_zero():
    case = make_case("given").to(torch.float32)
    case.k[:, :, :10] = 0
    out = case.run()
    assert out[:, :, :10].eq(0).all() and out[:, :, 10:].ne(0).any()


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_any_size(dtype, device):
    """Features 1e-30 to 1e30 side by side, which overflow where exponents are not kept apart."""
    case = make_case("given").to(torch.float32, device)
    for x in (case.q, case.k):
        x *= torch.logspace(-30, 30, x.shape[-1]).to(x)
        x *= torch.logspace(-8, 8, x.shape[2])[:, None].to(x)
    case = case.to(dtype, device)
    truth = case.double().run(reference)
    got = case.run()
    assert got.isfinite().all()
    if dtype == torch.float32:
        assert_close(got, truth, dtype)
    case = case.require_grad()
    out = case.run()
    grads = torch.autograd.grad(out.sum(), [case.v])
    assert grads[0].isfinite().all()


@devices
def test_strided_and_expanded_views(device):
    torch.manual_seed(0)
    x = torch.rand(2, 70, 4, 3, 6, device=device)
    q = x[:, :, :, 0].transpose(1, 2)
    k = x[:, :, :2, 1].transpose(1, 2)
    v = x[..., 2, ::2].transpose(1, 2)[:, :2]
    decay = -torch.rand(2, 70, 2, device=device).transpose(1, 2)
    one_key = k[:, :1, :1].expand(2, 2, 70, 6)
    for keys in (k, one_key):
        truth = reference.causal_linear_attention(
            *(t.double().cpu() for t in (q, keys, v)), log_decay=decay.double().cpu()
        )
        assert_close(causal_linear_attention(q, keys, v, log_decay=decay), truth, torch.float32)
    # A gradient that arrives expanded or transposed is read where it lies.
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = causal_linear_attention(*leaves, log_decay=decay)
    copies = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    same = causal_linear_attention(*copies, log_decay=decay)
    grad = torch.rand(70, 4, 1, 2, device=device).permute(3, 1, 0, 2).expand(2, 4, 70, 3)
    got = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(got, torch.autograd.grad(same, copies, grad.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_empty(shape):
    batch, seqlen = shape
    case = make_case("given", "token", batch=batch, seqlen=seqlen).require_grad()
    out, state = case.run(return_state=True)
    assert out.shape == (*case.q.shape[:3], case.v.shape[3])
    assert state.kv.shape == (batch, KV_HEADS, case.q.shape[3], case.v.shape[3])
    assert state.kv.eq(0).all() and state.z.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), [case.q, case.k, case.v]))


def test_no_tokens_keep_the_state():
    case = make_case("given").to(torch.float64)
    _, state = case.run(return_state=True)
    _, same = case.slice(0, 0).run(initial_state=state, return_state=True)
    for a, b in zip(same, state, strict=True):
        assert torch.equal(a, b)
