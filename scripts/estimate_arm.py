"""Estimate the speed of matmuls on ARM cores, without having one, next to upstream's kernels.

    python -m kimi_gguf.scripts.estimate_arm

Input: the matmul's kernels and those of upstream, compiled for ARM. Output: docs/arm-estimates.md: cycles for 16
int8 multiply-adds in the loops in which a kernel spends its time, by llvm-mca or by counting. Needs
aarch64-linux-gnu-g++, its objdump and llvm-mca 16 (Debian: g++-aarch64-linux-gnu, llvm-16). The page names a digest of
the sources; a test compares it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.bench.report import markdown
from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.scripts.stripped_sources import stripped

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "ggml_ops" / "matmul" / "cpu"
COMMON = ROOT / "ggml_ops" / "common"
PREFIX = "aarch64-linux-gnu"
MCA = "llvm-mca-16"
FLAGS = ("-O3", "-w", "-c")
ITERATIONS = 60
WIDTHS = {"sdot": 1, "smmla": 2}  # units of 16 int8 multiply-adds in an instruction
INNERMOST = -1  # multiply-adds of a kernel that has no loop around the innermost one


@dataclass(frozen=True)
class Core:
    """A core, as llvm-mca and the compiler name it."""

    name: str
    mca: str
    march: str
    dot: str  # the widest


I8MM = "armv8.6-a+dotprod+fp16+i8mm"
DOTPROD = "armv8.2-a+dotprod+fp16"
APPLE = "apple"
APPLE_SOURCE = "https://dougallj.github.io/applecpu/firestorm.html"
CORES = (
    Core("Neoverse V2, i8mm", "neoverse-v2", I8MM, "smmla"),
    Core("Neoverse V2, dot products only", "neoverse-v2", DOTPROD, "sdot"),
    Core("Apple M2, i8mm, counted", APPLE, I8MM, "smmla"),
    Core("Apple M1, counted", APPLE, DOTPROD, "sdot"),
    Core("Cortex-A510, i8mm", "cortex-a510", I8MM, "smmla"),
    Core("Cortex-A55", "cortex-a55", DOTPROD, "sdot"),
)


@dataclass(frozen=True)
class Kernel:
    """A function, and the units of 16 multiply-adds that one turn of its outermost loop computes, or one call."""

    source: str
    name: str  # a regular expression
    units: int = INNERMOST
    per_call: bool = False


@dataclass(frozen=True)
class Row:
    """Kernels of a type: ours and upstream's of interleaved rows, with and without i8mm, and upstream's of rows."""

    types: str
    ours: Kernel
    ours_i8mm: Kernel
    rows: Kernel | None = None
    interleaved: Kernel | None = None
    interleaved_i8mm: Kernel | None = None

    def ours_on(self, core: Core) -> Kernel:
        """Our kernel on a core."""
        return self.ours_i8mm if core.march == I8MM else self.ours

    def interleaved_on(self, core: Core) -> Kernel | None:
        """Upstream's kernel of interleaved rows on a core."""
        return self.interleaved_i8mm if core.march == I8MM else self.interleaved


TILE = "quant-gemm-tile.cpp"
TILE_I8MM = "quant-gemm-tile-i8mm.cpp"
DOT = "quant-gemm-dot.cpp"
ROWS = "quants.c"
INTERLEAVED = "repack.cpp"


# Units of a tile: 4 columns of activations by 8 rows, 256 values of K.
TILE_UNITS = 512


def tiles(scheme: str) -> tuple[Kernel, Kernel]:
    """The tile of four columns, and that for i8mm."""
    if scheme == "0":
        ours, with_i8mm = "tile_q8_0<.*, 4>", "tile_of_blocks<2>"
    else:
        ours, with_i8mm = (
            rf"tile_q8_K<.*Scheme\){scheme}.*, 4>",
            rf"tile_of_super_block<.*Scheme\){scheme}, 2>",
        )
    return (
        Kernel(TILE, ours, TILE_UNITS, per_call=True),
        Kernel(TILE_I8MM, with_i8mm, TILE_UNITS, per_call=True),
    )


def dots(block: str, units: int = INNERMOST) -> tuple[Kernel, Kernel]:
    """The dot products of one column, the same with i8mm: the compiler may inline their loop."""
    kernel = Kernel(DOT, rf"(dot_lanes|add_products_of_rows)<.*block_{block}, 1>", units)
    return kernel, kernel


def row(name: str) -> Kernel:
    return Kernel(ROWS, f"^ggml_vec_dot_{name}_q8_[0K]$")


def interleaved(name: str, units: int = INNERMOST) -> Kernel:
    return Kernel(INTERLEAVED, f"^ggml_{name}_q8_[0K]$", units)


PROMPTS = (
    Row("Q4_0", *tiles("0"), None, interleaved("gemm_q4_0_4x4"), interleaved("gemm_q4_0_4x8")),
    Row("Q8_0", *tiles("0"), None, interleaved("gemm_q8_0_4x4"), interleaved("gemm_q8_0_4x8")),
    Row("IQ4_NL", *tiles("0"), None, interleaved("gemm_iq4_nl_4x4"), interleaved("gemm_iq4_nl_4x4")),
    Row("MXFP4", *tiles("0"), None, interleaved("gemm_mxfp4_4x4"), interleaved("gemm_mxfp4_4x4")),
    Row("Q4_K", *tiles("3"), None, interleaved("gemm_q4_K_8x4", 512), interleaved("gemm_q4_K_8x8", 512)),
    Row("Q5_K", *tiles("3"), None, interleaved("gemm_q5_K_8x4", 512), interleaved("gemm_q5_K_8x8", 512)),
    Row("Q6_K", *tiles("2"), None, interleaved("gemm_q6_K_8x4", 512), interleaved("gemm_q6_K_8x8", 512)),
    Row("Q3_K", *tiles("2")),
    Row("Q2_K", *tiles("4")),
    Row("IQ4_XS", *tiles("1")),
)  # fmt: skip
DECODING = (
    Row("Q4_0", *dots("q4_0"), row("q4_0"), interleaved("gemv_q4_0_4x4"), interleaved("gemv_q4_0_4x8")),
    Row("Q8_0", *dots("q8_0"), row("q8_0"), interleaved("gemv_q8_0_4x4"), interleaved("gemv_q8_0_4x8")),
    Row("Q5_0", *dots("q5_0"), row("q5_0")),
    Row("IQ4_NL", *dots("iq4_nl"), row("iq4_nl"), interleaved("gemv_iq4_nl_4x4"), interleaved("gemv_iq4_nl_4x4")),
    Row("MXFP4", *dots("mxfp4"), row("mxfp4"), interleaved("gemv_mxfp4_4x4"), interleaved("gemv_mxfp4_4x4")),
    Row("Q4_K", *dots("q4_K", 64), row("q4_K"), interleaved("gemv_q4_K_8x4", 128), interleaved("gemv_q4_K_8x8", 128)),
    Row("Q5_K", *dots("q5_K", 64), row("q5_K"), interleaved("gemv_q5_K_8x4", 128), interleaved("gemv_q5_K_8x8", 128)),
    Row("Q6_K", *dots("q6_K", 64), row("q6_K"), interleaved("gemv_q6_K_8x4", 128), interleaved("gemv_q6_K_8x8", 128)),
    Row("Q3_K", *dots("q3_K", 64), row("q3_K")),
    Row("Q2_K", *dots("q2_K", 64), row("q2_K")),
    Row("IQ4_XS", *dots("iq4_xs", 64), row("iq4_xs")),
)  # fmt: skip
PAGE = """\
# Estimated speed of matmuls on ARM

Written by `python -m kimi_gguf.scripts.estimate_arm`; do not edit. No ARM CPU was available: these are predictions of
llvm-mca (LLVM 16), with all data in L1, compiled by {compiler}.
Digest of the sources without comments: {digest}.
LLVM 16 gives the Neoverse V2 the model of the N2, which has two vector units (V2: four). For it, `fmov` to a vector
register is replaced by `dup`, because llvm-mca makes `fmov` wait for the register's upper half. LLVM 16 gives the
Cortex-A510 the model of the Cortex-A55. Its newest model of an Apple core is of 2013. Figures of Apple cores are
computed from numbers of instructions and the [published throughputs of the M1]({apple}): four
vector instructions, three loads, two stores, four loads and stores, and eight instructions of any kind per cycle, as if
nothing ever waited. The M2 is assumed to be equal, with four `smmla` per cycle. So Apple's cores
need at least as many cycles as these figures say.

Figures of prompts and decoding are cycles for 16 int8 multiply-adds; fewer is better. `sdot` computes 16 and `smmla`
(i8mm) 32. Bold: patched. Dash: upstream has no such kernel.

## Prompts

In parentheses: the share of the peak, and its [limit](#limits-of-the-share). The peak is the rate of independent `sdot`
or `smmla` instructions. *Interleaved*: upstream's kernel for the weights that it interleaves at load. Patched figures
are of a whole tile: four columns by eight rows by 256 values, with factors, minima and scales. Work that serves many
tiles is not included: a panel is unpacked once for all columns of a task (up to 128); with i8mm, two columns are paired
once for 32 rows. Upstream's figures are of its loops, which unpack the weights again for every four columns.

The figures are of single matrices. Upstream multiplies interleaved experts by one column at a time, at the rate of
decoding (below). So the patched build interleaves no experts, unless `--repack` is given. On CPUs without i8mm it
interleaves other matrices of Q4_0 and Q8_0; upstream's kernels multiply these, and the patched figures apply only to
experts. IQ4_NL and MXFP4 have the same tile as Q4_0 and Q8_0. Upstream has no kernel with `smmla` for them; the
interleaved figures are of `sdot`.

{prompts}
### Limits of the share

A share of 100 % is not possible. Weights and activations are loaded. Sums are converted, multiplied by factors and
scales, and added; minima are subtracted. The limit is the share of a tile that has only these instructions, as many of
each as the compiled tile, and none of which waits for the result of another one. For Apple cores it is counted, too.
For the others llvm-mca computes it for two orders: one kind of instruction after the other, or all kinds evenly mixed.
The faster order counts; another order may be a little faster. The difference between the share and its limit is
waiting, and instructions that are not counted: moves, copies, zeroing, transposing, and loads and stores on the stack.
Another algorithm could have another limit.

The table has the vector instructions of a tile: dot products of weights + other arithmetic; loads and stores; those
that are not counted.

{instructions}
In LLVM's model of the Cortex-A55, and so in that of the A510, a dot product and a load of 128 bits are never issued in
the same cycle. So loads limit the share, too. In LLVM's model of the N2, which LLVM 16 also uses for the V2, there is
one unit for conversions and for products of integers that are not dot products. A conversion of four sums takes it for
two cycles. This limits Q4_0 with i8mm.

The Cortex-A55 executes instructions in order. A dot product can follow another one with the same sum after four cycles.
So the code loads weights ahead, and adds to eight sums in turn. [Orders that the compiler
chose](negative-results.md#matmul-cpu) were slower, at least on other cores.

## Decoding

One column. *Rows*: upstream's kernel for weights as they are in the file.

{decoding}"""


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, without its branches."""

    instructions: tuple[str, ...]

    def dots(self, name: str) -> int:
        """How many of them are dot products."""
        return sum(line.split()[0] == name for line in self.instructions)


def functions(disassembly: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """The name of each function, and its instructions by address."""
    for found in re.finditer(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n?)+)", disassembly, re.M):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S.*)$", found[2], re.M)
        yield found[1], [(int(address, 16), line.strip()) for address, line in lines]


def loops(instructions: list[tuple[int, str]]) -> Iterator[Loop]:
    """From the target of each branch backwards to the branch."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    for i, (_, line) in enumerate(instructions):
        target = re.match(r"(?:b\.\w+|b|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <", line)
        first = index.get(int(target[1], 16), i) if target else i
        if first < i:
            yield Loop(without_branches(each for _, each in instructions[first:i]))


def counted(instructions: Sequence[str]) -> float:
    """
    The cycles that an Apple core needs at least for one turn of a loop: its busiest units.

    Moves between registers and zeroing take no unit. Loads and stores have units of their own.
    """
    loads = sum(line.startswith("ld") for line in instructions)
    stores = sum(line.startswith("st") for line in instructions)
    free = r"(mov|movi)\s+v\d+\.(16b, v\d+\.16b|\w+, #0x0)$"
    vector = sum(
        bool(re.search(r"\b[vsdhq]\d+\b", line)) and not re.match(rf"ld|st|{free}", line)
        for line in instructions
    )
    return max(len(instructions) / 8, loads / 3, stores / 2, (loads + stores) / 4, vector / 4)


def cycles(instructions: Sequence[str], core: Core) -> float:
    """llvm-mca's cycles for one turn of a loop."""
    if core.mca == APPLE:
        return counted(instructions)
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        text = "\n".join(instructions) + "\n"
        if core.mca == "neoverse-v2":
            # llvm-mca lets fmov wait for the upper half of the register, which becomes zero; dup takes as long
            text = re.sub(r"^fmov\td(\d+), x", r"dup\tv\1.2d, x", text, flags=re.M)
        file.write(text)
        file.flush()
        command = [MCA, "-mtriple=aarch64-linux-gnu", f"-mcpu={core.mca}", "-mattr=+dotprod,+i8mm,+fullfp16"]
        said = run([*command, f"-iterations={ITERATIONS}", file.name])
    found = re.search(r"Total Cycles:\s+(\d+)", said)
    assert found is not None
    return int(found[1]) / ITERATIONS


def without_branches(lines: Iterable[str]) -> tuple[str, ...]:
    """Instructions as llvm-mca reads them."""
    plain = (re.sub(r"\s*(//|<).*", "", line) for line in lines)
    return tuple(line for line in plain if not re.match(r"(b|bl|br|blr|b\.\w+|cbn?z|tbn?z|ret)\b", line))


# Vector instructions that compute. All others move, copy, set to zero or transpose.
ARITHMETIC = re.compile(
    r"([su]dot|u?s?mmla|[su]mull2?|[su]mlal2?|mla|mls|mul|fml[as]|fmul|fadd|scvtf|addp?|sub|shl)\tv"
)
MEMORY = re.compile(r"(ld|st)(u?r|p)\t([sdq])\d")
LOADED = 6  # registers of loads, when nothing waits; the peak has the same 24 of sums


@dataclass(frozen=True)
class Work:
    """The vector instructions that a tile executes."""

    arithmetic: tuple[str, ...]  # with the dot products
    memory: tuple[str, ...]  # loads and stores, one register each
    others: int  # of other kinds, and loads and stores on the stack


def work(instructions: list[tuple[int, str]], kernel: Kernel, name: str) -> Work:
    """The vector instructions of one call of a tile; `name` is its dot product."""
    inner = min(
        (loop for loop in loops(instructions) if loop.dots(name) >= 2), key=lambda loop: loop.dots(name)
    )
    rounds = kernel.units // (inner.dots(name) * WIDTHS[name])
    executed = (*without_branches(line for _, line in instructions), *inner.instructions * (rounds - 1))
    arithmetic: list[str] = []
    memory: list[str] = []
    others = 0
    for line in executed:
        moved = MEMORY.match(line)
        if moved and "[sp" not in line:
            memory += [f"{moved[1]}r\t{moved[3]}"] * (2 if moved[2] == "p" else 1)
        elif ARITHMETIC.match(line):
            arithmetic.append(line)
        else:
            others += bool(re.search(r"\b[vsdq]\d+\b", line))
    return Work(tuple(arithmetic), tuple(memory), others)


def independent(found: Work) -> tuple[str, ...]:
    """A tile's arithmetic, loads and stores, with other registers: no instruction waits for another one."""
    lines = []
    for i, line in enumerate(found.arithmetic):
        first, _, rest = line.partition(",")
        lines.append(re.sub(r"\bv\d+", f"v{i % 24}", first) + "," + re.sub(r"\bv\d+", "v30", rest))
    for i, line in enumerate(found.memory):
        lines.append(f"{line}{24 + i % LOADED if line.startswith('ld') else 31}, [x0]")
    return tuple(lines)


def mixed(lines: Sequence[str]) -> tuple[str, ...]:
    """The same instructions, each kind evenly distributed."""
    kinds = Counter(line.split()[0] for line in lines)
    seen: Counter[str] = Counter()
    placed = []
    for line in lines:
        kind = line.split()[0]
        placed.append(((seen[kind] + 0.5) / kinds[kind], line))
        seen[kind] += 1
    return tuple(line for _, line in sorted(placed, key=lambda each: each[0]))


def without_waiting(found: Work, core: Core) -> float:
    """The cycles of a tile's arithmetic, loads and stores if no instruction waits for another one."""
    lines = independent(found)
    grouped = sorted(lines, key=lambda line: line.split()[0])
    return min(cycles(grouped, core), cycles(mixed(lines), core))


def estimate(instructions: list[tuple[int, str]], kernel: Kernel, core: Core, name: str) -> float | None:
    """
    The cycles of 16 multiply-adds, or None if no loop has the dot product `name`.

    If the kernel has units, the innermost loop is repeated until they are computed, and the rest of the loop around it
    (`per_call`: of the function) is added once. Otherwise the best loop counts.
    """
    width = WIDTHS[name]
    units = kernel.units
    found = [loop for loop in loops(instructions) if loop.dots(name) >= 2]
    if units == INNERMOST:
        return min(
            (cycles(loop.instructions, core) / loop.dots(name) / width for loop in found), default=None
        )
    if not found:
        return None
    found.sort(key=lambda loop: (loop.dots(name), len(loop.instructions)))
    inner = cycles(found[0].instructions, core)
    rounds = units / (found[0].dots(name) * width)
    if kernel.per_call:
        once = cycles(without_branches(line for _, line in instructions), core)
        return ((rounds - 1) * inner + once) / units
    around = [loop for loop in found[1:] if loop.dots(name) == found[0].dots(name)]
    more = cycles(around[0].instructions, core) - inner if around and rounds > 1 else 0.0
    return (rounds * inner + more) / units


def run(command: list[str]) -> str:
    """The program's output. Raises `EngineError`."""
    if shutil.which(command[0]) is None:
        raise EngineError(
            f"{command[0]} is not installed", todo="apt-get install g++-aarch64-linux-gnu llvm-16"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{command[0]} failed", found=done.stderr.strip()[-500:])
    return done.stdout


class Compiled:
    """The functions of the kernels' sources, compiled once for each architecture."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], list[tuple[str, list[tuple[int, str]]]]] = {}

    def _functions(self, source: str, march: str) -> list[tuple[str, list[tuple[int, str]]]]:
        if (source, march) not in self._of:
            ggml = upstream_source() / "llama.cpp" / "ggml"
            path = OURS / source if (OURS / source).exists() else ggml / "src/ggml-cpu/arch/arm" / source
            include = (OURS, COMMON, ggml / "include", ggml / "src", ggml / "src/ggml-cpu")
            compiler = f"{PREFIX}-gcc" if path.suffix == ".c" else f"{PREFIX}-g++"
            with tempfile.TemporaryDirectory() as folder:
                made = f"{folder}/kernels.o"
                run(
                    [
                        compiler,
                        *FLAGS,
                        f"-march={march}",
                        *(f"-I{each}" for each in include),
                        str(path),
                        "-o",
                        made,
                    ]
                )
                said = run([f"{PREFIX}-objdump", "-d", "--no-show-raw-insn", "-C", made])
            self._of[source, march] = list(functions(said))
        return self._of[source, march]

    def estimate(self, kernel: Kernel | None, core: Core, *dots: str) -> float | None:
        """The cycles of 16 multiply-adds, with the first of these instructions that the kernel uses.

        None if there is no kernel. Raises `EngineError` if no function of its name uses one of them.
        """
        if kernel is None:
            return None
        for name, instructions in self._functions(kernel.source, core.march):
            if re.search(kernel.name, name):
                for dot in dots:
                    if found := estimate(instructions, kernel, core, dot):
                        return found
        raise EngineError(f"{kernel.source} has no function {kernel.name} with {' or '.join(dots)}")

    def work(self, kernel: Kernel, core: Core) -> Work:
        """The vector instructions of a tile. Raises `EngineError` if there is no function of its name."""
        for name, instructions in self._functions(kernel.source, core.march):
            if re.search(kernel.name, name):
                return work(instructions, kernel, core.dot)
        raise EngineError(f"{kernel.source} has no function {kernel.name}")


def table_of_prompts(compiled: Compiled) -> str:
    """For each type and core: ours, its share of the peak with its limit, and upstream's of interleaved rows."""
    lines = [("type", *(f"{core.name}: patched, interleaved" for core in CORES))]
    for each in PROMPTS:
        cells = []
        for core in CORES:
            ours = compiled.estimate(each.ours_on(core), core, core.dot)
            independent = [f"{core.dot}\tv{i}.4s, v30.16b, v31.16b" for i in range(24)]
            peak = cycles(independent, core) / len(independent) / WIDTHS[core.dot]
            theirs = compiled.estimate(each.interleaved_on(core), core, core.dot, "sdot")
            assert ours is not None
            limit = peak * TILE_UNITS / without_waiting(compiled.work(each.ours_on(core), core), core)
            cells.append(f"**{ours:.2f}** ({100 * peak / ours:.0f} of {100 * limit:.0f} %), {said(theirs)}")
        lines.append((each.types, *cells))
    return markdown(lines)


def table_of_instructions(compiled: Compiled) -> str:
    """For each type, with and without i8mm: vector instructions of a tile next to its dot products of weights."""
    kinds = {core.march: core for core in CORES}
    head = (f"{core.dot}: arithmetic, loads and stores, other" for core in kinds.values())
    lines = [("type", *head)]
    for each in PROMPTS:
        cells = []
        for core in kinds.values():
            found = compiled.work(each.ours_on(core), core)
            dots = TILE_UNITS // WIDTHS[core.dot]
            cells.append(f"{dots} + {len(found.arithmetic) - dots}, {len(found.memory)}, {found.others}")
        lines.append((each.types, *cells))
    return markdown(lines)


def table_of_decoding(compiled: Compiled) -> str:
    """For each type and core: ours, upstream's of rows and of interleaved rows; a vector has one column."""
    lines = [("type", *(f"{core.name}: patched, rows, interleaved" for core in CORES))]
    for each in DECODING:
        cells = []
        for core in CORES:
            ours, *theirs = (
                said(compiled.estimate(kernel, core, "sdot"))
                for kernel in (each.ours_on(core), each.rows, each.interleaved_on(core))
            )
            cells.append(", ".join((f"**{ours}**", *theirs)))
        lines.append((each.types, *cells))
    return markdown(lines)


def sources_digest() -> str:
    """Identifies what the page is made from: our kernels with their headers, this script, and upstream's release."""
    files = [OURS / name for name in (TILE, TILE_I8MM, DOT)]
    for file in files:
        for name in re.findall(r'#include "(.*)"', file.read_text()):
            files += [path for path in (OURS / name, COMMON / name) if path.exists() and path not in files]
    script = re.sub(r'(?ms)^PAGE = """.*?"""$|^ *"""[^\\].*?"""$|^ *#.*?$', "", Path(__file__).read_text())
    lines = (" ".join(line.split()) for line in script.splitlines())
    text = "\n".join([load_pin().archive_sha256, stripped(files), *filter(None, lines)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def said(figure: float | None) -> str:
    """A cell."""
    return "–" if figure is None else f"{figure:.2f}"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="estimate_arm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "arm-estimates.md")
    page = parser.parse_args().page
    try:
        compiled = Compiled()
        text = PAGE.format(
            apple=APPLE_SOURCE,
            compiler=run([f"{PREFIX}-g++", "--version"]).splitlines()[0].replace(f"{PREFIX}-g++", "g++"),
            digest=sources_digest(),
            prompts=table_of_prompts(compiled),
            instructions=table_of_instructions(compiled),
            decoding=table_of_decoding(compiled),
        )
    except EngineError as error:
        sys.exit(f"estimate_arm: error: {error}")
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
