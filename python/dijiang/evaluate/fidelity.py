"""How closely a student predicts what its teacher does, on the same tokens."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..divergence import kl_divergence
from ._models import Progress, check_blocks, device_of, mean_and_error, sliced_logits, slices
from .language import Perplexity, of_windows


@dataclass(frozen=True)
class Agreement:
    """Two models' predictions of the same tokens; standard errors are over windows."""

    length: int  # tokens of a window
    tokens: int  # compared: windows * (length - 1)
    kl: float  # KL(teacher || student), nats a token
    kl_standard_error: float
    top1: float  # share of tokens where both have the same likeliest next one
    top1_standard_error: float
    student: Perplexity
    teacher: Perplexity


@torch.inference_mode()
def agreement(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: torch.Tensor,
    *,
    progress: Progress | None = None,
) -> Agreement:
    """How near the student's predictions are to the teacher's.

    Formula: the mean over tokens of KL(teacher || student) = sum_v p_v (log p_v - log s_v), p and s
    the two softmax distributions, and of [argmax p = argmax s].

    Args:
        student: any causal language model.
        teacher: likewise, of the same vocabulary. None: the student, which is then a converted
            model, in softmax mode: no second model in memory. That is the teacher it was converted
            from where only what convert added was trained (distill's train="dijiang").
        blocks: int64 (windows, length).

    Raises ValueError when blocks do not fit, the vocabularies differ, or teacher=None is asked of a
    model that is not converted.

    Example: `agreement(model, None, blocks).kl`.
    """
    check_blocks("agreement", blocks)
    own_softmax = contextlib.nullcontext
    if teacher is None:
        from ..conversion import softmax_mode  # here: it needs transformers

        teacher, own_softmax = student, lambda: softmax_mode(student)
        with own_softmax():  # refuses what is not converted before anything is computed
            pass
    student.eval()
    teacher.eval()
    there = device_of(student)
    rows: list[tuple[float, ...]] = []  # a window: KL, agreement, the two losses
    for index, block in enumerate(blocks):
        ids = block.to(there)
        of_student = sliced_logits(student, ids)
        with own_softmax():
            of_teacher = sliced_logits(teacher, block.to(device_of(teacher)))
        total = torch.zeros(4, dtype=torch.float64)
        for begin, end in slices(ids.numel() - 1):
            a, b = of_student(begin, end).float(), of_teacher(begin, end).to(there).float()
            if a.shape != b.shape:
                raise ValueError(
                    "agreement: student and teacher must share one vocabulary, got "
                    f"{a.shape[-1]} and {b.shape[-1]} tokens"
                )
            targets = ids[begin + 1 : end + 1]
            total += torch.tensor(
                [
                    kl_divergence(a, b, torch.ones_like(targets)).item() * (end - begin),
                    (a.argmax(-1) == b.argmax(-1)).sum().item(),
                    F.cross_entropy(a, targets, reduction="none").double().sum().item(),
                    F.cross_entropy(b, targets, reduction="none").double().sum().item(),
                ],
                dtype=torch.float64,
            )
        rows.append(tuple((total / (ids.numel() - 1)).tolist()))
        if progress:
            progress(index + 1, len(blocks))
    kl, top1, student_losses, teacher_losses = zip(*rows, strict=True)
    length = blocks.shape[1]
    return Agreement(
        length,
        len(rows) * (length - 1),
        *mean_and_error(kl),
        *mean_and_error(top1),
        of_windows(student_losses, length),
        of_windows(teacher_losses, length),
    )
