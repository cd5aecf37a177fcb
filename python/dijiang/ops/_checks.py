"""What every operator asks of its arguments, in words that name the cure.

The compiled operators check again, only what keeps them inside their memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library
from .._types import FeatureParams, acc_dtype
from ..reference import omega_matrix

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOWERED = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {"exp": 1, "softmax": 2, "elu": 3}  # FeatureKind of core/types.h


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as torch.autocast casts the inputs of a matrix product (float64 stays).

    Done here, because a kernel registered for the Autocast key is skipped under torch.compile.
    """
    first = tensors[0]
    # Meta tensors have no autocast mode to ask for; what is no tensor is for the checks to refuse.
    if not isinstance(first, Tensor) or first.is_meta:
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _LOWERED else x for x in tensors
    )


def check_input(op: str, name: str, x: Tensor, rank: int | None, legend: str) -> None:
    """The first tensor of an operator: its dtype and device are asked of the others."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if rank is not None and x.dim() != rank:
        raise ValueError(
            f"{op}: {name} must have {rank} dimensions {legend}, got shape {tuple(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}: "
            "convert it with .to()"
        )
    if x.device.type == "cuda":
        if (reason := _library.why_no_cuda()) is not None:
            raise RuntimeError(f"{op}: {name} is on {x.device}, but {reason}")
        if x.dtype == torch.float64:
            raise TypeError(f"{op}: float64 is supported on the CPU alone, {name} is on {x.device}")
    elif x.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"{op}: {name} is on {x.device}, but there are kernels for CPU and CUDA alone: "
            "move it with .to()"
        )


def check_like(
    op: str, name: str, x: Tensor, shape: Sequence, legend: str, like: Tensor, dtype: torch.dtype
) -> None:
    """`x` has this shape (a string stands for any size), this dtype and the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or any(
        not isinstance(want, str) and got != want for got, want in zip(x.shape, shape, strict=True)
    ):
        sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{op}: {name} must have shape ({sizes}) {legend}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {x.dtype}: convert it with .to()")
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device}, got {x.device}: move it with .to()"
        )


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, dim: str) -> None:
    check_input(op, "q", q, 4, f"(batch, heads, seqlen, {dim})")
    batch, heads, seqlen, headdim = q.shape
    legend = "(batch, kv heads, seqlen, {})"
    check_like(op, "k", k, (batch, "Hkv", seqlen, headdim), legend.format(dim), q, q.dtype)
    kv_heads = k.shape[1]
    check_like(op, "v", v, (batch, kv_heads, seqlen, "dv"), legend.format("headdim_v"), q, q.dtype)
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"{op}: the heads of k and v must divide those of q, got {kv_heads} and {heads}"
        )


def check_one_token(op: str, q: Tensor) -> None:
    if q.shape[2] != 1:
        raise ValueError(
            f"{op}: takes one token a sequence, got seqlen {q.shape[2]}: "
            f"{op.removesuffix('_update')} with initial_state takes more"
        )


def check_eps(op: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")


def per_token_decay(op: str, log_decay: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """(Hkv,) or (B, Hkv, T) -> (B, Hkv, T), the accumulation dtype; expanded, never copied."""
    if log_decay is None:
        return None
    if not isinstance(log_decay, Tensor) or log_decay.dtype not in DTYPES:
        got = getattr(log_decay, "dtype", type(log_decay).__name__)
        raise TypeError(f"{op}: log_decay must be a floating-point tensor, got {got}")
    log_decay = log_decay.to(acc_dtype(q.dtype))
    batch, kv_heads, seqlen = k.shape[:3]
    if log_decay.dim() == 1:
        shape, legend = (kv_heads,), "(kv heads) or (batch, kv heads, seqlen)"
        check_like(op, "log_decay", log_decay, shape, legend, q, log_decay.dtype)
        return log_decay[None, :, None].expand(batch, kv_heads, seqlen)
    shape, legend = (batch, kv_heads, seqlen), "(batch, kv heads, seqlen) or (kv heads)"
    check_like(op, "log_decay", log_decay, shape, legend, q, log_decay.dtype)
    return log_decay


def segments_of(
    op: str, q: Tensor, cu_seqlens: Tensor | None, seq_bounds: Tensor | None
) -> Tensor | None:
    """int32 (num_seqs, 3) rows (batch row, begin, end); None: every row is one whole sequence."""
    batch, _, seqlen, _ = q.shape
    if cu_seqlens is not None and seq_bounds is not None:
        raise ValueError(
            f"{op}: give cu_seqlens (packed rows) or seq_bounds (padded rows), not both"
        )
    if cu_seqlens is not None:
        legend = "(begin of each sequence, then seqlen)"
        check_like(op, "cu_seqlens", cu_seqlens, ("N + 1",), legend, q, torch.int32)
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"{op}: cu_seqlens must hold at least one number, got none")
        if batch != 1:
            raise ValueError(
                f"{op}: cu_seqlens needs sequences packed into one batch row, got batch {batch}: "
                "flatten (batch, seqlen) into (1, batch * seqlen)"
            )
        begin, end = cu_seqlens[:-1], cu_seqlens[1:]
        _check_values(
            op, cu_seqlens,
            lambda: (cu_seqlens[0] == 0) & (cu_seqlens[-1] == seqlen) & (begin <= end).all(),
            f"cu_seqlens must rise from 0 to the seqlen {seqlen} of q",
        )  # fmt: skip
        return torch.stack([torch.zeros_like(begin), begin, end], 1)
    if seq_bounds is not None:
        check_like(
            op, "seq_bounds", seq_bounds, (batch, 2), "(batch, [begin, end))", q, torch.int32
        )
        begin, end = seq_bounds.unbind(1)
        _check_values(
            op, seq_bounds, lambda: ((begin >= 0) & (begin <= end) & (end <= seqlen)).all(),
            f"seq_bounds must hold 0 <= begin <= end <= {seqlen} (the seqlen of q) in each row",
        )  # fmt: skip
        rows = torch.arange(batch, dtype=torch.int32, device=q.device)
        return torch.cat([rows[:, None], seq_bounds], 1)
    return None


def _check_values(op, bounds, in_order, message):
    if torch.compiler.is_compiling() or bounds.is_meta:
        return  # values are unknown here; the CPU kernel checks them
    if bounds.is_cuda:
        torch._assert_async(in_order(), f"{op}: {message}")  # without waiting for the device
    elif not bool(in_order()):
        raise ValueError(f"{op}: {message}, got {bounds.tolist()}")


def check_params(
    op: str,
    name: str,
    params: FeatureParams,
    heads: int,
    headdim: int,
    like: Tensor,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """omega, log_weight and beta as the kernels read them: accumulation dtype, contiguous.

    shared: omega may have a row for several heads.
    """
    if not isinstance(params, FeatureParams):
        raise TypeError(f"{op}: {name} must be FeatureParams, got {type(params).__name__}")
    if params.kind not in KINDS:
        raise ValueError(
            f"{op}: {name}.kind must be {', '.join(map(repr, KINDS))}, got {params.kind!r}"
        )
    if params.beta is not None and params.kind != "exp":
        raise ValueError(f"{op}: {name}.beta belongs to kind 'exp', got kind {params.kind!r}")
    omega, log_weight, beta = params.omega, params.log_weight, params.beta
    rows = heads
    if shared and isinstance(omega, Tensor) and omega.dim() and omega.shape[0]:
        rows = omega.shape[0] if heads % omega.shape[0] == 0 else heads
    if isinstance(omega, Tensor) and omega.dim() == 2:
        check_like(op, f"{name}.omega", omega, (rows, "m"), "(heads, features)", like, omega.dtype)
        if params.kind != "exp":
            raise ValueError(
                f"{op}: frequencies in place of the matrix {name}.omega belong to kind 'exp', got "
                f"kind {params.kind!r}: give (heads, features, headdim)"
            )
        if not headdim:
            raise ValueError(f"{op}: frequencies in place of {name}.omega need a headdim above 0")
    else:
        check_like(op, f"{name}.omega", omega, (rows, "m", headdim),
                   "(heads, features, headdim)", like, omega.dtype)  # fmt: skip
    if like.device.type != "cpu":
        omega = omega_matrix(omega, headdim, heads)  # tensor cores take one for every head
    if log_weight is not None:
        check_like(op, f"{name}.log_weight", log_weight, (heads, omega.shape[1]),
                   "(heads, features)", like, log_weight.dtype)  # fmt: skip
    if beta is not None:
        check_like(op, f"{name}.beta", beta, (heads,), "(heads)", like, beta.dtype)
    acc = acc_dtype(like.dtype)
    return tuple(None if x is None else x.to(acc).contiguous() for x in (omega, log_weight, beta))
