"""Ling 3 models with an MTP layer whose drafts are accepted often, or never.

The tokens stand on a circle: the embedding of token t + 1 is that of token t, rotated by a fixed matrix. The output
matrix makes t + 1 the successor of t, as far as the layers leave the embedding as it is. They add random values of a
given size, which depend on all tokens before, so that some successors are others. The MTP layer's input projection
ignores the token and rotates the hidden state, which belongs to the token before it. A draft is therefore right only if
the MTP layer gets the hidden state of the right token.

Input: a folder, a file with a vocabulary. Output: the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from random_checkpoint import VOCAB_SIZE
from random_family import FamilySpec, write_family

# A norm constant for which upstream's graph is right: see patch 0028.
SPEC = FamilySpec("bailingmoe3", "KKMK", mtp=True, vocab=VOCAB_SIZE, rms_norm_eps=1e-6, seed=70)
MTP_LAYER = f"blk.{len(SPEC.layers)}."
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Circle:
    """What the layers add, relative to their random weights, and whether the MTP layer is left as it is: random."""

    trunk: float = 0.5
    mtp: float = 0.5
    random_mtp: bool = False

    def change(self, name: str, data: Matrix) -> Matrix:
        """The tensor of this name; data: the random one."""
        if name == "token_embd.weight":
            return embeddings()
        if name == "output.weight":
            return np.roll(embeddings(), 1, axis=0)
        if name == "output_norm.weight":
            return np.ones_like(data)
        in_mtp = name.startswith(MTP_LAYER)
        if in_mtp and self.random_mtp:
            return data
        if ".nextn.eh_proj." in name:
            return np.concatenate([np.zeros_like(rotation()), rotation()], axis=1)
        if ".nextn." in name or ".layer_output_norm." in name:
            return np.ones_like(data)
        if ".attn_output." in name or ".ffn_down" in name:
            return data * np.float32(self.mtp if in_mtp else self.trunk)
        return data


def angles() -> NDArray[np.float64]:
    """By which each pair of dimensions is rotated from one token to the next."""
    turns = np.random.default_rng(1).choice(np.arange(1, SPEC.vocab // 2), SPEC.hidden // 2, replace=False)
    return 2 * np.pi * turns / SPEC.vocab


def embeddings() -> Matrix:
    """Of all tokens, [vocab, hidden]."""
    turned = np.arange(SPEC.vocab)[:, None] * angles()
    return np.stack([np.cos(turned), np.sin(turned)], -1).reshape(SPEC.vocab, -1).astype(np.float32)


def rotation() -> Matrix:
    """From the embedding of a token to that of the next one, [hidden, hidden]."""
    matrix = np.zeros((SPEC.hidden, SPEC.hidden), np.float32)
    for pair, angle in enumerate(angles()):
        cos, sin = np.cos(angle), np.sin(angle)
        matrix[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = [[cos, -sin], [sin, cos]]
    return matrix


def write_circle(path: Path, circle: Circle, vocabulary_of: Path) -> Path:
    """Write the model to `path` and return it."""
    return write_family(path, SPEC, vocabulary_of, circle.change)
