"""The quiet probe: the same model with what enters its attention layers turned down.

On a trained model's own activations the small constants under the roots (1e-6 of KDA's q and k and of MLA's
latent) leave no trace: a wrong one changes the logits less than float32 itself does. Turned down by 2^-8, by
scaling the norms before attention in the file and in the reference alike, they decide the result. Powers of
two scale float32 exactly, so both sides still compute the same model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from kimi_gguf.engine.gguf import GgufFile
from kimi_gguf.engine.gguf_check import all_parts
from kimi_gguf.engine.split_names import part_paths
from kimi_gguf.engine.tensor_types import F32
from kimi_gguf.validate.errors import ValidateError

FACTOR = 2.0**-8


def quiet_weight(weight: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """The reference's weights, turned down; name -> tensor as in `Reference`."""
    return lambda name: weight(name) * (FACTOR if name.endswith(".input_layernorm.weight") else 1.0)


def write_quiet_gguf(source: Path, target: Path) -> Path:
    """A copy of the GGUF file, turned down; in as many parts as it is, of which the first is returned. Raises
    ValidateError if a norm is not stored in F32."""
    sources = all_parts(source)
    targets = part_paths(target, len(sources))
    for old, new in zip(sources, targets, strict=True):
        shutil.copyfile(old, new)
        with GgufFile(new) as file, new.open("r+b") as out:
            for tensor in file.tensors.values():
                if not tensor.name.endswith(".attn_norm.weight"):
                    continue
                if tensor.type is not F32:
                    raise ValidateError(f"{old}: {tensor.name}: expected F32, found {tensor.type.name}")
                out.seek(tensor.offset)
                out.write((file.read(tensor).view("<f4") * np.float32(FACTOR)).data)
    return targets[0]
