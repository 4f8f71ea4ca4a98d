"""The supported families, and the functions that choose between them for the rest of the converter.

Input: a config.json, or a `ModelConfig`. Output: its tensors, GGUF keys, places in a checkpoint, vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model import kimi_k3, kimi_linear, ling3
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.config_keys import Keys
from kimi_gguf.convert.model.family import Family
from kimi_gguf.convert.model.layouts import Place, places
from kimi_gguf.convert.model.tensor_table import Output, outputs_of
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.source.json_file import parse_object

FAMILIES: Final = (kimi_linear.FAMILY, ling3.FAMILY, kimi_k3.FAMILY)
BY_ARCHITECTURE: Final = {family.architecture: family for family in FAMILIES}
_BY_MODEL_TYPE: Final = {name: family for family in FAMILIES for name in family.model_types}


def family_of(config: ModelConfig) -> Family:
    """The family of a config."""
    return BY_ARCHITECTURE[config.architecture]


def read_config(source: str | bytes | Mapping[str, Any], where: str) -> ModelConfig:
    """Read and check the config.json of any family; `where` names the file in errors.

    Raises `ConvertError` for a key that is missing, contradicts another key, or requires something that llama.cpp's
    graph for the architecture does not compute.
    """
    data = parse_object(source, where) if isinstance(source, str | bytes) else source
    keys = Keys(data, where)
    model = keys.get("model_type")
    family = _BY_MODEL_TYPE.get(model) if isinstance(model, str) else None
    expected = " or ".join(repr(name) for name in _BY_MODEL_TYPE)
    if family is None:
        why = "the other models of llama.cpp, without KDA, are converted by its convert_hf_to_gguf.py"
        raise keys.fail("model_type", expected, model, why)
    if isinstance(data.get("quantization"), dict):
        raise ConvertError(
            f"{where}: quantization: is an MLX conversion",
            todo="convert the checkpoint that it was made from",
        )
    return family.read_config(keys)


def outputs(config: ModelConfig) -> Iterator[Output]:
    """Every tensor of the GGUF file in the order of the table: embedding, layers, output norm, output."""
    return outputs_of(family_of(config).table, config)


def hub_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical hub name -> row-major shape of every tensor that a checkpoint of this config holds."""
    return {name: shape for output in outputs(config) for name, shape in output.inputs}


def places_of(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[Place]:
    """The places of the canonical tensor `name` in the layouts of the family, the hub's own first."""
    return places(family_of(config).rules, name, shape, config.num_experts)


def load_vocab(folder: Path, config: ModelConfig) -> Vocab:
    """The vocabulary of the checkpoint in `folder`, `config.vocab_size` tokens long. Raises `ConvertError`."""
    return family_of(config).load_vocab(folder, config)
