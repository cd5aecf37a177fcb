"""Instructions of CUDA kernels by pipe, counted in their machine code: no GPU is needed.

    python benchmarks/sass.py OBJECT KERNEL [--arch sm_90a] [--via REGEX] [--avoid REGEX]
        [--skip ADDRESS ...] [--trips ADDRESS=N ...]

OBJECT is an object file, a library or a cubin; KERNEL a part of demangled names ("walk_rows",
"FusedShape<__nv_bfloat16, 64, 64>"). For each kernel found: what the main path through each loop
issues in a warp, in all that is in the loop, and how many cycles each pipe needs for that at least.

The main path is a guess: of all paths through a loop the one with the most matrix products
(`HMMA`), and of those the one with the fewest other instructions, so without the rare ways out.
`--via` prefers paths on which instructions match, `--avoid` others, `--skip` takes blocks out.
Trips of inner loops are read from constant bounds; `--trips` sets others (an address of the loop's
first instruction), 1 where nothing is known, marked "?".
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Cycles of a scheduler's pipe (four a multiprocessor) a warp instruction. Assumptions: matrix
# products 16 x 8 x 16 by mma.sync at 0.62 of the rate of wgmma on sm_90; 16 lanes a cycle where
# half a warp is taken, 4 for exp2 and its like, 32 lanes of shared memory a cycle a multiprocessor
# (so 4 cycles a scheduler a request of 128 bytes).
PIPES = {
    "HMMA": 6.5,
    "MUFU": 8.0,
    "FMA": 1.0,
    "ALU": 2.0,
    "CONV": 8.0,
    "SHFL": 8.0,
    "SHARED": 4.0,
    "LDSM": 16.0,
    "GLOBAL": 4.0,
    "BAR": 0.0,
    "BRANCH": 1.0,
    "MOV": 1.0,
    "UNIFORM": 1.0,
    "DOUBLE": 2.0,
    "OTHER": 1.0,
}
OPCODES = {
    "HMMA": "HMMA IMMA BMMA HGMMA DMMA",
    "MUFU": "MUFU",
    # IMAD shares the multipliers of FFMA.
    "FMA": "FFMA FMUL FADD FFMA2 IMAD HFMA2 HADD2 HMUL2",
    "ALU": (
        "FMNMX FSEL FSETP FSET FCHK IADD3 IADD VIADD VIADDMNMX VIMNMX LOP3 LOP SHF SHL SHR LEA "
        "ISETP SEL PRMT PLOP3 IMNMX IABS P2R R2P LEPC BMSK SGXT VOTE FLO POPC HSETP2 HMNMX2 F2FP "
        "ICMP"
    ),
    "CONV": "F2F F2I I2F I2FP FRND I2I",
    "SHFL": "SHFL",
    "SHARED": "LDS STS ATOMS",
    "LDSM": "LDSM",
    "GLOBAL": "LDG STG LDGSTS LD ST LDL STL LDGDEPBAR DEPBAR CCTL ATOM ATOMG RED MEMBAR FENCE",
    "BAR": "BAR WARPSYNC",
    "BRANCH": "BRA BSSY BSYNC EXIT CALL RET BREAK BRX JMP NOP YIELD ENDCOLLECTIVE NANOSLEEP",
    "MOV": "MOV CS2R S2R S2UR LDC",
    "DOUBLE": "DADD DMUL DFMA DSETP DMNMX",
}
PIPE_OF = {op: pipe for pipe, ops in OPCODES.items() for op in ops.split()}


def find_tool(name: str) -> str:
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton

        path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    except ImportError:
        pass
    sys.exit(f"{name} is neither on PATH nor in the triton package")


@dataclass
class Instruction:
    address: int
    predicate: str
    text: str  # without predicate

    @property
    def opcode(self) -> str:
        return self.text.split(" ", 1)[0]

    @property
    def pipe(self) -> str:
        op = self.opcode
        base = op.split(".")[0]
        if base == "IMAD" and ".MOV" in op:
            return "MOV"
        if base == "F2F" and "F64" in op:
            return "DOUBLE"
        if base[0] == "U" and base not in PIPE_OF:
            return "UNIFORM"
        return PIPE_OF.get(base, "OTHER")

    def target(self) -> int | None:
        """Of a branch; a divergent one falls through as a rule."""
        if self.opcode.split(".")[0] != "BRA" or ".DIV" in self.opcode:
            return None
        return int(re.findall(r"0x([0-9a-f]+)", self.text)[-1], 16)

    def ends(self) -> bool:
        base = self.opcode.split(".")[0]
        return base in ("BRA", "EXIT", "RET", "BRX") and ".DIV" not in self.opcode

    def falls_through(self) -> bool:
        base = self.opcode.split(".")[0]
        conditional = self.predicate != "" or re.search(r"\bU?P\d", self.text) is not None
        return not self.ends() or (base in ("BRA", "EXIT") and conditional)


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;")


def read_kernels(path: str, arch: str, pattern: str) -> dict[str, list[Instruction]]:
    command = [find_tool("cuobjdump"), "-sass"]
    if not path.endswith(".cubin"):
        command += ["-arch", arch]
    dump = subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    names = re.findall(r"Function : (\S+)", dump)
    readable = names
    if shutil.which("c++filt"):
        out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
        readable = out.stdout.split("\n")
    name_of = {n: short_name(r) for n, r in zip(names, readable, strict=False)}
    current: list[Instruction] | None = None
    for line in dump.split("\n"):
        start = re.search(r"Function : (\S+)", line)
        if start:
            name = name_of[start[1]]
            current = kernels.setdefault(name, []) if pattern in name else None
            continue
        found = LINE.match(line) if current is not None else None
        if found:
            current.append(Instruction(int(found[1], 16), found[2] or "", found[3]))
    return kernels


def short_name(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|dijiang::cuda::|\(int\)|^void ", "", name)
    return name.split("(")[0]


@dataclass
class Cost:
    """Of a path: instructions by pipe, those that `--via` finds, the blocks in it."""

    counts: Counter = field(default_factory=Counter)
    via: float = 0.0
    blocks: list[int] = field(default_factory=list)

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        counts = Counter(self.counts)
        for pipe, n in other.counts.items():
            counts[pipe] += n * times
        return Cost(counts, self.via + times * other.via, self.blocks + other.blocks)

    def total(self) -> float:
        return sum(self.counts.values())

    def value(self) -> tuple[float, float, float]:
        return (self.counts["HMMA"], self.via, -self.total())


class Kernel:
    def __init__(
        self,
        code: list[Instruction],
        via: str | None = None,
        avoid: str | None = None,
        trips: dict[int, int] | None = None,
        skip: set[int] | None = None,
    ):
        self.code = code
        self.given = trips or {}
        starts = {code[0].address}
        for at, op in enumerate(code):
            target = op.target()
            if target is not None:
                starts.add(target)
            if op.ends() and at + 1 < len(code):
                starts.add(code[at + 1].address)
        self.blocks: dict[int, list[Instruction]] = {}
        for op in code:
            if op.address in starts:
                block = self.blocks[op.address] = []
            block.append(op)
        order = list(self.blocks)
        self.next: dict[int, list[int]] = {}
        for n, start in enumerate(order):
            last = self.blocks[start][-1]
            following = []
            if last.target() is not None:
                following.append(last.target())
            if last.falls_through() and n + 1 < len(order):
                following.append(order[n + 1])
            self.next[start] = [b for b in following if not skip or b not in skip]
        self.own: dict[int, Cost] = {}
        wanted, unwanted = (re.compile(x) if x else None for x in (via, avoid))
        for start, block in self.blocks.items():
            counts = Counter(op.pipe for op in block)
            worth = sum(1 for op in block if wanted and wanted.search(op.text))
            worth -= sum(100 for op in block if unwanted and unwanted.search(op.text))
            self.own[start] = Cost(counts, float(worth), [start])
        self.find_loops()

    def find_loops(self) -> None:
        """Natural loops, by their first block: all blocks in them, and those that jump back."""
        first = self.code[0].address
        seen: set[int] = set()
        post: list[int] = []
        stack = [(first, iter(self.next[first]))]
        seen.add(first)
        while stack:
            block, rest = stack[-1]
            for other in rest:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(self.next[other])))
                    break
            else:
                post.append(block)
                stack.pop()
        order = post[::-1]
        number = {block: n for n, block in enumerate(order)}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for other in self.next[block]:
                before[other].append(block)
        dominator = {first: first}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                known = [b for b in before[block] if b in dominator]
                new = known[0]
                for other in known[1:]:
                    x, y = new, other
                    while x != y:
                        while number[x] > number[y]:
                            x = dominator[x]
                        while number[y] > number[x]:
                            y = dominator[y]
                    new = x
                if dominator.get(block) != new:
                    dominator[block] = new
                    changed = True
        self.loops: dict[int, set[int]] = {}
        self.back: dict[int, set[int]] = {}
        for block in order:
            for head in self.next[block]:
                x = block
                while x != head and x != first:
                    x = dominator[x]
                if x != head:
                    continue
                body = self.loops.setdefault(head, {head})
                self.back.setdefault(head, set()).add(block)
                work = [block]
                while work:
                    b = work.pop()
                    if b not in body:
                        body.add(b)
                        work.extend(before[b])
        self.order = order
        self.iterations: dict[int, Cost] = {}
        self.exits: dict[int, dict[int, Cost]] = {}
        self.known_trips: dict[int, bool] = {}
        for head in sorted(self.loops, key=lambda h: len(self.loops[h])):
            self.walk_loop(head)

    def inner(self, body: set[int], head: int) -> dict[int, int]:
        """Of each block of the body the outermost loop within that it lies in."""
        inside: dict[int, int] = {}
        loops = [h for h in self.loops if h != head and self.loops[h] < body and h in body]
        for h in sorted(loops, key=lambda h: len(self.loops[h])):
            for block in self.loops[h]:
                inside[block] = h
        return inside

    def paths(self, head: int, body: set[int], fewest: bool) -> dict[int, Cost]:
        """The best path from the head to each block, both included, passing through inner loops."""
        inside = self.inner(body, head)
        best: dict[int, Cost] = {head: self.own[head]}

        def offer(block: int, cost: Cost) -> None:
            old = best.get(block)
            if old is None:
                best[block] = cost
            elif fewest:
                if cost.total() < old.total():
                    best[block] = cost
            elif cost.value() > old.value():
                best[block] = cost

        for block in self.order:
            if block not in body or block not in best:
                continue
            loop = inside.get(block)
            if loop is not None:
                if block != loop:
                    continue
                # `best` is up to and with the loop's first block: take that out again.
                base = best[block].plus(self.own[block], -1.0)
                for target, cost in self.exits[loop].items():
                    if target in body and target != head:
                        offer(target, base.plus(cost).plus(self.own[target]))
                continue
            for target in self.next[block]:
                if target in body and target != head:
                    offer(target, best[block].plus(self.own[target]))
        return best

    def ends_of(self, head: int, body: set[int], fewest: bool) -> dict[int, Cost]:
        """Paths to where the loop jumps back, through inner loops that do so as well."""
        best = self.paths(head, body, fewest)
        inside = self.inner(body, head)
        ends: dict[int, Cost] = {}
        for block, cost in best.items():
            loop = inside.get(block)
            if loop is None:
                if head in self.next[block]:
                    ends[block] = cost
            elif block == loop and head in self.exits[loop]:
                ends[block] = cost.plus(self.own[block], -1.0).plus(self.exits[loop][head])
        return ends

    def walk_loop(self, head: int) -> None:
        body = self.loops[head]
        full = self.ends_of(head, body, fewest=False)
        iteration = max(full.values(), key=Cost.value) if full else self.own[head]
        self.iterations[head] = iteration
        trips = self.given.get(head) or self.find_trips(head)
        self.known_trips[head] = trips is not None
        before = iteration_times = (trips or 1) - 1
        self.exits[head] = {}
        most = self.paths(head, body, fewest=False)
        least = self.paths(head, body, fewest=True)
        inside = self.inner(body, head)
        for block in body:
            loop = inside.get(block)
            if loop is not None:
                if block != loop:
                    continue
                leaving = {t: c for t, c in self.exits[loop].items() if t not in body}
            else:
                leaving = {t: Cost() for t in self.next[block] if t not in body}
            for target, cost in leaving.items():
                last = block in self.back[head] or before == 0
                part = (most if last else least).get(block)
                if part is None:
                    continue
                if loop is not None:
                    part = part.plus(self.own[block], -1.0).plus(cost)
                whole = Cost().plus(iteration, iteration_times).plus(part)
                old = self.exits[head].get(target)
                if old is None or whole.value() > old.value():
                    self.exits[head][target] = whole

    def whole(self) -> Cost:
        """The best path from the kernel's beginning to an end."""
        first, body = self.code[0].address, set(self.order)
        best = self.paths(first, body, fewest=False)
        ends = [best[b] for b in best if not self.next[b]]
        return max(ends, key=Cost.value) if ends else Cost()

    @staticmethod
    def second_of(op: Instruction) -> str | None:
        """Of instructions that write zeros to two registers, the second."""
        pair = re.match(r"CS2R R(\d+),", op.text)
        return f"R{int(pair[1]) + 1}" if pair else None

    def find_trips(self, head: int) -> int | None:
        """Where a register counts from one constant to another by a third."""
        if len(self.back[head]) != 1:
            return None
        block = self.blocks[next(iter(self.back[head]))]
        last = block[-1]
        predicate = last.predicate.lstrip("!")
        body = [op for b in self.loops[head] for op in self.blocks[b]]
        for op in reversed(block):
            test = re.match(r"ISETP\.(\w+)\.\S+ (\w+), PT, (R\d+), (0x[0-9a-f]+|RZ), PT", op.text)
            if not test or test[2] != predicate:
                continue
            register, bound = test[3], int(test[4], 16) if test[4] != "RZ" else 0
            step = start = None
            for other in body:
                add = re.match(r"(?:IADD3|VIADD) (R\d+), (R\d+), (0x[0-9a-f]+)", other.text)
                if add and add[1] == add[2] == register:
                    step = signed(int(add[3], 16))
            for other in self.code:
                if other.address >= head:
                    break
                written = re.match(r"[\w.]+ (R\d+)\b", other.text)
                if not written or register not in (written[1], self.second_of(other)):
                    continue
                constant = re.search(r" (?:RZ, RZ, |)(0x[0-9a-f]+|RZ|SRZ)$", other.text)
                start = None
                if constant and re.match(r"IMAD\.MOV|MOV|CS2R", other.text):
                    start = int(constant[1], 16) if constant[1][0] == "0" else 0
            if step and start is not None and (bound - start) % step == 0:
                return max((bound - start) // step, 1)
        return None


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def table(rows: list[tuple[str, Counter]]) -> str:
    pipes = [p for p in PIPES if any(c[p] for _, c in rows)]
    lines = ["| | all | " + " | ".join(pipes) + " |", "|---|" + "---|" * (len(pipes) + 1)]
    for name, counts in rows:
        numbers = [f"{counts[p]:.0f}" for p in pipes]
        lines.append(f"| {name} | {sum(counts.values()):.0f} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("object")
    parser.add_argument("kernel", nargs="?", default="")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--via", help="prefer paths whose instructions match")
    parser.add_argument("--avoid", help="likewise of instructions that are not wanted")
    parser.add_argument("--trips", nargs="*", default=[], metavar="ADDRESS=N")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="ADDRESS", help="blocks that are not on the path"
    )
    parser.add_argument("--least", type=int, default=16, help="instructions of a loop to be shown")
    parser.add_argument("--blocks", action="store_true", help="addresses of the main path's blocks")
    options = parser.parse_args()
    trips = {int(a, 16): int(n) for a, n in (t.split("=") for t in options.trips)}
    skip = {int(a, 16) for a in options.skip}
    for name, code in read_kernels(options.object, options.arch, options.kernel).items():
        kernel = Kernel(code, options.via, options.avoid, trips, skip)
        rows = [("whole kernel, as it stands", Counter(op.pipe for op in code))]
        rows.append(("main path, loops included", kernel.whole().counts))
        for head in sorted(kernel.loops):
            cost = kernel.iterations[head]
            if cost.total() < options.least:
                continue
            depth = sum(1 for h, body in kernel.loops.items() if h != head and head in body)
            count = kernel.given.get(head) or kernel.find_trips(head)
            label = f"{'. ' * depth}loop {head:#x}, {count or '?'} trips"
            rows.append((label, cost.counts))
        print(f"\n{name}\n\n{table(rows)}\n")
        outer = max(kernel.iterations, key=lambda h: kernel.iterations[h].value(), default=None)
        if outer is None:
            continue
        cost = kernel.iterations[outer]
        cycles = {p: n * PIPES[p] for p, n in cost.counts.items() if n and PIPES[p] > 0.0}
        cycles["issue"] = cost.total()
        shown = sorted(cycles.items(), key=lambda x: -x[1])[:8]
        print(
            f"cycles of a scheduler, a warp in loop {outer:#x}: "
            + ", ".join(f"{p} {n:.0f}" for p, n in shown)
        )
        if options.blocks:
            print("blocks:", " ".join(f"{b:#x}:{len(kernel.blocks[b])}" for b in cost.blocks))


if __name__ == "__main__":
    main()
