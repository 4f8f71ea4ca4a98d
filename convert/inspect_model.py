"""Summarize a GGUF file or a checkpoint: layers, sizes, types, and the memory that the caches need.

Input: a path. Output: `Summary`, and its text. Reads headers only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.convert.errors import ConvertError, excerpt
from kimi_gguf.convert.model.config import LayerKind
from kimi_gguf.convert.model.families import BY_ARCHITECTURE, outputs
from kimi_gguf.convert.model.metadata import parameters
from kimi_gguf.convert.source.checkpoint import CONFIG, exists, open_checkpoint
from kimi_gguf.convert.source.origin import model_name
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.gguf import GgufModel
from kimi_gguf.engine.path_check import check_path
from kimi_gguf.engine.tensor_names import LAYERS, layer_of


@dataclass(frozen=True)
class Layer:
    """One layer; index -1 means the tensors outside of layers."""

    index: int
    mixer: str  # KDA, MLA, or MTP: MLA in a layer that predicts a further token
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
    latent_cache_f16: int  # of all MLA layers at `context` tokens, without MTP
    recurrent_state_f32: int  # of all KDA layers, for one sequence, at any length


@dataclass(frozen=True)
class _Model:
    """The facts that are read from either kind of file."""

    kind: str
    name: str
    type: str
    parameters: int
    mixers: list[str]
    dense_layers: int
    latent: int  # values per token and MLA layer
    kda_heads: int
    kda_head_dim: int
    conv: int
    tensors: list[tuple[str, str, int]]  # GGUF name, type, bytes


def inspect_model(path: Path | str, context: int) -> Summary:
    """Summarize a GGUF file or a checkpoint (folder, safetensors file or hub id) with caches for `context` tokens.
    Raises `ConvertError` or `EngineError`."""
    place = Path(path)
    if exists(place):
        if place.is_file() and place.suffix not in (".gguf", ".safetensors", ".json"):
            raise ConvertError(path, expected="a GGUF file, a checkpoint folder or a .safetensors file")
        files = sorted(place.glob("*.gguf"))  # empty if the path is not a folder
        if files and not (place / CONFIG).exists():
            what = "expected a checkpoint or a GGUF file, found a folder with GGUF files"
            raise ConvertError(f"{path}: {what}", todo=f"name one of them, for example {files[0]}")
    model = _gguf(place) if place.suffix == ".gguf" else _checkpoint(path)
    sizes: Counter[int] = Counter()
    by_layer: dict[int, Counter[str]] = {}
    by_type: dict[str, tuple[int, int]] = {}
    count = len(model.mixers)
    for tensor, dtype, nbytes in model.tensors:
        index = layer_of(tensor)
        if index >= count or (index < 0 and tensor.startswith(LAYERS)):
            raise ConvertError(f"{path}: {tensor!r:.80}", expected=f"a layer from 0 to {count - 1}")
        sizes[index] += nbytes
        by_layer.setdefault(index, Counter())[dtype] += 1
        tensors, total = by_type.get(dtype, (0, 0))
        by_type[dtype] = tensors + 1, total + nbytes
    layers = tuple(
        Layer(
            i,
            model.mixers[i] if i >= 0 else "",
            "" if i < 0 else "dense" if i < model.dense_layers else "MoE",
            sizes[i],
            dict(by_layer[i].most_common()),
        )
        for i in sorted(by_layer)
    )
    width = model.kda_heads * model.kda_head_dim
    state = width * model.kda_head_dim + 3 * width * (model.conv - 1)
    return Summary(
        path=str(path),
        kind=model.kind,
        name=model.name,
        type=model.type,
        parameters=model.parameters,
        layers=layers,
        types=by_type,
        context=context,
        latent_cache_f16=model.mixers.count("MLA") * model.latent * context * 2,
        recurrent_state_f32=model.mixers.count("KDA") * state * 4,
    )


def _gguf(path: Path) -> _Model:
    check_path(path)
    with GgufModel(path) as file:
        keys = file.keys
        architecture = keys.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in BY_ARCHITECTURE:
            what = f"expected {' or '.join(BY_ARCHITECTURE)}, found {excerpt(architecture)}"
            raise ConvertError(f"{path}: general.architecture: {what}")

        def key(name: str) -> int:
            value = keys.get(f"{architecture}.{name}")
            if not isinstance(value, int):
                raise ConvertError(
                    f"{path}: {architecture}.{name}", expected="an integer", found=excerpt(value)
                )
            return value

        kv_heads = keys.get(f"{architecture}.attention.head_count_kv")
        if not isinstance(kv_heads, list) or len(kv_heads) != key("block_count"):
            name = f"{architecture}.attention.head_count_kv"
            raise ConvertError(f"{path}: {name}", expected="a number for each layer")
        mtp = key("nextn_predict_layers") if f"{architecture}.nextn_predict_layers" in keys else 0
        if not 0 <= mtp <= len(kv_heads):
            what = f"expected at most {len(kv_heads)} layers, found {mtp}"
            raise ConvertError(f"{path}: {architecture}.nextn_predict_layers: {what}")
        types = {kind.number: kind.name for kind in TYPES.values()}
        number = keys.get("general.file_type")
        return _Model(
            kind="GGUF",
            name=str(keys.get("general.name", "")),
            type=types.get(number, f"unknown ({number})") if isinstance(number, int) else "unknown",
            parameters=sum(math.prod(t.ne) for t in file.tensors.values()),
            mixers=_mixers(kv_heads, mtp),
            dense_layers=key("leading_dense_block_count"),
            latent=key("attention.kv_lora_rank") + key("rope.dimension_count"),
            kda_heads=key("attention.head_count"),
            kda_head_dim=key("kda.head_dim"),
            conv=key("ssm.conv_kernel"),
            tensors=[(t.name, t.type.name, t.nbytes) for t in file.tensors.values()],
        )


def _mixers(latent: Sequence[object], mtp: int) -> list[str]:
    """The kind of each layer; the last `mtp` ones predict further tokens."""
    names = ["MLA" if each else "KDA" for each in latent]
    return [*names[: len(names) - mtp], *["MTP"] * mtp][: len(names)]


def _checkpoint(path: Path | str) -> _Model:
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        found: dict[str, tuple[str, str, int]] = {}
        for output in outputs(config):
            for source, shape in output.inputs:
                dtype, form = checkpoint.dtype(source), checkpoint.form(source)
                kind, nbytes = (
                    (form[0].kind, form[1]) if form else (dtype.name, dtype.nbytes(math.prod(shape)))
                )
                found[source] = output.name, kind, nbytes
        return _Model(
            kind="safetensors",
            name=model_name(checkpoint.folder),
            type=Counter(dtype for _, dtype, _ in found.values()).most_common(1)[0][0],
            parameters=parameters(config)[0],
            mixers=_mixers([kind is LayerKind.MLA for kind in config.blocks], config.num_mtp_layers),
            dense_layers=config.num_dense_layers,
            latent=config.kv_lora_rank + config.qk_rope_head_dim,
            kda_heads=config.kda_num_heads,
            kda_head_dim=config.kda_head_dim,
            conv=config.conv_kernel_size,
            tensors=list(found.values()),
        )


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
