"""Reads keys of a config.json and checks their values; every error names the file and the key.

Input: the JSON object. Output: `Keys`, and readers of what several families write alike: the lists of layers, the
end tokens, the settings that llama.cpp's graph supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError, excerpt
from kimi_gguf.convert.model.config import LayerKind, ModelConfig

# Settings for which the graph supports one value only; an absent key, or null, means this value.
Supported = Sequence[tuple[tuple[str, ...], Any, str]]  # names of the key, the value, what the graph does

LINEAR: Final = "linear_attn_config"
ROPE: Final = "rope_parameters"
SCALING: Final = "rope_scaling"
# Names that other linear-attention configs use for separate sizes of KDA's keys and values.
KDA_OTHER_SIZES: Final = tuple(
    f"{prefix}{name}"
    for prefix in (f"{LINEAR}.", "linear_")
    for name in ("head_k_dim", "key_head_dim", "head_v_dim", "value_head_dim")
)
MAX_LAYERS: Final = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_EXPERTS: Final = 1024  # llama.cpp's LLAMA_MAX_EXPERTS
MAX_INT: Final = 2**31 - 1
MAX_KEY: Final = 120  # characters of a key in a message; the file determines some of the names
ABSENT: Final = object()

_LAYER_TYPES: Final = {"linear_attention": LayerKind.KDA, "full_attention": LayerKind.MLA}
_MLP_TYPES: Final = ("dense", "sparse")


class Keys:
    """The keys of the config with their checks; every error names the file and the key.

    The keys of the inner objects are named `object.key`.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.data = dict(data)
        for name in (LINEAR, ROPE, SCALING):
            inner = data.get(name)
            if isinstance(inner, Mapping):
                self.data |= {f"{name}.{key}": value for key, value in inner.items()}
            elif inner is not None:
                raise self.fail(name, "an object", inner)

    def fail(self, key: str, expected: str, found: Any, todo: str = "correct the config") -> ConvertError:
        text = "nothing" if found is None else _shown(found)
        key = key if key.isprintable() and len(key) <= MAX_KEY else excerpt(key)
        return ConvertError(f"{self.where}: {key}", expected=expected, found=text, todo=todo)

    def require(self, holds: bool, key: str, expected: str, found: Any, *todo: str) -> None:
        if not holds:
            raise self.fail(key, expected, found, *todo)

    def get(self, *names: str) -> Any:
        """The value of whichever of `names` exists, or None. Raises `ConvertError` if two of them differ."""
        found = [(name, self.data[name]) for name in names if self.data.get(name) is not None]
        for name, value in found[1:]:
            first, expected = found[0]
            if value != expected or type(value) is not type(expected):
                raise ConvertError(
                    f"{self.where}: {first} is {excerpt(expected)} but {name} is {excerpt(value)}",
                    todo="both keys mean the same: make them agree",
                )
        return found[0][1] if found else None

    def integer(self, *names: str, low: int = 1, high: int = MAX_INT, default: Any = ABSENT) -> Any:
        value = self.get(*names)
        if value is None and default is not ABSENT:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(names[0], f"an integer from {low} to {high}", value)
        return value

    def number(self, *names: str, default: Any = ABSENT) -> float:
        value = self.get(*names)
        if value is None and default is not ABSENT:
            value = default
        if type(value) not in (int, float) or not 1e-30 < value < 1e30:  # the file has it in float32
            raise self.fail(names[0], "a positive number from 1e-30 to 1e30", value)
        return float(value)

    def negative(self, name: str, *todo: str) -> float:
        value = self.get(name)
        valid = type(value) in (int, float) and -1e30 < value < -1e-30  # the file has it in float32
        self.require(valid, name, "a negative number from -1e30 to -1e-30", value, *todo)
        return float(value)


def _shown(value: Any) -> str:
    """A value for a message; booleans as in JSON."""
    return str(value).lower() if isinstance(value, bool) else excerpt(value)


def check_supported(keys: Keys, supported: Supported) -> None:
    """Raise `ConvertError` if a setting has a value that the graph does not support."""
    for names, value, why in supported:
        found = keys.get(*names)
        same = found is None or (found == value and type(found) is type(value))
        keys.require(same, names[0], _shown(value), found, f"llama.cpp cannot run this: {why}")


def boolean(keys: Keys, name: str, default: bool) -> bool:
    value = keys.get(name)
    keys.require(value is None or type(value) is bool, name, "true or false", value)
    return default if value is None else bool(value)


def end_tokens(keys: Keys, vocab_size: int) -> tuple[int, ...]:
    value = keys.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        raise keys.fail("eos_token_id", f"a token id below {vocab_size}, or a list of them", value)
    return tuple(ids)


def common_fields(keys: Keys, groups: int) -> dict[str, Any]:
    """The fields of a `ModelConfig` that all families write alike; groups: those of experts."""
    vocab_size = keys.integer("vocab_size")
    eos = end_tokens(keys, vocab_size)
    return {
        "hidden_size": keys.integer("hidden_size"),
        "vocab_size": vocab_size,
        "rms_norm_eps": keys.number("rms_norm_eps"),
        "num_heads": keys.integer("num_attention_heads"),
        "q_lora_rank": keys.integer("q_lora_rank", default=None),
        "kv_lora_rank": keys.integer("kv_lora_rank"),
        "qk_nope_head_dim": keys.integer("qk_nope_head_dim"),
        "qk_rope_head_dim": keys.integer("qk_rope_head_dim"),
        "v_head_dim": keys.integer("v_head_dim"),
        "intermediate_size": keys.integer("intermediate_size"),
        "moe_intermediate_size": keys.integer("moe_intermediate_size"),
        "num_expert_groups": groups,
        "topk_groups": keys.integer("topk_group", default=1 if groups == 1 else ABSENT),
        "routed_scaling_factor": keys.number("routed_scaling_factor"),
        "bos_token_id": keys.integer("bos_token_id", low=0, high=vocab_size - 1, default=None),
        "eos_token_id": eos[0] if eos else None,
        "pad_token_id": keys.integer("pad_token_id", low=0, high=vocab_size - 1, default=None),
        "more_eos_token_ids": eos[1:],
        "tie_word_embeddings": boolean(keys, "tie_word_embeddings", default=False),
    }


def layer_kinds(keys: Keys, num_layers: int) -> tuple[LayerKind, ...]:
    """One kind per layer, from the 1-based lists, the 0-based `layer_types`, or both."""
    kda_key, mla_key = f"{LINEAR}.kda_layers", f"{LINEAR}.full_attn_layers"
    lists = {kda_key: LayerKind.KDA, mla_key: LayerKind.MLA}
    counted: dict[int, LayerKind] = {}
    for key, kind in lists.items():
        numbers = keys.get(key)
        if numbers is None:
            continue
        keys.require(isinstance(numbers, list), key, "a list of layer numbers", numbers)
        for number in numbers:
            valid = type(number) is int and 1 <= number <= num_layers
            keys.require(valid, key, f"layer numbers from 1 to {num_layers} (the first layer is 1)", number)
            if number in counted:
                raise ConvertError(
                    f"{keys.where}: layer {number} (counted from 1) appears twice in {kda_key} and {mla_key}",
                    todo="list each layer once",
                )
            counted[number] = kind
    types = keys.get("layer_types")
    if types is not None:
        valid = isinstance(types, list) and all(isinstance(t, str) and t in _LAYER_TYPES for t in types)
        keys.require(valid, "layer_types", f"a list of {' and '.join(map(repr, _LAYER_TYPES))}", types)
        count, expected = len(types), f"{num_layers} entries (num_hidden_layers)"
        keys.require(count == num_layers, "layer_types", expected, f"{count} entries")
    elif all(keys.get(key) is None for key in lists):
        raise keys.fail(f"{kda_key} and {mla_key}", "two lists of layers (or layer_types)", None)
    if counted or types is None:
        missing = [number for number in range(1, num_layers + 1) if number not in counted]
        if missing:
            raise ConvertError(
                f"{keys.where}: layer {missing[0]} (counted from 1) is in neither {kda_key} nor {mla_key}",
                todo=f"{len(missing)} of {num_layers} layers are missing; list each layer once",
            )
    from_lists = tuple(counted[number] for number in sorted(counted))
    from_types = tuple(_LAYER_TYPES[t] for t in types) if types is not None else from_lists
    if counted and from_lists != from_types:
        first = next(i for i, (a, b) in enumerate(zip(from_lists, from_types, strict=True)) if a is not b)
        raise ConvertError(
            f"{keys.where}: layer {first + 1} (counted from 1) is {from_lists[first].name} in "
            f"linear_attn_config but {from_types[first].name} in layer_types",
            todo="make them agree",
        )
    return from_types


def dense_layers(keys: Keys, num_layers: int) -> int:
    """How many leading layers have a dense FFN, from `first_k_dense_replace`, `mlp_layer_types` or both."""
    counted = keys.integer("first_k_dense_replace", low=0, high=num_layers, default=None)
    types = keys.get("mlp_layer_types")
    if types is None:
        if counted is None:
            raise keys.fail("first_k_dense_replace", "a number of layers (or mlp_layer_types)", None)
        return int(counted)
    valid = isinstance(types, list) and len(types) == num_layers and all(t in _MLP_TYPES for t in types)
    keys.require(valid, "mlp_layer_types", f"{num_layers} entries of 'dense' or 'sparse'", types)
    dense = int(types.count("dense"))
    todo = "llama.cpp cannot run a dense layer after a sparse one"
    dense_first = "dense" not in types[dense:]
    keys.require(dense_first, "mlp_layer_types", "dense layers first, then sparse ones", types, todo)
    if counted is not None and counted != dense:
        raise ConvertError(
            f"{keys.where}: first_k_dense_replace is {counted} but mlp_layer_types starts with "
            f"{dense} dense layers",
            todo="make them agree",
        )
    return dense


def check_heads(keys: Keys, config: ModelConfig) -> None:
    heads, expected = config.num_heads, f"{config.num_heads}, as num_attention_heads"
    found = keys.integer("num_key_value_heads", default=heads)
    todo = "llama.cpp cannot run latent attention with shared heads"
    keys.require(found == heads, "num_key_value_heads", expected, found, todo)
    if LayerKind.KDA in config.layers:
        todo = "llama.cpp cannot run KDA with another number of heads than attention"
        found = config.kda_num_heads
        keys.require(found == heads, f"{LINEAR}.num_heads", expected, found, todo)
    expected = f"{config.kda_head_dim}, the only KDA head size"
    todo = "llama.cpp cannot run KDA with keys and values of different sizes"
    for key in KDA_OTHER_SIZES:
        found = keys.get(key)
        keys.require(found is None or found == config.kda_head_dim, key, expected, found, todo)


def check_experts(keys: Keys, config: ModelConfig) -> None:
    if config.num_moe_layers == 0:
        return
    shared, used, experts = config.num_shared_experts, config.num_experts_per_token, config.num_experts
    todo = "llama.cpp cannot run this model without a shared expert"
    keys.require(shared > 0, "num_shared_experts", "at least 1", 0, todo)
    keys.require(used <= experts, "num_experts_per_token", f"at most num_experts, {experts}", used)
    groups, kept = config.num_expert_groups, config.topk_groups
    keys.require(kept <= groups, "topk_group", f"at most num_expert_group, {groups}", kept)
    if not config.uses_groups:
        return
    if keys.get("use_grouped_topk") is False:
        raise ConvertError(
            f"{keys.where}: use_grouped_topk is false but {kept} of {groups} groups are kept",
            todo="set num_expert_group and topk_group to 1 if the router has no groups",
        )
    size = experts // groups
    expected = f"a divisor of num_experts, {experts}, with at least two experts per group"
    keys.require(experts % groups == 0 and size >= 2, "num_expert_group", expected, groups)
    expected = f"at most {kept * size}, the experts of {kept} groups"
    keys.require(used <= kept * size, "num_experts_per_token", expected, used)
