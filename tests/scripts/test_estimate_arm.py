"""The loops that estimate_arm takes from a compiler's assembly."""

from __future__ import annotations

from kimi_gguf.scripts.estimate_arm import innermost_loops


def function(scheme: str, columns: int, body: str) -> str:
    name = f"_ZN10quant_gemmL9tile_q8_{scheme}LNS_5CodesE4ELi{columns}EEEvRKNS_5PanelE"
    return f"{name}:\n{body}\n\t.size\t{name}, .-{name}\n"


OUTER = """\
.L1:
	mov	x1, 0
.L2:
	.loc 1 2
	ldr	q0, [x0]
	sdot	v1.4s, v0.16b, v2.16b
	sdot	v3.4s, v0.16b, v2.16b
	b.ne	.L2
	add	x0, x0, 1
	cbnz	x1, .L9
	b	.L1
	b	.L3
.L3:
	ret"""


def test_the_innermost_loop_of_the_widest_tile_of_each_scheme() -> None:
    assembly = (
        function("KINS_6SchemeE3E", 4, OUTER)
        + function("KINS_6SchemeE3E", 2, OUTER.replace("sdot\tv3", "add\tv3"))
        + function("0I", 3, OUTER.replace("q0", "q7"))
        + function("KINS_6SchemeE1E", 4, "\tret")  # no loop
        + "_ZN10quant_gemmL5otherEv:\n"
        + OUTER
        + "\n\t.size\t_ZN10quant_gemmL5otherEv, 1\n"
    )
    first, second = innermost_loops(assembly)
    assert (first.scheme, first.columns, second.scheme, second.columns) == (0, 3, 3, 4)
    assert second.instructions == (
        "ldr\tq0, [x0]", "sdot\tv1.4s, v0.16b, v2.16b", "sdot\tv3.4s, v0.16b, v2.16b",
    )  # fmt: skip
    assert first.instructions[0] == "ldr\tq7, [x0]"
    assert first.dots == second.dots == 2
