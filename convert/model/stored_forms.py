"""Reads a config's `quantization_config`: in which form the weights of each module are stored.

Input: the object, of the methods fp8 (DeepSeek's blocks, and Ling's with experts in MXFP4), compressed-tensors and
modelopt. Output: `Forms`, which gives the form of a module by its name; or `ConvertError` for what is not read, named.
Sources: transformers' FineGrainedFP8Config; compressed-tensors 0.20 (QuantizationConfig, utils/match.py); NVIDIA's
ModelOpt (hf_quant_config.json).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kimi_gguf.convert.model.config_keys import Keys

CONFIG: Final = "quantization_config"
FP8, INT8, PACKED, E2M1 = "F8_E4M3", "I8", "I32", "U8"  # dtypes of the elements; the last is two per byte
EXPERT: Final = re.compile(r".*\.experts\.\d+\.\w+")
_OTHERS: Final = {
    "awq": "AutoAWQ's format", "gptq": "GPTQ's format", "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "aqlm": "AQLM",
    "quanto": "Quanto", "eetq": "EETQ", "torchao": "torchao", "quark": "AMD's Quark", "auto-round": "AutoRound",
    "fbgemm_fp8": "FBGEMM", "mxfp4": "OpenAI's MXFP4", "vptq": "VPTQ", "spqr": "SpQR", "bitnet": "BitNet",
}  # fmt: skip
_TODO: Final = (
    "fp8, compressed-tensors and modelopt are read: convert such a checkpoint, or the unquantized one"
)


@dataclass(frozen=True)
class Form:
    """How a matrix [rows, columns] is stored: elements, and a scale for each block of them."""

    elements: str  # dtype
    bits: int
    suffix: str  # of the name of the elements, after `weight`
    scales: str  # suffix of the scales, which have a number per block
    block: tuple[int | None, int | None]  # rows and columns of a block; None: all
    zeros: bool = False  # the elements of a block have a zero point, `weight_zero_point`
    whole: str | None = None  # suffix of a factor of the whole matrix
    divides: bool = False  # the scales are divided by that factor
    mxfp4: bool = False  # the scales are exponents: ggml has this type

    @property
    def kind(self) -> str:
        """Its short name."""
        return {FP8: "FP8", E2M1: "MXFP4" if self.mxfp4 else "NVFP4"}.get(self.elements, f"int{self.bits}")

    def __str__(self) -> str:
        rows, columns = ("all" if size is None else str(size) for size in self.block)
        where = {("all", "all"): "matrix", ("1", "all"): "row"}.get((rows, columns))
        return f"{self.kind} with a scale per {where or f'{rows} x {columns} elements'}"


Forms = Callable[[str], Form | None]  # of a module by its name; None if it is not quantized


def read_forms(keys: Keys) -> Forms | None:
    """The forms that the config describes; None without a quantization. Raises `ConvertError`."""
    config = keys.get(CONFIG)
    if config is None:
        return None
    keys.require(isinstance(config, Mapping), CONFIG, "an object", config)
    method = config.get("quant_method")
    if method not in _METHODS:
        name = _OTHERS.get(method, method) if isinstance(method, str) else method
        raise keys.fail(f"{CONFIG}.quant_method", " or ".join(map(repr, _METHODS)), name, _TODO)
    return _METHODS[method](_Reader(keys, CONFIG, config))


@dataclass(frozen=True)
class _Reader:
    """An object of the config, with its place for errors."""

    keys: Keys
    where: str
    data: Mapping[str, Any]

    def get(self, name: str, expected: str, holds: Callable[[Any], bool], todo: str = _TODO) -> Any:
        value = self.data.get(name)
        self.keys.require(holds(value), f"{self.where}.{name}", expected, value, todo)
        return value

    def one_of(self, name: str, *values: object) -> Any:
        expected = " or ".join("nothing" if value is None else repr(value) for value in values)
        return self.get(
            name, expected, lambda value: any(value == v and type(value) is type(v) for v in values)
        )

    def names(self, name: str) -> list[str]:
        def holds(value: Any) -> bool:
            return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))

        return list(self.get(name, "a list of names", holds) or ())

    def size(self, name: str) -> int:
        return int(
            self.get(
                name, "a number from 1 to 65536", lambda value: type(value) is int and 0 < value <= 65536
            )
        )

    def block(self, name: str, optional: bool = False) -> tuple[int, int] | None:
        """Rows and columns of a block."""

        def holds(value: Any) -> bool:
            sizes = isinstance(value, list) and len(value) == 2
            return (optional and value is None) or (sizes and all(type(n) is int and n > 0 for n in value))

        sizes = self.get(name, "two sizes, or nothing" if optional else "two sizes", holds)
        return (sizes[0], sizes[1]) if sizes else None

    def object(self, name: str) -> _Reader:
        return _Reader(
            self.keys, f"{self.where}.{name}", self.get(name, "an object", lambda v: isinstance(v, Mapping))
        )


def _fp8(config: _Reader) -> Forms:
    config.one_of("fmt", "e4m3", None)
    # without blocks transformers writes a scale of the whole matrix
    form = Form(FP8, 8, "", "_scale_inv", config.block("weight_block_size", optional=True) or (None, None))
    experts = None
    if config.one_of("routed_experts_quant_method", None, "mxfp4", "fp8") == "mxfp4":
        group = config.size("routed_experts_group_size")
        config.keys.require(group == 32, f"{CONFIG}.routed_experts_group_size", "32", group)
        experts = Form(E2M1, 4, "", "_scale_inv", (1, 32), mxfp4=True)
    kept = config.names("modules_to_not_convert")

    def of(module: str) -> Form | None:
        if any(module == name or module.endswith(f".{name}") or f"{name}." in module for name in kept):
            return None
        return experts if experts and EXPERT.fullmatch(module) else form

    return of


def _compressed(config: _Reader) -> Forms:
    for name in ("kv_cache_scheme", "transform_config"):
        config.get(name, "nothing", lambda value: not value)
    config.get("sparsity_config", "nothing", lambda value: not value or value == {"format": "dense"})
    default, groups = config.data.get("format"), config.object("config_groups")
    found: list[tuple[list[str], Form]] = []
    for name in groups.data:
        group = groups.object(name)
        form = _weights(group.object("weights"), group.data.get("format") or default)
        found.append((group.names("targets"), form))
    ignored = config.names("ignore")

    def rank(module: str, target: str) -> int:
        """How closely a target names a module: by name, by pattern, by class; 0 if it does not."""
        if target.startswith("re:"):
            return 2 * bool(re.match(target[3:], module))
        return 3 if target == module else int(target == "Linear")

    def of(module: str) -> Form | None:
        if any(rank(module, target) > 1 for target in ignored):
            return None
        ranked = [(rank(module, target), form) for targets, form in found for target in targets]
        best = max((number for number, _ in ranked), default=0)
        return next((form for number, form in ranked if number == best), None) if best else None

    for target in [*ignored, *(target for targets, _ in found for target in targets)]:
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            raise config.keys.fail(CONFIG, "patterns of names", target, str(error)) from None
    return of


def _weights(weights: _Reader, format: object) -> Form:
    """The form of a group of compressed-tensors."""
    kind, bits = weights.one_of("type", "int", "float"), weights.one_of("num_bits", 4, 8)
    symmetric = weights.one_of("symmetric", True, False, None) is not False
    weights.one_of("actorder", None, "weight", "static")
    strategy = weights.one_of("strategy", "tensor", "channel", "group", "block", "tensor_group")
    block: tuple[int | None, int | None] = {"tensor": (None, None), "channel": (1, None)}.get(
        strategy, (1, 1)
    )
    if strategy in ("group", "tensor_group"):
        block = (1, weights.size("group_size"))
    elif strategy == "block":
        block = weights.block("block_structure") or block
    forms = {
        ("pack-quantized", "int"): Form(PACKED, bits, "_packed", "_scale", block, zeros=not symmetric),
        ("int-quantized", "int"): Form(INT8, 8, "", "_scale", block, zeros=not symmetric),
        ("float-quantized", "float"): Form(FP8, 8, "", "_scale", block),
        ("nvfp4-pack-quantized", "float"): Form(
            E2M1, 4, "_packed", "_scale", block, whole="_global_scale", divides=True
        ),
        ("mxfp4-pack-quantized", "float"): Form(E2M1, 4, "_packed", "_scale", block, mxfp4=True),
    }
    form = forms.get((str(format), kind))
    fits = {FP8: bits == 8, INT8: bits == 8, E2M1: bits == 4 and block[0] == 1 and block[1] in (16, 32)}
    if form is None or not fits.get(form.elements, True) or (form.mxfp4 and block != (1, 32)):
        expected = "one of " + ", ".join(sorted({name for name, _ in forms}))
        raise weights.keys.fail(
            f"{weights.where}: format", expected, f"{format}, {kind}{bits}, {strategy}", _TODO
        )
    return form


def _modelopt(config: _Reader) -> Forms:
    algorithm = config.one_of("quant_algo", "FP8", "NVFP4")
    config.one_of("kv_cache_quant_algo", None)
    form = Form(FP8, 8, "", "_scale", (None, None))
    if algorithm == "NVFP4":
        form = Form(E2M1, 4, "", "_scale", (1, 16), whole="_scale_2")
    kept = [*config.names("exclude_modules"), *config.names("ignore")]
    patterns = [re.compile(".*".join(map(re.escape, name.split("*")))) for name in kept]
    return lambda module: None if any(pattern.fullmatch(module) for pattern in patterns) else form


_METHODS: Final = {"fp8": _fp8, "compressed-tensors": _compressed, "modelopt": _modelopt}
