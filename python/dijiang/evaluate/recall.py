"""What a model recalls of what it read: a pass key, an association, a copy, so many tokens back.

Every question is built from a tokenizer, a stretch of prose and a seed, so that it needs no data
and every model is asked the same ones.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._models import Progress, device_of, last_logits, mean_and_error, token_ids


@dataclass(frozen=True)
class Recall:
    """Share of the answer's tokens that are the most likely ones when they are asked for."""

    distance: int  # tokens of prose between what is to be recalled and the question
    trials: int
    accuracy: float
    loss: float  # nats a token of the answer
    standard_error: float = math.nan  # of `accuracy`, over trials; nan for a single one


# What stands before the prose, what after it, and the answer: token ids (n,).
Question = tuple[Tensor, Tensor, Tensor]


def pass_key_recall(
    model: nn.Module,
    tokenizer,
    prose: Tensor,
    distance: int,
    *,
    trials: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recall:
    """A needle in text: says a five-digit pass key twice, then `distance` tokens of prose, and
    asks for the key.

    prose: int64 (n,), n >= distance: each trial takes its own stretch. The same seed gives every
    model the same keys and stretches. Raises ValueError when the text is too short.

    Example: `pass_key_recall(model, tokenizer, data.tokenize(corpus.held_out, tokenizer), 200)`.
    """

    def question(draw: random.Random) -> Question:
        key = draw.randint(10000, 99999)
        return (
            token_ids(tokenizer, f"The pass key is {key}. Remember it. {key} is the pass key.\n"),
            token_ids(tokenizer, "\nWhat is the pass key? The pass key is"),
            token_ids(tokenizer, f" {key}"),
        )

    return _recall("pass_key_recall", model, prose, distance, question, trials, seed, progress)


def associative_recall(
    model: nn.Module,
    tokenizer,
    prose: Tensor,
    distance: int,
    *,
    pairs: int = 8,
    answers: str = "cities",
    trials: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recall:
    """Says of `pairs` people where they live, then `distance` tokens of prose, and asks for one.

    A model that remembers the cities but not whose they are is right in one of `pairs` cases. With
    `answers="keys"` each has a five-digit pass key instead: small models, which take any city for a
    likely one, can be asked for those.

    prose: int64 (n,), n >= distance. The same seed gives every model the same people, answers and
    stretches. Raises ValueError when the text is too short, pairs is not 1 to 24, or answers is
    neither "cities" nor "keys".

    Example: `associative_recall(model, tokenizer, prose, 256, pairs=4).accuracy`.
    """
    if not 1 <= pairs <= len(_PEOPLE):
        raise ValueError(f"associative_recall: pairs must be 1 to {len(_PEOPLE)}, got {pairs}")
    if answers not in _ASSOCIATIONS:
        raise ValueError(
            f"associative_recall: answers must be one of {', '.join(_ASSOCIATIONS)}, got "
            f"{answers!r}"
        )
    fact, asking = _ASSOCIATIONS[answers]

    def question(draw: random.Random) -> Question:
        people = draw.sample(_PEOPLE, pairs)
        theirs = draw.sample(_CITIES if answers == "cities" else range(10000, 100000), pairs)
        said = " ".join(f"{fact.format(a)} {b}." for a, b in zip(people, theirs, strict=True))
        asked = draw.randrange(pairs)
        who = people[asked]
        return (
            token_ids(tokenizer, f"{said}\n"),
            token_ids(tokenizer, f"\n{asking.format(who)} {fact.format(who)}"),
            token_ids(tokenizer, f" {theirs[asked]}"),
        )

    return _recall("associative_recall", model, prose, distance, question, trials, seed, progress)


def copy_recall(
    model: nn.Module,
    tokenizer,
    prose: Tensor,
    distance: int,
    *,
    length: int = 32,
    trials: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recall:
    """Gives a passage of `length` tokens, `distance` tokens of prose, and the passage's beginning.

    The passage is of different tokens of the prose in random order: a sentence would go on from its
    beginning by itself, this only goes on for who remembers it. The first four tokens are given,
    the others are the answer, each predicted behind the right ones before it.

    prose: int64 (n,), n >= distance. The same seed gives every model the same passages and
    stretches. Raises ValueError when the text is too short or has too few different tokens, or
    length is not above 4. The tokenizer is not used.

    Example: `copy_recall(model, tokenizer, prose, 256).accuracy`.
    """
    kinds = prose.unique().tolist()
    if not _CUE < length <= len(kinds):
        raise ValueError(
            f"copy_recall: length must be above {_CUE} and at most the text's {len(kinds)} "
            f"different tokens, got {length}"
        )

    def question(draw: random.Random) -> Question:
        passage = torch.tensor(draw.sample(kinds, length))
        return passage, passage[:_CUE], passage[_CUE:]

    return _recall("copy_recall", model, prose, distance, question, trials, seed, progress)


#: The tasks by name, as recall_curve and `dijiang eval --tasks` take them.
TASKS: dict[str, Callable[..., Recall]] = {
    "pass-key": pass_key_recall,
    "associative": associative_recall,
    "copy": copy_recall,
}


def recall_curve(
    model: nn.Module,
    tokenizer,
    prose: Tensor,
    task: str,
    distances: Sequence[int] | None = None,
    *,
    trials: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
    **options,
) -> list[Recall]:
    """One task at growing distances: where a model's memory ends.

    Args:
        task: "pass-key", "associative" or "copy".
        distances: tokens between what is to be recalled and the question. None: 1, 2, 4, 8 and 16
            times the converted model's window.
        options: of the task: pairs and answers, length.

    Raises ValueError when the task is not known, when distances are missing and the model has no
    window, and as the task itself does.

    Example: `recall_curve(model, tokenizer, prose, "copy", [64, 128, 256])`.
    """
    if task not in TASKS:
        raise ValueError(f"recall_curve: task must be one of {', '.join(TASKS)}, got {task!r}")
    if distances is None:
        distances = _window_distances(model)
    distances = list(distances)

    def at(place):
        if progress is None:
            return None
        return lambda done, total: progress(place * trials + done, len(distances) * trials)

    return [
        TASKS[task](
            model, tokenizer, prose, distance, trials=trials, seed=seed, progress=at(place),
            **options,
        )
        for place, distance in enumerate(distances)
    ]  # fmt: skip


def _window_distances(model) -> list[int]:
    settings = getattr(getattr(model, "config", None), "dijiang", None) or {}
    window = settings.get("window", 0)
    if not window:
        raise ValueError(
            f"recall_curve: this {type(model).__name__} has no window to measure by. Give distances"
        )
    return [window * 2**i for i in range(5)]


@torch.inference_mode()
def _recall(
    name: str,
    model: nn.Module,
    prose: Tensor,
    distance: int,
    question: Callable[[random.Random], Question],
    trials: int,
    seed: int,
    progress: Progress | None,
) -> Recall:
    if prose.numel() < distance:
        raise ValueError(
            f"{name}: {distance} tokens of prose are wanted, the text has {prose.numel()}"
        )
    if trials < 1 or distance < 0:
        raise ValueError(
            f"{name}: trials must be at least 1 and distance at least 0, got {trials} and "
            f"{distance}"
        )
    model.eval()
    device = device_of(model)
    draw = random.Random(seed)
    right, loss = [], []
    for trial in range(trials):
        before, after, answer = question(draw)
        start = draw.randint(0, prose.numel() - distance)
        between = prose[start : start + distance]
        ids = torch.cat([before, between, after, answer]).to(device)
        # The logits before each answer token: the last one's own are of no use.
        logits = last_logits(model, ids, answer.numel() + 1)[:-1].float()
        answer = answer.to(device)
        right.append((logits.argmax(-1) == answer).float().mean().item())
        loss.append(F.cross_entropy(logits, answer).item())
        if progress:
            progress(trial + 1, trials)
    accuracy, error = mean_and_error(right)
    return Recall(distance, trials, accuracy, statistics.fmean(loss), error)


# What is said of a person, before the answer, and how it is asked for.
_ASSOCIATIONS = {
    "cities": ("{} lives in", "Where does {} live?"),
    "keys": ("The pass key of {} is", "What is the pass key of {}?"),
}

_CUE = 4  # tokens of a passage that are given again

_PEOPLE = (
    "Adam", "Alice", "Anna", "Ben", "Carol", "Clara", "Daniel", "David", "Emma", "Eric", "Frank",
    "George", "Helen", "Henry", "Jack", "James", "Julia", "Laura", "Maria", "Martin", "Mary",
    "Peter", "Simon", "Tom",
)  # fmt: skip

_CITIES = (
    "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dallas", "Delhi", "Denver", "Dublin",
    "Lima", "Lisbon", "London", "Madrid", "Milan", "Moscow", "Oslo", "Paris", "Prague", "Rome",
    "Seattle", "Sydney", "Tokyo", "Toronto", "Vienna",
)  # fmt: skip
