"""The GPUs of docs/gpu-roofline.md, with the sources of their figures."""

from __future__ import annotations

from dataclasses import dataclass

DRAM_SHARE = 0.9  # of the bandwidth that a long copy reaches: FlashMLA reads 3000 of an H800's 3350 GB/s
HOPPER_MMA_SHARE = 0.63  # of the peak that mma.sync reaches on Hopper; wgmma reaches all of it


@dataclass(frozen=True)
class Gpu:
    """A device. mma: multiply-adds of halves in a cycle of a multiprocessor, by the type of the sum."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    mma_f32: float
    mma_f16: float
    fma: int  # float32 multiply-adds in a cycle
    alu: int  # integer and logic operations in a cycle
    shared: int  # bytes of shared memory of a multiprocessor, for all blocks
    threads: int
    blocks: int
    l2: int  # MiB
    source: str

    @property
    def family(self) -> str:
        """Which thresholds the kernels use: data centre devices sum products of halves in F32 at full rate."""
        return "data centre" if self.mma_f32 == self.mma_f16 else "GeForce"

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block can have."""
        return self.shared - 1024


_HOPPER = 2048 * HOPPER_MMA_SHARE
GPUS = (
    Gpu("H200", 90, 132, 1.98e9, 4.8e12, _HOPPER, _HOPPER, 128, 64, 228 << 10, 2048, 32, 50,
        "NVIDIA H200 datasheet; H100 white paper; mma.sync: arXiv 2402.13499"),
    Gpu("H100", 90, 132, 1.98e9, 3.35e12, _HOPPER, _HOPPER, 128, 64, 228 << 10, 2048, 32, 50,
        "NVIDIA H100 (SXM5) white paper; mma.sync: arXiv 2402.13499"),
    Gpu("A100", 80, 108, 1.41e9, 2.039e12, 1024, 1024, 64, 64, 164 << 10, 2048, 32, 40,
        "NVIDIA A100 (SXM4, 80 GB) white paper"),
    Gpu("RTX 3090", 86, 82, 1.695e9, 0.936e12, 256, 512, 128, 64, 100 << 10, 1536, 16, 6,
        "NVIDIA GA102 white paper"),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, 256, 512, 128, 64, 100 << 10, 1536, 24, 72,
        "NVIDIA Ada white paper"),
    Gpu("RTX 5090", 120, 170, 2.407e9, 1.792e12, 256, 512, 128, 128, 100 << 10, 1536, 24, 96,
        "NVIDIA RTX Blackwell white paper"),
)  # fmt: skip
# Cycles of a load from the L2, by architecture: microbenchmarks of arXiv 2402.13499 and 2507.10789, rounded
L2_LATENCY = {80: 260, 86: 260, 89: 290, 90: 270, 120: 360}
