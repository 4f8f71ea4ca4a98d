"""The content of the GGUF file: each tensor's values, type and shape, and each key, according to the specification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import convert, fresh_checkpoint, gguf_keys, gguf_types, gguf_values
from gguf import GGUFReader
from random_checkpoint import CHAT_TEMPLATE, NUM_RANKS, VOCAB_SIZE, Spec, weights

SPECS = [
    Spec(layers="KMK", heads=3, experts=5, dense_layers=1),
    Spec(layers="MK", q_lora=24, shared_experts=2, dense_layers=0, nope=48, v_dim=16, seed=1),
]
ALWAYS_F32 = ("norm", "conv1d", "ssm_a", "ssm_dt", "ffn_gate_inp", "exp_probs_b")


def expected_tensors(spec: Spec) -> dict[str, torch.Tensor]:
    """GGUF name -> values in row-major shape, implemented a second time, directly from the GGUF specification."""
    w = {name: tensor.float() for name, tensor in weights(spec).items()}
    out = {
        "token_embd.weight": w["model.embed_tokens.weight"],
        "output_norm.weight": w["model.norm.weight"],
        "output.weight": w["lm_head.weight"],
    }
    for i, kind in enumerate(spec.layers):
        layer, blk = f"model.layers.{i}.", f"blk.{i}."
        attn = f"{layer}self_attn."
        out[f"{blk}attn_norm.weight"] = w[f"{layer}input_layernorm.weight"]
        out[f"{blk}ffn_norm.weight"] = w[f"{layer}post_attention_layernorm.weight"]
        out[f"{blk}attn_output.weight"] = w[f"{attn}o_proj.weight"]
        if kind == "K":
            width = spec.heads * spec.kda_head_dim
            for x in "qkv":
                out[f"{blk}attn_{x}.weight"] = w[f"{attn}{x}_proj.weight"]
                conv = w[f"{attn}{x}_conv1d.weight"]
                out[f"{blk}ssm_conv1d_{x}.weight"] = conv.reshape(1, width, 1, spec.conv)
            for x in ("f_a", "f_b", "g_a", "g_b"):
                out[f"{blk}ssm_{x}.weight"] = w[f"{attn}{x}_proj.weight"]
            out[f"{blk}ssm_beta.weight"] = w[f"{attn}b_proj.weight"]
            out[f"{blk}ssm_a"] = -w[f"{attn}A_log"].double().exp().float().reshape(1, 1, spec.heads, 1)
            out[f"{blk}ssm_dt.bias"] = w[f"{attn}dt_bias"]
            out[f"{blk}ssm_norm.weight"] = w[f"{attn}o_norm.weight"]
        else:
            if spec.q_lora:
                out[f"{blk}attn_q_a.weight"] = w[f"{attn}q_a_proj.weight"]
                out[f"{blk}attn_q_a_norm.weight"] = w[f"{attn}q_a_layernorm.weight"]
                out[f"{blk}attn_q_b.weight"] = w[f"{attn}q_b_proj.weight"]
            else:
                out[f"{blk}attn_q.weight"] = w[f"{attn}q_proj.weight"]
            out[f"{blk}attn_kv_a_mqa.weight"] = w[f"{attn}kv_a_proj_with_mqa.weight"]
            out[f"{blk}attn_kv_a_norm.weight"] = w[f"{attn}kv_a_layernorm.weight"]
            kv = w[f"{attn}kv_b_proj.weight"].view(spec.heads, spec.nope + spec.v_dim, spec.kv_lora)
            out[f"{blk}attn_k_b.weight"] = kv[:, : spec.nope].transpose(1, 2)
            out[f"{blk}attn_v_b.weight"] = kv[:, spec.nope :]
        if i < spec.dense_layers:
            for x in ("gate", "up", "down"):
                out[f"{blk}ffn_{x}.weight"] = w[f"{layer}mlp.{x}_proj.weight"]
            continue
        moe = f"{layer}block_sparse_moe."
        out[f"{blk}ffn_gate_inp.weight"] = w[f"{moe}gate.weight"]
        out[f"{blk}exp_probs_b.bias"] = w[f"{moe}gate.e_score_correction_bias"]
        for x, hub in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = [w[f"{moe}experts.{e}.{hub}.weight"] for e in range(spec.experts)]
            out[f"{blk}ffn_{x}_exps.weight"] = torch.stack(experts)
            out[f"{blk}ffn_{x}_shexp.weight"] = w[f"{moe}shared_experts.{x}_proj.weight"]
    return out


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_values_are_the_weights(tmp_path: Path, spec: Spec, kind: str) -> None:
    source = fresh_checkpoint(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "x.gguf", "--type", kind).status == 0
    found, types = gguf_values(tmp_path / "x.gguf"), gguf_types(tmp_path / "x.gguf")
    expected = expected_tensors(spec)
    assert set(found) == set(expected)
    for name, values in expected.items():
        delicate = any(word in name for word in ALWAYS_F32)
        assert types[name] == ("F32" if delicate else kind), name
        rounded = values if delicate else values.to(DTYPES[kind]).float()
        assert found[name].shape == tuple(values.shape), name
        assert np.array_equal(found[name], rounded.numpy()), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_ggml_shapes_have_four_dimensions_if_the_loader_requires_them(tmp_path: Path, spec: Spec) -> None:
    source = fresh_checkpoint(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    shapes = {t.name: list(t.shape) for t in GGUFReader(tmp_path / "x.gguf").tensors}
    layer = spec.layers.index("K")
    width = spec.heads * spec.kda_head_dim
    assert shapes[f"blk.{layer}.ssm_a"] == [1, spec.heads, 1, 1]
    assert shapes[f"blk.{layer}.ssm_conv1d_q.weight"] == [spec.conv, 1, width, 1]
    layer = spec.layers.index("M")
    assert shapes[f"blk.{layer}.attn_k_b.weight"] == [spec.nope, spec.kv_lora, spec.heads]
    assert shapes[f"blk.{layer}.attn_v_b.weight"] == [spec.kv_lora, spec.v_dim, spec.heads]


def test_keys_match_the_specification(tmp_path: Path) -> None:
    spec = SPECS[0]
    source = fresh_checkpoint(tmp_path / "Kimi-Small", spec)
    assert convert(source, "-o", tmp_path / "x.gguf", "--type", "Q8_0").status == 0
    keys = gguf_keys(tmp_path / "x.gguf")
    tokens = keys.pop("tokenizer.ggml.tokens")
    assert len(tokens) == len(keys.pop("tokenizer.ggml.token_type")) == VOCAB_SIZE
    assert tokens[NUM_RANKS + 2] == "<|im_end|>"
    assert len(keys.pop("tokenizer.ggml.merges")) == NUM_RANKS - 256
    assert keys.pop("general.size_label").count("-A") == 1
    for name in ("config", "headers"):
        assert len(bytes.fromhex(keys.pop(f"kimi_gguf.source.{name}_sha256"))) == 32
    prefix = "kimi-linear."
    architecture = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
    assert architecture.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5, rel=1e-7)
    assert architecture.pop("expert_weights_scale") == pytest.approx(2.446, rel=1e-7)
    assert architecture == {
        "block_count": 3,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "vocab_size": VOCAB_SIZE,
        "attention.head_count": 3,
        "attention.head_count_kv": [0, 1, 0],
        "attention.key_length": 64 + 16,
        "attention.value_length": 64,
        "attention.kv_lora_rank": 64,
        "attention.key_length_mla": 32 + 16,
        "attention.value_length_mla": 32,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "expert_count": 5,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 32,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "leading_dense_block_count": 1,
        "ssm.conv_kernel": 4,
        "kda.head_dim": 32,
    }
    assert {k: v for k, v in keys.items() if not k.startswith(prefix)} == {
        "general.architecture": "kimi-linear",
        "general.type": "model",
        "general.name": "Kimi-Small",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.bos_token_id": NUM_RANKS,
        "tokenizer.ggml.eos_token_id": NUM_RANKS + 2,
        "tokenizer.ggml.eot_token_id": NUM_RANKS + 2,
        "tokenizer.ggml.padding_token_id": NUM_RANKS + 255,
        "tokenizer.ggml.unknown_token_id": NUM_RANKS + 254,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@pytest.mark.parametrize(
    "spec, expected",
    [
        (Spec(layers="KM", groups=4, topk_groups=2, experts=8), (4, 2, 8)),
        (Spec(layers="KM", groups=4, topk_groups=4, experts=8), (None, None, 8)),
        (Spec(layers="KM", dense_layers=2), (None, None, None)),
    ],
    ids=["groups", "all groups used", "all layers dense"],
)
def test_router_keys_are_written_only_where_the_loader_allows_them(
    tmp_path: Path, spec: Spec, expected: tuple[int | None, ...]
) -> None:
    source = fresh_checkpoint(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    keys = gguf_keys(tmp_path / "x.gguf")
    names = ("expert_group_count", "expert_group_used_count", "expert_count")
    assert tuple(keys.get(f"kimi-linear.{name}") for name in names) == expected


def test_query_compression_has_its_key(tmp_path: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPECS[1])
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    assert gguf_keys(tmp_path / "x.gguf")["kimi-linear.attention.q_lora_rank"] == 24


def test_size_label_counts_the_published_model() -> None:
    """49,122,681,728 parameters; a token uses those of 8 of 256 experts in 26 layers."""
    from kimi_gguf.convert.model.families import read_config
    from kimi_gguf.convert.model.metadata import parameters, size_label

    published = Path(__file__).parents[2] / "convert" / "model" / "kimi-linear-48b-config.json"
    config = read_config(published.read_text(), "config.json")
    # kv_b counts once: its two halves are the k and v tensors.
    total = 49_122_681_728
    active = total - 26 * (256 - 8) * 3 * 1024 * 2304
    assert parameters(config) == (total, active)
    assert size_label(config) == "49B-A3.5B"
