"""Converts a PEFT adapter to a GGUF adapter for llama.cpp.

Input: an adapter's folder, its base checkpoint, the type of its tensors. Output: the file. Each adapted matrix NAME of
the model has NAME.lora_a [rank, columns] and NAME.lora_b [rows, rank], which llama.cpp multiplies by alpha / rank, with
one alpha for the file: what a pair's own scale differs by is multiplied into B, in float32.

attn_k_b and attn_v_b are the parts of kv_b_proj by head (the header of patches/fixes/0071 has the layout). The experts
of a layer are stacked, with zeros for an expert without a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.adapter.pairs import Adapter, Matrix, Pair, open_adapter
from kimi_gguf.convert.conversion import ProgressDisplay, silent
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.families import family_of, outputs
from kimi_gguf.convert.model.gguf_key import Key, u32
from kimi_gguf.convert.model.tensor_table import Output, PlannedTensor, Transform
from kimi_gguf.convert.output.digest import digest
from kimi_gguf.convert.output.stream import prepared
from kimi_gguf.convert.output.unfinished import Identity
from kimi_gguf.convert.output.writer import check_outputs, writing
from kimi_gguf.convert.plan import Plan, in_file_order
from kimi_gguf.convert.source.checkpoint import Checkpoint, open_checkpoint
from kimi_gguf.convert.source.safetensors_file import Dtype
from kimi_gguf.convert.types.encode import BadValueError, encode
from kimi_gguf.convert.types.file_types import TYPES, FileType
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.engine.tensor_types import F16

TYPES_OF_ADAPTERS: Final = ("F32", "F16", "BF16", "Q8_0")


def convert_adapter(
    folder: Path,
    base: Path | str,
    output: Path,
    wanted: FileType = TYPES["F32"],
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: ProgressDisplay = silent,
) -> Plan:
    """Convert the adapter in `folder`, of the checkpoint `base`, to `output`. Rows that are no whole blocks of the type
    are F16. If it raises `ConvertError`, no file was written."""
    with open_checkpoint(base) as checkpoint, open_adapter(folder, checkpoint) as adapter:
        chosen = _adapted(checkpoint, adapter)
        tensors = tuple(
            tensor for output_ in chosen for tensor in _tensors(checkpoint, adapter, output_, wanted)
        )
        plan = Plan(TypeRequest(wanted), _keys(checkpoint, adapter, name or folder.absolute().name), tensors)
        inputs = [*checkpoint.files, *folder.iterdir()]
        check_outputs([output], overwrite, inputs)
        ggml = prepared(checkpoint, plan)
        file = next(iter(adapter.pairs.values())).file
        identity = Identity(digest(*(part.header for part in plan.files)), file.identity().hex())
        files = writing(plan, output, identity, overwrite=overwrite, resume=False, hashed=False)
        with progress(plan) as report, files as writer:
            remaining = iter(writer.remaining)
            for model_tensor in chosen:
                for values in _halves(checkpoint, adapter, model_tensor):
                    tensor = next(remaining)
                    rows = values.reshape(-1, values.shape[-1])
                    try:
                        data = encode(rows, Dtype.F32, tensor.type, None, ggml)
                    except BadValueError as bad:
                        raise ConvertError(
                            f"{file.path}: {tensor.name}: element {bad.index} is {bad.value:g}",
                            expected=f"numbers that {tensor.type.name} has",
                            todo="convert with --type F32",
                        ) from None
                    writer.append(tensor, data)
                    report(tensor, data.nbytes)
                    writer.finish_tensor()
            adapter.check_unchanged()
    return plan


def _keys(checkpoint: Checkpoint, adapter: Adapter, name: str) -> tuple[Key, ...]:
    config, tokens = adapter.config, adapter.config.invocation_tokens
    base = checkpoint.folder.absolute().name
    keys = [
        Key("general.architecture", ValueType.STRING, checkpoint.config.architecture),
        Key("general.type", ValueType.STRING, "adapter"),
        Key("general.name", ValueType.STRING, name),
        u32("general.base_model.count", 1),
        Key("general.base_model.0.name", ValueType.STRING, base),
        Key("adapter.type", ValueType.STRING, "lora"),
        Key("adapter.lora.alpha", ValueType.FLOAT32, config.alpha),
    ]
    if tokens:
        keys.append(
            Key("adapter.alora.invocation_tokens", ValueType.ARRAY, list(tokens), items=ValueType.UINT32)
        )
    return tuple(keys)


def _adapted(checkpoint: Checkpoint, adapter: Adapter) -> list[Output]:
    """The model's tensors that the adapter changes, in the order of the file."""
    every = sorted(outputs(checkpoint.config), key=in_file_order)
    return [output for output in every if any(source in adapter.pairs for source in output.sources)]


def _pairs(adapter: Adapter, output: Output) -> list[Pair | None]:
    return [adapter.pairs.get(source) for source in output.sources]


def _rank(adapter: Adapter, output: Output) -> int:
    """The rank in the file: the largest of the pairs that are stacked."""
    return max(pair.rank for pair in _pairs(adapter, output) if pair is not None)


def _tensors(
    checkpoint: Checkpoint, adapter: Adapter, output: Output, wanted: FileType
) -> Iterator[PlannedTensor]:
    """The two tensors of a tensor of the model."""
    rank, (columns, rows, *many) = _rank(adapter, output), output.ne
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    if output.name == family_of(checkpoint.config).table.embedding.gguf:
        shapes = (rank, rows), (rank, columns)  # its rows are looked up in lora_a
    elif output.transform is Transform.K_OF_KV:
        shapes = (columns, rank, *many), (rank, rows)
    elif output.transform is Transform.V_OF_KV:
        shapes = (columns, rank), (rank, rows, *many)
    elif output.transform is Transform.COPY:
        shapes = (columns, rank, *many), (rank, rows, *many)
    else:
        raise AssertionError(f"{output.name}: {output.transform} of a matrix")
    for half, ne in zip("ab", shapes, strict=True):
        tensor = replace(output, name=f"{output.name}.lora_{half}", ne=ne, transform=Transform.COPY)
        kind = wanted.base if ne[0] % wanted.base.block == 0 else F16
        yield PlannedTensor(tensor, kind, kind.nbytes(ne))


def _halves(checkpoint: Checkpoint, adapter: Adapter, output: Output) -> Sequence[Matrix]:
    """lora_a and lora_b, row-major, in the layout of the file."""
    rank = _rank(adapter, output)
    scale = adapter.config.alpha / rank  # by which llama.cpp multiplies
    stack = [_padded(pair, rank, scale, output) for pair in _pairs(adapter, output)]
    a, b = stack[0]
    if output.name == family_of(checkpoint.config).table.embedding.gguf:
        return b, np.ascontiguousarray(a.T)
    if output.transform in (Transform.K_OF_KV, Transform.V_OF_KV):
        of_k = output.transform is Transform.K_OF_KV
        heads, rows = output.ne[2], output.ne[0 if of_k else 1]
        by_head = b.reshape(heads, -1, rank)  # of each head the rows of k, then those of v
        if of_k:
            return np.ascontiguousarray(by_head[:, :rows].transpose(0, 2, 1)), np.ascontiguousarray(a.T)
        return a, np.ascontiguousarray(by_head[:, -rows:])
    if len(stack) == 1:
        return a, b
    return np.stack([a for a, _ in stack]), np.stack([b for _, b in stack])


def _padded(pair: Pair | None, rank: int, scale: float, output: Output) -> tuple[Matrix, Matrix]:
    """A [rank, columns] and B [rows, rank] with zeros up to the rank; B has what the pair's scale differs by."""
    rows, columns = output.source_shape
    a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
    if pair is not None:
        stored_a, stored_b = pair.factors()
        a[: pair.rank] = stored_a
        b[:, : pair.rank] = stored_b if pair.scale == scale else stored_b * np.float32(pair.scale / scale)
    return a, b
