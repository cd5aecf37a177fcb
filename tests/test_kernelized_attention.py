"""kernelized_attention and its update: every form is one function."""

import attention_laws as laws
import pytest
import torch
from attention_cases import (
    DECAYS,
    DEVICES,
    EXACT_DTYPES,
    HEADDIM,
    HEADDIM_V,
    HEADS,
    KINDS,
    KV_HEADS,
    LOW_DTYPES,
    Case,
    assert_close,
    make_case,
    near_cases,
    one_thread,  # noqa: F401
    random_params,
    skip_unsupported,
    true_state,
)
from dijiang import reference
from dijiang.ops import empty_attention_state, kernelized_attention

devices = pytest.mark.parametrize("device", DEVICES)
decays = pytest.mark.parametrize("decay", DECAYS)
exact = pytest.mark.parametrize("dtype", EXACT_DTYPES)
# Window 16 leaves several blocks far; 80 is wider than one chunk of the state.
PLAIN_NEARS = [(0, 0), (0, 3), (16, 0), (16, 3), (80, 20)]
# Slots that fill up at once, after some blocks (of which one is all sinks), and never.
HARD_NEARS = [(16, 3, 6), (10, 13, 24), (16, 0, 160), (16, 3, (30, 7))]
nears = near_cases(*PLAIN_NEARS, *HARD_NEARS)
# None: near keys alone.
kinds = pytest.mark.parametrize("kind", [*KINDS, "dct", "shared", None])


def skip_nothing(kind, near):
    if kind is None and not any(near.values()):
        pytest.skip("no key has any weight: see test_rows_without_weight_are_zero")


@devices
@exact
@decays
@nears
@kinds
def test_all_forms(kind, near, decay, dtype, device):
    skip_unsupported(device, dtype)
    skip_nothing(kind, near)
    laws.check_all_forms(make_case(kind, decay, **near), dtype, device)


@devices
@exact
@nears
@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.1}, {"scale": 1.0}])
def test_all_forms_options(options, near, dtype, device):
    skip_unsupported(device, dtype)
    case = make_case("exp", "token", **near, **options)
    laws.check_all_forms(case, dtype, device)


@devices
@exact
@decays
@nears
def test_final_state(near, decay, dtype, device):
    skip_unsupported(device, dtype)
    near = near | {"window": min(near["window"], 16)}  # so that 90 tokens fold some
    case = make_case("exp", decay, batch=1, seqlen=90, **near)
    laws.check_final_state(case, dtype, device)


@devices
@exact
@decays
@nears
def test_packed(near, decay, dtype, device):
    skip_unsupported(device, dtype)
    case = make_case("exp", decay, batch=1, **near)
    laws.check_packed(case, dtype, device)


@devices
@exact
@decays
@nears
def test_padding(near, decay, dtype, device):
    skip_unsupported(device, dtype)
    laws.check_padding(make_case("exp", decay, **near), dtype, device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@nears
@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_the_future(kind, near, dtype, device):
    laws.check_causal(make_case(kind, "token", **near), dtype, device)


@devices
@exact
@decays
@nears
@kinds
def test_gradients_against_oracle(kind, near, decay, dtype, device):
    skip_unsupported(device, dtype)
    skip_nothing(kind, near)
    laws.check_gradients(make_case(kind, decay, **near), dtype, device)


@devices
@exact
@nears
@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.1}, {"scale": 1.0}])
def test_gradients_against_oracle_options(options, near, dtype, device):
    skip_unsupported(device, dtype)
    case = make_case("exp", "token", **near, **options)
    laws.check_gradients(case, dtype, device)


@devices
@decays
@nears
@pytest.mark.parametrize("kind", [*KINDS, "dct"])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_low_precision_law(dtype, kind, near, decay, device):
    case = make_case(kind, decay, size=0.5, **near)
    laws.check_low_precision_law(case, dtype, device)


@near_cases((0, 0), (0, 2), (2, 0), (2, 1), (2, 1, 2), (2, 1, (0, 3)))
@pytest.mark.parametrize(
    "kind,decay",
    [("exp", None), ("exp", "head"), *((kind, "token") for kind in (*KINDS, "dct", "shared"))],
)
def test_gradcheck(kind, decay, near):
    case = make_case(kind, decay, batch=1, seqlen=7, **near).require_grad()
    names = list(case.inputs())

    def f(*values):
        given = dict(zip(names, values, strict=True))

        def params(side):
            old = getattr(case, side)
            new = {n: given.get(f"{side}.{n}") for n in ("omega", "log_weight", "beta")}
            return old._replace(**new)

        return kernelized_attention(
            given["q"], given["k"], given["v"], params("fq"), params("fk"),
            log_decay=given.get("log_decay"), **case.options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, list(case.inputs().values()))


@decays
def test_gradcheck_of_states(decay):
    case = make_case("exp", decay, batch=1, seqlen=6).to(torch.float64)
    _, state = case.run(return_state=True)

    def f(q, k, v, kv, z):
        out, final = kernelized_attention(
            q, k, v, case.fq, case.fk, log_decay=case.log_decay,
            initial_state=state._replace(kv=kv, z=z), return_state=True,
        )  # fmt: skip
        return out, *true_state(final)

    inputs = [x.detach().clone().requires_grad_()
              for x in (case.q, case.k, case.v, state.kv, state.z)]  # fmt: skip
    assert torch.autograd.gradcheck(f, inputs)


def test_gradient_flows_through_a_split():
    case = make_case("exp", "token").to(torch.float64).require_grad()
    inputs = list(case.inputs().values())
    whole = torch.autograd.grad(case.run().square().sum(), inputs)
    pieces = torch.autograd.grad(laws.split(case, [37, 64, 101])[0].square().sum(), inputs)
    laws.assert_same_gradients(case, pieces, whole, torch.float64)


def test_state_with_a_window_carries_no_gradient():
    case = make_case("exp", window=16, sinks=2).require_grad()
    _, state = case.run(return_state=True)
    assert not any(x.requires_grad for x in state if x is not None)


@devices
def test_each_row_has_a_length_of_its_own(device):
    case = make_case("exp", "token", window=8, sinks=2).to(torch.float32, device)
    bounds = torch.tensor([[50, 90], [87, 90]], dtype=torch.int32, device=device)
    _, state = case.slice(0, 90).run(seq_bounds=bounds, return_state=True)
    assert state.length.tolist() == [40, 3]
    updated, _ = laws.token_by_token(case, state, 90)
    for row, (begin, _) in enumerate(bounds.tolist()):
        truth = case.slice(begin, case.q.shape[2]).double().run(reference)
        assert_close(updated[row], truth[row, :, 90 - begin :], torch.float32)


@devices
def test_updates_from_the_first_token_on(device):
    case = make_case("exp", "head", window=8, sinks=2).to(torch.float32, device)
    state = empty_attention_state(
        2, KV_HEADS, case.fk.omega.shape[1], HEADDIM, HEADDIM_V, window=8, sinks=2,
        dtype=torch.float32, device=device, decay=True,
    )  # fmt: skip
    out, _ = laws.token_by_token(case, state, 0)
    assert_close(out, case.double().run(reference), torch.float32)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@nears
@kinds
def test_inputs_of_1e4(kind, near, dtype, device):
    case = make_case(kind, "token", **near).to(dtype, device)
    case.q, case.k = case.q * 1e4, case.k * 1e4
    case = case.require_grad()
    out, state = case.run(return_state=True)
    inputs = list(case.inputs().values())
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    named = [
        ("out", out),
        ("kv", state.kv),
        ("z", state.z),
        *zip(case.inputs(), grads, strict=True),
    ]
    for name, x in named:
        assert x is None or x.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
@near_cases((0, 0), (16, 3), (16, 3, 6), (16, 3, (6, 2)))
def test_inputs_of_1e4_against_oracle(kind, near):
    """In float64 exponents of 1e7 leave 1e-9 of precision: the hardest rows are right, not just
    finite."""
    case = make_case(kind, "token", **near)
    case.q, case.k = case.q * 1e4, case.k * 1e4
    out, chosen = case.run(return_hard_keys=True)
    if "cache_size" in near:  # votes as small as 0 in one and 1e-300 in the other are a tie
        case = case.with_options(hard_keys=chosen)
    truth = case.run(reference)
    assert (out - truth).abs().max() <= 1e-6 * truth.abs().max()


@devices
@near_cases((0, 0), (64, 4), (64, 4, 32))
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_65536_tokens_in_bfloat16(size, near, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 65536, 8) for _ in range(3))
    fq, fk = (random_params(1, 16, 8, "exp") for _ in range(2))
    case = Case(size * q, size * k, v, None, fq, fk, options=near)
    case = case.to(torch.bfloat16, device).require_grad()
    out = case.run()
    grads = torch.autograd.grad(out.float().square().mean(), list(case.inputs().values()))
    assert all(x.isfinite().all() for x in (out, *grads))


@devices
def test_strided_and_expanded_views(device):
    torch.manual_seed(0)
    x = torch.randn(2, 70, HEADS + 2 * KV_HEADS, 2 * HEADDIM, device=device).transpose(1, 2)
    q, k = x[:, :HEADS, :, ::2], x[:, HEADS : HEADS + KV_HEADS, :, :HEADDIM]
    v = x[:, HEADS + KV_HEADS :, :, 1 : HEADDIM_V + 1]
    case = make_case("exp").to(torch.float32, device)
    for keys in (k, k[:, :1, :1].expand_as(k)):
        views = Case(q, keys, v, None, case.fq, case.fk, options={"window": 8, "sinks": 2})
        assert_close(views.run(), views.double().run(reference), torch.float32)
        out, _ = views.run(return_state=True)
        updated, _ = laws.token_by_token(views, views.slice(0, 60).run(return_state=True)[1], 60)
        assert_close(updated, out[:, :, 60:].double().cpu(), torch.float32)


@near_cases((0, 0), (16, 3), (16, 3, 6), (16, 3, (6, 2)))
def test_threads_over_heads_change_no_bit(near):
    case = make_case("exp", "token", **near).to(torch.float32).require_grad()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = case.run()
        results.append([out, *torch.autograd.grad(out.sum(), list(case.inputs().values()))])
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("decay", [None, "token"])
@near_cases((0, 0), (48, 3), (48, 3, 70), (48, 3, (20, 70)))
def test_a_sequence_cut_over_threads_gives_the_same_bits(near, decay):
    """Long sequences with few heads: each thread takes a piece, and walks over what is before."""
    case = make_case("exp", decay, **near, seqlen=1100)

    def run(case, threads):
        torch.set_num_threads(threads)
        out, state = case.run(return_state=True)
        return [out, *(x for x in state if x is not None)]

    cut = run(case, 7)
    for whole, parts, again in zip(run(case, 1), cut, run(case, 7), strict=True):
        assert torch.equal(parts, whole)
        assert torch.equal(parts, again)
    case.k[:, :, 1000:] += 3
    case.v[:, :, 1000:] -= 7
    future = run(case, 7)[0]
    assert torch.equal(future[:, :, :1000], cut[0][:, :, :1000])
    assert not torch.equal(future, cut[0])


@pytest.mark.parametrize("decay", [None, "token"])
@near_cases((0, 0), (48, 3), (48, 3, 70), (48, 3, (20, 70)))
def test_gradients_of_a_cut_sequence_have_the_same_bits(near, decay):
    case = make_case("exp", decay, **near, seqlen=1100).require_grad()
    grads = []
    for threads in (1, 7):
        torch.set_num_threads(threads)
        out = case.run()
        grads.append(torch.autograd.grad(out.square().sum(), [case.q, case.k, case.v]))
    for whole, parts in zip(*grads, strict=True):
        # Sinks' are sums over pieces.
        assert torch.equal(whole[:, :, near["sinks"] :], parts[:, :, near["sinks"] :])
        assert_close(parts, whole, torch.float64)


def test_one_query_head_and_many():
    for heads, kv_heads in ((1, 1), (6, 1), (6, 2), (6, 6)):
        torch.manual_seed(0)
        q, k = torch.randn(1, heads, 40, 6).double(), torch.randn(1, kv_heads, 40, 6).double()
        fq, fk = random_params(heads, 5, 6, "exp"), random_params(kv_heads, 5, 6, "exp")
        case = Case(q, k, k[..., :3], None, fq, fk, options={"window": 8, "sinks": 1})
        assert_close(case.run(), case.run(reference), torch.float64)


def test_rows_without_weight_are_zero():
    case = make_case(None).to(torch.float32).require_grad()
    out = case.run()
    assert out.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), [case.q, case.k, case.v]))


@near_cases((0, 0), (16, 3), (16, 3, 6), (16, 3, (6, 2)))
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_empty(shape, near):
    batch, seqlen = shape
    case = make_case("exp", "token", batch=batch, seqlen=seqlen, **near)
    case = case.require_grad()
    out, state = case.run(return_state=True)
    assert out.shape == (*case.q.shape[:3], HEADDIM_V)
    assert state.kv.eq(0).all() and state.z.eq(0).all() and state.length.tolist() == [0] * batch
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), [case.q, case.k, case.v]))


@near_cases((0, 0), (16, 3), (16, 3, 6), (16, 3, (6, 2)))
def test_no_tokens_keep_the_state(near):
    case = make_case("exp", "token", **near).to(torch.float64)
    _, state = case.run(return_state=True)
    _, same = case.slice(0, 0).run(initial_state=state, return_state=True)
    for a, b in zip(same, state, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_float32_parameters_serve_low_precision_and_get_float32_gradients():
    case = make_case("exp", "head", window=16).to(torch.bfloat16).require_grad()
    out = case.run()
    grads = torch.autograd.grad(out.sum(), [case.fq.omega, case.fk.log_weight, case.log_decay])
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)


def test_gate_on_the_far_keys():
    """log_weight of the queries scales the far mass: -1e4 leaves the near keys alone."""
    case = make_case("exp", window=16, sinks=3)
    case.fq = case.fq._replace(log_weight=case.fq.log_weight - 1e4)
    near = make_case(None, window=16, sinks=3)
    assert_close(case.run(), near.run(), torch.float64)
