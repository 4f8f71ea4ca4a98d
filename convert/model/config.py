"""The shape and the constants of a model with Kimi Delta Attention, whatever its family.

Output: `ModelConfig`, the only description of a model's shape in the project. Each family has a module that reads its
`config.json` (kimi_linear.py, ling3.py, kimi_k3.py) and may add fields in a subclass; `families.read_config` chooses
the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_gguf.convert.model.stored_forms import Forms


class LayerKind(Enum):
    """How a layer mixes tokens."""

    KDA = "kda"
    MLA = "mla"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all families have; names follow Kimi-Linear's config.json."""

    architecture: str  # general.architecture of the GGUF file; names the family
    hidden_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    layers: tuple[LayerKind, ...]  # one per layer, in order; len() is num_hidden_layers
    # KDA
    kda_num_heads: int
    kda_head_dim: int
    conv_kernel_size: int
    kda_lower_bound: float | None = None  # of the log-gate; None: not bounded
    # MLA
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    # FFN
    intermediate_size: int
    num_dense_layers: int  # leading layers with a dense FFN (first_k_dense_replace)
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    num_expert_groups: int
    topk_groups: int
    routed_scaling_factor: float
    renormalize: bool
    # tokens
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    more_eos_token_ids: tuple[int, ...] = ()  # the rest when the config lists several
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0  # layers after `layers` that predict further tokens, with latent attention
    forms: Forms | None = None  # of quantized weights that are decoded while they are read
    mxfp4_experts: bool = False  # quantization_config allows routed experts in MXFP4

    @property
    def uses_groups(self) -> bool:
        """Whether the router leaves out whole groups of experts."""
        return self.topk_groups < self.num_expert_groups

    @property
    def blocks(self) -> tuple[LayerKind, ...]:
        """One kind per layer of the file: the main layers, then those that predict further tokens."""
        return self.layers + (LayerKind.MLA,) * self.num_mtp_layers

    @property
    def num_moe_layers(self) -> int:
        return len(self.blocks) - self.num_dense_layers
