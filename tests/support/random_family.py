"""A random model of an architecture with Kimi Delta Attention, as an F32 GGUF.

Input: a `FamilySpec`. Output: the file. It has no vocabulary, only a number of tokens, or the vocabulary of another
file. Names, shapes and keys are those that llama.cpp's loader for the architecture
reads (src/models/bailingmoe3.cpp, glm5-next.cpp, kimi-k3.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import random_checkpoint
from numpy.typing import NDArray
from random_deepseek2 import copy_vocabulary

VOCAB_SIZE = 128
SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
HYPER_CONNECTIONS = 4  # of GLM-5.3-Flash: streams
SINKHORN = 5  # iterations
POOL = 4  # tokens that sparse attention chooses together
GLM_LIMIT = 0.5  # of a clamped SwiGLU, in all layers
Tensor = tuple[str, NDArray[np.float32]]
# name and tensor -> the tensor that is written
Change = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class FamilySpec:
    """A small model; K in `layers` is a KDA layer, M one with latent attention."""

    architecture: str
    layers: str = "KKM"
    hidden: int = 64
    heads: int = 2
    kda_head_dim: int = 64
    kv_lora: int = 512
    q_lora: int = 48  # rank of compressed queries
    compressed: bool = False  # Ling 3: its queries; those of GLM-5.3-Flash and Kimi K3 always are
    nope: int = 128
    rope: int = 64  # 0 in GLM-5.3-Flash
    value: int = 128
    ffn: int = 96
    experts: int = 8
    experts_used: int = 2
    expert_ffn: int = 32
    groups: tuple[int, int] | None = None  # of experts: all, chosen
    rms_norm_eps: float = 1e-5
    lower_bound: float | None = -5.0  # of the log-gate
    mtp: bool = False  # Ling 3: a layer that predicts one more token
    clamped: bool = False  # Ling 3: SwiGLU of the experts; GLM-5.3-Flash: of all layers
    yarn: tuple[float, float] | None = None  # Ling 3: factor, mscale_all_dim
    betas: tuple[float, float] = (32.0, 1.0)  # of YaRN: fast, slow
    index_heads: int = 2  # GLM-5.3-Flash: of the indexer
    index_head_dim: int = 32
    index_top_k: int = 32  # tokens that sparse attention chooses
    res_block: int = 2  # Kimi K3: layers of a block of residual attention; 0: ordinary residuals
    situ_linear_beta: float = 2.0  # Kimi K3; 0: the linear factor is not limited
    vocab: int = VOCAB_SIZE
    std: float = 1.0  # of weights, relative to 1 / sqrt(columns)
    seed: int = 70

    @property
    def kinds(self) -> str:
        return self.layers + ("M" if self.mtp else "")

    @property
    def q_rank(self) -> int | None:
        """Rank of the queries; None: they are not compressed."""
        return self.q_lora if self.compressed or self.architecture != "bailingmoe3" else None

    @property
    def id(self) -> str:
        return f"{self.architecture}-{self.kinds}-{self.heads}x{self.kda_head_dim}-std{self.std:g}"


# One of each architecture that has a size of heads, and of cache rows, for which CUDA and Metal have kernels: with
# Ling 3's number of heads, a bounded gate; few heads, an unbounded gate; K3's number of heads, a bounded gate.
ON_DEVICES = (
    FamilySpec("bailingmoe3", "KKMK", heads=16, vocab=random_checkpoint.VOCAB_SIZE, seed=80),
    FamilySpec(
        "glm5-next", "KKMK", rope=0, value=64, lower_bound=None, vocab=random_checkpoint.VOCAB_SIZE, seed=81
    ),
    FamilySpec("kimi-k3", "KKMK", heads=96, vocab=random_checkpoint.VOCAB_SIZE, seed=82),
)


def keys(spec: FamilySpec) -> dict[str, int | float | bool | list[int] | list[float]]:
    """The architecture's keys, without its name. Integers are written as uint32."""
    found: dict[str, int | float | bool | list[int] | list[float]] = {
        "block_count": len(spec.kinds),
        "context_length": 4096,
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.ffn,
        "vocab_size": spec.vocab,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": [int(kind == "M") for kind in spec.kinds],
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "attention.kv_lora_rank": spec.kv_lora,
        "attention.key_length": spec.kv_lora + spec.rope,
        "attention.value_length": spec.kv_lora,
        "attention.key_length_mla": spec.nope + spec.rope,
        "attention.value_length_mla": spec.value,
        "rope.dimension_count": spec.rope,
        "rope.freq_base": 10000.0,
        "ssm.conv_kernel": 4,
        "kda.head_dim": spec.kda_head_dim,
        "leading_dense_block_count": 1,
        "expert_count": spec.experts,
        "expert_used_count": spec.experts_used,
        "expert_feed_forward_length": spec.expert_ffn,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }
    if spec.lower_bound is not None:
        found["kda.gate_lower_bound"] = spec.lower_bound
    if spec.groups:
        found |= {"expert_group_count": spec.groups[0], "expert_group_used_count": spec.groups[1]}
    if spec.architecture == "bailingmoe3":
        if spec.clamped:
            found["swiglu_clamp_exp"] = [0.5] * len(spec.kinds)
            found["swiglu_clamp_shexp"] = [0.7] * len(spec.kinds)
        if spec.mtp:
            found["nextn_predict_layers"] = 1
    if spec.q_rank is not None:
        found["attention.q_lora_rank"] = spec.q_rank
    if spec.architecture == "glm5-next":
        found |= {
            "attention.layer_norm_epsilon": 1e-6,
            "attention.indexer.head_count": spec.index_heads,
            "attention.indexer.key_length": spec.index_head_dim,
            "attention.indexer.top_k": spec.index_top_k,
            "attention.indexer.kpool": POOL,
            "hyper_connection.count": HYPER_CONNECTIONS,
            "hyper_connection.sinkhorn_iterations": SINKHORN,
            "hyper_connection.epsilon": 1e-6,
        }
        if spec.clamped:
            found["swiglu_clamp_exp"] = found["swiglu_clamp_shexp"] = [GLM_LIMIT] * len(spec.kinds)
    if spec.architecture == "kimi-k3":
        found |= {
            "expert_latent_length": spec.hidden // 2,
            "attn_res.block_size": spec.res_block,
            "activation.situ_beta": 3.0,
            "activation.situ_linear_beta": spec.situ_linear_beta,
        }
    return found


def tensors(spec: FamilySpec) -> Iterator[Tensor]:
    """All tensors, row-major."""
    random = np.random.default_rng(spec.seed)

    def matrix(name: str, *shape: int) -> Tensor:
        data = spec.std * random.standard_normal(shape) / np.sqrt(shape[-1])
        return f"{name}.weight", data.astype(np.float32)

    def norm(name: str, size: int) -> Tensor:
        return f"{name}.weight", (1 + 0.1 * random.standard_normal(size)).astype(np.float32)

    def vector(name: str, size: int, low: float, high: float) -> Tensor:
        return name, random.uniform(low, high, size).astype(np.float32)

    yield matrix("token_embd", spec.vocab, spec.hidden)
    yield norm("output_norm", spec.hidden)
    yield matrix("output", spec.vocab, spec.hidden)
    if spec.architecture == "kimi-k3" and spec.res_block:
        yield matrix("output_res_score", spec.hidden)
    for i, kind in enumerate(spec.kinds):
        layer = f"blk.{i}."
        yield norm(layer + "attn_norm", spec.hidden)
        yield norm(layer + "ffn_norm", spec.hidden)
        part = (_kda if kind == "K" else _mla)(spec, layer)
        for name, *shape in (*part, *_ffn(spec, layer, i), *_own(spec, layer, i)):
            size = int(shape[0])
            if name.endswith("norm"):
                yield norm(name, size)
            elif name.endswith("ssm_a"):
                _, a_log = vector(name, size, -1.0, 1.5)
                positive = spec.architecture == "bailingmoe3"
                yield name, np.exp(a_log).reshape(-1, 1) if positive else -np.exp(a_log)
            elif name.endswith("bias"):
                yield vector(name, size, -1.0, 1.0)
            elif name.endswith("res_score"):
                yield matrix(
                    name, size
                )  # scores of about 1: larger ones choose one block, and amplify rounding
            elif name.endswith(("base", "scale")):
                yield norm(name, size)
            else:
                yield matrix(name, *map(int, shape))


def _kda(spec: FamilySpec, layer: str) -> Iterator[tuple[str | int, ...]]:
    inner, hidden = spec.heads * spec.kda_head_dim, spec.hidden
    yield from ((f"{layer}attn_{x}", inner, hidden) for x in "qkv")
    yield from ((f"{layer}ssm_conv1d_{x}", 1, inner, 1, 4) for x in "qkv")
    if spec.architecture == "bailingmoe3":
        yield layer + "ssm_f_a", inner, hidden
        yield layer + "ssm_g_a", inner, hidden
    else:
        yield layer + "ssm_f_a", spec.kda_head_dim, hidden
        yield layer + "ssm_f_b", inner, spec.kda_head_dim
    if spec.architecture == "glm5-next":
        yield layer + "ssm_g_a", spec.kda_head_dim, hidden
        yield layer + "ssm_g_b", inner, spec.kda_head_dim
    if spec.architecture == "kimi-k3":
        yield layer + "ssm_g", inner, hidden
    yield layer + "ssm_beta", spec.heads, hidden
    yield layer + "ssm_a", spec.heads
    yield layer + "ssm_dt.bias", inner
    yield layer + "ssm_norm", spec.kda_head_dim
    yield layer + "attn_output", hidden, inner


def _mla(spec: FamilySpec, layer: str) -> Iterator[tuple[str | int, ...]]:
    q = spec.heads * (spec.nope + spec.rope)
    if spec.q_rank is None:
        yield layer + "attn_q", q, spec.hidden
    else:
        yield layer + "attn_q_a", spec.q_rank, spec.hidden
        yield layer + "attn_q_a_norm", spec.q_rank
        yield layer + "attn_q_b", q, spec.q_rank
    if spec.architecture == "bailingmoe3":
        yield layer + "attn_gate", spec.heads, spec.hidden
    if spec.architecture == "kimi-k3":
        yield layer + "attn_gate", spec.heads * spec.value, spec.hidden
    if spec.architecture == "glm5-next":
        heads, dim = spec.index_heads, spec.index_head_dim
        yield layer + "indexer.k_norm", dim
        yield layer + "indexer.k_norm.bias", dim
        yield layer + "indexer.proj", heads, spec.hidden
        yield layer + "indexer.attn_k", dim, spec.hidden
        yield layer + "indexer.attn_q_b", heads * dim, spec.q_lora
        yield layer + "indexer_compressor_gate", dim, spec.hidden
        yield layer + "indexer_compressor_ape", POOL, dim
    yield layer + "attn_kv_a_mqa", spec.kv_lora + spec.rope, spec.hidden
    yield layer + "attn_kv_a_norm", spec.kv_lora
    yield layer + "attn_k_b", spec.heads, spec.kv_lora, spec.nope
    yield layer + "attn_v_b", spec.heads, spec.value, spec.kv_lora
    yield layer + "attn_output", spec.hidden, spec.heads * spec.value


def _ffn(spec: FamilySpec, layer: str, i: int) -> Iterator[tuple[str | int, ...]]:
    if i == 0:
        yield layer + "ffn_gate", spec.ffn, spec.hidden
        yield layer + "ffn_up", spec.ffn, spec.hidden
        yield layer + "ffn_down", spec.hidden, spec.ffn
        return
    width = spec.hidden // 2 if spec.architecture == "kimi-k3" else spec.hidden
    yield layer + "ffn_gate_inp", spec.experts, spec.hidden
    yield layer + "exp_probs_b.bias", spec.experts
    yield layer + "ffn_gate_exps", spec.experts, spec.expert_ffn, width
    yield layer + "ffn_up_exps", spec.experts, spec.expert_ffn, width
    yield layer + "ffn_down_exps", spec.experts, width, spec.expert_ffn
    yield layer + "ffn_gate_shexp", spec.expert_ffn, spec.hidden
    yield layer + "ffn_up_shexp", spec.expert_ffn, spec.hidden
    yield layer + "ffn_down_shexp", spec.hidden, spec.expert_ffn


def _own(spec: FamilySpec, layer: str, i: int) -> Iterator[tuple[str | int, ...]]:
    """What only one architecture has."""
    if spec.architecture == "kimi-k3":
        if spec.res_block:
            yield layer + "attn_res_score", spec.hidden
            yield layer + "ffn_res_score", spec.hidden
        if i > 0:
            yield layer + "ffn_routed_down", spec.hidden // 2, spec.hidden
            yield layer + "ffn_routed_up", spec.hidden, spec.hidden // 2
            yield layer + "ffn_routed_norm", spec.hidden // 2
    if spec.architecture == "glm5-next":
        mixed = (2 + HYPER_CONNECTIONS) * HYPER_CONNECTIONS
        for part in ("attn", "ffn"):
            yield f"{layer}hc_{part}_fn", mixed, HYPER_CONNECTIONS * spec.hidden
            yield f"{layer}hc_{part}_base", mixed
            yield f"{layer}hc_{part}_scale", 3
    if i >= len(spec.layers):
        yield layer + "nextn.eh_proj", spec.hidden, 2 * spec.hidden
        yield layer + "nextn.enorm", spec.hidden
        yield layer + "nextn.hnorm", spec.hidden
        yield layer + "layer_output_norm", spec.hidden


def unchanged(_: str, data: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tensor as it is."""
    return data


def write_family(
    path: Path,
    spec: FamilySpec,
    vocabulary_of: Path | None = None,
    change: Change = unchanged,
) -> Path:
    """Write the model to `path` and return it.

    vocabulary_of: a GGUF whose vocabulary has `spec.vocab` tokens. change: what becomes of a tensor, by name.
    """
    writer = gguf.GGUFWriter(path, spec.architecture)
    if vocabulary_of is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        copy_vocabulary(gguf.GGUFReader(vocabulary_of), writer)
    if spec.yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(spec.yarn[0])
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_yarn_log_mul(0.1 * spec.yarn[1])
        writer.add_rope_scaling_yarn_beta_fast(spec.betas[0])
        writer.add_rope_scaling_yarn_beta_slow(spec.betas[1])
    for name, value in keys(spec).items():
        full = f"{spec.architecture}.{name}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    for name, data in tensors(spec):
        writer.add_tensor(name, change(name, data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
