"""Estimate the speed of the matmul's tiles on ARM cores with dot products, without having one.

    python -m kimi_gguf.scripts.estimate_arm

Input: ggml_ops/matmul/cpu/quant-gemm-tile.cpp, compiled for ARM. Output: docs/arm-estimates.md: for the innermost loop
of each tile, llvm-mca's cycles per dot product and its share of the core's peak, which is that of independent dot
products. Needs aarch64-linux-gnu-g++ and llvm-mca (Debian: g++-aarch64-linux-gnu, llvm).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.bench.report import markdown
from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.engine.errors import EngineError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "ggml_ops" / "matmul" / "cpu"
COMPILER = "aarch64-linux-gnu-g++"
FLAGS = ("-O3", "-std=c++17", "-march=armv8.2-a+dotprod+fp16", "-S", "-o-")
CORES = {"neoverse-n1": "Neoverse N1", "cortex-a55": "Cortex-A55", "apple-a13": "Apple A13"}
DOT = "sdot"
ITERATIONS = 100
# Schemes of quant-gemm-panel.h by number, and the types that use them on ARM.
TYPES = {
    0: "Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4", 1: "IQ4_XS", 2: "Q3_K, Q6_K", 3: "Q4_K, Q5_K", 4: "Q2_K",
}  # fmt: skip
PAGE = """\
# Estimated speed of matmuls on ARM

Written by `python -m kimi_gguf.scripts.estimate_arm`; do not edit. No ARM CPU was available: these are predictions of
llvm-mca ({version}) for the innermost loop of each tile, with all data in L1, compiled by {compiler}.
Cycles are per `sdot` instruction (16 products of int8). Peak: the rate of independent `sdot` instructions on the same
core. LLVM 14 has no model of two of these cores: for the Neoverse N1 it uses that of the Cortex-A57, which has one load
per cycle (N1: two), for the Apple A13 that of the Apple A7. All tiles have {columns} columns.

{table}"""


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a tile."""

    scheme: int
    columns: int
    instructions: tuple[str, ...]

    @property
    def dots(self) -> int:
        """Its dot products."""
        return sum(line.split()[0] == DOT for line in self.instructions)


def innermost_loops(assembly: str) -> Iterator[Loop]:
    """For each scheme the loop with the most dot products, of the tile with the most columns."""
    best: dict[int, Loop] = {}
    functions = re.finditer(
        r"^(_ZN10quant_gemmL\d+tile_q8_(?:0|K)I\S+):\n(.*?)\n\t\.size\t\1", assembly, re.M | re.S
    )
    for name, body in (found.groups() for found in functions):
        scheme = re.search(r"SchemeE(\d+)", name)
        columns = re.search(r"Li(\d+)EEE", name)
        assert columns is not None
        loop = Loop(int(scheme[1]) if scheme else 0, int(columns[1]), largest_loop(body))
        if loop.dots and (loop.scheme not in best or best[loop.scheme].columns < loop.columns):
            best[loop.scheme] = loop
    return iter(best[scheme] for scheme in sorted(best))


def largest_loop(body: str) -> tuple[str, ...]:
    """The instructions between a label and a branch back to it, with the most dot products, then the fewest others."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\.L\d+):", body, re.M)}
    loops: list[tuple[str, ...]] = [()]
    for branch in re.finditer(r"^\tb\.?\w*\t(\.L\d+)$", body, re.M):
        start = labels.get(branch[1], len(body))
        lines = (line.strip() for line in body[start : branch.start()].splitlines()[1:])
        loops.append(tuple(line for line in lines if line and line[0] not in "./"))
    return max(loops, key=lambda loop: (sum(line.split()[0] == DOT for line in loop), -len(loop)))


def cycles(instructions: tuple[str, ...], core: str) -> float:
    """llvm-mca's cycles for one iteration."""
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(instructions) + "\n")
        file.flush()
        command = ["llvm-mca", "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", "-mattr=+dotprod"]
        said = run([*command, f"-iterations={ITERATIONS}", file.name])
    found = re.search(r"Total Cycles:\s+(\d+)", said)
    assert found is not None
    return int(found[1]) / ITERATIONS


def run(command: list[str]) -> str:
    """The program's output. Raises `EngineError`."""
    if shutil.which(command[0]) is None:
        raise EngineError(f"{command[0]} is not installed", todo="apt-get install g++-aarch64-linux-gnu llvm")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{command[0]} failed", found=done.stderr.strip()[-500:])
    return done.stdout


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="estimate_arm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "arm-estimates.md")
    page = parser.parse_args().page
    try:
        ggml = upstream_source() / "llama.cpp" / "ggml"
        headers = [f"-I{ggml / each}" for each in ("include", "src", "src/ggml-cpu")]
        assembly = run([COMPILER, *FLAGS, f"-I{FOLDER}", *headers, str(FOLDER / "quant-gemm-tile.cpp")])
        independent = tuple(f"{DOT}\tv{i}.4s, v30.16b, v31.16b" for i in range(24))
        peaks = {core: cycles(independent, core) / len(independent) for core in CORES}
        loops = list(innermost_loops(assembly))
        rows = [("types", *CORES.values())]
        for loop in loops:
            shares = []
            for core, peak in peaks.items():
                each = cycles(loop.instructions, core) / loop.dots
                shares.append(f"{each:.2f} cycles, {100 * peak / each:.0f} % of peak")
            rows.append((TYPES[loop.scheme], *shares))
        version = re.search(r"LLVM version (\d+)", run(["llvm-mca", "--version"]))
        text = PAGE.format(
            compiler=run([COMPILER, "--version"]).splitlines()[0].replace(COMPILER, "g++"),
            version=f"LLVM {version[1]}" if version else "LLVM",
            columns=" or ".join(sorted({str(loop.columns) for loop in loops})),
            table=markdown(rows),
        )
    except EngineError as error:
        sys.exit(f"estimate_arm: error: {error}")
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
