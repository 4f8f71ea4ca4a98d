"""The machine's limit: what it was measured to do at best, and how long a cell would take at that.

Flows in: a model's tensors, a cell. Flows out: bytes that must be read, products that must be formed, and the
least time for them. A time near the floor leaves nothing to gain; the share says how near it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.models import ModelFile
from kimi_gguf.bench.programs import ask, ggml_flags, program

F32_BYTES = 4
KDA_STEP = 4  # times D² products of a head and token, one after the other: S'k, S'q, k d', and the decay of S
KDA_CHUNK = 3  # the same in chunks, to leading order: P k, P q and the state's update
CHUNKED_FROM = 32  # tokens
TIMES = 3  # that the limits are measured; the best counts


@dataclass(frozen=True)
class Limits:
    """Of the processor on a number of threads, or of a device; measured, per second."""

    threads: int
    read: float  # bytes from memory
    f32: float  # multiply-adds
    int8: float | None
    bf16: float | None
    f16: float | None = None  # told by devices alone

    @property
    def floats(self) -> float:
        """Multiply-adds a second of floating-point values: on a device of the kind it is fastest at."""
        if self.f16 is None:
            return self.f32
        return max(peak for peak in (self.f32, self.f16, self.bf16, self.int8) if peak is not None)

    def products(self, weights: str) -> float:
        """Multiply-adds a second with weights of a type: 8-bit ones for quantised weights, where there are any."""
        if self.f16 is not None:
            return self.floats  # a device converts weights to whatever it multiplies fastest
        if weights in ("F32", "F16"):  # half floats are multiplied as float32
            return self.f32
        peak = self.bf16 if weights == "BF16" else self.int8
        return peak or self.f32


@dataclass(frozen=True)
class Demand:
    """What one decode of a cell cannot do without."""

    weight_bytes: float
    state_bytes: float  # recurrent states, read and written
    cache_bytes: float
    weight_products: dict[str, float]  # by weight type: multiply-adds
    attention_products: float
    recurrence_products: float

    @property
    def nbytes(self) -> float:
        """All bytes to move."""
        return self.weight_bytes + self.state_bytes + self.cache_bytes

    @property
    def products(self) -> float:
        """All multiply-adds."""
        return sum(self.weight_products.values()) + self.attention_products + self.recurrence_products

    def floor(self, limits: Limits) -> tuple[float, str]:
        """The least time in seconds, and what binds most of it: "memory" or "products".

        Weights, attention and recurrence are nodes of a graph, computed one behind the other; each takes at least
        as long as its bytes or its products, whichever are slower.
        """
        weights = sum(n / limits.products(kind) for kind, n in self.weight_products.items())
        parts = [
            (self.weight_bytes / limits.read, weights),
            (self.cache_bytes / limits.read, self.attention_products / limits.floats),
            (self.state_bytes / limits.read, self.recurrence_products / limits.floats),
        ]
        least = sum(max(part) for part in parts)
        memory = sum(reading for reading, forming in parts if reading >= forming)
        return least, "memory" if memory >= least / 2 else "products"


def mean_of(found: Sequence[Limits]) -> Limits:
    """The mean of several measurements on the same number of threads."""
    return _each(found, lambda rates: sum(rates) / len(rates))


def _each(found: Sequence[Limits], summary: Callable[[list[float]], float]) -> Limits:
    """One figure for each kind out of several."""
    told = [vars(each) for each in found]
    rates: dict[str, Any] = {kind: [each[kind] for each in told if each[kind]] for kind in told[0]}
    rates = {kind: summary(several) if several else None for kind, several in rates.items()}
    return Limits(**rates | {"threads": found[0].threads})


def measure_limits(threads: int, seconds: float = 0.1, times: int = TIMES) -> Limits:
    """Measure this machine, the best of some times. Raises `EngineError`."""
    found = [Limits(**json.loads(ask(program("limits"), str(threads), str(seconds)))) for _ in range(times)]
    return _each(found, max)


def measure_device_limits(device: str, libraries: Path, seconds: float = 0.3) -> Limits | None:
    """What a copy and large products attain there, computed by the ggml of a build; None where it has neither."""
    told = json.loads(ask(program("device", ggml_flags(libraries)), device, str(seconds)))
    return Limits(**told) if told["read"] and told["f32"] and told["f16"] else None


def demand(model: ModelFile, cell: Cell) -> Demand:
    """What a cell's one decode must move and multiply.

    Experts: as many different ones as tokens that choose at random would meet. Attention: the cheaper of the
    absorbed and the decompressed form, its products in float32.
    """
    keys, tokens = model.keys, cell.tokens

    def number(name: str, otherwise: int = 0) -> int:
        value: Any = keys.get(name, otherwise)
        return int(max(value) if isinstance(value, list) else value)

    experts, used = number("expert_count"), number("expert_used_count")
    met = experts * (1 - (1 - used / experts) ** tokens) if experts else 0.0
    weight_bytes, products = 0.0, dict[str, float]()
    for tensor in model.tensors:
        size = math.prod(tensor.ne)
        if tensor.name.startswith("token_embd"):
            weight_bytes += tensor.nbytes / tensor.ne[1] * tokens
            continue
        routed = "_exps." in tensor.name
        weight_bytes += tensor.nbytes * (met / experts if routed else 1)
        if len([n for n in tensor.ne if n > 1]) < 2 or "conv1d" in tensor.name or is_latent(tensor.name):
            continue  # norms and biases; convolutions are next to nothing; k_b and v_b count with attention
        rows = cell.sequences if tensor.name.startswith("output") else tokens
        products[tensor.type] = products.get(tensor.type, 0.0) + size * rows * (
            used / experts if routed else 1
        )
    mla = sum(1 for tensor in model.tensors if tensor.name.endswith("attn_kv_a_norm.weight"))
    kda = sum(1 for tensor in model.tensors if tensor.name.endswith("ssm_norm.weight"))
    heads, head = number("attention.head_count"), number("kda.head_dim")
    state = (
        heads * head * head * F32_BYTES + (number("ssm.conv_kernel", 1) - 1) * 3 * heads * head * F32_BYTES
    )
    latent, rope = number("attention.kv_lora_rank"), number("rope.dimension_count")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[cell.cache_type.upper()]]
    return Demand(
        weight_bytes=weight_bytes,
        state_bytes=2.0 * kda * state * cell.sequences * -(-cell.batch // cell.ubatch),
        cache_bytes=mla * cell.sequences * (cell.depth + cell.batch) * (latent + rope) * block_bytes / block,
        weight_products=products,
        attention_products=mla * attention_products(
            cell, heads, latent, rope, number("attention.key_length_mla") - rope, number("attention.value_length_mla")
        ),
        recurrence_products=kda * heads * head * head * tokens
        * (KDA_CHUNK if cell.batch >= CHUNKED_FROM else KDA_STEP),
    )  # fmt: skip


def is_latent(name: str) -> bool:
    """Whether a tensor expands the latent, or folds the query into it."""
    return name.endswith(("attn_k_b.weight", "attn_v_b.weight"))


def attention_products(cell: Cell, heads: int, latent: int, rope: int, nope: int, value: int) -> float:
    """Multiply-adds of one latent attention layer, in the cheaper form; causal."""
    pairs = cell.batch * (cell.depth + (cell.batch + 1) / 2)
    folding = cell.batch * latent * (nope + value)
    absorbed = pairs * (2 * latent + rope) + folding
    batches = -(-cell.batch // cell.ubatch)
    expanding = batches * (cell.depth + cell.batch) * latent * (nope + value)
    decompressed = pairs * (nope + rope + value) + expanding
    return cell.sequences * heads * min(absorbed, decompressed)
