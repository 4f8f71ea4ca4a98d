"""Reads adapter_config.json of a PEFT adapter: the ranks and scales of its pairs, and what it cannot be.

Input: the file, as untrusted data. Output: `PeftConfig`, or `ConvertError` for everything that a LoRA adapter of
llama.cpp cannot express. Keys that are not known here are refused unless they are empty: nothing is guessed.
Source: `LoraConfig` of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.source.json_file import read_object

CONFIG: Final = "adapter_config.json"
_MERGE: Final = "merge the adapter with PEFT (merge_and_unload), save the model, and convert that checkpoint"
# Keys that do not change what a saved pair adds to its matrix, or that are read below.
_KNOWN: Final = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path",
    "alora_invocation_tokens", "init_lora_weights", "bias",
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "target_modules_to_tie", "target_parameters", "task_type",
})  # fmt: skip
# What else a config can ask for, and why it is refused.
_REFUSED: Final = {
    "use_dora": "DoRA also trains the magnitudes of whole matrices",
    "modules_to_save": "it holds whole modules next to the pairs",
    "lora_bias": "it trains biases",
    "trainable_token_indices": "it trains rows of the embedding",
    "layer_replication": "it repeats layers of the base model",
}
# Initializations that change the base weights: without those the pairs add to another matrix.
_ALTER_BASE: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PATTERN: Final = re.compile(r"[\w.\\^$|*-]{1,300}")  # nothing that can take long to match


@dataclass(frozen=True)
class PeftConfig:
    """What a PEFT config says of its pairs."""

    file: Path
    rank: int
    alpha: float
    rank_stabilized: bool  # rsLoRA: alpha / sqrt(rank) instead of alpha / rank
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    base: str | None  # the base model: a folder or a hub id
    invocation_tokens: tuple[int, ...]  # aLoRA: active from this sequence on; empty: always
    transposed_parameters: (
        bool  # whether PEFT was older than 0.19, which stored pairs of parameters transposed
    )

    def rank_of(self, *names: str) -> int:
        """The rank of the pair of a module, or of its parameter."""
        return int(_first(self.rank_pattern, names, self.rank))

    def scale_of(self, rank: int, *names: str) -> float:
        """What the product of a pair of this rank is multiplied by."""
        alpha = _first(self.alpha_pattern, names, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _first(patterns: Mapping[str, float], names: tuple[str, ...], default: float) -> float:
    """The value of the first pattern that matches the end of one of the names, as in PEFT."""
    matching = (
        value
        for pattern, value in patterns.items()
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    )
    return next(matching, default)


def read_peft_config(folder: Path) -> PeftConfig:
    """The config in the folder of an adapter. Raises `ConvertError`."""
    file = folder / CONFIG
    if not file.exists():
        raise ConvertError(
            f"{folder}: is not the folder of a PEFT adapter",
            expected=f"a folder with {CONFIG} and adapter_model.safetensors",
            found="a file"
            if folder.is_file()
            else "no such folder"
            if not folder.exists()
            else f"no {CONFIG}",
        )
    data = read_object(file)
    kind = data.get("peft_type")
    if kind != "LORA":
        raise _wrong(file, "peft_type", "LORA", kind, "other types of PEFT have no form in GGUF: " + _MERGE)
    for key, why in _REFUSED.items():
        if data.get(key):
            raise _wrong(file, key, "none", data[key], f"{why}: {_MERGE}")
    if data.get("bias", "none") != "none":
        raise _wrong(file, "bias", "none", data["bias"], f"it trains biases: {_MERGE}")
    begin = data.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_ALTER_BASE):
        todo = "it changed the base weights: save it with path_initial_model_for_weight_conversion"
        raise _wrong(file, "init_lora_weights", "one that keeps the base weights", begin, todo)
    unknown = [key for key, value in data.items() if key not in _KNOWN and key not in _REFUSED and value]
    if unknown:
        raise _wrong(file, unknown[0], "no such key", data[unknown[0]], f"its effect is not known: {_MERGE}")
    base = data.get("base_model_name_or_path")
    return PeftConfig(
        file=file,
        rank=int(_number(file, "r", data.get("r", 8), whole=True)),
        alpha=_number(file, "lora_alpha", data.get("lora_alpha", 8)),
        rank_stabilized=data.get("use_rslora") is True,
        rank_pattern=_patterns(file, "rank_pattern", data, whole=True),
        alpha_pattern=_patterns(file, "alpha_pattern", data, whole=False),
        base=base if isinstance(base, str) and base else None,
        invocation_tokens=_tokens(file, data.get("alora_invocation_tokens")),
        transposed_parameters=_is_old(data.get("peft_version")),
    )


def _patterns(file: Path, key: str, data: Mapping[str, Any], whole: bool) -> dict[str, float]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(file, key, "an object of names and numbers", patterns)
    for pattern in patterns:
        valid = _PATTERN.fullmatch(pattern) is not None
        try:
            re.compile(pattern if valid else "(")
        except re.error:
            raise _wrong(file, key, "names of modules", pattern) from None
    return {pattern: _number(file, f"{key}: {pattern}", value, whole) for pattern, value in patterns.items()}


def _number(file: Path, key: str, value: object, whole: bool = False) -> float:
    is_number = isinstance(value, int) or (isinstance(value, float) and not whole)
    if isinstance(value, bool) or not is_number or not 0 < float(value) < 2**24:  # type: ignore[arg-type]
        raise _wrong(file, key, "a positive whole number" if whole else "a positive number", value)
    return float(value)  # type: ignore[arg-type]


def _is_old(version: object) -> bool:
    """Whether a version of PEFT is below 0.19; those that write none are."""
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 19)


def _tokens(file: Path, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if (
        isinstance(value, list)
        and value
        and all(type(token) is int and 0 <= token < 2**31 for token in value)
    ):
        return tuple(value)
    raise _wrong(file, "alora_invocation_tokens", "token ids", value)


def _wrong(
    file: Path, key: str, expected: str, found: object, todo: str = "the file is damaged"
) -> ConvertError:
    return ConvertError(f"{file}: {key}", expected=expected, found=f"{found!r:.80}", todo=todo)
