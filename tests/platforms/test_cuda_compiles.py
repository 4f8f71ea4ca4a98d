"""Compiles our CUDA sources with nvcc for each supported architecture. No kernel spills registers.

If nvcc is missing, the tests are skipped and say how to get it; with KIMI_CI set they fail instead.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.tools import cuda_check
from kimi_gguf.tools.cuda_check import (
    ARCHITECTURES,
    compile_cuda,
    cuda_sources,
    find_nvcc,
    patched_ggml,
    table,
)


@pytest.fixture(scope="module", autouse=True)
def nvcc() -> Path:
    try:
        return find_nvcc()
    except KimiError as error:
        if os.environ.get("KIMI_CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


# The one for which the mma kernels are empty, and the one for which most is compiled; TIGHT also for two with less
# shared memory. The others with --full.
USUAL = (75, 90)
TIGHT = "latent-attend.cu"  # its kernels use every register
SMALL = (86, 120)


def is_usual(source: Path, architecture: int) -> bool:
    return architecture in USUAL or (source.name == TIGHT and architecture in SMALL)


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(
            source,
            architecture,
            marks=() if is_usual(source, architecture) else pytest.mark.full,
            id=f"{source.name}-{architecture}",
        )
        for source in cuda_sources()
        for architecture in ARCHITECTURES
    ],
)
def test_our_kernels_stay_in_registers(source: Path, architecture: int) -> None:
    kernels = compile_cuda(source, architecture)
    spilling = [each for each in kernels if not each.clean]
    assert not spilling, "\n".join(table(spilling))


def changed_sources() -> list[Path]:
    """Upstream's .cu files that the series changes, after the change."""
    both = (patched_ggml(), upstream_source() / "llama.cpp" / "ggml")
    ours, upstream = (ggml / "src" / "ggml-cuda" for ggml in both)
    shared = [path for path in sorted(ours.glob("*.cu")) if (upstream / path.name).is_file()]
    return [path for path in shared if path.read_bytes() != (upstream / path.name).read_bytes()]


@pytest.mark.full  # a minute each; the emulated devices of test_cuda_backend.py compile the same sources as C++
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_upstream_sources_changed_by_patches_compile(architecture: int) -> None:
    sources = changed_sources()
    assert {each.name for each in sources} == {"fattn.cu", "ggml-cuda.cu", "mmvq.cu"}
    for source in sources:
        compile_cuda(source, architecture)


SPILLING = """
template <int N> __global__ void __launch_bounds__(1024) spilling(float * x) {
    float a[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        a[i] = x[i * 1024 + threadIdx.x];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i * 1024 + threadIdx.x] = a[N - 1 - i] * a[0];
    }
}
template __global__ void spilling<200>(float *);
template __global__ void spilling<2>(float *);
"""


def test_a_spill_is_found(tmp_path: Path) -> None:
    (tmp_path / "spilling.cu").write_text(SPILLING)
    kernels = {each.name: each for each in compile_cuda(tmp_path / "spilling.cu", 90)}
    assert set(kernels) == {"spilling<200>", "spilling<2>"}
    assert kernels["spilling<200>"].spills > 0
    assert not kernels["spilling<200>"].clean
    assert kernels["spilling<2>"].clean


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x[0] = y;", 'identifier "y" is undefined'),
        ("int y; x[0] = 1.0f;", 'variable "y" was declared but never referenced'),
    ],
)
def test_errors_and_warnings_are_passed_on(body: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text(f"__global__ void wrong(float * x) {{ {body} }}")
    with pytest.raises(EngineError, match=rf"wrong.cu does not compile for sm_80(.|\n)*{words}"):
        compile_cuda(tmp_path / "wrong.cu", 80)


def test_no_nvcc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    monkeypatch.setattr(cuda_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"no nvcc found(.|\n)*pip install -e '.\[cuda\]'"):
        find_nvcc()
