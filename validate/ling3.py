"""Ling 3 and Ring 3 in plain torch: what they compute differently from Kimi-Linear (reference.py).

Input: a `Ling3Config`, weights by canonical hub names, token ids. Output: as reference.py.

- KDA: the projections of the forget gate and of the output gate have full rank. The log-gate is bounded, which
  reference.py computes for every family.
- MLA: RoPE on the shared key and on the last dimensions of the queries, and one sigmoid gate per head.
- FFN: SwiGLU is clamped in the layers that have a limit.
- MTP: a layer after the others predicts a further token. The logits of the model do not depend on it.

Sources: `bailing_hybrid` of transformers 5.23; its YaRN (`modeling_rope_utils.py`, arXiv 2309.00071). transformers has
neither the clamp nor the MTP layer. The clamp is that of llama.cpp's graph (`build_ffn` and `build_moe_ffn`), the MTP
layer that of Ling 2's code (`BailingMoeV2MTPLayer`) and of llama.cpp's graph.
tests/validate/test_reference_ling3.py compares with transformers and llama.cpp.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, sigmoid, silu

from kimi_gguf.convert.model.ling3 import Ling3Config, Yarn
from kimi_gguf.validate.reference import Names, Reference, Trace

SMALLEST_LIMIT = 1e-6  # a smaller limit means that the layer does not clamp


class Ling3(Reference):
    """The model. `mtp_logits` computes its MTP layer."""

    names = Names(
        embedding="model.word_embeddings.weight",
        attention="attention.",
        mla_output="dense",
        moe="mlp.",
        routing_bias="gate.expert_bias",
        expert=("gate_proj", "up_proj", "down_proj"),
    )

    @property
    def ling(self) -> Ling3Config:
        """The config with the fields that only this family has."""
        return cast(Ling3Config, self.config)

    # ----------------------------------------------------------------------------------------------------- KDA

    def forget_projection(self, p: str, x: Tensor) -> Tensor:
        return linear(x, self.weight(p + "f_proj.weight"))

    def gate_projection(self, p: str, x: Tensor) -> Tensor:
        return linear(x, self.weight(p + "g_proj.weight"))

    # ----------------------------------------------------------------------------------------------------- MLA

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate each pair (x[2i], x[2i + 1]) by the angle of its position, x [.., T, R] -> [.., T, R]."""
        tokens, size = x.shape[-2:]
        cos, sin = self.rotation(tokens, size)
        first, second = self.pairs(x)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)

    @staticmethod
    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second value of each pair that is rotated together, [.., R] -> [.., R / 2] each."""
        return x[..., 0::2], x[..., 1::2]

    def rotation(self, tokens: int, size: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, size / 2] of the angles, times YaRN's factor. The angles are in float64."""
        pair = torch.arange(0, size, 2, dtype=torch.float64)
        frequency, factor = self.config.rope_theta ** (-pair / size), 1.0
        yarn = self.ling.yarn
        if yarn is not None:
            extrapolated = self.extrapolated(yarn, size)
            frequency = frequency * (extrapolated + (1 - extrapolated) / yarn.factor)
            factor = rotation_factor(yarn)
        angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
        return (factor * angle.cos()).to(self.dtype), (factor * angle.sin()).to(self.dtype)

    def extrapolated(self, yarn: Yarn, size: int) -> Tensor:
        """Weight of the original frequency in each pair's frequency, [size / 2]; the rest is that divided by `factor`.

        1 for pairs that turn at least `beta_fast` times in the original context, 0 for those that turn at most
        `beta_slow` times.
        """

        def pair_that_turns(times: float) -> float:
            turns = yarn.original_context / (2 * math.pi * times)
            return size * math.log(turns) / (2 * math.log(self.config.rope_theta))

        low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(yarn.beta_slow)), size - 1)
        width = max(high - low, 0.001)
        return 1 - ((torch.arange(size // 2, dtype=torch.float64) - low) / width).clamp(0, 1)

    def attention_scale(self) -> float:
        """With YaRN the scores are multiplied by the square of mscale_all_dim's scale."""
        scale, yarn = super().attention_scale(), self.ling.yarn
        if yarn is None or not yarn.mscale_all_dim:
            return scale
        return scale * length_scale(yarn.factor, yarn.mscale_all_dim) ** 2

    def gated_attention(self, p: str, x: Tensor, attended: Tensor) -> Tensor:
        """One gate per head, from the normed input of the layer."""
        return attended * sigmoid(linear(x, self.weight(p + "g_proj.weight")))[..., None]

    # ----------------------------------------------------------------------------------------------------- FFN

    def activation(self, layer: int, gate: Tensor, up: Tensor, routed: bool) -> Tensor:
        """SwiGLU with both factors clamped: silu(gate) from above, up from both sides.

        As in llama.cpp's graph, the limit of the shared experts holds for a dense FFN, too.
        """
        limit = (self.ling.swiglu_limits if routed else self.ling.shared_swiglu_limits)[layer]
        if limit <= SMALLEST_LIMIT:
            return super().activation(layer, gate, up, routed)
        return silu(gate).clamp(max=limit) * up.clamp(-limit, limit)

    # ----------------------------------------------------------------------------------------------------- MTP

    @torch.inference_mode()
    def mtp_logits(self, ids: Tensor, hidden: Tensor, trace: Trace | None = None) -> Tensor:
        """Logits [T, V] of the MTP layer for the token after each id, with the hidden states [T, M] of the ids.

        The layer reads each token with the hidden state of the token before it.
        """
        layer = len(self.config.layers)
        p = f"model.layers.{layer}."
        x = linear(
            self.mtp_input(p, self.embed(ids), self.hidden_before(hidden)), self.weight(p + "eh_proj.weight")
        )
        x = x + self.mla(layer, self.norm(p + "input_layernorm", x))
        x = x + self.ffn(layer, x, trace)
        return self.head(self.norm(p + "final_layernorm", x))

    def hidden_before(self, hidden: Tensor) -> Tensor:
        """The hidden state of the token before each token, [T, M] -> [T, M].

        There is none before the first token: zeros, as in llama.cpp's drafts.
        """
        return pad(hidden, (0, 0, 1, 0))[:-1]

    def mtp_input(self, p: str, embedding: Tensor, before: Tensor) -> Tensor:
        """What the layer's first projection reads, [T, M] and [T, M] -> [T, 2 * M]."""
        return torch.cat([self.norm(p + "enorm", embedding), self.norm(p + "hnorm", before)], -1)


def length_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's scale of attention in a context that is `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotation_factor(yarn: Yarn) -> float:
    """Factor of cosine and sine."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return length_scale(yarn.factor, yarn.mscale) / length_scale(yarn.factor, yarn.mscale_all_dim)
    return length_scale(yarn.factor)
