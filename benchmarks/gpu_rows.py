"""Rows measured in child processes, so that a fault on the device costs one row and not the run."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from common import read
from gpu_timing import one_line, release, synchronize, usable

# Exit statuses: all cases have run, but some failed; no later case of this process can run.
# (Python itself ends with 1 after an exception.)
WRONG, POISONED = 4, 3
FAULTS = 3  # processes that a group may lose


class Case(NamedTuple):
    """One row: what names it, and what finds the rest of its columns."""

    head: dict
    run: Callable[[], dict]


class Group(NamedTuple):
    """Cases of one file, in processes of their own."""

    file: str
    cases: Callable[[argparse.Namespace], Iterator[Case]]
    seconds: float  # of all its processes; few of them in a sound run
    fused: bool = True


@dataclass(frozen=True)
class Suite:
    """A script's groups: `script --only GROUP --skip CASES --out FOLDER` runs one of them.

    columns: of each file, "group" first and then the one that names a row best.
    options: of the script, as its children are given them.
    failed: whether a row says that its case failed.
    failure: a row's columns for a case that has failed, of a file, with a text.
    header: the first line of a file.
    """

    script: str
    columns: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, Group]
    options: Callable[[argparse.Namespace], list[str]]
    failed: Callable[[Mapping[str, str]], bool]
    failure: Callable[[str, str], dict]
    header: Callable[[], str]

    def start(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            file.write(f"# {self.header()}\n")
            csv.writer(file).writerow(self.columns[path.name])

    def append(self, path: Path, row: dict) -> None:
        with path.open("a", newline="") as file:  # closed: what is known outlives this process
            csv.DictWriter(file, self.columns[path.name], restval="").writerow(row)

    def run_here(self, name: str, args: argparse.Namespace) -> int:
        """One group, in this process. The exit status."""
        group = self.groups[name]
        path = args.out / group.file
        if not path.exists():
            self.start(path)
        before = len(rows_of(path))
        status = self._run_cases(name, args)
        wrong = any(map(self.failed, rows_of(path)[before:]))
        return status or (WRONG if wrong else 0)

    def _run_cases(self, name: str, args: argparse.Namespace) -> int:
        group = self.groups[name]
        torch.manual_seed(0)
        for number, case in enumerate(group.cases(args)):
            torch.manual_seed(number)
            if number < args.skip:
                continue
            head = {"group": name} | case.head
            print("  " + ", ".join(map(str, head.values())), file=sys.stderr, flush=True)
            try:
                row = head | case.run()
                synchronize()
            except Exception as error:
                row = head | self.failure(group.file, one_line(error))
            self.append(args.out / group.file, row)
            if self.failed(row):
                print(f"    FAILED {row.get('failure', '')}", file=sys.stderr, flush=True)
            if row.get("failure"):
                if not usable():
                    return POISONED
                release()
        return 0

    def run_apart(self, name: str, args: argparse.Namespace, end: float) -> None:
        """In child processes: after a fault, a new one for what is left."""
        group = self.groups[name]
        path = args.out / group.file
        end = min(end, time.monotonic() + group.seconds)
        environment = os.environ | ({} if group.fused else {"DIJIANG_CUDA_FUSED": "0"})
        for _ in range(1 + FAULTS):
            done = len(rows_of(path, name))
            command = [sys.executable, self.script, "--only", name, "--skip", str(done)]
            command += [*self.options(args), "--out", str(args.out)]
            left = end - time.monotonic()
            status = None
            try:
                if left > 5:
                    status = subprocess.run(command, env=environment, timeout=left).returncode
            except subprocess.TimeoutExpired:
                pass
            if status in (0, WRONG):
                return
            if status == POISONED:
                continue
            # Killed within a case, or never begun: that case has no row of its own.
            number = len(rows_of(path, name))
            text = "out of time" if status is None else f"its process ended with status {status}"
            first = self.columns[group.file][1]
            row = {"group": name, first: f"case {number}"}
            self.append(path, row | self.failure(group.file, text))
            if status is None:
                return
        text = "given up after so many faults"
        self.append(path, {"group": name} | self.failure(group.file, text))


def rows_of(path: Path, group: str | None = None) -> list[dict[str, str]]:
    return [row for row in read(path)[1] if group in (None, row["group"])]
