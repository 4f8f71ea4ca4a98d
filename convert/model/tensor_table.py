"""The one table of tensors: canonical hub names and shapes, and what each becomes in a GGUF file.

Input: a `KimiConfig`. Output: `hub_shapes`, all tensors that a checkpoint must have, and `outputs`, all tensors of
the GGUF file with their sources, shape (ggml order, fastest dimension first) and transform.
Source of the GGUF side: llama.cpp's loader for the architecture `kimi-linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from kimi_gguf.convert.model.config import KimiConfig, LayerKind
from kimi_gguf.engine.tensor_types import TensorType


class Transform(Enum):
    """How the elements of the sources become those of the output, in output order."""

    COPY = "copy"
    NEG_EXP = "-exp"  # A_log -> A, the factor of the log-gate
    K_OF_KV = "k part, transposed per head"  # kv_b [heads*(nope+v), rank] -> [heads, rank, nope]
    V_OF_KV = "v part per head"  # kv_b [heads*(nope+v), rank] -> [heads, v, rank]


@dataclass(frozen=True)
class Row:
    """One GGUF tensor; shapes are words of `dimensions`."""

    hub: str
    shape: str  # of one source, row-major
    gguf: str
    ne: str = ""  # of the output, ggml order; empty: the source's shape reversed
    transform: Transform = Transform.COPY
    always_f32: bool = False  # read by the graph in F32 only, or too small and sensitive to round


@dataclass(frozen=True)
class Group:
    """Rows of the same layers; {i} in a name is the layer, {e} the expert."""

    has: Callable[[KimiConfig, int], bool]  # whether the layer has these rows
    hub: str  # prefix of every row's hub name, after "model.layers.{i}."
    rows: tuple[Row, ...]


_f32 = partial(Row, always_f32=True)


def _is_mla(config: KimiConfig, layer: int) -> bool:
    return config.layers[layer] is LayerKind.MLA


FLOAT32: Final = (".A_log", ".dt_bias")  # F32 in the published checkpoints, all others BF16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

FIRST: Final = Row(EMBEDDING, "vocab hidden", "token_embd.weight")
LAST: Final = (
    _f32("model.norm.weight", "hidden", "output_norm.weight"),
    Row(HEAD, "vocab hidden", "output.weight"),
)
LAYERS: Final = (
    Group(lambda config, layer: True, "", (
        _f32("input_layernorm.weight", "hidden", "attn_norm.weight"),
        _f32("post_attention_layernorm.weight", "hidden", "ffn_norm.weight"),
    )),
    Group(lambda config, layer: not _is_mla(config, layer), "self_attn.", (
        *(Row(f"{x}_proj.weight", "kda hidden", f"attn_{x}.weight") for x in "qkv"),
        *(_f32(f"{x}_conv1d.weight", "kda 1 conv", f"ssm_conv1d_{x}.weight", "conv 1 kda 1") for x in "qkv"),
        Row("f_a_proj.weight", "kda_head hidden", "ssm_f_a.weight"),
        Row("f_b_proj.weight", "kda kda_head", "ssm_f_b.weight"),
        _f32("dt_bias", "kda", "ssm_dt.bias"),
        _f32("A_log", "1 1 kda_heads 1", "ssm_a", "1 kda_heads 1 1", Transform.NEG_EXP),
        Row("b_proj.weight", "kda_heads hidden", "ssm_beta.weight"),
        Row("g_a_proj.weight", "kda_head hidden", "ssm_g_a.weight"),
        Row("g_b_proj.weight", "kda kda_head", "ssm_g_b.weight"),
        _f32("o_norm.weight", "kda_head", "ssm_norm.weight"),
        Row("o_proj.weight", "hidden kda", "attn_output.weight"),
    )),
    Group(lambda config, layer: _is_mla(config, layer) and config.q_lora_rank is None, "self_attn.", (
        Row("q_proj.weight", "mla_q hidden", "attn_q.weight"),
    )),
    Group(lambda config, layer: _is_mla(config, layer) and config.q_lora_rank is not None, "self_attn.", (
        Row("q_a_proj.weight", "q_rank hidden", "attn_q_a.weight"),
        _f32("q_a_layernorm.weight", "q_rank", "attn_q_a_norm.weight"),
        Row("q_b_proj.weight", "mla_q q_rank", "attn_q_b.weight"),
    )),
    Group(_is_mla, "self_attn.", (
        Row("kv_a_proj_with_mqa.weight", "latent_rope hidden", "attn_kv_a_mqa.weight"),
        _f32("kv_a_layernorm.weight", "latent", "attn_kv_a_norm.weight"),
        Row("kv_b_proj.weight", "mla_kv latent", "attn_k_b.weight", "nope latent heads", Transform.K_OF_KV),
        Row("kv_b_proj.weight", "mla_kv latent", "attn_v_b.weight", "latent v heads", Transform.V_OF_KV),
        Row("o_proj.weight", "hidden mla_v", "attn_output.weight"),
    )),
    Group(lambda config, layer: layer < config.num_dense_layers, "mlp.", (
        Row("gate_proj.weight", "ffn hidden", "ffn_gate.weight"),
        Row("up_proj.weight", "ffn hidden", "ffn_up.weight"),
        Row("down_proj.weight", "hidden ffn", "ffn_down.weight"),
    )),
    Group(lambda config, layer: layer >= config.num_dense_layers, "block_sparse_moe.", (
        _f32("gate.weight", "experts hidden", "ffn_gate_inp.weight"),
        _f32("gate.e_score_correction_bias", "experts", "exp_probs_b.bias"),
        Row("experts.{e}.w1.weight", "expert hidden", "ffn_gate_exps.weight", "hidden expert experts"),
        Row("experts.{e}.w3.weight", "expert hidden", "ffn_up_exps.weight", "hidden expert experts"),
        Row("experts.{e}.w2.weight", "hidden expert", "ffn_down_exps.weight", "expert hidden experts"),
        Row("shared_experts.gate_proj.weight", "shared hidden", "ffn_gate_shexp.weight"),
        Row("shared_experts.up_proj.weight", "shared hidden", "ffn_up_shexp.weight"),
        Row("shared_experts.down_proj.weight", "hidden shared", "ffn_down_shexp.weight"),
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Output:
    """A GGUF tensor before its type is chosen."""

    name: str
    ne: tuple[int, ...]  # ggml order
    sources: tuple[str, ...]  # canonical hub names, their elements one after the other
    source_shape: tuple[int, ...]  # of each source, row-major
    transform: Transform
    always_f32: bool

    @property
    def columns(self) -> int:
        """Columns with separate importances: those of each expert or head."""
        return self.ne[0] * (self.ne[2] if len(self.ne) > 2 else 1)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file, its type chosen."""

    output: Output
    type: TensorType
    nbytes: int

    @property
    def name(self) -> str:
        return self.output.name


def dimensions(config: KimiConfig) -> dict[str, int]:
    """The sizes that the table's shapes name."""
    return {
        "1": 1,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "conv": config.conv_kernel_size,
        "kda": config.kda_num_heads * config.kda_head_dim,
        "kda_head": config.kda_head_dim,
        "kda_heads": config.kda_num_heads,
        "heads": config.num_heads,
        "nope": config.qk_nope_head_dim,
        "v": config.v_head_dim,
        "latent": config.kv_lora_rank,
        "latent_rope": config.kv_lora_rank + config.qk_rope_head_dim,
        "mla_q": config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
        "mla_kv": config.num_heads * (config.qk_nope_head_dim + config.v_head_dim),
        "mla_v": config.num_heads * config.v_head_dim,
        "q_rank": config.q_lora_rank or 0,
        "ffn": config.intermediate_size,
        "expert": config.moe_intermediate_size,
        "experts": config.num_experts,
        "shared": config.moe_intermediate_size * config.num_shared_experts,
    }


def outputs(config: KimiConfig) -> Iterator[Output]:
    """Every tensor of the GGUF file in the order of the file: embedding, layers, output norm, output."""
    sizes = dimensions(config)

    def make(row: Row, layer: int = 0, hub: str = "", gguf: str = "") -> Output:
        shape = [sizes[word] for word in row.shape.split()]
        experts = config.num_experts if "{e}" in row.hub else 1
        return Output(
            name=gguf + row.gguf,
            ne=tuple(sizes[word] for word in row.ne.split()) or tuple(reversed(shape)),
            sources=tuple((hub + row.hub).format(i=layer, e=e) for e in range(experts)),
            source_shape=tuple(shape),
            transform=row.transform,
            always_f32=row.always_f32,
        )

    yield make(FIRST)
    for layer in range(len(config.layers)):
        for group in LAYERS:
            if group.has(config, layer):
                hub, gguf = "model.layers.{i}." + group.hub, f"blk.{layer}."
                yield from (make(row, layer, hub, gguf) for row in group.rows)
    yield from map(make, LAST)


def hub_shapes(config: KimiConfig) -> dict[str, tuple[int, ...]]:
    """Canonical hub name -> row-major shape of every tensor that a checkpoint of this config holds."""
    return {source: output.source_shape for output in outputs(config) for source in output.sources}
