"""Nodes that ggml-metal computes with one dispatch of ours, on the emulated device: compared with the single nodes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from llama_script import Played, PlayError, Setup, assert_same, decode, play, text
from metal_program import dispatches, on_metal, planted
from native_program import compile_program, run_program
from random_checkpoint import Spec, write_checkpoint
from selection import some_of
from synthetic_case import make_gguf

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# More experts than a simdgroup has lanes; in the last step only one lane has an expert.
SPEC = Spec(layers="KM", hidden=160, kda_head_dim=64, experts=65, experts_used=8, seed=70)
ROUTER, ADD_NORM = "kernel_router_f32", "kernel_add_rms_norm_mul_f32"
# Dispatches of a batch: one layer has a router; both layers have two residuals, one of which also adds the experts.
FUSED = {ROUTER: 1, f"{ADD_NORM}_4_1": 3, f"{ADD_NORM}_4_2": 1}
ORDERS = some_of(("forwards", "backwards"), "backwards")
STEPS = [decode(*text(0, range(8))), decode(*text(0, [3], 8))]
# Fault -> the text in the kernels, and what it is instead.
FAULTS = {
    "without bias": ("probs[i] + bias[expert]", "probs[i]"),
    "weights by score": ("best_prob = probs[i]", "best_prob = scores[i]"),
    "the sum has no limit": ("clamp(sum, args.min, args.max)", "sum"),
    "without eps": ("mean + args.eps", "mean"),
    "two of three added": ("x = x + src2[offs + i00]", "x = x + 0.0f * src2[offs + i00]"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metal-router")
    return make_gguf(folder, SPEC)


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(engine, "metal/fused-nodes-test.cpp", tmp_path_factory.mktemp("fused-nodes"))


@pytest.mark.parametrize(
    ("order", "threads"),
    [pytest.param("forwards", 1024, marks=pytest.mark.full), ("backwards", 1024), ("forwards", 256)],
)
def test_nodes_that_are_one_dispatch_and_nodes_that_are_not(
    order: str, threads: int, program: Path, metal_backend: Path, tmp_path: Path
) -> None:
    """With the number of threads that a threadgroup can have."""
    log = tmp_path / "log"
    variables = {
        "KIMI_METAL_ORDER": order,
        "KIMI_METAL_MAX_THREADS": str(threads),
        "KIMI_METAL_LOG": str(log),
    }
    output = run_program(program, metal_backend, **variables).stdout
    assert ", 0 failed" in output
    (count,) = re.findall(r"^(\d+) as one dispatch$", output, re.MULTILINE)
    ours = [each for each in dispatches(log) if each.kernel.startswith((ROUTER, ADD_NORM))]
    assert [each.nodes.split("'")[1] for each in ours] == ["one"] * int(count)
    assert max(each.threads[0] for each in ours) == threads


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_with_and_without_fusion(
    order: str, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    expected = play(engine, model, Setup(), STEPS, KIMI_OPS="off").logits
    for operators in ("fuse", "off"):
        log = tmp_path / operators
        variables = {"KIMI_OPS": operators, "KIMI_METAL_ORDER": order, "KIMI_METAL_LOG": str(log)}
        assert_same(play(engine, model, on_metal(metal_backend), STEPS, **variables).logits, expected)
        ran = fused_kernels(log)
        expected_count = len(STEPS) if operators == "fuse" else 0
        assert ran == Counter({each: n * expected_count for each, n in FUSED.items()})


def fused_kernels(log: Path) -> Counter[str]:
    """How often each ran."""
    ran = Counter(each.kernel.split("_n_expert=")[0] for each in dispatches(log))
    return Counter({each: ran[each] for each in FUSED})


@pytest.mark.parametrize("fault", FAULTS)
def test_kimi_verify_finds_wrong_kernels(fault: str, metal_backend: Path, engine: Engine) -> None:
    with planted(metal_backend, "fuse", *FAULTS[fault]):
        assert check_fused_nodes(metal_backend, engine) == "WRONG"


def test_kimi_verify_passes_right_kernels(metal_backend: Path, engine: Engine) -> None:
    assert check_fused_nodes(metal_backend, engine) == "passed"


def check_fused_nodes(backend: Path, engine: Engine) -> str:
    arguments = ["--check", "MTL0", "MTL", backend, "300", "fused nodes"]
    output = run_program(engine.bin / "kimi-verify", *arguments).stdout
    (state,) = re.findall("^result\tfused nodes\t(.*?)\t", output, re.MULTILINE)
    return str(state)


@pytest.mark.parametrize(
    ("part", "kernel"),
    [("KDA_SCAN", "kda"), pytest.param("absorbed latent attention", "latent", marks=pytest.mark.full)],
)  # the second takes half a minute, of upstream's kernels
def test_kimi_verify_reports_kernels_with_too_many_registers(
    part: str, kernel: str, metal_backend: Path, engine: Engine
) -> None:
    """They are not used; "absent" would hide why, and KIMI_OPS=require would accept it."""
    arguments = ["--check", "MTL0", "MTL", metal_backend, "300", part]
    output = run_program(
        engine.bin / "kimi-verify", *arguments, KIMI_METAL_MAX_THREADS=f"256:{kernel}"
    ).stdout
    assert f"result\t{part}\tnot checked\t0\t0\tits kernel allows only 256 threads on this device\n" in output


def test_wrong_kernels_are_not_used(metal_backend: Path, model: Path, engine: Engine, tmp_path: Path) -> None:
    """By a context that selects none of the other operators, as those of other architectures."""
    expected = play(engine, model, Setup(), STEPS, KIMI_OPS="off").logits
    log = tmp_path / "log"
    # without the other operators, whose check takes long on an emulated device
    checked = {
        "KIMI_VERIFY_SECONDS": "300", "KIMI_GGUF_CACHE": str(tmp_path), "KIMI_METAL_REFUSED": "kda,fa_latent",
    }  # fmt: skip

    def on_device(**variables: str) -> Played:
        return play(engine, model, on_metal(metal_backend), STEPS, **{"KIMI_OPS": "fuse", **variables})

    with planted(metal_backend, "fuse", *FAULTS["weights by score"]):
        assert not np.allclose(on_device().logits, expected)
        for variables in (checked, {**checked, "KIMI_METAL_LOG": str(log)}):  # the second time from the cache
            played = on_device(**variables)
            assert re.findall("verify: MTL0: not used: (.*?): NMSE", played.log) == ["fused nodes"]
            assert_same(played.logits, expected)
        with pytest.raises(PlayError, match="KIMI_OPS=require: MTL0: fused nodes: NMSE"):
            on_device(**checked, KIMI_OPS="fuse,require")
    assert fused_kernels(log).total() == 0


def test_a_token_without_numbers_changes_no_other(
    metal_backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """Its scores are NaN. With 32 tokens or more, ggml-metal stores results by expert, which must be different ones."""
    nan, count = 7, 20
    damaged = tmp_path / "model.gguf"
    # Upstream's matmul writes four scores at once; the last layer has only the tokens with logits.
    spec = replace(SPEC, layers="KMK", experts=64)
    convert(write_checkpoint(tmp_path / "checkpoint", spec), damaged, TYPES["F32"])
    (embeddings,) = (each for each in GGUFReader(damaged, "r+").tensors if each.name == "token_embd.weight")
    embeddings.data[nan] = np.nan
    ids = [3 + i % 4 for i in range(count)]
    step = decode(*text(0, [nan] * count), *text(1, ids), wanted=list(range(2 * count - 8, 2 * count)))
    setup = replace(on_metal(metal_backend), n_seq_max=2)
    expected = play(engine, damaged, setup, [step], KIMI_OPS="off").logits
    log = tmp_path / "log"
    got = play(engine, damaged, setup, [step], KIMI_OPS="fuse", KIMI_METAL_LOG=str(log)).logits
    kernels = {each.kernel for each in dispatches(log)}
    assert any(each.startswith(ROUTER) for each in kernels)
    assert any(each.startswith("kernel_mul_mm_id_") for each in kernels)
    assert np.isfinite(expected).all()
    assert_same(got, expected)
