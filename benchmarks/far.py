"""What far keys are worth beside hard keys, a layer at a time: error by position in the context.

    python benchmarks/far.py                # about a quarter of an hour on two cores

Some layers' queries, keys and values of whole windows are kept, under softmax attention; then the
far keys of one layer after the other are calibrated on rows of a length, trained to give softmax
attention's outputs there, and measured on held-out windows. Nothing else moves. The exact keys are
those of quality.py's "hard 64, layers", whose sizes are taken from its result. Writes far.csv: the
relative squared error of attention's outputs by position, the mean over the layers.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import arguments, read, table, write
from dijiang import DiJiangConfig, convert, data
from dijiang.attention import kernel_mode
from dijiang.calibration import calibrate_gate
from dijiang.conversion import only_last_logits
from dijiang.modules import AttentionKernel, kernels_by_layer
from quality import PROSE, Bench, Sizes, headdim_of, path_of

LAYERS = (9, 15, 22)
LENGTH, EDGES = 8192, (128, 1024, 2048, 4096, 8192)
TRAIN, TEST, STEPS = 4, 2, 32
RATE = 2e-2  # distill's
#: Name: (more hard keys, features, decay, length of the rows, trained).
FORMS = {
    "no far keys": (0, 0, None, 0, False),
    "64 hard keys more": (64, 0, None, 0, False),
    "128 hard keys more": (128, 0, None, 0, False),
    "calibrated on 1024": (0, 64, None, 1024, False),
    "calibrated on 8192": (0, 64, None, 8192, False),
    "trained on 1024": (0, 64, None, 1024, True),
    "trained on 1024, decay": (0, 64, "head", 1024, True),
    "trained on 8192": (0, 64, None, 8192, True),
    "trained on 8192, decay": (0, 64, "head", 8192, True),
    "trained on 8192, 16 features": (0, 16, None, 8192, True),
    "trained on 8192, 128 features": (0, 128, None, 8192, True),
}


@torch.no_grad()
def capture(bench: Bench, config: DiJiangConfig, layers, length: int):
    """By layer: (q, k, v, softmax attention's output) of training and of held-out windows."""
    model = convert(copy.deepcopy(bench.base), config)
    seen: dict[int, tuple] = {}

    def keep(layer):
        def hook(kernel, args, kwargs):
            seen[layer] = args

        return hook

    kernels = kernels_by_layer(model)
    for layer in layers:
        kernels[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
    found = {layer: ([], []) for layer in layers}
    for part, ids, count in ((0, bench.train, TRAIN), (1, bench.held_out, TEST)):
        for row in data.cut(ids, length, blocks=count):
            with kernel_mode(model, "compare"):
                model(input_ids=row[None], use_cache=False, **only_last_logits(model))
            for layer in layers:
                qkv = seen[layer]
                teacher = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
                found[layer][part].append((*qkv, teacher))
    return found


def made(bench: Bench, config: DiJiangConfig, layer: int, rows, form, length: int):
    """One layer's kernel, its far keys calibrated and trained as the form says."""
    more, features, decay, own_length, trained = form
    config = config.at(layer)
    far = dict(feature_map="learned_pm", num_features=features, decay=decay) if features else {}
    c = bench.base.config
    kernel = AttentionKernel(
        config.replace(cache_size=config.cache_size + more, **far), heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads, headdim=headdim_of(bench.base), seed=layer,
    )  # fmt: skip
    n = min(own_length, length)
    rows = [tuple(x[:, :, :n] for x in row) for row in rows]
    for row in rows if features else ():
        calibrate_gate(kernel, *row)
    if not trained:
        return kernel
    quick = [kernel.gate, *([kernel.decay] if decay else [])]
    slow = [p for p in kernel.parameters() if not any(p is one for one in quick)]
    groups = [{"params": slow, "lr": RATE}, {"params": quick, "lr": 20 * RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        *qkv, teacher = rows[step % len(rows)]
        loss = (kernel(*qkv) - teacher).square().mean() / teacher.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return kernel


@torch.no_grad()
def errors(kernel, rows, edges) -> list[float]:
    """Relative squared error between edges."""
    error = size = 0
    for *qkv, teacher in rows:
        error = error + (kernel(*qkv) - teacher).square().sum((0, 1, 3))
        size = size + teacher.square().sum((0, 1, 3))
    return [float(error[a:b].sum() / size[a:b].sum()) for a, b in itertools.pairwise(edges)]


def measured(bench: Bench, config: DiJiangConfig, layers, length: int, edges) -> Iterator[dict]:
    kept = capture(bench, config, layers, length)
    for name, form in FORMS.items():
        found = []
        for layer, (train, test) in kept.items():
            kernel = made(bench, config, layer, train, form, length)
            found.append(errors(kernel, test, edges))
        means = map(statistics.fmean, zip(*found, strict=True))
        by_position = zip(edges[1:], means, strict=True)
        yield {"far keys": name} | {f"to {end}": f"{mean:.4f}" for end, mean in by_position}


def summary(rows) -> str:
    return table(list(rows[0]), [list(row.values()) for row in rows])


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: load_base's default")
    parser.add_argument("--data", default=PROSE, help="text file or folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, length, edges = LAYERS, LENGTH, EDGES
    config = DiJiangConfig.window_only(16, 4, cache_size=8)
    if options.quick:
        layers, length, edges = (0, 1), 256, (64, 128, 256)
    else:
        config = json.loads(path_of("hard 64, layers").read_text())["config"]
        config = DiJiangConfig.from_dict(config)
    bench = Bench(options.model, options.data, Sizes({}, 0, (), 0))
    rows = []
    for row in measured(bench, config, layers, length, edges):
        rows.append(row)
        print(summary(rows[-1:]))
        note = f"layers {', '.join(map(str, layers))}, {STEPS} steps of a row"
        write(rows, options.out / "far.csv", note)
    print(summary(read(options.out / "far.csv")[1]))


if __name__ == "__main__":
    main()
