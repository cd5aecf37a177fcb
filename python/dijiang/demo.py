"""The main job, start to end: a pretrained model loses its softmax attention and learns again.

`run(Settings())` loads the default model, measures it, converts a copy, distills it for some
minutes, measures again, and writes a report with plots. A second copy keeps no exact keys at all,
for what the method of the paper does on its own. Every stage's result is kept in the output folder
under the settings it was made with, so that a second run only does what is missing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import __version__, data, evaluate, plots
from .config import DiJiangConfig
from .console import Silent
from .conversion import convert
from .distillation import distill, transfer_share
from .hub import from_pretrained, load_base

SOFTMAX = "softmax teacher"
WINDOW = "window + sinks, training-free"
CONVERTED = "converted, before training"
DISTILLED = "converted, after distillation"
LINEAR = "far keys alone, before training"
LINEAR_DISTILLED = "far keys alone, after distillation"

PROMPTS = (
    "The list type in Python is",
    "Once upon a time, in a small village by the sea,",
)


@dataclass(frozen=True)
class Settings:
    """What the demo does. `minutes` bounds all of it on the machine it runs on, set-up apart."""

    model: str | None = None  # hub id, folder or GGUF file; None: the bundled default
    data: str | None = None  # as data.load_text takes it
    out: Path = Path("demo-out")
    minutes: float = 13.0
    config: DiJiangConfig = field(default_factory=DiJiangConfig)
    lengths: tuple[int, ...] = (512, 2048)
    distances: tuple[int, ...] = (200, 400)
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    train_length: int = 1024
    train: str = "attention"  # what the KL stage trains, as distill takes it
    new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """A model to convert and distill, its names in the tables and its part of the time."""

    config: DiJiangConfig
    before: str
    after: str
    folder: str
    length: int  # of a training row, one a step
    share: float  # of the training time


def students(config: DiJiangConfig, length: int) -> list[Student]:
    """The model of `config`; where that has near keys too, also one of its far keys alone."""
    if not (config.has_near and config.has_far):
        return [Student(config, CONVERTED, DISTILLED, "model", length, 1.0)]
    alone = config.replace(window=0, sinks=0, cache_size=0)
    return [
        Student(config, CONVERTED, DISTILLED, "model", length, 0.6),
        # So far from the teacher more steps are worth more than longer rows.
        Student(alone, LINEAR, LINEAR_DISTILLED, "model-far-alone", length // 2, 0.4),
    ]


@dataclass(frozen=True)
class Plan:
    """How much of everything fits into the time, from the model's own measured speed."""

    forward_tokens_per_second: float
    eval_tokens: int  # for each model and length
    trials: int  # for each model and distance
    train_seconds: float


_STAGES = {"transfer": "attention transfer", "lm": "KL to the teacher"}

# Shares of the time; what is left of 1 is for loading, calibrating, generating, decoding, plots.
_PERPLEXITY, _RECALL, _TRAINING = 0.27, 0.10, 0.40
_MODELS = 6  # measured: the teacher, the window alone, two students before and after training


def run(settings: Settings, *, reporter=None, fresh: bool = False) -> dict[str, Any]:
    """Runs the demo (see the module) and returns what it also writes to results.json.

    reporter: console.Terminal, or None for silence. fresh: forget what an earlier run left.
    Raises data.DataError when the text is too short for the lengths asked for.
    """
    begin = time.monotonic()
    job = _Demo(settings, reporter or Silent(), fresh)
    results = job.results()
    results["seconds"] = round(time.monotonic() - begin, 1)
    out = Path(settings.out)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    images = plots.draw(results, out)
    (out / "report.md").write_text(report(results, [path.name for path in images]))
    return results


def plan(settings: Settings, tokens_per_second: float) -> Plan:
    """Divides the time: more windows and trials on a faster machine, within sensible bounds."""
    seconds = 60.0 * settings.minutes
    # A converted model's forward may cost a little more than the teacher's.
    forward = tokens_per_second / (_MODELS * 1.1)
    eval_tokens = _PERPLEXITY * seconds * forward / len(settings.lengths)
    trials = _RECALL * seconds * forward / sum(distance + 40 for distance in settings.distances)
    longest = max(settings.lengths)
    return Plan(
        forward_tokens_per_second=round(tokens_per_second, 1),
        eval_tokens=int(min(max(eval_tokens // longest, 1), 8)) * longest,
        trials=int(min(max(trials, 2), 20)),
        train_seconds=round(_TRAINING * seconds, 1),
    )


class _Stages:
    """Results on disk, one file a stage, each with the settings it was made with."""

    def __init__(self, folder: Path, fresh: bool):
        self.folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: Mapping, compute: Callable[[], Any], usable=lambda: True) -> Any:
        path = self.folder / f"{name}.json"
        key = json.loads(json.dumps(key))  # as it reads back: tuples are lists
        try:
            kept = json.loads(path.read_text())
        except (OSError, ValueError):
            kept = None
        if isinstance(kept, dict) and kept.get("key") == key and usable():
            return kept["value"]
        value = compute()
        path.write_text(json.dumps({"key": key, "value": value}))
        return json.loads(path.read_text())["value"]


class _Demo:
    def __init__(self, settings: Settings, reporter, fresh: bool):
        self.settings, self.reporter = settings, reporter
        self.out = Path(settings.out)
        self.stages = _Stages(self.out / "stages", fresh)
        self.paces: dict[str, float] = {}
        self.corpus = data.load_text(settings.data)
        text = hashlib.sha256("\0".join((*self.corpus.train, *self.corpus.held_out)).encode())
        self.base = {
            "version": __version__,
            "model": settings.model,
            "text": text.hexdigest(),
            "seed": settings.seed,
        }
        self.window_config = DiJiangConfig.window_only(
            settings.config.window or 64, settings.config.sinks
        )

    # Models are made when a stage first needs them: a run with every result at hand makes none.

    @cached_property
    def _loaded(self):
        with self.reporter.stage("loading the model"):
            return load_base(self.settings.model)

    @property
    def teacher(self):
        return self._loaded[0]

    @property
    def tokenizer(self):
        return self._loaded[1]

    def _converted(self, config: DiJiangConfig):
        model = copy.deepcopy(self.teacher)
        if not config.has_near or config == self.window_config:
            return convert(model, config)
        with self.reporter.stage("spreading hard keys, calibrating far keys") as progress:
            # On training text, in a row twice as long as the longest measured: for contexts that
            # are longer than what they were calibrated on, far keys weigh too much.
            longest = max(*self.settings.lengths, self.settings.train_length)
            rows = self.train_blocks(2 * longest)[:1]
            return convert(model, config, calibration=rows, progress=progress)

    @cached_property
    def prose(self) -> torch.Tensor:
        return data.tokenize(self.corpus.held_out, self.tokenizer)

    @cached_property
    def train_tokens(self) -> torch.Tensor:
        return data.tokenize(self.corpus.train, self.tokenizer)

    def train_blocks(self, length: int) -> torch.Tensor:
        return data.cut(self.train_tokens, length, name=f"{self.corpus.name}, training part")

    def blocks(self, length: int, tokens: int) -> torch.Tensor:
        name = f"{self.corpus.name}, held-out part"
        return data.cut(self.prose, length, blocks=max(1, tokens // length), name=name)

    def results(self) -> dict[str, Any]:
        settings, get = self.settings, self.stages.get
        planned = get("plan", {**self.base, **self._planned_for}, self._plan)
        self.plan = Plan(**planned)
        self.quality: dict[str, dict[str, Any]] = {}
        self._quality(SOFTMAX, self.base, lambda: self.teacher)
        window = {**self.base, "config": self.window_config.to_dict()}
        self._quality(WINDOW, window, lambda: self._converted(self.window_config))
        recipes = students(settings.config, settings.train_length)
        trained = {s.after: self._student(s, planned) for s in recipes}
        main = trained[DISTILLED]
        key = main["key"]
        generated = get(
            "generation",
            {**key, "prompts": PROMPTS, "tokens": settings.new_tokens},
            lambda: self._generate(main["model"]()),
        )
        decode = get(
            "decode", {**key, "contexts": settings.contexts}, lambda: self._decode(main["model"]())
        )
        return {
            "settings": {
                "model": settings.model or "bundled default",
                "data": self.corpus.name,
                "characters": dict(zip(("train", "held_out"), self.corpus.characters, strict=True)),
                "minutes": settings.minutes,
                "config": settings.config.to_dict(),
                "seed": settings.seed,
            },
            "machine": machine(),
            "version": __version__,
            "plan": planned,
            "students": {name: student["done"] for name, student in trained.items()},
            "perplexity": {name: value["perplexity"] for name, value in self.quality.items()},
            "recall": {name: value["recall"] for name, value in self.quality.items()},
            "training": [row for student in trained.values() for row in student["curve"]],
            "generation": generated,
            "decode": decode,
        }

    @property
    def _planned_for(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "minutes": settings.minutes,
            "lengths": settings.lengths,
            "distances": settings.distances,
            "threads": torch.get_num_threads(),
        }

    def _plan(self) -> dict[str, Any]:
        """Measures the teacher's forward on real windows, after one to warm up."""
        blocks = self.blocks(min(self.settings.lengths), 3 * min(self.settings.lengths))
        with self.reporter.stage("measuring this machine"):
            evaluate.perplexity(self.teacher, blocks[:1])
            begin = time.perf_counter()
            evaluate.perplexity(self.teacher, blocks[1:] if len(blocks) > 1 else blocks)
            seconds = time.perf_counter() - begin
        made = plan(self.settings, max(1, len(blocks) - 1) * blocks.shape[1] / seconds)
        self.reporter.say(
            f"  {made.forward_tokens_per_second:.0f} tokens/s forward: {made.eval_tokens} tokens "
            f"a perplexity, {made.trials} pass keys a distance, "
            f"{made.train_seconds:.0f} s of training"
        )
        return asdict(made)

    def _student(self, student: Student, planned: Mapping) -> dict[str, Any]:
        """Measures, trains and measures again; the trained model is made when it is asked for."""
        settings, folder = self.settings, self.out / student.folder
        before = {**self.base, "config": student.config.to_dict(), "lengths": settings.lengths}
        key = {**before, "plan": planned, "train": settings.train}
        key |= {"length": student.length, "share": student.share}
        fresh = cached(lambda: self._converted(student.config))
        self._quality(student.before, before, fresh)
        trained: list[Any] = []

        def train():
            trained.append(fresh())
            return self._train(student, trained[0], folder)

        done = self.stages.get(f"training {student.folder}", key, train, usable=folder.is_dir)
        # As it was trained just now, or as an earlier run left it.
        model = cached(lambda: trained[0] if trained else from_pretrained(folder))
        self._quality(student.after, key, model)
        return {"key": key, "model": model, "curve": done.pop("curve"), "done": done}

    def _train(self, student: Student, model, folder: Path) -> dict[str, Any]:
        settings = self.settings
        rows = self.train_blocks(student.length)
        tokens, transfer = self._affordable_tokens(student, model, rows)
        curve: list[dict[str, Any]] = []
        with self.reporter.stage(f"{student.after}: {tokens} tokens") as progress:

            def note(row):
                stage = f"{student.after.partition(',')[0]}: {_STAGES[row['stage']]}"
                curve.append({"stage": stage, "step": row["step"], "loss": row["loss"]})
                progress(row["step"], row["steps"])

            done = distill(
                model, rows, tokens=tokens, transfer_tokens=transfer, train=settings.train,
                batch_size=1, seed=settings.seed, calibrate=False, progress=note,
            )  # fmt: skip
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return {
            "start": done.start,
            "tokens": done.tokens,
            "seconds": round(done.seconds, 1),
            "curve": curve,
        }

    def _affordable_tokens(self, student: Student, model, rows) -> tuple[int, int]:
        """What fits into its time, and of that attention transfer's."""
        share = transfer_share(student.config)
        seconds = 0.0  # a token, each stage having its share of them
        for stage, part in (("transfer", share), ("lm", 1.0 - share)):
            if part:
                seconds += part * self._pace(stage, model, rows)
        step = rows.shape[1]
        steps = max(4, int(student.share * self.plan.train_seconds / seconds / step))
        # Three times through the text at most: more would learn it by heart.
        steps = min(steps, 3 * rows.numel() // step)
        return steps * step, int(share * steps) * step

    def _pace(self, stage: str, model, rows) -> float:
        """Seconds a token of training takes, by a few short steps on a copy; timed once a run."""
        if stage not in self.paces:
            short = rows[:, : rows.shape[1] // 2]
            tokens = 3 * short.shape[1]
            timed: list[dict[str, Any]] = []
            with self.reporter.stage("timing a training step"):
                distill(
                    copy.deepcopy(model), short, tokens=tokens,
                    transfer_tokens=tokens if stage == "transfer" else 0, batch_size=1,
                    train=self.settings.train, calibrate=False, progress=timed.append,
                )  # fmt: skip
            # The first step allocates and plans: the later ones are the pace.
            first, last = timed[0], timed[-1]
            spent = last["seconds"] - first["seconds"]
            self.paces[stage] = spent / (last["tokens"] - first["tokens"])
        return self.paces[stage]

    def _quality(self, name: str, key: Mapping, model: Callable[[], Any]) -> None:
        """Perplexity at each length and recall at each distance of one model."""
        settings = self.settings
        kept = self.quality[name] = {}
        loaded = cached(model)
        for length in settings.lengths:

            def measure(length=length):
                blocks = self.blocks(length, self.plan.eval_tokens)
                with self.reporter.stage(f"{name}: perplexity at {length}") as progress:
                    return asdict(evaluate.perplexity(loaded(), blocks, progress=progress))

            stage_key = {**key, "length": length, "tokens": self.plan.eval_tokens}
            row = self.stages.get(_file(f"perplexity {name} {length}"), stage_key, measure)
            kept.setdefault("perplexity", []).append(row)
        for distance in settings.distances:

            def measure(distance=distance):
                with self.reporter.stage(f"{name}: pass key {distance} tokens back") as progress:
                    row = evaluate.pass_key_recall(
                        loaded(), self.tokenizer, self.prose, distance,
                        trials=self.plan.trials, seed=settings.seed, progress=progress,
                    )  # fmt: skip
                return asdict(row)

            stage_key = {**key, "distance": distance, "trials": self.plan.trials}
            row = self.stages.get(_file(f"recall {name} {distance}"), stage_key, measure)
            kept.setdefault("recall", []).append(row)

    def _generate(self, student) -> list[dict[str, Any]]:
        pairs = []
        with self.reporter.stage("generating side by side") as progress:
            for index, prompt in enumerate(PROMPTS):
                pair = {"prompt": prompt}
                for name, model in ((SOFTMAX, self.teacher), (DISTILLED, student)):
                    made = evaluate.generate(
                        model, self.tokenizer, prompt, max_new_tokens=self.settings.new_tokens
                    )
                    pair[name] = made.text
                pairs.append(pair)
                progress(index + 1, len(PROMPTS))
        return pairs

    def _decode(self, student) -> dict[str, list[dict[str, Any]]]:
        models = {SOFTMAX: self.teacher, DISTILLED: student}
        with self.reporter.stage("decoding behind growing contexts") as progress:
            points = evaluate.decode_speed(
                models, self.prose, self.settings.contexts, progress=progress
            )
        return {name: [asdict(point) for point in rows] for name, rows in points.items()}


def cached(make: Callable[[], Any]) -> Callable[[], Any]:
    """Calls `make` at the first call only."""
    kept: list[Any] = []

    def get():
        if not kept:
            kept.append(make())
        return kept[0]

    return get


def machine() -> str:
    """One line: processor, threads, torch."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def report(results: Mapping[str, Any], images: Sequence[str]) -> str:
    """results.json as a page: Markdown, with the plots where `images` names them."""
    settings = results["settings"]
    config = settings["config"]
    lines = [
        "# What conversion did to the model",
        "",
        f"Model: {settings['model']}. Text: {settings['data']} "
        f"({settings['characters']['train']} characters to train on, "
        f"{settings['characters']['held_out']} held out).",
        f"Conversion: `{config['feature_map']}` features, window {config['window']}, "
        f"{config['sinks']} sinks.",
        *(
            f"{name.capitalize()}: started from {student['start']}; {student['tokens']} tokens of "
            f"training in {student['seconds']:.0f} s."
            for name, student in results["students"].items()
        ),
        f"Machine: {results['machine']}; dijiang {results['version']}.",
        "",
    ]
    shown = [name for name in images if name == "summary.png"]
    lines += [f"![summary]({name})\n" for name in shown]
    lines += ["## Quality on held-out text", "", _quality_table(results), ""]
    lines += [_verdict(results), ""]
    lines += [f"![{Path(n).stem}]({n})\n" for n in images if n in ("perplexity.png", "recall.png")]
    lines += ["## Speed and memory of decoding", "", _decode_table(results["decode"]), ""]
    lines += [f"![{Path(n).stem}]({n})\n" for n in images if n == "decode.png"]
    lines += [f"## Training\n\n![training]({n})\n" for n in images if n == "training.png"]
    lines += ["## Side by side", ""]
    for pair in results["generation"]:
        for name in (SOFTMAX, DISTILLED):
            text = (pair["prompt"] + "⟶" + pair[name]).replace("\n", "\n> ")
            lines += [f"**{name}**", "", f"> {text}", ""]
    lines += [
        "Perplexity: windows without overlap, the same for each model; ± is the standard error",
        "over windows. Recall: share of the answer's tokens that were the likeliest, a five-digit",
        "key said twice before the prose. Speed: median of single steps behind a real prefill, the",
        "models in turns.",
        "",
    ]
    return "\n".join(lines)


def _verdict(results: Mapping[str, Any]) -> str:
    """What the figures say, in words: how much of the gap distillation closed."""
    said = []
    for row in zip(*(results["perplexity"][n] for n in (SOFTMAX, WINDOW, DISTILLED)), strict=True):
        teacher, window, student = (point["perplexity"] for point in row)
        text = f"At {row[0]['length']} tokens distillation ends at {student:.2f}"
        if window > teacher:
            share = 100 * evaluate.gap_closed(teacher, window, student)
            text += (
                f": {share:.0f} % of the way from the training-free window ({window:.2f}) to the "
                f"teacher ({teacher:.2f})"
            )
        said.append(text + ".")
    return " ".join(said)


def _quality_table(results: Mapping[str, Any]) -> str:
    first = results["perplexity"][SOFTMAX]
    recall = results["recall"][SOFTMAX]
    header = [
        "model",
        *(f"perplexity {row['length']}" for row in first),
        *(f"recall {row['distance']} tokens back" for row in recall),
    ]
    rows = []
    for name, points in results["perplexity"].items():
        cells = [name]
        for point in points:
            error = point["perplexity"] * point["standard_error"]
            cells.append(
                f"{point['perplexity']:.2f}" + (f" ± {error:.2f}" if error == error else "")
            )
        cells += [f"{100 * point['accuracy']:.0f} %" for point in results["recall"][name]]
        rows.append(cells)
    return _markdown(header, rows)


def _decode_table(decode: Mapping[str, Any]) -> str:
    header = [
        "context",
        "tokens/s, softmax",
        "tokens/s, ours",
        "cache MiB, softmax",
        "cache MiB, ours",
    ]
    rows = []
    for one, two in zip(decode[SOFTMAX], decode[DISTILLED], strict=True):
        speed = [f"{point['tokens_per_second']:.1f}" for point in (one, two)]
        size = [f"{point['cache_bytes'] / 2**20:.1f}" for point in (one, two)]
        rows.append([str(one["context"]), *speed, *size])
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
