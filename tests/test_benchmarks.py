"""The benchmarks run in their quick mode, and the README's tables are those of their results."""

import csv
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(name: str, out: pathlib.Path) -> list[dict[str, str]]:
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--out", out, "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    assert done.returncode == 0, done.stderr
    with (out / f"{name}.csv").open() as file:
        assert "threads, torch" in file.readline()
        rows = list(csv.DictReader(file))
    for value in rows[-1].values():
        assert value in done.stdout  # the table shows what the file holds
    return rows


def test_cpu(tmp_path):
    rows = run("cpu", tmp_path)
    assert {row["kind"] for row in rows} == {"forward", "forward+backward", "decode"}
    assert all(
        float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"]) for row in rows
    )
    for row in rows:
        if row["form"].startswith("torch scaled"):
            assert float(row["sdpa_ratio"]) == 1.0
    for name in ("forward", "backward", "decode"):
        assert (tmp_path / f"cpu_{name}.png").exists()


def test_memory(tmp_path):
    rows = run("memory", tmp_path)
    assert len({row["form"] for row in rows}) == 4
    assert all(float(row["peak_mib"]) >= 0 for row in rows)
    assert (tmp_path / "memory.png").exists()


def test_dct(tmp_path):
    rows = run("dct", tmp_path)
    assert {row["form"] for row in rows} == {"dijiang dct", "matrix product", "copy"}
    assert (tmp_path / "dct.png").exists()


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import formulas
    import readme_table

    yield common, formulas, readme_table
    for name in ("common", "formulas", "readme_table"):
        sys.modules.pop(name)


def test_the_compared_formulas_are_one_function(scripts):
    """What is timed beside ours computes the same: chunked, T x T, step by step, and ours."""
    import torch
    from dijiang import ops

    _, formulas, _ = scripts
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 70, 16, dtype=torch.float64)
    omega = torch.randn(2, 8, 16, dtype=torch.float64) / 4
    expected = formulas.linear_quadratic(q, k, v, omega)
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


def test_interleaved_times_each_for_long_enough(scripts):
    import time

    common, _, _ = scripts
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


def test_readme_tables_are_those_of_the_results(scripts):
    """No figure in the README is older than, or other than, the committed results."""
    _, _, readme_table = scripts
    assert readme_table.main(["--check"]) == 0


def test_a_stale_table_is_rewritten(scripts):
    _, _, readme_table = scripts
    page = "before\n<!-- table: dct -->\nold\n<!-- /table -->\nafter"
    readme_table.TABLES["dct"] = lambda: "new"
    made = readme_table.filled(page)
    assert made == "before\n<!-- table: dct -->\nnew\n<!-- /table -->\nafter"
    assert readme_table.filled(made) == made
    with pytest.raises(SystemExit, match="no table 'nonsense'"):
        readme_table.filled("<!-- table: nonsense -->\n<!-- /table -->")
