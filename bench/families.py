"""The families of generated models: their architecture, their configuration, and how large they are by default.

Input: a number of layers and experts, and full or tiny shapes. Output: the config, tensors and GGUF keys. To add a
family, add it to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from kimi_gguf.bench import glm5_next
from kimi_gguf.bench.published import GLM_FLASH, KIMI_K3, LING_FLASH, LING_TINY, Config
from kimi_gguf.bench.weights import BOUNDED, BOUNDED_POSITIVE, UNBOUNDED, Gate
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import outputs, read_config
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.model.metadata import architecture_keys
from kimi_gguf.convert.model.tensor_table import Output

EVERY: Final = 4  # of Kimi-Linear and Kimi K3: number of layers per MLA layer

# What differs from the published config.json in tests: K-quants require rows of 256.
TINY: Final[Config] = {
    "hidden_size": 256,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TINY_Q_RANK: Final = 256


@dataclass(frozen=True)
class Size:
    """What a model is made of."""

    layers: int
    experts: int
    changes: Config  # what differs from the published config.json
    name: str  # in errors


@dataclass(frozen=True)
class BenchFamily:
    """How to generate models of one kind."""

    label: str  # in the names of models
    architecture: str  # general.architecture
    layers: int  # by default
    experts: int
    config: Callable[[Size], ModelConfig]  # raises `ConvertError`
    description: str  # for --help
    tiny: Config = field(default_factory=lambda: TINY)  # what `--shapes tiny` changes
    outputs: Callable[[ModelConfig], Iterator[Output]] = outputs
    keys: Callable[[ModelConfig], Iterable[Key]] = architecture_keys  # of the config's architecture
    gate: Gate = UNBOUNDED  # of KDA
    comparable: bool = True  # upstream can run it


def _kimi(every: int, q_rank: int | None = None) -> Callable[[Size], ModelConfig]:
    """every: number of layers per MLA layer. q_rank: rank of query compression."""

    def config(size: Size) -> ModelConfig:
        published = published_config()
        data = {**published, **size.changes}
        data |= {
            "num_key_value_heads": data["num_attention_heads"],
            "num_hidden_layers": size.layers,
            "num_experts": size.experts,
            "num_experts_per_token": min(data["num_experts_per_token"], size.experts),
            "q_lora_rank": q_rank if q_rank is None else min(q_rank, data["hidden_size"]),
        }
        data["linear_attn_config"] |= {"num_heads": data["num_attention_heads"]}
        # as published, all layers are not groups of four: the last one is MLA, too
        if every != EVERY or size.layers != published["num_hidden_layers"]:
            data["linear_attn_config"] |= _kinds(size.layers, every)
        return read_config(data, size.name)

    return config


def _kinds(layers: int, every: int) -> dict[str, list[int]]:
    """The hub's lists of layers, which count from 1."""
    numbers = range(1, layers + 1)
    mla = [number for number in numbers if number % every == 0]
    return {"full_attn_layers": mla, "kda_layers": [number for number in numbers if number not in mla]}


def _ling(published: Config) -> Callable[[Size], ModelConfig]:
    def config(size: Size) -> ModelConfig:
        data = {**published, **size.changes}
        candidates = size.experts * data["topk_group"] // data["n_group"]
        data |= {
            "num_hidden_layers": size.layers,
            "num_experts": size.experts,
            "num_experts_per_tok": max(1, min(data["num_experts_per_tok"], candidates)),
        }
        # at the end, as many clamped layers in proportion as the model has
        for name in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
            if limits := published.get(name):
                clamped = round(sum(map(bool, limits)) * size.layers / len(limits))
                data[name] = [0] * (size.layers - clamped) + limits[len(limits) - clamped :]
        return read_config(data, size.name)

    return config


def _k3(size: Size) -> ModelConfig:
    text = {**KIMI_K3, **size.changes}
    text |= {
        "num_hidden_layers": size.layers,
        "num_experts": size.experts,
        "num_experts_per_token": min(text["num_experts_per_token"], size.experts),
        "linear_attn_config": text["linear_attn_config"]
        | _kinds(size.layers, EVERY)
        | {"num_heads": text["num_attention_heads"]},
        # with blocks of 12 layers, few layers would be a single block
        "attn_res_block_size": max(1, min(text["attn_res_block_size"], size.layers // 2)),
    }
    return read_config({"model_type": "kimi_k3", "text_config": text}, size.name)


def _glm(size: Size) -> ModelConfig:
    return glm5_next.make_config({**GLM_FLASH, **size.changes}, size.layers, size.experts)


FAMILIES: Final[dict[str, BenchFamily]] = {
    "kimi-linear": BenchFamily(
        "kimi-linear-48b", "kimi-linear", 8, 32, _kimi(EVERY), "one layer in four with latent attention"
    ),
    "all-mla": BenchFamily(
        "all-mla-48b", "kimi-linear", 8, 32, _kimi(1), "the same with latent attention in every layer",
        comparable=False,  # it aborts at the first decode of a model without KDA layers
    ),
    "deepseek2": BenchFamily(  # for engines without KDA; this architecture requires a rank
        "deepseek2-48b", "deepseek2", 8, 32, _kimi(1, 1536), "latent attention and experts without KDA"
    ),
    "ling-3.0-tiny": BenchFamily(
        "ling-3.0-tiny", "bailingmoe3", 24, 128, _ling(LING_TINY), "the whole model", gate=BOUNDED_POSITIVE,
        tiny=TINY | {"q_lora_rank": TINY_Q_RANK, "n_group": 4, "topk_group": 2},
    ),
    "ling-3.0-flash": BenchFamily(
        "ling-3.0-flash", "bailingmoe3", 12, 32, _ling(LING_FLASH), "12 of its 42 layers, 32 of its 512 experts",
        gate=BOUNDED_POSITIVE,
        tiny=TINY | {"first_k_dense_replace": 1, "layer_group_size": 4, "n_group": 4, "topk_group": 2},
    ),
    "glm-5.3-flash": BenchFamily(
        "glm-5.3-flash", glm5_next.ARCHITECTURE, 8, 32, _glm, "8 of its 45 layers, 32 of its 288 experts", gate=BOUNDED,
        tiny=TINY | {"q_lora_rank": TINY_Q_RANK, "num_dense_layers": 1, "index_n_heads": 4},
        outputs=glm5_next.outputs, keys=glm5_next.keys,
    ),
    "kimi-k3": BenchFamily(
        "kimi-k3", "kimi-k3", 4, 32, _k3, "4 of its 93 layers, 32 of its 896 experts", gate=BOUNDED,
        tiny=TINY | {"q_lora_rank": TINY_Q_RANK, "routed_expert_hidden_size": 256, "num_shared_experts": 1},
    ),
}  # fmt: skip
COMPARABLE: Final = tuple(name for name, family in FAMILIES.items() if family.comparable)
ARCHITECTURES: Final = tuple(dict.fromkeys(family.architecture for family in FAMILIES.values()))
