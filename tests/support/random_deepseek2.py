"""A random deepseek2 model as an F32 GGUF: MLA with rotated keys and compressed queries, and dense layers.

Input: head sizes. Output: the file. It has no vocabulary, only a number of tokens, or the vocabulary and the embeddings
of another file: such a model and the other one can draft for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

VOCAB_SIZE = 128


@dataclass(frozen=True)
class DeepseekSpec:
    layers: int = 2
    hidden: int = 96
    ffn: int = 128
    heads: int = 3
    q_lora: int = 48
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    scale: float = 1.0  # of what each layer adds
    seed: int = 60


EMBEDDINGS = ("token_embd.weight", "output_norm.weight", "output.weight")


def copy_vocabulary(source: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Give a file the vocabulary of another one."""
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            kind, item = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, sub_type=item)


def write_deepseek2(path: Path, spec: DeepseekSpec, like: Path | None = None) -> Path:
    """Write the model to `path` and return it. like: take the vocabulary and the embeddings of this F32 file."""
    random = np.random.default_rng(spec.seed)
    other = gguf.GGUFReader(like) if like else None
    shared = {t.name: np.array(t.data) for t in other.tensors if t.name in EMBEDDINGS} if other else {}
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(spec.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_q_lora_rank(spec.q_lora)
    writer.add_kv_lora_rank(spec.kv_lora)
    writer.add_key_length(spec.kv_lora + spec.rope)
    writer.add_value_length(spec.kv_lora)
    writer.add_key_length_mla(spec.nope + spec.rope)
    writer.add_value_length_mla(spec.value)
    writer.add_rope_dimension_count(spec.rope)
    writer.add_leading_dense_block_count(spec.layers)
    writer.add_expert_feed_forward_length(spec.ffn)
    writer.add_expert_shared_count(1)
    if other is None:
        writer.add_vocab_size(VOCAB_SIZE)
        writer.add_tokenizer_model("no_vocab")
    else:
        copy_vocabulary(other, writer)

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        if f"{name}.weight" in shared:
            data = shared[f"{name}.weight"]
        elif len(shape) == 1:
            data = 1 + 0.1 * random.standard_normal(shape)
        else:
            data = scale * random.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(f"{name}.weight", data.astype(np.float32))

    add("token_embd", VOCAB_SIZE, spec.hidden)
    add("output_norm", spec.hidden)
    add("output", VOCAB_SIZE, spec.hidden)
    for i in range(spec.layers):
        layer = f"blk.{i}."
        add(layer + "attn_norm", spec.hidden)
        add(layer + "attn_q_a", spec.q_lora, spec.hidden)
        add(layer + "attn_q_a_norm", spec.q_lora)
        add(layer + "attn_q_b", spec.heads * (spec.nope + spec.rope), spec.q_lora)
        add(layer + "attn_kv_a_mqa", spec.kv_lora + spec.rope, spec.hidden)
        add(layer + "attn_kv_a_norm", spec.kv_lora)
        add(layer + "attn_k_b", spec.heads, spec.kv_lora, spec.nope)
        add(layer + "attn_v_b", spec.heads, spec.value, spec.kv_lora)
        add(layer + "attn_output", spec.hidden, spec.heads * spec.value, scale=spec.scale)
        add(layer + "ffn_norm", spec.hidden)
        add(layer + "ffn_gate", spec.ffn, spec.hidden)
        add(layer + "ffn_up", spec.ffn, spec.hidden)
        add(layer + "ffn_down", spec.hidden, spec.ffn, scale=spec.scale)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
