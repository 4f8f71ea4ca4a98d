"""The loops that estimate_arm takes from a disassembly, and what it makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

import pytest

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.scripts import estimate_arm
from kimi_gguf.scripts.estimate_arm import (
    CORES,
    DECODING,
    PAGE,
    PROMPTS,
    Compiled,
    Kernel,
    estimate,
    functions,
    independent,
    loops,
    mixed,
    sources_digest,
    work,
)

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


# A tile of two rounds, with a load of the stack and a pair of loads.
TILE = """\

0000000000000000 <tile<4>(int)>:
   0:	ldp	q0, q3, [x0]
   4:	ldr	q2, [sp, #16]
   8:	sdot	v1.4s, v0.16b, v2.4b[1]
   c:	sdot	v3.4s, v0.16b, v2.16b
  10:	mla	v4.4s, v1.4s, v5.4s
  14:	mov	v6.16b, v3.16b
  18:	add	x0, x0, #0x1
  1c:	b.ne	8 <tile<4>(int)+0x8>  // b.any
  20:	scvtf	v4.4s, v4.4s
  24:	str	q4, [x1]
  28:	ret
"""


def test_the_limit_counts_what_computes_loads_and_stores() -> None:
    found = work(dict(functions(TILE))["tile<4>(int)"], Kernel("", "", 4, per_call=True), "sdot")
    kinds = [line.split()[0] for line in found.arithmetic]
    assert sorted(kinds) == ["mla", "mla", "scvtf", *4 * ["sdot"]]
    assert found.memory == ("ldr\tq", "ldr\tq", "str\tq")
    assert found.others == 3, "two copies, and a load of the stack"
    lines = independent(found)
    assert lines[:2] == ("sdot\tv0.4s, v30.16b, v30.4b[1]", "sdot\tv1.4s, v30.16b, v30.16b")
    assert lines[-3:] == ("ldr\tq24, [x0]", "ldr\tq25, [x0]", "str\tq31, [x0]")
    assert Counter(mixed(lines)) == Counter(lines)
    assert [line.split()[0] for line in mixed(lines)] == [
        "sdot", "mla", "ldr", "sdot", "scvtf", "str", "sdot", "mla", "ldr", "sdot",
    ]  # fmt: skip


def test_the_page_is_of_the_sources_and_the_text_of_now() -> None:
    again = "write it again: python -m kimi_gguf.scripts.estimate_arm"
    page = (estimate_arm.ROOT / "docs" / "arm-estimates.md").read_text()
    assert f"Digest of the sources without comments: {sources_digest()}." in page, again
    for text, *_ in Formatter().parse(PAGE):
        assert text in page, again
    for each in (*PROMPTS, *DECODING):
        assert f"\n| {each.types} | **" in page, again


def test_a_change_of_the_code_but_not_of_a_comment_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_arm, "OURS", tmp_path)
    for name in (estimate_arm.TILE, estimate_arm.TILE_I8MM, estimate_arm.DOT):
        (tmp_path / name).write_text('#include "common.h"\n')
    digests = []
    for text in ("int x;  // one\n", "int  x; // two\n\n", "int y;\n"):
        (tmp_path / "common.h").write_text(text)
        digests.append(sources_digest())
    assert digests[0] == digests[1] != digests[2]
