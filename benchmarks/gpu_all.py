"""All that a machine with a GPU is wanted for, in one command and within eight minutes.

    python benchmarks/gpu_all.py --out results-of-today      # or $OUT, where --out is not given

In the order of their worth, each within a limit of its own: whether the CUDA operators load and
which device there is; gpu_check.py's correctness; a few small cases under compute-sanitizer's
memcheck and racecheck, where it is on PATH; gpu.py; gpu_check.py's timings in what is left. A part
that fails or runs out of time does not stop the next. Each writes its results and what it said,
PART.txt, into the folder. The exit status is 1 where any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
LEAST = 5.0  # seconds: with fewer a part is not begun
GRACE = 15.0  # seconds, of which a script that keeps a limit itself may need some to sum up
FACTS = "facts"


class Part(NamedTuple):
    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)


class Result(NamedTuple):
    part: Part
    outcome: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.outcome.startswith("FAILED")

    def line(self) -> str:
        return f"{self.part.name:12} {self.seconds:6.1f} s  {self.outcome}"


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(FOLDER / name), *arguments]


def sanitizer(tool: str) -> Part:
    """Memory of its own for each tensor, or a neighbour's hides what is read beyond an end."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=dijiang"]
    command += ["--error-exitcode", "9", *script("gpu_check.py", "--smoke")]
    return Part(tool, command, 45, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def parts(out: Path) -> list[Part]:
    """In the order of their running."""
    check = ("gpu_check.py", "--out", str(out))
    return [
        Part(FACTS, [sys.executable, "-m", "dijiang.cli", "info", "--json"], 60),
        Part("check", script(*check, "--no-timing"), 170),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Part("gpu", script("gpu.py", "--out", str(out)), 300),
        Part("timing", script(*check, "--only-timing"), 300),
    ]


def run(part: Part, out: Path, left: float) -> Result:
    begin = time.monotonic()

    def result(outcome):
        return Result(part, outcome, time.monotonic() - begin)

    limit = min(part.seconds, left)
    if limit < LEAST:
        return result("FAILED: no time was left")
    if shutil.which(part.command[0]) is None:
        return result(f"left out: {part.command[0]} is not on PATH")
    command = list(part.command)
    if part.name in ("check", "gpu", "timing"):  # they end by themselves, with what they have
        command += ["--seconds", str(max(LEAST, limit - GRACE))]
    with (out / f"{part.name}.txt").open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | part.environment,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()
    if status is None:
        return result(f"FAILED: out of time after {limit:.0f} s")
    if status:
        return result(f"FAILED: exit status {status}")
    return result(judged_facts(out) if part.name == FACTS else "went well")


def judged_facts(out: Path) -> str:
    """Whether `dijiang info` says that the CUDA operators can be used, and on what."""
    text = (out / f"{FACTS}.txt").read_text()
    try:
        facts, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except ValueError:
        return f"FAILED: no facts in {FACTS}.txt"
    said = f"CUDA operators {facts['cuda_kernels']}, device {facts['cuda_device']}"
    return said if "cuda" in facts["usable"].split(", ") else f"FAILED: {said}"


def tail(path: Path, lines: int) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out", type=Path, default=out and Path(out), required=not out, help="folder of results"
    )
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    results = []
    for part in parts(out):
        print(f"{part.name} ...", flush=True)
        results.append(run(part, out, end - time.monotonic()))
        print(results[-1].line(), flush=True)
        if results[-1].failed:
            print(tail(out / f"{part.name}.txt", 12), flush=True)
    print(f"\n{tail(out / 'gpu.txt', 30)}\n")
    summary = "\n".join(result.line() for result in results)
    (out / "summary.txt").write_text(summary + "\n")
    print(summary)
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
