"""Node fusion (ggml_ops/fusion): when nodes are fused, and that they give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_program import compile_program, run_program
from random_checkpoint import VOCAB_SIZE, Spec, write_checkpoint
from selection import some_of

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.llama import run as run_model

pytestmark = pytest.mark.engine

AS_ONE = " as one"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    return compile_program(engine, "test-node-fusion.cpp", tmp_path_factory.mktemp("fusion"))


def run(program: Path, *arguments: str, **environment: str) -> list[str]:
    """The program's lines, one per case: name, hash of the result's bits, and AS_ONE if the nodes were fused."""
    return run_program(program, *arguments, **environment).stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "environment"), [(["unfused"], {}), ([], {"GGML_CPU_DISABLE_FUSION": "1"})]
)
def test_switched_off_they_give_the_same_bits(
    program: Path, arguments: list[str], environment: dict[str, str]
) -> None:
    together = run(program)
    apart = run(program, *arguments, **environment)
    assert not any(AS_ONE in line for line in apart), "the switch did nothing"
    assert [line.removesuffix(AS_ONE) for line in together] == apart


def test_any_number_of_threads_gives_the_same_bits(program: Path) -> None:
    hashes: dict[str, set[str]] = {}
    for line in run(program):
        name, value = line.removesuffix(AS_ONE).split(": ")
        hashes.setdefault(name.split(", ")[0], set()).add(value)
    assert len(hashes) > 20
    assert [name for name, values in hashes.items() if len(values) > 1] == []


def test_numa_machines_give_the_same_bits(program: Path) -> None:
    """Matmuls assign rows to threads there."""
    assert run(program, "numa") == run(program)


def test_which_nodes_are_fused(program: Path) -> None:
    """Scores that another node reads are not fused; sums over more than 15 experts stay single nodes."""
    lines = [line for line in run(program) if "memory reused" not in line]
    apart = ("with a reader", "over 16 experts", "products")  # fused matmuls leave no trace
    for line in lines:
        assert (AS_ONE in line) != any(word in line for word in apart), line


TOGETHER, APART = "conv,scan,mla,fuse,require", "conv,scan,mla,require"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """A model whose weights ggml-cpu repacks if KIMI_REPACK requests it."""
    folder = tmp_path_factory.mktemp("quantised")
    spec = Spec(
        layers="KKM", hidden=128, kda_head_dim=64, experts=8, experts_used=4, moe_intermediate=64, seed=90
    )
    convert(write_checkpoint(folder / "checkpoint", spec), folder / "f32.gguf", TYPES["F32"])
    made = folder / "q4_0.gguf"
    run_program(engine.bin / "llama-quantize", "--pure", folder / "f32.gguf", made, "Q4_0", "1")
    return made


WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "token by token": {"step_from": 0, "flash_attention": True, "cache_type": "F16"},
    "ubatches of 17": {"n_batch": 60, "n_ubatch": 17},
}


@pytest.mark.parametrize("copies", ["0", "1"])
@pytest.mark.parametrize("threads", some_of((1, 2), 2))
@pytest.mark.parametrize("way", WAYS)
def test_a_models_logits_have_the_same_bits(
    way: str, threads: int, copies: str, quantised: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(np.random.default_rng(90).integers(0, VOCAB_SIZE, (2, 60)))
    logits = []
    monkeypatch.setenv("KIMI_REPACK", copies)
    for choice in (TOGETHER, APART):
        monkeypatch.setenv("KIMI_OPS", choice)
        options = RunOptions(**WAYS[way], threads=threads)
        logits.append(np.stack(run_model(engine, quantised, texts, options).logits))
    np.testing.assert_array_equal(*logits)


def test_llama_imatrix_sees_every_matmul(quantised: Path, engine: Engine, tmp_path: Path) -> None:
    """It reads each node's activations; nodes that it requests must not be fused."""
    text = tmp_path / "text"
    text.write_text("He was in the restaurant on the water. " * 60)

    def importance(choice: str) -> bytes:
        out = tmp_path / f"{len(choice)}.gguf"
        options = ("-m", quantised, "-f", text, "-o", out, "-c", "128", "-t", "2")
        run_program(engine.bin / "llama-imatrix", *options, KIMI_OPS=choice)
        return out.read_bytes()

    together = importance(TOGETHER)
    assert b"ffn_gate_exps" in together
    assert b"attn_k.weight" in together
    assert together == importance(APART)
