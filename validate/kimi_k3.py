"""Kimi K3's text model in plain torch: what it computes differently from Kimi-Linear (reference.py).

Input: a `K3Config`, weights by canonical hub names, token ids. Output: as reference.py.

- Residuals: layers form blocks, and each block has its own sum of outputs. A layer does not read the sum of all earlier
  outputs. It reads an average, weighted by attention, of the sum in its block and of the final sums of earlier blocks.
- KDA: the projection of the output gate has full rank. A_log may have more values than there are heads.
- MLA: a sigmoid gate per value of the output.
- FFN: the activation is SiTU instead of SwiGLU, everywhere. Routed experts work in a smaller space.

Source: llama.cpp's graph for `kimi-k3`, since transformers 5.23 lacks the model.
tests/validate/test_reference_k3.py compares with it, and KDA with a float64 recurrence.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear, sigmoid

from kimi_gguf.convert.model.kimi_k3 import K3Config
from kimi_gguf.validate.reference import Reference, Route, Trace


class KimiK3(Reference):
    """The text model."""

    @property
    def k3(self) -> K3Config:
        """The config with the fields that only this family has."""
        return cast(K3Config, self.config)

    # ------------------------------------------------------------------------ residual attention over blocks

    def all_layers(self, x: Tensor, trace: Trace | None) -> Tensor:
        """All layers, x [T, M] -> [T, M]. A layer's traced output is the sum in its block, before any attention.

        At the beginning of a block the sum so far goes to `bank`, and a new sum starts.
        """
        size = self.k3.attn_res_block_size
        if size <= 0:
            return super().all_layers(x, trace)
        bank: list[Tensor] = []  # the embedding, then the sum at the end of each block but the last
        for layer in range(len(self.config.layers)):
            p = f"model.layers.{layer}."
            read = self.attend_residuals(bank, x, p + "self_attention_res")
            if layer % size == 0:
                bank.append(x)
                x = torch.zeros_like(x)
            x = x + self.mix_tokens(layer, read)
            x = x + self.ffn(layer, self.attend_residuals(bank, x, p + "mlp_res"), trace)
            if trace is not None:
                trace.layer_done(x)
        return self.attend_residuals(bank, x, "model.output_attn_res")

    def attend_residuals(self, bank: list[Tensor], x: Tensor, name: str) -> Tensor:
        """Softmax-weighted average of the values in `bank` and of x, [T, M] -> [T, M].

        A value's score is the dot product of its RMS norm with a learned vector.
        """
        values = torch.stack([*bank, x])  # [B + 1, T, M]
        scores = linear(self.residual_keys(name, values), self.weight(name + "_proj.weight").view(1, -1))
        return (scores.softmax(0) * values).sum(0)

    def residual_keys(self, name: str, values: Tensor) -> Tensor:
        """What the scores are computed from."""
        return self.norm(name + "_norm", values)

    # -------------------------------------------------------------------------------------------- KDA and MLA

    def gate_projection(self, p: str, x: Tensor) -> Tensor:
        return linear(x, self.weight(p + "g_proj.weight"))

    def log_decay(self, f: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
        return super().log_decay(f, a_log.flatten()[: self.config.kda_num_heads], dt_bias)

    def gated_attention(self, p: str, x: Tensor, attended: Tensor) -> Tensor:
        """One gate per value, from the normed input of the layer; some models have none."""
        if not self.k3.mla_output_gate:
            return attended
        return attended * sigmoid(linear(x, self.weight(p + "g_proj.weight"))).view_as(attended)

    # ----------------------------------------------------------------------------------------------------- FFN

    def activation(self, layer: int, gate: Tensor, up: Tensor, routed: bool) -> Tensor:
        """SiTU: beta tanh(gate / beta) sigmoid(gate) * linear_beta tanh(up / linear_beta)."""
        return self.softly_limited(gate, self.k3.situ_beta) * sigmoid(gate) * self.limited_up(up)

    def limited_up(self, up: Tensor) -> Tensor:
        """The linear factor of SiTU; not limited if linear_beta is not positive."""
        beta = self.k3.situ_linear_beta
        return self.softly_limited(up, beta) if beta > 0 else up

    @staticmethod
    def softly_limited(x: Tensor, most: float) -> Tensor:
        """x where it is small, and never more than `most` in size."""
        return most * torch.tanh(x / most)

    def routed_experts(self, layer: int, p: str, x: Tensor, route: Route) -> Tensor:
        """Routed experts in their own space: down, experts, RMS norm, up. The router reads x itself."""
        if self.k3.routed_hidden_size is None:
            return super().routed_experts(layer, p, x, route)
        narrow = linear(x, self.weight(p + "routed_expert_down_proj.weight"))
        mixed = super().routed_experts(layer, p, narrow, route)
        return linear(self.latent_experts_norm(p, mixed), self.weight(p + "routed_expert_up_proj.weight"))

    def latent_experts_norm(self, p: str, mixed: Tensor) -> Tensor:
        """The norm of the weighted sum of the routed experts' outputs; some models have none."""
        if not self.k3.routed_norm:
            return mixed
        return self.norm(p + "routed_expert_norm", mixed)
