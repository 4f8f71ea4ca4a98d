"""C++ as a list of tokens for the rewriter, so that comments and strings stay unchanged.

Input: source text. Output: tokens whose concatenated texts are the source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
    (?P<blank>   (?: \\\r?\n | [ \t\r\f\v] | \n | //[^\n]* | /\*.*?\*/ )+ )
  | (?P<text>    (?:u8|[uUL])? R"(?P<mark>[^()\\\s]*)\(.*?\)(?P=mark)" | (?:u8|[uUL])? "(?:\\.|[^"\\\n])*" )
  | (?P<char>    '(?:\\.|[^'\\\n])+' )
  | (?P<number>  \.?\d(?: ['.\w] | (?<=[eEpP])[+-] )* )
  | (?P<word>    [A-Za-z_]\w* )
  | (?P<mark_>   :: | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Token(NamedTuple):
    """kind: blank (including comments), text, char, number, word or mark; `::` is one mark."""

    kind: str
    text: str


def tokens(source: str) -> list[Token]:
    """Tokenize the whole source; a comment or string without an end is split into single marks."""
    return [
        Token((found.lastgroup or "").rstrip("_") if found.lastgroup != "mark" else "text", found[0])
        for found in _TOKEN.finditer(source)
    ]


def joined(row: Sequence[Token]) -> str:
    return "".join(token.text for token in row)


def line_ends(row: Sequence[Token]) -> str:
    """The line ends of a row, unchanged (in a macro with a backslash), so that later lines keep their numbers."""
    return "".join(
        end for token in row if token.kind == "blank" for end in re.findall(r"\\\n|\n", token.text)
    )


def after_blank(row: Sequence[Token], at: int) -> int:
    """The first index from `at` on that is not blank."""
    while at < len(row) and row[at].kind == "blank":
        at += 1
    return at


def closing(row: Sequence[Token], at: int) -> int:
    """The index of the bracket that closes the one at `at`. Raises `ValueError` if there is none."""
    stack: list[str] = []
    for index in range(at, len(row)):
        text = row[index].text
        if row[index].kind == "mark" and text in _CLOSING:
            stack.append(_CLOSING[text])
        elif row[index].kind == "mark" and stack and text == stack[-1]:
            stack.pop()
            if not stack:
                return index
    raise ValueError(f"'{row[at].text}' is never closed")


def split(row: Sequence[Token], separator: str, angles: bool = False) -> list[list[Token]]:
    """The parts between separators outside of all brackets, also <…> if `angles`."""
    parts: list[list[Token]] = [[]]
    depth = inside = 0  # nesting depth of all brackets; of those except <>
    for token in row:
        if token.kind == "mark":
            change = (token.text in _CLOSING) - (token.text in _CLOSING.values())
            inside += change
            if angles and inside == 0 and token.text in "<>":
                change = 1 if token.text == "<" else -1
            depth += change
            if token.text == separator and depth == 0:
                parts.append([])
                continue
        parts[-1].append(token)
    return parts


def stripped(row: Sequence[Token]) -> list[Token]:
    """Without blanks at both ends."""
    first, last = after_blank(row, 0), len(row)
    while last > first and row[last - 1].kind == "blank":
        last -= 1
    return list(row[first:last])
