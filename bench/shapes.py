"""Defines the generated models: layers of published models' shapes, and the type of every tensor.

Input: a `BenchModel`. Output: its config, GGUF keys and planned tensors in the order of the file. Tensor names and
shapes are those of the converter, or of the family's own table (families.py). The quantization mix is that of
llama-quantize: it runs with --dry-run on a file without data.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gguf import GGUFValueType as ValueType

from kimi_gguf.bench.families import FAMILIES, Size
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.metadata import SIGMOID
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.types.file_types import TYPES as FILE_TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.tensor_types import BF16, F32, TENSOR_TYPES, TensorType
from kimi_gguf.patches.pin import load_pin

GENERATOR = 2  # increment it when the same BenchModel results in a different file

SHAPES = ("full", "tiny")
TYPES = ("Q4_0", "Q4_K_M", "Q8_0", "BF16")

_DRY_RUN_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = [^(]*(?:\((\S+)\))?")


@dataclass(frozen=True)
class BenchModel:
    """The options of a generated model."""

    family: str = "kimi-linear"
    layers: int = 8
    experts: int = 32
    type: str = "Q4_0"
    shapes: str = "full"  # or "tiny"

    @property
    def name(self) -> str:
        """Such as "kimi-linear-48b-8L-32E-Q4_0"."""
        label = FAMILIES[self.family].label if self.shapes == "full" else f"{self.family}-{self.shapes}"
        return f"{label}-{self.layers}L-{self.experts}E-{self.type}"

    @property
    def key(self) -> str:
        """Names the generated file: equal keys, equal files. Raises `ConvertError`."""
        parts = (GENERATOR, load_pin().llama_cpp_commit, asdict(self), repr(config_of(self)))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def chosen_model(
    family: str,
    layers: int | None = None,
    experts: int | None = None,
    kind: str = "Q4_0",
    shapes: str = "full",
) -> BenchModel:
    """A model with the family's own numbers of layers and experts where none is given. kind: of the weights."""
    default = FAMILIES[family]
    return BenchModel(family, layers or default.layers, experts or default.experts, kind, shapes)


def config_of(model: BenchModel) -> ModelConfig:
    """The published configuration with the chosen number of layers and experts. Raises `ConvertError`."""
    family = FAMILIES[model.family]
    changes = family.tiny if model.shapes == "tiny" else {}
    return family.config(Size(model.layers, model.experts, changes, model.name))


def keys_of(model: BenchModel, config: ModelConfig) -> list[Key]:
    """The file's GGUF keys; it has no vocabulary, only the number of its tokens."""
    family = FAMILIES[model.family]
    architecture = family.architecture
    described = (
        ("general.architecture", architecture),
        ("general.type", "model"),
        ("general.name", model.name),
        ("tokenizer.ggml.model", "no_vocab"),
    )
    named = [
        Key(key.name.replace(config.architecture, architecture, 1), key.type, key.value, key.items)
        for key in family.keys(config)
    ]
    if architecture != config.architecture:
        mine = (".kda.", ".ssm.", ".head_count_kv")
        named = [key for key in named if not any(part in key.name for part in mine)]
        named.append(Key(f"{architecture}.attention.head_count_kv", ValueType.UINT32, 1))
    assert any(key.name.endswith("expert_gating_func") and key.value == SIGMOID for key in named)
    return [*(Key(name, ValueType.STRING, value) for name, value in described), *named]


def plan_of(model: BenchModel, types: Mapping[str, TensorType] | None = None) -> Plan:
    """The plan of the file; without `types` all large tensors are BF16."""
    config = config_of(model)
    tensors: list[PlannedTensor] = []
    for output in FAMILIES[model.family].outputs(config):
        chosen = types[output.name] if types else F32 if output.always_f32 else BF16
        tensors.append(PlannedTensor(output, chosen, chosen.nbytes(output.ne)))
    return Plan(TypeRequest(FILE_TYPES["BF16"]), tuple(keys_of(model, config)), tuple(tensors))


def types_in_dry_run(lines: Iterable[str]) -> dict[str, str]:
    """Each tensor's type, by name, in the output of `llama-quantize --dry-run`."""
    matches = [match.groups() for line in lines if (match := _DRY_RUN_LINE.match(line))]
    return {name: (new or old).upper() for name, old, new in matches}


def quantized_types(model: BenchModel, quantize: Path) -> dict[str, TensorType] | None:
    """Each tensor's type as llama-quantize would choose it, by name; None for BF16 tensors, which it keeps.

    quantize: the program. Raises `EngineError` if it fails or prints something unexpected.
    """
    if model.type == "BF16":
        return None
    plan = plan_of(model)
    with tempfile.TemporaryDirectory() as folder:
        sparse = Path(folder) / "sparse.gguf"
        with sparse.open("wb") as file:  # a hole instead of the data
            (whole,) = plan.files
            file.write(whole.header)
            file.truncate(whole.nbytes)
        command = [str(quantize), "--dry-run", str(sparse), model.type]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = (ended.stdout + ended.stderr).splitlines()
    types = {name: TENSOR_TYPES[kind] for name, kind in types_in_dry_run(lines).items()}
    if ended.returncode or set(types) != {tensor.name for tensor in plan.tensors}:
        raise EngineError(
            f"{quantize.name} --dry-run does not print the types of a {model.type} file",
            expected=f"a line for each of {len(plan.tensors)} tensors",
            found=f"{len(types)}, status {ended.returncode}: {lines[-1] if lines else 'no output'}",
            todo="look at the command's own output",
        )
    return types
