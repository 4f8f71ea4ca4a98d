"""Operators verify themselves on a device before they are used there: healthy devices, planted faults, and the cache.

The device is the CPU with separate memory (native/second_backend.cpp), which can compute operators wrongly or for ever,
or end the process. Whatever it does, the logits must be those of the CPU, or the context is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from llama_script import Logits, Played, PlayError, Setup, assert_same, decode, play, text
from native_program import compile_backend, compile_shim, run_program
from random_checkpoint import VOCAB_SIZE, Spec
from rpc_workers import rpc_workers
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SPEC = Spec(layers="KMK", heads=4, kda_head_dim=64, seed=44)
IDS = np.random.default_rng(45).integers(0, VOCAB_SIZE, 180)
PREFILLED = 170  # the decompressed form starts at 160
STEPS = [
    decode(*text(0, IDS[:PREFILLED])),
    *(decode((0, n, int(IDS[n]))) for n in range(PREFILLED, len(IDS))),
]
CHECKS = "verify: checking the operators on SECOND0"
MATVEC = "matmuls of one column"
PARTS = ("KDA_CONV", "KDA_SCAN", "elided state copies", "absorbed latent attention", "LATENT_ATTN", MATVEC)
HEALTHY = {**dict.fromkeys(PARTS, "passed"), "fused nodes": "absent"}
FNV_OFFSET, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
COMMAND = [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama"]


@dataclass(frozen=True)
class World:
    """A model, a build, the library with the device, and the logits of the plain CPU."""

    engine: Engine
    gguf: Path
    backend: Path
    expected: Logits

    def play(self, cache: Path, setup: Setup | None = None, **variables: str) -> Played:
        """The conversation with all layers on the device, and a cache folder of its own."""
        whole = Setup(backend=str(self.backend), n_gpu_layers=99, flash_attention=True)
        environment = {
            "KIMI_OPS": "",
            "KIMI_VERIFY_SECONDS": "30",
            "KIMI_GGUF_CACHE": str(cache),
            **variables,
        }
        return play(self.engine, self.gguf, setup or whole, STEPS, **environment)


@pytest.fixture(scope="module")
def world(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("verify")
    gguf = make_gguf(folder, SPEC)
    expected = play(engine, gguf, Setup(flash_attention=True), STEPS).logits
    return World(engine, gguf, compile_backend(engine, folder), expected)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "devices").glob("*"))


def results(cache: Path) -> dict[str, str]:
    """Part -> state in the only file of the cache."""
    (file,) = files(cache)
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    return {fields[1]: fields[2] for fields in lines if fields[0] == "result"}


def test_a_healthy_device_is_checked_once(world: World, tmp_path: Path) -> None:
    first = world.play(tmp_path, KIMI_OPS="require")
    assert_same(first.logits, world.expected)
    assert first.log.count(CHECKS) == 1
    passed = re.search(
        r"verify: SECOND0: 6 of 6 passed in ([0-9.]+) s, after [0-9.]+ s of start-up", first.log
    )
    assert passed, first.log
    assert results(tmp_path) == HEALTHY

    second = world.play(tmp_path, KIMI_OPS="require", SECOND_LOG=str(tmp_path / "log"))
    assert_same(second.logits, world.expected)
    assert "verify: " not in second.log
    computed = (tmp_path / "log").read_text().splitlines()
    assert {f"SECOND0 {name}" for name in ("KDA_CONV", "KDA_SCAN", "LATENT_ATTN")} <= set(computed)
    assert len(files(tmp_path)) == 1


def checking(world: World) -> list[int]:
    """The processes that check the device of this library."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"--check" in words and str(world.backend).encode() in words:
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Fault -> the parts that it affects, by state, and the reason in the log.
FAULTS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "wrong KDA_CONV": (
        {"SECOND_SPOILS": "KDA_CONV"},
        {"KDA_CONV": "WRONG", "elided state copies": "WRONG"},
        r"KDA_CONV: NMSE [0-9.e+-]+, bound 1e-07 \(\d+ tokens?, .*\)",
    ),
    "wrong KDA_SCAN": (
        {"SECOND_SPOILS": "KDA_SCAN"},
        {"KDA_SCAN": "WRONG", "elided state copies": "WRONG"},
        r"KDA_SCAN: NMSE [0-9.e+-]+, bound 1e-07 \(\d+ tokens?, .*\)",
    ),
    "wrong copies": (
        {"SECOND_SPOILS": "COPY"},
        {"elided state copies": "WRONG"},
        r"elided state copies: NMSE [0-9.e+-]+, bound 1e-07 \(.*\)",
    ),
    "wrong absorbed form": (
        {"SECOND_SPOILS": "FLASH_ATTN_EXT"},
        {"absorbed latent attention": "WRONG"},
        r"absorbed latent attention: NMSE [0-9.e+-]+, bound [12]e-0[57] \(\d+ (query|queries), .*\)",
    ),
    "wrong LATENT_ATTN": (
        {"SECOND_SPOILS": "LATENT_ATTN"},
        {"LATENT_ATTN": "WRONG"},
        r"LATENT_ATTN: NMSE [0-9.e+-]+, bound [12]e-0[57] \(\d+ queries, .*\)",
    ),
    "wrong matmuls of one column": (
        {"SECOND_SPOILS": "MUL_MAT,MUL_MAT_ID"},
        {MATVEC: "WRONG"},
        r"matmuls of one column: NMSE [0-9.e+-]+, bound 1e-07 \(q\d_.*, .*\)",
    ),
    "KDA_SCAN hangs": (
        {"SECOND_HANGS": "KDA_SCAN", "KIMI_VERIFY_SECONDS": "5"},
        {"KDA_SCAN": "HANGS", **dict.fromkeys([*PARTS[2:], "fused nodes"], "not checked")},
        r"KDA_SCAN: no result in time \(1 token, .*\)",
    ),
    "the absorbed form hangs": (
        {"SECOND_HANGS": "FLASH_ATTN_EXT", "KIMI_VERIFY_SECONDS": "6"},
        {"absorbed latent attention": "HANGS", **dict.fromkeys([*PARTS[4:], "fused nodes"], "not checked")},
        r"LATENT_ATTN: not checked: the time was used up",
    ),
    "KDA_CONV crashes": (
        {"SECOND_CRASHES": "KDA_CONV"},
        {"KDA_CONV": "CRASHES", "elided state copies": "CRASHES"},
        r"KDA_CONV: the process ended \(1 token, .*, signal Segmentation fault\)",
    ),
    "the absorbed form crashes": (
        {"SECOND_CRASHES": "FLASH_ATTN_EXT"},
        {"absorbed latent attention": "CRASHES"},
        r"absorbed latent attention: the process ended \(.*\)",
    ),
}  # fmt: skip
# Part -> the operator that the device must not be given, if it has one of its own.
OPERATORS = {"KDA_CONV": "KDA_CONV", "KDA_SCAN": "KDA_SCAN", "LATENT_ATTN": "LATENT_ATTN"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_not_used(fault: str, world: World, tmp_path: Path) -> None:
    variables, failed, reason = FAULTS[fault]
    began = time.monotonic()
    first = world.play(tmp_path, **variables)
    assert time.monotonic() - began < 20
    assert_same(first.logits, world.expected)
    assert re.search(f"verify: SECOND0: not used: {reason}\n", first.log), first.log
    assert results(tmp_path) == HEALTHY | failed
    assert not checking(world)

    second = world.play(tmp_path, **variables, SECOND_LOG=str(tmp_path / "log"))  # from the cache
    assert_same(second.logits, world.expected)
    assert CHECKS not in second.log
    assert second.log.count("verify: SECOND0: not used: ") == len(failed)
    computed = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    refused = {OPERATORS[part] for part in failed if part in OPERATORS}
    used = set(OPERATORS.values()) - refused
    if refused & {"KDA_CONV", "KDA_SCAN"}:  # they go together
        used -= {"KDA_CONV", "KDA_SCAN"}
        assert "kda: operators not used, upstream's graph instead: SECOND0, which holds layer 0" in second.log
    assert computed & set(OPERATORS.values()) == used


# Part -> what the device computes wrongly, and how often kimi-verify computes it.
COUNTS = {
    "KDA_CONV": ("KDA_CONV", 12),
    "KDA_SCAN": ("KDA_SCAN", 17),
    "elided state copies": ("COPY", 24),
    "absorbed latent attention": ("FLASH_ATTN_EXT", 22),
    "LATENT_ATTN": ("LATENT_ATTN", 14),
}


def check_part(world: World, part: str, **variables: str) -> str:
    """The output of the process that checks a part."""
    arguments = ["--check", "SECOND0", "SECOND", world.backend, "60", part]
    return run_program(world.engine.bin / "kimi-verify", *arguments, **variables).stdout


@pytest.mark.parametrize("part", COUNTS)
def test_one_wrong_case_is_enough(part: str, world: World) -> None:
    """Of all its types and shapes: the first, one between, and the last one."""
    spoiled, count = COUNTS[part]
    for nth in (0, count // 2, count - 1, count):
        output = check_part(world, part, SECOND_SPOILS=spoiled, SECOND_SPOILS_NTH=str(nth))
        cases = re.findall(f"^case\t{part}\t(.*)$", output, re.MULTILINE)
        ((state, name),) = re.findall(f"^result\t{part}\t(.*?)\t.*\t(.*)$", output, re.MULTILINE)
        assert state == ("passed" if nth == count else "WRONG")
        assert len(cases) == count
        assert nth == count or name == cases[nth]


# The cases of a type, in their order -> the number of matmuls in each.
MATMULS = {
    "several matrices": 3,
    "few rows": 1,
    "many rows": 1,
    "a batch": 1,
    "experts": 1,
    "experts with gates": 2,
    "gates": 2,
}
MATVEC_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K")


@pytest.mark.parametrize("place", [0, 36, 76, 109])
def test_one_wrong_matmul_is_enough(place: int, world: World) -> None:
    cases = [f"{each}, {case}" for each in MATVEC_TYPES for case, n in MATMULS.items() for _ in range(n)]
    output = check_part(world, MATVEC, SECOND_SPOILS="MUL_MAT,MUL_MAT_ID", SECOND_SPOILS_NTH=str(place))
    found = re.findall(f"^result\t{MATVEC}\tWRONG\t.*\t(.*)$", output, re.MULTILINE)
    assert found == [cases[place]], output


@pytest.mark.parametrize(
    ("part", "by"),
    [
        ("absorbed latent attention", "nan"),
        ("absorbed latent attention", "scale"),
        ("LATENT_ATTN", "inf"),
        ("LATENT_ATTN", "last"),
    ],
)
def test_every_kind_of_wrong_value_is_found(part: str, by: str, world: World) -> None:
    """Scaled values are within the bound of the quantized caches, which come last and have the larger error."""
    output = check_part(world, part, SECOND_SPOILS=COUNTS[part][0], SECOND_SPOILS_BY=by)
    ((nmse, bound, name),) = re.findall(rf"^result\t{part}\tWRONG\t(.*)\t(.*)\t(.*)$", output, re.MULTILINE)
    if by in ("nan", "inf"):
        assert nmse == "inf"
    if by == "scale":
        assert 1e-7 < float(nmse) < 2e-5
        assert bound == "1e-07"
        assert "q8_0" not in name


def test_small_results_next_to_large_ones_are_compared(world: World) -> None:
    """An error of 2 % in q, whose squares are 1/30000 of those of v."""
    output = check_part(
        world, "KDA_CONV", SECOND_SPOILS="KDA_CONV", SECOND_SPOILS_NTH="2", SECOND_SPOILS_BY="scale"
    )
    assert re.search(r"^result\tKDA_CONV\tWRONG\t.*\t2 tokens, 2 sequences,", output, re.MULTILINE), output


def test_operators_that_the_device_lacks(world: World, tmp_path: Path) -> None:
    variables = {"SECOND_REFUSES": "KDA_SCAN,LATENT_ATTN"}
    played = world.play(tmp_path, **variables)
    assert_same(played.logits, world.expected)
    assert "4 of 4 passed" in played.log
    assert results(tmp_path) == HEALTHY | dict.fromkeys(("KDA_SCAN", "LATENT_ATTN"), "absent")


@pytest.mark.parametrize(
    ("operators", "error"),
    [
        ("require", r"KIMI_OPS=require: SECOND0: KDA_SCAN: NMSE [0-9.e+-]+, bound 1e-07 \(.*\)"),
        ("conv,scan,require", "KIMI_OPS=require: SECOND0: KDA_SCAN: NMSE "),
        ("mla,require", None),
        ("off", None),
    ],
)
def test_required_operators_have_to_pass(
    operators: str, error: str | None, world: World, tmp_path: Path
) -> None:
    variables = {"KIMI_OPS": operators, "SECOND_SPOILS": "KDA_SCAN"}
    if error is None:
        assert_same(world.play(tmp_path, **variables).logits, world.expected)
    else:
        with pytest.raises(PlayError, match=error):
            world.play(tmp_path, **variables)


def verify(world: World, cache: Path, **variables: str) -> subprocess.Popen[str]:
    """kimi-verify without arguments: checks all devices again."""
    environment = {"GGML_BACKEND_PATH": str(world.backend), "KIMI_GGUF_CACHE": str(cache), **variables}
    return subprocess.Popen(
        [world.engine.bin / "kimi-verify"], env=os.environ | environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def test_without_memory_nothing_is_known(world: World, tmp_path: Path) -> None:
    output = verify(world, tmp_path, SECOND_MEMORY="2").communicate()[0]
    assert "problem\tthere is not enough memory on the device\n" in output
    unknown = re.findall("^result\t(.*)\tnot checked\t0\t0\t(.*)$", output, re.MULTILINE)
    assert len(unknown) > 1
    assert {reason for _, reason in unknown} == {""}  # not the name of a case: the problem is the reason
    assert not files(tmp_path)


def test_an_old_result_does_not_outlive_a_check_with_a_problem(world: World, tmp_path: Path) -> None:
    world.play(tmp_path)
    assert results(tmp_path) == HEALTHY
    output = verify(world, tmp_path, SECOND_SPOILS="KDA_CONV", SECOND_MEMORY="2").communicate()[0]
    assert "result\tKDA_CONV\tWRONG\t" in output
    assert "problem\t" in output
    again = world.play(tmp_path, SECOND_SPOILS="KDA_CONV")
    assert "not used: KDA_CONV: NMSE" in again.log
    assert_same(again.logits, world.expected)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_program_is_no_result(by: signal.Signals, world: World, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group; a service manager signals all processes."""
    process = verify(world, tmp_path, SECOND_HANGS="KDA_CONV", KIMI_VERIFY_SECONDS="20")
    wait_until(lambda: bool(checking(world)), 10)
    (child,) = checking(world)
    assert os.getpgid(child) != os.getpgid(process.pid)
    os.kill(child, by)
    output = process.communicate(timeout=10)[0]
    assert f"problem\tkimi-verify was stopped from outside: signal {signal.strsignal(by)}\n" in output
    assert not files(tmp_path)


def test_the_check_ends_without_its_parent(world: World, tmp_path: Path) -> None:
    process = verify(world, tmp_path, SECOND_HANGS="KDA_CONV", KIMI_VERIFY_SECONDS="1")
    wait_until(lambda: bool(checking(world)), 10)
    process.kill()
    process.communicate()
    wait_until(lambda: not checking(world), 6)


def checksum(text: str) -> str:
    hashed = FNV_OFFSET
    for byte in text.encode():
        hashed = (hashed ^ byte) * FNV_PRIME % 2**64
    return f"{hashed:016x}"


def damage_text(text: str) -> str:
    return text.replace("passed", "WRONG", 1)


def cut_end(text: str) -> str:
    return text[: len(text) // 2]


def remove_part(text: str) -> str:
    kept = re.sub("result\tKDA_CONV.*\n", "", text).split("checksum")[0]
    return f"{kept}checksum\t{checksum(kept)}\n"


def of_another_driver(text: str) -> str:
    """A valid file of another machine."""
    other = damage_text(text).replace("\ndriver\t", "\ndriver\tx").split("checksum")[0]
    return f"{other}checksum\t{checksum(other)}\n"


@pytest.mark.parametrize("change", [damage_text, cut_end, remove_part, of_another_driver, lambda _: ""])
def test_a_damaged_or_foreign_file_is_ignored(
    change: Callable[[str], str], world: World, tmp_path: Path
) -> None:
    world.play(tmp_path)
    (file,) = files(tmp_path)
    whole = file.read_text()
    head, _, mark = whole.rpartition("checksum\t")
    assert mark == f"{checksum(head)}\n"
    file.write_text(change(whole))
    assert file.read_text() != whole

    again = world.play(tmp_path)
    assert again.log.count(CHECKS) == 1
    assert "not used" not in again.log
    assert file.read_text() == whole
    assert CHECKS not in world.play(tmp_path).log


@pytest.mark.parametrize(
    ("fault", "repeated", "age"), [("CRASHES", True, 25), ("CRASHES", True, -1), ("SPOILS", False, 25)]
)
def test_what_crashed_is_checked_again_after_a_day(
    fault: str, repeated: bool, age: int, world: World, tmp_path: Path
) -> None:
    """Or if the clock was set back. age: hours."""
    world.play(tmp_path, **{f"SECOND_{fault}": "KDA_CONV"})
    (file,) = files(tmp_path)
    for hours, expected in ((23, False), (age, repeated)):
        changed = time.time() - 3600 * hours
        os.utime(file, (changed, changed))
        played = world.play(tmp_path)
        assert (CHECKS in played.log) == expected
        assert ("not used" in played.log) != expected


def test_a_time_limit_that_is_not_a_number(world: World, tmp_path: Path) -> None:
    played = world.play(tmp_path, KIMI_VERIFY_SECONDS="off")
    assert "KIMI_VERIFY_SECONDS is 'off', expected a number from 0 to 86400: 30 is used" in played.log
    assert played.log.count(CHECKS) == 1


def test_other_settings_of_the_backend_are_checked_again(world: World, tmp_path: Path) -> None:
    """They decide which kernels run, or on which device."""
    variable = "CUDA_VISIBLE_DEVICES"
    world.play(tmp_path, **{variable: "1"})
    assert CHECKS in world.play(tmp_path).log
    assert CHECKS not in world.play(tmp_path, **{variable: "1"}).log
    assert CHECKS in world.play(tmp_path, **{variable: "0\n1"}).log
    assert len(files(tmp_path)) == 3


def test_a_file_of_the_build_that_changes_is_checked_again(world: World, tmp_path: Path) -> None:
    """The library with the kernels, ggml's common library, a library of the CPU, and the program."""
    build = tmp_path / "build"
    shutil.copytree(world.engine.lib, build / "lib", symlinks=True)
    (build / "bin").mkdir()
    program = Path(shutil.copy(world.engine.bin / "kimi-verify", build / "bin"))
    (build / "python").symlink_to(world.engine.folder / "python")
    backend = Path(shutil.copy(world.backend, tmp_path))
    own = replace(world, engine=replace(world.engine, folder=build), backend=backend)
    (common,) = {each.resolve() for each in (build / "lib").glob("libggml-base.*")}
    cpu = next(each.resolve() for each in (build / "lib").glob("libggml-cpu*"))
    assert CHECKS in own.play(tmp_path).log
    for file in (backend, common, cpu, program):
        assert CHECKS not in own.play(tmp_path).log
        os.utime(file, (0, 0))
        assert CHECKS in own.play(tmp_path).log


def test_processes_that_start_at_once(world: World, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for played in pool.map(lambda _: world.play(tmp_path), range(4)):
            assert_same(played.logits, world.expected)
            assert "not used" not in played.log
    assert results(tmp_path) == HEALTHY
    assert CHECKS not in world.play(tmp_path).log


@pytest.mark.parametrize("loaded", [False, True])
def test_a_context_on_the_cpu_checks_nothing(loaded: bool, world: World, tmp_path: Path) -> None:
    setup = Setup(backend=str(world.backend) if loaded else None, op_offload=False, flash_attention=True)
    assert "verify: " not in world.play(tmp_path, setup).log
    assert not (tmp_path / "devices").exists()


def test_a_device_with_single_tensors_is_checked(world: World, tmp_path: Path) -> None:
    """By --override-tensor: the operator that reads the tensor runs there."""
    setup = Setup(
        backend=str(world.backend), op_offload=False, flash_attention=True,
        tensors_on=((r"blk\.0\.ssm_conv", "SECOND0"),),
    )  # fmt: skip
    variables = {"SECOND_SPOILS": "KDA_CONV", "SECOND_LOG": str(tmp_path / "log")}
    unchecked = world.play(tmp_path, setup, **variables, KIMI_VERIFY_SECONDS="0")
    assert not np.allclose(unchecked.logits, world.expected)
    checked = world.play(tmp_path, setup, **variables)
    assert "verify: SECOND0: not used: KDA_CONV: NMSE" in checked.log
    assert_same(checked.logits, world.expected)


def test_the_pipe_is_not_inherited(world: World, tmp_path: Path) -> None:
    """Not even by a process that another thread starts at that moment: kimi-verify would seem to hang."""
    shim = compile_shim("inherited_pipes.c", tmp_path)
    log = tmp_path / "log"
    played = world.play(tmp_path, LD_PRELOAD=str(shim), PIPE_LOG=str(log))
    assert "6 of 6 passed" in played.log
    pipes = [line for line in log.read_text().splitlines() if "libggml-base" in line]
    assert pipes
    assert all(line.endswith(" closed") for line in pipes)


def test_a_static_program_does_not_run_what_is_in_the_current_folder(tmp_path: Path) -> None:
    """It is found by PATH, so that its own name for itself is not a path."""
    sources = Path(__file__).parents[2] / "ggml_ops" / "verify"
    main = tmp_path / "main.cpp"
    main.write_text(
        '#include "ggml-verify-process.h"\n#include <cstdio>\nint main() { puts(ggml_verify_program().c_str()); }\n'
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "here").mkdir()
    for folder in ("here", "bin"):
        for name in ("program", "kimi-verify"):
            (tmp_path / folder / name).write_text("#!/bin/sh\n")
            (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "bin" / "program").unlink()
    compile_it = ["c++", "-std=c++17", f"-I{sources}", main, sources / "ggml-verify-process.cpp", "-ldl"]
    subprocess.run([*compile_it, "-o", tmp_path / "bin" / "program"], check=True)
    ended = subprocess.run(
        ["program"], cwd=tmp_path / "here", env=os.environ | {"PATH": str(tmp_path / "bin")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout == f"{tmp_path / 'bin' / 'kimi-verify'}\n"


def test_a_cache_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "devices").write_text("a file")
    played = world.play(tmp_path)
    assert_same(played.logits, world.expected)
    assert "cannot be written" in played.log
    assert "not used" not in played.log


@pytest.mark.parametrize("fault", ["KDA_SCAN", "FLASH_ATTN_EXT"])
def test_a_worker_checks_its_devices(
    fault: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_BACKEND_PATH", str(world.backend))
    monkeypatch.setenv("SECOND_SPOILS", fault)
    monkeypatch.setenv("KIMI_VERIFY_SECONDS", "30")
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path))
    with rpc_workers(world.engine, tmp_path, 1, "--device", "SECOND0") as (worker,):
        assert "verify: SECOND0: not used: " in worker.log.read_text()
        setup = Setup(workers=(worker.endpoint,), n_gpu_layers=99, flash_attention=True)
        played = world.play(tmp_path, setup)
    assert_same(played.logits, world.expected)
    assert "verify: " not in played.log  # of the client
    in_use = "kda: operators in use" in played.log
    assert in_use == (fault != "KDA_SCAN")
    assert ("RPC0, which holds layer 0, does not have KDA_SCAN" in played.log) == (not in_use)


@pytest.fixture
def without_program(world: World, tmp_path: Path) -> World:
    """The same build as libraries only, as another program may bring them."""
    shutil.copytree(world.engine.lib, tmp_path / "build" / "lib")
    (tmp_path / "build" / "python").symlink_to(world.engine.folder / "python")
    return replace(world, engine=replace(world.engine, folder=tmp_path / "build"))


def test_operators_that_cannot_be_checked_are_not_used(without_program: World, tmp_path: Path) -> None:
    played = without_program.play(tmp_path)
    assert_same(played.logits, without_program.expected)
    for part in PARTS:
        assert f"not used: {part}: not checked: the program kimi-verify is not next to" in played.log
    assert "kda: operators not used" in played.log
    assert not (tmp_path / "devices").exists()  # it may be there the next time
    with pytest.raises(PlayError, match="KIMI_OPS=require: SECOND0: KDA_CONV: not checked: the program"):
        without_program.play(tmp_path, KIMI_OPS="require")
    assert "kda: operators in use" in without_program.play(tmp_path, KIMI_VERIFY_SECONDS="0").log


def doctor(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "doctor", "--devices", *options]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_doctor_without_a_gpu(world: World) -> None:
    ended = doctor()
    assert ended.returncode == 0, ended.stderr
    assert "this build computes on the CPU: no GPU was checked (kimi-llama build" in ended.stdout
    report = json.loads(doctor("--json").stdout)
    assert (report["passed"], report["devices"]) == (True, [])


@pytest.mark.parametrize("fault", ["", "LATENT_ATTN"])
def test_doctor_prints_json(fault: str, world: World) -> None:
    ended = doctor("--json", SECOND_SPOILS=fault, GGML_BACKEND_PATH=str(world.backend))
    assert ended.returncode == (1 if fault else 0), ended.stderr
    report = json.loads(ended.stdout)
    (device,) = report["devices"]
    assert report["passed"] == (not fault)
    assert report["commit"] == json.loads((world.engine.folder / "manifest.json").read_text())["commit"]
    assert device["facts"]["device"] == "SECOND0 (the CPU with memory of its own)"
    assert device["seconds"]["checked"] > 0
    expected = HEALTHY | ({fault: "WRONG"} if fault else {})
    assert {part["name"]: part["state"] for part in device["parts"]} == expected
    for part in device["parts"]:
        if part["state"] == "absent":
            assert part["nmse"] is None
        else:
            assert (part["nmse"] <= part["bound"]) == (part["state"] == "passed")


@pytest.mark.parametrize("fault", ["", "LATENT_ATTN"])
def test_doctor_checks_checks_again_and_prints_a_text_for_an_issue(fault: str, world: World) -> None:
    """KIMI_VERIFY_SECONDS=0 is for contexts."""
    for seconds in ("30", "0"):
        ended = doctor(SECOND_SPOILS=fault, KIMI_VERIFY_SECONDS=seconds, GGML_BACKEND_PATH=str(world.backend))
        assert ended.returncode == (1 if fault else 0), ended.stderr
        assert CHECKS in ended.stderr
        table = dict(re.findall(rf"^({'|'.join(PARTS)}) +(\w+) ", ended.stdout, re.MULTILINE))
        assert table == dict.fromkeys(PARTS, "passed") | ({fault: "WRONG"} if fault else {})
        assert ended.stdout.startswith("```\n")
        assert ended.stdout.endswith("\n```\n")
        assert json.loads((world.engine.folder / "manifest.json").read_text())["commit"] in ended.stdout
        assert "device   SECOND0 (the CPU with memory of its own)" in ended.stdout
        assert "into an issue" in ended.stderr
