"""GLM-5.3-Flash (llama.cpp's architecture `glm5-next`), which the converter does not support: tensors and GGUF keys.

Input: the values of published.py. Output: `GlmConfig`, its tensors and its keys. There are no names of a checkpoint:
only generated files have this architecture.

Layers are like Kimi-Linear's, with bounded KDA gates. Latent attention has compressed queries and no RoPE; an indexer
chooses the pools of keys that a query reads. Attention and FFN read and write four residual streams
(hyper-connections). The SwiGLU is clamped. Source: llama.cpp's loader for `glm5-next`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.bench.published import Config
from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.gguf_key import Key, u32
from kimi_gguf.convert.model.metadata import common_keys
from kimi_gguf.convert.model.tensor_table import Group, Output, Row, Table, is_kda, is_mla, outputs_of

ARCHITECTURE: Final = "glm5-next"
GROUP: Final = 4  # layers: three with KDA, one with latent attention
LAYER_NORM_EPS: Final = 1e-6  # of the indexer's keys


@dataclass(frozen=True, kw_only=True)
class GlmConfig(ModelConfig):
    """The text model."""

    index_heads: int
    index_head_dim: int
    index_top_k: int  # keys that a query reads at most
    index_pool: int  # keys of a pool
    streams: int  # residual streams
    sinkhorn_iterations: int
    stream_eps: float
    swiglu_limit: float


def make_config(data: Config, layers: int, experts: int) -> GlmConfig:
    """The config of a model with the values of `data` and as many layers and experts."""
    kinds = tuple(LayerKind.KDA if (i + 1) % GROUP else LayerKind.MLA for i in range(layers))
    heads = data["num_attention_heads"]
    return GlmConfig(
        architecture=ARCHITECTURE,
        hidden_size=data["hidden_size"],
        vocab_size=data["vocab_size"],
        context_length=data["max_position_embeddings"],
        rms_norm_eps=data["rms_norm_eps"],
        layers=kinds,
        kda_num_heads=heads,
        kda_head_dim=data["linear_head_dim"],
        conv_kernel_size=data["linear_conv_kernel_dim"],
        kda_lower_bound=data["gate_lower_bound"],
        num_heads=heads,
        q_lora_rank=data["q_lora_rank"],
        kv_lora_rank=data["kv_lora_rank"],
        qk_nope_head_dim=data["qk_nope_head_dim"],
        qk_rope_head_dim=0,
        v_head_dim=data["v_head_dim"],
        rope_theta=10000.0,  # not used, but the loader reads it
        intermediate_size=data["intermediate_size"],
        num_dense_layers=min(data["num_dense_layers"], layers),
        moe_intermediate_size=data["moe_intermediate_size"],
        num_experts=experts,
        num_experts_per_token=min(data["num_experts_per_tok"], experts),
        num_shared_experts=data["n_shared_experts"],
        num_expert_groups=1,
        topk_groups=1,
        routed_scaling_factor=data["routed_scaling_factor"],
        renormalize=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        index_heads=data["index_n_heads"],
        index_head_dim=data["index_head_dim"],
        index_top_k=data["index_topk"],
        index_pool=data["index_kpool"],
        streams=data["hc_mult"],
        sinkhorn_iterations=data["hc_sinkhorn_iters"],
        stream_eps=data["hc_eps"],
        swiglu_limit=data["swiglu_limit"],
    )


def _sizes(config: ModelConfig) -> dict[str, int]:
    assert isinstance(config, GlmConfig)
    return {
        "index": config.index_head_dim,
        "index_heads": config.index_heads,
        "index_q": config.index_heads * config.index_head_dim,
        "pool": config.index_pool,
        "streams": config.streams * config.hidden_size,
        "mix": (2 + config.streams) * config.streams,
        "three": 3,
    }


def _row(name: str, ne: str, always_f32: bool = False) -> Row:
    """ne: in ggml order."""
    return Row(name, " ".join(reversed(ne.split())), name, ne, always_f32=always_f32)


def _f32(name: str, ne: str) -> Row:
    return _row(name, ne, always_f32=True)


LAYERS: Final = (
    Group(lambda config, layer: True, "", (
        _f32("attn_norm.weight", "hidden"),
        _f32("ffn_norm.weight", "hidden"),
        *(
            _f32(f"hc_{part}_{name}.weight", ne)
            for part in ("attn", "ffn")
            for name, ne in (("fn", "streams mix"), ("base", "mix"), ("scale", "three"))
        ),
    )),
    Group(is_kda, "", (
        *(_row(f"attn_{x}.weight", "hidden kda") for x in "qkv"),
        *(_f32(f"ssm_conv1d_{x}.weight", "conv 1 kda 1") for x in "qkv"),
        _row("ssm_f_a.weight", "hidden kda_head"),
        _row("ssm_f_b.weight", "kda_head kda"),
        _f32("ssm_dt.bias", "kda"),
        _f32("ssm_a", "kda_heads"),
        _row("ssm_beta.weight", "hidden kda_heads"),
        _row("ssm_g_a.weight", "hidden kda_head"),
        _row("ssm_g_b.weight", "kda_head kda"),
        _f32("ssm_norm.weight", "kda_head"),
        _row("attn_output.weight", "kda hidden"),
    )),
    Group(is_mla, "", (
        _row("attn_q_a.weight", "hidden q_rank"),
        _f32("attn_q_a_norm.weight", "q_rank"),
        _row("attn_q_b.weight", "q_rank mla_q"),
        _row("attn_kv_a_mqa.weight", "hidden latent_rope"),
        _f32("attn_kv_a_norm.weight", "latent"),
        _row("attn_k_b.weight", "nope latent heads"),
        _row("attn_v_b.weight", "latent v heads"),
        _row("attn_output.weight", "mla_v hidden"),
        _f32("indexer.k_norm.weight", "index"),
        _f32("indexer.k_norm.bias", "index"),
        _row("indexer.proj.weight", "hidden index_heads"),
        _row("indexer.attn_k.weight", "hidden index"),
        _row("indexer.attn_q_b.weight", "q_rank index_q"),
        _f32("indexer_compressor_gate.weight", "hidden index"),
        _f32("indexer_compressor_ape.weight", "index pool"),
    )),
    Group(lambda config, layer: layer < config.num_dense_layers, "", (
        _row("ffn_gate.weight", "hidden ffn"),
        _row("ffn_up.weight", "hidden ffn"),
        _row("ffn_down.weight", "ffn hidden"),
    )),
    Group(lambda config, layer: layer >= config.num_dense_layers, "", (
        _f32("ffn_gate_inp.weight", "hidden experts"),
        _f32("exp_probs_b.bias", "experts"),
        _row("ffn_gate_exps.weight", "hidden expert experts"),
        _row("ffn_up_exps.weight", "hidden expert experts"),
        _row("ffn_down_exps.weight", "expert hidden experts"),
        _row("ffn_gate_shexp.weight", "hidden shared"),
        _row("ffn_up_shexp.weight", "hidden shared"),
        _row("ffn_down_shexp.weight", "shared hidden"),
    )),
)  # fmt: skip
TABLE: Final = Table(
    embedding=_row("token_embd.weight", "hidden vocab"),
    layers=LAYERS,
    last=(_f32("output_norm.weight", "hidden"),),
    head=_row("output.weight", "hidden vocab"),
    sizes=_sizes,
)


def outputs(config: ModelConfig) -> Iterator[Output]:
    """Every tensor in the order of the file."""
    return outputs_of(TABLE, config)


def keys(config: ModelConfig) -> Iterator[Key]:
    """The keys that describe the model's shape."""
    assert isinstance(config, GlmConfig)
    yield from common_keys(config)
    integers = (
        ("attention.indexer.head_count", config.index_heads),
        ("attention.indexer.key_length", config.index_head_dim),
        ("attention.indexer.top_k", config.index_top_k),
        ("attention.indexer.kpool", config.index_pool),
        ("hyper_connection.count", config.streams),
        ("hyper_connection.sinkhorn_iterations", config.sinkhorn_iterations),
    )
    floats = (
        ("attention.layer_norm_epsilon", LAYER_NORM_EPS),
        ("hyper_connection.epsilon", config.stream_eps),
        ("kda.gate_lower_bound", config.kda_lower_bound or 0.0),
        # one value for all layers; the shared experts have the same
        ("swiglu_clamp_exp", config.swiglu_limit),
    )
    yield from (u32(f"{ARCHITECTURE}.{name}", value) for name, value in integers)
    yield from (Key(f"{ARCHITECTURE}.{name}", ValueType.FLOAT32, value) for name, value in floats)
