"""A whole model before and after conversion: reading a long prompt, and decoding behind it.

    python benchmarks/model.py                      # five minutes; benchmarks/results/model.csv
    python benchmarks/model.py --model HuggingFaceTB/SmolLM2-135M --length 4096

By default a LLaMA of SmolLM2-135M's shape with random weights: speed does not depend on them, and
nothing is downloaded. Softmax attention is torch's scaled_dot_product_attention; the copy is
converted with the default DiJiangConfig. Batch 1, float32, the two in turns.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from common import arguments, interleaved, table, write
from dijiang import convert, evaluate, load_base
from dijiang.modules import kernels_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SOFTMAX, DIJIANG = "softmax", "dijiang"

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
QUICK = SMOLLM2_135M | dict(vocab_size=512, intermediate_size=256, num_hidden_layers=2)


def random_model(settings: Mapping, positions: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**settings, max_position_embeddings=positions, attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


def both(softmax: nn.Module) -> dict[str, nn.Module]:
    """The model and its converted copy, whose far keys are computed though their gate is closed."""
    converted = convert(copy.deepcopy(softmax))
    if not all(kernel.num_features > 0 for kernel in kernels_of(converted)):
        raise SystemExit("model.py: the converted model has no far keys: this measures a window")
    return {SOFTMAX: softmax, DIJIANG: converted}


def prefill_call(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    def run():
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def prefill(models: Mapping[str, nn.Module], ids: torch.Tensor, rounds: int) -> Iterator[dict]:
    """The rows of reading all of `ids` (n,) at once, logits of the last position alone."""
    for model in models.values():  # a short prompt: a long one takes half a minute
        prefill_call(model, ids[None, :64])()
    calls = {name: prefill_call(model, ids[None]) for name, model in models.items()}
    timings = interleaved(calls, seconds=0.0, least=rounds, warm=False)
    for name, x in timings.items():
        ratio = timings[SOFTMAX].median / x.median
        milliseconds = (1e3 * x.median, 1e3 * x.low, 1e3 * x.high)
        yield row("prefill", ids.numel(), name, milliseconds, x.calls, ids.numel(), ratio)


def decode(models: Mapping[str, nn.Module], ids: torch.Tensor, steps: int) -> Iterator[dict]:
    """The rows of one token after another behind `ids` (n,)."""
    points = evaluate.decode_speed(models, ids, (ids.numel(),), steps=steps)
    for name, (x,) in points.items():
        ratio = points[SOFTMAX][0].step_ms / x.step_ms
        milliseconds = (x.step_ms, x.step_ms_low, x.step_ms_high)
        size = f"{x.cache_bytes / 2**20:.1f}"
        yield row("decode", ids.numel(), name, milliseconds, steps, 1, ratio, size)


def row(
    kind: str, context: int, model: str, milliseconds: tuple[float, float, float], calls: int,
    tokens: int, ratio: float, cache_mib: str = "",
) -> dict:  # fmt: skip
    """One line of the CSV: `tokens` a call, speed as a multiple of the softmax model's."""
    median, low, high = milliseconds
    return {
        "kind": kind,
        "context": context,
        "model": model,
        "median_ms": f"{median:.6g}",
        "p10_ms": f"{low:.6g}",
        "p90_ms": f"{high:.6g}",
        "calls": calls,
        "tokens_per_s": f"{1e3 * tokens / median:.4g}",
        "softmax_ratio": f"{ratio:.3g}",
        "cache_mib": cache_mib,
    }


def model_name(source: str | None) -> str:
    """As results name it: a hub id as it is, a path without the folders of this machine."""
    if source is None:
        return "random weights in the shape of SmolLM2-135M"
    return Path(source).name if Path(source).exists() else source


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a hub id, folder or GGUF file; none: random weights")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="times the prompt is read")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded behind it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length, steps = (128, 4) if args.quick else (args.length, args.steps)
    if args.model:
        models = both(load_base(args.model, tokenizer=False)[0])
    else:
        models = both(random_model(QUICK if args.quick else SMOLLM2_135M, length + steps))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models[SOFTMAX].config.vocab_size, (length,), generator=generator)
    rows = []
    for part in (prefill(models, ids, args.rounds), decode(models, ids, steps)):
        for line in part:
            rows.append(line)
            print(
                f"{line['kind']:8} {length:6} {line['model']:8} {line['median_ms']:>8} ms "
                f"{line['tokens_per_s']:>6} tokens/s, {line['softmax_ratio']} x",
                flush=True,
            )
    write(rows, args.out / "model.csv", f"model: {model_name(args.model)}")
    print()
    print(table(list(rows[0]), [list(line.values()) for line in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
