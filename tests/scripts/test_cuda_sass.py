"""Loops and phases of a disassembly, and the cycles of a warp that runs alone."""

from __future__ import annotations

from kimi_gguf.scripts.cuda_sass import BARRIER, LATENCY, Code, Instruction, kernels, main_loop, phases

NO = 7  # scoreboard


def encoded(stall: int, sets: int = NO, waits: int = 0) -> int:
    """The upper half of an encoding."""
    return stall << 41 | sets << 46 | NO << 49 | waits << 52


def text(*lines: tuple[str, int] | str) -> str:
    """nvdisasm's text of one kernel: labels, or an instruction and the upper half of its encoding."""
    out = [".text._Z6kernelv:"]
    at = 0
    for line in lines:
        if isinstance(line, str):
            out.append(f"{line}:")
            continue
        words, high = line
        out.append(f"        /*{at:04x}*/     {words} ;      /* 0x{0:016x} */")
        out.append(f"                             /* 0x{high:016x} */")
        at += 16
    return "\n".join(out) + "\n"


def code(*lines: tuple[str, int] | str) -> Code:
    ((name, found),) = kernels(text(*lines))
    assert name == "_Z6kernelv"
    return found


NESTED = code(
    ("MOV R1, c[0x0][0x28]", encoded(1)),
    ".L_x_0",
    ("LDS.128 R4, [R2]", encoded(2, sets=0)),
    ".L_x_1",
    ("HMMA.16816.F32 R8, R4, R6, R8", encoded(4, waits=1)),
    ("@P1 BRA `(.L_x_1)", encoded(5)),
    ("BAR.SYNC.DEFER_BLOCKING 0x0", encoded(1)),
    ("MUFU.EX2 R3, R3", encoded(1)),
    ("@!P0 BRA `(.L_x_0)", encoded(5)),
    ("EXIT", encoded(5)),
    ".L_x_2",
    ("BRA `(.L_x_0)", encoded(5)),  # returns from code that was moved away
)


def test_an_instruction_is_read_with_its_stall_scoreboard_and_waits() -> None:
    lds, hmma = NESTED.instructions[1:3]
    assert (lds.op, lds.stall, lds.sets, lds.waits, lds.predicated) == ("LDS", 2, 0, 0, False)
    assert (hmma.name, hmma.stall, hmma.sets, hmma.waits) == ("HMMA.16816.F32", 4, NO, 1)
    assert Instruction("NOP", False, None, encoded(0)).stall == 1


def test_jumps_back_are_loops_except_those_of_code_that_was_moved_away() -> None:
    (outer,) = NESTED.loops()
    (inner,) = outer.inner
    assert (outer.begin, outer.end, inner.begin, inner.end) == (1, 6, 2, 3)
    assert main_loop(NESTED, innermost=False) == outer
    assert main_loop(NESTED, innermost=True) == inner
    assert main_loop(code(("EXIT", encoded(1))), innermost=False) is None
    uniform = code(".L_x_0", ("FADD R1, R1, R1", encoded(4)), ("BRA.U !UP0, `(.L_x_0)", encoded(5)))
    assert len(uniform.loops()) == 1
    left = code(".L_x_0", ("@P0 EXIT", encoded(5)), ("BRA `(.L_x_0)", encoded(5)), ("EXIT", encoded(5)))
    assert len(left.loops()) == 1


def test_phases_end_at_barriers_and_inner_loops_count_their_turns() -> None:
    (outer,) = NESTED.loops()
    once = phases(NESTED, outer, {})
    # LDS waits 2, HMMA waits for it, then 4 + 5, then the barrier's own and its fixed cycles
    assert [each.cycles for each in once] == [LATENCY["LDS"] + 4 + 5 + 1 + BARRIER, 1 + 5]
    thrice = phases(NESTED, outer, {2: 3.0})
    assert thrice[0].mma == {"HMMA.16816.F32": 3.0}
    assert thrice[0].issued == 1 + 3 * 2 + 1
    assert thrice[0].cycles == 2 + 3 * (LATENCY["LDS"] - 2 + 4 + 5) + 1 + BARRIER
    assert (once[0].shared, once[1].quarter) == (4, 1)
    (inner,) = outer.inner
    (left,) = phases(NESTED, outer, {}, skip=inner)[:1]
    assert not left.mma and left.cycles == 2 + 1 + BARRIER


def test_a_latency_can_be_of_the_device() -> None:
    (outer,) = NESTED.loops()
    assert phases(NESTED, outer, {}, latency={"LDS": 100.0})[0].cycles == 100 + 4 + 5 + 1 + BARRIER


def test_code_that_a_branch_can_skip_counts_half_unless_it_has_a_barrier() -> None:
    def body(op: str) -> Code:
        return code(
            ".L_x_0",
            ("@P0 BRA `(.L_x_1)", encoded(1)),
            ("FADD R1, R1, R1", encoded(4)),
            (op, encoded(4)),
            ".L_x_1",
            ("@P1 BRA `(.L_x_0)", encoded(1)),
        )

    halved, whole = body("FMUL R1, R1, R1"), body("BAR.SYNC 0x0")
    assert phases(halved, halved.loops()[0], {})[0].fma == 1.0
    assert phases(halved, halved.loops()[0], {})[0].cycles == 1 + 4 + 1
    assert phases(whole, whole.loops()[0], {})[0].fma == 1.0
    assert phases(whole, whole.loops()[0], {})[0].cycles == 1 + 4 + 4 + BARRIER


def test_two_kernels_are_told_apart() -> None:
    first = text(("EXIT", encoded(1)))
    second = first.replace("_Z6kernelv", "_Z5otherv")
    assert [name for name, _ in kernels(f"//----- a\n{first}//----- b\n{second}")] == [
        "_Z6kernelv",
        "_Z5otherv",
    ]
