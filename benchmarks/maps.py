"""The feature maps on equal terms: linear attention alone, as many features, the same training.

    python benchmarks/maps.py                        # about half an hour on two cores
    python benchmarks/maps.py --run wdcf learned     # these rows anew

No window and no sinks: every key is far, so that a map has nothing to hide behind. Each learns to
give softmax attention's outputs, its own parameters alone, on the same tokens in the same order.
Writes maps.csv: perplexity and the error of attention's outputs on held-out text, before and after.
The last rows forget, as RetNet does, and the very last goes on by KL to the teacher.
"""

from __future__ import annotations

import copy
import statistics

import torch
from common import arguments, read, table, write
from dijiang import DiJiangConfig, convert, data, distill, evaluate
from dijiang.config import FEATURE_MAPS
from quality import PROSE, Bench, Sizes, headdim_of

LENGTH = 512
TOKENS = 24576
WINDOWS = 8
COLUMNS = ("perplexity", "trained_perplexity", "error", "trained_error")
#: Softmax attention, and the window alone, stand beside.
OTHERS = {"(softmax attention)": None, "(window 64 + 4)": DiJiangConfig.window_only(64, 4)}
#: By name, the config's fields.
MAPS = {name: {"feature_map": name} for name in FEATURE_MAPS} | {
    f"{name}, decay": {"feature_map": name, "decay": "head"} for name in ("wdcf", "learned")
}
#: Eight times as many tokens, the second half of them by KL to the teacher.
LONGER = "learned, decay, longer"
MAPS[LONGER] = MAPS["learned, decay"]


def run(bench: Bench, name: str, length: int, tokens: int, windows: int) -> dict:
    held_out = data.cut(bench.held_out, length, blocks=windows)
    if name in OTHERS:
        model = bench.base
        if OTHERS[name] is not None:
            model = convert(copy.deepcopy(model), OTHERS[name])
        perplexity = evaluate.perplexity(model, held_out).perplexity
        return row(name, perplexity, None if model is bench.base else error(model, held_out))
    config = DiJiangConfig(num_features=headdim_of(bench.base), window=0, sinks=0, **MAPS[name])
    model = convert(copy.deepcopy(bench.base), config)
    before = evaluate.perplexity(model, held_out).perplexity, error(model, held_out)
    learned = sum(p.numel() for n, p in model.named_parameters() if ".dijiang." in n)
    if not learned:
        return row(name, *before)
    told = {"tokens": tokens, "transfer_tokens": tokens, "learning_rate": 1e-2}
    if name == LONGER:
        told = {"tokens": 8 * tokens, "transfer_tokens": 4 * tokens}
    distill(model, data.cut(bench.train, length), **told)
    after = evaluate.perplexity(model, held_out).perplexity, error(model, held_out)
    return row(name, *before, *after, learned, told["tokens"])


def row(
    name, perplexity=None, wrong=None, later=None, later_wrong=None, learned=None, tokens=0,
):  # fmt: skip
    def said(x):
        return "" if x is None else f"{x:.4g}"

    return {
        "map": name,
        "perplexity": said(perplexity),
        "error": said(wrong),
        "trained_perplexity": said(later),
        "trained_error": said(later_wrong),
        "parameters": learned or "",
        "tokens": tokens,
    }


def error(model, windows) -> float:
    """Of attention's outputs, relative, the mean over the layers."""
    return statistics.fmean(one.error for one in evaluate.attention_errors(model, windows))


def summary(rows) -> str:
    header = ["map", "learned numbers", "tokens", "perplexity", "trained", "error", "trained"]
    columns = ("map", "parameters", "tokens", *COLUMNS)
    cells = [["-" if one[x] in ("", 0, "0") else one[x] for x in columns] for one in rows]
    return table(header, cells)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: load_base's default")
    parser.add_argument("--data", default=PROSE, help="text file or folder")
    parser.add_argument("--run", nargs="+", metavar="MAP", choices=[*OTHERS, *MAPS], default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = (64, 128, 2) if options.quick else (LENGTH, TOKENS, WINDOWS)
    bench = Bench(options.model, options.data, Sizes({}, 0, (), 0))
    path = options.out / "maps.csv"
    kept = read(path)[1] if options.run and path.exists() else []
    rows = {one["map"]: one for one in kept}
    for name in options.run or (*OTHERS, *MAPS):
        rows[name] = run(bench, name, *sizes)
        print(summary([rows[name]]))
        write([rows[x] for x in (*OTHERS, *MAPS) if x in rows], path, f"windows of {sizes[0]}")
    print(summary(read(path)[1]))


if __name__ == "__main__":
    main()
