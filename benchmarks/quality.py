"""What a conversion keeps of its teacher, recipe by recipe: the rows of docs/quality.md.

    python benchmarks/quality.py                           # the recipes, and which have results
    python benchmarks/quality.py --run window "hard 64"    # measure some; about three minutes each
    python benchmarks/quality.py --run all                 # those that have no result yet

A recipe that has a result is measured again only in what that lacks, as long as its model is the
same: an untrained one, or one kept by --save.

A recipe is a config and what distill is told. Each leaves a JSON in benchmarks/results/quality/
with its tokens, seconds and seed; readme_table.py makes the tables of them. The model is
dijiang.load_base's (SmolLM2-135M), the text English prose: Debian's package `anarchism`, every
tenth of it held out and measured.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, arguments, machine, table
from dijiang import (
    DiJiangConfig,
    calibrate,
    convert,
    data,
    distill,
    evaluate,
    from_pretrained,
    load_base,
    restore,
    spread_hard_keys,
)
from dijiang.modules import AttentionKernel
from eviction import keep_heavy_hitters

#: What the results are of; apt-get install anarchism.
PROSE = "/usr/share/doc/anarchism/markdown"


@dataclass(frozen=True)
class Sizes:
    windows: Mapping[int, int]  # of perplexity: how many, by length
    compared: int  # the length at which the teacher's predictions are compared
    distances: tuple[int, ...]  # of recall
    trials: int
    train: Mapping[str, int] = field(default_factory=dict)  # in the place of the recipe's


FULL = Sizes({1024: 8, 2048: 4, 8192: 2}, 1024, (400, 1500, 3000), 32)
QUICK = Sizes({64: 2, 128: 1}, 64, (40, 80), 1, {"tokens": 512, "length": 512})
CALIBRATION = {"length": 4096, "rows": 1}
# Attention's own weights learn by KL to the teacher.
TRAINED = {"tokens": 32768, "length": 2048}
TEXT = TRAINED | {"lm_weight": 1.0, "kl_weight": 0.0}  # by the next token, not by the teacher
LONG = {"tokens": 299008, "length": 2048}  # as many as 30 minutes are meant to be enough for
# Many hard keys lose nothing in rows of 2048, so there is nothing to learn in them.
LONG_ROWS = {"tokens": 131072, "length": 4096}
LONGER_ROWS = {"tokens": 299008, "length": 4096}
# Far keys do harm beyond the length that they were trained on.
FAR_ROWS = {"tokens": 65536, "length": 8192}
# Features and gates learn to give softmax attention's outputs.
TRANSFER = {"tokens": 65536, "transfer_tokens": 65536, "length": 2048}
# On rows as long as the longest context measured; few of them, so at a higher rate.
FAR = {"tokens": 294912, "transfer_tokens": 294912, "length": 8192, "learning_rate": 2e-2}


@dataclass(frozen=True)
class Recipe:
    config: DiJiangConfig | None = None  # None: the teacher
    spread: str = ""  # the hard keys: by "head" or by "layer"
    calibrate: bool = False
    heavy_hitters: bool = False  # in the place of our hard keys
    repeats: bool = False  # trained on rows that repeat passages of themselves
    own_text: bool = False  # spread on what the teacher writes itself
    softmax: bool = False  # measured as the softmax model that the trained weights make
    train: Mapping[str, Any] = field(default_factory=dict)  # distill's arguments; none: untrained
    note: str = ""


def exact(**options) -> DiJiangConfig:
    """No far keys: what is not kept is lost."""
    return DiJiangConfig.window_only(64, 4, **options)


RECIPES: dict[str, Recipe] = {
    "teacher": Recipe(note="softmax attention"),
    # A window as long as the rows is softmax attention, trained as the students are.
    "teacher, text": Recipe(DiJiangConfig.window_only(2048, 0), train=TEXT, softmax=True),
    "window": Recipe(exact(), note="64 + 4 sinks"),
    "window, far": Recipe(DiJiangConfig(cache_size=0), calibrate=True, note="calibrated"),
    "window, far, transfer": Recipe(DiJiangConfig(cache_size=0), train=TRANSFER),
    "heavy hitters 64": Recipe(exact(cache_size=64), heavy_hitters=True, note="H2O's rule"),
    "hard 64": Recipe(exact(cache_size=64), note="no far keys"),
    "hard 64, far, transfer": Recipe(DiJiangConfig(cache_size=64), train=TRANSFER),
    "hard 64, spread": Recipe(exact(cache_size=64), spread="head", note="64 a head in the mean"),
    "hard 64, spread, own text": Recipe(
        exact(cache_size=64), spread="head", own_text=True, note="what the teacher writes itself"
    ),
    "hard 64, spread, trained": Recipe(exact(cache_size=64), spread="head", train=TRAINED),
    "hard 64, spread, trained 8192": Recipe(
        exact(cache_size=64), spread="head", train=FAR_ROWS, note="rows of 8192"
    ),
    "hard 64, spread, far, trained": Recipe(
        DiJiangConfig(feature_map="learned", cache_size=64, decay="head"),
        spread="head",
        train=FAR_ROWS,
        note="decay, rows of 8192",
    ),
    "hard 64, layers": Recipe(exact(cache_size=64), spread="layer", note="64 a layer in the mean"),
    "hard 64, layers, trained": Recipe(exact(cache_size=64), spread="layer", train=TRAINED),
    "hard 64, layers, trained long": Recipe(exact(cache_size=64), spread="layer", train=LONG),
    "hard 64, layers, text": Recipe(exact(cache_size=64), spread="layer", train=TEXT),
    "hard 64, layers, far, trained": Recipe(
        DiJiangConfig(feature_map="learned", cache_size=64), spread="layer", train=TRAINED
    ),
    "hard 64, layers, far, transfer": Recipe(
        DiJiangConfig(feature_map="learned", cache_size=64), spread="layer", train=FAR
    ),
    "hard 128": Recipe(exact(cache_size=128), note="as large as hard 64 with far keys"),
    "hard 128, layers": Recipe(exact(cache_size=128), spread="layer", note="128 in the mean"),
    "hard 256": Recipe(exact(cache_size=256), note="no far keys"),
    "hard 256, layers": Recipe(exact(cache_size=256), spread="layer", note="256 in the mean"),
    "hard 256, spread": Recipe(exact(cache_size=256), spread="head", note="256 in the mean"),
    # As many as fit into 128 kB a head, with all that a state holds beside them.
    "hard 336, spread": Recipe(exact(cache_size=336), spread="head", note="336 in the mean"),
    "hard 336, spread, trained": Recipe(exact(cache_size=336), spread="head", train=TRAINED),
    "hard 336, spread, trained long": Recipe(
        exact(cache_size=336), spread="head", train=LONG_ROWS, note="on rows of 4096"
    ),
    "hard 336, spread, trained longer": Recipe(
        exact(cache_size=336), spread="head", train=LONGER_ROWS, note="on rows of 4096"
    ),
    "hard 336, spread, trained on repeats": Recipe(
        exact(cache_size=336), spread="head", train=LONGER_ROWS, repeats=True, note="rows of 4096"
    ),
}


#: What is asked, as the table calls it.
KINDS = {"pass_key": "pass key", "associative": "associative", "keys": "keys of four"}


def path_of(name: str, out: Path = RESULTS) -> Path:
    return out / "quality" / f"{name.replace(', ', '_').replace(' ', '-')}.json"


def results(out: Path = RESULTS) -> dict[str, dict]:
    """The results there are, in the order of RECIPES."""
    paths = {name: path_of(name, out) for name in RECIPES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


class Bench:
    def __init__(
        self, model: str | None, text: str | None, sizes: Sizes, save: Path | None = None
    ) -> None:
        self.sizes, self.save = sizes, save
        self.base, self.tokenizer = load_base(model)
        corpus = data.load_text(text)
        self.text = corpus.name
        self.train = data.tokenize(corpus.train, self.tokenizer)
        self.held_out = data.tokenize(corpus.held_out, self.tokenizer)

    def run(self, name: str, before: dict | None = None) -> dict:
        """before: the recipe's last result. What it has measured of the very same model is kept."""
        recipe = RECIPES[name]
        saved = self.save / path_of(name).stem if self.save and recipe.train else None
        if before and saved and saved.is_dir():
            model = from_pretrained(saved)
            return before | {"measured": self.measure(model, before["measured"])}
        model, config, training = self.make(recipe)
        if saved:  # whole or not at all
            partial = saved.with_name(f"{saved.name}.partial")
            model.save_pretrained(partial)
            shutil.rmtree(saved, ignore_errors=True)  # of a run that was cut off while measuring
            partial.rename(saved)
        settings = None if config is None else config.to_dict()
        same = before and not recipe.train and before["config"] == settings
        return {
            "name": name,
            "note": recipe.note,
            "text": self.text,
            "config": settings,
            "train": dict(recipe.train),
            "training": training,
            "state_bytes": state_bytes(self.base, config),
            "measured": self.measure(model, before["measured"] if same else {}),
            "machine": machine(),
        }

    def make(self, recipe: Recipe) -> tuple[Any, DiJiangConfig | None, dict]:
        """The recipe's model, what it was converted to, and what that took."""
        model, training, config = self.base, {}, recipe.config
        if config is None:
            return model, config, training
        begin = time.monotonic()
        rows = CALIBRATION | self.sizes.train
        if recipe.own_text:
            rows = data.written_by(self.base, 2, rows["length"] // 2)
        else:
            rows = data.cut(self.train, rows["length"], blocks=rows["rows"])
        if recipe.spread:
            config = spread_hard_keys(self.base, rows, config, by=recipe.spread)
            training["calibration"] = rows.numel()
        model = convert(copy.deepcopy(self.base), config)
        if recipe.heavy_hitters:
            keep_heavy_hitters(model)
        if recipe.calibrate:
            calibrate(model, rows)
            training["calibration"] = rows.numel()
        if recipe.train:
            wanted = {**recipe.train, **self.sizes.train}
            if "transfer_tokens" in wanted:
                wanted["transfer_tokens"] = wanted["tokens"]
            rows = data.cut(self.train, wanted.pop("length"))
            if recipe.repeats:
                rows = data.with_repeats(rows)
            done = distill(model, rows, teacher=self.base, **wanted)
            training |= {"tokens": wanted["tokens"], "start": done.start}
            training["losses"] = [round(row["loss"], 5) for row in done.history]
        training["seconds"] = round(time.monotonic() - begin, 1)
        if recipe.softmax:
            model, config = restore(model), None
        return model, config, training

    def measure(self, model, kept: Mapping[str, Any]) -> dict:
        """kept: what needs no measuring, unless with more questions."""
        begin = time.monotonic()
        model.eval()
        sizes, made = self.sizes, {}
        if "perplexity" not in kept:
            prose = self.held_out
            windows = {n: data.cut(prose, n, blocks=blocks) for n, blocks in sizes.windows.items()}
            near = evaluate.agreement(model, self.base, windows[sizes.compared])
            perplexities = [
                near.student if n == sizes.compared else evaluate.perplexity(model, rows)
                for n, rows in windows.items()
            ]
            made = {
                "perplexity": [dataclasses.asdict(one) for one in perplexities],
                "kl": near.kl,
                "kl_standard_error": near.kl_standard_error,
                "top1": near.top1,
            }
        for kind, (ask, distances, options) in self.questions().items():
            if kind in kept and kept[kind][0]["trials"] >= sizes.trials:
                continue
            made[kind] = [
                dataclasses.asdict(
                    ask(model, self.tokenizer, self.held_out, distance, trials=sizes.trials,
                        **options)
                )
                for distance in distances
            ]  # fmt: skip
        seconds = round(kept.get("seconds", 0.0) + time.monotonic() - begin, 1)
        return dict(kept) | made | {"seconds": seconds}

    def questions(self) -> dict[str, tuple]:
        """By the name in a result: the task, at what distances, and its options."""
        near = self.sizes.distances
        return {
            "pass_key": (evaluate.pass_key_recall, near, {}),
            "associative": (evaluate.associative_recall, near[:2], {}),
            # Of four, as this small model can tell those apart.
            "keys": (evaluate.associative_recall, near, {"pairs": 4, "answers": "keys"}),
        }


def headdim_of(base) -> int:
    c = base.config
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def state_bytes(base, config: DiJiangConfig | None) -> int:
    """Of a key/value head after 8192 tokens in bfloat16; the mean over the layers."""
    headdim, kv_heads = headdim_of(base), base.config.num_key_value_heads
    if config is None:
        return 8192 * 2 * headdim * 2
    sizes = []
    for layer in range(base.config.num_hidden_layers):
        kernel = AttentionKernel(
            config.at(layer), heads=kv_heads, kv_heads=kv_heads, headdim=headdim
        )
        state = kernel.empty_state(1, torch.bfloat16, "cpu")
        sizes.append(sum(x.numel() * x.element_size() for x in state if x is not None))
    return round(sum(sizes) / len(sizes) / kv_heads)


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
        kl = f"{measured['kl']:.3f}"
        if all(ends) and name not in ("teacher", "window"):
            kl += f" ({100 * (1 - measured['kl'] / ends[1]['measured']['kl']):.0f} %)"
        cells += [kl, f"{100 * measured['top1']:.0f} %"]
        lines.append(cells)
    return table(header, lines)


def recall(rows: Mapping[str, dict]) -> str:
    """Answer tokens that are right, and their loss, behind so many tokens."""
    header, columns = ["recipe", "questions"], []
    for kind, name in KINDS.items():
        asked = next(
            (row["measured"][kind] for row in rows.values() if kind in row["measured"]), ()
        )
        header += [f"{name} {one['distance']}" for one in asked]
        columns += [(kind, place) for place in range(len(asked))]
    lines = []
    for name, row in rows.items():
        measured = row["measured"]
        cells = ["-"] * len(columns)
        for at, (kind, place) in enumerate(columns):
            if kind in measured:
                one = measured[kind][place]
                cells[at] = f"{100 * one['accuracy']:.0f} % ({one['loss']:.2f})"
        lines.append([name, measured["pass_key"][0]["trials"], *cells])
    return table(header, lines)


def _first(rows: Mapping[str, dict]) -> dict:
    return next((row["measured"] for row in rows.values()), {})


def summary(rows: Mapping[str, dict]) -> str:
    return f"{language(rows)}\n\n{recall(rows)}"


def draw(rows: Mapping[str, dict], path: Path) -> None:
    """What is kept by how many hard keys, chosen and spread in different ways, untrained."""
    from dijiang import plots

    kinds = {
        "hard": "as many for each head",
        "layers": "spread over the layers",
        "spread": "spread over the heads",
    }
    kinds["heavy hitters"] = "heavy hitters (H2O)"
    best, worst = (rows[end]["measured"]["perplexity"][-1] for end in ("teacher", "window"))
    series: dict[str, list[tuple[float, float]]] = {}
    if worst["perplexity"] <= best["perplexity"]:
        return  # in short windows every key is exact
    for name, row in rows.items():
        first, _, rest = name.partition(", ")
        kind = kinds.get(rest or first.rpartition(" ")[0])
        if kind is None or row["training"].get("tokens"):
            continue
        one = row["measured"]["perplexity"][-1]["perplexity"]
        closed = 100 * evaluate.gap_closed(best["perplexity"], worst["perplexity"], one)
        series.setdefault(kind, []).append((row["config"]["cache_size"], closed))
    if not series:
        return
    plots.lines(
        {name: sorted(points) for name, points in series.items()}, path, logy=False,
        title=f"Untrained, {best['length']} tokens",
        xlabel="hard keys a key/value head, the mean over the heads",
        ylabel="% of the perplexity from window to teacher closed",
    )  # fmt: skip


def draw_training(rows: Mapping[str, dict], path: Path) -> None:
    """KL to the teacher on the rows trained on, each seen once: the mean of every doubling."""
    from dijiang import plots

    series = {}
    for name, row in rows.items():
        losses, tokens = row["training"].get("losses", ()), row["training"].get("tokens")
        ends = [len(losses) >> halvings for halvings in (4, 3, 2, 1, 0)]
        by_kl = "transfer_tokens" not in row["train"] and row["train"].get("kl_weight", 1)
        if not by_kl or ends[0] < 4:  # a mean of fewer steps says little
            continue
        series[name] = [
            (round(tokens * end / len(losses)), statistics.fmean(losses[end // 2 : end]))
            for end in ends
        ]
    if series:
        plots.lines(
            series, path, title="Training by KL to the teacher", logy=False,
            xlabel="tokens (the mean since half as many)", ylabel="KL, nats a token",
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", metavar="RECIPE", default=[], help="or 'all'")
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: load_base's default")
    parser.add_argument("--data", default=PROSE, help="text file or folder")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keeps the trained models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unknown = set(options.run) - set(RECIPES) - {"all"}
    if unknown:
        parser.error(f"no recipe {', '.join(map(repr, sorted(unknown)))}")
    names = [name for name in options.run if name != "all"]
    if "all" in options.run:
        names = [name for name in RECIPES if not path_of(name, options.out).exists()]
    sizes = QUICK if options.quick else FULL
    bench = Bench(options.model, options.data, sizes, options.save) if names else None
    for name in names:
        path = path_of(name, options.out)
        row = bench.run(name, json.loads(path.read_text()) if path.exists() else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
        done = results(options.out).items()
        print(summary({n: row for n, row in done if n in ("teacher", "window", name)}))
    done = results(options.out)
    if {"teacher", "window"} <= set(done):
        draw(done, options.out / "quality.png")
    draw_training(done, options.out / "quality_training.png")
    missing = [name for name in RECIPES if name not in done]
    print(summary(done) if done else "no results yet")
    print(f"\nno result yet: {'; '.join(missing) or 'none missing'}")


if __name__ == "__main__":
    main()
