"""What every benchmark needs: fair timing, a table, a CSV that says where it was measured."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the 10th and the 90th percentile, and how many calls."""

    median: float
    low: float
    high: float
    calls: int


def interleaved(
    functions: Mapping[Key, Callable[[], object]],
    *,
    seconds: float,
    least: int = 3,
    before: Callable[[Key], object] = lambda name: None,
    warm: bool = True,
) -> dict[Key, Timing]:
    """Times the functions in turn, call by call, until each has run for `seconds`.

    Taking turns lets a slow phase of the machine fall on all of them, so their ratios hold even
    where the figures themselves do not. A function already done is not called any more. `before`
    is called with a function's name ahead of each call, outside its time. warm=False leaves out
    the first call of each that is not timed, for functions that the caller has warmed up.
    """
    for name, function in functions.items() if warm else ():
        before(name)
        function()  # first calls allocate and choose kernels
    times: dict[Key, list[float]] = {name: [] for name in functions}
    running = list(functions)
    while running:
        for name in list(running):
            before(name)
            begin = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - begin)
            if sum(times[name]) >= seconds and len(times[name]) >= least:
                running.remove(name)
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: Sequence[float]) -> Timing:
    ordered = sorted(values)
    tail = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tail], ordered[-1 - tail], len(ordered))


def machine() -> str:
    """One line: processor, threads used, torch, and what else was running."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, load of the last minute {os.getloadavg()[0]:.1f}"
    )


def write(rows: Sequence[Mapping], path: Path, note: str = "") -> None:
    """A CSV with the machine, and a note, in its first line, which readers skip as a comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {machine()}{note and f', {note}'}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The machine, with the note, and the rows of a CSV that `write` made."""
    with path.open(newline="") as file:
        first = file.readline().removeprefix("#").strip()
        return first, list(csv.DictReader(file))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too."""
    cells = [list(header), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see it run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    return parser
