"""ggml and our native tests with sanitizers: addresses and undefined behaviour, and data races.

Fewer cases than without them (KIMI_CASES). Tensors of the native tests end where their buffer ends (ApartBuffers), so
an access beyond a tensor is beyond the heap block. Each sanitizer must find a planted fault of its kind in a copy of
the KDA scan.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from ggml_variant import Build, Variant, build
from selection import some_of

THREADED = ("test-kda", "latent-attn-test", "quant-gemm-test", "quant-gemm-gated-test")
PROGRAMS = (*THREADED, "test_fattn_f32", "split-test")
CASES = {**dict.fromkeys(THREADED, "31"), "test-kda": "61"}
THREADED_CASES = {**dict.fromkeys(THREADED, "61"), "quant-gemm-test": "127"}
# Results of so many threads are compared with those of one. Waiting threads spin, so more threads than cores slow each
# other down; addresses depend on their number.
COMPARED = {"address": "7", "thread": "2"}
ADDRESS = Variant(
    "address",
    "-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
    " -fno-sanitize=null,object-size,vptr",  # address finds what they find, and they take long to compile
    PROGRAMS,
    environment={"UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_stack_use_after_return=1"},
)
THREAD = Variant(
    "thread",
    "-Og -g1 -fsanitize=thread",
    THREADED,
    runner=("setarch", "-R"),  # it does not support much randomness of the memory map
    environment={"TSAN_OPTIONS": "halt_on_error=1"},
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_addresses_and_undefined_behaviour(program: str) -> None:
    cases = CASES.get(program, "1")
    ended = build(ADDRESS).run(program, KIMI_CASES=cases, KIMI_THREADS=COMPARED["address"])
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-4000:]


@pytest.mark.full  # compiling takes longest
@pytest.mark.parametrize("program", THREADED)
def test_threads(program: str) -> None:
    cases = THREADED_CASES[program]
    ended = build(THREAD).run(program, KIMI_CASES=cases, KIMI_THREADS=COMPARED["thread"])
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-4000:]


# A line at the start of the scan, executed by every thread, and the expected message.
FAULTS = {
    "a read beyond a tensor": (
        ADDRESS,
        "volatile float x = ((const float *) dst->src[GGML_KDA_SCAN_NORM]->data)[dst->src[GGML_KDA_SCAN_F]->ne[0]];"
        " (void) x;",
        "heap-buffer-overflow",
    ),
    "a misaligned read": (
        ADDRESS,
        "volatile float x = *(const float *) ((const char *) dst->src[0]->data + 1); (void) x;",
        "misaligned address",
    ),
    "an overflow of signed numbers": (
        ADDRESS,
        "volatile int x = 0x7fffffff; x = x + params->nth;",
        "signed integer overflow",
    ),
    "a race": (THREAD, "((volatile float *) dst->data)[0] = (float) params->ith;", "data race"),
}


@pytest.mark.parametrize("fault", some_of(FAULTS, *(name for name in FAULTS if FAULTS[name][0] is ADDRESS)))
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    variant, line, word = FAULTS[fault]
    made = build(variant)
    ended = made.run(plant(made, line, tmp_path) / "test-kda", KIMI_CASES="400")
    assert ended.returncode != 0
    assert word in ended.stderr


def plant(made: Build, line: str, folder: Path) -> Path:
    """Copy bin/ with the line at the start of the scan in its ggml-cpu; returns the folder."""
    commands = json.loads((made.folder / "compile_commands.json").read_text())
    entry = next(each for each in commands if each["file"].endswith("/ggml-cpu/kimi/kda-scan.cpp"))
    source = Path(entry["file"])
    head = re.compile(r"(void ggml_compute_forward_kda_scan\([^{]*\{)")
    text, count = head.subn(lambda found: f"{found[1]} {line}", source.read_text())
    assert count == 1
    altered, compiled = folder / source.name, folder / "planted.o"
    altered.write_text(text)
    command = [str(altered) if word == str(source) else word for word in shlex.split(entry["command"])]
    command[command.index("-o") + 1] = str(compiled)
    subprocess.run([*command, f"-I{source.parent}"], cwd=entry["directory"], check=True)

    shutil.copytree(made.bin, folder / "bin")
    link = made.ninja("-t", "commands", "ggml-cpu").splitlines()[-1]
    words = [word for word in shlex.split(link) if word not in (":", "&&")]
    words = [str(compiled) if word.endswith("/kda-scan.cpp.o") else word for word in words]
    words[words.index("-o") + 1] = str(folder / "bin" / "libggml-cpu.so")
    subprocess.run(words, cwd=made.folder, check=True)
    return folder / "bin"
