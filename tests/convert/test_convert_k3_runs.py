"""A converted Kimi K3 runs in llama.cpp: it is the same as a GGUF file that was written without the converter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import random_family
import torch
from convert_tools import convert, gguf_keys, gguf_types
from gguf import GGUFReader
from random_checkpoint import VOCAB_SIZE
from random_family import FamilySpec, write_family
from random_k3 import PREFIX, K3Spec, config, write_checkpoint, write_k3_tokenizer
from safetensors.torch import save_file
from synthetic_case import error_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

FAMILY = FamilySpec("kimi-k3", "KKMK", heads=2, kda_head_dim=64, vocab=VOCAB_SIZE, seed=6)
IDS = np.random.default_rng(3).integers(0, VOCAB_SIZE, 80)
# GGUF name -> hub name, where nothing is computed.
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ssm_conv1d_{x}": f"self_attn.{x}_conv1d" for x in "qkv"},
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g": "self_attn.g_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
    "attn_output": "self_attn.o_proj",
    "attn_gate": "self_attn.g_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{f"ffn_{x}_shexp": f"block_sparse_moe.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_routed_{x}": f"block_sparse_moe.routed_expert_{x}_proj" for x in ("up", "down")},
    "ffn_routed_norm": "block_sparse_moe.routed_expert_norm",
}
SCORES = {"attn_res_score": "self_attention_res", "ffn_res_score": "mlp_res"}
EXPERTS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_as_checkpoint(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The tensors of a kimi-k3 GGUF as a checkpoint with plain F32 experts."""
    spec = K3Spec(
        layers=FAMILY.layers, hidden=FAMILY.hidden, heads=FAMILY.heads, kda_head_dim=FAMILY.kda_head_dim,
        q_lora=FAMILY.q_lora, kv_lora=FAMILY.kv_lora, nope=FAMILY.nope, rope=FAMILY.rope, v_dim=FAMILY.value,
        intermediate=FAMILY.ffn, experts=FAMILY.experts, experts_used=FAMILY.experts_used, shared_experts=1,
        moe_intermediate=FAMILY.expert_ffn, latent=FAMILY.hidden // 2, scaling=2.5, res_block=FAMILY.res_block,
        situ_beta=3.0, situ_linear_beta=2.0,
    )  # fmt: skip
    write_k3_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(spec, packed=False)))
    out: dict[str, np.ndarray] = {}

    def score(name: str, data: np.ndarray) -> None:
        out[f"{name}_norm.weight"] = np.ones_like(data)
        out[f"{name}_proj.weight"] = data[None]

    for name, data in tensors.items():
        parts = name.split(".")
        if parts[0] != "blk":
            if parts[0] == "output_res_score":
                score("model.output_attn_res", data)
            else:
                out[f"{TOP[parts[0]]}.weight"] = data
            continue
        layer, kind = f"model.layers.{parts[1]}.", parts[2]
        if kind in SCORES:
            score(layer + SCORES[kind], data)
        elif kind in EXPERTS:
            for e, expert in enumerate(data):
                out[f"{layer}block_sparse_moe.experts.{e}.{EXPERTS[kind]}.weight"] = expert
        elif kind == "ssm_a":
            out[f"{layer}self_attn.A_log"] = np.log(-data.astype(np.float64)).astype(np.float32)
        elif kind == "ssm_dt":
            out[f"{layer}self_attn.dt_bias"] = data
        elif kind == "exp_probs_b":
            out[f"{layer}block_sparse_moe.gate.e_score_correction_bias"] = data
        elif kind == "attn_k_b":
            v = tensors[name.replace("attn_k_b", "attn_v_b")]
            both = np.concatenate([data.transpose(0, 2, 1), v], 1)
            out[f"{layer}self_attn.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif kind.startswith("ssm_conv1d"):
            out[f"{layer}{LAYER[kind]}.weight"] = data.reshape(-1, 1, 4)
        elif kind != "attn_v_b":
            out[f"{layer}{LAYER[kind]}.weight"] = data
    stored = {PREFIX + name: torch.from_numpy(np.ascontiguousarray(data)) for name, data in out.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def test_tensors_keys_and_logits_are_those_of_the_family(tmp_path: Path, engine: Engine) -> None:
    tensors = dict(random_family.tensors(FAMILY))
    expected = write_family(tmp_path / "family.gguf", FAMILY)
    source, ours = write_as_checkpoint(tmp_path / "model", tensors), tmp_path / "ours.gguf"
    assert convert(source, "-o", ours, "--type", "F32").status == 0
    found = {tensor.name: tensor for tensor in GGUFReader(ours).tensors}
    assert set(found) == set(tensors)
    for name, data in tensors.items():
        close = np.testing.assert_allclose if name.endswith("ssm_a") else np.testing.assert_array_equal
        close(np.array(found[name].data).reshape(-1), data.reshape(-1))
    keys = gguf_keys(ours)
    for name, value in random_family.keys(FAMILY).items():
        assert keys[f"kimi-k3.{name}"] == (float(np.float32(value)) if isinstance(value, float) else value), (
            name
        )
    logits = [run_logits(engine, path, IDS, RunOptions(threads=1)) for path in (ours, expected)]
    assert error_of(logits[0], logits[1]).in_all < 1e-12
    assert np.ptp(logits[0]) > 1


def test_files_with_packed_experts_run_and_are_close_to_f32(
    tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    """The F32 file has the exact values; the MXFP4 file differs by the rounding of activations in its matmuls."""
    spec = K3Spec(
        layers="KKM", hidden=128, heads=2, kda_head_dim=128, kv_lora=512, nope=128, rope=64, v_dim=128
    )
    source = write_checkpoint(tmp_path / "model", spec)
    for kind in ("F32", "default"):
        options = [] if kind == "default" else ["--type", kind]
        assert convert(source, "-o", tmp_path / f"{kind}.gguf", *options).status == 0
    assert "MXFP4" in gguf_types(tmp_path / "default.gguf").values()
    exact = run_logits(engine, tmp_path / "F32.gguf", IDS, RunOptions(threads=1))
    for build in (engine, upstream):
        packed = run_logits(build, tmp_path / "default.gguf", IDS, RunOptions(threads=1))
        assert 0 < error_of(packed, exact).in_all < 1e-2
