"""Constructs that C++ has and Metal does not: each is found if it is planted, and the kernels have none.

For some of them Apple's compiler prints similar messages, for example "pointer type must have explicit address space
qualifier" and "program scope variable must reside in constant address space".
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulators.metal import CompileError, compile_device
from emulators.metal.build import preprocess
from emulators.metal.rules import violations

from kimi_gguf.tools.cuda_check import patched_ggml

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"

# Each planted fault: the source, and the message.
FAULTS = {
    "double": ("kernel void f(device float * y) { double a = 1; y[0] = a; }", "there is no double"),
    "the C++ library": ("kernel void f(device float * y) { y[0] = std::abs(-1); }", r"no C\+\+ standard library"),
    "a function of C": ("kernel void f(device float * y) { y[0] = expf(y[1]); }", "library has no 'expf'"),
    "memcpy": ("kernel void f(device float * y) { memcpy(y, y + 1, 4); }", "library has no 'memcpy'"),
    "a global variable": ("static int n = 3;", "must be in the constant address space: 'static int n"),
    "a constant without a value": ("constant int n;", "a constant without a value"),
    "a function constant with a value": (
        "constant int n [[function_constant(1)]] = 3;",
        "a function constant with a value",
    ),
    "a pointer without an address space": (
        "kernel void f(device float * y) { float a = y[0]; float * p = &a; y[0] = *p; }",
        r"a pointer without an address space: 'float \* p'",
    ),
    "a parameter without an address space": (
        "float f(const float * x) { return x[0]; }",
        "a pointer without an address space: 'const float",
    ),
    "a cast without an address space": (
        "kernel void f(device char * y) { ((float4 *) y)[0] = 1; }",
        "a pointer without an address space: 'float4",
    ),
    "another address space": (
        "kernel void f(device float * y, threadgroup float * s [[threadgroup(0)]]) { device float * p = s; *p = 1; }",
        "a conversion from the threadgroup to the device address space",
    ),
    "a threadgroup variable of a function": (
        "void f(int n) { threadgroup float s[4]; s[n] = 1; }",
        "a threadgroup variable outside of a kernel: 'f'",
    ),
    "an argument of a thread": ("kernel void f(thread float * y) {}", "an argument of a kernel in the thread address"),
    "an argument without an attribute": (
        "kernel void f(device float * y, uint i) { y[i] = 1; }",
        "an argument of a kernel without an attribute: 'uint i'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    source, words = FAULTS[fault]
    file = tmp_path / "planted.metal"
    file.write_text(HEAD + source)
    found = violations(preprocess(file, []))
    assert any(re.search(rf"planted\.metal:[34]: .*{words}", each) for each in found), found


def test_a_header_of_the_standard_library_is_not_found(tmp_path: Path) -> None:
    file = tmp_path / "planted.metal"
    file.write_text("#include <cmath>\n")
    with pytest.raises(CompileError, match="cmath: No such file"):
        preprocess(file, [])


ACCEPTED = """
constant float table[2] = { 1, 2 };
constant bool FC_flag [[function_constant(1)]];
struct pair { float a; float b; };
static inline float half_of(device const pair * p, thread float & x) { x = p->a * p->b; return x; }
template <typename T, float (*read)(device const T *, thread float &)>
kernel void f(
        constant int & n,
        device const T * x,
        device float * y,
        threadgroup float * s [[threadgroup(0)]],
        ushort i [[thread_index_in_threadgroup]]) {
    threadgroup float a[32];
    threadgroup float * p = s + n * i;
    threadgroup float4 * q = (threadgroup float4 *) (a + 4 * i);
    device float * z = FC_flag ? y + i : y;
    thread float value = 0;
    p[0] = read(x, value);
    q[0] = table[n & 1];
    z[0] = (n * i) & value > s[0];
    for (device float * e = y; e < y + n; ++e) {
        *e = s[i] * *p;
    }
}
"""


def test_what_the_language_allows_is_accepted() -> None:
    assert violations(ACCEPTED) == []


@pytest.mark.engine
def test_the_kernels_are_accepted() -> None:
    """Ours, and upstream's, which Apple's compiler is known to accept."""
    metal = patched_ggml("metal") / "src" / "ggml-metal"
    kernels = sorted((metal / "kernels").glob("*.metal"))
    assert len(kernels) > 30
    for source in kernels:
        assert violations(preprocess(source, [metal, metal.parent])) == []


def test_an_array_of_variable_size_does_not_compile(tmp_path: Path) -> None:
    """The compiler finds it, when a pipeline needs the kernel."""
    file = tmp_path / "planted.metal"
    file.write_text(HEAD + "kernel void f(constant int & n, device float * y) { float a[n]; y[0] = a[0]; }")
    kernels = compile_device(tmp_path / "device", [file]).parent / "kernels"
    (kernels / "f.cpp").write_text('#include "planted.metal.cpp"\n')
    assert subprocess.run([kernels / "compile", "f"], check=False).returncode != 0
    assert "variable length array" in (kernels / "f.log").read_text()
