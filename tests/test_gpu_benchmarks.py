"""The benchmarks for a GPU run on the CPU, each kind of row once, and what they say of their rows.

Figures are those of the CPU's kernels and tiny sizes. What only a device has (events, graphs,
memory) is faked.
"""

import argparse
import csv
import gc
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import types
import weakref
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = ("gpu", "gpu_all", "gpu_check", "gpu_models", "gpu_report", "gpu_rows", "gpu_timing")


@pytest.fixture
def bench(monkeypatch):
    """The scripts, imported as they import each other; on the CPU even where there is a GPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    yield types.SimpleNamespace(**scripts)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def arguments(out: pathlib.Path, **more) -> argparse.Namespace:
    options = dict(quick=True, skip=0, out=out, budget=80.0, only=None, longest=64)
    return argparse.Namespace(**(options | more))


def rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        assert file.readline().startswith("# ")
        return list(csv.DictReader(file))


def chunk_linear_attn(q, k, v, scale=None, normalize=True):
    """What fla's function of this name computes: (batch, tokens, heads, dim), without normalize."""
    assert not normalize and q.shape[1] == k.shape[1] == v.shape[1] > q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.mT).tril() * scale @ v).transpose(1, 2), None


def chunk_simple_gla(q, k, v, g=None, scale=None):
    assert g.shape == q.shape[:3]
    sums = g.transpose(1, 2).cumsum(-1)
    decay = (sums[..., :, None] - sums[..., None, :]).tril().exp().to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (((q @ k.mT) * decay).tril() * q.shape[-1] ** -0.5 @ v).transpose(1, 2), None


def install_fla(monkeypatch):
    """As if it were installed."""
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for function in (chunk_linear_attn, chunk_simple_gla):
        name = "fla.ops." + function.__name__.removeprefix("chunk_")
        module = types.SimpleNamespace(**{function.__name__: function})
        monkeypatch.setitem(sys.modules, name, module)


def remove_fla(monkeypatch):
    for name in ("fla", "fla.ops", "fla.ops.linear_attn", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, None)


# ---- gpu.py --------------------------------------------------------------------------------------


def test_operators_and_their_rivals(bench, monkeypatch, tmp_path):
    """Every kind of row of the operators, and the columns that each has."""
    gpu = bench.gpu
    install_fla(monkeypatch)
    args = arguments(tmp_path)
    for name in ("operators", "decode and maps", "fla"):
        assert gpu.SUITE.run_here(name, args) == 0
    found = rows(tmp_path / gpu.FILE)
    kinds = {
        gpu.RATE, gpu.FORWARD, gpu.BACKWARD, gpu.FEW_HEADS, gpu.CONVERTED, gpu.CONVERTED_BACKWARD,
        gpu.DECODE, gpu.DCT, gpu.MAP, gpu.SIZES, gpu.SIZES_BACKWARD, gpu.FLA_FORWARD,
        gpu.FLA_BACKWARD, gpu.FLA_DECAY,
    }  # fmt: skip
    assert {row["kind"] for row in found} == kinds
    for row in found:
        assert not row["failure"] and not row["note"], row
        assert float(row["p10 ms"]) <= float(row["ms"]) <= float(row["p90 ms"])
        rivals = {
            gpu.FLA_FORWARD: {"fla", "fla given"}, gpu.FLA_BACKWARD: {"fla", "fla given"},
            gpu.FLA_DECAY: {"fla", "fla given"}, gpu.DCT: {"copy"}, gpu.MAP: {"copy"},
            gpu.RATE: set(),
        }.get(row["kind"], {"copy", "softmax"})  # fmt: skip
        if row["what"].startswith("far keys alone"):
            rivals = {"copy"}  # a token without a context
        if row["kind"] == gpu.FORWARD and row["tokens"] == str(gpu.QUICK.published):
            rivals = rivals | {"published"}
        assert {name for name in gpu.RIVALS if row[f"{name} ms"]} == rivals
        for name in rivals:
            ratio = float(row[f"{name} ms"]) / float(row["ms"])
            assert float(row[f"{name} / ours"]) == pytest.approx(ratio, rel=2e-3)
            assert f"{name} " in row["rivals p10 to p90"]
        # What the first two rows found, the others are compared with.
        assert bool(row["of copy rate"]) == (row is not found[0])
    assert len({row["what"] for row in found if row["kind"] == gpu.DECODE}) == 3
    assert "not installed" not in (tmp_path / gpu.FILE).read_text().splitlines()[0]
    assert bench.gpu_report.write(tmp_path / gpu.FILE) == 0
    for name in ("gpu_forward.png", "gpu_decode.png"):
        assert (tmp_path / name).exists()


def test_models(bench, tmp_path, capsys):
    gpu = bench.gpu
    assert gpu.SUITE.run_here("models", arguments(tmp_path)) == 0
    found = rows(tmp_path / gpu.FILE)
    wanted = [(kind, name, str(context)) for name in bench.gpu_models.TINY_MODELS
              for kind in (gpu.MODEL_MANY, gpu.MODEL_ONE)
              for context in gpu.QUICK.contexts]  # fmt: skip
    assert [(row["kind"], row["what"], row["tokens"]) for row in found] == wanted
    for row in found:
        assert not row["failure"] and not row["note"], row
        batch = "3" if row["kind"] == gpu.MODEL_MANY else "1"
        assert row["batch"] == row["softmax batch"] == batch
        fastest = [
            max(float(row[f"{name}{way}tokens/s"]) for way in ("", "graph "))
            for name in ("", "softmax ")
        ]
        ratio = float(row["throughput ratio"])
        assert ratio == pytest.approx(fastest[0] / fastest[1], rel=2e-3)
    sizes = {row["tokens"]: row["cache MiB"] for row in found if row["batch"] == "1"}
    assert len(set(sizes.values())) == 1 and len(sizes) == 2
    softmax = {float(row["softmax cache MiB"]) for row in found if row["batch"] == "1"}
    assert max(softmax) > 1.9 * min(softmax)
    assert bench.gpu_report.write(tmp_path / gpu.FILE) == 0
    assert "models, throughput against softmax, batch 1" in capsys.readouterr().out
    assert (tmp_path / "gpu_models.png").exists()


def test_fla_that_is_missing_is_said(bench, monkeypatch, tmp_path):
    remove_fla(monkeypatch)
    assert list(bench.gpu.fla_cases(arguments(tmp_path))) == []
    assert bench.gpu.SUITE.run_here("fla", arguments(tmp_path)) == 0
    first = (tmp_path / bench.gpu.FILE).read_text().splitlines()[0]
    assert "flash-linear-attention not installed, fla-core not installed" in first


def test_fla_computes_what_ours_does(bench, monkeypatch):
    """Its call, in its layout, is the same attention but for the denominator and the map."""
    gpu = bench.gpu
    install_fla(monkeypatch)
    calls = {}
    monkeypatch.setattr(
        gpu, "in_both_ways",
        lambda functions, inputs, grad, train: {
            name: (function, inputs) for name, function in functions.items()
        },
    )  # fmt: skip
    monkeypatch.setattr(gpu, "random", lambda *shape: torch.randn(shape))
    for decay in (False, True):
        calls = gpu.fla_calls(gpu.Shape(1, 2, 2, 50, 16, 8), False, decay)
        function, (q, k, v) = calls[gpu.FLA]
        given, ready = calls[gpu.FLA_GIVEN]
        assert q.shape == (1, 50, 2, 16) and ready[0].shape == (1, 50, 2, 8)
        torch.testing.assert_close(function(q, k, v), given(*ready))
        ours, tensors = calls[gpu.OURS]
        assert torch.equal(tensors[0].transpose(1, 2), q)
        assert ours(*tensors).shape == (1, 2, 50, 16)


def test_a_failure_costs_its_row(bench, monkeypatch, tmp_path):
    """Ours: the row has failed; a rival's: its columns are empty, and the note says why."""
    gpu = bench.gpu
    args = arguments(tmp_path)
    gpu.SUITE.start(tmp_path / gpu.FILE)

    def fails():
        raise torch.OutOfMemoryError("out of\nmemory")

    row = gpu.measured({gpu.OURS: fails, gpu.COPY: list}, gpu.Work(1), args)
    assert row == {"failure": "OutOfMemoryError: out of memory"}
    row = gpu.measured({gpu.OURS: list, gpu.SOFTMAX: fails}, gpu.Work(1), args)
    assert row["note"] == "softmax: OutOfMemoryError: out of memory"
    assert "softmax ms" not in row and row["ms"]

    def cases(args):
        for what, run in (("one", fails), ("two", lambda: {"ms": 1})):
            yield bench.gpu_rows.Case(gpu.named(gpu.DCT, what), run)

    monkeypatch.setitem(gpu.GROUPS, "fla", gpu.Group(gpu.FILE, cases, 60))
    assert gpu.SUITE.run_here("fla", args) == bench.gpu_rows.WRONG
    found = rows(tmp_path / gpu.FILE)
    assert [row["what"] for row in found] == ["one", "two"]
    assert found[0]["failure"] and not found[1]["failure"]
    assert bench.gpu_report.write(tmp_path / gpu.FILE) == 1


def test_softmax_without_memory_for_its_keys(bench, monkeypatch, tmp_path):
    gpu = bench.gpu
    args = arguments(tmp_path)
    gpu.SUITE.start(tmp_path / gpu.FILE)

    def none(*given):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(gpu, "softmax_token_call", none)
    layer = gpu.layers(args)[1]
    row = gpu.token_row(layer, 1, 256, args)
    assert row["note"] == "softmax: OutOfMemoryError" and row["ms"] and row["copy ms"]


def test_script_on_the_cpu(bench, tmp_path):
    """--quick, its child processes, the table and the exit status; without --quick a refusal."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = dict(capture_output=True, text=True, timeout=300, env=hidden)
    refused = subprocess.run(command, **run)
    assert refused.returncode == 1 and "no CUDA device" in refused.stderr
    # A time so short that only the first group begins, and is killed within it.
    done = subprocess.run([*command, "--quick", "--seconds", "6"], **run)
    assert done.returncode == 1, done.stderr
    assert "out of time" in done.stdout and "not measured" in done.stdout
    groups = {row["group"] for row in rows(tmp_path / "gpu.csv")}
    assert groups == set(bench.gpu.GROUPS)
    assert (tmp_path / "gpu.md").read_text().startswith("no GPU: these figures mean nothing")


def test_work_is_counted(bench):
    gpu = bench.gpu
    # q and o: 4 heads of 8; k and v: 2 of 8; 2 bytes each; 5 tokens of 3 rows.
    work = gpu.attention_work(3, 4, 2, 5, 8, 6)
    assert work.bytes == 3 * 5 * 2 * (4 * 8 * 2 + 2 * 8 * 2)
    adds = 4 * (6 * 8 + 32 * (6 + 8) + 6 * 8) + 2 * (6 * 8 + 6 * 8)
    assert work.flops == 2 * 3 * 5 * adds
    trained = gpu.attention_work(3, 4, 2, 5, 8, 6, train=True)
    assert trained == gpu.Work(3 * work.bytes, 3 * work.flops)
    near = gpu.attention_work(3, 4, 2, 5, 8, 6, (16, 4, 10))
    assert near.bytes == work.bytes
    assert near.flops - work.flops == 2 * 3 * 5 * 4 * (24 + 4 + 10) * 2 * 8
    # The whole state read and written, and the token.
    plain = gpu.decode_work(3, 4, 2, 8, 6, (0, 0, 0))
    state = dijiang_state(3, 2, 6, 8)
    assert plain.bytes == 2 * state + 3 * 2 * (2 * 4 * 8 + 2 * 2 * 8)
    windowed = gpu.decode_work(3, 4, 2, 8, 6, (16, 4, 10))
    keys = 3 * 2 * (24 + 4 + 10) * 2 * 8 * 2
    votes = 3 * 2 * 2 * 4 * (10 + 16 + 2 * 8)
    token = 3 * 2 * (2 * 4 * 8 + 2 * 2 * 2 * 8)
    assert windowed.bytes == state * 17 / 16 + keys + votes + token


def dijiang_state(batch: int, kv_heads: int, features: int, dim: int) -> int:
    """Bytes of a far state."""
    from dijiang.ops import empty_attention_state

    state = empty_attention_state(
        batch, kv_heads, features, dim, dim, window=0, sinks=0, dtype=torch.bfloat16, device="cpu"
    )
    return sum(x.numel() * x.element_size() for x in (state.kv, state.z, state.log_scale))


def test_inputs_take_turns_where_the_cache_would_hold_them(bench, monkeypatch):
    gpu = bench.gpu
    properties = types.SimpleNamespace(L2_cache_size=50)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu, "DEVICE", "cuda")
    assert [gpu.sets_for(n, 64) for n in (1, 10, 99, 100, 1000)] == [64, 10, 2, 1, 1]
    called, made = [], iter(range(9))

    def make():
        number = next(made)
        return {"a": lambda: called.append(number)}

    calls = gpu.rotating(make, 50)
    for _ in range(3):
        calls["a"]()
    assert called == [0, 1, 0]


def test_a_copy_moves_as_many_bytes(bench):
    target = bench.gpu.copy_call(4096)()
    assert 2 * target.numel() * target.element_size() == 4096


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture
def tiny(bench):
    return bench.gpu_models.model_of("tiny LLaMA", 8e10)


def test_fixed_cache_attends_as_a_growing_one(bench, tiny):
    """The same keys in a DynamicCache, and a step of each."""
    from dijiang.conversion import softmax_mode
    from transformers.cache_utils import DynamicCache

    fixed = bench.gpu_models.softmax_cache(tiny, 2, 9)
    growing = DynamicCache()
    for index, layer in enumerate(fixed.layers):
        growing.update(layer.keys[:, :, :9].clone(), layer.values[:, :, :9].clone(), index)
    ids = torch.tensor([[1], [2]])
    with softmax_mode(tiny), torch.no_grad():
        logits = [
            tiny(input_ids=ids, past_key_values=cache, use_cache=True).logits
            for cache in (fixed, growing, fixed)
        ]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0])  # each step is at the same place
    assert fixed.get_seq_length() == 9 and growing.get_seq_length() == 10


def test_softmax_steps_need_no_mask_and_leave_no_keys(bench, monkeypatch, tiny):
    """One token sees all keys: a mask would cost the rival its fast kernels."""
    models, seen, layers = bench.gpu_models, [], []
    real = torch.nn.functional.scaled_dot_product_attention
    made = models.softmax_cache

    def attention(q, k, v, attn_mask=None, **options):
        seen.append((attn_mask, k.shape[2], options.get("is_causal")))
        return real(q, k, v, attn_mask=attn_mask, **options)

    def cache(*given):
        filled = made(*given)
        layers.extend(map(weakref.ref, filled.layers))
        return filled

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setitem(models.CACHES, bench.gpu.SOFTMAX, cache)
    models.alone(tiny, bench.gpu.SOFTMAX, 256, 2)
    assert set(seen) == {(None, 257, False)}
    gc.collect()
    assert [layer() for layer in layers] == [None, None]


def test_filled_cache_decodes(bench, tiny):
    """A whole block: keys leave the window, hard keys are chosen, and all stays finite."""
    models = bench.gpu_models
    cache = models.own_cache(tiny, 2, 256)
    assert cache.nbytes() == pytest.approx(2 * models.sequence_bytes(tiny, bench.gpu.OURS, 256))
    held = sum(x.nbytes for layer in models.softmax_cache(tiny, 2, 256).layers
               for x in (layer.keys, layer.values))  # fmt: skip
    assert held == 2 * models.sequence_bytes(tiny, bench.gpu.SOFTMAX, 256)
    before = cache.layers[0].state.cache_position.clone()
    assert cache.get_seq_length() == 256
    with torch.no_grad():
        for _ in range(65):
            logits = tiny(input_ids=torch.tensor([[1], [2]]), past_key_values=cache).logits
    assert logits.isfinite().all() and cache.layers[0].state.length.tolist() == [321, 321]
    after = cache.layers[0].state.cache_position
    assert not torch.equal(after, before) and int(after.max()) < 256 and int(after.min()) >= 4


def test_one_model_at_a_time(bench, monkeypatch):
    models = bench.gpu_models
    built = []
    monkeypatch.setattr(models, "build", lambda name: built.append(name) or object())
    monkeypatch.setattr(models, "limit_memory", lambda nbytes: built.append(nbytes))
    first = models.model_of("a", 5)
    assert models.model_of("a", 5) is first
    models.model_of("b", 5)
    models.model_of("a", 5)
    assert built == [5, "a", 5, "b", 5, "a"] and len(models._held) == 1


def test_the_largest_batch_is_found_from_above(bench):
    tried = []

    def measure(batch):
        tried.append(batch)
        if batch > 80:
            raise torch.OutOfMemoryError("no")
        return {"ms": batch}

    assert bench.gpu_models.at_largest(measure, 100) == (72, {"ms": 72})
    assert tried == [100, 90, 81, 72]
    with pytest.raises(MemoryError):
        bench.gpu_models.at_largest(lambda batch: measure(1000), 2)


def test_without_a_graph_there_is_a_note(bench, monkeypatch, tiny):
    models = bench.gpu_models

    def refused(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(models, "capture", refused)
    row = models.batch_one("tiny LLaMA", 256, 8e10)
    assert row["note"].count("no CUDA graph: RuntimeError: operation not permitted") == 2
    assert "graph tokens/s" not in row and float(row["throughput ratio"]) > 0
    row = models.largest_batches("tiny LLaMA", 256, 8e10, 2)
    assert row["note"].startswith("dijiang: no CUDA graph") and row["batch"] == 2


def test_models_have_the_papers_shapes(bench):
    """By their numbers of parameters."""
    from transformers import AutoModelForCausalLM

    counts = {}
    for name, config in bench.gpu_models.MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counts[name] = round(sum(x.numel() for x in model.parameters()) / 1e6)
    assert counts == {"Pythia 410M": 405, "Pythia 2.8B": 2775, "LLaMA2 7B": 6738}


# ---- targets -------------------------------------------------------------------------------------


def report_of(bench, *given: dict) -> dict[str, tuple[str, str]]:
    """Target -> (measured, met) of rows with these columns."""
    gpu = bench.gpu
    made = [dict.fromkeys(gpu.COLUMNS, "") | {k: str(v) for k, v in row.items()} for row in given]
    table = [bench.gpu_report.judged(target, made) for target in bench.gpu_report.TARGETS]
    assert bench.gpu_report.targets_table(made).count("\n") == 1 + len(table)
    return {name: (measured, met) for name, measured, met in table}


def found(report: dict, start: str) -> tuple[str, str]:
    (value,) = (value for name, value in report.items() if name.startswith(start))
    return value


def test_targets(bench):
    gpu = bench.gpu
    forward = dict(kind=gpu.FORWARD, what="x")
    cost = "ns a token and head"
    given = [
        forward | {"tokens": 1024, "copy / ours": 0.1, "softmax / ours": 0.9},
        forward | {"tokens": 2048, "copy / ours": 0.7, "softmax / ours": 3},
        forward | {"tokens": 32768, "copy / ours": 0.65, "softmax / ours": 30, cost: 0.2},
        {"kind": gpu.FEW_HEADS, "tokens": 32768, cost: 0.3},
        {"kind": gpu.FLA_FORWARD, "tokens": 2048, "fla / ours": 2.5},
        {"kind": gpu.FLA_FORWARD, "tokens": 8192, "failure": "out of memory"},
        {"kind": gpu.DECODE, "batch": 1, "ms": 0.012},
        {"kind": gpu.DECODE, "batch": 1, "ms": 0.016},
        {"kind": gpu.DECODE, "batch": 256, "ms": 0.5, "of copy rate": 0.9},
        {"kind": gpu.DCT, "copy / ours": 0.8},
        {"kind": gpu.MAP, "copy / ours": 0.9},
        {"kind": gpu.SIZES, "what": "32 heads, headdim 64, 64 features", "ms": 1},
        {"kind": gpu.SIZES, "what": "32 heads, headdim 64, 256 features", "ms": 9},
        {"kind": gpu.SIZES, "what": "32 heads, headdim 256, 256 features", "ms": 6},
    ]
    report = report_of(bench, *given)
    assert found(report, "forward, as fast as a copy") == ("0.65 to 0.7", "yes")
    assert found(report, "forward, times as fast as FlashAttention") == ("0.9 to 30", "no")
    assert found(report, "forward, times as fast as fla") == (
        "2.5; 1 of 2 rows without it", "of what there is",
    )  # fmt: skip
    assert found(report, "forward and backward, times as fast as fla") == ("not measured", "")
    assert found(report, "1 sequence") == ("1.5", "yes")
    assert found(report, "decode, batch 1,") == ("16 to 12", "no")
    assert found(report, "decode, batch 256") == ("0.9", "yes")
    assert found(report, "dct") == ("1.25", "no")
    assert found(report, "feature map") == ("1.11", "yes")
    assert found(report, "headdim 256") == ("1.5", "reported")


def test_targets_of_models(bench):
    gpu = bench.gpu
    one = dict(kind=gpu.MODEL_ONE, what="a")
    many = dict(kind=gpu.MODEL_MANY, what="a")
    report = report_of(
        bench,
        one | {"tokens": 32768, "tokens/s": 99, "cache MiB": 5, "throughput ratio": 2},
        one | {"tokens": 2048, "tokens/s": 100, "cache MiB": 5, "throughput ratio": 0.9},
        many | {"tokens": 2048, "tokens/s": 100, "throughput ratio": 3},
        many | {"tokens": 8192, "tokens/s": 100, "throughput ratio": 12},
        many | {"tokens": 32768, "tokens/s": 50, "throughput ratio": 40},
    )
    assert found(report, "models, tokens/s at the longest") == ("0.99", "yes")
    assert found(report, "the same, largest batch") == ("0.5", "no")
    assert found(report, "models, cache") == ("1", "yes")
    assert found(report, "models, throughput at 8K") == ("12", "yes")
    assert found(report, "models, throughput against softmax, batch 1") == ("0.9 to 2", "reported")


def test_a_run_without_rows_has_a_report(bench, tmp_path, capsys):
    gpu = bench.gpu
    gpu.SUITE.start(tmp_path / gpu.FILE)
    assert bench.gpu_report.write(tmp_path / gpu.FILE) == 0
    assert "not measured" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


# ---- processes -----------------------------------------------------------------------------------

SCRIPT = """
import argparse, os, pathlib, sys, time
sys.path.insert(0, {benchmarks!r})
import gpu_rows
from gpu_rows import Case, Group, Suite

def cases(args):
    def fault():
        gpu_rows.usable = lambda: False
        raise RuntimeError("an illegal memory access")
    for name, run in (
        ("good", lambda: {{"value": 1}}), ("fault", fault), ("after", lambda: {{"value": 2}}),
        ("dies", lambda: os._exit(7)), ("last", lambda: {{"value": 3}}),
    ):
        yield Case({{"what": name}}, run)

suite = Suite(
    script=__file__, columns={{"x.csv": ("group", "what", "value", "failure")}},
    groups={{"one": Group("x.csv", cases, 100)}}, options=lambda args: ["--more", "5"],
    failed=lambda row: bool(row.get("failure")), failure=lambda file, text: {{"failure": text}},
    header=lambda: "here",
)
parser = argparse.ArgumentParser()
for name in ("--skip", "--more"):
    parser.add_argument(name, type=int, default=0)
parser.add_argument("--only")
parser.add_argument("--out", type=pathlib.Path)
args = parser.parse_args()
if args.only:
    assert args.more == 5
    sys.exit(suite.run_here(args.only, args))
suite.start(args.out / "x.csv")
suite.run_apart("one", args, time.monotonic() + 100)
"""


def test_a_fault_costs_one_row(tmp_path):
    """A poisoned process is left, a dead one replaced; each time the next case goes on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    command = [sys.executable, script, "--out", tmp_path]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = [(row["what"], row["value"], row["failure"]) for row in rows(tmp_path / "x.csv")]
    assert found == [
        ("good", "1", ""),
        ("fault", "", "RuntimeError: an illegal memory access"),
        ("after", "2", ""),
        ("case 3", "", "its process ended with status 7"),
        ("last", "3", ""),
    ]


# ---- the device's part, faked --------------------------------------------------------------------


@pytest.fixture
def device(bench, monkeypatch):
    """gpu_timing as on a device that takes 2 ms for everything; what is called, in order."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, other):
            return 2.0

    class Graph:
        def replay(self):
            calls.append("replay")

    class Capturing:
        def __init__(self, graph):
            assert isinstance(graph, Graph)

        def __enter__(self):
            calls.append("begin")

        def __exit__(self, *error):
            calls.append("end")

    fakes = dict(
        Event=Event, CUDAGraph=Graph, graph=Capturing, _sleep=lambda n: calls.append("sleep"),
        synchronize=lambda: None, empty_cache=lambda: calls.append("empty"),
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 2**20,
        max_memory_allocated=lambda: 5 * 2**20,
        get_device_properties=lambda index: types.SimpleNamespace(total_memory=160),
        set_per_process_memory_fraction=lambda part: calls.append(part),
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    monkeypatch.setattr(bench.gpu_timing, "DEVICE", "cuda")
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device=None: real(n))
    return calls


def test_launches_are_queued_while_the_device_sleeps(bench, device):
    timing = bench.gpu_timing
    assert timing.device_milliseconds(lambda: device.append("call"), 1e-4) == 2.0
    assert device == ["sleep", "record", "call", "record", "wait"]


def test_steps_are_not_waited_for(bench, device):
    assert bench.gpu_timing.step_milliseconds(lambda: device.append("step"), 3) == [2.0] * 3
    assert device == ["record"] + ["step", "record"] * 3


def test_a_graph_is_captured_after_warming_up(bench, device):
    replay = bench.gpu_timing.capture(lambda: device.append("call"))
    assert device == ["call"] * 3 + ["begin", "call", "end"]
    replay()
    assert device[-1] == "replay"


def test_a_graph_keeps_what_it_reads(bench, device):
    """Its tensors' memory would else be given to others, while replays write to it."""
    tensor = torch.zeros(1)
    held = weakref.ref(tensor)
    replay = bench.gpu_timing.capture(partial(tensor.add_, 1))
    del tensor
    gc.collect()
    assert held() is not None
    del replay
    gc.collect()
    assert held() is None


def test_memory_is_measured_and_limited(bench, device):
    timing = bench.gpu_timing
    assert timing.peak_memory(lambda: None) == 4.0
    timing.limit_memory(80)
    timing.limit_memory(320)
    assert device == [0.5, 1.0]


def test_times_in_turn(bench, device):
    def fails():
        raise torch.OutOfMemoryError("no")

    functions = {"a": lambda: device.append("a"), "b": fails, "c": lambda: device.append("c")}
    times = bench.gpu_timing.timed(functions, rounds=3)
    assert times["b"] == "OutOfMemoryError: no" and "empty" in device
    assert (times["a"].median, times["a"].low, times["a"].high) == (2.0, 2.0, 2.0)
    assert [x for x in device if x in ("a", "c")][-6:] == ["a", "c"] * 3


def test_a_lost_device_ends_the_process(bench, device, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not bench.gpu_timing.usable()
    with pytest.raises(RuntimeError, match="illegal"):
        bench.gpu_timing.timed({"a": lost})


def test_percentiles(bench):
    assert bench.gpu_timing.percentiles(range(100, 0, -1)) == (50.5, 11, 90)
    assert bench.gpu_timing.percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert math.isnan(bench.gpu_timing.most_allocated())  # not on a device


# ---- gpu_check.py --------------------------------------------------------------------------------


def test_smoke(bench, capsys, monkeypatch):
    check = bench.gpu_check
    assert check.smoke() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and all(line.endswith(": ran") for line in lines)
    assert {line.split(", ")[-1] for line in lines} == {"bfloat16: ran", "float32: ran"}

    def broken(dtype):
        raise RuntimeError("no kernel")

    cases = [("a", broken), ("b", lambda dtype: [torch.tensor(math.nan)])]
    monkeypatch.setattr(check, "smoke_cases", lambda: cases)
    assert check.smoke() == 1
    said = capsys.readouterr().out
    assert "a, float32: FAILED: RuntimeError: no kernel" in said
    assert "b, bfloat16: FAILED: not finite" in said


def test_checks_and_timings_of_gpu_check(bench, monkeypatch, tmp_path):
    """A group of each file: rows as they are on a device."""
    check = bench.gpu_check
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no device", raising=False)

    def checks(args):
        return check.cases_of([check.linear_problem(None, "")])

    def timings(args):
        for train in (False, True):
            make = partial(check.window_calls, 64, 64, 64, True, train, "bfloat16")
            head = {"what": "near", "tokens": 64}
            yield check.Case(head, partial(check.beside_softmax, make, True))
        make = partial(check.token_calls, 64, True)
        yield check.Case({"what": "token"}, partial(check.beside_softmax, make, False))

    def far(args):
        head = {"what": "far", "path": "", "tokens": 64}
        yield check.Case(head, partial(check.time_far, 1, 2, 64, "bfloat16", True))

    for file, cases in ((check.CHECKS, checks), (check.TIMINGS, timings), (check.FAR_TIMINGS, far)):
        monkeypatch.setitem(check.GROUPS, "maps", check.Group(file, cases, 60))
        assert check.SUITE.run_here("maps", arguments(tmp_path)) == 0
        found = rows(tmp_path / file)
        assert found and not any(row["failure"] for row in found)
    assert all(row["holds"] == "yes" for row in rows(tmp_path / check.CHECKS))
    for row in rows(tmp_path / check.TIMINGS):
        assert float(row["softmax / dijiang"]) > 0 and float(row["dijiang host ms"]) > 0
    (row,) = rows(tmp_path / check.FAR_TIMINGS)
    assert float(row["copy / call"]) > 0


@pytest.mark.parametrize("option", ["--no-timing", "--only-timing"])
def test_parts_of_gpu_check(bench, monkeypatch, tmp_path, option):
    check = bench.gpu_check
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no device", raising=False)
    ran = []
    monkeypatch.setattr(
        check.Suite, "run_apart", lambda self, name, args, end: ran.append(self.groups[name].file)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", option, "--out", str(tmp_path)])
    assert check.main() == 0
    assert set(ran) == (
        {check.CHECKS} if option == "--no-timing" else {check.TIMINGS, check.FAR_TIMINGS}
    )
    assert {path.name for path in tmp_path.iterdir()} == set(ran)


# ---- gpu_all.py ----------------------------------------------------------------------------------

FACTS = {"cuda_device": "H200", "cuda_kernels": "built", "usable": "cpu, cuda"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_all_parts_go_on(bench, monkeypatch, tmp_path, capsys):
    """One fails, one hangs with a child of its own, one is not there: the next run all the same."""
    every = bench.gpu_all
    Part = every.Part
    late = tmp_path / "late"
    child = tmp_path / "child.py"
    child.write_text(f"import pathlib, time; time.sleep(9); pathlib.Path({str(late)!r}).touch()")
    parent = f"import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}])"
    parts = [
        Part(every.FACTS, python(f"print('a warning'); print({json.dumps(FACTS)!r})"), 60),
        Part("fails", python("print('this went wrong'); raise SystemExit(3)"), 60),
        Part("hangs", python(parent), 5),
        Part("memcheck", ["no-such-sanitizer"], 60),
        Part("gpu", python("import os, sys; print('table', os.environ['A'], sys.argv)"), 60,
             {"A": "b"}),
        Part("timing", python("print(1)"), 2),
    ]  # fmt: skip
    monkeypatch.setattr(every, "parts", lambda out: parts)
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--out", str(tmp_path / "out")])
    begin = time.monotonic()
    assert every.main() == 1
    assert time.monotonic() - begin < 60
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    said = {line.split()[0]: line.split(" s  ")[1] for line in lines}
    assert said == {
        "facts": "CUDA operators built, device H200",
        "fails": "FAILED: exit status 3",
        "hangs": "FAILED: out of time after 5 s",
        "memcheck": "left out: no-such-sanitizer is not on PATH",
        "gpu": "went well",
        "timing": "FAILED: no time was left",
    }
    out = capsys.readouterr().out
    assert "this went wrong" in out and "table b ['-c', '--seconds', '45.0']" in out
    assert out.endswith((tmp_path / "out" / "summary.txt").read_text())
    time.sleep(5)
    assert not late.exists()  # the child went with its parent


def test_all_is_well_without_a_sanitizer(bench, monkeypatch, tmp_path):
    every = bench.gpu_all
    parts = [every.Part("memcheck", ["no-such-sanitizer"], 60)]
    monkeypatch.setattr(every, "parts", lambda out: parts)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_all.py"])
    assert every.main() == 0
    assert "left out" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (FACTS | {"usable": "cpu", "cuda_device": "none usable"},
         "FAILED: CUDA operators built, device none usable"),
        (FACTS | {"usable": "cpu", "cuda_kernels": "not usable: a CPU build"},
         "FAILED: CUDA operators not usable: a CPU build, device H200"),
        (None, "FAILED: no facts in facts.txt"),
    ],
)  # fmt: skip
def test_facts_against_going_on(bench, tmp_path, facts, said):
    text = "Error" if facts is None else json.dumps(facts)
    (tmp_path / "facts.txt").write_text(text)
    assert bench.gpu_all.judged_facts(tmp_path) == said


def test_parts_are_commands_that_their_scripts_take(bench, monkeypatch, tmp_path):
    """On this machine they stop at the missing device, none at an unknown option."""
    parts = {part.name: part for part in bench.gpu_all.parts(tmp_path)}
    assert list(parts) == ["facts", "check", "memcheck", "racecheck", "gpu", "timing"]
    assert sum(part.seconds for part in list(parts.values())[:4]) < 470
    for name in ("check", "memcheck", "gpu", "timing"):
        command = list(parts[name].command)
        script = next(x for x in command if str(x).endswith(".py"))
        argv = command[command.index(script) :]
        argv += [] if name == "memcheck" else ["--seconds", "5"]
        monkeypatch.setattr(sys, "argv", argv)
        main = sys.modules[pathlib.Path(script).stem].main
        with pytest.raises(SystemExit, match="no CUDA device"):
            main()
