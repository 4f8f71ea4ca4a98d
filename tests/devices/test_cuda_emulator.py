"""The CUDA emulator: the faults and races that it finds, and upstream's own kernels on it.

Requires no GPU and no CUDA toolkit: kernels are compiled as C++ (tests/emulators/cuda).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cuda_program import NATIVE, compile_cuda
from emulators.cuda import RewriteError
from emulators.cuda.rewrite import rewrite
from ggml_variant import require_tools
from planted_faults import Expected, assert_found, run

SOURCE = NATIVE / "emulator-faults.cu"
ORDERS = {"forwards": "end", "backwards": "start", "17": "end"}


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
    "write behind a buffer": ("copy_shifted", 31, "y[i + shift] = x[i];", "a write 0 bytes after the end"),
    "a freed buffer": ("write_through", 0, "y[0][threadIdx.x] = 1.0f;", "which is freed"),
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
    "too much dynamic shared": (
        "write_dynamic_shared",
        None,
        None,
        "50176 bytes of dynamic shared memory; 49152 are",
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
    "unwritten shared memory": (None, None, None, "NaN"),
    "the order of lanes": (None, None, None, "depends on the order"),
    "the order of blocks": (None, None, None, "depends on the order"),
    "the order of streams": (None, None, None, "depends on the order"),
    "no wait for the previous kernel": ("never_waits", 0, None, "ends without griddepcontrol.wait"),
    "work left in a stream": (None, None, None, "work left that this stream does not wait for"),
}
# Accesses out of bounds that the guard page of one placement detects at once; the other placement hides reads.
AT_END = ("read behind a buffer", "write behind a buffer", "behind a shared array", "behind dynamic shared")
AT_START = ("read before a buffer", "before a shared array")


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


def test_on_arm(tmp_path: Path) -> None:
    """The other implementation of fiber switches and of subnormal numbers, under qemu."""
    prefix = "aarch64-linux-gnu"
    require_tools({f"{prefix}-g++": f"g++-{prefix}", "qemu-aarch64": "qemu-user"})
    program = compile_cuda(
        [SOURCE], tmp_path / "faults", options=["-march=armv8-a"], compiler=f"{prefix}-g++"
    )
    for fault, words in (
        ("none", "nothing found"),
        ("read behind a buffer", "after the end"),
        ("two barriers", "waits at"),
    ):
        command = ["qemu-aarch64", "-L", f"/usr/{prefix}", program, fault]
        assert words in subprocess.run(command, capture_output=True, text=True, check=False).stdout


# Kernel -> start of the comments at the two lines of its race; one is reported as current, the other as earlier.
RACES = {
    "no_barrier": ("written", "read"),
    "overwritten": ("read by another", "written again"),
    "only_a_shuffle": ("before the shuffle", "after it"),
    "only_the_warp": ("by one warp", "by the other"),
    "all_write": ("all of them", "all of them"),
    "copied": ("on its way", "read without __syncwarp"),
    "matrix": ("by each lane", "by the warp"),
    "too_early": ("before the wait", "before the wait"),
}


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cuda([SOURCE], tmp_path_factory.mktemp("cuda") / "races", races=True)


@pytest.mark.parametrize("kernel", RACES)
def test_a_planted_race_is_found(kernel: str, races: Path) -> None:
    """In whatever order the threads run."""
    for order in ORDERS:
        ended = run(races, kernel, KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order])
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "a race: this thread" in ended.stdout or "before griddepcontrol.wait" in ended.stdout
        lines = SOURCE.read_text().splitlines()
        for comment in RACES[kernel]:
            (number,) = [i for i, line in enumerate(lines, 1) if re.search(rf"\S.* // {comment}$", line)]
            assert f"{SOURCE.name}:{number}" in ended.stdout, ended.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_ordered_is_let_through(order: str, races: Path) -> None:
    ended = run(races, "ordered", KIMI_CUDA_ORDER=order)
    assert (ended.returncode, ended.stdout) == (0, "nothing found\n")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int a;\n__shared__ float s[2] = {};", "a.cu:2: a __shared__ declaration must be"),
        ('asm("mma" KIND ";" : "=r"(x));', "a.cu:1: the PTX of an asm must be written out as strings"),
        ("\n\nf<<<1, 2;", "a.cu:3: '<<<' without '>>>('"),
    ],
)
def test_source_that_is_not_rewritten(source: str, words: str) -> None:
    with pytest.raises(RewriteError) as refusal:
        rewrite(source, "a.cu")
    assert str(refusal.value).startswith(words)
