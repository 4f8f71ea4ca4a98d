"""Rules of the Metal Shading Language that a C++ compiler does not check.

Input: a preprocessed .metal file with the preprocessor's markers of files and lines. Output: violations of the rules,
which Apple's compiler would refuse: address spaces, variables of the file and of threadgroups, arguments of kernels,
types and functions that Metal lacks. The rules see tokens, not types: an address space is known
only where it is written, and for variables from their declaration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emulators.common.tokens import tokens

_SPACES = ("device", "constant", "threadgroup", "thread")
_QUALIFIERS = (
    "const",
    "volatile",
    "static",
    "inline",
    "constexpr",
    "kernel",
    "restrict",
    "unsigned",
    "typename",
)
_SCALARS = (
    "bool|u?char|u?short|u?int|u?long|half|float|bfloat|size_t|u?int(?:8|16|32|64)_t|ptrdiff_t|void|auto"
)
_BUILTIN = re.compile(rf"({_SCALARS})([234](x[234])?)?|packed_\w+|simdgroup_\w+8x8|atomic_\w+")
_DEFINES_TYPE = ("struct", "class", "union", "enum", "typename", "using")
_CONTROL = (
    "if",
    "for",
    "while",
    "switch",
    "return",
    "sizeof",
    "alignof",
    "decltype",
    "static_assert",
    "defined",
)

# Words that the language does not have -> why.
_WORDS = {
    "double": "there is no double",
    "std": "there is no C++ standard library",
}
# Functions of C that Metal's standard library does not have.
_C_FUNCTIONS = re.compile(
    r"(?:exp|exp2|exp10|log|log2|log10|sqrt|rsqrt|pow|sin|cos|tan|sinh|cosh|tanh|asin|acos|atan|atan2|fabs|fmax|fmin|fma"
    r"|floor|ceil|round|rint|trunc|fmod)f|expm1f?|log1pf?|erff?|erfcf?|cbrtf?|hypotf?|lgammaf?|tgammaf?"
    r"|memcpy|memmove|memset|memcmp|strlen|printf|assert|abort|malloc|calloc|free|rand|qsort|__builtin_\w+"
)


@dataclass(frozen=True)
class _Word:
    text: str
    kind: str
    place: str


@dataclass(frozen=True)
class _Function:
    """A function's parameters and body, as indices; kernels are entry points."""

    name: str
    is_kernel: bool
    parameters: tuple[int, int]
    body: tuple[int, int]


def violations(source: str) -> list[str]:
    """One line for each violation: FILE:LINE: what is wrong."""
    row = list(_words(source))
    functions = list(_functions(row))
    declarators = _declarators(row, functions)
    found = [
        *_forbidden_words(row),
        *_globals(row, functions),
        *_pointers(row, declarators),
    ]
    for function in functions:
        found += _locals(row, function, declarators)
        if function.is_kernel:
            found += _kernel(row, function)
    return list(dict.fromkeys(found))


_MARKER = re.compile(r'(?m)^#\s*(?:line\s+)?(\d+)\s+"([^"]*)".*$')


def _words(source: str) -> Iterator[_Word]:
    """The tokens that are not blank, with their files and lines."""
    file, line, at = "", 1, 0
    for marker in [*_MARKER.finditer(source), None]:
        for token in tokens(re.sub(r"(?m)^#.*$", "", source[at : marker.start() if marker else None])):
            if token.kind != "blank":
                yield _Word(token.text, token.kind, f"{file}:{line}")
            line += token.text.count("\n")
        if marker:
            file, line, at = marker[2], int(marker[1]), marker.end() + 1


def _types(row: Sequence[_Word]) -> set[str]:
    """Names of types that the text declares."""
    found = set[str]()
    for at, word in enumerate(row[:-1]):
        if word.text in _DEFINES_TYPE and row[at + 1].kind == "word":
            found.add(row[at + 1].text)
        if word.text == "typedef":
            end = at
            depth = 0
            while row[end].text != ";" or depth:
                depth += (row[end].text == "{") - (row[end].text == "}")
                end += 1
            names = [each.text for each in row[at:end] if each.kind == "word"]
            found.update(names[-1:])
    return found


def _is_type(word: _Word, types: set[str]) -> bool:
    return word.text == ">" or word.text in types or bool(_BUILTIN.fullmatch(word.text))


def _closing(row: Sequence[_Word], at: int) -> int:
    """The index of the bracket that closes the one at `at`, or the end."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    opening, depth = row[at].text, 0
    for index in range(at, len(row)):
        depth += (row[index].text == opening) - (row[index].text == pairs[opening])
        if depth == 0:
            return index
    return len(row) - 1


def _before(row: Sequence[_Word], at: int) -> int:
    """The first index of the words of a declaration that ends before `at`: names, qualifiers, template arguments."""
    depth = 0
    while at > 0:
        text = row[at - 1].text
        if text == ">":
            depth += 1
        elif text == "<" and depth:
            depth -= 1
        elif not depth and ((row[at - 1].kind != "word" and text != "::") or text in _CONTROL):
            break
        at -= 1
    return at


def _functions(row: Sequence[_Word]) -> Iterator[_Function]:
    """Functions with a body, at the scope of the file or of a struct."""
    at = 0
    while at < len(row):
        if row[at].text == "(" and at and row[at - 1].kind == "word":
            end = _closing(row, at)
            first = _before(row, at - 1)
            if end + 1 < len(row) and row[end + 1].text == "{" and row[at - 1].text not in _CONTROL:
                last = _closing(row, end + 1)
                is_kernel = any(each.text == "kernel" for each in row[first:at])
                yield _Function(row[at - 1].text, is_kernel, (at, end), (end + 1, last))
                at = last
            else:
                at = end
        at += 1


def _forbidden_words(row: Sequence[_Word]) -> Iterator[str]:
    for at, word in enumerate(row[:-1]):
        before = row[at - 1].text if at else ""
        after = row[at + 1].text
        if word.kind == "word":
            if why := _WORDS.get(word.text):
                yield f"{word.place}: {why}: '{word.text}'"
            elif after == "(" and _C_FUNCTIONS.fullmatch(word.text) and before not in (".", "::"):
                yield f"{word.place}: Metal's standard library has no '{word.text}'"


def _globals(row: Sequence[_Word], functions: Sequence[_Function]) -> Iterator[str]:
    """Variables at the scope of the file: constant and initialized, or function constants."""
    ends = {function.parameters[0]: function.body[1] for function in functions}
    begin = at = 0
    while at < len(row):
        text = row[at].text
        if at in ends:
            at = begin = ends[at] + 1
            continue
        if text in ("{", "(", "["):
            at = _closing(row, at)
        elif text == ";":
            yield from _global(row[begin:at])
            begin = at + 1
        at += 1


def _global(declaration: Sequence[_Word]) -> Iterator[str]:
    words = [each.text for each in declaration]
    if not words or words[0] in (
        "typedef",
        "using",
        "struct",
        "enum",
        "union",
        "template",
        "static_assert",
        "}",
    ):
        return
    plain = words[: words.index("=")] if "=" in words else words
    if "(" in plain and "function_constant" not in plain:  # a function
        return
    place, name = declaration[0].place, " ".join(words[:6])
    if "constant" not in words:
        yield f"{place}: a variable at the scope of the file must be in the constant address space: '{name}'"
    elif "=" not in words and "{" not in words and "function_constant" not in words:
        yield f"{place}: a constant without a value: '{name}'"
    elif "=" in words and "function_constant" in words:
        yield f"{place}: a function constant with a value: '{name}'"


def _declarators(row: Sequence[_Word], functions: Sequence[_Function]) -> set[int]:
    """The indices of each * and & that is part of a type."""
    types = _types(row)
    in_body = bytearray(len(row))
    for function in functions:
        first, last = function.body
        in_body[first:last] = b"\1" * (last - first)
    found = set[int]()
    for at, word in enumerate(row[:-1]):
        if word.text not in ("*", "&"):
            continue
        first = _before(row, at)
        named = [each for each in row[first:at] if each.text not in (*_QUALIFIERS, *_SPACES)]
        before, after = row[first - 1].text if first else ";", row[at + 1]
        if at - 1 in found:
            found.add(at)
        elif named and _is_type(named[-1], types):
            if after.kind == "word":  # or a product
                is_type = (
                    not in_body[at] or before in ";{}" or (before == "(" and row[first - 2].text == "for")
                )
            else:
                is_type = after.text in (")", ",", ">", "*", "&", "[")
            if is_type:
                found.add(at)
    return found


def _pointers(row: Sequence[_Word], declarators: set[int]) -> Iterator[str]:
    """Pointers and references need an address space."""
    for at in sorted(declarators):
        if not _space(row, at):
            kind = "pointer" if row[at].text == "*" else "reference"
            name = " ".join(each.text for each in row[_before(row, at) : at + 2])
            yield f"{row[at].place}: a {kind} without an address space: '{name}'"


def _space(row: Sequence[_Word], at: int) -> str:
    """The address space in the words of the type before the * or & at `at`, or ""."""
    return next((each.text for each in row[_before(row, at) : at] if each.text in _SPACES), "")


def _kernel(row: Sequence[_Word], function: _Function) -> Iterator[str]:
    """The arguments of a kernel."""
    first, last = function.parameters
    for argument in _arguments(row, first, last):
        texts = [each.text for each in argument]
        if "thread" in texts:
            yield f"{argument[0].place}: an argument of a kernel in the thread address space"
        elif not {"*", "&", "["} & set(texts):
            yield f"{argument[0].place}: an argument of a kernel without an attribute: '{' '.join(texts)}'"


def _arguments(row: Sequence[_Word], first: int, last: int) -> Iterator[Sequence[_Word]]:
    begin = at = first + 1
    while at < last:
        if row[at].text in ("(", "["):
            at = _closing(row, at)
        elif row[at].text == ",":
            yield row[begin:at]
            begin = at + 1
        at += 1
    if begin < last:
        yield row[begin:last]


def _locals(row: Sequence[_Word], function: _Function, declarators: set[int]) -> Iterator[str]:
    """Threadgroup variables, and conversions between address spaces, in a function."""
    spaces: dict[str, str] = {}  # of pointers and arrays
    for at in range(function.parameters[0], function.body[1]):
        word, after = row[at], row[at + 1]
        if word.text == "*" and at in declarators and after.kind == "word":
            spaces[after.text] = _space(row, at)
            if row[at + 2].text == "=":
                yield from _conversion(row, at + 3, spaces[after.text], spaces)
        elif (
            word.text == "*" and after.text == ")" and (space := _space(row, at)) and row[at + 2].text != ")"
        ):
            yield from _conversion(row, at + 2, space, spaces)
        elif word.text in spaces and after.text == "=" and row[at - 1].text in (";", "{", "}", ")"):
            yield from _conversion(row, at + 2, spaces[word.text], spaces)
        if at < function.body[0] or row[at - 1].text not in (";", "{", "}", ")"):
            continue
        if word.text != "threadgroup":
            continue
        end = at
        while row[end].text not in (";", "=", "*", "&", "(", "{"):
            end = _closing(row, end) + 1 if row[end].text == "[" else end + 1
        if row[end].text in ("*", "&"):
            continue
        names = [
            i for i in range(at, end) if row[i].kind == "word" and row[i + 1].text in ("[", ";", "=", "{")
        ]
        spaces.update((row[i].text, "threadgroup") for i in names)
        if not function.is_kernel:
            yield f"{word.place}: a threadgroup variable outside of a kernel: '{function.name}'"


def _conversion(row: Sequence[_Word], at: int, space: str, spaces: dict[str, str]) -> Iterator[str]:
    """Is the address at `at` in another address space? A cast there or the first variable shows it."""
    while row[at].text in ("(", "&") and row[at + 1].text not in _SPACES:
        at += 1
    if row[at].text == "(":
        end = _closing(row, at)
        found = _space(row, end - 1) if row[end - 1].text == "*" else ""
    else:
        found = spaces.get(row[at].text, "")
        if row[at + 1].text in ("[", "->", ".") and row[at - 1].text != "&":
            return  # a value
    if found and space and found != space:
        yield f"{row[at].place}: a conversion from the {found} to the {space} address space"
