"""A random model with its exact logits, to measure the error of a build of llama.cpp.

Input: a `Spec`. Output: a `Case` with the F32 GGUF and the logits of the torch reference in float64; `Case.error`
runs a build of llama.cpp on the same token ids. `rewrite` makes unusual files for the tests of patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from random_checkpoint import VOCAB_SIZE, Layout, Spec, config, weights, write_checkpoint
from safetensors.torch import save_file

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.model.families import read_config
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits
from kimi_gguf.validate.reference import Reference

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Error:
    """NMSE of logits."""

    in_all: float
    worst: float  # of all positions

    @property
    def passes(self) -> bool:
        """The limits for F32 weights and an F32 cache."""
        return self.in_all <= 1e-10 and self.worst <= 1e-8


def error_of(got: NDArray[np.floating], expected: NDArray[np.floating]) -> Error:
    """NMSE of logits [T, V] against the expected ones; the sums are in float64."""
    wide = expected.astype(np.float64)
    square, power = np.square(got - wide).sum(1), np.square(wide).sum(1)
    return Error(float(square.sum() / power.sum()), float((square / power).max()))


@dataclass(frozen=True)
class Case:
    """A model as an F32 GGUF, token ids [T] and their logits [T, V] in float64."""

    gguf: Path
    ids: NDArray[np.int64]
    logits: NDArray[np.float64]

    def error(self, engine: Engine, file: Path | None = None, **options: Any) -> Error:
        """Error of this build, optionally with another file of the same model; options: `RunOptions`.

        One thread by default: llama.cpp's threads spin while waiting, so on a busy machine a second thread makes
        small models many times slower.
        """
        got = run_logits(engine, file or self.gguf, self.ids, RunOptions(**{"threads": 1, **options}))
        return error_of(got, self.logits)


def reference_of(spec: Spec, layout: Layout = "hub", dtype: torch.dtype = torch.float32) -> Reference:
    """The torch reference of the model."""
    return Reference(read_config(config(spec, layout), layout), weights(spec).__getitem__, dtype)


def make_gguf(folder: Path, spec: Spec, kind: str = "F32") -> Path:
    """Write the model to `folder` as a GGUF file of a type; return its path."""
    convert(write_checkpoint(folder / "checkpoint", spec), folder / "model.gguf", TYPES[kind])
    return folder / "model.gguf"


def make_case(folder: Path, spec: Spec, tokens: int = 96, scaled: dict[str, float] | None = None) -> Case:
    """Write the model to `folder` and compute its logits; `scaled`: part of a tensor's name -> factor."""
    checkpoint = write_checkpoint(folder / "checkpoint", spec, shards=1)
    tensors = weights(spec)
    for part, factor in (scaled or {}).items():
        tensors |= {name: factor * tensor for name, tensor in tensors.items() if part in name}
    save_file(tensors, checkpoint / "model.safetensors")
    ids = torch.randint(0, VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(spec.seed))
    model = read_config(config(spec), "spec")
    reference = Reference(model, tensors.__getitem__, dtype=torch.float64)
    convert(checkpoint, folder / "model.gguf", TYPES["F32"])
    return Case(folder / "model.gguf", ids.numpy(), reference.logits(ids).numpy())


def rewrite(
    source: Path,
    target: Path,
    tensors: Callable[[Tensors], Tensors] = dict,
    keys: dict[str, int | list[int]] | None = None,
) -> Path:
    """Copy an F32 GGUF with its tensors (numpy order) passed through `tensors`, and some keys replaced."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    replaced = {f"{arch}.{key}": value for key, value in (keys or {}).items()}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, item = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, replaced.pop(name, field.contents()), kind, sub_type=item)
    assert not replaced, f"no such keys: {sorted(replaced)}"
    for name, data in tensors({t.name: np.array(t.data) for t in reader.tensors}).items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
