"""The GGUF keys of a model: one table for the architecture, one for the file, one for the tokens.

Input: the config, the vocabulary, the file's type and name. Output: `Key`s in file order.
Source of the architecture's keys: llama.cpp's loader (`load_arch_hparams`). What only one family has is in its module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.families import family_of, outputs
from kimi_gguf.convert.model.gguf_key import Key, u32
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.source.checkpoint import Merged
from kimi_gguf.convert.source.origin import Origin
from kimi_gguf.convert.types.file_types import FileType
from kimi_gguf.convert.types.imatrix import Importances

SIGMOID: Final = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
QUANTIZATION_VERSION: Final = 2  # GGML_QNT_VERSION
HUB: Final = "https://huggingface.co"
ADAPTER: Final = "kimi_gguf.adapter"  # first part of the keys about merged adapters
# Names of models as BASENAME-SIZE-FINETUNE, as in Kimi-Linear-48B-A3B-Instruct.
_NAME: Final = re.compile(r"(?P<basename>.+?)-\d+(\.\d+)?[KMBT](-A\d+(\.\d+)?[KMBT])?(-(?P<finetune>.+))?")


def metadata(
    config: ModelConfig,
    vocab: Vocab,
    file_type: FileType,
    name: str,
    importances: Importances | None = None,
    origin: Origin | None = None,
    quantized_by: str | None = None,
) -> list[Key]:
    """Every key of the file, in the order in which llama-quantize writes them."""
    return [
        *_general(config, name, origin, quantized_by),
        *_origin(origin),
        *architecture_keys(config),
        *tokenizer_keys(vocab),
        u32("general.quantization_version", QUANTIZATION_VERSION),
        u32("general.file_type", file_type.number),
        *_quantize(importances),
    ]


def _general(
    config: ModelConfig, name: str, origin: Origin | None, quantized_by: str | None
) -> Iterator[Key]:
    owner = origin.repository.split("/")[0] if origin and origin.repository else None
    words = _NAME.fullmatch(name)
    texts: tuple[tuple[str, str | None], ...] = (
        ("architecture", config.architecture),
        ("type", "model"),
        ("name", name),
        ("organization", owner),
        ("finetune", words["finetune"] if words else None),
        ("basename", words["basename"] if words else None),
        ("quantized_by", quantized_by),
        ("size_label", size_label(config)),
    )
    for key, text in texts:
        if text is not None:
            yield Key(f"general.{key}", ValueType.STRING, text)


def _origin(origin: Origin | None) -> Iterator[Key]:
    """Licence and base model under the names of the GGUF specification; hashes under names of this project."""
    if origin is None:
        return
    texts = (
        *origin.licence.items(),
        ("general.source.huggingface.repository", origin.repository),
        ("general.source.repo_url", f"{HUB}/{origin.repository}" if origin.repository else None),
        ("kimi_gguf.source.commit", origin.commit),
        ("kimi_gguf.source.config_sha256", origin.config_sha256),
        ("kimi_gguf.source.headers_sha256", origin.headers_sha256),
    )
    yield from (Key(name, ValueType.STRING, text) for name, text in texts if text)
    base = origin.repository or origin.base_model
    if base is not None:
        organisation, name = base.split("/")
        yield u32("general.base_model.count", 1)
        yield Key("general.base_model.0.name", ValueType.STRING, name)
        yield Key("general.base_model.0.organization", ValueType.STRING, organisation)
        yield Key("general.base_model.0.repo_url", ValueType.STRING, f"{HUB}/{base}")


def adapter_keys(merged: Sequence[Merged]) -> Iterator[Key]:
    """Which adapters were merged into the weights, under names of this project."""
    if merged:
        yield u32(f"{ADAPTER}.count", len(merged))
    for i, adapter in enumerate(merged):
        yield Key(f"{ADAPTER}.{i}.name", ValueType.STRING, adapter.name)
        yield Key(f"{ADAPTER}.{i}.sha256", ValueType.STRING, adapter.sha256)
        yield Key(f"{ADAPTER}.{i}.scale", ValueType.FLOAT32, adapter.scale)


def _quantize(importances: Importances | None) -> Iterator[Key]:
    """The keys that llama-quantize writes about an importance matrix; it truncates texts to 127 bytes."""
    if importances is None:
        return
    texts = (("file", str(importances.path)), ("dataset", importances.dataset))
    for name, text in texts:
        if text is not None:
            short = text.encode("utf-8", "surrogateescape")[:127].decode("utf-8", "ignore")
            yield Key(f"quantize.imatrix.{name}", ValueType.STRING, short)
    yield u32("quantize.imatrix.entries_count", len(importances.weights))
    if importances.chunks > 0:
        yield u32("quantize.imatrix.chunks_count", importances.chunks)


def architecture_keys(config: ModelConfig) -> Iterator[Key]:
    """The keys that describe the model's shape."""
    yield from common_keys(config)
    yield from family_of(config).own_keys(config)


def common_keys(config: ModelConfig) -> Iterator[Key]:
    """Those that all architectures have."""
    arch = config.architecture
    latent_rope = config.kv_lora_rank + config.qk_rope_head_dim
    moe = config.num_moe_layers > 0
    integers: tuple[tuple[str, int | None], ...] = (
        ("block_count", len(config.blocks)),
        ("context_length", config.context_length),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("attention.head_count", config.num_heads),
        # All heads use the latent cache: one key head as wide as the latent and the rotary part together, of
        # which the first `kv_lora_rank` values are the value head.
        ("attention.key_length", latent_rope),
        ("attention.value_length", config.kv_lora_rank),
        ("attention.key_length_mla", config.qk_nope_head_dim + config.qk_rope_head_dim),
        ("attention.value_length_mla", config.v_head_dim),
        ("attention.kv_lora_rank", config.kv_lora_rank),
        ("attention.q_lora_rank", config.q_lora_rank),
        ("rope.dimension_count", config.qk_rope_head_dim),
        ("ssm.conv_kernel", config.conv_kernel_size),
        ("kda.head_dim", config.kda_head_dim),
        ("expert_count", config.num_experts if moe else None),
        ("expert_used_count", config.num_experts_per_token if moe else None),
        ("expert_shared_count", config.num_shared_experts),
        ("expert_feed_forward_length", config.moe_intermediate_size),
        ("expert_gating_func", SIGMOID),
        # llama.cpp requires that fewer groups are used than exist; otherwise the keys must be absent.
        ("expert_group_count", config.num_expert_groups if moe and config.uses_groups else None),
        ("expert_group_used_count", config.topk_groups if moe and config.uses_groups else None),
        ("leading_dense_block_count", config.num_dense_layers),
    )
    floats = (
        ("attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        ("rope.freq_base", config.rope_theta),
        ("expert_weights_scale", config.routed_scaling_factor),
    )
    yield from (u32(f"{arch}.{name}", value) for name, value in integers if value is not None)
    yield from (Key(f"{arch}.{name}", ValueType.FLOAT32, value) for name, value in floats)
    yield Key(f"{arch}.expert_weights_norm", ValueType.BOOL, config.renormalize)
    # A layer without key-value heads is recurrent.
    kv_heads = [1 if kind is LayerKind.MLA else 0 for kind in config.blocks]
    yield Key(f"{arch}.attention.head_count_kv", ValueType.ARRAY, kv_heads, ValueType.INT32)


def tokenizer_keys(vocab: Vocab) -> Iterator[Key]:
    """The keys of the vocabulary."""
    yield Key("tokenizer.ggml.model", ValueType.STRING, "gpt2")
    yield Key("tokenizer.ggml.pre", ValueType.STRING, vocab.pre)
    yield Key("tokenizer.ggml.tokens", ValueType.ARRAY, vocab.tokens, ValueType.STRING)
    yield Key("tokenizer.ggml.token_type", ValueType.ARRAY, vocab.types, ValueType.INT32)
    yield Key("tokenizer.ggml.merges", ValueType.ARRAY, vocab.merges, ValueType.STRING)
    ids = (
        ("bos", vocab.bos_id),
        ("eos", vocab.eos_id),
        ("eot", vocab.eot_id),
        ("eom", vocab.eom_id),
        ("padding", vocab.pad_id),
        ("unknown", vocab.unk_id),
    )
    yield from (u32(f"tokenizer.ggml.{name}_token_id", value) for name, value in ids if value is not None)
    yield Key("tokenizer.ggml.add_bos_token", ValueType.BOOL, vocab.add_bos)
    if vocab.chat_template is not None:
        yield Key("tokenizer.chat_template", ValueType.STRING, vocab.chat_template)


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, active parameters of one token); the second excludes the experts that are not chosen."""
    total = active = 0
    for output in outputs(config):
        size = math.prod(output.ne)
        total += size
        routed = len(output.sources) > 1
        active += size * config.num_experts_per_token // config.num_experts if routed else size
    return total, active


def size_label(config: ModelConfig) -> str:
    """Such as "49B-A3B": all parameters, and after the A the active ones."""
    total, active = parameters(config)
    if config.num_moe_layers == 0:
        return _rounded(total)
    return f"{_rounded(total)}-A{_rounded(active)}"


def _rounded(count: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.0f}{name}" if count >= 10 * unit else f"{count / unit:.1f}{name}"
    return f"{count / 1000:.0f}K"
