"""0028 to 0033: norms, YaRN, expert groups, quantization, an unsplit kv_b and the gate's bound of the KDA family."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import convert, gguf_keys, upstream_convert
from family_reference import reference_of_family
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, Change, FamilySpec, write_family
from random_ling3 import LingSpec, write_checkpoint
from synthetic_case import Tensors, error_of, rewrite
from transformers_ling import ling_logits

from kimi_gguf.bench.shapes import types_in_dry_run
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.patches.diff import apply
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree, list_files
from kimi_gguf.tools.upstream_converter import Job
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

GLM_BOUND = """
import json, sys
from unittest.mock import MagicMock, patch
from conversion.glm import Glm5NextModel

class Config(dict):
    def __missing__(self, key):
        return ["linear_attention", "full_attention"] if key == "layer_types" else 2

model = object.__new__(Glm5NextModel)
model.hparams = Config(mla_use_nope=True, qk_rope_head_dim=0, norm_topk_prob=True, q_lora_rank=8, linear_attn_config={
    "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4, **json.loads(sys.argv[1])})
model.block_count, model.skip_mtp, model.gguf_writer = 2, True, MagicMock()
with patch.object(Glm5NextModel.__mro__[1], "set_gguf_parameters"):
    model.set_gguf_parameters()
calls = model.gguf_writer.add_kda_gate_lower_bound.call_args_list
print(calls[0].args[0] if calls else None)
"""
IDS: NDArray[np.int64] = np.random.default_rng(7).integers(0, VOCAB_SIZE, 150)
LING = "bailingmoe3"
SMALL = [
    FamilySpec(LING, std=0.05, seed=1),
    FamilySpec(LING, "KKMK", heads=4, std=0.3, groups=(4, 2), seed=2),
]
YARN = [FamilySpec(LING, yarn=(4.0, mscale_all_dim), seed=3) for mscale_all_dim in (1.0, 0.7)]
BETAS = FamilySpec(LING, yarn=(4.0, 1.0), betas=(4.0, 0.25), seed=3)


def logits(engine: Engine, model: Path, choice: str | None = None) -> NDArray[np.float32]:
    with pytest.MonkeyPatch.context() as patch:
        if choice is not None:
            patch.setenv("KIMI_OPS", choice)
        return run_logits(engine, model, IDS, RunOptions())


@pytest.mark.parametrize(
    "spec", [*SMALL, *YARN, BETAS], ids=lambda spec: f"{spec.id}-{spec.yarn}-{spec.betas}"
)
def test_ling_has_the_logits_of_transformers(tmp_path: Path, spec: FamilySpec, engine: Engine) -> None:
    """0028-ling-k3-norm-constants and 0029-ling-yarn-mscale."""
    model, expected = write_family(tmp_path / "model.gguf", spec), ling_logits(spec, IDS)
    for choice in ("require", "off"):
        assert error_of(logits(engine, model, choice), expected).passes


def test_the_betas_of_yarn_count() -> None:
    """0029-ling-yarn-mscale: the logits that the loader's defaults give are others."""
    others = ling_logits(replace(BETAS, betas=(32.0, 1.0)), IDS)
    assert error_of(others, ling_logits(BETAS, IDS)).in_all > 1e-4


# Keys of rope_scaling in addition to those that every YaRN has.
CONVERTED: list[dict[str, float]] = [
    {},
    {"mscale": 0.7},
    {"mscale_all_dim": 1.0},
    {"mscale": 0.5, "mscale_all_dim": 0.8},
    {"mscale_all_dim": 0.8, "attention_factor": 1.25},
]


def fixed_converter(folder: Path, number: str) -> Path:
    """`folder` with upstream's converter and a fix."""
    (fix,) = (patch for patch in load_series().patches if patch.name.startswith(number))
    source = upstream_source() / "llama.cpp"
    tree = Tree(source, [path for path in list_files(source) if path.startswith(("conversion/", "gguf-py/"))])
    (change,) = (diff for diff in fix.diffs if diff.path.startswith("conversion/"))
    apply(tree, change)
    tree.write_to(folder)
    return folder


@pytest.mark.full
def test_the_converter_writes_yarn_as_convert_kimi_does(tmp_path: Path) -> None:
    """0029-ling-yarn-mscale. That these keys give transformers' logits is tested in test_convert_ling3_runs.py."""
    jobs = []
    for number, extra in enumerate(CONVERTED):
        yarn = {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            **extra,
        }
        source = write_checkpoint(tmp_path / f"{number}", LingSpec("KM", 2, yarn=tuple(yarn.items())))
        jobs.append(Job(source, tmp_path / f"{number}.gguf", "BF16"))
    upstream_convert(jobs, fixed_converter(tmp_path / "llama.cpp", "0029"))
    for job, extra in zip(jobs, CONVERTED, strict=True):
        ours = tmp_path / "ours.gguf"
        assert convert(job.source, "-o", ours, "--force").status == 0
        expected, found = scaling(ours), scaling(job.output)
        found.pop("yarn_attn_factor", None)  # has no effect: a context with YaRN computes this factor itself
        assert found == pytest.approx(expected, rel=1e-6), extra
        assert ("yarn_log_multiplier" in found) == ("mscale_all_dim" in extra)


def scaling(model: Path) -> dict[str, float]:
    """The keys of RoPE scaling that are numbers."""
    prefix = f"{LING}.rope.scaling."
    keys = {name: value for name, value in gguf_keys(model).items() if name.startswith(prefix)}
    assert keys.pop(f"{prefix}type") == "yarn"
    return {name.removeprefix(prefix): value for name, value in keys.items()}


@pytest.mark.parametrize(
    ("gate", "bound"),
    [({}, -5.0), ({"gate_lower_bound": -3.0}, -3.0), ({"gate_lower_bound": None, "safe_gate": False}, None)],
)
def test_the_gate_bound_of_glm(gate: dict[str, object], bound: float | None, tmp_path: Path) -> None:
    """0033-glm-gate-bound: the converter writes the reference's default."""
    folder = fixed_converter(tmp_path, "0033")
    done = subprocess.run(
        [sys.executable, "-c", GLM_BOUND, json.dumps(gate)], capture_output=True, text=True,
        env={"PYTHONPATH": f"{folder}:{folder / 'gguf-py'}"},
    )  # fmt: skip
    assert done.stdout.split() == [str(bound)], done.stderr


def test_betas_of_yarn_in_the_wrong_order_are_refused(tmp_path: Path, engine: Engine) -> None:
    """0029-ling-yarn-mscale."""
    model = write_family(tmp_path / "model.gguf", replace(BETAS, betas=(0.5, 4.0)))
    with pytest.raises(ValidateError, match=r"beta_fast must not be less than beta_slow: 0\.5 < 4"):
        logits(engine, model)
    model = write_family(tmp_path / "equal.gguf", replace(BETAS, betas=(4.0, 4.0)))
    assert np.isfinite(logits(engine, model)).all()


def test_small_activations_of_kimi_k3_are_normalised_as_in_the_model(tmp_path: Path, engine: Engine) -> None:
    """0028."""
    spec = FamilySpec("kimi-k3", "KKM", std=0.05, seed=4)
    model = write_family(tmp_path / "model.gguf", spec)
    expected = reference_of_family(spec).logits(torch.from_numpy(IDS)).numpy()
    for choice in ("require", "off"):
        assert error_of(logits(engine, model, choice), expected).passes


def small_queries(tensor: str, data: NDArray[np.float32]) -> NDArray[np.float32]:
    """The latents of queries are so small that an epsilon counts."""
    return data / 32 if ".attn_q_a." in tensor else data


@pytest.mark.parametrize(
    "spec",
    [FamilySpec(LING, "KM", compressed=True, seed=7), FamilySpec("kimi-k3", "KM", seed=7)],
    ids=lambda spec: spec.id,
)
def test_compressed_queries_are_normalised_as_in_the_model(
    tmp_path: Path, spec: FamilySpec, engine: Engine
) -> None:
    """0028."""

    def exact(change: Change) -> NDArray[np.float64]:
        if spec.architecture == LING:
            return ling_logits(spec, IDS, change)
        found: NDArray[np.float64] = (
            reference_of_family(spec, change=change).logits(torch.from_numpy(IDS)).numpy()
        )
        return found

    model, expected = write_family(tmp_path / "small.gguf", spec, change=small_queries), exact(small_queries)
    for choice in ("require", "off"):
        assert error_of(logits(engine, model, choice), expected).passes


def test_a_router_may_choose_all_groups(tmp_path: Path, engine: Engine) -> None:
    """0030-all-expert-groups."""
    grouped = write_family(tmp_path / "grouped.gguf", FamilySpec(LING, groups=(4, 4), seed=5))
    plain = write_family(tmp_path / "plain.gguf", FamilySpec(LING, seed=5))
    np.testing.assert_array_equal(logits(engine, grouped), logits(engine, plain))


GATES = {
    LING: {"ssm_f_a": "Q8_0", "ssm_g_a": "Q8_0", "ssm_beta": "F32", "attn_gate": "F32", "attn_q": "Q4_K"},
    "kimi-k3": {"ssm_f_a": "Q8_0", "ssm_g": "Q8_0", "ssm_beta": "F32", "attn_gate": "Q4_K", "attn_q": "Q4_K"},
}


@pytest.mark.parametrize("architecture", GATES)
def test_gates_are_not_quantized_to_four_bits(tmp_path: Path, architecture: str, engine: Engine) -> None:
    """0031-ling-k3-quantize-gates."""
    spec = FamilySpec(
        architecture, hidden=256, heads=2, kda_head_dim=128, ffn=256, expert_ffn=256, q_lora=256
    )
    model = write_family(tmp_path / "model.gguf", spec)

    command = [engine.bin / "llama-quantize", "--dry-run", model, "Q4_K_M"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    types = types_in_dry_run((ended.stdout + ended.stderr).splitlines())
    for part, kind in GATES[architecture].items():
        assert {types.get(f"blk.{i}.{part}.weight") for i in (1, 2)} - {None} == {kind}


def unsplit(tensors: Tensors) -> Tensors:
    """k_b [heads, latent, nope] and v_b [heads, v, latent] of layer 2 as kv_b [heads * (nope + v), latent]."""
    out = dict(tensors)
    k, v = (out.pop(f"blk.2.attn_{x}_b.weight") for x in "kv")
    kv = np.concatenate([k.transpose(0, 2, 1), v], axis=1)
    return out | {"blk.2.attn_kv_b.weight": kv.reshape(-1, kv.shape[-1])}


def test_kimi_k3_with_an_unsplit_kv_b_is_refused(tmp_path: Path, engine: Engine) -> None:
    """0032-kimi-k3-kv-b."""
    whole = rewrite(
        write_family(tmp_path / "split.gguf", FamilySpec("kimi-k3", seed=6)), tmp_path / "whole.gguf", unsplit
    )
    with pytest.raises(ValidateError, match="unsplit kv_b"):
        logits(engine, whole)
