"""kernelized_attention of a slice of a sequence, with gradients for the states at both its ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._types import AttentionState, FeatureParams, cache_sizes
from ._checks import autocast
from ._hard_keys import slots_by_head
from ._slice_grads import CARRIED, Layout, keys_of, reads, state_behind
from .kernelized_attention import check_state, finished_state, kernelized_attention, prepare


def attend_slice(
    q: Tensor, k: Tensor, v: Tensor, fq: FeatureParams | None, fk: FeatureParams | None,
    state: AttentionState, *, start: int, scale: float, window: int, sinks: int,
    cache_size: int | Sequence[int], log_decay: Tensor | None, normalize: bool,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Attends from `state`, which has seen `start` tokens of every row; returns the state behind.

    As kernelized_attention with initial_state and return_state, and differentiable in the fields
    CARRIED of both states, too, whatever keys are near.
    """
    op = "attend_slice"
    if not (window or sinks):  # the operator's own gradients are complete
        near = {name: None if x is None else x.detach() for name, x in state._asdict().items()}
        return kernelized_attention(
            q, k, v, fq, fk, scale=scale, log_decay=log_decay, normalize=normalize,
            initial_state=AttentionState(**near)._replace(kv=state.kv, z=state.z),
            return_state=True,
        )  # fmt: skip
    q, k, v = autocast(q, k, v)
    sizes = cache_sizes(cache_size)
    params, log_decay, kind, scale = prepare(
        op, q, k, v, fq, fk, scale, window, sinks, sizes, log_decay, 0.0
    )
    check_state(op, "state", state, q.shape[0], q, k, v, fk, window, sinks, sizes, log_decay)
    before = AttentionState(*(None if x is None else x.detach().contiguous() for x in state))
    out, row_scale, row_sum, *behind, table = torch.ops.dijiang.kernelized_attention_fwd(
        q, k, v, *params, log_decay, None, *before, None, kind, scale, window, sinks, sizes,
        normalize, 0.0, True,
    )  # fmt: skip
    behind = finished_state(behind, before, q, None, window, sinks, sizes, log_decay)
    behind = AttentionState(*(None if x is None else x.detach() for x in behind))
    layout = Layout(start, q.shape[2], scale, window, sinks, normalize, fk and fk.kind, sizes)
    out, *carried = _Carry.apply(
        layout, before, behind, out, row_scale, row_sum, table, q, k, v, log_decay, *params,
        *(getattr(state, name) for name in CARRIED),
    )  # fmt: skip
    return out, behind._replace(**dict(zip(CARRIED, carried, strict=True)))


class _Carry(torch.autograd.Function):
    """Hands on what the operator returned, and adds the gradients that its backward leaves out."""

    @staticmethod
    def forward(ctx, layout, before, behind, out, row_scale, row_sum, table, *inputs):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.before, ctx.behind = layout, before, behind
        ctx.save_for_backward(out, row_scale, row_sum, table, *inputs)
        carried = (getattr(behind, name) for name in CARRIED)
        return out.view_as(out), *(None if x is None else x.view_as(x) for x in carried)

    @staticmethod
    def backward(ctx, grad_out, *grads_behind):
        layout = ctx.layout
        *rows, table = ctx.saved_tensors[:4]
        leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors[4:]]
        q, k, v, log_decay, *params = leaves[:10]
        before = ctx.before._replace(**dict(zip(CARRIED, leaves[10:], strict=True)))
        behind = slots_by_head(ctx.behind, layout.sizes)
        fq = fk = None
        if layout.kind is not None:
            fq, fk = (FeatureParams(*x, layout.kind) for x in (params[:3], params[3:]))
        made = []  # (what the leaves make, its gradient)
        with torch.enable_grad():
            before = slots_by_head(before, layout.sizes)
            keys = keys_of(layout, before, k, v, fk, log_decay)
            if grad_out is not None and layout.start:
                made += reads(layout, keys, before, q, fq, log_decay, table, *rows, grad_out)
            if any(grad is not None for grad in grads_behind):
                fields = state_behind(layout, keys, before, behind)
                for field, grad in zip(fields, grads_behind, strict=True):
                    if grad is not None:
                        made.append((field[0], field[1](grad)))
        made = [(x, grad.to(x.dtype)) for x, grad in made if x.requires_grad]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[7:]) if needed]
        grads: list[Tensor | None] = [None] * len(leaves)
        if made and wanted:
            results, their_grads = zip(*made, strict=True)
            found = torch.autograd.grad(
                results, [leaves[i] for i in wanted], their_grads, allow_unused=True
            )
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
        return None, None, None, grad_out, None, None, None, *grads
