"""What causal_linear_attention and kernelized_attention must both obey, as functions of a Case."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from attention_cases import TOLERANCE, assert_close, clone_state, error, plain, true_state
from dijiang import ops, reference


def split(case, cuts):
    """The case in pieces, the state carried over."""
    outs, state = [], None
    for begin, end in zip([0, *cuts], [*cuts, case.q.shape[2]], strict=True):
        out, state = case.slice(begin, end).run(initial_state=state, return_state=True)
        outs.append(out)
    return torch.cat(outs, 2), state


def token_by_token(case, state, begin):
    """Updates from token `begin` on, in a copy of `state`."""
    state, outs = clone_state(state), []
    for t in range(begin, case.q.shape[2]):
        one = case.slice(t, t + 1)
        options = {**case.options, "log_decay": one.log_decay}
        if case.given:
            f, features = ops.causal_linear_attention_update, ()
        else:
            f, features = ops.kernelized_attention_update, (one.fq, one.fk)
        outs.append(f(one.q, one.k, one.v, state, *features, **options))
    return torch.cat(outs, 2), state


def assert_same_state(got, expected, dtype):
    for x, y in zip(true_state(got), true_state(expected), strict=True):
        if y.numel() and y.any():
            assert_close(x, y.detach().cpu(), dtype)
        else:
            assert not x.any()
    if hasattr(got, "length"):
        assert got.length.tolist() == expected.length.tolist()


def check_all_forms(case, dtype, device):
    """quadratic = chunked = split = updated token by token, outputs and final states."""
    case = case.to(dtype, device)
    truth = case.double().run(reference)
    chunked, final = case.run(return_state=True)
    assert chunked.dtype == dtype and final.kv.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(chunked, truth, dtype)
    in_pieces, final_of_pieces = split(case, [1, 61, 62, 100])
    assert_close(in_pieces, truth, dtype)
    assert_same_state(final_of_pieces, final, dtype)
    cut = case.q.shape[2] // 2
    _, state = case.slice(0, cut).run(return_state=True)
    updated, final_of_updates = token_by_token(case, state, cut)
    assert_close(updated, truth[:, :, cut:], dtype)
    assert_same_state(final_of_updates, final, dtype)


def check_final_state(case, dtype, device):
    """Against the state of the recurrent form."""
    case = case.to(dtype, device)
    _, final = case.run(return_state=True)
    _, truth = case.double().run(reference, "_recurrent", return_state=True)
    assert_same_state(final, truth, dtype)


def row_of(states, n):
    return type(states)(*(None if x is None else x[n : n + 1] for x in states))


def check_packed(case, dtype, device):
    """Sequences packed into a row are what they are alone; states come out one a sequence."""
    case = case.to(dtype, device)
    ends = [0, 1, 40, 40, 103, case.q.shape[2]]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    packed, states = case.run(cu_seqlens=cu_seqlens, return_state=True)
    assert states.kv.shape[0] == len(ends) - 1
    for n, (begin, end) in enumerate(pairwise(ends)):
        alone, state = case.slice(begin, end).run(return_state=True)
        if end > begin:
            assert_close(packed[:, :, begin:end], alone.double().cpu(), dtype)
        assert_same_state(row_of(states, n), state, dtype)
    # Carried on: the states of the packed row are the initial states of the next.
    again = case.run(cu_seqlens=cu_seqlens, initial_state=states)
    begin, end = ends[3:5]
    alone = case.slice(begin, end).run(initial_state=row_of(states, 3))
    assert_close(again[:, :, begin:end], alone.double().cpu(), dtype)


def check_padding(case, dtype, device):
    """Left and right padding, whatever it holds, changes no output and gets no gradient."""
    case = case.to(dtype, device)
    seqlen = case.q.shape[2]
    bounds = [[seqlen - 77, seqlen], [9, 140]]
    for row, (begin, end) in enumerate(bounds):
        for x in (case.q, case.k, case.v):
            x[row, :, :begin] = x[row, :, end:] = float("nan")
    case = case.require_grad()
    seq_bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
    out, states = case.run(seq_bounds=seq_bounds, return_state=True)
    grads = torch.autograd.grad(out.square().sum(), list(case.inputs().values()))
    named = dict(zip(case.inputs(), grads, strict=True))
    for row, (begin, end) in enumerate(bounds):
        real = case.slice(begin, end)
        alone, state = real.run(return_state=True)
        assert_close(out[row, :, begin:end], alone[row].detach().double().cpu(), dtype)
        assert out[row, :, :begin].eq(0).all() and out[row, :, end:].eq(0).all()
        assert_same_state(row_of(states, row), row_of(state, row), dtype)
        for name in "qkv":
            padding = torch.cat([named[name][row, :, :begin], named[name][row, :, end:]], 1)
            assert padding.eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


def check_causal(case, dtype, device):
    """Changing the future changes no past output in any bit, however large the new keys."""
    case = case.to(dtype, device)
    for cut in (1, 63, 64, 90, case.q.shape[2] - 1):
        before = case.run()
        for size in (1.0, 30.0, 1e4):
            changed = case.slice(0, case.q.shape[2])
            changed.q, changed.k, changed.v = (x.clone() for x in (case.q, case.k, case.v))
            for x in (changed.q, changed.k, changed.v):
                noise = size * torch.randn_like(x[:, :, cut:])
                x[:, :, cut:] = noise.abs() if case.given else noise
            assert torch.equal(changed.run()[:, :, :cut], before[:, :, :cut])


def check_gradients(case, dtype, device):
    """Against the gradients of the quadratic form."""
    case = case.to(dtype, device)
    oracle = case.double().require_grad()
    case = case.require_grad()
    torch.manual_seed(1)
    weight = torch.randn(*case.q.shape[:3], case.v.shape[3], dtype=torch.float64)

    def true_gradients(oracle):
        loss = (weight * oracle.run(reference)).sum()
        return torch.autograd.grad(loss, list(oracle.inputs().values()), allow_unused=True)

    expected = true_gradients(oracle)
    grads = torch.autograd.grad(
        case.run(), list(case.inputs().values()), weight.to(device, dtype), allow_unused=True
    )
    sizes = {}
    if dtype == torch.float32 and case.log_decay is not None and case.log_decay.dim() == 1:
        # A head's decay gathers its tokens' gradients, which mostly cancel: right in float32 means
        # right beside what was summed.
        per_token = oracle.log_decay.detach()[None, :, None].expand(case.k.shape[:3])
        tokens = replace(oracle, log_decay=per_token).require_grad()
        summed = dict(zip(tokens.inputs(), true_gradients(tokens), strict=True))["log_decay"]
        if summed is not None:
            sizes["log_decay"] = summed.abs().sum((0, 2)).max()
    assert_same_gradients(case, grads, expected, dtype, sizes)


def assert_same_gradients(case, grads, expected, dtype, sizes=None):
    """sizes: by name, what an error is measured against; else the largest element of the truth."""
    by_name = dict(zip(case.inputs(), expected, strict=True))
    sizes = dict(sizes or {})
    options = case.options
    if options.get("normalize", True) and not any(
        options.get(n) for n in ("window", "sinks", "eps")
    ):
        # beta of the queries stands above and below the fraction: it cancels, rounding is left.
        sizes["fq.beta"] = by_name.get("fq.omega", torch.zeros(1)).abs().max()
    for (name, truth), got in zip(by_name.items(), grads, strict=True):
        if truth is None or not truth.any():
            assert got is None or not got.any(), name
            continue
        size = sizes.get(name, truth.abs().max())
        assert (got.double().cpu() - truth).abs().max() <= TOLERANCE[dtype] * size, name


def check_low_precision_law(case, dtype, device):
    """Output and gradients are at most twice as wrong as plain PyTorch at that dtype."""
    case = case.to(dtype, device)
    cast = lambda params: None if params is None else params._replace(  # noqa: E731
        **{n: None if x is None else x.to(dtype) for n, x in
           zip(("omega", "log_weight", "beta"), params[:3], strict=True)})  # fmt: skip
    # Parameters that the low precision holds exactly: the difference is in the arithmetic alone.
    case.fq, case.fk = cast(case.fq), cast(case.fk)
    if case.log_decay is not None:
        case.log_decay = case.log_decay.to(dtype)
    oracle, naive, case = (x.require_grad() for x in (case.double(), case, case))
    weight = torch.randn(*case.q.shape[:3], case.v.shape[3]).to(device, dtype)
    outs = [oracle.run(reference), plain(naive), case.run()]
    results = [
        [out, *torch.autograd.grad((out * weight.to(out)).sum(), [c.q, c.k, c.v])]
        for out, c in zip(outs, (oracle, naive, case), strict=True)
    ]
    names = ["out", "q", "k", "v"]
    for name, truth, baseline, got in zip(names, *results, strict=True):
        assert error(got.detach(), truth.detach()) <= 2 * error(
            baseline.detach(), truth.detach()
        ), name
