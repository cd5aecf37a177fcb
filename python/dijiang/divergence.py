"""The distance of two models' predictions, without float32 copies of all their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a slice: a step's temporaries then stay small, and an allocator keeps them.
_SLICE = 2**22


def kl_divergence(logits: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over tokens of KL(softmax(teacher) || softmax(logits)).

    Formula: ``sum_t weight_t KL_t / sum_t weight_t``. The gradient for ``logits`` (none for the
    others) is found on the way, so that no whole log-softmax is ever held.

    Shapes: logits and teacher (..., vocabulary), any floating dtype; weight (...) -> scalar,
    float32 (float64 for float64 logits). No weight at all gives 0.

    Raises ValueError when the shapes do not fit.

    >>> x = torch.randn(2, 5, 100)
    >>> float(kl_divergence(x, x, torch.ones(2, 5)))
    0.0
    """
    if logits.shape != teacher.shape or weight.shape != logits.shape[:-1]:
        raise ValueError(
            "kl_divergence: logits and teacher must have one shape (..., vocabulary) and weight "
            f"(...), got {tuple(logits.shape)}, {tuple(teacher.shape)} and {tuple(weight.shape)}"
        )
    return _KLDivergence.apply(logits, teacher, weight)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher, weight):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        vocabulary = logits.shape[-1]
        weight = weight.reshape(-1, 1).to(dtype)
        weight = weight / weight.sum().clamp(min=torch.finfo(dtype).tiny)
        total = weight.new_zeros(())
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows = max(1, _SLICE // vocabulary)
        flat = (x.reshape(-1, vocabulary) for x in (logits, teacher))
        out = None if gradient is None else gradient.view(-1, vocabulary).split(rows)
        slices = zip(*(x.split(rows) for x in flat), weight.split(rows), strict=True)
        for i, (student, wanted, w) in enumerate(slices):
            student, wanted = (x.to(dtype).log_softmax(-1) for x in (student, wanted))
            p = wanted.exp()
            total += (wanted.sub_(student).mul_(p).sum(-1, keepdim=True) * w).sum()
            if out is not None:
                torch.mul(student.exp_().sub_(p), w, out=p)
                out[i].copy_(p)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * grad), None, None
