"""EleutherAI's lm-evaluation-harness, through its own API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def lm_eval(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    max_length: int | None = None,
    **options,
) -> dict[str, Any]:
    """Measures a model, converted or not, on tasks of lm-evaluation-harness.

    The data are the caller's: the harness gets them from the Hugging Face hub, or from wherever the
    tasks' own files say; nothing of them comes with dijiang.

    Args:
        tasks: names ("lambada_openai", "arc_easy", ..), or whatever `simple_evaluate` takes.
        batch_size, max_length: HFLM's.
        options: of `lm_eval.simple_evaluate`: num_fewshot, limit, ..

    Returns what `simple_evaluate` does: a dict, its "results" by task.

    Raises ImportError when the package is missing, ValueError for no task.

    Example: `lm_eval(model, tokenizer, ["lambada_openai"], limit=100)["results"]`.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks:
        raise ValueError('lm_eval: tasks must name at least one, such as ["lambada_openai"]')
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"lm_eval: lm-evaluation-harness cannot be imported ({error}): pip install lm_eval"
        ) from error
    settings: dict[str, Any] = {"batch_size": batch_size}
    if max_length is not None:
        settings["max_length"] = max_length
    wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, **settings)
    return simple_evaluate(model=wrapped, tasks=tasks, **options)
