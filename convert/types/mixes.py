"""Which tensor gets which type: llama-quantize's mixes for the KDA family, as one table and a few rules.

Input: the config, the outputs in file order, and a `TypeRequest` (file type and the user's options). Output: the type
of every tensor, as in `llama_tensor_get_type` of llama.cpp's `src/llama-quant.cpp` without the rules for other
architectures; and `RECIPES`, the project's own mixes, by the name that `--recipe` accepts. What only one family has is
in its `Family`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.families import family_of
from kimi_gguf.convert.model.tensor_table import Output
from kimi_gguf.convert.types.file_types import TYPES, FileType
from kimi_gguf.engine.tensor_types import BF16, F16, TENSOR_TYPES, TensorType


@dataclass(frozen=True)
class TypeRequest:
    """The requested types; the options are those of llama-quantize."""

    file_type: FileType
    output_type: TensorType | None = None  # of output.weight
    embedding_type: TensorType | None = None  # of token_embd.weight
    overrides: tuple[tuple[str, TensorType], ...] = ()  # (regular expression, type); the first that matches
    pure: bool = False  # no mix: the base type of the file type for every tensor
    recipe: str | None = None  # the name in `RECIPES`, if the request came from there
    default: bool = False  # nothing was requested: packed experts keep their type (see `as_stored`)


@dataclass(frozen=True)
class Site:
    """The position of a tensor, as the rules need it."""

    index: int  # its layer; without experts, the number of tensors of its kind before it
    nth: int  # the number of tensors of its kind before it
    count: int  # layers; for attn_v, the number of these tensors
    gqa: int  # query heads per key-value head in the first layer; 0 if that is recurrent
    experts: int
    importances: bool  # whether there is an importance matrix

    @property
    def first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth, and every third layer in between."""
        return not self.middle or (self.index - self.count // 8) % 3 == 2

    @property
    def middle(self) -> bool:
        return self.count // 8 <= self.index < 7 * self.count // 8


# Kinds of tensors, by a part of their names; the first match counts.
_KINDS: Final = (
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "o"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
_FFN: Final = frozenset({"up", "gate", "down"})
_COUNTED: Final = _FFN | {"v"}
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"

# A row: kinds, file types ("*" any but the lowest), condition, the type. The first matching row counts; without one
# the tensor has the base type.
_LOWEST: Final = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
_IQ2_SM: Final = "IQ2_S IQ2_M"
_EIGHT_O: Final = "Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS"


def _always(site: Site) -> bool:
    return True


def _eight(site: Site) -> bool:
    """The rules made for the first mixtures of experts, which had eight."""
    return site.experts == 8


def _shared_heads(site: Site) -> bool:
    return site.gqa >= 4


_RULES: Final[tuple[tuple[str, str, Callable[[Site], bool], str], ...]] = (
    ("v", _LOWEST, lambda s: s.gqa >= 4 or s.experts >= 4, "Q4_K"),
    ("v", _IQ2_SM, _always, "IQ3_S"),
    ("v", _LOWEST, _always, "Q2_K"),
    ("k", _LOWEST, _eight, "Q4_K"),
    ("down", _IQ2_SM, lambda s: s.nth < s.count // 8, "IQ3_S"),
    ("down", _LOWEST, lambda s: s.nth < s.count // 8, "Q2_K"),
    ("o", _LOWEST, _eight, "Q5_K"),
    ("o", "IQ1_S IQ1_M", _always, "IQ2_XXS"),
    ("o", _IQ2_SM, _always, "IQ3_S"),
    ("v k", "*", _eight, "Q8_0"),
    ("v", "Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", _shared_heads, "Q4_K"),
    ("v", "Q2_K", _always, "Q3_K"),
    ("v", "IQ3_XXS", lambda s: not s.importances, "IQ3_S"),
    ("v", "IQ3_M", _always, "Q4_K"),
    ("v", "Q3_K_M", lambda s: s.nth < 2, "Q5_K"),
    ("v", "Q3_K_M", _always, "Q4_K"),
    ("v", "Q3_K_L", _always, "Q5_K"),
    ("v", "IQ4_NL IQ4_XS", _shared_heads, "Q5_K"),
    ("v", "Q4_K_M Q5_K_M", lambda s: s.more_bits, "Q6_K"),
    ("v", "Q4_K_S", lambda s: s.nth < 4, "Q5_K"),
    ("k q", "IQ3_XS", _always, "IQ3_XXS"),
    ("k q", "IQ3_XXS", _always, "IQ2_S"),
    ("down", "Q2_K", _always, "Q3_K"),
    ("down", "Q2_K_S", lambda s: s.first_eighth, "Q4_K"),
    ("down", "IQ3_XXS", lambda s: not s.importances and s.first_eighth, "Q4_K"),
    ("down", "IQ3_XXS", lambda s: not s.importances, "Q3_K"),
    ("down", "Q3_K_M", lambda s: s.index < s.count // 16, "Q5_K"),
    ("down", "Q3_K_M", _always, "Q4_K"),
    ("down", "IQ3_M", lambda s: s.first_eighth or (s.experts == 8 and s.more_bits), "Q4_K"),
    ("down", "Q3_K_L", _always, "Q5_K"),
    ("down", "Q4_K_M Q5_K_M", lambda s: s.more_bits, "Q6_K"),
    ("down", "IQ4_NL IQ4_XS", lambda s: s.first_eighth and not s.importances, "Q5_K"),
    ("down", "Q4_K_S", lambda s: s.first_eighth, "Q5_K"),
    ("down", "Q4_0", lambda s: s.importances and s.first_eighth, "Q4_1"),
    ("down", "Q5_0", lambda s: s.importances and s.first_eighth, "Q5_1"),
    ("o", _EIGHT_O, _eight, "Q5_K"),
    ("o", "Q2_K", lambda s: s.experts != 8, "Q3_K"),
    ("o", "IQ3_XXS", lambda s: s.experts != 8, "IQ3_S"),
    ("o", "Q3_K_M IQ3_M", lambda s: s.experts != 8, "Q4_K"),
    ("o", "Q3_K_L", lambda s: s.experts != 8, "Q5_K"),
    ("gate up", "IQ3_XS", lambda s: s.middle, "IQ3_XXS"),
)


def _each(names: str, becomes: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), becomes)


_OUTPUT_TYPES: Final = _each(f"{_LOWEST} IQ3_XXS", "Q5_K")
_EMBEDDING_TYPES: Final = (
    _each("IQ2_XXS IQ2_XS IQ1_S IQ1_M", "Q2_K")
    | _each("IQ2_S IQ2_M IQ3_XXS", "IQ3_S")
    | _each("TQ1_0 TQ2_0 Q2_0", "Q4_K")
)
# For rows that are not whole blocks of the type: a type with blocks of 32, and F16 if that does not fit either.
_FALLBACKS: Final = (
    _each("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS", "IQ4_NL")
    | _each("Q2_0 Q2_K Q3_K TQ1_0 TQ2_0", "Q4_0")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)
# Types that llama-quantize refuses without importances, except for embedding and output.
NEED_IMPORTANCES: Final = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})


def choose_types(
    config: ModelConfig, outputs: Sequence[Output], request: TypeRequest, importances: bool
) -> dict[str, TensorType | None]:
    """Tensor name -> its type, None for those that are not quantized and keep their type.

    `outputs` in the order of the file, because some rules count. Raises `ConvertError`.
    """
    patterns = [(_compiled(pattern), kind) for pattern, kind in request.overrides]
    if patterns and not request.file_type.quantized:
        raise ConvertError(
            "--tensor-type",
            expected="a quantized --type",
            found=request.file_type.name,
            todo="llama-quantize ignores it with other types",
        )
    num_v = sum(_kind(output.name) == "v" for output in outputs)
    chooser = _Chooser(config, request, patterns, importances, num_v)
    return {output.name: chooser.choose(output) for output in outputs}


def needs_importances(name: str, kind: TensorType, file_type: FileType) -> bool:
    """Whether llama-quantize refuses to write the tensor in this type without importances."""
    if kind.needs_weights:
        return True
    if name in (_OUTPUT, _EMBEDDING):
        return False
    return kind.name in NEED_IMPORTANCES or (kind.name == "Q2_K" and file_type.name == "Q2_K_S")


def _kind(name: str) -> str | None:
    return next((kind for part, kind in _KINDS if part in name), None)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.lower())
    except (re.error, OverflowError, RecursionError) as error:
        raise ConvertError(f"--tensor-type {pattern!r:.80}: not a regular expression: {error}") from None


@dataclass
class _Chooser:
    """The rules, and the tensors of each kind so far."""

    config: ModelConfig
    request: TypeRequest
    patterns: list[tuple[re.Pattern[str], TensorType]]
    importances: bool
    num_v: int

    def __post_init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.family = family_of(self.config)
        self.layers = len(self.config.blocks)
        self.experts = self.config.num_experts if self.config.num_moe_layers else 0
        self.gqa = self.config.num_heads if self.config.layers[0] is LayerKind.MLA else 0

    def choose(self, output: Output) -> TensorType | None:
        if output.always_f32:
            return None
        request, base = self.request, self.request.file_type.base
        asked = {_EMBEDDING: request.embedding_type, _OUTPUT: request.output_type}.get(output.name)
        if asked is not None:
            if output.ne[0] % asked.block:
                raise ConvertError(
                    f"{output.name}: {asked.name} requires rows of a multiple of {asked.block} values, "
                    f"found {output.ne[0]}",
                    todo="choose another type",
                )
            return asked
        if not base.quantized:
            return base
        if not any(n > 1 for n in output.ne[1:]):  # llama-quantize does not quantize vectors
            return None
        if any(part in output.name for part in self.family.not_quantized):
            return None
        named = next((kind for pattern, kind in self.patterns if pattern.search(output.name)), None)
        if named is None:
            named = base if request.pure else self._mixed(output)
        return _fallback(output, named)

    def _mixed(self, output: Output) -> TensorType:
        mix, base, kind = self.request.file_type.name, self.request.file_type.base, _kind(output.name)
        if any(part in output.name for part in self.family.at_least_q8_0):
            return TENSOR_TYPES["Q8_0"]
        if output.name == _OUTPUT:
            if mix == "MXFP4_MOE" or output.ne[0] % base.block:
                return TENSOR_TYPES["Q8_0"]
            return base if base.name == "Q8_0" else TENSOR_TYPES[_OUTPUT_TYPES.get(mix, "Q6_K")]
        if mix == "MXFP4_MOE":
            several = len(output.ne) > 2 and output.ne[2] > 1
            is_expert = kind in _FFN or not self.family.mxfp4_only_ffn
            return base if several and is_expert else TENSOR_TYPES["Q8_0"]
        if output.name == _EMBEDDING:
            return TENSOR_TYPES[_EMBEDDING_TYPES.get(mix, base.name)]
        if kind is None:
            return base
        site = self._site(output, kind)
        for kinds, mixes, condition, name in _RULES:
            fits = mix in mixes.split() or (mixes == "*" and mix not in _LOWEST.split())
            if fits and kind in kinds.split() and condition(site):
                return TENSOR_TYPES[name]
        return base

    def _site(self, output: Output, kind: str) -> Site:
        nth = self.seen[kind]
        self.seen[kind] += kind in _COUNTED
        by_layer = kind != "v" and self.experts > 1
        return Site(
            index=int(output.name.split(".")[1]) if by_layer else nth,
            nth=nth,
            count=self.num_v if kind == "v" else self.layers,
            gqa=self.gqa,
            experts=self.experts,
            importances=self.importances,
        )


def _fallback(output: Output, kind: TensorType) -> TensorType:
    """The type itself if the rows are whole blocks of it, else the next type for which they are."""
    columns = output.ne[0]
    if columns % kind.block == 0:
        return kind
    if kind.block > 32:
        if kind.name not in _FALLBACKS:
            raise ConvertError(
                f"{output.name}: {kind.name} requires rows of a multiple of {kind.block} values, "
                f"found {columns}, and has no fallback type",
                todo=f"choose one: --tensor-type '{output.name}=Q8_0'",
            )
        kind = TENSOR_TYPES[_FALLBACKS[kind.name]]
    return kind if columns % kind.block == 0 else F16


# All tensors except the routed experts, which have 95 % of the 48B's weights. docs/conversion.md has the measurements.
NOT_EXPERTS: Final = r"^(?!.*_exps\.)"


def _protecting(name: str, experts: str) -> TypeRequest:
    """Experts in the type of a mix; all other tensors, whose errors affect every token, in Q8_0."""
    keep = TENSOR_TYPES["Q8_0"]
    overrides = ((NOT_EXPERTS, keep), ("_exps", TYPES[experts].base))
    return TypeRequest(TYPES[experts], keep, keep, overrides, recipe=name)


# What llama.cpp's converter makes of a checkpoint with routed experts in MXFP4: they keep their type, and all other
# matrices are BF16.
MXFP4: Final = TypeRequest(TYPES["MXFP4_MOE"], BF16, BF16, ((NOT_EXPERTS, BF16),), recipe="mxfp4")
RECIPES: Final = {
    name: _protecting(name, experts)
    for name, experts in (("kimi-q3", "Q3_K_S"), ("kimi-q4", "Q4_K_S"), ("kimi-q5", "Q5_K_S"))
} | {"mxfp4": MXFP4}


def as_stored(request: TypeRequest) -> TypeRequest:
    """The types of a checkpoint with packed experts if none were requested; the user's other options still count."""
    if not request.default:
        return request
    return replace(
        MXFP4,
        output_type=request.output_type or MXFP4.output_type,
        embedding_type=request.embedding_type or MXFP4.embedding_type,
        overrides=(*request.overrides, *MXFP4.overrides),
    )
