"""What the benchmarks on a GPU share: the device's own clock, its memory, whether it still answers.

Where there is no GPU the same functions time calls on the CPU by the host's clock: scripts can be
run through there, before a device is paid for. Those figures mean nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Times(NamedTuple):
    """Milliseconds a call: of the device (median, 10th and 90th percentile) and of the host."""

    median: float
    host: float
    low: float
    high: float


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def synchronize() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def release() -> None:
    """What a failed case left in memory."""
    gc.collect()
    if DEVICE != "cpu" and usable():
        torch.cuda.empty_cache()


def usable() -> bool:
    """Whether the device still answers this process: most faults are for ever."""
    try:
        synchronize()
        torch.ones(1, device=DEVICE).item()
    except RuntimeError:
        return False
    return True


def host_seconds(function: Callable) -> float:
    """What a call costs the host, which does not wait for the device."""
    synchronize()
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    synchronize()
    return seconds


def device_milliseconds(function: Callable, host: float) -> float:
    """One call, all launches of which are queued before the device begins."""
    if DEVICE == "cpu":
        return 1e3 * host_seconds(function)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Cycles, of at most 2 GHz.
    torch.cuda._sleep(int(2e9 * min(2 * host + 3e-4, 0.05)))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def step_milliseconds(step: Callable, steps: int) -> list[float]:
    """Of each of `steps` calls in a row, which the host queues as fast as it can and no faster."""
    if DEVICE == "cpu":
        return [1e3 * host_seconds(step) for _ in range(steps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    tail = len(ordered) // 10
    return statistics.median(ordered), ordered[tail], ordered[-1 - tail]


def timed(functions: Mapping[str, Callable], rounds: int = 20) -> dict[str, Times | str]:
    """Times of the functions, called in turn; the error of one that fails."""
    found: dict = {}
    hosts: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for name, function in functions.items():
        try:
            for _ in range(3):
                function()
            hosts[name] = statistics.median(host_seconds(function) for _ in range(5))
            times[name] = []
        except Exception as error:  # compilers of other packages have errors of their own
            if not usable():
                raise
            found[name] = one_line(error)
            release()
    for _ in range(rounds):
        for name, values in times.items():
            values.append(device_milliseconds(functions[name], hosts[name]))
    for name, values in times.items():
        median, low, high = percentiles(values)
        found[name] = Times(median, 1e3 * hosts[name], low, high)
    return found


def peak_memory(function: Callable) -> float:
    """MiB that a call needs beyond what was there; on the CPU nan."""
    reset_peak()
    before = allocated()
    function()
    return most_allocated() - before / 2**20


def reset_peak() -> None:
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()


def allocated() -> int:
    """Bytes that tensors hold on the device; on the CPU unknown, 0."""
    return 0 if DEVICE == "cpu" else torch.cuda.memory_allocated()


def most_allocated() -> float:
    """MiB at the worst since reset_peak; on the CPU nan."""
    return math.nan if DEVICE == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def limit_memory(nbytes: float) -> None:
    """Beyond it this process is out of memory, however much the device has."""
    if DEVICE != "cpu":
        has = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / has))


def capture(function: Callable) -> Callable:
    """The function's launches as one CUDA graph; on the CPU the function."""
    for _ in range(3):
        function()
    if DEVICE == "cpu":
        return function
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(held=function):  # with all the tensors that the graph reads and writes
        graph.replay()

    return replay
