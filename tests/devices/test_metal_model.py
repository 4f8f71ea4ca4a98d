"""Whole models on the emulated Metal device, through llama.cpp: the same logits as on the CPU.

Upstream's graph, host code and kernels, with at most 8 tokens in a batch: up to there ggml-metal multiplies matrices
in float32.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from llama_script import (
    PlayError,
    Setup,
    assert_same,
    cut,
    decode,
    play,
    text,
)
from metal_program import dispatches, on_metal
from native_program import run_program
from random_checkpoint import VOCAB_SIZE, Spec
from random_family import ON_DEVICES, write_family
from synthetic_case import error_of, make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# The published model's dimensions of a cache row: ggml-metal has flash attention for them.
SPEC = Spec(layers="KKMK", kda_head_dim=64, kv_lora=512, nope=128, rope=64, v_dim=128, seed=50)
IDS = np.random.default_rng(51).integers(0, VOCAB_SIZE, (2, 20))
# Relative error of a value in half precision, squared: upstream's flash attention rounds the queries.
HALF = 2.0**-22
# Libraries of ours, and their kernels for this model.
LIBRARIES = {
    "kda": {"kernel_kda_conv_f32_64", "kernel_kda_scan_f32_64"},
    "fa_latent": {"kernel_flash_attn_ext_latent_f32_dk576_dv512"},
    "fuse": {"kernel_router_f32", "kernel_add_rms_norm_mul_f32_4_1", "kernel_add_rms_norm_mul_f32_4_2"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metal-model")
    return make_gguf(folder, SPEC)


@pytest.mark.full  # test_metal_fusion.py verifies them with a fault in one part
def test_the_operators_verify_themselves(
    metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    """All parts that Metal has pass and are used. The time limit is long: the kernels are compiled and emulated."""
    variables = {"KIMI_VERIFY_SECONDS": "300", "KIMI_GGUF_CACHE": str(tmp_path)}
    report = run_program(engine.bin / "kimi-verify", GGML_BACKEND_PATH=str(metal_backend), **variables).stdout
    assert re.findall(r"^result\t(.+)\tpassed\t", report, re.MULTILINE) == [
        "KDA_CONV", "KDA_SCAN", "elided state copies", "absorbed latent attention", "fused nodes",
    ], report  # fmt: skip
    log = tmp_path / "log"
    variables |= {"KIMI_OPS": "conv,scan,mla,fuse", "KIMI_METAL_LOG": str(log)}
    played = play(
        engine, model, on_metal(metal_backend, flash_attention=True), [decode((0, 0, 1))], **variables
    )
    assert "verify: " not in played.log
    ran = " ".join(each.kernel for each in dispatches(log))
    for kernel in ("kda_conv", "kda_scan", "flash_attn_ext_latent", "router", "add_rms_norm_mul"):
        assert f"kernel_{kernel}_" in ran


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_the_compiler_refuses(
    library: str, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    """Upstream's kernels replace those of the library; the others of ours are used."""
    steps = [decode(*text(0, IDS[0][:6])), decode(*text(0, IDS[0][6:8], 6))]
    expected = play(engine, model, Setup(flash_attention=True), steps, KIMI_OPS="off").logits
    log = tmp_path / "log"
    variables = {"KIMI_OPS": "conv,scan,mla,fuse", "KIMI_METAL_REFUSED": library, "KIMI_METAL_LOG": str(log)}
    played = play(engine, model, on_metal(metal_backend, flash_attention=True), steps, **variables)
    if library == "fa_latent":
        assert error_of(played.logits, expected).in_all <= HALF
    else:
        assert_same(played.logits, expected)
    ran = {each.kernel for each in dispatches(log)}
    missing = {each for each, kernels in LIBRARIES.items() if not used(kernels, ran)}
    assert missing == {library}
    assert played.log.count(f"failed to build '{library}' library, not used: ") == 1


@pytest.mark.parametrize(
    ("choice", "part"),
    [("conv,scan", "KDA_CONV"), ("mla", "absorbed latent attention"), ("fuse", "fused nodes")],
)
def test_require_notices_a_library_that_the_compiler_refuses(
    choice: str, part: str, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    variables = {
        "KIMI_METAL_REFUSED": "kda,fa_latent,fuse",
        "KIMI_VERIFY_SECONDS": "300",
        "KIMI_GGUF_CACHE": str(tmp_path),
    }
    setup, steps = on_metal(metal_backend, flash_attention=True), [decode((0, 0, 1))]
    reason = f"{part}: not checked: the device's compiler refused its kernels"
    with pytest.raises(PlayError, match=f"KIMI_OPS=require: MTL0: {reason}"):
        play(engine, model, setup, steps, **variables, KIMI_OPS=f"{choice},require")
    log = play(engine, model, setup, steps, **variables, KIMI_OPS=choice).log
    assert f"verify: MTL0: not used: {reason}" in log


def used(kernels: set[str], ran: set[str]) -> bool:
    """Whether all of these kernels ran; otherwise none did."""
    found = {each for each in kernels if any(name == each or name.startswith(f"{each}_") for name in ran)}
    assert found in (kernels, set())
    return bool(found)


# A library, and why a context that needs it is refused; the last one is upstream's.
REFUSALS = {
    "kda": "KIMI_OPS=require: KDA operators cannot be used: MTL0, which holds layer 0, does not have KDA_CONV",
    "mul_mv": "failed to build 'mul_mv' library: ",
}


@pytest.mark.parametrize("library", REFUSALS)
def test_without_a_library_that_is_needed(
    library: str, metal_backend: Path, model: Path, engine: Engine
) -> None:
    variables = {"KIMI_OPS": "conv,scan,require", "KIMI_METAL_REFUSED": library}
    with pytest.raises(PlayError, match=REFUSALS[library]):
        play(engine, model, on_metal(metal_backend), [decode((0, 0, 1))], **variables)


# A short prompt, three drafted tokens, of which two are rolled back.
ROLLED_BACK = [decode(*text(0, IDS[0][:3])), decode(*text(0, IDS[0][3:6], 3)), cut(0, 4), decode((0, 4, 7))]
LING, GLM, K3 = ON_DEVICES
FAMILY = {  # model, layers on the device, flash attention
    "Ling 3, the last KDA layer": (LING, 2, False),
    "Ling 3, flash attention": (LING, 5, True),
    "GLM-5.3-Flash": (GLM, 5, False),
    "Kimi K3": (K3, 5, False),
}


@pytest.mark.parametrize(
    "placed", [pytest.param(name, marks=pytest.mark.full if name == "Kimi K3" else ()) for name in FAMILY]
)  # of Kimi K3's 96 heads, each takes as long as one of the others
def test_the_family_on_the_device(placed: str, metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    """Other gates, other numbers of heads, latent attention with or without RoPE."""
    spec, layers, flash = FAMILY[placed]
    model, log = write_family(tmp_path / "model.gguf", spec), tmp_path / "log"
    chosen = {"n_rs_seq": 3, "flash_attention": flash}
    expected = play(engine, model, Setup(**chosen), ROLLED_BACK, KIMI_OPS="off").logits
    told = {"KIMI_METAL_LOG": str(log), "KIMI_OPS": "conv,scan,mla,require"}
    setup = on_metal(metal_backend, n_gpu_layers=layers, **chosen)
    logits = play(engine, model, setup, ROLLED_BACK, **told).logits
    if flash:
        assert error_of(logits, expected).in_all <= HALF
    else:
        assert_same(logits, expected)
    ran = dispatches(log)
    on_device = spec.layers[max(0, 5 - layers) :]
    copied = Counter(each.nodes.split(" ")[0] for each in ran if each.nodes.startswith("KDA"))
    assert copied == {f"KDA_{part}+CPY": 3 * on_device.count("K") for part in ("CONV", "SCAN")}
    assert any("flash_attn_ext_latent" in each.kernel for each in ran) == flash
