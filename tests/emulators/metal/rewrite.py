"""Metal Shading Language to C++: rewrites the syntax that no header can make a C++ compiler accept.

    template [[host_name("name")]] kernel T f<…>;     nothing: one kernel for the list; also T f<…>(…);
    [[host_name("name")]] kernel void f(…)            the same function, and one kernel for the list
    constant T x [[function_constant(index)]];        a variable that is registered
    threadgroup T a[N];                               in a function: a reference to memory of the threadgroup
    T a[N] = { [0 ... N - 1] = value };               a loop
    v.xy and v.xy =                                   calls of functions of vec
    [[attribute]]                                     nothing

Input: the text of a .metal file after the preprocessor, which has kept markers of files and lines. Output: C++ with the
same lines, and the list of the file's kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emulators.common.tokens import Token, after_blank, closing, joined, line_ends, split, tokens

# Attributes of parameters that are positions: the names of structs in include/metal_emulator/kernel.h.
_POSITIONS = (
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "thread_position_in_threadgroup",
    "thread_position_in_grid",
    "threads_per_threadgroup",
    "thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "thread_index_in_simdgroup",
    "threads_per_simdgroup",
)


_SWIZZLE = re.compile("[xyzw]{2,4}")


class RewriteError(Exception):
    """Source that the rewriter does not support."""


@dataclass(frozen=True)
class Kernel:
    """name: for the host. function: with template arguments. parameters: structs of kernel.h."""

    name: str
    function: str
    parameters: tuple[str, ...]


def rewrite(source: str, name: str) -> tuple[str, list[Kernel]]:
    """The C++ for preprocessed MSL, and its kernels; `name` is the file's name in messages. Raises `RewriteError`."""
    row = tokens(source)
    done: list[Token] = []
    hosts: list[tuple[str, str]] = []  # host name, function with template arguments
    parameters: dict[str, tuple[str, ...]] = {}
    host_name = ""
    at = 0
    while at < len(row):
        token = row[at]
        try:
            if attribute := _attribute(row, at):
                if attribute.name == "host_name":
                    host_name = attribute.argument.strip('" ')
                done.append(Token("blank", line_ends(row[at : attribute.end])))
                at = attribute.end
            elif token.text == "kernel":
                following = after_blank(row, at + 1)
                last = _last(done)
                if host_name and last >= 0 and done[last].text == "template":
                    end = _until(row, at, ";")
                    text = joined(row[after_blank(row, following + 1) : end])
                    hosts.append((host_name, _without_parameters(text).strip()))
                    done[last:] = [Token("blank", line_ends([*done[last:], *row[at:end]]))]
                    at = end + 1
                else:
                    function = row[after_blank(row, following + 1)].text
                    opening = _until(row, at, "(")
                    parameters[function] = _parameters(row[opening + 1 : closing(row, opening)])
                    if last < 0 or done[last].text != ">":  # not a template
                        hosts.append((host_name or function, function))
                    done.append(token)
                    at += 1
                host_name = ""
            elif (replace := _REPLACED.get(token.text)) and (end := replace(row, at, done)):
                at = end
            elif _SWIZZLE.fullmatch(token.text) and joined(done[-2:]).endswith((".", "->")):
                function = "target" if _is_assigned(row, at + 1) else "part"
                numbers = ", ".join(str("xyzw".index(each)) for each in token.text)
                done.append(Token("other", f"template {function}<{numbers}>()"))
                at += 1
            elif token.text == "constant" and "const" in (
                _text(done, _last(done)),
                _text(row, after_blank(row, at + 1)),
            ):
                at += 1  # `constant` is const in C++
            else:
                done.append(token)
                at += 1
        except ValueError as error:
            raise RewriteError(f"{name}: {error}") from None
    kernels = []
    for host, function in hosts:
        bare = re.match(r"\w*", function)
        if not bare or bare[0] not in parameters:
            raise RewriteError(f"{name}: no function for the kernel '{host}': '{function}'")
        kernels.append(Kernel(host, " ".join(function.split()), parameters[bare[0]]))
    return joined(done), kernels


@dataclass(frozen=True)
class _Attribute:
    name: str
    argument: str
    end: int


def _attribute(row: Sequence[Token], at: int) -> _Attribute | None:
    """The attribute [[name]] or [[name(argument)]] at `at`."""
    if row[at].text != "[" or at + 1 >= len(row) or row[at + 1].text != "[":
        return None
    end = closing(row, at)
    text = joined(row[at + 2 : end - 1]).strip()
    name, _, rest = text.partition("(")
    return _Attribute(name.strip(), rest.rpartition(")")[0].strip(), end + 1)


def _without_parameters(function: str) -> str:
    """`f<…>` of `f<…>(…)`."""
    angles = parentheses = 0
    for at, character in enumerate(function):
        if character == "(" and angles == 0:
            return function[:at]
        parentheses += {"(": 1, ")": -1}.get(character, 0)
        if parentheses == 0:
            angles += {"<": 1, ">": -1}.get(character, 0)
    return function


def _last(row: Sequence[Token]) -> int:
    """The index of the last token that is not blank, or -1."""
    return max(
        (i for i in range(len(row) - 1, max(len(row) - 20, -1), -1) if row[i].kind != "blank"), default=-1
    )


def _text(row: Sequence[Token], at: int) -> str:
    return row[at].text if 0 <= at < len(row) else ""


def _is_assigned(row: Sequence[Token], at: int) -> bool:
    """Whether the expression in front of `at` is assigned to: = += <<= and so on, but no comparison."""
    operator = re.match(r"[^\w\s.;,()\[\]{}]*", joined(row[after_blank(row, at) :][:3]))
    return operator is not None and re.fullmatch(r"(?:[-+*/%&|^]|<<|>>)?=", operator[0]) is not None


def _until(row: Sequence[Token], at: int, mark: str) -> int:
    while row[at].text != mark:
        at += 1
        if at == len(row):
            raise ValueError(f"a kernel without '{mark}'")
    return at


def _parameters(row: Sequence[Token]) -> tuple[str, ...]:
    """One struct of kernel.h for each parameter: buffers are numbered in order, as Metal does without attributes."""
    result = []
    buffers = memories = 0
    for part in split(row, ",", angles=True):
        attributes = [found for i in range(len(part)) if (found := _attribute(part, i))]
        words = {token.text for token in part if token.kind == "word"}
        position = next((each.name for each in attributes if each.name in _POSITIONS), None)
        number = next(
            (int(each.argument) for each in attributes if each.name in ("buffer", "threadgroup")), None
        )
        if position:
            result.append(f"metal_emulator::{position}")
        elif words & {"device", "constant"}:
            buffers = buffers if number is None else number
            result.append(f"metal_emulator::Buffer<{buffers}>")
            buffers += 1
        elif "threadgroup" in words:
            memories = memories if number is None else number
            result.append(f"metal_emulator::ThreadgroupMemory<{memories}>")
            memories += 1
        else:
            raise ValueError(f"the parameter '{' '.join(joined(part).split())}' of a kernel is not known")
    return tuple(result)


def _function_constant(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """constant T x [[function_constant(i)]]; -> a variable and its registration."""
    end = at
    while end < len(row) and row[end].text not in (";", "{", "(", "="):
        attribute = _attribute(row, end)
        if attribute and attribute.name == "function_constant":
            *kind, variable = [each.text for each in row[at + 1 : end] if each.kind != "blank"]
            done.append(
                Token(
                    "other",
                    f"static {' '.join(kind)} {variable}; static const metal_emulator::Constant<{' '.join(kind)}>"
                    f' {variable}_constant({attribute.argument}, &{variable}, "{variable}")',
                )
            )
            done.append(Token("blank", line_ends(row[at : attribute.end])))
            return attribute.end
        end += 1
    return 0


def _threadgroup_array(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """threadgroup T a[N]; -> a reference to memory of the threadgroup."""
    end = at
    while end < len(row) and row[end].text not in (";", "{", "(", "=", ",", ")", "*", "&"):
        end = closing(row, end) + 1 if row[end].text == "[" else end + 1
    if end == len(row) or row[end].text != ";":
        return 0
    declared = row[at + 1 : end]
    first = next((i for i, each in enumerate(declared) if each.text == "["), len(declared))
    name = max(i for i in range(first) if declared[i].kind == "word")
    kind, variable, shape = joined(declared[:name]).strip(), declared[name].text, joined(declared[first:])
    done.append(
        Token(
            "other",
            f"static const char {variable}_key = 0; "
            f"using {variable}_type = {kind}{shape}; {variable}_type & {variable} = "
            f"*static_cast<{variable}_type *>(metal_emulator::threadgroup_array(&{variable}_key, "
            f'sizeof({variable}_type), alignof({variable}_type), "{variable}", metal_emulator::Place::here()))',
        )
    )
    done.append(Token("blank", line_ends(row[at:end])))
    return end


def _filled_array(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """T a[N] = { [0 ... N - 1] = v }; -> a loop over all elements."""
    opening = after_blank(row, at + 1)
    inside = after_blank(row, opening + 1)
    if _text(row, opening) != "{" or _text(row, inside) != "[":
        return 0
    bracket, end = closing(row, inside), closing(row, opening)
    if "..." not in joined(row[inside:bracket]):
        return 0
    value = joined(row[after_blank(row, bracket + 1) + 1 : end]).strip()
    name = _last(done)
    while done[name].text == "]":
        while done[name].text != "[":
            name -= 1
        name -= 1
    done.append(Token("other", f"; for (auto & element : {done[name].text}) element = {value}"))
    return end + 1


# Words with which a construct may begin. Each function appends C++ and returns the end of the construct, or 0 if it is
# another one.
_REPLACED = {"constant": _function_constant, "threadgroup": _threadgroup_array, "=": _filled_array}
