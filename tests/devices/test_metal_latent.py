"""Latent attention on Metal: nodes of ggml's backend on the emulated device, compared with float64.

The cases are those of the CUDA kernels' test (tests/native/latent-cases.h). The device checks the kernels' accesses and
barriers, and counts the bytes that they read.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cache_cases import CACHE_CASES
from llama_script import (
    Setup,
    assert_same,
    drafts_rolled_back,
    play,
    saved_conversation,
    saved_for_another,
)
from metal_program import dispatches, on_metal, planted
from native_program import compile_program, passed_cases, run_program
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

ROW_BYTES = {"f32": 4 * 576, "f16": 2 * 576, "bf16": 2 * 576, "q8_0": 34 * 18, "q4_0": 18 * 18}
ATTEND = "kernel_flash_attn_ext_latent_"
REDUCE = "kernel_flash_attn_ext_latent_reduce"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TILE, ALL_ROWS = f"{BARRIER}\n\n\n        {{", "if (ir < nr) {\n                const float s"
PLAIN, MIXED, PEAKED = ("causal", 1), ("mixed", 1), ("causal", 20)  # mask, deviation of the scores
# What is wrong in the kernel -> the preprocessed text, what it is instead, a case, a pattern of the message.
FAULTS = {
    "no barrier after the tile": (TILE, "{", PLAIN, "threadgroup memory"),
    "values at another stride": ("8 * (sgitg * VB + i), PK);", "8 * (sgitg * VB + i), PC);", PLAIN, "FAILED"),
    "hidden keys are read": ("[ic + sc] > -MAXHALF;", "[ic + sc] > -MAXHALF || true;", MIXED, "FAILED"),
    "splits overlap": ("(is + 1) * args.nkps);", "(is + 1) * args.nkps + 1);", PLAIN, "FAILED"),
    "the result is not rescaled": ("!= 1.0f)", "!= 1.0f && false)", PEAKED, "FAILED"),
    "more rows are written": (ALL_ROWS, "{ const float s", PLAIN, "a write"),
}  # fmt: skip


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent-metal")
    return compile_program(
        engine, "metal/latent-metal-test.cpp", folder, operators=("common", "latent_attention")
    )


@pytest.mark.parametrize(("cache_type", "cases"), CACHE_CASES)
def test_every_shape_and_mask_in_both_orders(
    cache_type: str, cases: str, program: Path, metal_backend: Path
) -> None:
    outputs = {
        order: run_program(
            program, metal_backend, cache_type, KIMI_METAL_ORDER=order, KIMI_CASES=cases
        ).stdout
        for order in ("forwards", "backwards")
    }
    assert ", 0 failed" in outputs["forwards"]
    assert outputs["forwards"] == outputs["backwards"]


@pytest.mark.parametrize("cache_type", ROW_BYTES)
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 100, 32), (1, 300, 20), (3, 100, 32)])
def test_each_row_is_read_once_for_32_pairs(
    cache_type: str, queries: int, keys: int, heads: int, program: Path, metal_backend: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    case = [cache_type, str(queries), str(keys), str(heads), "none", "1"]
    assert ", 0 failed" in run_program(program, metal_backend, *case, KIMI_METAL_LOG=str(log)).stdout
    attend, reduce = dispatches(log)
    assert attend.kernel.startswith(f"{ATTEND}{cache_type}_dk576_dv512")
    assert reduce.kernel == REDUCE
    blocks, splits, streams = attend.grid
    assert (blocks, splits, streams) == (-(-queries * heads // 32), -(-keys // 64), 1)
    queries_read = splits * queries * heads * 576 * 4
    assert attend.bytes_read - queries_read == blocks * keys * ROW_BYTES[cache_type]
    # the splits' results, sums and largest scores
    assert attend.bytes_written == splits * queries * heads * (512 + 2) * 4


def test_hidden_cells_are_not_read(program: Path, metal_backend: Path, tmp_path: Path) -> None:
    """With this mask the query sees two of five keys."""
    log = tmp_path / "log"
    run_program(program, metal_backend, "f16", "1", "100", "32", "mixed", "1", KIMI_METAL_LOG=str(log))
    attend = dispatches(log)[0]
    masks = (
        2 * 2 * (16 + 16) * 112
    )  # per tile: 32 lanes of each simdgroup look for visible keys, 32 rows x 16 keys
    assert attend.bytes_read <= 2 * 32 * 576 * 4 + 40 * 2 * 576 + masks


@pytest.mark.parametrize(
    ("cache_type", "mask", "threads"),
    [("f16", "marked", 1024), ("q5_1", "causal", 1024), ("f16", "causal", 256)],
)
def test_other_nodes_use_upstreams_kernels(
    cache_type: str, mask: str, threads: int, program: Path, metal_backend: Path, tmp_path: Path
) -> None:
    """Also all nodes, if a threadgroup can have too few threads."""
    log = tmp_path / "log"
    case = [cache_type, "1", "40", "2", mask, "1"]
    variables = {"KIMI_METAL_LOG": str(log), "KIMI_METAL_MAX_THREADS": str(threads)}
    subprocess.run([program, metal_backend, *case], env=os.environ | variables, check=False)
    ran = [each.kernel for each in dispatches(log)]
    assert any(each.startswith(f"kernel_flash_attn_ext_vec_{cache_type}_dk576_dv512") for each in ran)
    assert not any(each.startswith(ATTEND) for each in ran)


def test_nodes_of_which_one_property_does_not_fit(program: Path, metal_backend: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = {"KIMI_METAL_DRY": "1", "KIMI_METAL_LOG": str(log)}
    output = run_program(program, metal_backend, "others", **variables).stdout
    assert ", 0 failed" in output
    ran = [(each.nodes.split("'")[1], each.kernel) for each in dispatches(log)]
    assert len({node for node, _ in ran}) == int(output.split(" checks")[0].split()[-1])
    assert {node for node, kernel in ran if kernel.startswith(ATTEND)} == {"fits"}


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "splits", "size"),
    [(1, 64, 32, 1, 64), (1, 65, 33, 2, 64), (2, 2048, 32, 32, 64), (1, 4096, 32, 64, 64), (1, 4097, 32, 33, 128),
     (33, 80, 32, 1, 128), (65, 300, 32, 1, 512)],
)  # fmt: skip
def test_keys_are_split_among_at_most_64_threadgroups(
    queries: int,
    keys: int,
    heads: int,
    splits: int,
    size: int,
    program: Path,
    metal_backend: Path,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    case = ["f16", str(queries), str(keys), str(heads), "none", "1"]
    variables = {"KIMI_METAL_DRY": "1", "KIMI_METAL_LOG": str(log)}
    subprocess.run([program, metal_backend, *case], env=os.environ | variables, check=False)
    assert splits == -(-keys // size)
    ran = dispatches(log)
    assert ran[0].grid == (-(-queries * heads // 32), splits, 1)
    assert [each.kernel for each in ran[1:]] == ([REDUCE] if splits > 1 else [])


def test_backend_ops(engine: Engine, metal_backend: Path) -> None:
    """Cases of test-backend-ops, whose mask has finite values."""
    chosen = {"GGML_BACKEND_PATH": str(metal_backend), "KIMI_METAL_ORDER": "backwards"}
    chosen |= {"LLAMA_TEST_FA_VEC_DISABLE": "1", "GGML_NO_BACKTRACE": "1"}
    ours = (
        r"hsk=576,hsv=512,nh=1,nr23=\[(32|20),[12]\],kv=(65|256),nb=[123],.*type_K=(f32|f16|bf16|q8_0|q4_0)"
    )
    assert passed_cases(engine, "MTL0", "FLASH_ATTN_EXT", "-p", ours, **chosen) >= 10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, program: Path, metal_backend: Path) -> None:
    right, wrong, values, message = FAULTS[fault]
    case = ["f16", "1", "130", "20", *map(str, values)]
    assert ", 0 failed" in run_program(program, metal_backend, *case).stdout
    with planted(metal_backend, "fa_latent", right, wrong), pytest.raises(AssertionError, match=message):
        run_program(program, metal_backend, *case)


# The published model's head sizes of MLA. 5 rows per token: a block of rows contains several tokens.
SPEC = Spec(layers="KM", heads=5, kda_head_dim=64, kv_lora=512, nope=128, rope=64, v_dim=128, seed=60)
IDS = np.random.default_rng(61).integers(0, VOCAB_SIZE, (2, 24))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent-metal-model")
    return make_gguf(folder, SPEC)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_logits_of_a_model(
    unified: bool, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps = saved_conversation(IDS, tmp_path, 6)
    chosen = {"n_seq_max": 2, "kv_unified": unified, "flash_attention": True}
    expected = play(engine, model, Setup(**chosen), steps).logits
    log = tmp_path / "log"
    setup = on_metal(metal_backend, **chosen)
    variables = {"KIMI_OPS": "mla", "KIMI_METAL_LOG": str(log)}
    assert_same(play(engine, model, setup, steps, **variables).logits, expected)
    assert attention_kernels(log) == {ATTEND}


@pytest.mark.parametrize(
    ("unified", "layers"), [(False, 2), (True, 999)], ids=["streams, attention on the device", "unified"]
)
def test_drafts_are_rolled_back(
    unified: bool, layers: int, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps, chosen = drafts_rolled_back(IDS)
    chosen |= {"kv_unified": unified, "flash_attention": True}
    expected = play(engine, model, Setup(**chosen), steps).logits
    log = tmp_path / "log"
    setup = on_metal(metal_backend, n_gpu_layers=layers, **chosen)
    variables = {"KIMI_OPS": "conv,scan,mla", "KIMI_METAL_LOG": str(log)}
    assert_same(play(engine, model, setup, steps, **variables).logits, expected)
    assert attention_kernels(log) == {ATTEND}


@pytest.mark.parametrize("cache_type", ["F32", "Q8_0"])
def test_a_cache_is_saved_on_the_device_and_restored(
    cache_type: str, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps = saved_for_another(IDS, tmp_path / "state")
    chosen = {"n_seq_max": 2, "flash_attention": True, "cache_type": cache_type}
    played = play(engine, model, on_metal(metal_backend, **chosen), steps, KIMI_OPS="mla")
    np.testing.assert_array_equal(played.logits[-2:], played.logits[-4:-2])
    if cache_type == "F32":
        assert_same(played.logits, play(engine, model, Setup(**chosen), steps).logits)


def attention_kernels(log: Path) -> set[str]:
    """Those that multiply with K, without what follows in their names."""
    ran = (re.match(r"kernel_flash_attn_ext_(latent|vec)_(?=f32)", each.kernel) for each in dispatches(log))
    return {found[0] for found in ran if found}
