"""0027-copies-without-room: mapped weights are repacked, and read as a whole, only if memory has room for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from native_program import compile_shim
from random_checkpoint import Spec
from small_memory import SHIM, complete, machine
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform != "linux", reason="gives a program another /proc/meminfo by LD_PRELOAD"),
]
has_avx512 = pytest.mark.skipif(
    "avx512_vnni" not in Path("/proc/cpuinfo").read_text(),
    reason="the patched build makes copies on request only with AVX-512",
)
REPACKED = "CPU_REPACK model buffer size"
REASON = "more than 2/3 of the available memory"
READ_WHEN_USED = "read from disk when they are used"
POPULATED = re.compile("MAP_POPULATE|MADV_POPULATE_READ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices ggml-cpu repacks."""
    spec = Spec(hidden=256, experts=16, moe_intermediate=128, seed=27)
    return make_gguf(tmp_path_factory.mktemp("model"), spec, "Q4_0")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(SHIM, tmp_path_factory.mktemp("shim"))


def log(engine: Engine, model: Path, shim: Path, available: int, *options: str) -> str:
    """What the program logs if `available` bytes of memory are available, and how it maps the file."""
    return complete(
        engine,
        model,
        shim,
        "--verbosity",
        "4",
        *options,
        ROOT=str(machine(shim.parent / str(available), available)),
    )


@has_avx512
def test_copies_must_be_requested(model: Path, shim: Path, engine: Engine) -> None:
    said = log(engine, model, shim, 4 * model.stat().st_size)
    assert REPACKED not in said and REASON not in said


@has_avx512
def test_weights_are_repacked_if_there_is_room(model: Path, shim: Path, engine: Engine) -> None:
    said = log(engine, model, shim, int(1.52 * model.stat().st_size), "--repack")
    assert REPACKED in said and REASON not in said


def test_mapped_weights_without_room_for_copies_are_used_as_they_are(
    model: Path, shim: Path, engine: Engine
) -> None:
    said = log(engine, model, shim, int(1.4 * model.stat().st_size), "--repack")
    assert REPACKED not in said and REASON in said


@has_avx512
def test_weights_in_memory_are_there_once_and_are_repacked(model: Path, shim: Path, engine: Engine) -> None:
    said = log(engine, model, shim, model.stat().st_size, "--load-mode", "none", "--repack")
    assert REPACKED in said and REASON not in said


def test_mapped_weights_that_fit_into_memory_are_read_as_a_whole(
    model: Path, shim: Path, engine: Engine
) -> None:
    said = log(engine, model, shim, int(1.05 * model.stat().st_size))
    assert POPULATED.search(said) and READ_WHEN_USED not in said


def test_mapped_weights_larger_than_memory_are_read_when_they_are_used(
    model: Path, shim: Path, engine: Engine
) -> None:
    said = log(engine, model, shim, int(0.9 * model.stat().st_size))
    assert not POPULATED.search(said) and READ_WHEN_USED in said
