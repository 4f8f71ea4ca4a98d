"""The Metal emulator: the faults that it finds, and upstream's own kernels on it.

Requires no Mac: kernels are compiled as C++ (tests/emulators/metal).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulators.metal import RewriteError
from emulators.metal.rewrite import rewrite
from metal_program import NATIVE, compile_metal
from native_program import passed_cases
from planted_faults import Expected, assert_found, line_of, run
from selection import some_of

from kimi_gguf.engine.builds import Engine

SOURCE = NATIVE / "emulator-faults.metal"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_metal("emulator-faults", tmp_path_factory.mktemp("metal"))


# The thread or line is None if the fault has none, or is detected before the dispatch.
FAULTS: dict[str, Expected] = {
    "read behind a buffer": (
        "copy",
        31,
        "y[i] = x[int(i) + args.shift];",
        "a read 0 bytes after the end of a buffer of 4096 bytes",
    ),
    "read before a buffer": ("copy", 0, "y[i] = x[int(i)", "a read 4 bytes before the begin of a buffer"),
    "write behind a buffer": ("copy_shifted", 31, "y[int(i) + args.shift]", "a write 0 bytes after the end"),
    "misaligned vectors": (
        "copy_vectors",
        1,
        "const float4 v =",
        "a misaligned access: .* must be a multiple of 16 bytes",
    ),
    "behind a table": ("read_table", 3, "y[i] = table", r"the index 4 is beyond the array 'float \[4\]'"),
    "behind constant memory": (
        "read_constants",
        31,
        "y[i] = x[i + args.shift];",
        "a read 0 bytes after the end of constant memory of 124 bytes",
    ),
    "behind threadgroup memory": (
        "write_argument",
        31,
        "s[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory argument 0 of 128 bytes, byte 128",
    ),
    "behind a threadgroup array": (
        "write_array",
        31,
        "p[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory s of 128 bytes, byte 128",
    ),
    "unwritten threadgroup memory": (
        "read_unwritten",
        24,
        "y[i] = s[31 - i];",
        "a read of threadgroup memory that no thread has written: s of 128 bytes, byte 28",
    ),
    "a return before a barrier": ("early_return", 40, None, r"ended while thread \(0,0,0\) waits for it at"),
    "two barriers": (
        "two_barriers",
        32,
        None,
        r"thread \(32,0,0\) waits here while thread \(0,0,0\) waits at .*emulator-faults.metal:\d+",
    ),
    "two sums": (
        "two_sums",
        16,
        "y[i] = simd_sum(2.0f);",
        r"thread \(16,0,0\) is at simd_sum here while thread \(0,0,0\) waits at simd_sum, ",
    ),
    "a deadlock": (
        "sum_or_barrier",
        31,
        None,
        r"no thread of the threadgroup can go on:\n.*lanes 0xffffffdf .* wait at simd_sum, .*\n"
        r".*lanes 0x00000020 \(the first is thread \(5,0,0\)\) wait at threadgroup_barrier",
    ),
    "half a simdgroup's matrix": (
        "half_a_matrix",
        31,
        "simdgroup_store(m, y, 8);",
        "not all 32 lanes are there",
    ),
    "a matrix at several addresses": (
        "matrices_of_lanes",
        31,
        "simdgroup_store(m, y + i, 8);",
        "lanes have different addresses",
    ),
    "a race": (
        "race",
        None,
        None,
        "a race: a (read|write) of threadgroup memory that another simdgroup of the threadgroup (wrote|read) at "
        ".*emulator-faults.metal:"
        rf"({line_of(SOURCE, 's[i] = float(i);')}|{line_of(SOURCE, 'y[i] = s[63 - i];')}) without a barrier between",
    ),
    "a race of lanes": (
        "race_of_lanes",
        16,
        "s[i % 16] = float(i);",
        "a race: a write of threadgroup memory that another lane of the threadgroup wrote",
    ),
    "overlapping writes of lanes": (
        "overlap",
        1,
        "y[i / 2] = float(i);",
        "a race: a write of device memory that another lane of the threadgroup wrote without a barrier",
    ),
    "a barrier without device memory": (
        "read_after_barrier",
        None,
        "y[i + 64] = y[63 - i];",
        "a race: a read of device memory that another simdgroup of the threadgroup wrote without a barrier",
    ),
    "a barrier without memory": (
        "barrier_without_memory",
        32,
        None,
        "a race: a read of threadgroup memory that another simdgroup of the threadgroup wrote",
    ),
    "the order of lanes": (None, None, None, "the result depends on the order of lanes"),
    "a local array": (
        "local_array",
        0,
        "y[0] = a[args.shift];",
        r"the index 4 is beyond the array 'float \[4\]'",
    ),
    "a division by zero": ("divide", 0, "y[0] = 7 / args.shift;", "a division"),
    "a shift too far": ("shift", 0, "y[0] = 7 << args.shift;", "a shift of 'int' 7 by 32"),
    "no barrier before a read": (
        "copy_shifted",
        0,
        "y[int(i) + args.shift]",
        "a read of bytes that kernel copy writes concurrently: no memory barrier between",
    ),
    "no barrier before a write": (
        "copy_shifted",
        0,
        "y[int(i) + args.shift]",
        "a write of bytes that kernel copy reads concurrently: no memory barrier between",
    ),
    "no barrier between writes": (
        "copy_shifted",
        0,
        "y[int(i) + args.shift]",
        "a write of bytes that kernel copy writes concurrently: no memory barrier between",
    ),
    "writes of several threadgroups": (
        "write_row",
        0,
        "y[i % 32] = float(i);",
        "a write of bytes that another threadgroup of the dispatch writes",
    ),
    "a read of another threadgroup's bytes": (
        "read_previous",
        0,
        "y[i] = i >= 32 ? y[i - 32] : 1;",
        "a read of bytes that another threadgroup of the dispatch writes",
    ),
    "a read outside of the tensors": (
        "copy of COPY",
        31,
        "y[i] = x[int(i)",
        "a read outside of the node's tensors: 0 bytes after the end of one of 2048 bytes",
    ),
    "a write outside of the tensors": (
        "copy_shifted of COPY",
        31,
        "y[int(i) + args.shift]",
        "a write outside of the node's tensors: 0 bytes after the end of one of 2048 bytes",
    ),
    "too many threads": (
        "early_return",
        None,
        None,
        r"a threadgroup is \(1025,1,1\); it must have 1 to 1024 threads",
    ),
    "too much threadgroup memory": (
        "write_argument",
        None,
        None,
        "32784 bytes of threadgroup memory; the limit is 32768",
    ),
    "no threadgroup memory": (
        "write_argument",
        0,
        "s[int(i) + args.shift] = 1;",
        "outside of all threadgroup memory",
    ),
    "an argument that is not set": ("copy", None, None, "the buffer argument 2 is not set"),
    "a constant of another type": (
        None,
        None,
        None,
        "the function constant 7, FC_factor, .* has another type",
    ),
    "a constant that is not set": (
        "scale",
        0,
        "y[i] = x[i] * FC_factor;",
        "the function constant 7, FC_factor, is not set",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, faults: Path) -> None:
    assert_found(faults, fault, FAULTS[fault], SOURCE)


@pytest.mark.parametrize("order", ["forwards", "backwards", "17"])
def test_kernels_without_a_fault_are_let_through(order: str, faults: Path) -> None:
    ended = run(faults, "none", KIMI_METAL_ORDER=order)
    assert (ended.returncode, ended.stdout) == (0, "nothing found\n")


def test_every_planted_fault_is_expected(faults: Path) -> None:
    planted = set(re.findall(r'^    \{ "(.*?)",', (NATIVE / "emulator-faults.cpp").read_text(), re.MULTILINE))
    assert planted == {*FAULTS, "none"}


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(RewriteError, match="the parameter 'uint i' of a kernel is not known"):
        rewrite("kernel void f(device float * y, uint i) {}", "test")


# Operator of upstream -> pattern of its cases in test-backend-ops; there are at least this number.
UPSTREAMS = {
    "RMS_NORM": (r"ne=\[(64|1025),5,4,3\]", 20),
    "GATED_DELTA_NET": (r"head_size=(32|64|128)", 25),
    # one column: matrix-vector kernels; 9 and 16: simdgroup matrices; 31 rows: vectors at any element
    "MUL_MAT": (
        r"type_a=(f32|f16|q4_0),type_b=f32,m=16,n=(1|9|16),k=256,bs=\[[0-9]*,1\],nr=\[1,1\]"
        r"|type_a=f32,type_b=f32,m=31,n=509,k=2051",
        16,
    ),
    # one query: vectors; 32: simdgroup matrices. 113 keys: the last block is padded.
    "FLASH_ATTN_EXT": (
        r"hsk=(64|128),hsv=(64|128),nh=4,nr23=\[1,1\],kv=113,nb=(1|3|32),mask=1,sinks=[01],max_bias=0.0+,"
        r"logit_softcap=0.0+,prec=f32,type_K=(f16|q8_0)",
        10,
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("operator", some_of(UPSTREAMS, "RMS_NORM", "MUL_MAT"))
def test_upstreams_kernels_as_they_are(operator: str, metal_backend: Path, engine: Engine) -> None:
    cases, count = UPSTREAMS[operator]
    variables = {
        "GGML_BACKEND_PATH": str(metal_backend), "GGML_NO_BACKTRACE": "1", "KIMI_METAL_ORDER": "backwards",
        "LLAMA_TEST_FA_VEC_DISABLE": "1",  # a comparison of all variants of vector kernels, which takes minutes
    }  # fmt: skip
    assert passed_cases(engine, "MTL0", operator, "-p", cases, **variables) >= count
