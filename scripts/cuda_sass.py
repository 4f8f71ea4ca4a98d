"""Counts a CUDA kernel's machine instructions by loop, and the cycles that one warp takes for them.

Input: nvdisasm's text of a cubin, with encodings. Output: for each kernel the phases of its main loop and of the code
around it. A phase ends at a barrier of the block. It has the cycles of a warp that runs alone (from the stall counts
and scoreboards in the encodings, and latencies of instructions that use a scoreboard) and counts by functional unit.
Code that a branch can skip counts half, unless it has tensor instructions or a barrier.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_SECTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")

# Cycles until a result that is announced by a scoreboard is there. From microbenchmarks (docs/gpu-roofline.md lists
# them); of global loads, the L2's.
LATENCY: dict[str, float] = {
    "LDG": 280, "LD": 280, "LDGSTS": 0, "LDS": 26, "LDSM": 33, "MUFU": 22, "SHFL": 24, "S2R": 24, "S2UR": 24,
    "F2F": 18, "I2F": 18, "F2I": 18, "VOTE": 14, "REDUX": 20, "R2UR": 12, "ATOMG": 500, "RED": 0, "ULDC": 10, "LDC": 40,
    "HMMA": 34, "STG": 10, "STS": 10, "BAR": 0,
}  # fmt: skip
OTHER_LATENCY = 20
BARRIER = 20  # cycles of a barrier that no warp waits for
_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "FFMA2", "HFMA2", "HMUL2", "HADD2"}  # the pipe of multiply-adds
_QUARTER = {
    "MUFU",
    "F2F",
    "I2F",
    "F2I",
    "POPC",
    "FLO",
    "BREV",
    "I2FP",
    "F2IP",
}  # a quarter of a warp's lanes in a cycle
_UNISSUED = {"NOP"}


@dataclass(frozen=True)
class Instruction:
    """A machine instruction. index: of its label, if it jumps."""

    name: str  # with its modifiers, such as LDG.E.128
    predicated: bool
    target: str | None
    high: int  # the upper half of the encoding

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @property
    def stall(self) -> int:
        return max(self.high >> 41 & 15, 1)

    @property
    def sets(self) -> int:
        """The scoreboard that announces the result; 7: none."""
        return self.high >> 46 & 7

    @property
    def waits(self) -> int:
        """The scoreboards that it waits for, as bits."""
        return self.high >> 52 & 63


@dataclass
class Phase:
    """What a warp does between two barriers. Numbers are sums over repetitions of inner loops."""

    cycles: float = 0.0  # of a warp that runs alone
    issued: float = 0.0
    shared: float = 0.0  # accesses of 128 bytes
    quarter: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    mma: dict[str, float] = field(default_factory=dict)  # by name

    def add(self, each: Instruction, times: float) -> None:
        """Count an instruction."""
        self.issued += times
        if each.op in ("HMMA", "IMMA"):
            self.mma[each.name] = self.mma.get(each.name, 0.0) + times
        elif each.op in ("LDS", "STS", "LDSM", "LDGSTS"):
            self.shared += times * _width(each.name)
        elif each.op in _QUARTER:
            self.quarter += times
        elif each.op in _FMA:
            self.fma += times
        elif not each.op.startswith(("LD", "ST", "U", "BRA", "BAR", "SHFL", "DEPBAR")):
            self.alu += times


@dataclass(frozen=True)
class Loop:
    """Instructions [begin, end] of a loop; `inner` are the loops directly inside."""

    begin: int
    end: int
    inner: tuple[Loop, ...]

    @property
    def length(self) -> int:
        return self.end - self.begin + 1


@dataclass(frozen=True)
class Code:
    """A kernel's instructions and loops. After its last EXIT is code that was moved away and jumps back."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops."""
        ends: dict[int, int] = {}
        last = max((i for i, each in enumerate(self.instructions) if each.op == "EXIT"), default=0)
        for i, each in enumerate(self.instructions):
            begin = self.labels.get(each.target or "", len(self.instructions))
            if begin <= i and (each.predicated or i < last):
                ends[begin] = max(ends.get(begin, 0), i)
        return _nested(sorted(ends.items(), key=lambda item: (item[0], -item[1])))

    def count(self, loop: Loop, *ops: str) -> int:
        """The instructions of these operations in a loop, and in the loops inside, once."""
        return sum(each.op in ops for each in self.instructions[loop.begin : loop.end + 1])


def _width(name: str) -> int:
    """Accesses of 128 bytes that a warp's instruction makes in shared memory."""
    if name.startswith("LDSM"):
        return 4 if name.endswith(".4") else 2 if name.endswith(".2") else 1
    return 4 if ".128" in name else 2 if ".64" in name else 1


def _nested(spans: Sequence[tuple[int, int]]) -> tuple[Loop, ...]:
    loops = []
    i = 0
    while i < len(spans):
        begin, end = spans[i]
        inside = [span for span in spans[i + 1 :] if span[1] <= end]
        loops.append(Loop(begin, end, _nested(inside)))
        i += 1
        while i < len(spans) and spans[i][0] <= end:
            i += 1
    return tuple(loops)


def kernels(text: str) -> Iterator[tuple[str, Code]]:
    """The kernels of a disassembly, by their mangled names."""
    name, instructions, labels = "", list[Instruction](), dict[str, int]()
    pending: re.Match[str] | None = None
    for line in (*text.splitlines(), "//-----"):
        if line.startswith("//-----"):
            if name and instructions:
                yield name, Code(tuple(instructions), dict(labels))
            name, instructions, labels = "", [], {}
        elif match := _SECTION.match(line):
            name = match[1]
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _LINE.match(line):
            pending = match
        elif pending and (match := _SECOND.match(line)):
            target = re.search(r"\.L_x_\d+", pending[3]) if pending[2].startswith("BRA") else None
            chosen = pending[1] is not None or re.match(r"!?U?P\d", pending[3]) is not None  # BRA.U UP0, ...
            instructions.append(
                Instruction(pending[2], chosen, target[0] if target else None, int(match[1], 16))
            )
            pending = None


def phases(
    code: Code,
    loop: Loop,
    times: Mapping[int, float],
    skip: Loop | None = None,
    latency: Mapping[str, float] = LATENCY,
) -> list[Phase]:
    """The phases of one turn of a loop. times: turns of the loops inside, by their first instruction, default 1.

    skip: a loop inside that is left out. latency: where it is not LATENCY. Inner loops are walked once, and count as
    often as `times` says.
    """
    cycles = {**LATENCY, **latency}
    found = [Phase()]
    ready = [0.0] * 7
    clock = 0.0
    weight = {i: 1.0 for i in range(loop.begin, loop.end + 1)}
    _weigh(loop.inner, times, weight)
    _halve(code, loop, weight)
    for i in range(loop.begin, loop.end + 1):
        if skip is not None and skip.begin <= i <= skip.end:
            continue
        each, often = code.instructions[i], weight[i]
        if each.op in _UNISSUED:
            continue
        at = max([clock, *(ready[bar] for bar in range(6) if each.waits >> bar & 1)])
        if each.sets < 6:
            ready[each.sets] = at + cycles.get(each.op, OTHER_LATENCY)
        spent = at + each.stall - clock
        clock = at + each.stall
        found[-1].cycles += spent * often
        found[-1].add(each, often)
        if each.op == "BAR":
            found[-1].cycles += BARRIER
            found.append(Phase())
    return found


def _halve(code: Code, loop: Loop, weight: dict[int, float]) -> None:
    """Halve the weight of what a branch can skip."""
    for i in range(loop.begin, loop.end + 1):
        end = code.labels.get(code.instructions[i].target or "", 0)
        skipped = code.instructions[i + 1 : end]
        if (
            code.instructions[i].predicated
            and end - 1 <= loop.end
            and not any(each.op in ("HMMA", "IMMA", "BAR") for each in skipped)
        ):
            for at in range(i + 1, end):
                weight[at] /= 2


def _weigh(loops: Sequence[Loop], times: Mapping[int, float], weight: dict[int, float]) -> None:
    for loop in loops:
        for i in range(loop.begin, loop.end + 1):
            weight[i] *= times.get(loop.begin, 1.0)
        _weigh(loop.inner, times, weight)


def dot_products_loop(code: Code) -> Loop | None:
    """The loop with most dot products of bytes."""
    return max(code.loops(), key=lambda loop: code.count(loop, "IDP"), default=None)


def main_loop(code: Code, innermost: bool) -> Loop | None:
    """The loop in which a kernel spends its time: the one with most tensor instructions, else stores, else the longest.

    innermost: the innermost one of those that have tensor instructions.
    """

    def rank(loop: Loop) -> tuple[int, int, int]:
        return code.count(loop, "HMMA", "IMMA"), code.count(loop, "STG"), loop.length

    loops = code.loops()
    if not loops:
        return None
    best = max(loops, key=rank)
    while innermost and (inside := [each for each in best.inner if code.count(each, "HMMA", "IMMA")]):
        best = max(inside, key=rank)
    return best
