"""CUDA C++ to C++: rewrites the syntax that no header can make a C++ compiler accept.

    kernel<<<grid, block, …>>>(arguments)   a call of cuda_emulator::configure
    __shared__ T a[N];                      a reference to memory of the block
    extern __shared__ T a[];                a pointer to it
    asm("ptx" : … : …);                     calls of the emulator's functions (ptx.py)
    __noinline__                            the compiler's attribute
    expf(x)                                 __expf(x), as nvcc does with -use_fast_math, which ggml uses
    #include "other.cuh"                    the rewritten file

Input: a .cu or .cuh file. Output: C++ with the same lines, so that messages name the lines of the source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from emulators.common.tokens import Token, after_blank, closing, joined, line_ends, split, stripped, tokens
from emulators.cuda.ptx import translate

# The functions that nvcc's -use_fast_math uses instead.
_FAST = {
    "expf": "__expf",
    "exp10f": "__exp10f",
    "exp2f": "cuda_emulator::exp2_flushed",
    "logf": "__logf",
    "log2f": "__log2f",
    "powf": "__powf",
    "sinf": "__sinf",
    "cosf": "__cosf",
}
_QUALIFIERS = ("volatile", "const", "static", "extern")
_INCLUDE = re.compile(r'(?m)^([ \t]*#[ \t]*include[ \t]+)"([^"\n]+)"')


class RewriteError(Exception):
    """Source that the rewriter does not support; file, line, and what to write instead."""


def rewrite(source: str, name: str) -> str:
    """The C++ for CUDA C++; `name` is the file's name in messages. Raises `RewriteError`."""
    row = tokens(source)
    done: list[Token] = []
    at = 0
    while at < len(row):
        token = row[at]
        try:
            if token.kind == "word" and token.text == "__shared__":
                at = _shared(row, at, done)
            elif token.kind == "word" and token.text in ("asm", "__asm__", "__asm"):
                at = _asm(row, at, done)
            elif token.text == "__noinline__":  # a macro would also replace the standard library's attributes
                done.append(Token("other", "__attribute__((noinline))"))
                at += 1
            elif token.text in _FAST and not (done and done[-1].text in ("::", ".")):
                done.append(Token("other", _FAST[token.text]))
                at += 1
            elif _is_marks(row, at, "<<<"):
                at = _launch(row, at, done)
            else:
                done.append(token)
                at += 1
        except ValueError as error:
            line = joined(row[:at]).count("\n") + 1
            raise RewriteError(f"{name}:{line}: {error}") from None
    return joined(done)


def rewrite_tree(source: Path, folder: Path, include: Sequence[Path]) -> Path:
    """Rewrite a source and all .cu and .cuh files that it includes in quotes to `folder`; return the rewritten source.

    include: folders for files that are not next to the file that includes them.
    """
    return _Tree(folder, [path.resolve() for path in include]).file(source.resolve())


class _Tree:
    """Rewritten copies: one for each file, even if it is included several times."""

    def __init__(self, folder: Path, include: Sequence[Path]) -> None:
        self.folder = folder
        self.include = include
        self.copies: dict[Path, Path] = {}

    def file(self, source: Path) -> Path:
        if source not in self.copies:
            copy = self.folder / f"{len(self.copies)}-{source.name}{'.cpp' if source.suffix == '.cu' else ''}"
            self.copies[source] = copy
            text = rewrite(source.read_text(encoding="utf-8"), str(source))
            text = _INCLUDE.sub(lambda found: self._included(source, found), text)
            copy.write_text(f'#line 1 "{source}"\n{text}', encoding="utf-8")
        return self.copies[source]

    def _included(self, source: Path, found: re.Match[str]) -> str:
        for folder in (source.parent, *self.include):
            path = (folder / found[2]).resolve()
            if path.is_file():
                path = self.file(path) if path.suffix in (".cu", ".cuh") else path
                return f'{found[1]}"{path}"'
        return found[0]  # in the compiler's own folders, or intentionally missing


def _is_marks(row: Sequence[Token], at: int, marks: str) -> bool:
    return [(each.kind, each.text) for each in row[at : at + len(marks)]] == [
        ("mark", each) for each in marks
    ]


def _launch(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """kernel<<<shape>>>( -> cuda_emulator::configure("kernel", kernel, shape)("""
    end = at + 3
    while not _is_marks(row, end, ">>>") or row[after_blank(row, end + 3)].text != "(":
        if end >= len(row) or row[end].text == ";":
            raise ValueError("'<<<' without '>>>('")
        end = closing(row, end) + 1 if row[end].text in ("(", "{", "[") else end + 1
    kernel = _expression_before(done)
    shape = row[at + 3 : end]
    name = joined([token for token in kernel if token.kind != "blank"]).replace('"', "'")
    words = f'cuda_emulator::configure("{name}", {joined(kernel).strip()}, {joined(shape)})'
    done.append(Token("other", words))
    return end + 3


def _expression_before(done: list[Token]) -> list[Token]:
    """Remove a kernel's name, with its template arguments and namespaces, from the end."""
    first = len(done)
    depth = inside = 0  # nesting depth of <>; of [] and () in either
    while first > 0:
        token = done[first - 1]
        if depth or inside or token.text == "]":
            inside += (token.text in ("]", ")")) - (token.text in ("[", "("))
        if inside or token.text == "[":
            first -= 1
            continue
        depth += (token.text == ">") - (token.text == "<")
        ends = token.kind not in ("word", "blank") and token.text not in ("::", ".", "<", ">")
        parted = token.kind == "blank" and first < len(done) and done[first].text not in ("::", ".", "<", "[")
        if depth == 0 and (ends or parted):
            break
        first -= 1
    kernel = stripped(done[first:])
    if not kernel or kernel[0].kind != "word":
        raise ValueError("no kernel's name before '<<<'")
    del done[first:]
    return kernel


def _shared(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """__shared__ T a[N], b; -> references; extern __shared__ T a[]; -> a pointer."""
    end = at
    while end < len(row) and row[end].text != ";":
        end = closing(row, end) + 1 if row[end].text in ("(", "{", "[") else end + 1
    before = first = len(done)
    while first > 0 and (done[first - 1].kind == "blank" or done[first - 1].text in _QUALIFIERS):
        first -= 1
        before = first if done[first].kind == "word" else before
    dynamic = any(token.text == "extern" for token in (*done[before:], *row[at:end]))
    kept = line_ends(done[before:])
    del done[before:]
    done.append(Token("blank", kept))
    alignment, words = _alignment(row[at + 1 : end])
    declared = [stripped(part) for part in split(words, ",", angles=True)]
    base: list[Token] = []
    statements = []
    for number, declarator in enumerate(declared):
        dimensions = next((i for i, token in enumerate(declarator) if token.text == "["), len(declarator))
        name = dimensions - 1
        while name >= 0 and declarator[name].kind == "blank":
            name -= 1
        if name < 0 or declarator[name].kind != "word" or any(token.text == "=" for token in declarator):
            raise ValueError("a __shared__ declaration must be `__shared__ T name[N];`, without a value")
        if number == 0:
            base = [token for token in stripped(declarator[:name]) if token.text not in ("static", "extern")]
        stars = [] if number == 0 else declarator[:name]
        kind = joined([*(base if number == 0 else _without_stars(base)), *stars]).strip()
        sizes = joined(declarator[dimensions:])
        statements.append(
            _declaration(declarator[name].text, " ".join(kind.split()), sizes, alignment, dynamic)
        )
    done.append(Token("other", "; ".join(statements) + line_ends(row[at:end])))
    return end


def _without_stars(base: Sequence[Token]) -> list[Token]:
    return [token for token in base if token.text != "*"]


def _declaration(name: str, kind: str, sizes: str, alignment: str, dynamic: bool) -> str:
    sizes = re.sub(
        r"\[([^\[\]]*>[^\[\]]*)\]", r"[(\1)]", " ".join(sizes.split())
    )  # no end of the template arguments
    if dynamic:
        inner = re.sub(r"^\[\s*\]", "", sizes)
        if inner == sizes:
            raise ValueError("an extern __shared__ array must be `extern __shared__ T name[];`")
        return (
            f'[[maybe_unused]] auto * const {name} = cuda_emulator::dynamic_shared<{kind}{inner}>("{name}")'
        )
    return (
        f"[[maybe_unused]] auto & {name} = "
        f'cuda_emulator::shared_variable<{kind}{sizes}>("{name}", {alignment}, [] {{}})'
    )


def _alignment(row: Sequence[Token]) -> tuple[str, list[Token]]:
    """The alignment in a declaration ("1": none), and the declaration without it."""
    asked, rest = "1", []
    at = 0
    while at < len(row):
        if row[at].text in ("__align__", "alignas", "__attribute__"):
            first = after_blank(row, at + 1)
            last = closing(row, first)
            inner = joined(row[first + 1 : last]).strip()
            asked = re.sub(r"^\(\s*aligned\s*(\(.*\))\s*\)$", r"\1", inner)
            at = last + 1
        else:
            rest.append(row[at])
            at += 1
    return asked, rest


def _asm(row: Sequence[Token], at: int, done: list[Token]) -> int:
    """asm [volatile] ("ptx" : outputs : inputs : clobbers) -> calls."""
    first = after_blank(row, at + 1)
    while row[first].text in ("volatile", "__volatile__"):
        first = after_blank(row, first + 1)
    if row[first].text != "(":
        raise ValueError("'asm' without '('")
    last = closing(row, first)
    inner: list[Token] = []
    for token in row[first + 1 : last]:  # `::` is two colons here
        inner += [Token("mark", ":")] * 2 if token.text == "::" and _between_operands(inner) else [token]
    parts = split(inner, ":")
    ptx = "".join(_literal(token.text) for token in parts[0] if token.kind == "text")
    if any(token.kind == "word" for token in parts[0]):
        raise ValueError("the PTX of an asm must be written out as strings")
    expressions = [
        _operand(operand) for part in parts[1:3] for operand in split(part, ",") if stripped(operand)
    ]
    calls = translate(ptx, expressions)
    done.append(Token("other", f"do {{ {' '.join(f'{call};' for call in calls)} }} while (0)"))
    done.append(Token("blank", line_ends(row[at:last])))
    return last + 1


def _between_operands(row: Sequence[Token]) -> bool:
    """Whether the `::` after this row separates parts of an asm, not names."""
    depth = sum((token.text in "([{") - (token.text in ")]}") for token in row if token.kind == "mark")
    return depth == 0


def _literal(text: str) -> str:
    """The content of a string literal."""
    raw = re.fullmatch(r'R"(.*?)\((.*)\)\1"', text, re.DOTALL)
    return (
        raw[2]
        if raw
        else re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text[1:-1])
    )


def _operand(row: Sequence[Token]) -> str:
    """`"=r"(x)` -> x"""
    words = stripped(row)
    opening = next((i for i, token in enumerate(words) if token.text == "("), None)
    if opening is None:
        raise ValueError(f'an operand of an asm must be "constraint"(expression), not {joined(words)}')
    return " ".join(joined(words[opening + 1 : closing(words, opening)]).split())
