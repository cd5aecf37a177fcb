"""What the terminal shows: progress, on standard error so that --json owns the other, and tables.

A long job is given a reporter and opens a stage in it; what it gets back is the `progress(done,
total)` that every function of evaluate takes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

Progress = Callable[[int, int], None]


class Silent:
    """Reports nothing: the default of every job that is called from Python."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield lambda done, total: None

    def say(self, text: str) -> None:
        pass


class Terminal:
    """Progress bars where a person watches, a line now and then where a log is written."""

    def __init__(self, *, quiet: bool = False, every: float = 10.0):
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.every = every  # seconds between two lines of one stage in a log

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        begin = time.monotonic()
        with self._bar(name) if self.console.is_terminal else self._lines(name) as progress:
            yield progress
        self.say(f"  {name}: done in {time.monotonic() - begin:.0f} s")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Progress]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def _lines(self, name: str) -> Iterator[Progress]:
        self.say(f"  {name} ...")
        last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self.every:
                last = now
                self.say(f"  {name}: {done} of {total}")

        yield progress


def error_line(message: object) -> None:
    """One line on standard error, whatever the message held."""
    first, *rest = [line for line in str(message).splitlines() if line.strip()] or ["failed"]
    print(" ".join(["error:", first, *(line.strip() for line in rest)]), file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first one's words at the left, the others' at the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
