"""Estimates the time of launches of CUDA kernels on GPUs from counts of their instructions.

Input: the counts (cuda_counts.py), a device (gpu_devices.py), a shape. Output: the launches of each operator for the
shape, ours and upstream's, and their seconds. docs/gpu-roofline.md says how the time is composed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from kimi_gguf.scripts.cuda_counts import Data
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, HOPPER_MMA_SHARE, Gpu

SUB = 4  # parts of a multiprocessor, each with a scheduler
LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next, and of its first loads
FILL = 1e-6  # seconds until the first bytes arrive from memory and the last result is stored
HEADS, HEAD, LATENT, ROPE = 32, 128, 512, 64
TOKENS = 8192
QUANTS, BLOCK_BYTES = 32, {"q4_0": 18, "q8_0": 34}
ROW_BYTES = {"f16": 2 * (LATENT + ROPE), "bf16": 2 * (LATENT + ROPE), "f32": 4 * (LATENT + ROPE)} | {
    kind: (LATENT + ROPE) // QUANTS * size for kind, size in BLOCK_BYTES.items()
}
JOIN_PARTS = 4  # blocks of join for a row
JOIN_TURN = 128  # splits in a turn of join's loop: eight in each of 16 groups
PREFILL = (512, 8192)  # queries and keys of the decompressed form in the table of kernels


@dataclass(frozen=True)
class Launch:
    """A launch: turns of the main loop for each block, and bytes read and written in memory."""

    kernel: str
    blocks: int
    warps: int
    turns: float
    bytes: float
    shared: int = 0  # dynamic
    times: int = 1  # launches of this kind
    rest: float | None = None  # turns of the main loop instead of the counts of the rest


@dataclass(frozen=True)
class Estimate:
    """Seconds of a launch, what limits it, and the blocks that a multiprocessor holds."""

    seconds: float
    bound: str
    resident: int


@dataclass(frozen=True)
class Cost:
    """Cycles of a block: if it runs alone, and of its slowest unit; and the blocks that a multiprocessor holds."""

    alone: float
    busy: float
    resident: int


class Model:
    """Times from counts."""

    def __init__(self, counts: Data) -> None:
        self.kernels: Data = counts["kernels"]
        self.constants: dict[str, int] = counts["constants"]

    def knows(self, gpu: Gpu) -> bool:
        """Whether all kernels are counted for a device."""
        return all(str(gpu.architecture) in uses for uses in self.kernels.values())

    def resident(self, launch: Launch, gpu: Gpu) -> int:
        """Blocks of a launch that a multiprocessor holds at once."""
        use = self.kernels[launch.kernel][str(gpu.architecture)]
        registers: int = ceil(use["registers"] / 8) * 8 * 32 * launch.warps
        shared: int = use["shared"] + launch.shared + 1024
        limits = (gpu.threads // (32 * launch.warps), gpu.blocks, 65536 // registers, gpu.shared // shared)
        return max(min(limits), 1)

    def cost(self, launch: Launch, gpu: Gpu) -> Cost:
        """What a block of a launch takes."""
        use = self.kernels[launch.kernel][str(gpu.architecture)]
        parts = [(use["main"], launch.turns), (use["rest"], 1.0)]
        if launch.rest is not None:
            parts = [(use["main"], launch.turns + launch.rest)]
        alone = sum(
            turns * sum(self.phase(each, gpu, launch.warps) for each in part) for part, turns in parts
        )
        share = launch.warps / SUB  # blocks of few warps are spread over the schedulers
        busy = sum(turns * sum(max(pipes(each, gpu, share)) for each in part) for part, turns in parts)
        return Cost(alone, busy, self.resident(launch, gpu))

    def cycles(self, launch: Launch, gpu: Gpu) -> float:
        """Cycles until all blocks have ended, if memory were no limit.

        Full rounds of blocks over the device, and what is left, spread over all multiprocessors.
        """
        block = self.cost(launch, gpu)
        rounds, left = divmod(launch.blocks, gpu.multiprocessors * block.resident)
        cycles = rounds * max(block.alone, block.resident * block.busy)
        return cycles + (max(block.alone, ceil(left / gpu.multiprocessors) * block.busy) if left else 0.0)

    def estimate(self, launch: Launch, gpu: Gpu) -> Estimate:
        """The time of all launches of this kind."""
        block = self.cost(launch, gpu)
        compute = self.cycles(launch, gpu) / gpu.clock
        memory = moving(launch.bytes, gpu)
        if memory >= compute:
            bound = "memory"
        elif block.alone > block.resident * block.busy or launch.blocks < gpu.multiprocessors:
            bound = "latency"
        else:
            bound = limit_of(self.kernels[launch.kernel][str(gpu.architecture)], gpu)
        return Estimate(launch.times * (max(compute, memory) + LAUNCH), bound, block.resident)

    def room(self, first: Launch, held: int, second: Launch, gpu: Gpu) -> int:
        """Blocks of the second launch that fit on a multiprocessor beside `held` blocks of the first."""
        most: list[int] = []
        each: tuple[int, ...] = ()
        for launch, blocks in ((first, held), (second, 1)):
            use = self.kernels[launch.kernel][str(gpu.architecture)]
            registers = ceil(int(use["registers"]) / 8) * 8 * 32 * launch.warps
            each = (32 * launch.warps, 1, registers, int(use["shared"]) + launch.shared + 1024)
            if launch is first:
                limits = (gpu.threads, gpu.blocks, 65536, gpu.shared)
                most = [limit - blocks * one for limit, one in zip(limits, each, strict=True)]
        return max(min(left // one for left, one in zip(most, each, strict=True)), 0)

    def beside(self, first: Launch, second: Launch, gpu: Gpu) -> float:
        """Seconds until one launch of each has ended, if the first one's blocks are placed first.

        The second one's blocks start where there is room: beside the first one's at once, in their places when these
        have ended. What both want of a unit adds up.
        """
        one, two = self.cost(first, gpu), self.cost(second, gpu)
        ends = self.cycles(first, gpu)
        many = ceil(second.blocks / gpu.multiprocessors)
        alone = max(
            two.alone, min(two.resident, many) * two.busy
        )  # cycles of a block when the first one has ended
        low, more = divmod(min(first.blocks, gpu.multiprocessors * one.resident), gpu.multiprocessors)
        places: list[
            tuple[float, float]
        ] = []  # when a place is free, and how long a block takes there until `ends`
        for held, count in ((low, gpu.multiprocessors - more), (low + 1, more)):
            room = self.room(first, held, second, gpu)
            free = max(1.0 - held * one.busy / ends, 0.01)
            beside = max(two.alone, min(room, many) * two.busy / free)
            for place in range(two.resident):
                places += [(0.0 if place < room else ends, beside)] * count
        heapq.heapify(places)
        last = ends
        for _ in range(second.blocks):
            at, beside = heapq.heappop(places)
            done = min((ends - at) / beside, 1.0) if at < ends else 0.0
            after = at + beside if done == 1.0 else max(at, ends) + (1.0 - done) * alone
            heapq.heappush(places, (after, beside))
            last = max(last, after)
        both = (first.blocks * one.busy + second.blocks * two.busy) / gpu.multiprocessors
        return max(max(last, both) / gpu.clock, moving(first.bytes + second.bytes, gpu)) + LAUNCH

    @staticmethod
    def phase(phase: Data, gpu: Gpu, warps: int) -> float:
        """Cycles of a block that runs alone, from one barrier to the next."""
        return max(float(phase["cycles"]), *pipes(phase, gpu, ceil(warps / SUB)))

    def total(self, launches: Iterable[Launch], gpu: Gpu) -> float:
        """Seconds of launches, one after the other."""
        return sum(self.estimate(each, gpu).seconds for each in launches)


def moving(n_bytes: float, gpu: Gpu) -> float:
    """Seconds to read or write bytes in memory."""
    return n_bytes / (gpu.bandwidth * DRAM_SHARE) + FILL


def pipes(phase: Data, gpu: Gpu, share: float) -> tuple[float, ...]:
    """Cycles that a multiprocessor needs for a phase of a block, by limit: see LIMITS. share: warps of a scheduler."""
    tensor = sum(n * mma_cycles(name, gpu) for name, n in phase["mma"].items())
    return (
        share * phase["issued"],
        share * tensor,
        share * SUB * phase.get("shared", 0),
        share * phase.get("quarter", 0) * 8,
        share * phase.get("fma", 0) * 32 * SUB / gpu.fma,
        share * phase.get("alu", 0) * 32 * SUB / gpu.alu,
    )


LIMITS = ("issue", "tensor cores", "shared memory", "MUFU", "FMA", "ALU")


def mma_cycles(name: str, gpu: Gpu) -> float:
    """Cycles of a tensor instruction on its part of a multiprocessor."""
    products = 16 * 8 * (8 if "1688" in name else 16)
    rate = gpu.mma_f32 if ".F32" in name else gpu.mma_f16
    return products * SUB / rate


def limit_of(use: Data, gpu: Gpu) -> str:
    """The limit that most of a kernel's main loop has."""
    sums = [0.0] * len(LIMITS)
    for phase in use["main"]:
        sums = [a + b for a, b in zip(sums, pipes(phase, gpu, 1.0), strict=True)]
    return LIMITS[sums.index(max(sums))]


@dataclass(frozen=True)
class ChunkRun:
    """The launches of KDA_SCAN for a run of chunks."""

    prepare: Launch
    states: Launch
    finish: Launch


@dataclass(frozen=True)
class Forward:
    """KDA_SCAN in chunks."""

    runs: Sequence[ChunkRun]

    @property
    def launches(self) -> list[Launch]:
        """Those of the most frequent runs, of equal length."""
        ((run, times),) = Counter(self.runs).most_common(1)
        return [replace(each, times=times) for each in (run.prepare, run.states, run.finish)]

    def sums(self, model: Model, gpu: Gpu) -> list[float]:
        """Seconds of all launches of `prepare`, of `states` and of `finish`."""
        return [
            sum(model.estimate(getattr(run, kind), gpu).seconds for run in self.runs)
            for kind in ("prepare", "states", "finish")
        ]

    def seconds(self, model: Model, gpu: Gpu) -> float:
        """`prepare` of the next run begins with `states` of this one, in another stream."""
        total = model.estimate(self.runs[0].prepare, gpu).seconds
        for run, following in zip(self.runs, self.runs[1:], strict=False):
            alone = sum(model.estimate(each, gpu).seconds for each in (run.states, run.finish))
            moved = moving(following.prepare.bytes + run.states.bytes + run.finish.bytes, gpu)
            total += max(model.beside(run.states, following.prepare, gpu), alone, moved) + LAUNCH
        last = self.runs[-1]
        return total + sum(model.estimate(each, gpu).seconds for each in (last.states, last.finish))


def run_lengths(model: Model, gpu: Gpu, heads: int, chunks: int) -> list[int]:
    """As `run_lengths` in kda-scan.cu: whole waves of the blocks of `prepare` that the device holds."""
    c = model.constants
    places, edge, used = c["prepare blocks"] * gpu.multiprocessors, 1, 0.0
    for waves in range(1, c["most waves"] + 1):
        n = waves * places // heads
        share = n * heads / (waves * places)
        fits = n * c["chunk bytes"] * heads <= c["run bytes"]
        if n > 0 and fits and share > used + 1 / c["worth a wave"]:
            edge, used = n, share
    inner = 2 * edge if gpu.block_shared >= c["roomy"] and chunks >= c["long runs from"] * edge else edge
    found: list[int] = []
    while left := chunks - sum(found):
        found.append(min(inner, left - edge) if found and left > 2 * edge else min(edge, left))
    return found


def kda_forward(model: Model, gpu: Gpu, heads: int = HEADS, tokens: int = TOKENS) -> Forward:
    """KDA_SCAN in chunks. What passes between its kernels goes to memory if two runs of it do not fit the L2."""
    lengths = run_lengths(model, gpu, heads, ceil(tokens / model.constants["chunk"]))
    spilled = 2 * max(lengths) * model.constants["chunk bytes"] * heads > gpu.l2 << 20
    return Forward([chunk_run(model, gpu, heads, chunks, spilled) for chunks in lengths])


def chunk_run(model: Model, gpu: Gpu, heads: int, chunks: int, spilled: bool) -> ChunkRun:
    """A run. spilled: what passes between its kernels goes to memory."""
    c = model.constants
    channels = 4 * heads * HEAD * chunks * c["chunk"]  # bytes of one of q, k, v, f, gate, output
    workspace = c["chunk bytes"] * heads * chunks if spilled else 0.0
    roomy = gpu.block_shared >= c["roomy"]
    blocks, warps = heads * 4, 2
    kernel, ring = ("states", "deep ring") if roomy else ("states, short ring", "short ring")
    shared = c[ring] * c["stage"]
    if 4 * heads >= 3 * gpu.multiprocessors:
        kernel, blocks, warps, shared = "states of whole heads", heads, 8, c["deep ring"] * c["stage"]
    elif 4 * blocks <= SUB * gpu.multiprocessors:
        kernel = kernel.replace("states", "states, two warps")
        warps, shared = 4, shared + c["exchange"]
    states = Launch(kernel, blocks, warps, chunks, (channels if spilled else 0) + workspace, shared)
    name, rows = (
        ("prepare", c["prepare bytes"])
        if roomy
        else ("prepare, one set of rows", c["prepare bytes, one set"])
    )
    prepare = Launch(name, chunks * heads, 8, 1, 4 * channels + workspace, rows)
    end = finish(heads, chunks * c["chunk"])
    return ChunkRun(prepare, states, replace(end, bytes=channels * (3 if spilled else 2)))


def finish(heads: int, tokens: int) -> Launch:
    """The output norm."""
    return Launch("finish", ceil(tokens / 8) * heads, 8, 1, 3 * 4 * heads * HEAD * tokens)


def conv(tokens: int) -> Launch:
    """The convolutions of q, k and v."""
    return Launch("conv", ceil(3 * HEADS / 4) * ceil(tokens / 16), 4, 1, 2 * 3 * 4 * HEADS * HEAD * tokens)


def kda_step(gpu: Gpu, seqs: int) -> Launch:
    """One token of each sequence."""
    moved = 2 * 4 * HEADS * HEAD * HEAD * seqs
    if HEADS * seqs > gpu.multiprocessors:
        return Launch("steps, four rows a thread", HEADS * seqs, 8, 1, moved)
    return Launch("steps", HEADS * seqs, 16, 1, moved)


def steps_or_chunks(model: Model, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a chunk of 64 tokens, and of a further token in steps (too long: its loop has the whole kernel)."""
    chunk = kda_forward(model, gpu, tokens=model.constants["chunk"]).seconds(model, gpu)
    one, many = (model.cycles(replace(kda_step(gpu, 1), turns=turns), gpu) for turns in (32, 64))
    return chunk, (many - one) / 32 / gpu.clock


def copies(seqs: int, kernel: str = "copies") -> Launch:
    """The states of sequences from the result to the cache; `gather`: states that move to other rows of the cache."""
    return Launch(
        kernel, 64 * seqs, 8, HEADS * HEAD * HEAD / 4 / (64 * 256) / 4, 2 * 4 * HEADS * HEAD * HEAD * seqs
    )


def gated_delta_net(heads: int, tokens: int, kda: bool) -> Launch:
    """Upstream's recurrence: four columns of the state for each block."""
    kernel = "upstream gated delta net, kda" if kda else "upstream gated delta net"
    return Launch(kernel, heads * HEAD // 4, 4, tokens, (5 if kda else 4) * 4 * heads * HEAD * tokens)


def attend(model: Model, gpu: Gpu, kind: str, queries: int, keys: int) -> list[Launch]:
    """Our absorbed attention: splits of the keys, as `make_plan` in latent-attend.cu, then their sum."""
    c = model.constants
    rows = queries * HEADS
    kernel, of_block = f"attend {kind}", c["narrow rows"]
    if kind in BLOCK_BYTES and rows > of_block:
        kernel, of_block = f"attend {kind}, wide, {gpu.family}", c["wide rows"]
    blocks = ceil(rows / of_block)
    tiles = ceil(keys / c["tile"])
    splits, per_split, least = 0, 0, 0
    for waves in range(1, c["most waves of attend"] + 1):
        target = min(max(waves * gpu.multiprocessors // blocks, 1), c["most pieces"])
        share = max(ceil(tiles / target), c["least tiles"])
        n = ceil(tiles / share)
        if waves > 1 and n > 1 and n * rows * c["bytes of a partial row"] > c["most partial bytes"]:
            break
        time = ceil(blocks * n / gpu.multiprocessors) * (share + c["tiles of a piece"])
        if waves == 1 or time * c["attend worth a wave"] < least * (c["attend worth a wave"] - 1):
            splits, per_split, least = n, share, time
    partial = 4 * LATENT * rows * splits if splits > 1 else 0
    warps = c["attend threads"] // 32
    read = ROW_BYTES[kind] * keys
    main = Launch(kernel, blocks * splits, warps, per_split, read + partial, c[f"{kernel} shared"])
    join = Launch("join", JOIN_PARTS * rows, c["join threads"] // 32, splits / JOIN_TURN, partial)
    return [main] + ([join] if splits > 1 else [])


def spares_copy(model: Model, kind: str, keys: int) -> bool:
    """Whether upstream's F16 copy of the cache would be so large that ours always computes: `rows_of_upstream`."""
    return kind in BLOCK_BYTES and ROW_BYTES["f16"] * keys > model.constants["largest copy"]


def ours_by_default(model: Model, gpu: Gpu, kind: str, queries: int, keys: int) -> bool:
    """Whether our absorbed kernel computes a node that is not marked `exact`: `takes` in latent-ggml.cu."""
    c = model.constants
    few = queries * HEADS <= c[f"{kind} rows, {gpu.family}"] and keys >= c[f"{kind} keys, {gpu.family}"]
    return few or spares_copy(model, kind, keys)


def flash_attention(
    kind: str, queries: int, keys: int, heads: int = HEADS
) -> Callable[[Model, Gpu], list[Launch]]:
    """Upstream's attention over the latent, without the conversion of a cache to F16 (`conversion`).

    As many blocks as the device holds, each with its share of the keys of all outputs; before Ada, a block for each
    output if these fill the device (launch_fattn in fattn-common.cuh). The first and the last tile of a block are
    outside the loop.
    """

    def launches(model: Model, gpu: Gpu) -> list[Launch]:
        columns = 1 if queries == 1 else 2 if queries == 2 else 4  # queries of a block
        kernel = f"upstream flash attention, {16 * columns} rows"
        warps, k2 = {1: (2, 288), 2: (4, 160), 4: (8, 160)}[columns]
        shared = 32 * (k2 + 4) * 4 + 16 * columns * (LATENT + ROPE + 8) * 2 + columns * 40
        tiles, outputs = ceil(keys / 32), ceil(queries / columns) * heads // 16
        one = Launch(kernel, 1, warps, 1, 0, shared)
        held = gpu.multiprocessors * model.resident(one, gpu)
        blocks = min(held, tiles * outputs)
        filled = outputs / (held * ceil(outputs / held))
        if gpu.architecture < 89 and filled >= 0.75:
            blocks = outputs
        elif blocks % outputs <= 0.05 * blocks:
            blocks -= blocks % outputs
        read = min(2 * (LATENT + ROPE) * keys, in_memory(kind, keys, gpu))
        split = blocks > outputs or blocks % outputs > 0
        partial = 4 * LATENT * 16 * columns * blocks if split else 0
        turns = tiles * outputs / blocks
        main = Launch(kernel, blocks, warps, max(turns - 1, 0), read + partial, shared, rest=2)
        turns = blocks / outputs / results_in_a_turn(model, gpu, "upstream join")
        join = Launch("upstream join", heads * queries, 16, turns, partial)
        return [main] + ([join] if split else [])

    return launches


def in_memory(kind: str, keys: int, gpu: Gpu) -> float:
    """Bytes of upstream's F16 copy of a cache that are not in the L2; of a F16 cache, all."""
    copy = ROW_BYTES["f16"] * keys
    return 0.0 if kind != "f16" and copy <= gpu.l2 << 20 else copy


def conversion(kind: str, keys: int, gpu: Gpu) -> float:
    """Seconds of upstream's conversion of a cache to F16."""
    if kind == "f16":
        return 0.0
    return moving(ROW_BYTES[kind] * keys + in_memory(kind, keys, gpu), gpu) + LAUNCH


def upstream_attention(
    model: Model, gpu: Gpu, kind: str, queries: int, keys: int, heads: int = HEADS
) -> float:
    """Seconds of upstream's attention, with the conversion."""
    return conversion(kind, keys, gpu) + model.total(
        flash_attention(kind, queries, keys, heads)(model, gpu), gpu
    )


def attention_in_runs(model: Model, gpu: Gpu, kind: str, queries: int, keys: int) -> float:
    """Seconds of upstream's attention in runs of keys, with their conversion: `attend_in_runs` in latent-runs.cu."""
    c = model.constants
    most = c["group rows"] // HEADS // c["group unit"] * c["group unit"]
    runs = equal_parts(keys, c[f"run keys, {gpu.family}"], c["unit of a run"])
    unit = c["unit of a run"]
    ends = Launch("find ends", ceil(queries / 4) * len(runs), unit // 32, 1, 2 * unit * queries * len(runs))
    of_runs = [
        launch
        for run in runs
        for group in equal_parts(queries, most, c["group unit"])
        for launch in run_of_keys(model, gpu, kind, group, run)
    ]
    return sum(conversion(kind, run, gpu) for run in runs) + model.total([ends, *of_runs], gpu)


def equal_parts(whole: int, most: int, unit: int) -> list[int]:
    """Parts of about equal size; all but the last are multiples of the unit."""
    size = ceil(ceil(whole / ceil(whole / most)) / unit) * unit
    return [min(size, whole - first) for first in range(0, whole, size)]


def run_of_keys(model: Model, gpu: Gpu, kind: str, queries: int, keys: int) -> list[Launch]:
    """Upstream's kernel for a group of queries over a run of keys, and the kernel that adds its results."""
    columns = 4  # queries of an output tile
    outputs, rows = ceil(queries / columns) * HEADS // 16, queries * HEADS
    blocks = ((outputs + outputs // 4) // gpu.multiprocessors + 1) * gpu.multiprocessors
    partial = 4 * LATENT * (16 * columns * blocks + rows)
    whole, *_ = flash_attention(kind, queries, keys)(model, gpu)
    read = min(ROW_BYTES["f16"] * keys, in_memory(kind, keys, gpu))
    turns = ceil(keys / 32) * outputs / blocks
    joined = (blocks / outputs + 1) / results_in_a_turn(model, gpu, "add run")
    warps = model.constants["add threads"] // 32
    return [
        replace(whole, blocks=blocks, turns=max(turns - 1, 0), bytes=read + partial),
        Launch("add run", rows, warps, joined, partial + 2 * 4 * LATENT * rows),
    ]


def results_in_a_turn(model: Model, gpu: Gpu, kernel: str) -> int:
    """Partial results that a turn of a kernel's loop joins: it computes two exponentials for each."""
    loop = model.kernels[kernel][str(gpu.architecture)]["main"]
    return max(sum(int(each.get("quarter", 0)) for each in loop) // 2, 1)


def absorbed(model: Model, gpu: Gpu, kind: str, queries: int, keys: int) -> float:
    """Seconds of our absorbed attention over a cache that is not copied as a whole: `way_of` in latent-ggml.cu."""
    if queries * HEADS > model.constants["direct rows"] and spares_copy(model, kind, keys):
        return attention_in_runs(model, gpu, kind, queries, keys)
    return model.total(attend(model, gpu, kind, queries, keys), gpu)


def multiply(model: Model, gpu: Gpu, kind: str, columns: int, rows: int) -> Launch:
    """Our matmul of one column, not gated: `warps_per_rows` and `launch` in matvec.cu."""
    c = model.constants
    lanes = columns // QUANTS * c[f"{kind} qi"] // c[f"{kind} ints"]  # that a row has work for
    warps = 1
    while warps < min(c["multiply warps"], ceil(lanes / 32)) and (
        rows // c["multiply rows"] * warps < c["multiply enough warps"] * gpu.multiprocessors
        or ceil(lanes / 32) > c["multiply most steps"] * warps
    ):
        warps *= 2
    blocks = ceil(rows / (c["multiply warps"] // warps * c["multiply rows"]))
    return _multiply(
        model, gpu, f"multiply {kind}", columns, rows, blocks, ceil(lanes / (32 * warps)) * c["multiply rows"]
    )


def upstream_multiply(model: Model, gpu: Gpu, kind: str, columns: int, rows: int) -> Launch:
    """Upstream's: a block of four warps for each row (mul_mat_vec_q, rows of 2048 values and more; for shorter ones
    it has other kernels). Fewer steps than its loop has at once count as a part of a turn, which is too fast."""
    lanes = columns // QUANTS * model.constants[f"{kind} qi"] // model.constants[f"{kind} ints"]
    return _multiply(model, gpu, f"upstream multiply {kind}", columns, rows, rows, ceil(lanes / 128))


def _multiply(
    model: Model, gpu: Gpu, kernel: str, columns: int, rows: int, blocks: int, calls: int
) -> Launch:
    """calls: dot products of a lane. A turn of the loop has as many of them as the compiler put there."""
    kind = kernel.split()[-1]
    per_call = model.constants[f"{kind} ints"] * (
        2 if kind == "q4_0" else 1
    )  # two quants of 4 bits in a byte
    turns = calls * per_call / model.kernels[kernel][str(gpu.architecture)]["dots"]
    return Launch(kernel, blocks, 4, turns, rows * columns // QUANTS * BLOCK_BYTES[kind])


def upstream_absorbed(
    model: Model, gpu: Gpu, kind: str, queries: int, keys: int, heads: int = HEADS
) -> float:
    """Seconds of what LATENT_ATTN replaces: upstream's attention, and the matmuls by k_b and v_b at the peak rate of
    cuBLAS (on Hopper with `wgmma`, elsewhere with half sums)."""
    products = heads * queries * 2 * LATENT * HEAD
    peak = gpu.mma_f16 / (HOPPER_MMA_SHARE if gpu.architecture == 90 else 1)
    weights = products / (gpu.multiprocessors * gpu.clock * peak) + 2 * LAUNCH
    return upstream_attention(model, gpu, kind, queries, keys, heads) + weights


def decompressed(
    model: Model, kind: str, queries: int, keys: int, exact: bool = False, heads: int = HEADS
) -> list[Launch]:
    """Our decompressed attention: runs of expanded keys that fit in the scratch."""
    c = model.constants
    mode = kind if kind == "f32" else "exact" if exact else ""
    name = f", {mode}" if mode else ""
    terms = 2 if mode else 1  # halves of a weight and of an expanded key
    halves = 2 if mode == "f32" else 1  # of a value of the cache
    key_bytes = 2 * (heads * HEAD * (terms + 1) + halves * (LATENT + ROPE))
    room = c["scratch"] // key_bytes // c["expand keys"] * c["expand keys"]
    runs = ceil(keys / room)
    of_run = keys / runs
    expand_blocks = ceil(of_run / c["expand keys"]) * heads
    read, expanded = 2 * halves * LATENT * of_run, 2 * heads * HEAD * of_run
    blocks = ceil(queries / c["block queries"]) * heads
    shared = f"{mode} shared".strip()
    return [
        Launch("look", ceil(keys / 32) * ceil(queries / c["block queries"]), 8, 1, 2 * queries * keys),
        Launch("weigh, exact" if mode else "weigh", 2 * heads, 16, 1, 2 * heads * LATENT * HEAD * (4 + 2 * terms)),
        Launch(f"collect {kind}", ceil(of_run / 32), 8, 1, (ROW_BYTES[kind] + halves * ROW_BYTES["f16"]) * of_run,
               times=runs),
        Launch("expand keys" + name, expand_blocks, 8, LATENT // 32, read + expanded * terms, c[f"expand {shared}"],
               runs),
        Launch("expand values" + name, expand_blocks, 8, LATENT // 32, read + expanded, c[f"expand {shared}"], runs),
        Launch("decompressed" + name, blocks, 8, of_run / 32, expanded * (terms + 1), c[f"decompressed {shared}"],
               runs),
    ]  # fmt: skip


def kernel_launches(model: Model, gpu: Gpu) -> list[tuple[str, list[Launch]]]:
    """The shapes of the table of kernels. Every device has the same rows."""
    queries, keys = PREFILL
    return [
        (f"prefill, {TOKENS} tokens", [conv(TOKENS), *kda_forward(model, gpu).launches]),
        ("decode, 1 sequence", [conv(1), kda_step(gpu, 1)]),
        ("decode, 32 sequences", [kda_step(gpu, 32)]),
        ("32 states to other rows of the cache", [copies(32), copies(32, "gather")]),
        *((f"decode, 65536 keys, {kind.upper()}", attend(model, gpu, kind, 1, 65536)) for kind in ROW_BYTES),
        *((f"{queries} queries, {keys} keys, {kind.upper()}", decompressed(model, kind, queries, keys))
          for kind in ("f16", "f32")),
        *((f"the same, {kind.upper()}: the others as with F16", [
            launch for launch in decompressed(model, kind, queries, keys) if launch.kernel.startswith("collect")
        ]) for kind in ROW_BYTES if kind not in ("f16", "f32")),
        (f"{queries} queries, {keys} keys, F16, `exact`", decompressed(model, "f16", queries, keys, exact=True)),
    ]  # fmt: skip


def kda_floor(gpu: Gpu) -> tuple[float, float]:
    """Seconds to read q, k, v, f, gate and write the output once; and for the recurrence's products in chunks of 64."""
    memory = 6 * 4 * HEADS * HEAD * TOKENS / (gpu.bandwidth * DRAM_SHARE)
    chunk = 64
    # per token and head: L and A against half a chunk, its solve for w and u, then w S, q S, k^T U and A U
    products = chunk * HEAD + chunk * 2 * HEAD / 2 + 3 * HEAD * HEAD + chunk * HEAD / 2
    peak = gpu.mma_f32 / (HOPPER_MMA_SHARE if gpu.architecture == 90 else 1)
    return memory, HEADS * TOKENS * products / (gpu.multiprocessors * gpu.clock * peak)
