"""Summarize a GGUF file or a checkpoint: layers, sizes, types, and the memory that the caches need.

Input: a path. Output: `Summary`, and its text. Reads headers only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import LayerKind
from kimi_gguf.convert.model.metadata import ARCHITECTURE, parameters
from kimi_gguf.convert.model.tensor_table import outputs
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.source.origin import model_name
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.gguf import GgufModel


@dataclass(frozen=True)
class Layer:
    """One layer; index -1 stands for the tensors outside of layers."""

    index: int
    mixer: str  # KDA or MLA
    ffn: str  # dense or MoE
    nbytes: int
    types: Mapping[str, int]  # type -> tensors


@dataclass(frozen=True)
class Summary:
    """A model on disk; sizes are in bytes."""

    path: str
    kind: str  # GGUF or safetensors
    name: str
    type: str
    parameters: int
    layers: tuple[Layer, ...]
    types: Mapping[str, tuple[int, int]]  # type -> (tensors, bytes)
    context: int
    latent_cache_f16: int  # of all MLA layers at `context` tokens
    recurrent_state_f32: int  # of all KDA layers, for one sequence, at any length

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Shape:
    """The sizes that determine the caches."""

    mixers: list[str]
    dense_layers: int
    latent: int  # values per token and MLA layer
    kda_heads: int
    kda_head_dim: int
    conv: int

    def caches(self, context: int) -> tuple[int, int]:
        width = self.kda_heads * self.kda_head_dim
        state = width * self.kda_head_dim + 3 * width * (self.conv - 1)
        return self.mixers.count("MLA") * self.latent * context * 2, self.mixers.count("KDA") * state * 4


def inspect_model(path: Path | str, context: int) -> Summary:
    """Summarize a GGUF file or a checkpoint (folder, safetensors file or hub id). Raises `ConvertError` or
    `GgufError`."""
    if Path(path).suffix == ".gguf":
        return _gguf(Path(path), context)
    return _checkpoint(path, context)


def _gguf(path: Path, context: int) -> Summary:
    with GgufModel(path) as file:
        keys = file.keys
        if keys.get("general.architecture") != ARCHITECTURE:
            raise ConvertError(
                f"{path}: general.architecture: expected {ARCHITECTURE}, "
                f"found {keys.get('general.architecture')!r:.60}"
            )

        def key(name: str) -> int:
            value = keys.get(f"{ARCHITECTURE}.{name}")
            if not isinstance(value, int):
                raise ConvertError(f"{path}: {ARCHITECTURE}.{name}: expected an integer, found {value!r:.60}")
            return value

        kv_heads = keys.get(f"{ARCHITECTURE}.attention.head_count_kv")
        if not isinstance(kv_heads, list) or len(kv_heads) != key("block_count"):
            raise ConvertError(
                f"{path}: {ARCHITECTURE}.attention.head_count_kv: expected a number for each layer"
            )
        shape = _Shape(
            ["MLA" if heads else "KDA" for heads in kv_heads],
            key("leading_dense_block_count"),
            key("attention.kv_lora_rank") + key("rope.dimension_count"),
            key("attention.head_count"),
            key("kda.head_dim"),
            key("ssm.conv_kernel"),
        )
        numbers = {kind.number: kind.name for kind in TYPES.values()}
        number = keys.get("general.file_type")
        found = [(t.name, t.type.name, t.nbytes) for t in file.tensors.values()]
        count = sum(math.prod(t.ne) for t in file.tensors.values())
        type_ = numbers.get(number, f"unknown ({number})") if isinstance(number, int) else "unknown"
        return _summary(path, "GGUF", str(keys.get("general.name", "")), type_, count, shape, found, context)


def _checkpoint(path: Path | str, context: int) -> Summary:
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        shape = _Shape(
            ["MLA" if kind is LayerKind.MLA else "KDA" for kind in config.layers],
            config.num_dense_layers,
            config.kv_lora_rank + config.qk_rope_head_dim,
            config.kda_num_heads,
            config.kda_head_dim,
            config.conv_kernel_size,
        )
        found: dict[str, tuple[str, str, int]] = {}
        for output in outputs(config):
            for source in output.sources:
                dtype = checkpoint.dtype(source)
                nbytes = math.prod(output.source_shape) * dtype.numpy.itemsize
                found[source] = (output.name, dtype.name, nbytes)
        type_ = Counter(dtype for _, dtype, _ in found.values()).most_common(1)[0][0]
        count = parameters(config)[0]
        name = model_name(checkpoint.folder)
        return _summary(path, "safetensors", name, type_, count, shape, list(found.values()), context)


def _summary(
    path: Path | str,
    kind: str,
    name: str,
    type_: str,
    count: int,
    shape: _Shape,
    found: list[tuple[str, str, int]],
    context: int,
) -> Summary:
    sizes: Counter[int] = Counter()
    by_layer: dict[int, Counter[str]] = {}
    by_type: dict[str, tuple[int, int]] = {}
    for tensor, dtype, nbytes in found:
        index = tensor.split(".")[1] if tensor.startswith("blk.") else "-1"
        if not index.lstrip("-").isdecimal() or int(index) >= len(shape.mixers):
            raise ConvertError(
                f"{path}: {tensor!r:.80}: expected a layer below {len(shape.mixers)}, the model's number of layers"
            )
        sizes[int(index)] += nbytes
        by_layer.setdefault(int(index), Counter())[dtype] += 1
        tensors, total = by_type.get(dtype, (0, 0))
        by_type[dtype] = tensors + 1, total + nbytes
    layers = tuple(
        Layer(
            i,
            shape.mixers[i] if i >= 0 else "",
            "" if i < 0 else "dense" if i < shape.dense_layers else "MoE",
            sizes[i],
            dict(by_layer[i].most_common()),
        )
        for i in sorted(by_layer)
    )
    latent, state = shape.caches(context)
    return Summary(str(path), kind, name, type_, count, layers, by_type, context, latent, state)


def summary_text(summary: Summary) -> str:
    """The summary as a table for people."""
    total = sum(layer.nbytes for layer in summary.layers)
    lines = [
        f"{summary.path}: {summary.kind}, {summary.name!r}, {summary.type}, "
        f"{summary.parameters / 1e9:.3g} B parameters, {total:,} bytes of tensors",
        "layer  mixer  ffn            bytes  types",
    ]
    for layer in summary.layers:
        types = ", ".join(f"{count} {name}" for name, count in layer.types.items())
        index = f"{layer.index:5}" if layer.index >= 0 else "  top"
        lines.append(f"{index}  {layer.mixer:5}  {layer.ffn:5}  {layer.nbytes:>14,}  {types}")
    for name, (tensors, nbytes) in sorted(summary.types.items(), key=lambda item: -item[1][1]):
        lines.append(f"{name:8} {tensors:6} tensors  {nbytes:>15,} bytes")
    lines.append(
        f"caches at {summary.context:,} tokens: {summary.latent_cache_f16:,} bytes of MLA latents (F16), "
        f"{summary.recurrent_state_f32:,} bytes of KDA state per sequence (independent of its length)"
    )
    return "\n".join(lines)
