"""Deliberate faults: subclasses of the reference with one mistake each.

They show that the gates catch mistakes that perplexity does not show. Each is a mistake that an implementation of
this model could make, or has made. `FAULTS` maps their names to the classes; `LING3_FAULTS` and `K3_FAULTS` have those
of what only these families compute. `faults_of` gives all faults of an architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from kimi_gguf.convert.model import kimi_k3, ling3
from kimi_gguf.validate.kimi_k3 import KimiK3
from kimi_gguf.validate.ling3 import Ling3
from kimi_gguf.validate.models import REFERENCES
from kimi_gguf.validate.reference import L2_NORM_EPS, LATENT_NORM_EPS, Reference, Trace

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


class NoHeadGate(Ling3):
    """The output of latent attention has no gate."""

    def gated_attention(self, p: str, x: Tensor, attended: Tensor) -> Tensor:
        return attended


class OtherPairs(Ling3):
    """RoPE rotates the value i of the first half with that of the second half, as most models do."""

    def rotate(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        paired = torch.stack([x[..., : size // 2], x[..., size // 2 :]], -1).flatten(-2)
        turned = super().rotate(paired)
        return torch.cat([turned[..., 0::2], turned[..., 1::2]], -1)


class NoGroups(Ling3):
    """Experts are chosen from all groups."""

    def within_groups(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        return choice, choice.new_full((len(choice),), float("inf"))


class NoClamp(Ling3):
    """SwiGLU is not clamped."""

    def activation(self, layer: int, gate: Tensor, up: Tensor, routed: bool) -> Tensor:
        return silu(gate) * up


class MtpOfTheSameToken(Ling3):
    """The MTP layer reads each token's own hidden state instead of that of the token before."""

    def hidden_before(self, hidden: Tensor) -> Tensor:
        return hidden


class MtpHalvesSwapped(Ling3):
    """The MTP layer's first projection reads the hidden state before the embedding."""

    def mtp_input(self, p: str, embedding: Tensor, before: Tensor) -> Tensor:
        return super().mtp_input(p, embedding, before).roll(embedding.shape[1], 1)


class PlainResiduals(KimiK3):
    """Every layer reads the sum of all earlier outputs, as in Kimi-Linear."""

    def all_layers(self, x: Tensor, trace: Trace | None) -> Tensor:
        return Reference.all_layers(self, x, trace)


class UnlimitedUp(KimiK3):
    """SiTU does not limit its linear factor."""

    def limited_up(self, up: Tensor) -> Tensor:
        return up


class NoLatentNorm(KimiK3):
    """The sum of the routed experts is not normalised."""

    def latent_experts_norm(self, p: str, mixed: Tensor) -> Tensor:
        return mixed


LING3_FAULTS: dict[str, type[Reference]] = {
    "gate per head dropped": NoHeadGate,
    "RoPE on other pairs": OtherPairs,
    "expert groups ignored": NoGroups,
    "SwiGLU not clamped": NoClamp,
    "MTP layer one token late": MtpOfTheSameToken,
    "halves of the MTP input swapped": MtpHalvesSwapped,
}
K3_FAULTS: dict[str, type[Reference]] = {
    "plain residuals": PlainResiduals,
    "linear factor of SiTU not limited": UnlimitedUp,
    "norm of routed experts dropped": NoLatentNorm,
}
OWN_FAULTS = {ling3.ARCHITECTURE: LING3_FAULTS, kimi_k3.ARCHITECTURE: K3_FAULTS}


def faults_of(architecture: str) -> dict[str, type[Reference]]:
    """The faults of the shared parts, each on top of the architecture's reference, and the architecture's own."""
    base = REFERENCES[architecture]
    shared = {
        name: fault if base is Reference else type(fault.__name__, (fault, base), {"__doc__": fault.__doc__})
        for name, fault in FAULTS.items()
    }
    return shared | OWN_FAULTS.get(architecture, {})
