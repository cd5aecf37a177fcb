"""torch.compile, opcheck, autocast, meta tensors, and what in-place updates owe to autograd."""

import inspect
from dataclasses import replace

import attention_laws as laws
import pytest
import torch
from attention_cases import DEVICES, make_case, near_cases, one_thread  # noqa: F401
from dijiang import ops, reference
from dijiang._types import cache_sizes
from dijiang.ops import empty_attention_state

devices = pytest.mark.parametrize("device", DEVICES)
OPS = torch.ops.dijiang
KV, M, D, DV = 2, 7, 6, 5  # of make_case


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def tensors_of(case):
    """The leading arguments of kernelized_attention_*: q .. k_beta, log_decay per token."""
    return case.q, case.k, case.v, *case.fq[:3], *case.fk[:3], per_token(case)


# ---- opcheck: schemas, fakes, autograd registration, functionalisation, dynamic shapes


@devices
def test_opcheck_dct(device):
    for x in (torch.randn(2, 3, 8), torch.randn(4, 6, requires_grad=True), torch.randn(0, 5)):
        torch.library.opcheck(OPS.dct.default, (x.to(device), 2))


@devices
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_opcheck_feature_map(kind, device):
    x = torch.randn(2, 3, 5, 8, device=device)
    omega, log_weight = torch.randn(3, 7, 8, device=device), torch.randn(3, 7, device=device)
    beta = torch.rand(3, device=device) if kind == 1 else None
    args = (omega, log_weight, beta, kind, 0.5, False)
    out = OPS.feature_map_fwd(x, *args)
    leaves = [t.clone().requires_grad_() for t in (x, omega)]
    torch.library.opcheck(OPS.feature_map_fwd.default, (*leaves, *args[1:]))
    torch.library.opcheck(OPS.feature_map_bwd.default, (torch.randn_like(out), x, out, *args))
    torch.library.opcheck(OPS.feature_map_fwd.default, (x, omega, None, None, kind, 0.5, True))


@devices
@pytest.mark.parametrize(
    "decay,packed,state", [(None, False, False), ("token", True, True), ("head", False, True)]
)
def test_opcheck_linear_attention(decay, packed, state, device):
    case = make_case("given", decay, seqlen=20).to(torch.float32, device)
    log_decay = per_token(case)
    segments, n = None, 2
    if packed:
        rows = [[0, 2, 9], [0, 9, 15], [1, 0, 20]]
        segments, n = torch.tensor(rows, dtype=torch.int32, device=device), 3
    initial = (None, None, None)
    if state:
        z = torch.rand(n, KV, D, device=device)
        initial = (torch.rand(n, KV, D, DV, device=device), z, torch.zeros_like(z))
    inputs = (case.q, case.k, case.v, log_decay, segments, *initial)
    out, row_scale, row_sum, *final = OPS.linear_attention_fwd(*inputs, True, 0.1, True)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    for return_state in (True, False):
        args = (*leaves, *inputs[3:], True, 0.1, return_state)
        torch.library.opcheck(OPS.linear_attention_fwd.default, args)
    grads = [torch.randn_like(x) for x in (out, final[0], final[1])]
    torch.library.opcheck(
        OPS.linear_attention_bwd.default,
        (grads[0], *inputs, out, row_scale, row_sum, *grads[1:], *final, True, 0.1, state),
    )


@devices
@pytest.mark.parametrize("decay", [None, "token"])
def test_opcheck_linear_attention_update(decay, device):
    case = make_case("given", decay, seqlen=1).to(torch.float32, device)
    z = torch.rand(2, KV, D, device=device)
    state = (torch.rand(2, KV, D, DV, device=device), z, torch.zeros_like(z))
    args = (case.q, case.k, case.v, per_token(case), *state, True, 0.0)
    torch.library.opcheck(OPS.linear_attention_update.default, args)


@devices
@pytest.mark.parametrize("decay,packed,state", [(None, False, False), ("token", True, True)])
@near_cases((0, 0), (4, 2), (4, 2, 3), (4, 2, (3, 0)))
def test_opcheck_kernelized_attention(near, decay, packed, state, device):
    window, sizes = near["window"], cache_sizes(near.get("cache_size", 0))
    case = make_case("exp", decay, seqlen=20).to(torch.float32, device)
    segments, n = None, 2
    if packed:
        rows = [[0, 2, 9], [0, 9, 15], [1, 0, 20]]
        segments, n = torch.tensor(rows, dtype=torch.int32, device=device), 3
    initial = (None,) * 15
    if state:
        initial = tuple(new_state(n, near, decay, device))
        if not window:
            initial = (*initial[:3], *(None,) * 12)
    inputs = (*tensors_of(case), segments, *initial)
    options = (1, 0.4, window, near["sinks"], sizes, True, 0.1)
    results = OPS.kernelized_attention_fwd(*inputs, None, *options, True)
    out, row_scale, row_sum, *final, chosen = results
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    for return_state in (True, False):
        for given in (None, chosen):
            args = (*leaves, *inputs[4:], given, *options, return_state)
            torch.library.opcheck(OPS.kernelized_attention_fwd.default, args)
    kv, z, log_scale = final[:3]
    finals = (
        (None,) * 5 if window else (torch.randn_like(kv), torch.randn_like(z), kv, z, log_scale)
    )
    for grad_params in (True, False):
        rows = (chosen, out, row_scale, row_sum)
        args = (torch.randn_like(out), *inputs, *rows, *finals, *options)
        torch.library.opcheck(
            OPS.kernelized_attention_bwd.default, (*args, grad_params, state and not window)
        )


@devices
@near_cases((0, 0), (4, 2), (4, 2, 3), (4, 2, (3, 0)))
@pytest.mark.parametrize("decay", [None, "token"])
def test_opcheck_kernelized_attention_update(decay, near, device):
    case = make_case("exp", decay, seqlen=1).to(torch.float32, device)
    state = new_state(2, near, decay, device)
    if not near["window"]:
        state = state._replace(length=None)
    sizes = cache_sizes(near.get("cache_size", 0))
    options = (near["window"], near["sinks"], sizes, True, 0.0)
    args = (*tensors_of(case), *state, 1, 0.4, *options)
    torch.library.opcheck(OPS.kernelized_attention_update.default, args)


def per_token(case):
    decay = case.log_decay
    if decay is not None and decay.dim() == 1:
        decay = decay[None, :, None].expand(case.k.shape[:3])
    return decay


def new_state(n, near, decay, device):
    return empty_attention_state(
        n, KV, M, D, DV, **near, dtype=torch.float32, device=device, decay=decay is not None
    )


# ---- torch.compile


@devices
@pytest.mark.parametrize("kind", ["given", "exp"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_attention(packed, kind, device):
    options = {} if kind == "given" else {"window": 16, "sinks": 3, "cache_size": 5}
    case = make_case(kind, "head", batch=1, **options).to(torch.float32, device)
    if packed:
        ends = torch.tensor([0, 40, 150], dtype=torch.int32, device=device)
        case = case.with_options(cu_seqlens=ends)
    case = case.require_grad()
    inputs = list(case.inputs().values())

    def f():
        out, state = case.run(return_state=True)
        return out, state.kv, state.z

    results = []
    for run in (f, compiled(f)):
        outs = run()
        results.append([*outs, *torch.autograd.grad(outs[0].square().sum(), inputs)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@devices
def test_compiled_with_dynamic_seqlen(device):
    case = make_case("exp", "token", window=16, sinks=3).to(torch.float32, device)
    torch._dynamo.reset()
    graph = torch.compile(
        ops.kernelized_attention, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for seqlen in (150, 31, 64):
        part = case.slice(0, seqlen)
        args = (part.q, part.k, part.v, part.fq, part.fk)
        out = graph(*args, log_decay=part.log_decay, **part.options)
        assert torch.equal(out, part.run())


@devices
@near_cases((0, 0), (16, 0), (16, 2, 5), (16, 2, (2, 5)))
def test_compiled_update(near, device):
    case = make_case("exp", "head", **near).to(torch.float32, device)
    _, state = case.slice(0, 60).run(return_state=True)
    expected, final = laws.token_by_token(case.slice(0, 70), state, 60)
    graph = compiled(ops.kernelized_attention_update)
    for t in range(60, 70):
        one = case.slice(t, t + 1)
        with torch.no_grad():
            out = graph(one.q, one.k, one.v, state, one.fq, one.fk, log_decay=one.log_decay,
                        **one.options)  # fmt: skip
        assert torch.equal(out, expected[:, :, t - 60 : t - 59])
    for a, b in zip(state, final, strict=True):
        assert a is None or torch.equal(a, b)


@devices
def test_compiled_dct_and_feature_map(device):
    x = torch.randn(2, 4, 10, 6, device=device, requires_grad=True)
    params = make_case("exp").to(torch.float32, device).fq

    def f(x):
        return ops.feature_map(ops.dct(x), params, scale=0.5)

    eager, graph = f(x), compiled(f)(x)
    assert torch.equal(eager, graph)
    (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (eager, graph))
    assert torch.equal(a, b)


def test_inductor():
    """Once through the whole compiler; the graphs themselves are tested above."""
    case = make_case("exp", "head", seqlen=20, window=4, sinks=1).to(torch.float32).require_grad()
    torch._dynamo.reset()
    graph = torch.compile(lambda q: (replace(case, q=q).run() * 2).sum(), fullgraph=True)
    expected = (case.run() * 2).sum()
    got = graph(case.q)
    assert torch.allclose(got, expected)
    (a,), (b,) = (torch.autograd.grad(y, case.q) for y in (got, expected))
    assert torch.allclose(a, b)


# ---- autocast


@devices
def test_autocast(device):
    case = make_case("exp", "head", window=16).to(torch.float32, device).require_grad()
    low = case.to(torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        out = case.run()
        features = ops.feature_map(case.q, case.fq)
        cosines = ops.dct(case.q)
    assert out.dtype == features.dtype == cosines.dtype == torch.bfloat16
    assert torch.equal(out, low.run())
    grads = torch.autograd.grad(out.sum(), [case.q, case.fq.omega])
    assert all(g.dtype == torch.float32 for g in grads)
    given = make_case("given").to(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        # q in another dtype than k and v, as autocast leaves them: one dtype afterwards.
        mixed = ops.causal_linear_attention(given.q, given.k.bfloat16(), given.v)
    assert mixed.dtype == torch.bfloat16


@devices
def test_autocast_compiled(device):
    case = make_case("exp", window=16).to(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        eager, graph = case.run(), compiled(case.run)()
    assert graph.dtype == torch.bfloat16 and torch.equal(eager, graph)


def test_autocast_leaves_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert make_case("exp").run().dtype == torch.float64


# ---- meta tensors, versions, inference mode


@near_cases((16, 3), (16, 3, 5), (16, 3, (5, 2)))
def test_meta_tensors(near):
    case = make_case("exp", "token", **near).to(torch.float32)
    real_out, real_state = case.run(return_state=True)
    out, state = case.to(torch.float32, "meta").run(return_state=True)
    for meta, real in zip((out, *state), (real_out, *real_state), strict=True):
        if real is None:
            assert meta is None
            continue
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("window", [0, 4])
def test_update_bumps_versions(window):
    """A tensor saved for a backward and then written by an update is noticed."""
    case = make_case("exp", seqlen=1, window=window).to(torch.float32)
    state = new_state(2, {"window": window, "sinks": 0}, None, "cpu")
    versions = [x._version for x in state if x is not None]
    ops.kernelized_attention_update(case.q, case.k, case.v, state, case.fq, case.fk, window=window)
    assert all(x._version > old
               for x, old in zip((x for x in state if x is not None), versions, strict=True)
               if x.numel())  # fmt: skip
    kv = state.kv.clone().requires_grad_()
    loss = (kv * state.kv).sum()
    ops.kernelized_attention_update(case.q, case.k, case.v, state, case.fq, case.fk, window=window)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    case = make_case("exp", "head", window=16).to(torch.float32)
    expected = case.run()
    with torch.inference_mode():
        out, state = case.slice(0, 75).run(return_state=True)
        rest, _ = laws.token_by_token(case, state, 75)
    assert torch.allclose(torch.cat([out, rest], 2), expected, atol=1e-5)


def test_reference_forms_take_the_same_arguments():
    """What trains on the oracle trains on the operators, and the other way round."""
    for name in ("causal_linear_attention", "kernelized_attention"):
        names = list(inspect.signature(getattr(ops, name)).parameters)
        assert names == list(inspect.signature(getattr(reference, f"{name}_recurrent")).parameters)
        update = f"{name}_update"
        assert list(inspect.signature(getattr(ops, update)).parameters) == list(
            inspect.signature(getattr(reference, update)).parameters
        )
