"""Inline PTX: translates an asm statement to calls of the emulator's functions (include/cuda_emulator/ptx.h).

Input: the PTX with %0, %1, … and the C++ expressions for these operands. Output: C++ statements. A PTX statement that
is not in the table becomes a call that reports its name when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Groups = list[list[str]]  # the operands of a statement; {%0, %1} is one of several registers
Call = Callable[[re.Match[str], Groups], str]

_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)$")


def _out(registers: Sequence[str]) -> str:
    return f"cuda_emulator::out({', '.join(registers)})"


def _in(registers: Sequence[str]) -> str:
    # a literal in the PTX is a 32-bit operand
    values = [f"uint32_t({each})" if _NUMBER.match(each) else each for each in registers]
    return f"cuda_emulator::in({', '.join(values)})"


def _call(function: str, results: int = 0) -> Call:
    """A call of the function with `results` operands to write and the others to read, as 32-bit registers."""

    def call(_: re.Match[str], groups: Groups) -> str:
        operands = [_out(each) for each in groups[:results]] + [_in(each) for each in groups[results:]]
        return _plain(function, operands)

    return call


def _values(function: str) -> Call:
    """A call of the function with its operands unchanged."""
    return lambda _, groups: _plain(function, [each for group in groups for each in group])


def _plain(function: str, operands: Sequence[str]) -> str:
    return f"cuda_emulator::{function}({', '.join(['cuda_emulator::Place::here()', *operands])})"


def _ldmatrix(found: re.Match[str], groups: Groups) -> str:
    to, address = groups
    return _plain(f"ldmatrix<{'true' if found['trans'] else 'false'}>", [_out(to), *address])


# Registers that mov can read.
_SPECIAL = {
    "%tid.x": "threadIdx.x",
}


# A statement's instruction with all its suffixes -> the call. The first match counts.
_INSTRUCTIONS: list[tuple[str, Call]] = [
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f16\.f16\.f16\.f16", _call("mma_f16", 1)),
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        _call("mma<cuda_emulator::HalfFormat>", 1),
    ),
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
        _call("mma<cuda_emulator::BfloatFormat>", 1),
    ),
    (r"ldmatrix\.sync\.aligned(\.m8n8)?\.x[124](?P<trans>\.trans)?(\.shared(::cta)?)?\.b16", _ldmatrix),
    (r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::(64|128|256)B)?", _values("cp_async")),
    (r"cp\.async\.commit_group", _values("cp_async_commit")),
    (r"cp\.async\.wait_group", _values("cp_async_wait")),
    (r"cp\.async\.wait_all", _values("cp_async_wait_all")),
    (r"mov\.u32", _values("special_register")),
    (r"griddepcontrol\.wait", _values("grid_dependency_wait")),
    (r"griddepcontrol\.launch_dependents", _values("nothing")),
    (r"prefetch(\.\w+)*(::\w+)*", lambda *_: _plain("nothing", [])),
]
_TABLE = [(re.compile(pattern), call) for pattern, call in _INSTRUCTIONS]
_STATEMENT = re.compile(r"(?P<instruction>[a-z][\w.:]*)\s*(?P<operands>.*)$", re.DOTALL)
_OPERAND = re.compile(r"\s*(\{[^{}]*\}|\[[^\[\]]*\]|[^,{}\[\]]+)\s*(,|$)")


def translate(ptx: str, expressions: Sequence[str]) -> list[str]:
    """C++ statements, without their semicolons, for the PTX of one asm.

    ptx: as it would be passed to the assembler, except for the operands %0, %1, ….
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", ptx, flags=re.DOTALL).strip()
    if text.startswith("{") and text.endswith("}"):  # a block
        text = text[1:-1]
    return [_translate(statement.strip(), expressions) for statement in text.split(";") if statement.strip()]


def _translate(statement: str, expressions: Sequence[str]) -> str:
    parsed = _STATEMENT.match(statement)
    groups = _operands(parsed["operands"], expressions) if parsed else None
    if parsed and groups is not None:
        for pattern, call in _TABLE:
            found = pattern.fullmatch(parsed["instruction"])
            if found:
                return call(found, groups)
    words = " ".join(statement.split()).replace("\\", "\\\\").replace('"', '\\"')
    return f'cuda_emulator::unknown_ptx(cuda_emulator::Place::here(), "{words}")'


def _operands(text: str, expressions: Sequence[str]) -> Groups | None:
    """The operands' groups with their expressions; None if one is not supported."""
    groups: Groups = []
    at = 0
    while at < len(text):
        found = _OPERAND.match(text, at)
        if not found:
            return None
        group = [_expression(word.strip(), expressions) for word in found[1].strip("{}[] \t\n").split(",")]
        if None in group:
            return None
        groups.append([each for each in group if each is not None])
        at = found.end()
    return groups


def _expression(word: str, expressions: Sequence[str]) -> str | None:
    """C++ for `%0`, `%0 + 16`, a number or a special register; None for anything else."""
    if _NUMBER.match(word):
        return word
    special = word.replace("%%", "%")
    if special in _SPECIAL:
        return _SPECIAL[special]
    found = re.fullmatch(r"%(\d+)\s*(\+\s*(?:%(\d+)|(\d+)))?", word)
    if not found or int(found[1]) >= len(expressions):
        return None
    base = f"({expressions[int(found[1])]})"
    if not found[2]:
        return base
    offset = found[4] or f"({expressions[int(found[3])]})"
    return f"(cuda_emulator::address_of{base} + {offset})"
