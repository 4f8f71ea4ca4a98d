"""The KDA kernels that need no tensor cores stay portable: AMD's compiler accepts them for a device with warps of 32.

Nothing of ours runs on AMD devices: the operators are off there, and upstream's HIP backend needs a newer compiler than
Debian 12's. Input: the .cu files as they are, with CUDA's names replaced by tests/native/hip. If hipcc is missing, the
tests are skipped and say how to get it; with KIMI_CI set they fail instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "ggml_ops" / "kda" / "cuda"
HEAD_SIZES = (32, 64, 96, 128, 256)
DEVICE = "gfx1030"  # RDNA 2; the kernels would be wrong with the warps of 64 lanes of CDNA


@pytest.fixture(scope="module", autouse=True)
def hipcc() -> None:
    if shutil.which("hipcc") is None:
        missing = (
            "no hipcc found; on Debian: apt-get install --no-install-recommends hipcc (70 MB, 370 MB on disk)"
        )
        if os.environ.get("KIMI_CI"):
            pytest.fail(missing)
        pytest.skip(missing)


def compile_hip(source: Path, assembly: Path) -> subprocess.CompletedProcess[str]:
    """Compile the device code of a source with all warnings as errors, except those of loops that are not unrolled."""
    command = ["hipcc", "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-pass-failed"]
    command += ["-Wno-unused-command-line-argument", f"--offload-arch={DEVICE}", "--cuda-device-only", "-S"]
    folders = (ROOT / "tests" / "native" / "hip", KERNELS, ROOT / "ggml_ops" / "common" / "cuda")
    command += [*(f"-I{folder}" for folder in folders), "-x", "hip", str(source)]
    environment = os.environ | {"HIP_PLATFORM": "amd"}  # hipcc would call nvcc if it finds one
    return subprocess.run(
        [*command, "-o", str(assembly)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        (
            "kda-scan-steps.cu",
            {
                f"{name}E"
                for size in HEAD_SIZES
                for name in (
                    f"steps_kernelILi{size}ELi2",
                    f"steps_kernelILi{size}ELi4",
                    f"finish_kernelILi{size}",
                )
            },
        ),
        ("kda-conv.cu", {f"conv_kernelILi{size}E" for size in HEAD_SIZES}),
        ("kda-state.cu", {"copy_states_kernel", "gather_states_kernel"}),
    ],
)
def test_kernels_compile_for_amd_devices_without_scratch_memory(
    source: str, kernels: set[str], tmp_path: Path
) -> None:
    ended = compile_hip(KERNELS / source, tmp_path / "out.s")
    assert ended.returncode == 0, ended.stderr
    text = (tmp_path / "out.s").read_text()
    found = re.findall(r"\.amdhsa_kernel (\S+)", text)
    assert len(found) == len(kernels)
    for kernel in kernels:
        assert any(kernel in name for name in found), kernel
    assert set(re.findall(r"\.amdhsa_private_segment_fixed_size (\d+)", text)) == {"0"}, "values in memory"
    assert set(re.findall(r"\.amdhsa_wavefront_size32 (\d+)", text)) == {"1"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('unsigned y; asm("mov.u32 %0, %laneid;" : "=r"(y)); x[0] = y;', "error"),
        ("__ldcs(x);", "undeclared identifier '__ldcs'"),
    ],
)
def test_what_only_nvidia_devices_have_is_refused(body: str, words: str, tmp_path: Path) -> None:
    source = tmp_path / "ptx.cu"
    source.write_text(f'#include "kda-device.cuh"\n__global__ void ptx(float * x) {{ {body} }}\n')
    ended = compile_hip(source, tmp_path / "out.s")
    assert ended.returncode != 0 and words in ended.stderr
