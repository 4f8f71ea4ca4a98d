"""Kimi-Linear as a batched, differentiable torch model, for training the demo checkpoint only.

Input: token ids [B, T]. Output: logits [B, T, vocab]. The modules have the tensor names of the hub checkpoint,
except that a layer's experts are stacked; `hub_tensors` returns the hub's names, shapes and dtypes.
`validate/reference.py` is the readable specification; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kda_chunked import kda_chunked
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.families import read_config
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.model.tensor_table import FLOAT32
from kimi_gguf.tools.tokenizer_files import NUM_SPECIAL, OFFSET

L2_EPS = 1e-6
LATENT_NORM_EPS = 1e-6
NUM_RANKS = 2816


def hub_config() -> dict[str, Any]:
    """The demo's `config.json`: the 48B's, smaller, with its head sizes, latent, convolution and 3:1 layers."""
    config = published_config()
    del config["auto_map"]  # the repository's own Python
    config["linear_attn_config"] |= {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "num_heads": 2}
    return config | {
        "bos_token_id": NUM_RANKS + OFFSET["[BOS]"],
        "eos_token_id": NUM_RANKS + OFFSET["<|im_end|>"],
        "pad_token_id": NUM_RANKS + OFFSET["[PAD]"],
        "vocab_size": NUM_RANKS + NUM_SPECIAL,
        "model_max_length": 4096,
        "hidden_size": 256,
        "head_dim": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_hidden_layers": 4,
    }


def demo_config() -> ModelConfig:
    """The shape of the demo."""
    return read_config(hub_config(), "config.json")


class Conv(nn.Module):
    """Depthwise causal convolution without bias, then SiLU; weight [C, 1, W] as in the checkpoint."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        width, length = self.weight.shape[-1], x.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        taps = self.weight[:, 0].t()  # [W, C]
        out = padded[:, :length] * taps[0]
        for i in range(1, width):
            out = out + padded[:, i : i + length] * taps[i]
        return F.silu(out)


class KDA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.kda_num_heads, config.kda_head_dim
        self.heads, self.dim = heads, dim
        inner = heads * dim
        self.q_proj, self.k_proj, self.v_proj = (_linear(hidden, inner) for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Conv(inner, config.conv_kernel_size) for _ in range(3))
        self.A_log = nn.Parameter(torch.empty(1, 1, heads, 1).uniform_(1, 16).log())
        step = torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.f_a_proj, self.f_b_proj = _linear(hidden, dim), _linear(dim, inner)
        self.b_proj = _linear(hidden, heads)
        self.g_a_proj, self.g_b_proj = _linear(hidden, dim), _linear(dim, inner)
        self.o_norm = nn.RMSNorm(dim, config.rms_norm_eps)
        self.o_proj = _linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self._heads(conv(proj(x)))
            for proj, conv in (
                (self.q_proj, self.q_conv1d),
                (self.k_proj, self.k_conv1d),
                (self.v_proj, self.v_conv1d),
            )
        )
        gate = self.log_gate(x)
        beta = self.b_proj(x).sigmoid().transpose(1, 2)
        o, _ = kda_chunked(_l2(q) * self.dim**-0.5, _l2(k), v, gate, beta)
        out_gate = self.g_b_proj(self.g_a_proj(x)).sigmoid()
        result: Tensor = self.o_proj(self.o_norm(o).transpose(1, 2).flatten(2) * out_gate)
        return result

    def log_gate(self, x: Tensor) -> Tensor:
        """Layer input [B, T, hidden] -> log of the decay of each channel, [B, H, T, D], unbounded below."""
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)) + self.dt_bias)
        return -self.A_log.exp().view(1, self.heads, 1, 1) * self._heads(step)

    def _heads(self, x: Tensor) -> Tensor:  # [B, T, H D] -> [B, H, T, D]
        return x.view(*x.shape[:2], self.heads, self.dim).transpose(1, 2)


class MLA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.nope, self.rope = config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self.q_proj = _linear(config.hidden_size, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = _linear(config.hidden_size, self.latent + self.rope)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = _linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = _linear(self.heads * self.value, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(2, (self.heads, self.nope + self.rope)).transpose(1, 2)
        latent, k_rot = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(2, (self.heads, self.nope + self.value))
        k_nope, v = kv.transpose(1, 2).split((self.nope, self.value), -1)
        k = torch.cat((k_nope, k_rot[:, None].expand(-1, self.heads, -1, -1)), -1)
        scores = (q * (self.nope + self.rope) ** -0.5) @ k.transpose(-1, -2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        result: Tensor = self.o_proj(
            (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        return result


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = _linear(hidden, inner), _linear(hidden, inner)
        self.down_proj = _linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Router(nn.Module):
    """Sigmoid scores; the choice is by score + bias, the weights are the unbiased scores.

    The bias is not a parameter: `balance` moves it against the load (auxiliary-loss-free balancing).
    """

    e_score_correction_bias: Tensor
    load: Tensor  # tokens per expert since the last `balance`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.used, self.scale = config.num_experts_per_token, config.routed_scaling_factor
        self.weight = _linear(config.hidden_size, config.num_experts).weight
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, hidden] -> weights, experts [N, used]
        scores = F.linear(x, self.weight).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.used, -1).indices
        self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        weights = scores.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, chosen

    def balance(self, rate: float) -> None:
        self.e_score_correction_bias += rate * (self.load.mean() - self.load).sign()
        self.load.zero_()


class MoE(nn.Module):
    """Experts stacked: w1, w3 [E, inner, hidden], w2 [E, hidden, inner]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate = Router(config)
        self.w1 = nn.Parameter(torch.randn(experts, inner, hidden) * hidden**-0.5)
        self.w3 = nn.Parameter(torch.randn(experts, inner, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5)
        self.shared_experts = MLP(hidden, inner * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat)
        out: Tensor = self.shared_experts(flat)
        for expert in range(len(self.w1)):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            rows = flat[token]
            inner = F.silu(F.linear(rows, self.w1[expert])) * F.linear(rows, self.w3[expert])
            out = out.index_add(0, token, F.linear(inner, self.w2[expert]) * weights[token, slot, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = KDA(config) if config.layers[index] is LayerKind.KDA else MLA(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: nn.Module
        if index < config.num_dense_layers:
            self.mlp = self.ffn = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.block_sparse_moe = self.ffn = MoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        result: Tensor = x + self.ffn(self.post_attention_layernorm(x))
        return result


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(len(config.layers)))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        with torch.no_grad():
            self.lm_head.weight.mul_(0.3)
            for name, weight in self.named_parameters():
                if name.endswith((".o_proj.weight", ".down_proj.weight", ".w2")):
                    weight.mul_((2 * len(config.layers)) ** -0.5)  # the residual stream starts small

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab]."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]


def hub_weights(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Hub names and the model's own tensors, in its order; the stacked experts as a view each."""
    for name, tensor in model.state_dict().items():
        if ".ffn." in name:  # the same module also exists under its hub name
            continue
        where, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            for expert, weight in enumerate(tensor):
                yield f"{where}.experts.{expert}.{last}.weight", weight
        else:
            yield name, tensor


def hub_tensors(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Hub names and copies of the tensors: bf16, but float32 for A_log and dt_bias."""
    for name, tensor in hub_weights(model):
        yield name, tensor.detach().clone() if name.endswith(FLOAT32) else tensor.detach().bfloat16()


def load_hub(model: DemoModel, weight: Callable[[str], Tensor]) -> None:
    """Sets the model's weights, in place, to those that `weight` gives for the hub's names."""
    with torch.no_grad():
        for name, tensor in hub_weights(model):
            tensor.copy_(weight(name))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


def _l2(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
