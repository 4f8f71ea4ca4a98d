"""Random LoRA adapters of a GGUF model, and the model with an adapter merged into it.

Input: an F32 GGUF, the names of the adapted tensors. Output: the adapter as a GGUF file in the layout of llama.cpp, and
`merged`, which adds scale * alpha / rank * B A to the tensors of the model. The pairs of attn_k_b and attn_v_b have the
layout that the header of patch 0071 describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from synthetic_case import Tensors, rewrite

RANK, ALPHA = 3, 6.0
EMBEDDING = "token_embd.weight"
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """The adapter's file, and its pairs (lora_a, lora_b) by the name of the tensor."""

    file: Path
    pairs: Mapping[str, tuple[Matrix, Matrix]]


def shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model, row-major."""
    return {t.name: tuple(map(int, reversed(t.shape))) for t in gguf.GGUFReader(model).tensors}


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an adapter may name this tensor: it is multiplied, or the token embedding."""
    return (
        len(shape) in (2, 3) and name.endswith(".weight") and not re.search(r"_ape\.|_score\.|conv1d", name)
    )


def kind_of(name: str) -> str:
    """The name without the number of the layer."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def random_pair(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Matrix, Matrix]:
    """lora_a [.., rank, columns] and lora_b [.., rows, rank] for a tensor [.., rows, columns]."""
    *many, rows, columns = shape
    if name == EMBEDDING:  # rows are read from lora_a, and lora_b is not transposed
        a_shape, b_shape = (rows, RANK), (columns, RANK)
    else:
        shared_a, shared_b = ("attn_v_b" in name), ("attn_k_b" in name)
        a_shape = (*(() if shared_a else many), RANK, columns)
        b_shape = (*(() if shared_b else many), rows, RANK)
    scale = 0.1 / np.sqrt(columns)  # what is added is of the size of a small weight
    pair = random.standard_normal(a_shape), scale * random.standard_normal(b_shape)
    return pair[0].astype(np.float32), pair[1].astype(np.float32)


def write_adapter(
    file: Path, model: Path, names: Iterable[str], seed: int = 0, invocation: Sequence[int] = ()
) -> Adapter:
    """Write an adapter of these tensors of the model. A tensor that the model does not have is one [8, 8]. invocation:
    the tokens from which on an aLoRA is active."""
    random, known = np.random.default_rng(seed), shapes(model)
    pairs = {name: random_pair(name, known.get(name, (8, 8)), random) for name in names}
    architecture = gguf.GGUFReader(model).fields["general.architecture"].contents()
    return Adapter(write_pairs(file, architecture, pairs, invocation), pairs)


def write_pairs(
    file: Path, architecture: str, pairs: Mapping[str, tuple[Matrix, Matrix]], invocation: Sequence[int] = ()
) -> Path:
    """Write pairs (lora_a, lora_b) as an adapter."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    if invocation:
        writer.add_key_value(
            "adapter.alora.invocation_tokens",
            list(invocation),
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def delta(name: str, pair: tuple[Matrix, Matrix]) -> NDArray[np.float64]:
    """What the pair adds to its tensor, with scale 1."""
    a, b = (half.astype(np.float64) for half in pair)
    product = a @ b.T if name == EMBEDDING else b @ a
    return product * ALPHA / RANK


def merged(file: Path, model: Path, adapters: Iterable[tuple[Adapter, float]]) -> Path:
    """Write the model with the adapters added to its tensors."""

    def add(tensors: Tensors) -> Tensors:
        for adapter, scale in adapters:
            for name, pair in adapter.pairs.items():
                tensors[name] = (tensors[name] + scale * delta(name, pair)).astype(np.float32)
        return tensors

    return rewrite(model, file, add)
