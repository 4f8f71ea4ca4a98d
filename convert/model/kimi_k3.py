"""Kimi K3 (`kimi_k3`, llama.cpp's architecture `kimi-k3`): the text model's config.json, tensors, layouts.

Beyond Kimi-Linear: residual attention over blocks of layers, experts in a latent space, the activation SiTU, a gate on
the output of latent attention, a KDA output gate of full rank, and routed experts in MXFP4.

Sources: llama.cpp's loader and converter for `kimi-k3`; compressed-tensors' format `mxfp4-pack-quantized`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kimi_gguf.convert.model.config import ModelConfig

ARCHITECTURE: Final = "kimi-k3"


@dataclass(frozen=True, kw_only=True)
class K3Config(ModelConfig):
    """The text model; canonical tensor names have no `language_model.` in front."""

    routed_hidden_size: int | None  # width of the space of the routed experts; None: hidden_size
    situ_beta: float  # situ(g, u) = beta tanh(g / beta) sigmoid(g) * linear_beta tanh(u / linear_beta)
    situ_linear_beta: float  # 0 or less: u is not changed
    attn_res_block_size: int  # layers of a block of residual attention; 0: ordinary residuals
