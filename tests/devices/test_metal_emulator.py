"""The Metal emulator: what kernels compute on it, and the faults that it finds.

Requires no Mac: kernels are compiled as C++ (tests/emulators/metal).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulators.metal import RewriteError
from emulators.metal.rewrite import rewrite
from metal_program import NATIVE, compile_metal
from planted_faults import Expected, assert_found, line_of, run

SOURCE = NATIVE / "emulator-faults.metal"


def test_kernels_compute_what_they_say(tmp_path: Path) -> None:
    ended = run(compile_metal("emulator-features", tmp_path))
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr


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
    "read far behind a buffer": ("copy", 0, "y[i] = x[int(i)", "a read 395904 bytes after the end"),
    "write behind a buffer": ("copy_shifted", 31, "y[int(i) + args.shift]", "a write 0 bytes after the end"),
    "write before a buffer": (
        "copy_shifted",
        0,
        "y[int(i) + args.shift]",
        "a write 4 bytes before the begin",
    ),
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
    "behind a small struct": (
        "copy",
        0,
        "y[i] = x[int(i)",
        "a read 0 bytes after the end of constant memory of 4 bytes",
    ),
    "behind threadgroup memory": (
        "write_argument",
        31,
        "s[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory argument 0 of 128 bytes, byte 128",
    ),
    "before threadgroup memory": (
        "write_argument",
        0,
        "s[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory argument 0 of 128 bytes, byte -4",
    ),
    "behind a threadgroup array": (
        "write_array",
        31,
        "p[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory s of 128 bytes, byte 128",
    ),
    "before a threadgroup array": (
        "write_array",
        0,
        "p[int(i) + args.shift] = 1;",
        "a write outside of the threadgroup memory s of 128 bytes, byte -4",
    ),
    "unwritten threadgroup memory": (
        "read_unwritten",
        24,
        "y[i] = s[31 - i];",
        "a read of threadgroup memory that no thread has written: s of 128 bytes, byte 28",
    ),
    "a conditional barrier": (
        "conditional_barrier",
        40,
        None,
        r"this thread ended while thread \(0,0,0\) waits for it at threadgroup_barrier, .*emulator-faults.metal:\d+",
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
    "a race of writes": (
        "race_of_writes",
        32,
        "s[i % 32] = float(i);",
        "a race: a write of threadgroup memory that another simdgroup of the threadgroup wrote",
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
    "overlapping writes of simdgroups": (
        "overlap_of_simdgroups",
        32,
        "y[i & 31] = float(i);",
        "a race: a write of device memory that another simdgroup of the threadgroup wrote without a barrier",
    ),
    "a read of what another lane writes": (
        "read_next",
        1,
        "y[i] = y[i + 1];",
        "a race: a write of device memory that another lane of the threadgroup read without a barrier",
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
    "a read of what the next lane writes": (
        "read_next_lane",
        None,
        None,
        "a race: a (read|write) of threadgroup memory that another lane of the threadgroup (wrote|read)",
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
    "equal writes of several threadgroups": (
        "write_one",
        0,
        "y[0] = 1;",
        "a write of bytes that another threadgroup of the dispatch writes",
    ),
    "a read of another threadgroup's bytes": (
        "read_previous",
        0,
        "y[i] = i >= 32 ? y[i - 32] : 1;",
        "a read of bytes that another threadgroup of the dispatch writes",
    ),
    "a write of bytes that others read": (
        "write_what_others_read",
        0,
        "y[i] = y[i + 32];",
        "a write of bytes that another threadgroup of the dispatch reads",
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
    "no threadgroups": ("race", None, None, r"the grid is \(0,1,1\)"),
    "too much threadgroup memory": (
        "write_argument",
        None,
        None,
        "32784 bytes of threadgroup memory; the limit is 32768",
    ),
    "an odd size of threadgroup memory": (
        "write_argument",
        None,
        None,
        "120 bytes .*; it must be a multiple of 16",
    ),
    "no threadgroup memory": (
        "write_argument",
        0,
        "s[int(i) + args.shift] = 1;",
        "outside of all threadgroup memory",
    ),
    "too large an array": ("large_array", 0, None, "32772 bytes of threadgroup memory; the limit is 32768"),
    "too many bytes of constants": (None, None, None, "4100 bytes for the argument 0; the limit is 4096"),
    "an argument that is not set": ("copy", None, None, "the buffer argument 2 is not set"),
    "an unknown kernel": (None, None, None, "there is no kernel 'unknown'"),
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
    "another constant that is not set": (
        "bound",
        0,
        "y[i] = FC_bounded",
        "the function constant 8, FC_bounded, is not set",
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


def test_an_unknown_order_is_refused(faults: Path) -> None:
    ended = run(faults, "none", KIMI_METAL_ORDER="sideways")
    assert ended.returncode != 0
    assert "KIMI_METAL_ORDER is 'sideways'; known: " in ended.stderr


def test_rewriting_keeps_lines_and_lists_kernels() -> None:
    source = (NATIVE / "emulator-features.metal").read_text()
    text, kernels = rewrite(source, "features")
    assert text.count("\n") == source.count("\n")
    assert {each.name: each.function for each in kernels if "product" in each.name} == {
        "product_f32": "product<float>",
        "product_f16": "product<half>",
        "product_bf16": "product<bfloat>",
    }
    (product, *_) = [each.parameters for each in kernels if each.name == "product_f32"]
    assert product[4:] == (
        "metal_emulator::ThreadgroupMemory<0>",
        "metal_emulator::thread_index_in_simdgroup",
    )


def test_an_instantiation_may_repeat_the_parameters() -> None:
    source = (
        "template <typename T, int n> kernel void f(device T * y) {}\n"
        'template [[host_name("f_half")]] kernel void f<half, (1 << 2)>(device half * y);\n'
    )
    text, (kernel,) = rewrite(source, "test")
    assert (kernel.name, kernel.function) == ("f_half", "f<half, (1 << 2)>")
    assert "f_half" not in text


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(RewriteError, match="the parameter 'uint i' of a kernel is not known"):
        rewrite("kernel void f(device float * y, uint i) {}", "test")
