"""Rows and groups of tensors that the families write alike; their modules put them together with their own.

Output: rows and groups for a `Table`. Words of shapes are those of `dimensions`.
"""

from __future__ import annotations

from typing import Final

from kimi_gguf.convert.model.tensor_table import Group, Row, Transform, f32, is_mla

NORM: Final = f32("model.norm.weight", "hidden", "output_norm.weight")
HEAD: Final = Row("lm_head.weight", "vocab hidden", "output.weight")

LAYER_NORMS: Final = Group(lambda config, layer: True, "", (
    f32("input_layernorm.weight", "hidden", "attn_norm.weight"),
    f32("post_attention_layernorm.weight", "hidden", "ffn_norm.weight"),
))  # fmt: skip

# q, k and v of KDA with their convolutions
KDA_QKV: Final = (
    *(Row(f"{x}_proj.weight", "kda hidden", f"attn_{x}.weight") for x in "qkv"),
    *(f32(f"{x}_conv1d.weight", "kda 1 conv", f"ssm_conv1d_{x}.weight", "conv 1 kda 1") for x in "qkv"),
)

# parts of the names of KDA's gates, whose errors act on all following tokens
KDA_GATES: Final = ("ssm_f_", "ssm_g.weight", "ssm_g_a")

# keys and values of MLA
MLA_KV: Final = (
    Row("kv_a_proj_with_mqa.weight", "latent_rope hidden", "attn_kv_a_mqa.weight"),
    f32("kv_a_layernorm.weight", "latent", "attn_kv_a_norm.weight"),
    Row("kv_b_proj.weight", "mla_kv latent", "attn_k_b.weight", "nope latent heads", Transform.K_OF_KV),
    Row("kv_b_proj.weight", "mla_kv latent", "attn_v_b.weight", "latent v heads", Transform.V_OF_KV),
)

DENSE_FFN: Final = Group(lambda config, layer: layer < config.num_dense_layers, "mlp.", (
    Row("gate_proj.weight", "ffn hidden", "ffn_gate.weight"),
    Row("up_proj.weight", "ffn hidden", "ffn_up.weight"),
    Row("down_proj.weight", "hidden ffn", "ffn_down.weight"),
))  # fmt: skip

SHARED_EXPERTS: Final = (
    Row("shared_experts.gate_proj.weight", "shared hidden", "ffn_gate_shexp.weight"),
    Row("shared_experts.up_proj.weight", "shared hidden", "ffn_up_shexp.weight"),
    Row("shared_experts.down_proj.weight", "hidden shared", "ffn_down_shexp.weight"),
)


def mla_queries(hub: str) -> tuple[Group, Group]:
    """The queries of MLA, directly or through a query latent; hub: prefix of the names in the layer."""
    return (
        Group(lambda config, layer: is_mla(config, layer) and config.q_lora_rank is None, hub, (
            Row("q_proj.weight", "mla_q hidden", "attn_q.weight"),
        )),
        Group(lambda config, layer: is_mla(config, layer) and config.q_lora_rank is not None, hub, (
            Row("q_a_proj.weight", "q_rank hidden", "attn_q_a.weight"),
            f32("q_a_layernorm.weight", "q_rank", "attn_q_a_norm.weight"),
            Row("q_b_proj.weight", "mla_q q_rank", "attn_q_b.weight"),
        )),
    )  # fmt: skip
