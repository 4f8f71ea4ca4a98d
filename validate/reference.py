"""Kimi-Linear in plain torch, the reference that llama.cpp's logits are compared with; base of the other families'.

Input: a `ModelConfig`, a callable that returns a weight for its canonical hub name, token ids.
Output: logits at every position, and optionally a `Trace` (output of each layer, chosen experts).

The code is written to be read from top to bottom, not to be fast. Each weight is loaded when it is used, and only
the experts that some token chose are loaded, so that a 48B checkpoint needs no more memory than its largest matrix.
Each step is a small method, so that a subclass can replace it: with that of another family (ling3.py, kimi_k3.py), or
with a faulty one (tools/faults.py). models.py chooses the class of an architecture.

Sources: the Kimi Linear technical report (arXiv 2510.26692) for KDA and MLA without positional encoding, and the
native `kimi_linear` of transformers 5.23 for the constants. tests/validate/test_reference.py compares with both.

Shapes: T tokens, M hidden size, H heads, D KDA head size, V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, sigmoid, silu, softplus

from kimi_gguf.convert.model.config import LayerKind, ModelConfig

LATENT_NORM_EPS = 1e-6  # norms of MLA's latents (kv_a, q_a); they do not use the config's rms_norm_eps
L2_NORM_EPS = 1e-6  # added to the sum of squares of KDA's q and k
ROUTER_SUM_EPS = 1e-20  # added to the sum of the chosen experts' scores
QUERY_BLOCK = 256  # queries processed together, so that the scores have H * QUERY_BLOCK * T elements


@dataclass(frozen=True)
class Names:
    """Parts of the canonical hub names that differ between families."""

    embedding: str = "model.embed_tokens.weight"
    attention: str = "self_attn."  # KDA and MLA, after "model.layers.N."
    mla_output: str = "o_proj"
    moe: str = "block_sparse_moe."
    routing_bias: str = "gate.e_score_correction_bias"
    expert: tuple[str, str, str] = ("w1", "w3", "w2")  # gate, up, down


@dataclass(frozen=True)
class Route:
    """Routing of one MoE layer: experts [T, K], their weights [T, K], and the margin [T] of the choice.

    The margin is the difference between the last chosen and the first rejected score, or group score if that
    difference is smaller. It is infinite if nothing was rejected.
    """

    experts: Tensor
    weights: Tensor
    margin: Tensor


@dataclass
class Trace:
    """Intermediate results of a forward pass; pass an empty `Trace` to `Reference.logits` to collect them."""

    layer_outputs: list[Tensor] = field(default_factory=list)  # per layer [T, M], after both residuals
    routes: dict[int, Route] = field(default_factory=dict)  # by layer; dense layers have none

    def layer_done(self, output: Tensor) -> None:
        """Called after each layer with its output [T, M]."""
        self.layer_outputs.append(output)


class Reference:
    """The model.

    config: shape and constants.
    weight: canonical hub name -> tensor of any float type, as stored ([out, in] for projections).
    dtype: type of all computations; float32, or float64 to measure the rounding error of float32.
    """

    names = Names()

    def __init__(
        self, config: ModelConfig, weight: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.dtype = dtype
        self._weight = weight

    def weight(self, name: str) -> Tensor:
        """One weight, converted to `dtype`."""
        return self._weight(name).to(self.dtype)

    # ---------------------------------------------------------------------------------------- the whole model

    def logits(self, ids: Tensor, trace: Trace | None = None) -> Tensor:
        """Token ids [T] (integers) -> logits [T, V] in `dtype`."""
        return self.head(self.hidden(ids, trace))

    @torch.inference_mode()
    def hidden(self, ids: Tensor, trace: Trace | None = None) -> Tensor:
        """Token ids [T] -> the output of the last layer after its norm, [T, M]."""
        return self.norm("model.norm", self.all_layers(self.embed(ids), trace))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [T] -> their embeddings [T, M]."""
        return self._weight(self.names.embedding)[ids].to(self.dtype)

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, M] -> logits [T, V]."""
        return linear(hidden, self.weight("lm_head.weight"))

    def mtp_logits(self, ids: Tensor, hidden: Tensor, trace: Trace | None = None) -> Tensor:
        """Logits [T, V] of the layer that predicts a further token; hidden [T, M]: those of the ids."""
        raise NotImplementedError(f"{type(self).__name__} has no MTP layer")

    def all_layers(self, x: Tensor, trace: Trace | None) -> Tensor:
        """All layers with their residuals, x [T, M] -> [T, M]."""
        for layer in range(len(self.config.layers)):
            x = x + self.mix_tokens(layer, x)
            x = x + self.ffn(layer, x, trace)
            if trace is not None:
                trace.layer_done(x)
        return x

    def mix_tokens(self, layer: int, x: Tensor) -> Tensor:
        """The layer's norm and KDA or MLA, without the residual, x [T, M] -> [T, M]."""
        mix = self.kda if self.config.layers[layer] is LayerKind.KDA else self.mla
        return mix(layer, self.norm(f"model.layers.{layer}.input_layernorm", x))

    def ffn(self, layer: int, x: Tensor, trace: Trace | None) -> Tensor:
        """The layer's second norm and its dense FFN or MoE, without the residual, x [T, M] -> [T, M]."""
        p = f"model.layers.{layer}."
        x = self.norm(p + "post_attention_layernorm", x)
        if layer >= self.config.num_dense_layers:
            return self.moe(layer, x, trace)
        return self.gated_ffn(layer, x, p + "mlp.gate_proj", p + "mlp.up_proj", p + "mlp.down_proj")

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMS norm with the weight `name` (without `.weight`) and the config's epsilon."""
        return self.rms_norm(x, self.weight(name + ".weight"), self.config.rms_norm_eps)

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def gated_ffn(
        self, layer: int, x: Tensor, gate: str, up: str, down: str, *, routed: bool = False
    ) -> Tensor:
        """down(activation(gate x, up x)), x [.., M] -> [.., M]; the three are names without `.weight`.

        routed: whether this is a routed expert, and not a shared expert or a dense FFN.
        """
        g, u = (linear(x, self.weight(name + ".weight")) for name in (gate, up))
        return linear(self.activation(layer, g, u, routed), self.weight(down + ".weight"))

    def activation(self, layer: int, gate: Tensor, up: Tensor, routed: bool) -> Tensor:
        """SwiGLU."""
        return silu(gate) * up

    # ----------------------------------------------------------------------------- KDA: Kimi Delta Attention

    def kda(self, layer: int, x: Tensor) -> Tensor:
        """Gated delta rule with one decay per channel, x [T, M] -> [T, M]."""
        p = f"model.layers.{layer}.{self.names.attention}"
        heads, dim = self.config.kda_num_heads, self.config.kda_head_dim

        def projected(name: str) -> Tensor:
            y = linear(x, self.weight(p + name + "_proj.weight"))
            return self.short_conv(y, self.weight(p + name + "_conv1d.weight")).view(-1, heads, dim)

        q = self.l2_norm(projected("q")) * dim**-0.5  # [T, H, D], all four
        k = self.l2_norm(projected("k"))
        v = projected("v")
        f = self.forget_projection(p, x).view(-1, heads, dim)
        log_decay = self.log_decay(f, self.weight(p + "A_log"), self.weight(p + "dt_bias"))
        beta = sigmoid(linear(x, self.weight(p + "b_proj.weight")))  # [T, H]
        o = self.delta_rule(q, k, v, log_decay, beta)  # [T, H, D]
        o = self.norm(p + "o_norm", o) * sigmoid(self.gate_projection(p, x).view(-1, heads, dim))
        return linear(o.flatten(1), self.weight(p + "o_proj.weight"))

    def forget_projection(self, p: str, x: Tensor) -> Tensor:
        """What the log-gate is computed from, x [T, M] -> [T, H * D]."""
        return self.low_rank(p + "f", x)

    def gate_projection(self, p: str, x: Tensor) -> Tensor:
        """The output gate before its sigmoid, x [T, M] -> [T, H * D]."""
        return self.low_rank(p + "g", x)

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """Two projections, through D values per token."""
        narrow = linear(x, self.weight(name + "_a_proj.weight"))
        return linear(narrow, self.weight(name + "_b_proj.weight"))

    @staticmethod
    def short_conv(x: Tensor, kernel: Tensor) -> Tensor:
        """Causal depthwise convolution and SiLU, x [T, C], kernel [C, 1, W]; the last tap is the current token."""
        width = kernel.shape[-1]
        past = pad(x, (0, 0, width - 1, 0))  # zeros before the first token
        taps = [past[j : j + len(x)] * kernel[:, 0, j] for j in range(width)]
        return silu(torch.stack(taps).sum(0))

    @staticmethod
    def l2_norm(x: Tensor) -> Tensor:
        """x / sqrt(sum(x^2) + eps) over the last dimension."""
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)

    def log_decay(self, f: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
        """The log-gate, f [T, H, D] -> [T, H, D]; at most 0.

        Without a bound -exp(A_log) * softplus(f + dt_bias); with one bound * sigmoid(exp(A_log) * (f + dt_bias)).
        """
        heads, dim = f.shape[1:]
        rate, f = torch.exp(a_log).view(heads, 1), f + dt_bias.view(heads, dim)
        if self.config.kda_lower_bound is None:
            return -rate * softplus(f, threshold=20.0)
        return self.config.kda_lower_bound * sigmoid(rate * f)

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        """The recurrence, token by token: q, k, v, log_decay [T, H, D], beta [T, H] -> [T, H, D]."""
        tokens, heads, dim = v.shape
        state = v.new_zeros(heads, dim, dim)  # [H, Dk, Dv]
        out = torch.empty_like(v)
        decay = torch.exp(log_decay)
        for t in range(tokens):
            state = self.carried_state(state, t) * decay[t, :, :, None]
            recalled = (k[t, :, None, :] @ state).squeeze(1)  # Sᵀk, what the state holds for this key
            delta = beta[t, :, None] * (v[t] - recalled)
            state = state + k[t, :, :, None] * delta[:, None, :]
            out[t] = (q[t, :, None, :] @ state).squeeze(1)
        return out

    def carried_state(self, state: Tensor, position: int) -> Tensor:
        """The state [H, Dk, Dv] before the token at `position`; here the state after the previous token."""
        return state

    # ------------------------------------------------------------------- MLA: multi-head latent attention

    def mla(self, layer: int, x: Tensor) -> Tensor:
        """Attention over a latent of kv_lora_rank + qk_rope_head_dim values per token, x [T, M] -> [T, M].

        The `rope` part is a key that all heads share.
        """
        c, p = self.config, f"model.layers.{layer}.{self.names.attention}"
        nope, shared, value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        q = self.mla_query(p, x).view(-1, c.num_heads, nope + shared).transpose(0, 1)  # [H, T, nope + shared]
        q = torch.cat([q[..., :nope], self.rotate(q[..., nope:])], -1)
        kv = linear(x, self.weight(p + "kv_a_proj_with_mqa.weight"))
        latent, k_shared = kv[:, : c.kv_lora_rank], kv[:, c.kv_lora_rank :]
        latent = self.latent_norm(latent, self.weight(p + "kv_a_layernorm.weight"))
        expanded = linear(latent, self.weight(p + "kv_b_proj.weight")).view(-1, c.num_heads, nope + value)
        k_nope, v = expanded.transpose(0, 1)[..., :nope], expanded.transpose(0, 1)[..., nope:]
        k = torch.cat(
            [k_nope, self.rotate(k_shared).expand(c.num_heads, -1, -1)], -1
        )  # [H, T, nope + shared]
        attended = self.causal_attention(q, k, v, self.attention_scale())  # [H, T, value]
        attended = self.gated_attention(p, x, attended.transpose(0, 1))
        return linear(attended.flatten(1), self.weight(f"{p}{self.names.mla_output}.weight"))

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE, x [.., T, shared]; Kimi-Linear has none."""
        return x

    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return float((self.config.qk_nope_head_dim + self.config.qk_rope_head_dim) ** -0.5)

    def gated_attention(self, p: str, x: Tensor, attended: Tensor) -> Tensor:
        """The attention output [T, H, value] with a gate from x [T, M]; Kimi-Linear has none."""
        return attended

    def mla_query(self, p: str, x: Tensor) -> Tensor:
        """Queries of all heads [T, H * (nope + shared)], through a query latent if the model has one."""
        if self.config.q_lora_rank is None:
            return linear(x, self.weight(p + "q_proj.weight"))
        latent = linear(x, self.weight(p + "q_a_proj.weight"))
        latent = self.latent_norm(latent, self.weight(p + "q_a_layernorm.weight"))
        return linear(latent, self.weight(p + "q_b_proj.weight"))

    def latent_norm(self, latent: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of MLA's latents: that of keys and values, and that of queries if the model has one."""
        return self.rms_norm(latent, weight, LATENT_NORM_EPS)

    @staticmethod
    def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention over this token and earlier ones: q, k [H, T, A], v [H, T, B] -> [H, T, B]."""
        tokens = q.shape[1]
        position = torch.arange(tokens)
        blocks = []
        for start in range(0, tokens, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, tokens)
            scores = q[:, start:end] @ k[:, :end].transpose(1, 2) * scale
            future = position[:end] > position[start:end, None]
            blocks.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, :end])
        return torch.cat(blocks, 1)

    # ------------------------------------------------------------------------------- MoE: mixture of experts

    def moe(self, layer: int, x: Tensor, trace: Trace | None) -> Tensor:
        """The chosen experts, weighted, plus the shared expert, x [T, M] -> [T, M]."""
        p = f"model.layers.{layer}.{self.names.moe}"
        route = self.route(x, self.weight(p + "gate.weight"), self.routing_bias(p))
        if trace is not None:
            trace.routes[layer] = route
        y = self.routed_experts(layer, p, x, route)
        if self.config.num_shared_experts:
            s = p + "shared_experts."
            y = y + self.gated_ffn(layer, x, s + "gate_proj", s + "up_proj", s + "down_proj")
        return y

    def routed_experts(self, layer: int, p: str, x: Tensor, route: Route) -> Tensor:
        """The weighted sum of the chosen experts' outputs, x [T, M] -> [T, M]."""
        y = torch.zeros_like(x)
        for expert in sorted(set(route.experts.flatten().tolist())):
            token, slot = torch.where(route.experts == expert)
            gate, up, down = (self.expert_prefix(p, expert) + name for name in self.names.expert)
            out = self.gated_ffn(layer, x[token], gate, up, down, routed=True)
            y[token] += route.weights[token, slot, None] * out
        return y

    def routing_bias(self, p: str) -> Tensor:
        """The bias [E] that is added to the scores to choose experts, but not to compute their weights."""
        return self.weight(p + self.names.routing_bias)

    def expert_prefix(self, p: str, expert: int) -> str:
        """Prefix of the names of the expert's three matrices in the checkpoint."""
        return f"{p}experts.{expert}."

    def route(self, x: Tensor, gate: Tensor, bias: Tensor) -> Route:
        """Choose experts by sigmoid score + bias, weight them by the score: x [T, M], gate [E, M], bias [E]."""
        c = self.config
        scores = sigmoid(linear(x, gate))  # [T, E]
        choice, group_margin = self.within_groups(scores + bias)
        best, order = choice.sort(dim=-1, descending=True, stable=True)
        experts = order[:, : c.num_experts_per_token]
        weights = scores.gather(1, experts)
        if c.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + ROUTER_SUM_EPS)
        margin = torch.minimum(group_margin, self.margin(best, c.num_experts_per_token))
        return Route(experts, weights * c.routed_scaling_factor, margin)

    def within_groups(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Set the scores of experts outside the best groups to -inf: [T, E] -> [T, E], margin [T].

        A group's score is the sum of its two best experts' scores.
        """
        groups, kept = self.config.num_expert_groups, self.config.topk_groups
        if not self.config.uses_groups:
            return choice, choice.new_full((len(choice),), float("inf"))
        grouped = choice.view(len(choice), groups, -1)
        best, order = grouped.topk(2, -1).values.sum(-1).sort(dim=-1, descending=True, stable=True)
        dropped = torch.ones(len(choice), groups, dtype=torch.bool).scatter(1, order[:, :kept], False)
        remaining = grouped.masked_fill(dropped[:, :, None], float("-inf"))
        return remaining.flatten(1), self.margin(best, kept)

    @staticmethod
    def margin(best: Tensor, kept: int) -> Tensor:
        """Difference between the last kept and the first rejected score: scores [T, N], descending -> [T]."""
        if kept == best.shape[1]:
            return best.new_full((len(best),), float("inf"))
        return best[:, kept - 1] - best[:, kept]
