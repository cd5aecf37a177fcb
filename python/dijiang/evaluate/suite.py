"""What `dijiang eval` does: the measurements asked for, on a model and those to compare it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from .. import data
from ..config import DiJiangConfig
from ..console import Silent
from .attention import MAP_TOKENS, AttentionMap, attention_errors, attention_maps
from .fidelity import agreement
from .harness import lm_eval
from .language import gap_closed, perplexity, perplexity_by_position
from .recall import TASKS, pass_key_recall, recall_curve

#: The measurements by name. The last three ask for a converted model (agreement: or a teacher).
MEASURES = (
    "perplexity", "recall", "positions", "curves", "harness", "agreement", "attention", "maps",
)  # fmt: skip

#: The name of the model to compare with, in results and plots.
BASELINE = "window + sinks, training-free"

Loader = Callable[[], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how much of it."""

    measures: tuple[str, ...] = ("perplexity", "recall")
    lengths: tuple[int, ...] = (512, 2048)  # of perplexity's windows
    tokens: int = 8192  # for each length, and for positions, agreement and attention
    distances: tuple[int, ...] = (200, 400)  # of pass-key recall
    trials: int = 10  # for each distance
    position_length: int = 2048  # of a window of positions
    tasks: tuple[str, ...] = tuple(TASKS)  # of the recall curves
    reach: tuple[int, ...] | None = None  # their distances; None: 1 to 16 windows
    heads: tuple[tuple[int, int], ...] | None = None  # of the maps; None: three layers' first
    harness: tuple[str, ...] = ()  # tasks of lm-evaluation-harness
    limit: int | None = None  # documents of each
    lenient: bool = False  # leave out what asks for a converted model where there is none

    def __post_init__(self):
        for name, known in (("measures", MEASURES), ("tasks", tuple(TASKS))):
            for item in getattr(self, name):
                if item not in known:
                    raise ValueError(f"{name} must be among {', '.join(known)}, got {item!r}")


@dataclasses.dataclass
class Outcome:
    """`results` is plain data, as in a results.json; the maps are pictures' raw material."""

    results: dict[str, Any]
    maps: list[AttentionMap]


def run(
    student: tuple[str, Loader],
    corpus: data.Corpus,
    settings: Settings,
    *,
    teacher: tuple[str, Loader] | None = None,
    baseline: bool = False,
    reporter=None,
) -> Outcome:
    """Measures the student, then the teacher if given, then (`baseline`) the training-free window.

    Each is (name, a function that loads model and tokenizer). Agreement holds student and teacher
    at once; otherwise one model is in memory at a time. The baseline is the teacher converted to
    the student's window and sinks, without far keys.

    Raises ValueError when a measurement asks for a converted model or a teacher that is not there,
    and as the measurements do.
    """
    return _Suite(corpus, settings, reporter or Silent()).run(student, teacher, baseline)


class _Suite:
    def __init__(self, corpus, settings: Settings, reporter):
        self.corpus, self.settings, self.reporter = corpus, settings, reporter
        self.results: dict[str, Any] = {"data": corpus.name}
        self.maps: list[AttentionMap] = []
        self.reach = settings.reach
        self.measures = set(settings.measures)

    def wants(self, measure: str) -> bool:
        return measure in self.measures

    def run(self, student, teacher, baseline: bool) -> Outcome:
        from ..conversion import convert, is_converted  # here: they need transformers

        if baseline and teacher is None:
            raise ValueError(
                f"the {BASELINE} baseline is made of the teacher: give one, not converted"
            )
        name, load = student
        model, tokenizer = load()
        self._check(name, is_converted(model), teacher)
        near = _near_keys(model) if is_converted(model) else DiJiangConfig.window_only()
        if baseline and near is None:
            raise ValueError(
                f"the {BASELINE} baseline takes its window and sinks from the student, which has "
                "neither: leave it out"
            )
        if self.reach is None:
            # Where there is no window, as for the default one.
            window = (near.window if near else 0) or DiJiangConfig().window
            self.reach = tuple(window * 2**i for i in range(5))
        self._alone(name, model, tokenizer)
        self._inside(name, model, tokenizer)
        if teacher is None:
            if self.wants("agreement"):
                self._agreement(name, model, None, tokenizer)
            return Outcome(self.results, self.maps)

        if not self.wants("agreement"):
            model = None  # before the next one is loaded
        other, load = teacher
        net, tokenizer = load()
        if baseline and is_converted(net):
            raise ValueError(
                f"the {BASELINE} baseline is made of the teacher, but {other} is converted: give "
                "the model it was converted from"
            )
        if model is not None:
            self._agreement(name, model, net, tokenizer)
            model = None
        self._alone(other, net, tokenizer)
        if baseline:
            with self.reporter.stage("converting to window and sinks"):
                convert(net, near)
            self._alone(BASELINE, net, tokenizer)
            if self.wants("perplexity"):
                self._gap(name, other)
        return Outcome(self.results, self.maps)

    def _check(self, name: str, converted: bool, teacher) -> None:
        asks = {"attention", "maps"} | ({"agreement"} if teacher is None else set())
        asks &= self.measures
        if converted or not asks:
            return
        if not self.settings.lenient:
            raise ValueError(
                f"{name} is not converted, which {', '.join(sorted(asks))} asks for. Convert it "
                "first; agreement can do with a teacher instead"
            )
        self.measures -= asks

    def _alone(self, name: str, model, tokenizer) -> None:
        """Everything that one model is measured by."""
        settings, stage = self.settings, self.reporter.stage
        prose = self._prose(tokenizer)
        if self.wants("perplexity"):
            # Cut for every length before the first is measured: too short a text fails at once.
            blocks = [self._blocks(prose, length) for length in settings.lengths]
            rows = []
            for length, block in zip(settings.lengths, blocks, strict=True):
                with stage(f"{name}: perplexity at {length}") as progress:
                    rows.append(perplexity(model, block, progress=progress))
            self._keep("perplexity", name, rows)
        if self.wants("recall") and settings.distances:
            rows = []
            for distance in settings.distances:
                with stage(f"{name}: recall {distance} tokens back") as progress:
                    rows.append(
                        pass_key_recall(
                            model, tokenizer, prose, distance, trials=settings.trials,
                            progress=progress,
                        )
                    )  # fmt: skip
            self._keep("recall", name, rows)
        if self.wants("positions"):
            with stage(f"{name}: perplexity by position") as progress:
                blocks = self._blocks(prose, settings.position_length)
                made = perplexity_by_position(model, blocks, progress=progress)
            self._keep("positions", name, made)
        if self.wants("curves"):
            for task in settings.tasks:
                with stage(f"{name}: {task} recall, {self.reach[0]} to {self.reach[-1]}") as tell:
                    rows = recall_curve(
                        model, tokenizer, prose, task, self.reach, trials=settings.trials,
                        progress=tell,
                    )  # fmt: skip
                curves = self.results.setdefault("curves", {}).setdefault(task, {})
                curves[name] = _plain(rows)
        if self.wants("harness"):
            with stage(f"{name}: {', '.join(settings.harness)}"):
                made = lm_eval(model, tokenizer, settings.harness, limit=settings.limit)
            self.results.setdefault("harness", {})[name] = made["results"]

    def _inside(self, name: str, model, tokenizer) -> None:
        """What a converted model's layers are measured by."""
        if self.wants("attention"):
            with self.reporter.stage(f"{name}: error of each layer's attention") as progress:
                rows = attention_errors(model, self._long_blocks(tokenizer), progress=progress)
            self._keep("attention", name, rows)
        if self.wants("maps"):
            with self.reporter.stage(f"{name}: attention maps"):
                ids = self._prose(tokenizer)[:MAP_TOKENS]
                self.maps = attention_maps(model, ids, self.settings.heads or _some_heads(model))

    def _agreement(self, name: str, model, teacher, tokenizer) -> None:
        with self.reporter.stage(f"{name}: agreement with the teacher") as progress:
            made = agreement(model, teacher, self._long_blocks(tokenizer), progress=progress)
        self._keep("agreement", name, made)

    def _gap(self, student: str, teacher: str) -> None:
        """Left out at lengths where the window is no worse than the teacher: there is no gap."""
        measured = self.results["perplexity"]
        rows = zip(*(measured[name] for name in (teacher, BASELINE, student)), strict=True)
        closed = {}
        for row in rows:
            best, worst, now = (point["perplexity"] for point in row)
            if worst > best:
                closed[str(row[0]["length"])] = gap_closed(best, worst, now)
        self.results["gap_closed"] = closed

    def _prose(self, tokenizer):
        return data.tokenize(self.corpus.held_out, tokenizer)

    def _blocks(self, prose, length: int):
        name = f"{self.corpus.name}, held-out part"
        count = max(1, self.settings.tokens // length)
        return data.cut(prose, length, blocks=count, name=name)

    def _long_blocks(self, tokenizer):
        return self._blocks(self._prose(tokenizer), self.settings.position_length)

    def _keep(self, measure: str, name: str, made) -> None:
        self.results.setdefault(measure, {})[name] = _plain(made)


def _plain(made):
    return [dataclasses.asdict(row) for row in made] if isinstance(made, list) else (
        dataclasses.asdict(made)
    )  # fmt: skip


def _near_keys(model) -> DiJiangConfig | None:
    """The model's own window and sinks without far keys; None where it has neither."""
    own = DiJiangConfig.from_dict(model.config.dijiang)
    return DiJiangConfig.window_only(own.window, own.sinks) if own.has_near else None


def _some_heads(model) -> Iterable[tuple[int, int]]:
    """The first head of the first, the middle and the last converted layer."""
    from .attention import _kernels

    layers = list(_kernels(model, "maps"))
    return [(layer, 0) for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})]
