"""Ling 3 and Ring 3 (`bailing_hybrid`, llama.cpp's architecture `bailingmoe3`): their config.json, tensors, layouts.

Layers come in groups: KDA layers with a bounded gate, then one with latent attention, RoPE and a sigmoid gate per
head. Gates of KDA have full rank. One layer after the others may predict a further token (MTP).

Sources: `bailing_hybrid` of transformers 5.23; llama.cpp's loader for `bailingmoe3`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kimi_gguf.convert.model.config import ModelConfig

ARCHITECTURE: Final = "bailingmoe3"


@dataclass(frozen=True)
class Yarn:
    """RoPE for longer contexts than the model was trained with; names as in config.json's `rope_scaling`."""

    factor: float
    original_context: int  # original_max_position_embeddings
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None


@dataclass(frozen=True, kw_only=True)
class Ling3Config(ModelConfig):
    """`layers` are the main ones, without those that predict further tokens."""

    shared_expert_size: int  # width of the shared experts together
    num_mtp_layers: int
    swiglu_limits: tuple[float, ...]  # of the routed experts, one per layer, MTP included; 0: not clamped
    shared_swiglu_limits: tuple[float, ...]  # the same of the shared experts
    yarn: Yarn | None
