"""The operators on other processors: ARM under emulation, older x86, ggml's selection among variants."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ggml_variant import Build, Variant, build, sources
from selection import some_of

from kimi_gguf.engine.toolchain import find_compilers

PROGRAMS = ("test-kda", "latent-attn-test")
MATMUL = "quant-gemm-test"
X86 = platform.machine() in ("x86_64", "AMD64")

# For each instruction set that our sources distinguish (kimi-simd.h, latent-simd.h, latent-int16.cpp,
# quant-gemm-vector.h): ggml's variant with this instruction set, and the processor flags it requires. ggml uses
# the last one that the machine supports. Where AVX-512 exists, all other tests run with it; elsewhere its branches are
# only compiled (COMPILED).
AVX2 = {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi2"}
AVX512 = AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
RUN = {
    "x64": set(),
    "haswell": AVX2,
    "alderlake": AVX2 | {"avx_vnni"},
    "zen4": AVX512 | {"avx512vbmi", "avx512_vnni", "avx512_bf16"},
}
# Compiled on every machine; zen4 also runs where the processor has its flags. Sources for sandybridge take the branches
# of x64, those for skylakex the branches of zen4 and haswell.
COMPILED = some_of(("sandybridge", "skylakex", "zen4"), "zen4")
ALL_VARIANTS = Variant(
    "all-variants",
    "-Og",
    (*PROGRAMS, MATMUL),
    {"GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON", "GGML_OPENMP": "ON"},
)
# The same programs on a processor that qemu emulates, which terminates a program at any newer instruction.
EMULATED_X86 = replace(ALL_VARIANTS, runner=("qemu-x86_64",), tools={"qemu-x86_64": "qemu-user"})
WITHOUT_AVX, WITH_AVX2 = "Nehalem", "Haswell"

# Only every n-th case of a program is run under emulation, and on the instruction sets of older x86.
EMULATED = {"test-kda": 43, "latent-attn-test": 53, MATMUL: 97}
NATIVE = {"test-kda": 29, "latent-attn-test": 23, MATMUL: 17}
# Every 223rd case of latent-attn-test takes a third of the time of every 211th (0.9 and 3.2 s with AVX2).
MANY_THREADS = {"test-kda": 173, "latent-attn-test": 223, MATMUL: 389}

# Libraries of tests/native/CMakeLists.txt.
AVX_VNNI_EMULATED = "avx-vnni-emulated"
AMX_EMULATED = "amx-emulated"

# qemu 7.2, Debian 12's, emulates neither AVX-VNNI nor AVX-512: "TCG doesn't support requested feature".
INSTEAD = ", and qemu does not emulate it; the branches for it run in test_branches_for_avx_vnni_on_a_processor_without"

# ggml's variant for ARM -> a processor that qemu emulates, which terminates a program at any newer instruction. The
# first one has no dot products, and upstream's matmuls; the last one has i8mm.
ARM = {"armv8.0_1": "cortex-a53", "armv8.2_1": "neoverse-n1", "armv8.6_1": "max"}
OLDEST_ARM, *NEWER_ARM = ARM
PREFIX = "aarch64-linux-gnu"
ARM_VARIANTS = Variant(
    "arm-variants",
    "-Og",
    (*PROGRAMS, MATMUL),
    {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "GGML_NATIVE": "OFF",
        "GGML_BACKEND_DL": "ON",
        "GGML_CPU_ALL_VARIANTS": "ON",
        "GGML_OPENMP": "ON",
    },
    (f"{PREFIX}-gcc", f"{PREFIX}-g++"),
    {f"{PREFIX}-g++": f"g++-{PREFIX}", "qemu-aarch64": "qemu-user"},
    ("qemu-aarch64", "-L", f"/usr/{PREFIX}"),
)


def loaded_variants(log: str) -> list[str]:
    """The CPU variants that ggml says it has loaded."""
    return re.findall(r"loaded CPU backend from .*/libggml-cpu-([\w.]+)\.so", log)


def passes(made: Build, program: str, cases: int, threads: str = "2", **environment: str) -> None:
    """Run every n-th case of the program, with one thread and with `threads`; it must succeed and run some cases."""
    ended = made.run(program, KIMI_CASES=str(cases), KIMI_THREADS=threads, **environment)
    said = ended.stdout.splitlines()
    assert ended.returncode == 0, "\n".join([*said[-15:], ended.stderr[-1500:]])
    assert int(re.findall(r"\d+", said[-1])[0]) > (20 if threads == "2" else 5), said[-1]


@pytest.mark.parametrize(
    ("architecture", "program"),
    [
        *(pytest.param(OLDEST_ARM, program, marks=pytest.mark.full) for program in PROGRAMS),
        *((NEWER_ARM[0], program) for program in (*PROGRAMS, MATMUL)),
        *((NEWER_ARM[1], program) for program in ("latent-attn-test", MATMUL)),  # KDA has no code for it
    ],
)
def test_on_arm(architecture: str, program: str) -> None:
    made = build(ARM_VARIANTS, f"ggml-cpu-{architecture}")
    library = str(made.bin / f"libggml-cpu-{architecture}.so")
    i8mm = str(int(architecture == "armv8.6_1"))
    environment = {"QEMU_CPU": ARM[architecture], "KIMI_CPU_BACKEND": library, "KIMI_I8MM": i8mm}
    passes(made, program, EMULATED[program], **environment)


def cpu_flags() -> set[str]:
    """The flags that the processor reports."""
    line = re.search(r"(?m)^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text())
    return set(line[1].split()) if line else set()


def require(flags: set[str]) -> None:
    """Skip the test if the processor lacks one of the flags. The message says what runs instead."""
    if missing := flags - cpu_flags():
        instead = INSTEAD if missing == {"avx_vnni"} else ""
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}{instead}")


def runnable() -> list[str]:
    """The variants of RUN that this processor runs, the best one last."""
    return [name for name, flags in RUN.items() if flags <= cpu_flags()]


def build_variants(names: list[str]) -> Build:
    """The programs, with these variants."""
    return build(ALL_VARIANTS, *(f"ggml-cpu-{name}" for name in names))


needs_x86 = pytest.mark.skipif(not X86, reason="variants of x86")


@needs_x86
@pytest.mark.parametrize("name", ["haswell", "alderlake"])
@pytest.mark.parametrize("program", [*PROGRAMS, MATMUL])
def test_on_other_instruction_sets(name: str, program: str) -> None:
    require(RUN[name])
    made = build(ALL_VARIANTS, f"ggml-cpu-{name}")
    passes(made, program, NATIVE[program], KIMI_CPU_BACKEND=str(made.bin / f"libggml-cpu-{name}.so"))


# The x64 variant has no kernels for matmuls.
@needs_x86
@pytest.mark.parametrize("program", PROGRAMS)
def test_on_x86_without_avx(program: str) -> None:
    made = build(EMULATED_X86, "ggml-cpu-x64")
    library = str(made.bin / "libggml-cpu-x64.so")
    passes(made, program, EMULATED[program], QEMU_CPU=WITHOUT_AVX, KIMI_CPU_BACKEND=library)


@needs_x86
@pytest.mark.parametrize(("processor", "best"), [(WITHOUT_AVX, "x64"), (WITH_AVX2, "haswell")])
def test_ggml_picks_the_best_variant_that_an_emulated_processor_runs(processor: str, best: str) -> None:
    made = build(EMULATED_X86, "ggml-cpu-x64", "ggml-cpu-haswell")
    ended = made.run("test-kda", KIMI_CASES="400", QEMU_CPU=processor)
    assert ended.returncode == 0, ended.stdout
    assert loaded_variants(ended.stderr) == [best]


@needs_x86
@pytest.mark.parametrize(("program", "uses"), [("latent-attn-test", "dpwssd"), (MATMUL, "dpbusd")])
def test_branches_for_avx_vnni_on_a_processor_without(program: str, uses: str) -> None:
    """Our sources with the instructions of tests/native/avx-vnni-emulated.h; the rest of ggml is haswell's."""
    require(AVX2)
    made = build(ALL_VARIANTS)
    made.ninja(AVX_VNNI_EMULATED)
    library = made.bin / f"lib{AVX_VNNI_EMULATED}.so"
    assert f"emulated_{uses}_avx".encode() in library.read_bytes(), "not the branch for AVX-VNNI"
    passes(made, program, NATIVE[program], KIMI_CPU_BACKEND=str(library))


# Program -> number of threads that are compared with one.
THREADS = {"test-kda": "7", "latent-attn-test": "33", MATMUL: "100"}


@needs_x86
@pytest.mark.parametrize("program", THREADS)
def test_many_threads_with_avx2(program: str) -> None:
    require(AVX2)
    made = build(ALL_VARIANTS, "ggml-cpu-haswell")
    library = str(made.bin / "libggml-cpu-haswell.so")
    passes(made, program, MANY_THREADS[program], THREADS[program], KIMI_CPU_BACKEND=library)


@needs_x86
@pytest.mark.parametrize("threads", ["2", "33"])
def test_tile_registers_on_a_processor_with_avx512_but_without_amx(threads: str) -> None:
    """Our matmuls for zen4 with the intrinsics of tests/native/amx-emulated.h; the rest of ggml is haswell's."""
    if "amx_int8" in cpu_flags():
        pytest.skip("all other tests run with AMX")
    require(RUN["zen4"])
    made = build(ALL_VARIANTS)
    made.ninja(AMX_EMULATED)
    library = made.bin / f"lib{AMX_EMULATED}.so"
    assert b"3amx9add_bytes" in library.read_bytes(), "not the code for AMX"
    cases = NATIVE[MATMUL] if threads == "2" else MANY_THREADS[MATMUL]
    passes(made, MATMUL, cases, threads, KIMI_CPU_BACKEND=str(library))


# Loads the backends as llama_backend_init does, and prints the file that ggml keeps open.
LOADS = """
import ctypes, re, sys
ctypes.CDLL(sys.argv[1]).ggml_backend_load_all()
print(*{found[0] for line in open("/proc/self/maps") if (found := re.search("/.*libggml-cpu-.*", line))})
"""
INTRUDER = """
#include <stdio.h>
int ggml_backend_score(void) { return 1000000; }
__attribute__((constructor)) static void run(void) { fclose(fopen("ran", "w")); }
"""


@needs_x86
def test_the_variants_next_to_ggml_are_found_and_none_in_the_current_directory(tmp_path: Path) -> None:
    """Python is the program here, so the variants are not next to it."""
    (best,) = runnable()[-1:]
    made = build_variants([best])
    (tmp_path / "intruder.c").write_text(INTRUDER)
    command = [
        find_compilers("cpu")["C"].path,
        "-shared",
        "-fPIC",
        "intruder.c",
        "-o",
        "libggml-cpu-intruder.so",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    program = [sys.executable, "-c", LOADS, made.bin / "libggml-registry.so"]
    ended = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(made.bin / f"libggml-cpu-{best}.so")]
    assert not (tmp_path / "ran").exists()


@needs_x86
@pytest.mark.parametrize("name", COMPILED)
def test_our_sources_compile_for_a_variant_that_does_not_run(name: str) -> None:
    made = build(ALL_VARIANTS)
    ours = re.findall(r"(?m)^ggml/src/(ggml-cpu/kimi/.*\.c(?:pp)?)$", "\n".join(sources().paths()))
    known = made.ninja("-t", "targets", "all")
    objects = re.findall(rf"(?m)^(.*/ggml-cpu-{name}\.dir/(ggml-cpu/kimi/.*)\.o): \S+$", known)
    assert sorted(source for _, source in objects) == sorted(ours)
    made.ninja(*(path for path, _ in objects))
