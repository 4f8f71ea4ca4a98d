"""The CUDA emulator: which kernels it runs, the faults that it finds, and upstream's own kernels on it.

Requires no GPU and no CUDA toolkit: kernels are compiled as C++ (tests/emulators/cuda).
"""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
from cuda_program import NATIVE, compile_cuda, compile_with_ggml
from ggml_variant import require_tools
from planted_faults import Expected, assert_found, run

from kimi_gguf.engine.builds import Engine, upstream_source

SOURCE = NATIVE / "emulator-faults.cu"
ORDERS = {"forwards": "end", "backwards": "start", "17": "end"}


@pytest.mark.parametrize("races", [False, True], ids=["plain", "watched"])
@pytest.mark.parametrize("name", ["emulator-features", "emulator-matrices"])
def test_kernels_compute_what_they_say(name: str, races: bool, tmp_path: Path) -> None:
    ended = run(compile_cuda([NATIVE / f"{name}.cu"], tmp_path / name, races=races))
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr


def test_without_conversions_of_the_processor(tmp_path: Path) -> None:
    """Half precision without F16C, as on other processors."""
    source = NATIVE / "emulator-features.cu"
    ended = run(compile_cuda([source], tmp_path / "plain", options=["-mno-f16c", "-mno-avx"]))
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr


@pytest.mark.full
@pytest.mark.parametrize("name", ["emulator-features", "emulator-matrices"])
def test_on_arm(name: str, tmp_path: Path) -> None:
    """The other implementation of fiber switches, under qemu."""
    prefix = "aarch64-linux-gnu"
    require_tools({f"{prefix}-g++": f"g++-{prefix}", "qemu-aarch64": "qemu-user"})
    program = compile_cuda(
        [NATIVE / f"{name}.cu"], tmp_path / name, options=["-march=armv8-a"], compiler=f"{prefix}-g++"
    )
    ended = subprocess.run(
        ["qemu-aarch64", "-L", f"/usr/{prefix}", program], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr


@pytest.mark.parametrize("fast", [True, False])
def test_fast_math_is_what_ggml_compiles_with(fast: bool, tmp_path: Path) -> None:
    (tmp_path / "fast.cu").write_text(FAST_MATH)
    program = compile_cuda([tmp_path / "fast.cu"], tmp_path / "fast", fast_math=fast)
    far, subnormal, near, host = (float(word) for word in run(program).stdout.split())
    assert (far == 0.0, subnormal == 0.0) == (fast, fast)
    assert far == 0.0 or abs(far / math.exp(-100) - 1) < 0.1
    assert abs(near / math.exp(-20) - 1) < 3e-6  # 20 * 2^-24 of the argument, and a margin
    assert host == 1e-39


FAST_MATH = """
#include <cstdio>
__global__ void values(const float * x, float * y) {
    y[0] = expf(x[0]);
    y[1] = x[1] * x[2];
    y[2] = expf(x[3]);
}
int main() {
    cuda_emulator::DeviceArray<float> x(std::vector<float>{ -100.0f, 1e-20f, 1e-19f, -20.0f }), y(3);
    values<<<1, 1>>>(x.data(), y.data());
    volatile float small = 1e-20f;
    const float    host  = small * 1e-19f;  // the host's own arithmetic stays
    printf("%.9g %.9g %.9g %.3g\\n", y.values()[0], y.values()[1], y.values()[2], host);
}
"""


@pytest.mark.engine
def test_upstreams_kernels_as_they_are(engine: Engine, tmp_path: Path) -> None:
    ggml = upstream_source() / "llama.cpp" / "ggml"
    source = NATIVE / "emulator-upstream.cu"
    ended = run(compile_with_ggml(engine, [source], tmp_path / "upstream", ggml=ggml, options=["-w"]))
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cuda([SOURCE], tmp_path_factory.mktemp("cuda") / "faults")


# The thread or line is None if the fault has none, or is detected at the launch or at its end.
FAULTS: dict[str, Expected] = {
    "read behind a buffer": (
        "copy",
        31,
        "y[i]        = x[i + shift];",
        "a read 0 bytes after the end of the buffer",
    ),
    "read before a buffer": (
        "copy",
        0,
        "y[i]        = x[i + shift];",
        "a read 4 bytes before the begin of the buffer",
    ),
    "read far behind a buffer": (
        "copy",
        0,
        "y[i]        = x[i + shift];",
        "a read 3999872 bytes after the end",
    ),
    "write behind a buffer": ("copy_shifted", 31, "y[i + shift] = x[i];", "a write 0 bytes after the end"),
    "write before a buffer": ("copy_shifted", 0, "y[i + shift] = x[i];", "a write 4 bytes before the begin"),
    "a freed buffer": ("write_through", 0, "y[0][threadIdx.x] = 1.0f;", "which is freed"),
    "a freed argument": ("copy", None, None, "argument 2 is 0x\\w+, which is in a freed buffer"),
    "freed twice": (None, None, None, "cudaFree: invalid or already freed pointer"),
    "memory of the host": ("copy", None, None, "argument 2 is 0x\\w+, which is no address of the device"),
    "misaligned vectors": (
        "copy_vectors",
        1,
        "const float4 v = *reinterpret_cast<const float4 *>(x + threadIdx.x);",
        "a misaligned access: .* must be a multiple of 16 bytes",
    ),
    "behind a shared array": (
        "write_static_shared",
        31,
        "s[i] = 1.0f;",
        "a write 0 bytes after the end of the shared array 's' of 128 bytes",
    ),
    "before a shared array": (
        "write_static_shared",
        0,
        "s[i] = 1.0f;",
        "a write 4 bytes before the begin of the shared array 's' of 128 bytes",
    ),
    "an index of two": (
        "write_indexed_shared",
        7,
        "s[threadIdx.x / 8][threadIdx.x % 8 + shift] = 1.0f;",
        "the index 8 is beyond the array 'float \\[8\\]'",
    ),
    "behind dynamic shared": (
        "write_dynamic_shared",
        31,
        "s[int(threadIdx.x) + shift] = 1.0f;",
        "a write 0 bytes after the end of the shared array 'dynamic' of 128 bytes",
    ),
    "before dynamic shared": (
        "write_dynamic_shared",
        0,
        "s[int(threadIdx.x) + shift] = 1.0f;",
        "a write 4 bytes before the begin of the shared array 'dynamic' of 128 bytes",
    ),
    "too much dynamic shared": (
        "write_dynamic_shared",
        None,
        None,
        "50176 bytes of dynamic shared memory; 49152 are",
    ),
    "a local array": (
        "local_array",
        0,
        "y[0]       = a[n];",
        "the index 4 is beyond the array 'float \\[4\\]'",
    ),
    "a conditional barrier": (
        "conditional_barrier",
        40,
        None,
        r"this thread ended while thread \(0,0,0\) waits for it at .*emulator-faults.cu:\d+",
    ),
    "a return before a barrier": ("early_return", 40, None, r"ended while thread \(0,0,0\) waits for it at"),
    "two barriers": (
        "two_barriers",
        32,
        None,
        r"thread \(32,0,0\) waits at __syncthreads here while thread \(0,0,0\) waits at .*emulator-faults.cu:\d+",
    ),
    "two shuffles": (
        "two_shuffles",
        16,
        None,
        r"thread \(16,0,0\) is at __shfl_xor_sync here while thread \(0,0,0\) waits at __shfl_xor_sync, ",
    ),
    "a lane outside of a mask": (
        "left_out",
        16,
        "y[threadIdx.x] = __shfl_sync(0x0000ffff, 1.0f, 0);",
        "lane 16 calls it with the mask 0x0000ffff, which leaves this lane out",
    ),
    "a deadlock": (
        "shuffle_or_barrier",
        31,
        None,
        r"no thread of the block can go on:\n.*lanes 0xffffffdf .* wait at __shfl_sync, .*\n"
        r".*lanes 0x00000020 \(the first is thread \(5,0,0\)\) wait at __syncthreads",
    ),
    "half a warp's product": (
        "half_a_product",
        0,
        None,
        "mma.sync: only the lanes 0x0000ffff of the warp are there",
    ),
    "unknown PTX": (
        "unknown_instruction",
        0,
        'asm("vabsdiff4',
        'PTX that the emulator does not know: "vabsdiff4.u32.u32.u32 %0, %1, %2, %3"',
    ),
    "a misaligned matrix": (
        "misaligned_matrix",
        1,
        None,
        "ldmatrix: the address of a row is not aligned to 16 bytes",
    ),
    "a copy never waited for": ("async_forgotten", 0, None, "cp.async: this copy is never waited for"),
    "a misaligned copy": ("async_misaligned", 0, None, "cp.async: .* is not aligned to the copy's 16 bytes"),
    "a deep stack": ("deep", 0, "a[i] = float(i);", "local variables exceed the emulator's stack"),
    "a division by zero": ("divide", 0, "y[0] = 7 / n;", "a division"),
    "a shift too far": ("shift", 0, "y[0] = 7 << n;", "a shift of 'int' 7 by 32"),
    "a trap": ("stop", 0, "__trap();", "__trap"),
    "no wait for the previous kernel": ("never_waits", 0, None, "ends without griddepcontrol.wait"),
    "work left in a stream": (None, None, None, "work left that this stream does not wait for"),
    "a wait for ever": (None, None, None, "a stream waits for an event that is not recorded"),
    "too many threads": ("copy", None, None, r"a block is \(1025,1,1\); it must have 1 to 1024 threads"),
    "no blocks": ("copy", None, None, r"the grid is \(0,1,1\)"),
}
# Accesses out of bounds that the guard page of one placement detects at once; the other placement hides reads.
AT_END = ("read behind a buffer", "write behind a buffer", "behind a shared array", "behind dynamic shared")
AT_START = ("read before a buffer", "write before a buffer", "before a shared array", "before dynamic shared")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, faults: Path) -> None:
    placement = "start" if fault in AT_START else "end"
    assert_found(faults, fault, FAULTS[fault], SOURCE, KIMI_CUDA_PLACEMENT=placement)


@pytest.mark.parametrize("fault", [each for each in (*AT_END, *AT_START) if "shared" in each])
def test_a_write_beside_an_array_is_found_in_either_placement(fault: str, faults: Path) -> None:
    """If no guard page is hit, the memory next to the array is checked after the launch."""
    ended = run(faults, fault, KIMI_CUDA_PLACEMENT="end" if fault in AT_START else "start")
    assert ended.returncode == 1
    assert re.search(r"a write \d bytes (after the end|before the begin) of the shared array", ended.stdout)


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_a_fault_is_let_through(order: str, faults: Path) -> None:
    ended = run(faults, "none", KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order])
    assert (ended.returncode, ended.stdout) == (0, "nothing found\n")


@pytest.mark.parametrize(
    ("name", "value"), [("KIMI_CUDA_ORDER", "sideways"), ("KIMI_CUDA_PLACEMENT", "middle")]
)
def test_an_unknown_option_is_refused(name: str, value: str, faults: Path) -> None:
    ended = run(faults, "none", **{name: value})
    assert ended.returncode != 0
    assert f"{name} is '{value}'; known: " in ended.stderr
