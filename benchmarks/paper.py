"""The paper's pictures for any model: speed and memory by context, training's cost, attention maps.

    python benchmarks/paper.py                              # SmolLM2-135M, about ten minutes
    python benchmarks/paper.py --model EleutherAI/pythia-410m --contexts 512,2048,8192

Three models side by side: softmax attention, the training-free window, and the model converted by
the default config. Writes paper.csv, paper_decode.png (figure 4: tokens/s and cache against the
context), paper_training.png (a step's time by length) and paper_attention.png.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from common import arguments, interleaved, table, write
from dijiang import DiJiangConfig, convert, data, evaluate, load_base, plots

SOFTMAX, WINDOW, DIJIANG = "softmax", "window", "dijiang"


def converted(base, calibration) -> dict[str, torch.nn.Module]:
    return {
        SOFTMAX: base,
        WINDOW: convert(copy.deepcopy(base), DiJiangConfig.window_only(64, 4)),
        DIJIANG: convert(copy.deepcopy(base), calibration=calibration),
    }


def decoding(models: Mapping, ids, contexts, steps: int, out) -> Iterator[dict]:
    points = evaluate.decode_speed(models, ids, contexts, steps=steps)
    rows = {name: [asdict(point) for point in line] for name, line in points.items()}
    plots.decode(rows, out / "paper_decode.png")
    for i, context in enumerate(contexts):
        softmax = rows[SOFTMAX][i]["step_ms"]
        for name in models:
            point = rows[name][i]
            yield row("decode", context, name, point["step_ms"], softmax, point["cache_bytes"])


def training(models: Mapping, ids, lengths, rounds: int, out) -> Iterator[dict]:
    """Forward, backward and no update, of one row."""

    def step(model, row):
        model.train()
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        model.zero_grad()

    series: dict[str, list] = {name: [] for name in models}
    for length in lengths:
        own = ids[None, :length]
        calls = {name: lambda m=model, x=own: step(m, x) for name, model in models.items()}
        timings = interleaved(calls, seconds=0.0, least=rounds)
        for name, timing in timings.items():
            series[name].append((length, 1e3 * timing.median / length))
            softmax = timings[SOFTMAX].median
            yield row("training step", length, name, 1e3 * timing.median, 1e3 * softmax)
    plots.lines(
        series, out / "paper_training.png", title="Training: forward and backward", logy=False,
        xlabel="tokens of a row", ylabel="ms a token",
    )  # fmt: skip


def maps(model, ids, out) -> None:
    """A head of the first, the middle and the last layer."""
    last = model.config.num_hidden_layers - 1
    heads = [(layer, 0) for layer in dict.fromkeys((0, last // 2, last))]
    plots.attention_maps(
        evaluate.attention_maps(model.eval(), ids, heads), out / "paper_attention.png"
    )


def row(kind, tokens, model, milliseconds, softmax, cache_bytes=None) -> dict:
    return {
        "kind": kind,
        "tokens": tokens,
        "model": model,
        "median_ms": f"{milliseconds:.1f}",
        "softmax_ratio": f"{softmax / milliseconds:.3g}",
        "cache_mib": "" if cache_bytes is None else f"{cache_bytes / 2**20:.1f}",
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: load_base's default")
    parser.add_argument("--data", help="text file or folder; none: Python's own help")
    parser.add_argument("--contexts", default="512,1024,2048,4096,8192")
    parser.add_argument("--lengths", default="512,2048", help="rows of the training steps")
    parser.add_argument("--rounds", type=int, default=3, help="training steps of each model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contexts = [int(x) for x in options.contexts.split(",")]
    lengths = [int(x) for x in options.lengths.split(",")]
    steps, shown, calibrated = 16, 256, 1024
    if options.quick:
        contexts, lengths, steps, shown, calibrated = [64, 128], [64, 128], 2, 64, 256

    base, tokenizer = load_base(options.model)
    corpus = data.load_text(options.data)
    calibration = data.cut(data.tokenize(corpus.train, tokenizer), calibrated, blocks=1)
    ids = data.tokenize(corpus.held_out, tokenizer)[: max(*contexts, *lengths)]
    models = converted(base, calibration)
    options.out.mkdir(parents=True, exist_ok=True)
    maps(models[DIJIANG], ids[:shown], options.out)
    rows = [*decoding(models, ids, contexts, steps, options.out)]
    write(rows, options.out / "paper.csv")  # the rest takes as long again
    rows += training(models, ids, lengths, options.rounds, options.out)
    write(rows, options.out / "paper.csv")
    print(table(list(rows[0]), [list(line.values()) for line in rows]))


if __name__ == "__main__":
    main()
