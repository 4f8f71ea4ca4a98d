"""Latent attention on CUDA: the kernels' own sources on the CPU, compared with float64, in the cases of the CPU test.

The nodes are made by ggml and read by the code that reads them in ggml-cuda (tests/native/cuda/latent-cuda-test.cpp).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_cases import CACHE_CASES
from cuda_program import (
    AMPERE,
    GEFORCE,
    LATENT,
    LATENT_GLUE,
    LATENT_KERNELS,
    NATIVE,
    compile_with_ggml,
)
from native_program import run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SOURCES = [*LATENT_KERNELS, NATIVE / "latent-cuda-test.cpp"]
INCLUDE = [LATENT.parent, LATENT]
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
FORMS = {"absorbed": "17", "decompressed": "37"}  # every n-th case is checked for races


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("latent") / "latent-test"
    return compile_with_ggml(engine, SOURCES, target, include=INCLUDE, options=GEFORCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cache_type", "cases"), CACHE_CASES)
def test_every_shape_mask_and_order_of_threads(cache_type: str, cases: str, form: str, program: Path) -> None:
    assert ", 0 failed" in run_program(program, form, cache_type, KIMI_CASES=cases).stdout


@pytest.mark.parametrize("form", FORMS)
def test_nodes_that_the_kernels_do_not_fit_are_refused(form: str, program: Path) -> None:
    assert ", 0 failed" in run_program(program, form).stdout


def test_blocks_of_64_rows_before_12_0(engine: Engine, tmp_path: Path) -> None:
    """They keep fewer words of q in shared memory than those for 12.0, which `program` has."""
    attend = LATENT / "latent-attend.cu"
    rest = [source for source in SOURCES if source != attend]
    program = compile_with_ggml(
        engine, [attend], tmp_path / "ampere", include=INCLUDE, options=AMPERE, others=(rest, GEFORCE)
    )
    assert ", 0 failed" in run_program(program, "absorbed", "q8_0", "q4_0", KIMI_CASES="23").stdout


@pytest.mark.full  # compiling takes longest
def test_no_races_in_shared_memory(engine: Engine, tmp_path: Path) -> None:
    program = compile_with_ggml(
        engine, SOURCES, tmp_path / "races", include=INCLUDE, options=GEFORCE, races=True
    )
    for form, cases in FORMS.items():
        assert ", 0 failed" in run_program(program, form, *TYPES, KIMI_CASES=cases).stdout


@pytest.fixture(scope="module")
def glue(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels are those of `program`. With GEFORCE ggml's headers would include CUDA 13's: its side has none."""
    return compile_with_ggml(
        engine,
        [*LATENT_GLUE, NATIVE / "latent-glue-test.cu"],
        tmp_path_factory.mktemp("glue") / "glue",
        include=INCLUDE,
        others=(LATENT_KERNELS, GEFORCE),
    )


def test_which_nodes_of_ggml_are_taken(glue: Path) -> None:
    ended = run_program(glue)
    assert ended.stdout == "all as it should be\n"
    assert ended.stderr.count("latent attention: FLASH_ATTN_EXT converts its cache to F16: a type") == 1


@pytest.mark.full  # caches of more than 100000 keys
@pytest.mark.parametrize("capability", ["900", "1200"])
def test_which_devices_add_in_halves(capability: str, glue: Path) -> None:
    assert run_program(glue, capability).stdout == "all as it should be\n"


@pytest.mark.parametrize("cases", ["101", pytest.param("7", marks=pytest.mark.full)])
def test_upstreams_kernel_in_runs_of_keys(cases: str, engine: Engine, tmp_path: Path) -> None:
    """Upstream's own kernel and launches; its errors over the whole cache are printed, too."""
    sources = [LATENT / "latent-runs.cu", NATIVE / "latent-runs-test.cu"]
    program = compile_with_ggml(
        engine, sources, tmp_path / "runs", include=INCLUDE, options=[*AMPERE, "-O1", "-w"]
    )
    assert run_program(program, cases).stdout.endswith("all as it should be\n")
