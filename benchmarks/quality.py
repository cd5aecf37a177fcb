"""What a conversion keeps of its teacher, recipe by recipe: the rows of docs/quality.md.

    python benchmarks/quality.py                           # the recipes, and which have results
    python benchmarks/quality.py --run window "hard 64"    # measure some; about three minutes each
    python benchmarks/quality.py --run all                 # those that have no result yet

A recipe is a config and what distill is told. Each leaves a JSON in benchmarks/results/quality/
with its tokens, seconds and seed; readme_table.py makes the tables of them. The model is
dijiang.load_base's (SmolLM2-135M), the text Python's own help, held-out documents measured.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, arguments, machine, table
from dijiang import DiJiangConfig, calibrate, convert, data, distill, evaluate, load_base
from dijiang.modules import AttentionKernel


@dataclass(frozen=True)
class Sizes:
    windows: Mapping[int, int]  # of perplexity: how many, by length
    compared: int  # the length at which the teacher's predictions are compared
    distances: tuple[int, ...]  # of recall
    trials: int
    train: Mapping[str, int] = field(default_factory=dict)  # in the place of the recipe's


FULL = Sizes({1024: 6, 2048: 3, 8192: 1}, 1024, (400, 1500, 3000), 8)
QUICK = Sizes({64: 2, 128: 1}, 64, (40, 80), 1, {"tokens": 256, "length": 256})
CALIBRATION = {"length": 2048, "rows": 2}
# Attention's own weights learn by KL to the teacher, features and gates with them.
TRAINED = {"tokens": 16384, "length": 2048}


@dataclass(frozen=True)
class Recipe:
    config: DiJiangConfig | None = None  # None: the teacher
    calibrate: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)  # distill's arguments; none: untrained
    note: str = ""


def exact(**options) -> DiJiangConfig:
    """No far keys: what is not kept is lost."""
    return DiJiangConfig.window_only(64, 4, **options)


RECIPES: dict[str, Recipe] = {
    "teacher": Recipe(note="softmax attention"),
    "window": Recipe(exact(), note="64 + 4 sinks"),
    "window, far": Recipe(DiJiangConfig(), calibrate=True, note="far keys calibrated"),
    "hard 64": Recipe(exact(cache_size=64), note="no far keys"),
    "hard 64, far": Recipe(DiJiangConfig(cache_size=64), calibrate=True, note="calibrated"),
    "hard 128": Recipe(exact(cache_size=128), note="as large as hard 64 with far keys"),
    "hard 256": Recipe(exact(cache_size=256), note="no far keys"),
    "hard 256, far": Recipe(DiJiangConfig(cache_size=256), calibrate=True, note="calibrated"),
    "window, trained": Recipe(exact(), train=TRAINED),
    "window, far, trained": Recipe(DiJiangConfig(), train=TRAINED),
    "hard 64, trained": Recipe(exact(cache_size=64), train=TRAINED),
    "hard 64, far, trained": Recipe(DiJiangConfig(cache_size=64), train=TRAINED),
    "hard 128, trained": Recipe(exact(cache_size=128), train=TRAINED),
    "hard 256, far, trained": Recipe(DiJiangConfig(cache_size=256), train=TRAINED),
}


def path_of(name: str, out: Path = RESULTS) -> Path:
    return out / "quality" / f"{name.replace(', ', '_').replace(' ', '-')}.json"


def results(out: Path = RESULTS) -> dict[str, dict]:
    """The results there are, in the order of RECIPES."""
    paths = {name: path_of(name, out) for name in RECIPES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


class Bench:
    def __init__(self, model: str | None, text: str | None, sizes: Sizes) -> None:
        self.sizes = sizes
        self.base, self.tokenizer = load_base(model)
        corpus = data.load_text(text)
        self.train = data.tokenize(corpus.train, self.tokenizer)
        self.held_out = data.tokenize(corpus.held_out, self.tokenizer)

    def run(self, name: str) -> dict:
        recipe = RECIPES[name]
        model, training = self.base, {}
        if recipe.config is not None:
            model = convert(copy.deepcopy(self.base), recipe.config)
            begin = time.monotonic()
            if recipe.calibrate:
                rows = CALIBRATION | self.sizes.train
                rows = data.cut(self.train, rows["length"], blocks=rows["rows"])
                calibrate(model, rows)
                training = {"calibration": rows.numel()}
            if recipe.train:
                wanted = {**recipe.train, **self.sizes.train}
                rows = data.cut(self.train, wanted.pop("length"))
                done = distill(model, rows, teacher=self.base, **wanted)
                training = {"tokens": wanted["tokens"], "start": done.start}
            training["seconds"] = round(time.monotonic() - begin, 1)
        return {
            "name": name,
            "note": recipe.note,
            "config": None if recipe.config is None else recipe.config.to_dict(),
            "train": dict(recipe.train),
            "training": training,
            "state_bytes": state_bytes(self.base, recipe.config),
            "measured": self.measure(model),
            "machine": machine(),
        }

    def measure(self, model) -> dict:
        begin = time.monotonic()
        model.eval()
        prose, tokenizer = self.held_out, self.tokenizer
        sizes = self.sizes
        windows = {n: data.cut(prose, n, blocks=blocks) for n, blocks in sizes.windows.items()}
        near = evaluate.agreement(model, self.base, windows[sizes.compared])
        perplexities = [
            near.student if n == sizes.compared else evaluate.perplexity(model, rows)
            for n, rows in windows.items()
        ]
        return {
            "perplexity": [dataclasses.asdict(one) for one in perplexities],
            "kl": near.kl,
            "kl_standard_error": near.kl_standard_error,
            "top1": near.top1,
            "pass_key": [
                dataclasses.asdict(
                    evaluate.pass_key_recall(model, tokenizer, prose, distance, trials=sizes.trials)
                )
                for distance in sizes.distances
            ],
            "associative": [
                dataclasses.asdict(
                    evaluate.associative_recall(
                        model, tokenizer, prose, distance, trials=sizes.trials
                    )
                )
                for distance in sizes.distances[:2]
            ],
            "seconds": round(time.monotonic() - begin, 1),
        }


def state_bytes(base, config: DiJiangConfig | None) -> int:
    """Of a key/value head after 8192 tokens in bfloat16."""
    c = base.config
    headdim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if config is None:
        return 8192 * 2 * headdim * 2
    kernel = AttentionKernel(config, heads=1, kv_heads=1, headdim=headdim)
    state = kernel.empty_state(1, torch.bfloat16, "cpu")
    return sum(x.numel() * x.element_size() for x in state if x is not None)


def language(rows: Mapping[str, dict]) -> str:
    """Perplexities, with the share of the gap from `window` to the teacher that is closed."""
    header = ["recipe", "tokens trained", "KiB a head"]
    header += [f"perplexity {one['length']}" for one in _first(rows).get("perplexity", ())]
    header += ["KL to the teacher", "same token"]
    ends = [rows.get(name) for name in ("teacher", "window")]
    lines = []
    for name, row in rows.items():
        measured = row["measured"]
        cells = [name, row["training"].get("tokens", 0), f"{row['state_bytes'] / 1024:.0f}"]
        for i, one in enumerate(measured["perplexity"]):
            cell = f"{one['perplexity']:.2f}"
            if all(ends) and name not in ("teacher", "window"):
                best, worst = (end["measured"]["perplexity"][i]["perplexity"] for end in ends)
                if worst > best:  # in short windows every key is exact
                    closed = evaluate.gap_closed(best, worst, one["perplexity"])
                    cell += f" ({100 * closed:.0f} %)"
            cells.append(cell)
        cells += [f"{measured['kl']:.3f}", f"{100 * measured['top1']:.0f} %"]
        lines.append(cells)
    return table(header, lines)


def recall(rows: Mapping[str, dict]) -> str:
    """Answer tokens that are right, and their loss, behind so many tokens."""
    header = ["recipe"]
    for kind, name in (("pass_key", "pass key"), ("associative", "associative")):
        header += [f"{name} {one['distance']}" for one in _first(rows).get(kind, ())]
    lines = []
    for name, row in rows.items():
        asked = row["measured"]["pass_key"] + row["measured"]["associative"]
        cells = [f"{100 * one['accuracy']:.0f} % ({one['loss']:.2f})" for one in asked]
        lines.append([name, *cells])
    return table(header, lines)


def _first(rows: Mapping[str, dict]) -> dict:
    return next((row["measured"] for row in rows.values()), {})


def summary(rows: Mapping[str, dict]) -> str:
    return f"{language(rows)}\n\n{recall(rows)}"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", metavar="RECIPE", default=[], help="or 'all'")
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: load_base's default")
    parser.add_argument("--data", help="text file or folder; none: Python's own help")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unknown = set(options.run) - set(RECIPES) - {"all"}
    if unknown:
        parser.error(f"no recipe {', '.join(map(repr, sorted(unknown)))}")
    names = [name for name in options.run if name != "all"]
    if "all" in options.run:
        names = [name for name in RECIPES if not path_of(name, options.out).exists()]
    sizes = QUICK if options.quick else FULL
    bench = Bench(options.model, options.data, sizes) if names else None
    for name in names:
        row = bench.run(name)
        path = path_of(name, options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
        done = results(options.out).items()
        print(summary({n: row for n, row in done if n in ("teacher", "window", name)}))
    done = results(options.out)
    missing = [name for name in RECIPES if name not in done]
    print(summary(done) if done else "no results yet")
    print(f"\nno result yet: {'; '.join(missing) or 'none missing'}")


if __name__ == "__main__":
    main()
