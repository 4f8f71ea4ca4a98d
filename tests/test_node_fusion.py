"""Runs of nodes computed as one (ggml_ops/node_fusion): when they are, and that they give the same bits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from native_program import compile_program

from kimi_gguf.scripts.engine import Engine

pytestmark = pytest.mark.engine

AS_ONE = " as one"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    return compile_program(engine, "test-node-fusion.cpp", tmp_path_factory.mktemp("fusion"), ())


def run(program: Path, **environment: str) -> list[str]:
    """The program's lines, a case each: name, hash of the result's bits, and AS_ONE where the nodes ran so."""
    ended = subprocess.run(
        [program], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "value"), [("KIMI_OPS", "off"), ("KIMI_OPS", "conv,scan"), ("GGML_CPU_DISABLE_FUSION", "1")]
)
def test_switched_off_they_give_the_same_bits(program: Path, name: str, value: str) -> None:
    together = run(program, KIMI_OPS="require")
    apart = run(program, **{name: value})
    assert not any(AS_ONE in line for line in apart), "the switch did nothing"
    assert [line.removesuffix(AS_ONE) for line in together] == apart


def test_any_number_of_threads_gives_the_same_bits(program: Path) -> None:
    hashes: dict[str, set[str]] = {}
    for line in run(program, KIMI_OPS="fuse"):
        name, value = line.removesuffix(AS_ONE).split(": ")
        hashes.setdefault(name.split(", ")[0], set()).add(value)
    assert len(hashes) > 20
    assert [name for name, values in hashes.items() if len(values) > 1] == []


def test_what_a_run_is_and_what_is_none(program: Path) -> None:
    """Scores that another node reads are wanted, and sums over more than 15 experts stay single nodes."""
    lines = [line for line in run(program, KIMI_OPS="") if "memory reused" not in line]
    apart = ("with a reader", "over 16 experts", "products")  # products leave no trace
    for line in lines:
        assert (AS_ONE in line) != any(word in line for word in apart), line
