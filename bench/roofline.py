"""The roofline: the measured peak rates of the machine, and the least time of a cell at these rates.

Input: a model's tensors, a cell. Output: the bytes that the cell must move, its multiply-adds (MACs), and its least
time (the floor). The ratio of floor and measured time is shown as % of roofline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.models import ModelFile
from kimi_gguf.bench.programs import ask, ggml_flags, program
from kimi_gguf.engine.tensor_names import layer_of
from kimi_gguf.engine.tensor_types import TENSOR_TYPES

F32_BYTES = 4
KDA_STEP = 4  # times D² MACs per head and token, token by token: S'k, S'q, k d', and the decay of S
KDA_CHUNK = 3  # the same in chunks, to leading order: P k, P q and the update of the state
CHUNKED_FROM = 32  # tokens
TIMES = 3  # measurements of the peak rates; the best counts
SECONDS = 0.1  # of an interval, the best of three counts
DEVICE_SECONDS = 0.3  # of repeating one operation


@dataclass(frozen=True)
class Peaks:
    """Measured rates per second, of the CPU with a number of threads or of a device."""

    threads: int
    read: float  # bytes from memory
    f32: float  # multiply-adds
    int8: float | None
    bf16: float | None
    f16: float | None = None  # of devices only

    @property
    def floats(self) -> float:
        """Multiply-adds per second of floating-point values; on a device those of its fastest type."""
        if self.f16 is None:
            return self.f32
        return max(peak for peak in (self.f32, self.f16, self.bf16, self.int8) if peak is not None)

    @property
    def words(self) -> float:
        """Multiply-adds per second of 16-bit integers or of floats: a vector has half as many words as bytes."""
        if self.f16 is not None:
            return self.floats
        words = min((self.int8 or 0.0) / 2, 2 * self.f32)  # tile registers multiply bytes, but no words
        return max(self.floats, words)

    def matmul(self, weights: str) -> float:
        """Multiply-adds per second with weights of a type; int8 for quantized weights, if the CPU has it.

        With AMX int8 and bf16 are the rates of tile registers, also for types that patched does not multiply with them.
        """
        if self.f16 is not None:
            return self.floats  # a device converts the weights to its fastest type
        if weights in ("F32", "F16"):  # half floats are multiplied as float32
            return self.f32
        peak = self.bf16 if weights == "BF16" else self.int8
        return peak or self.f32


@dataclass(frozen=True)
class Demand:
    """The memory traffic and the multiply-adds of one decode."""

    weight_bytes: float
    state_bytes: float  # recurrent states, read and written
    cache_bytes: float
    weight_macs: dict[str, float]  # multiply-adds by weight type
    attention_macs: float
    recurrence_macs: float
    value_macs: float = 0.0  # more of attention, for which 16-bit integers are enough

    @property
    def nbytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.state_bytes + self.cache_bytes

    @property
    def macs(self) -> float:
        """All multiply-adds."""
        attention = self.attention_macs + self.value_macs
        return sum(self.weight_macs.values()) + attention + self.recurrence_macs

    def floor(self, peaks: Peaks) -> tuple[float, str]:
        """The least time in seconds, and what bounds most of it: "memory" or "compute".

        Weights, attention and recurrence are computed one after the other. Each takes at least the time of its
        bytes or of its multiply-adds, whichever is longer.
        """
        weights = sum(n / peaks.matmul(kind) for kind, n in self.weight_macs.items())
        attention = self.attention_macs / peaks.floats + self.value_macs / peaks.words
        parts = [
            (self.weight_bytes / peaks.read, weights),
            (self.cache_bytes / peaks.read, attention),
            (self.state_bytes / peaks.read, self.recurrence_macs / peaks.floats),
        ]
        least = sum(max(part) for part in parts)
        memory = sum(reading for reading, computing in parts if reading >= computing)
        return least, "memory" if memory >= least / 2 else "compute"


def mean_of(measured: Sequence[Peaks]) -> Peaks:
    """The mean of several measurements on the same number of threads."""
    return _each(measured, lambda rates: sum(rates) / len(rates))


def _each(peaks: Sequence[Peaks], summary: Callable[[list[float]], float]) -> Peaks:
    """Combine several measurements, rate by rate."""
    measured = [vars(each) for each in peaks]
    rates: dict[str, Any] = {kind: [each[kind] for each in measured if each[kind]] for kind in measured[0]}
    rates = {kind: summary(several) if several else None for kind, several in rates.items()}
    return Peaks(**rates | {"threads": peaks[0].threads})


def measure_peaks(threads: int, times: int = TIMES, seconds: float = SECONDS) -> Peaks:
    """Measure this machine several times and take the best. seconds: of an interval. Raises `EngineError`."""
    words = (str(threads), str(min(seconds, SECONDS)))
    measured = [Peaks(**json.loads(ask(program("peaks"), *words))) for _ in range(times)]
    return _each(measured, max)


def measure_device_peaks(device: str, libraries: Path, seconds: float = DEVICE_SECONDS) -> Peaks | None:
    """Peak rates of a copy and of large matmuls with the ggml of a build; None if the device lacks one of them."""
    words = (device, str(min(seconds, DEVICE_SECONDS)))
    measured = json.loads(ask(program("device", ggml_flags(libraries)), *words))
    return Peaks(**measured) if measured["read"] and measured["f32"] and measured["f16"] else None


def demand(model: ModelFile, cell: Cell) -> Demand:
    """What one decode of a cell must move and compute.

    Experts: the expected number of different experts if tokens choose at random. Attention: the cheaper of the
    absorbed and the decompressed form, in float32, except softmax weights times values of the decompressed
    form, which are 16-bit integers (F32 caches: float32). An indexer scores all pools of keys; attention then reads the
    chosen keys only. Layers that predict further tokens (MTP) do not run.
    """
    keys, tokens = model.keys, cell.tokens

    def number(name: str, otherwise: int = 0) -> int:
        value: Any = keys.get(name, otherwise)
        return int(max(value) if isinstance(value, list) else value)

    end = number("block_count") - number("nextn_predict_layers") if "block_count" in keys else math.inf
    tensors = [tensor for tensor in model.tensors if layer_of(tensor.name) < end]
    experts, used = number("expert_count"), number("expert_used_count")
    met = experts * (1 - (1 - used / experts) ** tokens) if experts else 0.0
    weight_bytes, macs = 0.0, dict[str, float]()
    for tensor in tensors:
        if tensor.name.startswith("token_embd"):
            weight_bytes += tensor.nbytes / tensor.ne[1] * tokens
            continue
        routed = "_exps." in tensor.name
        weight_bytes += tensor.nbytes * (met / experts if routed else 1)
        if len([n for n in tensor.ne if n > 1]) < 2 or "conv1d" in tensor.name or is_latent(tensor.name):
            continue  # norms, biases, convolutions: negligible; k_b and v_b count with attention
        rows = cell.sequences if tensor.name.startswith("output") else tokens
        kind = tensor.type.name
        macs[kind] = macs.get(kind, 0.0) + tensor.elements * rows * (used / experts if routed else 1)
    mla = sum(1 for tensor in tensors if tensor.name.endswith("attn_kv_a_norm.weight"))
    kda = sum(1 for tensor in tensors if tensor.name.endswith("ssm_norm.weight"))
    heads, head = number("attention.head_count"), number("kda.head_dim")
    state = heads * head * (head + (number("ssm.conv_kernel", 1) - 1) * 3) * F32_BYTES
    latent, rope = number("attention.kv_lora_rank"), number("rope.dimension_count")
    cache = TENSOR_TYPES[cell.cache_type.upper()]
    value_bytes = cache.block_bytes / cache.block
    rows = cell.depth + cell.batch
    top_k, pool = number("attention.indexer.top_k") or None, number("attention.indexer.kpool", 1)
    index = number("attention.indexer.key_length") / pool  # values of the indexer per key of attention
    read = min(rows, cell.batch * top_k) if top_k else rows
    in_floats, in_words = attention_macs(
        cell, heads, latent, rope, number("attention.key_length_mla") - rope,
        number("attention.value_length_mla"), top_k,
    )  # fmt: skip
    indexing = cell.sequences * key_pairs(cell) * number("attention.indexer.head_count") * index
    return Demand(
        weight_bytes=weight_bytes,
        state_bytes=2.0 * kda * state * cell.sequences * -(-cell.batch // cell.ubatch),
        cache_bytes=mla * cell.sequences * (read * (latent + rope) + rows * index) * value_bytes,
        weight_macs=macs,
        attention_macs=mla * (in_floats + indexing),
        value_macs=mla * in_words,
        recurrence_macs=kda * heads * head * head * tokens
        * (KDA_CHUNK if cell.batch >= CHUNKED_FROM else KDA_STEP),
    )  # fmt: skip


def is_latent(name: str) -> bool:
    """Whether a tensor is one of k_b and v_b of latent attention."""
    return name.endswith(("attn_k_b.weight", "attn_v_b.weight"))


def key_pairs(cell: Cell, most: int | None = None) -> float:
    """Pairs of query and key of one sequence; causal. most: keys that a query reads at most."""
    few = (
        cell.batch if most is None else min(max(most - cell.depth, 0), cell.batch)
    )  # queries that read all keys
    return few * (cell.depth + (few + 1) / 2) + (cell.batch - few) * (most or 0)


def attention_macs(
    cell: Cell, heads: int, latent: int, rope: int, nope: int, value: int, most: int | None = None
) -> tuple[float, float]:
    """Multiply-adds of one latent attention layer, in the form with fewer of them; causal.

    most: as for `key_pairs`. Returns those in float32, and those for which 16-bit integers are enough: softmax weights
    times values of the decompressed form, except with F32 caches.
    """
    pairs = key_pairs(cell, most)
    absorbed = pairs * (2 * latent + rope) + cell.batch * latent * (nope + value)
    expanded = -(-cell.batch // cell.ubatch) * (cell.depth + cell.batch) * latent  # for each value of a head
    keys, values = pairs * (nope + rope) + expanded * (nope + value), pairs * value
    n_heads = cell.sequences * heads
    if absorbed < keys + values:
        return n_heads * absorbed, 0.0
    return (
        (n_heads * (keys + values), 0.0) if cell.cache_type == "f32" else (n_heads * keys, n_heads * values)
    )
