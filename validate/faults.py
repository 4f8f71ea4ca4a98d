"""Deliberate faults: subclasses of the reference with one mistake each.

They show that the gates catch mistakes that perplexity does not show. Each is a mistake that an implementation of
this model could make, or has made. `FAULTS` maps their names to the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_gguf.validate.reference import L2_NORM_EPS, LATENT_NORM_EPS, Reference

STATE_LOST_EVERY = 64  # tokens


class SilentMla(Reference):
    """The output of every MLA layer is zero."""

    def mla(self, layer: int, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class NoRoutingBias(Reference):
    """Experts are chosen by their scores alone."""

    def routing_bias(self, p: str) -> Tensor:
        return torch.zeros_like(super().routing_bias(p))


class NormConstants(Reference):
    """q, k and the latent are normalised with the 1e-5 of the other norms instead of 1e-6."""

    @staticmethod
    def l2_norm(x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 10 * L2_NORM_EPS)

    def latent_norm(self, latent: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(latent, weight, 10 * LATENT_NORM_EPS)


class OneDecayPerHead(Reference):
    """Every channel of a KDA head decays by the head's mean log-decay, as in the gated delta net."""

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        mean = log_decay.mean(-1, keepdim=True).expand_as(log_decay)
        return super().delta_rule(q, k, v, mean, beta)


class LostState(Reference):
    """The KDA state is reset to zero at every 64th token, as if it were lost between batches."""

    def carried_state(self, state: Tensor, position: int) -> Tensor:
        return torch.zeros_like(state) if position % STATE_LOST_EVERY == 0 else state


class SwappedExperts(Reference):
    """Experts 0 and 1 of every layer are swapped."""

    def expert_prefix(self, p: str, expert: int) -> str:
        return super().expert_prefix(p, {0: 1, 1: 0}.get(expert, expert))


FAULTS: dict[str, type[Reference]] = {
    "MLA output zeroed": SilentMla,
    "routing bias dropped": NoRoutingBias,
    "norm constants 1e-5": NormConstants,
    "one decay per head": OneDecayPerHead,
    "KDA state lost every 64 tokens": LostState,
    "two experts swapped": SwappedExperts,
}
