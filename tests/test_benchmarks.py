"""The benchmarks run in their quick mode, and the README's tables are those of their results."""

import csv
import json
import pathlib
import subprocess
import sys
import types

import pytest
from tiny import tiny_llama

pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(name: str, out: pathlib.Path, *more) -> list[dict[str, str]]:
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--out", out, "--threads", "2"]
    command += more
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    assert done.returncode == 0, done.stderr
    with (out / f"{name}.csv").open() as file:
        assert "threads, torch" in file.readline()
        rows = list(csv.DictReader(file))
    for value in rows[-1].values():
        assert value in done.stdout  # the table shows what the file holds
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tests of this file leave results for test_tables_of_a_new_run."""
    return tmp_path_factory.mktemp("results")


def test_cpu(folder):
    rows = run("cpu", folder)
    kinds = ["forward", "forward+backward", "decode", "forward by threads"]
    kinds += ["forward+backward by threads", "forward by dtype"]
    assert list(dict.fromkeys(row["kind"] for row in rows)) == kinds
    assert all(
        float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"]) for row in rows
    )
    for row in rows:
        if row["form"].startswith("torch scaled"):
            assert float(row["sdpa_ratio"]) == 1.0
        # Only where the machine's limits were measured in the same turns.
        linear = row["form"] == "dijiang, linear"
        limited = linear and row["kind"] in ("forward", "forward by threads")
        assert bool(row["floor_fraction"]) == limited
        assert not limited or float(row["floor_fraction"]) > 0
        assert row["threads"] == "2" or row["kind"].endswith(" by threads")
    learned = [row["kind"] for row in rows if row["form"].endswith("learned_pm")]
    assert learned == ["forward"] * 2 + ["forward+backward"] * 2
    for kind in ("forward by threads", "forward+backward by threads"):
        assert {row["threads"] for row in rows if row["kind"] == kind} == {"1", "2"}
    for name in ("forward", "backward", "decode"):
        assert (folder / f"cpu_{name}.png").exists()


def test_memory(tmp_path):
    rows = run("memory", tmp_path)
    assert len({row["form"] for row in rows}) == 4
    assert all(float(row["peak_mib"]) >= 0 for row in rows)
    assert (tmp_path / "memory.png").exists()


def test_dct(folder):
    rows = run("dct", folder)
    forms = {row["form"] for row in rows}
    ours = {"dijiang dct", "matrix product", "copy", "clone"}
    assert forms - {"torch-dct"} == ours | {f"{form}, bfloat16" for form in ours}
    for row in rows:
        if row["form"].startswith("copy"):
            assert float(row["copy_ratio"]) == 1.0
        if row["form"].endswith("bfloat16"):
            assert row["n"] == "64"
    assert (folder / "dct.png").exists()


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    """Arguments."""
    folder = tmp_path_factory.mktemp("model_and_text")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Note {i}: " + "the cat sat on the mat " * 9 for i in range(90)))
    return ["--model", tiny_llama(folder / "model"), "--data", text]


def test_paper(tmp_path, model_and_text):
    rows = run("paper", tmp_path, *model_and_text)
    for kind in ("decode", "training step"):
        own = [row for row in rows if row["kind"] == kind]
        assert {row["model"] for row in own} == {"softmax", "window", "dijiang"}
        assert all(float(row["softmax_ratio"]) == 1 for row in own if row["model"] == "softmax")
    assert {path.name for path in tmp_path.glob("paper_*.png")} == {
        "paper_decode.png", "paper_training.png", "paper_attention.png",
    }  # fmt: skip


def test_maps(tmp_path, model_and_text):
    rows = run("maps", tmp_path, *model_and_text)
    rows = {row["map"]: row for row in rows}
    assert len(rows) == 15
    for name, row in rows.items():
        assert bool(row["trained_error"]) == bool(row["parameters"])
        if row["parameters"]:
            assert float(row["trained_error"]) < float(row["error"]), name
    assert int(rows["wdcf"]["parameters"]) < int(rows["learned"]["parameters"])
    again = run("maps", tmp_path, *model_and_text, "--run", "learned")  # the others stay
    assert {row["map"]: row for row in again} == rows


def test_far(tmp_path, model_and_text):
    rows = {row.pop("far keys"): row for row in run("far", tmp_path, *model_and_text)}
    errors = {name: float(row["to 256"]) for name, row in rows.items()}
    # Weights of a random model are nearly equal: far keys of any features know that.
    assert errors["calibrated on 8192"] < 0.01 * errors["no far keys"]
    assert errors["trained on 8192"] < 0.01 * errors["no far keys"]
    assert errors["64 hard keys more"] != errors["128 hard keys more"]


def test_quality(tmp_path, model_and_text):
    command = [
        sys.executable, BENCHMARKS / "quality.py", "--quick", "--out", tmp_path, "--threads", "2",
        *model_and_text, "--run", "teacher", "window", "heavy hitters 64",
        "hard 64, spread, trained", "hard 64, far, transfer", "hard 64, spread, own text",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "quality").glob("*.json")
    }
    assert set(rows) == {
        "teacher", "window", "heavy-hitters-64", "hard-64_spread_trained", "hard-64_far_transfer",
        "hard-64_spread_own-text",
    }  # fmt: skip
    assert rows["teacher"]["measured"]["kl"] < 1e-6
    trained = rows["hard-64_spread_trained"]
    assert trained["config"]["cache_size"] == 64 and trained["training"]["tokens"] == 512
    assert trained["config"]["per_layer"]
    assert rows["heavy-hitters-64"]["state_bytes"] > rows["window"]["state_bytes"]
    # A window of 64 + 64 sees all of 64 tokens.
    for length, equal in ((64, True), (128, True)):
        teacher, window = (
            next(x["perplexity"] for x in rows[name]["measured"]["perplexity"]
                 if x["length"] == length)
            for name in ("teacher", "window")
        )  # fmt: skip
        assert (abs(teacher - window) < 1e-3 * teacher) == equal
    assert f"{trained['measured']['kl']:.3f}" in done.stdout


def test_training_curves(bench, tmp_path, monkeypatch):
    """Means since half as many tokens; transfer and text have other losses."""
    from dijiang import plots

    drawn = []
    monkeypatch.setattr(plots, "lines", lambda series, path, **words: drawn.append(series))
    training = {"losses": [float(i) for i in range(64)], "tokens": 640}
    rows = {
        "kl": {"training": training, "train": {"tokens": 640}},
        "short": {"training": training | {"losses": [1.0] * 63}, "train": {}},
        "transfer": {"training": training, "train": {"transfer_tokens": 640}},
        "text": {"training": training, "train": {"lm_weight": 1.0, "kl_weight": 0.0}},
        "untrained": {"training": {}, "train": {}},
    }
    bench.quality.draw_training(rows, tmp_path / "x.png")
    assert drawn == [{"kl": [(40, 2.5), (80, 5.5), (160, 11.5), (320, 23.5), (640, 47.5)]}]


@pytest.mark.parametrize("size", [3, 100])
def test_heavy_hitters(bench, size):
    """The rule as it is written, on T x T weights; and enough slots are softmax attention."""
    import torch
    from dijiang import DiJiangConfig
    from dijiang.reference import held_keys

    w, sinks, T = 8, 2, 45
    config = DiJiangConfig.window_only(w, sinks, cache_size=size)
    kernel = bench.eviction.HeavyHitters(config, heads=4, kv_heads=2, headdim=16)
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, heads, T, 16) for heads in (4, 2, 2))
    out = kernel(q, k, v)
    p = torch.arange(T)
    near = (p < sinks) | (p[:, None] // w - p // w <= 1)
    causal = p <= p[:, None]
    for b in range(2):
        scores = (q[b] @ k[b].repeat_interleave(2, 0).mT / 4).masked_fill(~causal, -torch.inf)
        seen = near.expand(2, T, T).clone()
        for block in range(2, -(-T // w)):
            past = block * w
            weights = scores.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf).softmax(-1)
            mass = weights[:, :past].sum(1).unflatten(0, (2, 2)).sum(1)
            before = seen[:, past - 1] if block > 2 else torch.zeros_like(seen[:, 0])
            able = before | (p >= past - 2 * w)
            able &= (p >= sinks) & (p < past - w)
            best = mass.masked_fill(~able, -1).topk(min(size, T)).indices
            kept = torch.zeros_like(able).scatter_(1, best, True) & able
            seen[:, past : past + w] |= kept[:, None]
        chosen = kernel._table(q[b], k[b])
        for block in range(-(-T // w)):
            table = held_keys(chosen[:, block], T)
            at = block * w
            far = seen[:, at] & (p < max(at - w, 0)) & (p >= sinks)
            assert torch.equal(table, far)
        weights = scores.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf).softmax(-1)
        expected = weights @ v[b].repeat_interleave(2, 0)
        torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-4)
        if size >= T:
            assert torch.equal(seen & causal, causal.expand(2, T, T))


def test_model(folder):
    pytest.importorskip("transformers")
    rows = run("model", folder)
    named = [(row["kind"], row["model"]) for row in rows]
    assert named == [(k, m) for k in ("prefill", "decode") for m in ("softmax", "dijiang")]
    for row in rows:
        assert float(row["tokens_per_s"]) > 0
        assert row["model"] != "softmax" or float(row["softmax_ratio"]) == 1.0
        assert bool(row["cache_mib"]) == (row["kind"] == "decode")


@pytest.fixture
def bench(monkeypatch):
    """The scripts, imported as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import cpu
    import dct
    import eviction
    import floor
    import formulas
    import maps
    import quality
    import readme_table
    import rivals

    scripts = (common, cpu, dct, eviction, floor, formulas, maps, quality, readme_table, rivals)
    yield types.SimpleNamespace(**{script.__name__: script for script in scripts})
    for script in scripts:
        sys.modules.pop(script.__name__)


def causal_dot_product(q, k, v):
    """What the function of this name in fast-transformers computes."""
    return (q @ k.mT).tril() @ v


def test_the_compared_formulas_are_one_function(bench):
    """What is timed beside ours computes the same: chunked, T x T, step by step, and ours."""
    import torch
    from dijiang import ops

    formulas = bench.formulas
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 70, 16, dtype=torch.float64)
    omega = torch.randn(2, 8, 16, dtype=torch.float64) / 4
    expected = formulas.linear_quadratic(q, k, v, omega)
    given = [formulas.features(x, omega) for x in (q, k)]
    made = formulas.linear_product(*given, v, causal_dot_product)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(formulas.linear_chunked(q, k, v, omega, chunk=32), expected)
    state = torch.zeros(1, 2, 8, 17, dtype=torch.float64)
    token = [
        formulas.linear_step(*(x[:, :, t : t + 1] for x in (q, k, v)), omega, state)
        for t in range(70)
    ]
    torch.testing.assert_close(torch.cat(token, 2), expected, rtol=1e-4, atol=1e-4)
    phi = ops.FeatureParams(omega)
    ours = ops.kernelized_attention(q, k, v, phi, phi, scale=1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(formulas.softmax_quadratic(q, k, v), softmax)


def test_interleaved_times_each_for_long_enough(bench):
    import time

    common = bench.common
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.004)

    def fast():
        order.append("fast")
        time.sleep(0.001)

    timings = common.interleaved({"slow": slow, "fast": fast}, seconds=0.02)
    assert order[2:6] == ["slow", "fast", "slow", "fast"]  # after a first call of each
    for name, seconds in (("slow", 0.004), ("fast", 0.001)):
        assert timings[name].low <= timings[name].median <= timings[name].high
        assert timings[name].median >= seconds
        assert timings[name].calls == order.count(name) - 1 >= 3
    assert timings["fast"].calls > timings["slow"].calls  # each until it has had its time


def test_interleaved_calls_what_comes_before_outside_the_time(bench):
    import time

    order = []

    def before(name):
        order.append(("before", name))
        time.sleep(0.02)

    functions = {name: lambda name=name: order.append(("call", name)) for name in (1, 2)}
    timings = bench.common.interleaved(functions, seconds=0.0, least=2, before=before, warm=False)
    assert order == [(what, name) for name in (1, 2) for what in ("before", "call")] * 2
    assert all(x.high < 0.02 and x.calls == 2 for x in timings.values())


def test_multiply_adds_of_the_floor(bench):
    """Counted one by one: each token's features, chunk, state read and state update."""
    shape = bench.floor.Shape(heads=4, kv_heads=2, headdim=3, features=6, headdim_v=10)
    query = 6 * 3 + 8 // 2 * (6 + 10) + 6 * 10  # half of a chunk's keys are in the future
    key = 6 * 3 + 6 * 10
    assert bench.floor.multiply_adds(5, shape, chunk=8) == 5 * (4 * query + 2 * key)
    smollm2 = bench.floor.Shape(9, 3, 64, 64, 64)
    assert bench.floor.multiply_adds(1, smollm2) == 9 * 3 * 64 * 64 + 3 * 2 * 64 * 64
    # In one chunk as long as the sequence: what the masked products of all T x T pairs would cost.
    whole = bench.floor.Shape(1, 1, 4, 8, 4)
    state = 16 * 2 * (8 * 4 + 8 * 4)
    assert bench.floor.multiply_adds(16, whole, chunk=16) - state == 16 * 16 * (8 + 4) / 2


def test_the_floor_is_the_longer_of_products_and_traffic(bench):
    floor = bench.floor
    shape = floor.Shape(9, 3, 64, 64, 64)
    adds, moved = floor.multiply_adds(100, shape), floor.least_bytes(100, shape)
    assert moved == 100 * (9 + 3 + 3 + 9) * 64 * 4
    assert floor.seconds(100, shape, adds, 10 * moved) == 1.0
    assert floor.seconds(100, shape, 10 * adds, moved) == 1.0


def test_limits_do_the_work_they_say(bench):
    import torch

    limits = bench.floor.limits(16, 64)
    assert limits[bench.floor.PRODUCT].work == 16**3
    assert limits[bench.floor.COPY].work == 2 * 4 * 64
    product, copied = (limits[name].call() for name in bench.floor.LIMITS)
    assert product.shape == (16, 16) and copied.shape == (64,)
    assert product.dtype == copied.dtype == torch.float32


def absent(monkeypatch, module):
    """As if the module were not installed."""
    monkeypatch.setitem(sys.modules, module, None)


def present(monkeypatch, module, **functions):
    """As if the module, with these functions, were installed."""
    for name in [module, module.partition(".")[0]]:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))


def test_a_rival_that_is_missing_is_left_out_and_named(bench, monkeypatch):
    absent(monkeypatch, "torch_dct")
    absent(monkeypatch, "fast_transformers")
    absent(monkeypatch, "fast_transformers.causal_product")
    both = ["pytorch-fast-transformers", "torch-dct"]
    assert [bench.rivals.find(package) for package in both] == [None, None]
    said = "pytorch-fast-transformers not installed, torch-dct not installed"
    assert bench.rivals.note(both) == said
    assert bench.cpu.FAST not in bench.cpu.forms(8, published=True)
    assert bench.dct.TORCH_DCT not in bench.dct.calls_at(64, 64)


def test_fast_transformers_where_it_is_installed(bench, monkeypatch):
    import torch

    present(monkeypatch, "fast_transformers.causal_product", causal_dot_product=causal_dot_product)
    assert bench.rivals.note([bench.cpu.FAST_PACKAGE]).startswith("pytorch-fast-transformers ")
    forms = bench.cpu.forms(70, published=True)
    outputs = {name: function(*tensors) for name, (function, tensors) in forms.items()}
    # Its denominator has an eps, ours has none.
    fast, given = outputs[bench.cpu.FAST], outputs[bench.cpu.GIVEN]
    torch.testing.assert_close(fast, given, rtol=1e-3, atol=1e-3)
    assert set(outputs) == set(bench.cpu.FORMS)
    assert all(out.shape == (1, bench.cpu.HEADS, 70, 64) for out in outputs.values())


def test_torch_dct_where_it_is_installed(bench, monkeypatch, tmp_path, capsys):
    from dijiang import ops

    def dct(x, norm):
        assert norm == "ortho"
        return ops.dct(x)

    present(monkeypatch, "torch_dct", dct=dct)
    monkeypatch.setattr(sys, "argv", ["dct.py", "--quick", "--out", str(tmp_path)])
    assert bench.dct.main() == 0
    machine, rows = bench.common.read(tmp_path / "dct.csv")
    assert ", torch-dct " in machine and "not installed" not in machine
    assert "torch-dct" in capsys.readouterr().out
    assert {row["n"] for row in rows if row["form"] == "torch-dct"} == {"64", "100"}


def test_the_default_map_is_measured_with_its_pairs(bench):
    import torch

    fq, fk = bench.cpu.map_parameters("learned_pm")
    assert fq.omega.shape == fk.omega.shape == (3, 128, 64)  # shared by three query heads each
    assert fq.log_weight.shape == (9, 128)
    for omega in (fq.omega, fk.omega):
        assert torch.equal(omega[:, 64:], -omega[:, :64]) and not omega.requires_grad


def test_readme_tables_are_those_of_the_results(bench):
    """No figure in the README is older than, or other than, the committed results."""
    assert bench.readme_table.main(["--check"]) == 0


def test_a_stale_table_is_rewritten(bench):
    readme_table = bench.readme_table
    page = "before\n<!-- table: dct -->\nold\n<!-- /table -->\nafter"
    readme_table.TABLES["dct"] = lambda: "new"
    made = readme_table.filled(page)
    assert made == "before\n<!-- table: dct -->\nnew\n<!-- /table -->\nafter"
    assert readme_table.filled(made) == made
    with pytest.raises(SystemExit, match="no table 'nonsense'"):
        readme_table.filled("<!-- table: nonsense -->\n<!-- /table -->")


def test_tables_of_a_new_run(bench, monkeypatch, folder):
    """Every table that the benchmarks' CSVs are for can be made from what they write."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench.common, "RESULTS", folder)
    for name in ("cpu", "dct", "model"):
        if not (folder / f"{name}.csv").exists():  # this test alone was asked for
            run(name, folder)
    made = {
        name: bench.readme_table.TABLES[name]().splitlines()
        for name in ("attention forward", "attention floor", "attention threads",
                     "attention dtypes", "dct", "dct sizes", "model")
    }  # fmt: skip
    for lines in made.values():
        assert len({line.count("|") for line in lines[:-2]}) == 1
        assert lines[-1].startswith("Measured on ")
    assert not any("torch.mm" in line for line in made["attention forward"])
    floors = [line.split("|")[1:3] for line in made["attention floor"][2:-2]]
    assert [[int(cell) for cell in line] for line in floors] == [[1, 256], [2, 128], [2, 256]]
    assert len(made["attention threads"]) == 2 + 4 + 2
    assert len(made["attention dtypes"]) == 2 + 2 + 2
    assert [line.split("|")[1].strip() for line in made["model"][2:-2]] == [
        "prefill, 128 tokens", "decode, 128 tokens",
    ]  # fmt: skip
