"""Races in shared memory, which the emulator detects for any order of threads if programs are compiled for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_program import NATIVE, compile_cuda
from planted_faults import run
from test_cuda_emulator import ORDERS

SOURCE = NATIVE / "emulator-races.cu"

# Kernel -> start of the comments at the two lines of its race; one is reported as current, the other as earlier.
RACES = {
    "no_barrier": ("written", "read"),
    "overwritten": ("read by another", "written again"),
    "only_a_shuffle": ("before the shuffle", "after it"),
    "only_the_warp": ("by one warp", "by the other"),
    "all_write": ("all of them", "all of them"),
    "copied": ("on its way", "read without __syncwarp"),
    "matrix": ("by each lane", "by the warp"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cuda([SOURCE], tmp_path_factory.mktemp("cuda") / "races", races=True)


def line_of(comment: str) -> int:
    """The number of the one line with this comment."""
    lines = SOURCE.read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if re.search(rf"\S.* // {comment}$", line)]
    return number


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", RACES)
def test_a_planted_race_is_found(kernel: str, order: str, program: Path) -> None:
    ended = run(program, kernel, KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order])
    assert ended.returncode == 1, ended.stdout + ended.stderr
    said = ended.stdout
    assert said.startswith(f"kernel {kernel}, block (0,0,0), thread (")
    assert re.search(
        r"a race: this thread (reads|writes) at byte \d+ of the shared array 's' of \d+ bytes, which", said
    )
    for comment in RACES[kernel]:
        assert f"{SOURCE.name}:{line_of(comment)}" in said, said


@pytest.mark.parametrize("order", ORDERS)
def test_an_access_before_the_wait_for_the_previous_kernel_is_found(order: str, program: Path) -> None:
    ended = run(program, "too_early", KIMI_CUDA_ORDER=order)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "accesses a buffer before griddepcontrol.wait" in ended.stdout
    assert f"{SOURCE.name}:{line_of('before the wait')}" in ended.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_ordered_is_let_through(order: str, program: Path) -> None:
    ended = run(program, "none", KIMI_CUDA_ORDER=order)
    assert (ended.returncode, ended.stdout) == (0, "nothing found\n")
