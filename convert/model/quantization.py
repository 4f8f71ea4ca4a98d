"""Reads a config's `quantization_config`: which packed weights the checkpoint may hold.

Input: the keys of the model that has it. Output: whether routed experts may be in MXFP4; `ConvertError` for any other
format, named. Source: the format `mxfp4-pack-quantized` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kimi_gguf.convert.model.config_keys import Keys

CONFIG: Final = "quantization_config"
METHOD: Final = "compressed-tensors"
FORMAT: Final = "mxfp4-pack-quantized"
_TODO: Final = f"only {METHOD} in {FORMAT} is read; dequantise other checkpoints first"
# Keys with their only value; None: the key must be absent, null or empty.
_WHOLE: Final[tuple[tuple[str, Any], ...]] = (
    ("quant_method", METHOD),
    ("format", FORMAT),
    ("kv_cache_scheme", None),
    ("sparsity_config", None),
    ("transform_config", None),  # rotations of weights and activations
)
_GROUP: Final[tuple[tuple[str, Any], ...]] = (
    ("input_activations", None),
    ("output_activations", None),
)
_WEIGHTS: Final[tuple[tuple[str, Any], ...]] = (
    ("num_bits", 4),
    ("type", "float"),
    ("group_size", 32),
    ("symmetric", True),
    ("strategy", "group"),
)
_OPTIONAL: Final[tuple[tuple[str, Any], ...]] = (
    ("dynamic", False),
    ("scale_dtype", "torch.uint8"),
)
_UNUSED: Final[tuple[tuple[str, Any], ...]] = (
    ("actorder", None),
    ("block_structure", None),
    ("zp_dtype", None),
)


def mxfp4_experts(keys: Keys) -> bool:
    """Whether the config describes weights in MXFP4. Raises `ConvertError` for any other quantization."""
    config = keys.get(CONFIG)
    if config is None:
        return False
    inner = _object(keys, CONFIG, config)
    _check(keys, CONFIG, inner, _WHOLE)
    groups = _object(keys, f"{CONFIG}.config_groups", inner.get("config_groups"))
    keys.require(bool(groups), f"{CONFIG}.config_groups", "one group or more", groups)
    for name, value in groups.items():
        where = f"{CONFIG}.config_groups.{name}"
        group = _object(keys, where, value)
        _check(keys, where, group, _GROUP)
        _check(keys, where, group, (("format", FORMAT),), optional=True)
        weights = _object(keys, f"{where}.weights", group.get("weights"))
        _check(keys, f"{where}.weights", weights, (*_WEIGHTS, *_UNUSED))
        _check(keys, f"{where}.weights", weights, _OPTIONAL, optional=True)
    ignore = inner.get("ignore")
    names = ignore is None or (isinstance(ignore, list) and all(isinstance(name, str) for name in ignore))
    keys.require(names, f"{CONFIG}.ignore", "a list of names", ignore)
    return True


def _object(keys: Keys, name: str, value: Any) -> Mapping[str, Any]:
    keys.require(isinstance(value, Mapping), name, "an object", value)
    found: Mapping[str, Any] = value
    return found


def _check(
    keys: Keys,
    where: str,
    values: Mapping[str, Any],
    expected: tuple[tuple[str, Any], ...],
    optional: bool = False,
) -> None:
    for name, wanted in expected:
        found = values.get(name)
        if wanted is None:
            keys.require(found is None or found in ({}, [], ""), f"{where}.{name}", "nothing", found, _TODO)
        elif not (optional and found is None):
            same = found == wanted and type(found) is type(wanted)
            keys.require(same, f"{where}.{name}", repr(wanted).lower(), found, _TODO)
