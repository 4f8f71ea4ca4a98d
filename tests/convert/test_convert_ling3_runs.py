"""A converted Ling 3 file runs: logits of transformers, on patched and upstream llama.cpp, with and without MTP layer;
quantized types are those that the patched llama-quantize chooses."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import convert, fresh_checkpoint, write_imatrix
from ling_tokenizer import VOCAB_SIZE
from numpy.typing import NDArray
from random_ling3 import LingSpec
from synthetic_case import error_of
from test_convert_like_quantize import LOWEST, QUANTIZED, contents

from kimi_gguf.bench.shapes import types_in_dry_run
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

IDS: NDArray[np.int64] = np.random.default_rng(8).integers(0, VOCAB_SIZE, 80)
ORIGINAL = ("original_max_position_embeddings", 32)
SPECS = [
    LingSpec(mtp=True, dtype=torch.float32, seed=40),
    LingSpec("KKMK", q_lora=24, heads=4, groups=4, topk_groups=2, dense_layers=0, dtype=torch.float32, seed=41),
    LingSpec("KM", 2, scaling=1.0, rms_norm_eps=1e-5, std=0.02, dtype=torch.float32, seed=42),
    LingSpec("KM", 2, yarn=(("factor", 4.0), ORIGINAL), dtype=torch.float32, seed=43),
    LingSpec(
        "KM", 2, yarn=(("factor", 4.0), ORIGINAL, ("mscale", 0.5), ("mscale_all_dim", 0.8)), dtype=torch.float32,
        seed=44,
    ),
    LingSpec("KM", 2, yarn=(("factor", 8.0), ORIGINAL, ("attention_factor", 1.25)), dtype=torch.float32, seed=45),
    LingSpec(
        "KM", 2, dtype=torch.float32, seed=46,
        yarn=(("factor", 4.0), (ORIGINAL[0], 4096), ("beta_fast", 128.0), ("beta_slow", 4.0)),
    ),
]  # fmt: skip


def by_transformers(folder: Path) -> NDArray[np.float64]:
    """Logits [T, V] of a checkpoint in float64."""
    from transformers import BailingHybridConfig, BailingHybridForCausalLM

    config = BailingHybridConfig.from_pretrained(folder)
    # Its YaRN would apply this factor to a width that is already the rotated one.
    config.rope_parameters.pop("partial_rotary_factor", None)
    model = BailingHybridForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(IDS)[None]).logits[0]
    return logits.double().numpy()


def converted(folder: Path, spec: LingSpec, *options: str) -> Path:
    source = fresh_checkpoint(folder / "model", spec)
    output = folder / f"x{len(options)}.gguf"
    run = convert(source, "-o", output, "--force", *(options or ("--type", "F32")))
    assert run.status == 0, run.err
    return output


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.id}-{dict(spec.yarn or ())}")
def test_a_converted_file_has_the_logits_of_transformers(
    tmp_path: Path, engine: Engine, spec: LingSpec
) -> None:
    file = converted(tmp_path, spec)
    expected = by_transformers(tmp_path / "model")
    for flash in (False, True):
        error = error_of(
            run_logits(engine, file, IDS, RunOptions(threads=1, flash_attention=flash)), expected
        )
        assert error.passes, (flash, error)


def test_the_mtp_layer_does_not_change_the_logits(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    for build in (engine, upstream):
        with_mtp = run_logits(build, converted(tmp_path, SPECS[0]), IDS, RunOptions(threads=1))
        without = converted(tmp_path, SPECS[0], "--type", "F32", "--no-mtp")
        assert np.array_equal(with_mtp, run_logits(build, without, IDS, RunOptions(threads=1)))
        assert np.isfinite(with_mtp).all() and with_mtp.std() > 0


def test_the_mtp_layer_drafts(tmp_path: Path, engine: Engine) -> None:
    def drafted(*options: str) -> str:
        command = [engine.bin / "llama-speculative-simple", "-m", converted(tmp_path, SPECS[0], *options)]
        command += [
            "--spec-type",
            "draft-mtp",
            "-p",
            "the quick brown fox",
            "-n",
            "24",
            "-t",
            "1",
            "--temp",
            "0",
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        return done.stdout + done.stderr

    found = re.search(r"n_drafted += (\d+)", drafted())
    assert found and int(found[1]) > 10
    assert not re.search(r"n_drafted += [1-9]", drafted("--type", "F32", "--no-mtp"))


@pytest.mark.parametrize("cache", ["Q8_0", "Q4_0"])
def test_the_cache_can_be_quantized_on_upstream_too(
    tmp_path: Path, engine: Engine, upstream: Engine, cache: str
) -> None:
    """attention.value_length is the width of the latent."""
    file = converted(tmp_path, replace(SPECS[0], rope=32))  # a cache row is whole blocks of 32
    exact = run_logits(engine, file, IDS, RunOptions(threads=1, flash_attention=True))
    for build in (engine, upstream):
        got = run_logits(build, file, IDS, RunOptions(threads=1, flash_attention=True, cache_type=cache))
        assert error_of(got, exact).in_all < 0.05


# The rules depend on the number of experts and layers, with the MTP layer, and on the widths of rows.
QUANTIZED_SPECS = {
    "eight experts, MTP": LingSpec(
        "KKKMKKKM" * 2, 4, mtp=True, hidden=256, kda_head_dim=128, experts=8, moe_intermediate=256, kv_lora=256,
        std=0.02, seed=50,
    ),
    "16 experts, odd rows": LingSpec(
        "KKM", q_lora=64, hidden=320, heads=3, nope=20, experts=16, experts_used=8, moe_intermediate=32, seed=51,
    ),
}  # fmt: skip


@pytest.mark.parametrize("importances", [False, True])
@pytest.mark.parametrize("name", QUANTIZED_SPECS)
def test_the_type_of_each_tensor(tmp_path: Path, engine: Engine, name: str, importances: bool) -> None:
    bf16 = converted(tmp_path, QUANTIZED_SPECS[name], "--type", "BF16")
    options: list[object] = []
    if importances:
        write_imatrix(tmp_path / "imatrix.gguf", bf16, every=1)
        options = ["--imatrix", tmp_path / "imatrix.gguf"]
    compared = 0
    for kind in QUANTIZED:
        command = [engine.bin / "llama-quantize", "--dry-run", *map(str, options), bf16, kind, "2"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        run = convert(tmp_path / "model", "--dry-run", "--type", kind, *options)
        if done.returncode != 0 or "will require an imatrix" in done.stdout + done.stderr:
            assert run.status == 1, (kind, done.stdout[-600:])
            continue
        assert run.status == 0, (kind, run.err)
        wanted = types_in_dry_run((done.stdout + done.stderr).splitlines())
        found = dict(re.findall(r"(?m)^(\S+) +([A-Z]+\d\w*) +\d", run.out))
        assert len(wanted) == len(found) > 30
        assert found == wanted, kind
        compared += 1
    assert compared >= len(QUANTIZED) - len(LOWEST) - 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q4_K_M", ()),
        ("Q2_K", ()),
        ("Q8_0", ()),
        ("IQ4_XS", ()),
        ("Q4_0", ("--pure",)),
        ("Q4_K_M", ("--tensor-type", "ssm_f_a=q4_K", "--tensor-type", "attn_gate=q8_0")),
    ],
    ids=str,
)
def test_a_quantized_file_equals_that_of_llama_quantize(
    tmp_path: Path, engine: Engine, kind: str, options: tuple[str, ...]
) -> None:
    spec = replace(QUANTIZED_SPECS["eight experts, MTP"], layers="KKKM")
    bf16 = converted(tmp_path, spec, "--type", "BF16")
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    command = [str(engine.bin / "llama-quantize"), *options, str(bf16), str(theirs), kind, "2"]
    subprocess.run(command, capture_output=True, check=True)
    assert convert(tmp_path / "model", "-o", ours, "--type", kind, *options).status == 0
    for mine, other in zip(contents(ours), contents(theirs), strict=True):
        assert mine == other
