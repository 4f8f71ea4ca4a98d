"""Estimates the time of launches of CUDA kernels on GPUs from counts of their instructions.

Input: the counts (cuda_counts.py), a device (gpu_devices.py), a shape. Output: the launches of each operator for the
shape, ours and upstream's, and their seconds. docs/gpu-roofline.md says how the time is composed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

from kimi_gguf.scripts.cuda_counts import Data
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, HOPPER_MMA_SHARE, Gpu

SUB = 4  # parts of a multiprocessor, each with a scheduler
LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next, and of its first loads
FILL = 1e-6  # seconds until the first bytes arrive from memory and the last result is stored
HEADS, HEAD, LATENT, ROPE = 32, 128, 512, 64
TOKENS = 8192
ROW_BYTES = {"f16": 2 * (LATENT + ROPE), "q8_0": (LATENT + ROPE) // 32 * 34}
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

    def estimate(self, launch: Launch, gpu: Gpu) -> Estimate:
        """The time of all launches of this kind."""
        use = self.kernels[launch.kernel][str(gpu.architecture)]
        resident = self.resident(launch, gpu)
        parts = [(use["main"], launch.turns), (use["rest"], 1.0)]
        if launch.rest is not None:
            parts = [(use["main"], launch.turns + launch.rest)]
        alone = sum(
            turns * sum(self.phase(each, gpu, launch.warps) for each in part) for part, turns in parts
        )
        share = launch.warps / SUB  # blocks of few warps are spread over the schedulers
        busy = sum(turns * sum(max(pipes(each, gpu, share)) for each in part) for part, turns in parts)
        # Full rounds of blocks over the device, and what is left, spread over all multiprocessors.
        rounds, left = divmod(launch.blocks, gpu.multiprocessors * resident)
        cycles = rounds * max(alone, resident * busy)
        cycles += max(alone, ceil(left / gpu.multiprocessors) * busy) if left else 0.0
        compute, memory = cycles / gpu.clock, launch.bytes / (gpu.bandwidth * DRAM_SHARE) + FILL
        if memory >= compute:
            bound = "memory"
        else:
            bound = (
                "latency"
                if alone > resident * busy or launch.blocks < gpu.multiprocessors
                else limit_of(use, gpu)
            )
        return Estimate(launch.times * (max(compute, memory) + LAUNCH), bound, resident)

    @staticmethod
    def phase(phase: Data, gpu: Gpu, warps: int) -> float:
        """Cycles of a block that runs alone, from one barrier to the next."""
        return max(float(phase["cycles"]), *pipes(phase, gpu, ceil(warps / SUB)))

    def total(self, launches: Iterable[Launch], gpu: Gpu) -> float:
        """Seconds of launches, one after the other."""
        return sum(self.estimate(each, gpu).seconds for each in launches)


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


def kda_forward(model: Model, heads: int = HEADS, tokens: int = TOKENS) -> list[Launch]:
    """KDA_SCAN in chunks: runs of chunks whose intermediate data stay in the L2, then the output norm."""
    c = model.constants
    chunks = ceil(tokens / c["chunk"])
    of_run = min(chunks, max(c["run bytes"] // (c["chunk bytes"] * heads), 1))
    runs = ceil(chunks / of_run)
    channels = 4 * heads * HEAD * tokens  # bytes of one of q, k, v, f, gate, output
    workspace = 0.0 if c["run bytes"] <= 50 << 20 else c["chunk bytes"] * heads * chunks
    whole = heads >= 96
    states = Launch(
        "states of whole heads" if whole else "states", heads * (1 if whole else 4), 8 if whole else 2,
        chunks / runs, (channels + workspace) / runs, c["states shared"], runs,
    )  # fmt: skip
    prepare = Launch(
        "prepare", ceil(chunks / runs) * heads, 8, 1, (4 * channels + workspace) / runs, times=runs
    )
    return [prepare, states, finish(heads, tokens)]


def finish(heads: int, tokens: int) -> Launch:
    """The output norm."""
    return Launch("finish", ceil(tokens / 8) * heads, 8, 1, 3 * 4 * heads * HEAD * tokens)


def conv(tokens: int) -> Launch:
    """The convolutions of q, k and v."""
    return Launch("conv", ceil(3 * HEADS / 4) * ceil(tokens / 16), 4, 1, 2 * 3 * 4 * HEADS * HEAD * tokens)


def kda_step(seqs: int) -> Launch:
    """One token of each sequence."""
    return Launch("steps", HEADS * seqs, 16, 1, 2 * 4 * HEADS * HEAD * HEAD * seqs)


def copies(seqs: int) -> Launch:
    """The states of sequences from the result to the cache."""
    return Launch(
        "copies", 64 * seqs, 8, HEADS * HEAD * HEAD / 4 / (64 * 256) / 4, 2 * 4 * HEADS * HEAD * HEAD * seqs
    )


def gated_delta_net(heads: int, tokens: int, kda: bool) -> Launch:
    """Upstream's recurrence: four columns of the state for each block."""
    kernel = "upstream gated delta net, kda" if kda else "upstream gated delta net"
    return Launch(kernel, heads * HEAD // 4, 4, tokens, (5 if kda else 4) * 4 * heads * HEAD * tokens)


def attend(model: Model, kind: str, queries: int, keys: int) -> list[Launch]:
    """Our absorbed attention: splits of the keys, then their sum."""
    c = model.constants
    rows = queries * HEADS
    blocks = ceil(rows / c["rows"])
    tiles = ceil(keys / c["tile"])
    per_split = max(ceil(tiles / ceil(c["blocks"] / blocks)), c["least tiles"])
    splits = ceil(tiles / per_split)
    partial = 4 * LATENT * rows * splits
    warps = c["attend threads"] // 32
    read = ROW_BYTES[kind] * keys
    main = Launch(f"attend {kind}", blocks * splits, warps, per_split, read + partial, c[f"{kind} shared"])
    return [main] + ([Launch("join", rows, 4, splits / 8, partial)] if splits > 1 else [])


def flash_attention(kind: str, queries: int, keys: int) -> Callable[[Model, Gpu], list[Launch]]:
    """Upstream's attention over the latent: as many blocks as the device holds, each with its share of the keys.

    Caches other than F16 are converted in memory before. The first and the last tile of a block are outside the loop.
    """

    def launches(model: Model, gpu: Gpu) -> list[Launch]:
        columns = 1 if queries == 1 else 2 if queries == 2 else 4  # queries of a block
        kernel = f"upstream flash attention, {16 * columns} rows"
        warps, k2 = {1: (2, 288), 2: (4, 160), 4: (8, 160)}[columns]
        shared = 32 * (k2 + 4) * 4 + 16 * columns * (LATENT + ROPE + 8) * 2 + columns * 40
        tiles, outputs = ceil(keys / 32), ceil(queries / columns) * HEADS // 16
        one = Launch(kernel, 1, warps, 1, 0, shared)
        blocks = min(gpu.multiprocessors * model.resident(one, gpu), tiles * outputs)
        blocks = max(blocks // outputs, 1) * outputs
        partial = 4 * LATENT * 16 * columns * blocks
        read = 2 * (LATENT + ROPE) * keys
        turns = tiles * outputs / blocks
        main = Launch(kernel, blocks, warps, max(turns - 1, 0), read + partial, shared, rest=2)
        joined = model.kernels["upstream join"][str(gpu.architecture)]["main"]
        of_turn = max(
            sum(each.get("quarter", 0) for each in joined) // 2, 1
        )  # two exponentials for each partial
        join = Launch("upstream join", HEADS * queries, 16, blocks / outputs / of_turn, partial)
        return [main, join]

    return launches


def conversion(kind: str, keys: int, gpu: Gpu) -> float:
    """Seconds of upstream's conversion of a cache to F16."""
    moved = 0 if kind == "f16" else (ROW_BYTES[kind] + ROW_BYTES["f16"]) * keys
    return moved / (gpu.bandwidth * DRAM_SHARE) + (LAUNCH + FILL if moved else 0.0)


def decompressed(model: Model, kind: str, queries: int, keys: int) -> list[Launch]:
    """Our decompressed attention: runs of expanded keys that fit in the scratch."""
    c = model.constants
    terms = {"f16": (2, 2, 1), "q8_0": (1, 1, 1)}[kind]  # halves of a weight, a key, a value
    key_bytes = 2 * (HEADS * HEAD * (terms[1] + terms[2]) + LATENT + ROPE)
    room = c["scratch"] // key_bytes // c["expand keys"] * c["expand keys"]
    runs = ceil(keys / room)
    of_run = keys / runs
    expand_blocks = ceil(of_run / c["expand keys"]) * HEADS
    read, expanded = 2 * LATENT * of_run, 2 * HEADS * HEAD * of_run
    blocks = ceil(queries / c["block queries"]) * HEADS
    return [
        Launch("weigh", 2 * HEADS, 16, 1, 2 * HEADS * LATENT * HEAD * (4 + 2 * terms[0])),
        Launch(f"collect {kind}", ceil(of_run / 32), 8, 1, (ROW_BYTES[kind] + ROW_BYTES["f16"]) * of_run, times=runs),
        Launch(f"expand keys {kind}", expand_blocks, 8, LATENT // 32, read + expanded * terms[1],
               c[f"expand {kind} shared"], runs),
        Launch(f"expand values {kind}", expand_blocks, 8, LATENT // 32, read + expanded,
               c[f"expand {kind} shared"], runs),
        Launch(f"decompressed {kind}", blocks, 8, of_run / 32, expanded * (terms[1] + 1),
               c[f"decompressed {kind} shared"], runs),
    ]  # fmt: skip


def kernel_launches(model: Model) -> list[tuple[str, list[Launch]]]:
    """The shapes of the table of kernels."""
    queries, keys = PREFILL
    return [
        (f"prefill, {TOKENS} tokens", [conv(TOKENS), *kda_forward(model)]),
        ("decode, 1 sequence", [conv(1), kda_step(1)]),
        ("decode, 32 sequences", [kda_step(32), copies(32)]),
        ("decode, 65536 keys, F16", attend(model, "f16", 1, 65536)),
        ("decode, 65536 keys, Q8_0", attend(model, "q8_0", 1, 65536)),
        (f"{queries} queries, {keys} keys, F16", decompressed(model, "f16", queries, keys)),
        (f"{queries} queries, {keys} keys, Q8_0", decompressed(model, "q8_0", queries, keys)),
    ]


def kda_floor(gpu: Gpu) -> tuple[float, float]:
    """Seconds to read q, k, v, f, gate and write the output once; and for the recurrence's products in chunks of 64."""
    memory = 6 * 4 * HEADS * HEAD * TOKENS / (gpu.bandwidth * DRAM_SHARE)
    chunk = 64
    # per token and head: L and A against half a chunk, its solve for w and u, then w S, q S, k^T U and A U
    products = chunk * HEAD + chunk * 2 * HEAD / 2 + 3 * HEAD * HEAD + chunk * HEAD / 2
    peak = gpu.mma_f32 / (HOPPER_MMA_SHARE if gpu.architecture == 90 else 1)
    return memory, HEADS * TOKENS * products / (gpu.multiprocessors * gpu.clock * peak)
