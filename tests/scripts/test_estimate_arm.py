"""The loops that estimate_arm takes from a disassembly, and what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.scripts import estimate_arm
from kimi_gguf.scripts.estimate_arm import CORES, Compiled, Kernel, estimate, functions, loops

# Two loops around each other with two dot products; a branch forwards, and one to another function.
NESTED = """\

made.o:     file format elf64-littleaarch64

0000000000000000 <quant_gemm::tile<4>(int)>:
   0:	mov	x1, #0x0                   	// #0
   4:	ldr	q0, [x0]
   8:	sdot	v1.4s, v0.16b, v2.16b
   c:	sdot	v3.4s, v0.16b, v2.16b
  10:	b.ne	8 <quant_gemm::tile<4>(int)+0x8>  // b.any
  14:	add	x0, x0, #0x1
  18:	cbnz	x1, 4 <quant_gemm::tile<4>(int)+0x4>
  1c:	b	20 <quant_gemm::tile<4>(int)+0x20>
  20:	ret

0000000000000024 <other>:
  24:	b	8 <quant_gemm::tile<4>(int)+0x8>
"""
INNER = ("sdot\tv1.4s, v0.16b, v2.16b", "sdot\tv3.4s, v0.16b, v2.16b")
OUTER = ("ldr\tq0, [x0]", *INNER, "add\tx0, x0, #0x1")


def test_loops_are_found_by_their_branches_backwards() -> None:
    named = dict(functions(NESTED))
    assert list(named) == ["quant_gemm::tile<4>(int)", "other"]
    assert [loop.instructions for loop in loops(named["quant_gemm::tile<4>(int)"])] == [INNER, OUTER]
    assert list(loops(named["other"])) == []


def ten_each(instructions: Sequence[str], _core: object) -> float:
    return 10.0 * len(instructions)


def test_the_loop_around_adds_what_it_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_arm, "cycles", ten_each)
    tile = dict(functions(NESTED))["quant_gemm::tile<4>(int)"]
    # 8 units: four rounds of two dot products, 20 cycles each, and once 20 more
    assert estimate(tile, Kernel("", "", 8), CORES[-1], "sdot") == (4 * 20 + 20) / 8
    # a call has the instructions before and after the loops, too: 10 cycles for the move, without branches
    assert estimate(tile, Kernel("", "", 8, per_call=True), CORES[-1], "sdot") == (3 * 20 + 50) / 8
    assert estimate(tile, Kernel("", ""), CORES[-1], "sdot") == 20 / 2
    assert estimate(tile, Kernel("", "", 8), CORES[-1], "smmla") is None


def test_a_kernel_whose_loop_is_in_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_arm, "cycles", ten_each)
    tile = dict(functions(NESTED))["quant_gemm::tile<4>(int)"]
    monkeypatch.setattr(Compiled, "_functions", lambda *_: [("caller<4>", []), ("callee<4>", tile)])
    kernel = Kernel("kernels.cpp", "(caller|callee)<4>")
    assert Compiled().estimate(kernel, CORES[-1], "smmla", "sdot") == 20 / 2
    with pytest.raises(EngineError, match=r"no function .* with smmla"):
        Compiled().estimate(kernel, CORES[-1], "smmla")
