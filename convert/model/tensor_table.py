"""What a family's table of tensors is made of: canonical hub names and shapes, and what each becomes in a GGUF file.

Input: a `Table` and a `ModelConfig`. Output: all tensors of the GGUF file with their sources, shape (ggml order,
fastest dimension first) and transform. The tables are in the families' modules (kimi_linear.py, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.engine.tensor_types import TensorType


class Transform(Enum):
    """How the elements of the sources become those of the output, in output order."""

    COPY = "copy"
    NEG_EXP = "-exp"  # A_log -> A, the factor of the log-gate
    EXP = "exp"  # A_log -> A where the log-gate is bounded by a sigmoid
    K_OF_KV = "k part, transposed per head"  # kv_b [heads*(nope+v), rank] -> [heads, rank, nope]
    V_OF_KV = "v part per head"  # kv_b [heads*(nope+v), rank] -> [heads, v, rank]
    PRODUCT = "product"  # with the row's factor, element by element in float32


@dataclass(frozen=True)
class Row:
    """One GGUF tensor; shapes are words of `dimensions`."""

    hub: str
    shape: str  # of one source, row-major
    gguf: str
    ne: str = ""  # of the output, ggml order; empty: the source's shape reversed
    transform: Transform = Transform.COPY
    always_f32: bool = False  # read by the graph in F32 only, or too small and sensitive to round
    factor: tuple[str, str] | None = None  # hub name and shape of the second factor of a PRODUCT


@dataclass(frozen=True)
class Group:
    """Rows of the same layers; {i} in a name is the layer, {e} the expert."""

    has: Callable[[ModelConfig, int], bool]  # whether the layer has these rows
    hub: str  # prefix of every row's hub name, after "model.layers.{i}."
    rows: tuple[Row, ...]


f32 = partial(Row, always_f32=True)


@dataclass(frozen=True)
class Table:
    """All tensors of a family, in the order of the file."""

    embedding: Row
    layers: tuple[Group, ...]
    last: tuple[Row, ...] | Callable[[ModelConfig], tuple[Row, ...]]  # between the layers and the head
    head: Row  # the output matrix
    sizes: Callable[[ModelConfig], dict[str, int]] = lambda config: {}  # of words beyond `dimensions`


def is_mla(config: ModelConfig, layer: int) -> bool:
    return config.blocks[layer] is LayerKind.MLA


def is_kda(config: ModelConfig, layer: int) -> bool:
    return config.blocks[layer] is LayerKind.KDA


FLOAT32: Final = (".A_log", ".dt_bias")  # F32 in the published checkpoints, all others BF16


@dataclass(frozen=True)
class Output:
    """A GGUF tensor before its type is chosen."""

    name: str
    ne: tuple[int, ...]  # ggml order
    sources: tuple[str, ...]  # canonical hub names, their elements one after the other
    source_shape: tuple[int, ...]  # of each source, row-major
    transform: Transform
    always_f32: bool
    factor: tuple[str, tuple[int, ...]] | None = None  # the second source of a PRODUCT, and its shape

    @property
    def inputs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every canonical tensor that is read, with its shape."""
        yield from ((source, self.source_shape) for source in self.sources)
        if self.factor is not None:
            yield self.factor

    @property
    def columns(self) -> int:
        """Columns with separate importances: those of each expert or head."""
        return self.ne[0] * (self.ne[2] if len(self.ne) > 2 else 1)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file, its type chosen."""

    output: Output
    type: TensorType
    nbytes: int

    @property
    def name(self) -> str:
        return self.output.name


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The sizes that the table's shapes name."""
    return {
        "1": 1,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "conv": config.conv_kernel_size,
        "kda": config.kda_num_heads * config.kda_head_dim,
        "kda_head": config.kda_head_dim,
        "kda_heads": config.kda_num_heads,
        "heads": config.num_heads,
        "nope": config.qk_nope_head_dim,
        "v": config.v_head_dim,
        "latent": config.kv_lora_rank,
        "latent_rope": config.kv_lora_rank + config.qk_rope_head_dim,
        "mla_q": config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
        "mla_kv": config.num_heads * (config.qk_nope_head_dim + config.v_head_dim),
        "mla_v": config.num_heads * config.v_head_dim,
        "q_rank": config.q_lora_rank or 0,
        "ffn": config.intermediate_size,
        "expert": config.moe_intermediate_size,
        "experts": config.num_experts,
        "shared": config.moe_intermediate_size * config.num_shared_experts,
    }


def outputs_of(table: Table, config: ModelConfig) -> Iterator[Output]:
    """Every tensor of the GGUF file in the order of the file: embedding, layers, output norm, output."""
    sizes = dimensions(config) | table.sizes(config)

    def shape_of(words: str) -> tuple[int, ...]:
        return tuple(sizes[word] for word in words.split())

    def make(row: Row, layer: int = 0, hub: str = "", gguf: str = "") -> Output:
        shape = shape_of(row.shape)
        experts = config.num_experts if "{e}" in row.hub else 1
        return Output(
            name=gguf + row.gguf,
            ne=shape_of(row.ne) or shape[::-1],
            sources=tuple((hub + row.hub).format(i=layer, e=e) for e in range(experts)),
            source_shape=shape,
            transform=row.transform,
            always_f32=row.always_f32,
            factor=((hub + row.factor[0]).format(i=layer), shape_of(row.factor[1])) if row.factor else None,
        )

    yield make(table.embedding)
    for layer in range(len(config.blocks)):
        for group in table.layers:
            if group.has(config, layer):
                hub, gguf = "model.layers.{i}." + group.hub, f"blk.{layer}."
                yield from (make(row, layer, hub, gguf) for row in group.rows)
    last = table.last if isinstance(table.last, tuple) else table.last(config)
    yield from map(make, (*last, table.head))
