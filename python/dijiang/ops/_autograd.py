"""Gradients of every operator, and what the operators that write their arguments need.

torch.library.register_autograd over functional `*_fwd` and `*_bwd`, rather than an
autograd.Function in a Python wrapper: torch.ops.dijiang.* called directly is differentiable too,
and functional transforms and torch.compile see ordinary operators. It costs about 5 microseconds
a call without and 11 with gradient more than the wrapper, in forward passes alone: the `*_update`
operators, where microseconds count, have no gradient and pay nothing.
"""

from __future__ import annotations

import torch
from torch.library import register_autograd

_LIBRARY = torch.library.Library("dijiang", "FRAGMENT")

# ---- dct ---------------------------------------------------------------------------------------


def _dct_setup(ctx, inputs, output):
    ctx.type = inputs[1]


def _dct_backward(ctx, grad):
    return torch.ops.dijiang.dct(grad, 5 - ctx.type), None  # orthonormal: the transpose


register_autograd("dijiang::dct", _dct_backward, setup_context=_dct_setup)

# ---- feature_map -------------------------------------------------------------------------------


def _feature_map_setup(ctx, inputs, output):
    x, omega, log_weight, beta, *ctx.rest = inputs
    ctx.save_for_backward(x, output, omega, log_weight, beta)


def _feature_map_backward(ctx, grad):
    _, _, *params = ctx.saved_tensors
    grads = torch.ops.dijiang.feature_map_bwd(grad, *ctx.saved_tensors, *ctx.rest)
    return grads[0], *_where_given(grads[1:], params), None, None, None


register_autograd(
    "dijiang::feature_map_fwd", _feature_map_backward, setup_context=_feature_map_setup
)

# ---- causal_linear_attention -------------------------------------------------------------------


def _linear_setup(ctx, inputs, output):
    # tensors: q, k, v, log_decay, segments, kv, z, log_scale
    *tensors, ctx.normalize, ctx.eps, return_state = inputs
    out, row_scale, row_sum, kv, z, log_scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_scale, row_sum, log_scale, *([] if return_state else [kv, z]))
    ctx.save_for_backward(*tensors, out, row_scale, row_sum, kv, z, log_scale)


def _linear_backward(ctx, grad_out, _row_scale, _row_sum, grad_kv, grad_z, _log_scale):
    saved = ctx.saved_tensors
    inputs, rows, final = saved[:8], saved[8:11], saved[11:]
    log_decay, initial = inputs[3], inputs[5:7]
    grad_initial = any(ctx.needs_input_grad[5:7])
    dq, dk, dv, d_decay, d_kv, d_z = torch.ops.dijiang.linear_attention_bwd(
        _or_zeros(grad_out, rows[0]), *inputs, *rows, *_final_grads(grad_kv, grad_z, final),
        ctx.normalize, ctx.eps, grad_initial,
    )  # fmt: skip
    (d_decay,) = _where_given((d_decay,), (log_decay,))
    d_kv, d_z = _where_given((d_kv, d_z), initial if grad_initial else (None, None))
    return dq, dk, dv, d_decay, None, d_kv, d_z, *(None,) * 4


register_autograd("dijiang::linear_attention_fwd", _linear_backward, setup_context=_linear_setup)

# ---- kernelized_attention ----------------------------------------------------------------------

_PARAMS = slice(3, 9)  # q_omega .. k_beta
_DECAY = 9
_STATE = slice(11, 13)  # kv, z
_TENSORS = 27  # q .. hard_keys


def _kernelized_setup(ctx, inputs, output):
    *tensors, hard_keys = inputs[:_TENSORS]
    ctx.rest, return_state = inputs[_TENSORS:-1], inputs[-1]
    out, row_scale, row_sum, kv, z, log_scale, *near, chosen = output
    ctx.set_materialize_grads(False)
    # With a window the state is for decoding: it carries no gradient.
    window = ctx.rest[2]
    far = [kv, z] if window or not return_state else []
    near = [x for x in near if x.is_floating_point()]
    ctx.mark_non_differentiable(row_scale, row_sum, log_scale, *near, *far)
    hard_keys = chosen if hard_keys is None else hard_keys
    ctx.save_for_backward(*tensors, hard_keys, out, row_scale, row_sum, kv, z, log_scale)


def _kernelized_backward(ctx, grad_out, _row_scale, _row_sum, grad_kv, grad_z, *_):
    saved = ctx.saved_tensors
    inputs, rows, final = saved[:_TENSORS], saved[_TENSORS:-3], saved[-3:]
    needed = ctx.needs_input_grad
    grad_params, grad_initial = any(needed[_PARAMS]), any(needed[_STATE])
    dq, dk, dv, *d_params, d_decay, d_kv, d_z = torch.ops.dijiang.kernelized_attention_bwd(
        _or_zeros(grad_out, rows[0]), *inputs, *rows, *_final_grads(grad_kv, grad_z, final),
        *ctx.rest, grad_params, grad_initial,
    )  # fmt: skip
    d_params = _where_given(d_params, inputs[_PARAMS] if grad_params else (None,) * 6)
    (d_decay,) = _where_given((d_decay,), (inputs[_DECAY],))
    d_kv, d_z = _where_given((d_kv, d_z), inputs[_STATE] if grad_initial else (None, None))
    nothing = len(needed) - _STATE.stop
    return dq, dk, dv, *d_params, d_decay, None, d_kv, d_z, *(None,) * nothing


register_autograd(
    "dijiang::kernelized_attention_fwd", _kernelized_backward, setup_context=_kernelized_setup
)

# ---- second derivatives: refused by name, where torch's default is a wrong zero -----------------


def _refuse_second(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"{name} is differentiable once: its gradient has no gradient")

    register_autograd(f"dijiang::{name}_bwd", backward)


for _name in ("feature_map", "linear_attention", "kernelized_attention"):
    _refuse_second(_name)

# ---- updates: they write their state ------------------------------------------------------------


class _RefuseGradient(torch.autograd.Function):
    """The identity; its gradient is an error rather than a silent nothing."""

    @staticmethod
    def forward(ctx, op, out, *inputs):
        ctx.op = op
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            f"{ctx.op} has no gradient: call {ctx.op.removesuffix('_update')} to train, or "
            "torch.no_grad() to decode"
        )


def without_gradient(op, update, *args):
    """update(*args), refusing to differentiate what it returns."""
    if not torch.is_grad_enabled():
        return update(*args)
    with torch.no_grad():
        out = update(*args)
    inputs = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    return _RefuseGradient.apply(op, out, *inputs) if inputs else out


def _bump_versions(name, written):
    """Lets autograd notice that saved tensors were written, which compiled kernels do not do."""
    op = getattr(torch.ops.dijiang, name).default

    def kernel(keyset, *args):
        for x in args[written]:
            if x is not None and not x.is_inference():
                torch.autograd.graph.increment_version(x)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_bump_versions("linear_attention_update", slice(4, 7))
_bump_versions("kernelized_attention_update", slice(10, 25))

# ---- helpers -----------------------------------------------------------------------------------


def _where_given(grads, inputs):
    return tuple(None if x is None else g for g, x in zip(grads, inputs, strict=True))


def _or_zeros(grad, like):
    return torch.zeros_like(like) if grad is None else grad


def _final_grads(grad_kv, grad_z, final):
    """grad_final_kv, grad_final_z and the final state; all None when nothing depends on it."""
    if grad_kv is None and grad_z is None:
        return (None,) * 5
    kv, z, _ = final
    return _or_zeros(grad_kv, kv).contiguous(), _or_zeros(grad_z, z).contiguous(), *final
