"""Decide what to write before the first byte is written: each tensor's sources, shape, type and size.

Input: an open checkpoint, its vocabulary, the requested types. Output: `Plan`, which determines the header and the
size of the file; or `ConvertError`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import family_of, outputs
from kimi_gguf.convert.model.generation import read_generation
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.metadata import adapter_keys, metadata
from kimi_gguf.convert.model.tensor_table import Output, PlannedTensor
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.output.files import PlannedFile, split
from kimi_gguf.convert.source.checkpoint import CONFIG, Checkpoint
from kimi_gguf.convert.source.origin import read_origin
from kimi_gguf.convert.source.safetensors_file import Dtype
from kimi_gguf.convert.types.imatrix import Importances
from kimi_gguf.convert.types.mixes import RECIPES, TypeRequest, choose_types, needs_importances
from kimi_gguf.engine.gguf import GgufTensor
from kimi_gguf.engine.split_names import place_in_set, split_paths
from kimi_gguf.engine.tensor_names import layer_of, without_layer
from kimi_gguf.engine.tensor_types import BF16, F16, F32, TENSOR_TYPES, TensorType, Values

EMBEDDING: Final = "token_embd.weight"  # not in importance matrices: no matmul reads it


@dataclass(frozen=True)
class Plan:
    """A model before it is written."""

    request: TypeRequest
    keys: tuple[Key, ...]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()  # information for the user that is not an error
    importances: Importances | None = None
    split_max_size: int | None = None  # maximum bytes of a file; a larger tensor gets its own file
    results: tuple[str, ...] = ()  # notes that are known when the model is written

    def weights(self, tensor: PlannedTensor) -> Values | None:
        """The importances of a tensor's columns, 1-D, one set per expert or head; None if they are unknown."""
        return self.importances.of(tensor.name, tensor.output.columns) if self.importances else None

    @cached_property
    def files(self) -> tuple[PlannedFile, ...]:
        """The files of the plan. Raises `ConvertError` if there would be too many."""
        return split(self.keys, self.tensors, self.split_max_size)

    def paths(self, output: Path) -> list[Path]:
        """The file names of the plan's splits for the output `output`. Raises `ConvertError`."""
        if self.split_max_size is not None and place_in_set(output) is not None:
            raise ConvertError(
                f"{output}: is the name of a split", todo="give the name without -NNNNN-of-NNNNN"
            )
        return split_paths(output, len(self.files))

    @property
    def nbytes(self) -> int:
        """Total size of all files of the plan, in bytes."""
        return sum(file.nbytes for file in self.files)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def type_counts(tensors: Iterable[PlannedTensor | GgufTensor]) -> str:
    """The number of tensors of each type, the most frequent type first."""
    counts = Counter(tensor.type.name for tensor in tensors)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def in_file_order(output: Output) -> tuple[int, str]:
    """llama.cpp's order of tensors, which llama-quantize writes: the top level, then layer by layer, by name."""
    return layer_of(output.name), output.name


def make_plan(
    checkpoint: Checkpoint,
    vocab: Vocab,
    request: TypeRequest,
    name: str,
    importances: Importances | None = None,
    split_max_size: int | None = None,
    quantized_by: str | None = None,
) -> Plan:
    """Plan the model called `name` in its metadata, in files of at most `split_max_size` bytes. Reads no weights.
    Raises `ConvertError`."""
    config = checkpoint.config
    generation = read_generation(checkpoint.folder, config, vocab)
    vocab = generation.vocab
    every = sorted(outputs(config), key=in_file_order)
    chosen = choose_types(config, every, request, importances is not None)
    kinds = [chosen[output.name] or _kept(checkpoint, output) for output in every]
    tensors = [PlannedTensor(o, kind, kind.nbytes(o.ne)) for o, kind in zip(every, kinds, strict=True)]
    if importances is not None:
        _check_importances(tensors, importances)
    _check_needs(tensors, request, importances)
    origin = read_origin(checkpoint.folder, checkpoint.folder / CONFIG, checkpoint.headers_hash())
    keys = (
        *metadata(config, vocab, request.file_type, name, importances, origin, quantized_by),
        *generation.keys,
        *adapter_keys(checkpoint.merged),
    )
    found = (
        _notes(checkpoint, request, tensors),
        vocab.notes,
        generation.notes,
        _form_notes(checkpoint),
        _packed_notes(checkpoint, tensors),
        _template_notes(config, vocab),
    )
    notes = (
        *(note for each in found for note in each),
        *_blind_spots(tensors, importances),
        *_unmatched(request, every),
    )
    plan = Plan(request, keys, tuple(tensors), notes, importances, split_max_size)
    return replace(plan, notes=(*notes, *_size_notes(plan)))


def _kept(checkpoint: Checkpoint, output: Output) -> TensorType:
    """The type of a tensor that is not quantized: F32 if the graph requires it, else the stored type."""
    if output.always_f32 or any(
        checkpoint.stored_dtype(source) is not Dtype.BF16 for source in output.sources
    ):
        return F32
    return BF16


def _check_importances(tensors: list[PlannedTensor], importances: Importances) -> None:
    for tensor in tensors:
        weights, expected = importances.weights.get(tensor.name), tensor.output.columns
        if weights is None or not tensor.type.quantized or tensor.name == EMBEDDING:
            continue
        if len(weights) != expected:
            raise ConvertError(
                f"{importances.path}: {tensor.name!r}",
                expected=f"{expected} importances",
                found=len(weights),
                todo="use an importance matrix of this model",
            )


def _check_needs(tensors: list[PlannedTensor], request: TypeRequest, importances: Importances | None) -> None:
    """Refuse types that need importances for tensors that have none; the result would be useless."""
    lacking = [
        tensor
        for tensor in tensors
        if (importances is None or importances.of(tensor.name, tensor.output.columns) is None)
        and needs_importances(tensor.name, tensor.type, request.file_type)
    ]
    if not lacking:
        return
    first = lacking[0]
    where, todo = f"--type {request.file_type.name}", "give --imatrix FILE (made by llama-imatrix)"
    if importances:
        where = str(importances.path)
        todo = (
            f"it has no entry of {first.output.columns} values; choose another type, for example "
            f"--tensor-type '{first.name}=Q4_K'"
        )
    raise ConvertError(
        f"{where}: {first.name!r} (and {len(lacking) - 1} others): {first.type.name} "
        "requires an importance matrix",
        todo=todo,
    )


def _blind_spots(tensors: list[PlannedTensor], importances: Importances | None) -> Iterator[str]:
    """Notes about tensors without entries in the importance matrix, and entries without tensors."""
    if importances is None:
        return
    blind = [t.name for t in tensors if t.type.quantized and t.name not in importances.weights]
    kinds = sorted(set(map(without_layer, blind)))
    if blind:
        yield (
            f"{importances.path.name} has no entries for {len(blind)} tensors; they are quantized without "
            f"importances: {', '.join(kinds)}"
        )
    if strange := [name for name in importances.weights if name not in {t.name for t in tensors}]:
        yield f"{importances.path.name} has {len(strange)} entries that match no tensor: {strange[0]}, ..."


def model_notes(config: ModelConfig) -> Iterator[str]:
    """What a user should know about every file of this model."""
    yield from family_of(config).notes(config)
    if len(set(config.layers)) == 1:
        yield f"all layers are {config.layers[0].name}: upstream llama.cpp cannot run this model"


def _notes(checkpoint: Checkpoint, request: TypeRequest, tensors: list[PlannedTensor]) -> Iterator[str]:
    config = checkpoint.config
    if checkpoint.remote_bytes:
        size = f"{checkpoint.remote_bytes:,} bytes"
        yield f"{size} of weights are streamed over the network; they are not stored on disk"
    family = family_of(config)
    rounded = [name for name in checkpoint.shapes if name.endswith(family.float32)]
    rounded = [name for name in rounded if checkpoint.dtype(name) is not Dtype.F32]
    if rounded:
        yield (
            f"{len(rounded)} gate parameters are not F32 as in the published model; they were rounded "
            f"when this checkpoint was saved: {', '.join(rounded[:2])}{', ...' if len(rounded) > 2 else ''}"
        )
    if doubles := checkpoint.doubles:
        yield f"{doubles} tensors are F64 in the checkpoint and were rounded to float32"
    if checkpoint.has_unused_head:
        yield "tie_word_embeddings is true: the output is the embedding, and the stored output matrix is left out"
    yield from model_notes(config)
    base = request.file_type.base
    fallen = [t.name for t in tensors if t.type is F16 and base is not F16]
    if fallen:
        yield (
            f"{len(fallen)} tensors stay {F16.name}; their row size is not a multiple of {min(base.block, 32)}: "
            f"{', '.join(fallen[:3])}{', ...' if len(fallen) > 3 else ''}"
        )


def _form_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """In which forms quantized weights are stored."""
    found = [checkpoint.form(name) for name in checkpoint.shapes]
    for form, count in Counter(str(each[0]) for each in found if each).items():
        yield f"{count} tensors of the checkpoint are {form}; they are converted from their exact values"


def _packed_notes(checkpoint: Checkpoint, tensors: list[PlannedTensor]) -> Iterator[str]:
    """What becomes of experts that are stored in MXFP4."""
    again = [
        t
        for t in tensors
        if t.type.name == Dtype.MXFP4.name and checkpoint.dtype(t.output.sources[0]) is Dtype.F32
    ]
    if checkpoint.merged and again:
        yield (
            f"{len(again)} tensors with merged adapters are rounded to MXFP4 again; "
            "--tensor-type gives them another type"
        )
    packed = [t for t in tensors if all(checkpoint.dtype(s) is Dtype.MXFP4 for s in t.output.sources)]
    if not packed:
        return
    others = [tensor for tensor in packed if tensor.type.name != Dtype.MXFP4.name]
    if not others:
        yield "the routed experts keep their MXFP4 values, bit for bit"
        return
    size = sum(TENSOR_TYPES[Dtype.MXFP4.name].nbytes(tensor.output.ne) for tensor in others)
    yield (
        f"the experts of {len(others)} tensors are MXFP4 in the checkpoint ({size:,} bytes) and become "
        f"{type_counts(others)} ({sum(tensor.nbytes for tensor in others):,} bytes), made from their exact values; "
        "without --type and --recipe they stay MXFP4"
    )


def _template_notes(config: ModelConfig, vocab: Vocab) -> Iterator[str]:
    template = family_of(config).template
    if vocab.chat_template is None and template is not None:
        yield (
            f"the checkpoint has no chat template: get {template}, and convert with --chat-template FILE or run "
            "llama.cpp with --chat-template-file FILE"
        )


def _unmatched(request: TypeRequest, every: Iterable[Output]) -> Iterator[str]:
    """A note about the user's patterns that match no tensor; those of recipes are for all families."""
    of_recipes = {pattern for recipe in RECIPES.values() for pattern, _ in recipe.overrides}
    names = [output.name for output in every]
    own = [pattern for pattern, _ in request.overrides if pattern not in of_recipes]
    if alone := [pattern for pattern in own if not any(re.search(pattern.lower(), name) for name in names)]:
        yield f"--tensor-type: no tensor matches {', '.join(map(repr, alone))}"


def _size_notes(plan: Plan) -> Iterator[str]:
    """Notes about splits that are larger than the requested size."""
    for file in plan.files:
        if plan.split_max_size is not None and file.nbytes > plan.split_max_size:
            name, size = file.tensors[0].name, f"{file.nbytes:,} bytes"
            yield f"{name} is larger than --split-max-size: its split has {size}"
