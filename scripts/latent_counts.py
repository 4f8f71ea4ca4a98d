"""Counts the time of latent attention on NVIDIA devices: which form is faster from how many queries on.

Nothing is measured. The time of a matmul on one multiprocessor is the largest of three: multiply-adds over the rate of
its tensor cores, bytes of matrices over that of its shared memory, and bytes over its share of the L2 cache. What both
sides do alike (softmax, mask, launches) is left out. Where a count is uncertain it favours upstream: its loads of the
cache, which nothing overlaps, cost nothing, nor do the intermediate results of its matmuls by k_b and v_b.

Output: the thresholds of LATENT_ATTN in llama-latent-attn.cpp, and the time of decoding with the absorbed kernels, as
the tables of the operator's README.

    python -m kimi_gguf.scripts.latent_counts
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

N_LATENT, N_ROPE, N_NOPE, N_VALUE = 512, 64, 128, 128
N_CACHE = N_LATENT + N_ROPE
WEIGHTS = N_LATENT * (
    N_NOPE + N_VALUE
)  # of a head; also the multiply-adds of its matmuls by k_b and v_b per query
SHARED = 128  # bytes per clock that a multiprocessor reads from its shared memory
MATRIX = 512  # bytes of 16 x 16 halves, which ldmatrix.x4 reads
NEVER = 1 << 20  # queries; more than any ubatch has


@dataclass(frozen=True)
class Device:
    """Rates per clock of one multiprocessor: multiply-adds of `mma.sync` on halves, and bytes."""

    name: str
    data_centre: (
        bool  # whether float32 sums are as fast as half sums and the architecture is 8.0, 9.0 or 10.x
    )
    multiprocessors: int
    clock: float  # GHz
    mma: int  # with float32 sums
    half_mma: int  # with half sums
    cublas: int  # with the instructions that cuBLAS has
    l2: int  # bytes; measured by others, about two thirds of the peak
    dram: float  # GB/s
    l2_size: int  # MB


# mma.sync reaches 62 % of the H200's peak, which needs wgmma; for the B200 the rate of an A100 is assumed.
DEVICES = (
    Device("A100", True, 108, 1.41, 1024, 1024, 1024, 30, 1555, 40),
    Device("H200", True, 132, 1.75, 1270, 1270, 2048, 24, 4800, 50),
    Device("B200", True, 148, 1.85, 1024, 1024, 4096, 24, 8000, 126),
    Device("RTX 3090", False, 82, 1.70, 256, 512, 512, 16, 936, 6),
    Device("RTX 4090", False, 128, 2.52, 256, 512, 512, 16, 1008, 72),
    Device("RTX 5090", False, 170, 2.41, 256, 512, 512, 16, 1792, 96),
    Device(
        "RTX 6000 Ada", False, 142, 2.50, 512, 512, 512, 16, 960, 96
    ),  # the chip of a GeForce, at full rate
)


@dataclass(frozen=True)
class Mode:
    """Halves per value, as in latent-decompressed.cuh."""

    name: str
    cache: int
    weight: int
    query: int
    key: int
    value: int
    p: int

    @staticmethod
    def passes(a: int, b: int) -> int:
        """Products of a terms with b terms, without that of two second terms."""
        return a * b - (a == b == 2)


F32 = Mode("F32", 2, 2, 2, 2, 1, 2)
EXACT = Mode("F16, BF16 with `exact`", 1, 2, 2, 2, 1, 2)
HALVES = Mode("F16, BF16", 1, 1, 1, 1, 1, 1)
CODES = Mode("Q8_0, Q4_0", 1, 1, 1, 1, 1, 1)
MODES = (F32, EXACT, HALVES, CODES)
ROWS = (512, 2048, None)  # maximum number of keys
# The model of the compiled kernels (docs/gpu-roofline.md) finds larger numbers of queries for these, by mode and class.
# Neither is exact, so the larger number is used. The model overestimates LATENT_ATTN's speed up to 1.6 times (512
# queries on an H200). Nothing was measured on a GeForce, so there it is used where the model says 1.6 or more.
COMPILED = {(EXACT, True): 496, (HALVES, False): 2048, (CODES, False): 2048}

# The model is of 32 heads. A block computes 128 queries of one head, so fewer heads fill a device with more queries;
# 2048 are enough for 16 heads. No published model of these architectures has fewer.
COUNTED_HEADS, FEWEST_HEADS, FULL_ANYWHERE = 32, 16, 2048


def upstream_pair(device: Device) -> float:
    """Clocks of upstream's kernel per (query, key) pair, without loads.

    A warp multiplies 16 rows by 16 keys and loads both factors for the scores, one for the values. Values are summed in
    halves.
    """
    scores = max(N_CACHE / device.mma, N_CACHE / 4096 * 2 * MATRIX / SHARED)
    values = max(N_LATENT / device.half_mma, N_LATENT / 4096 * MATRIX / SHARED)
    return scores + values


def pair(mode: Mode, device: Device) -> float:
    """Clocks of `attend_tiles` per pair: q and the weights are in registers."""
    adds = (
        mode.passes(mode.query, mode.key) * N_NOPE
        + mode.passes(mode.query, mode.cache) * N_ROPE
        + mode.passes(mode.p, mode.value) * N_VALUE
    )
    values = mode.key * N_NOPE + mode.cache * N_ROPE + mode.value * N_VALUE  # of a key
    return max(adds / device.mma, values / 16 * MATRIX / 256 / SHARED, values * 2 / 128 / device.l2)


def expand(mode: Mode, device: Device) -> float:
    """Clocks of `expand_keys` per key and head: a warp computes 32 keys by 64 values."""
    adds = mode.passes(mode.cache, mode.weight) * WEIGHTS
    shared = WEIGHTS / (32 * 64 * 16) * (2 * mode.cache + 4 * mode.weight) * MATRIX
    read = 2 * mode.cache * 2 * N_LATENT + mode.weight * 2 * WEIGHTS / 128
    written = 2 * (mode.key * N_NOPE + mode.value * N_VALUE)
    return max(adds / device.mma, shared / SHARED, (read + written) / device.l2)


def weigh(mode: Mode, device: Device) -> float:
    """Clocks per head: k_b and v_b become floats, are read twice, and become halves."""
    return WEIGHTS * (3 * 4 + 2 * mode.weight) / device.l2


def break_even(mode: Mode, device: Device, n_keys: int) -> float:
    """Queries from which LATENT_ATTN is faster."""
    upstream = upstream_pair(device) + WEIGHTS / device.cublas / n_keys
    gain = upstream - pair(mode, device)
    return (expand(mode, device) + weigh(mode, device) / n_keys) / gain if gain > 0 else NEVER


@functools.cache
def threshold(mode: Mode, data_centre: bool, row: int) -> int:
    """The number of queries from which no device of the class is slower, for any number of keys of the row.

    The keys of a batch's sequence include the batch.
    """
    first = ROWS[row - 1] or 0 if row else 0
    last = ROWS[row] or 1 << 17
    devices = [each for each in DEVICES if each.data_centre == data_centre]
    most = max(
        min(break_even(mode, device, n), n + 1) for device in devices for n in range(first + 16, last + 1, 16)
    )
    most = max(most, COMPILED.get((mode, data_centre), 0))
    return min(16 * math.ceil(most / 16), NEVER)


def with_heads(queries: int, heads: int) -> int:
    """The threshold of a model with so many heads: `with_heads` in llama-latent-attn.cpp."""
    if not FEWEST_HEADS <= heads < COUNTED_HEADS:
        return queries
    return max(queries, min(queries * COUNTED_HEADS // heads, FULL_ANYWHERE))


def thresholds() -> Iterator[str]:
    yield (
        "| keys, up to | "
        + " | ".join(f"{c}: {m.name}" for c in ("data centre", "GeForce") for m in MODES)
        + " |"
    )
    yield "| --- |" + " ---: |" * (2 * len(MODES))
    for row, last in enumerate(ROWS):
        cells = [threshold(mode, centre, row) for centre in (True, False) for mode in MODES]
        named = ["never" if each >= NEVER else str(each) for each in cells]
        yield f"| {last or 'more'} | {' | '.join(named)} |"


@dataclass(frozen=True)
class Cache:
    """How the absorbed kernel reads a type: passes of its matmuls, and clocks of shared memory for loading a tile."""

    name: str
    row: int  # bytes
    scores: int
    values: int
    planes: int
    load: int


# A tile of 32 keys. Quantised: 72 times per warp, eight quants in four loads of two cycles and a store of four. F32:
# two planes of halves are stored. F16 and BF16 arrive by asynchronous copies.
CACHES = (
    Cache("Q8_0", 612, 1, 1, 1, 72 * 12),
    Cache("BF16", 1152, 2, 2, 1, 0),
    Cache("F32", 2304, 3, 3, 2, 2 * 288),
)
TILE, BLOCK_ROWS = 32, 32
START = 5.0  # microseconds: the first loads of a block, and the kernel that joins the splits
WAITS = 1.8  # a block is alone on its multiprocessor, so all of it waits at the four barriers of a tile; estimated
LENGTHS = (16384, 65536)


def decode(cache: Cache, device: Device, rows: int, n_keys: int) -> float:
    """Microseconds of the absorbed kernel. The steps of a tile follow each other, with barriers between them."""
    pairs = TILE * BLOCK_ROWS
    scores = max(cache.scores * N_CACHE * pairs / device.mma, cache.planes * 576)
    exchange = 128 + 64  # partial scores, and the softmax
    values = max(cache.values * N_LATENT * pairs / device.mma, cache.planes * 256 + 512)
    blocks = math.ceil(rows / BLOCK_ROWS)
    pieces = max(1, device.multiprocessors // blocks)
    tiles = max(2, math.ceil(n_keys / TILE / pieces)) * math.ceil(blocks * pieces / device.multiprocessors)
    compute = WAITS * tiles * (cache.load + scores + exchange + values) / device.clock / 1000
    return max(compute, n_keys * cache.row / device.dram / 1000) + START


def upstream_decode(cache: Cache, device: Device, rows: int, n_keys: int) -> float:
    """Microseconds of upstream's kernel, with loads of the cache, after the conversion to F16.

    The F16 copy is written and read: to and from the L2 cache if it fits, else to and from memory.
    """
    copy = n_keys * 2 * N_CACHE
    l2 = device.l2 * device.multiprocessors * device.clock  # GB/s
    convert = n_keys * cache.row / device.dram + copy / (l2 if copy < device.l2_size << 20 else device.dram)
    per_key = math.ceil(rows / 64) * max(min(rows, 64), 32) * upstream_pair(device)
    per_key += math.ceil(rows / 64) * 2 * N_CACHE / device.l2
    compute = n_keys * per_key / device.multiprocessors / device.clock
    read = 0 if copy < device.l2_size << 20 else copy / device.dram
    return (convert + max(compute, read)) / 1000 + START


def decoding() -> Iterator[str]:
    chosen = [each for each in DEVICES if each.name in ("A100", "H200", "RTX 3090", "RTX 4090", "RTX 5090")]
    yield "| cache, rows, keys | " + " | ".join(each.name for each in chosen) + " |"
    yield "| --- |" + " ---: |" * len(chosen)
    for cache in CACHES:
        for rows in (32,) if cache.name == "Q8_0" else (32, 64, 128):  # more rows of Q8_0: gpu_model.py
            for n in LENGTHS:
                cells = [
                    f"{decode(cache, each, rows, n):.0f}, {upstream_decode(cache, each, rows, n):.0f}"
                    for each in chosen
                ]
                yield f"| {cache.name}, {rows}, {n} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join([*thresholds(), "", *decoding()]))
