"""The quiet probe: the same model with the input of its attention layers scaled down.

On a trained model's own activations the epsilons of the norms (1e-6 for KDA's q and k and for MLA's latent) have no
visible effect: a wrong epsilon changes the logits less than float32 rounding does. The probe multiplies the norm
weights before attention by 2^-8, in the GGUF file and in the reference. The epsilons then determine the result.
Scaling by a power of two is exact in float32, so both sides still compute the same model.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.engine.gguf import GgufFile
from kimi_gguf.engine.gguf_check import all_splits
from kimi_gguf.engine.split_names import split_paths
from kimi_gguf.engine.tensor_types import F32
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.models import REFERENCES
from kimi_gguf.validate.mxfp4 import source_values
from kimi_gguf.validate.reference import Reference

FACTOR = 2.0**-8


def reference_of(
    checkpoint: Checkpoint,
    quiet: bool,
    dtype: torch.dtype = torch.float32,
    model: type[Reference] | None = None,
) -> Reference:
    """The reference of an open checkpoint, or of its quiet probe; model: a faulty subclass of its class."""

    def weight(name: str) -> Tensor:
        shape = checkpoint.shapes[name]
        values = source_values(checkpoint, name, 0, math.prod(shape))
        tensor = torch.from_numpy(values.reshape(shape))
        return tensor * FACTOR if quiet and name.endswith(".input_layernorm.weight") else tensor

    return (model or REFERENCES[checkpoint.config.architecture])(checkpoint.config, weight, dtype)


def write_quiet_gguf(source: Path, target: Path) -> Path:
    """Write a scaled-down copy of a GGUF file and return its path (of a split file, the path of the first split).

    Raises ValidateError if a norm is not stored in F32.
    """
    sources = all_splits(source)
    targets = split_paths(target, len(sources))
    for old, new in zip(sources, targets, strict=True):
        shutil.copyfile(old, new)
        with GgufFile(new) as file, new.open("r+b") as out:
            for tensor in file.tensors.values():
                if not tensor.name.endswith(".attn_norm.weight"):
                    continue
                if tensor.type is not F32:
                    raise ValidateError(f"{old}: {tensor.name}", expected="F32", found=tensor.type.name)
                out.seek(tensor.offset)
                out.write((file.read(tensor).view("<f4") * np.float32(FACTOR)).data)
    return targets[0]
