"""All Markdown of the repository: tables, code, links with their anchors, linked figures, and generated parts."""

from __future__ import annotations

import importlib.util
import itertools
import posixpath
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PARSER = MarkdownIt("commonmark").enable("table")
BEGIN, END = re.compile(r"<!-- generated: (.+) -->"), "<!-- end -->"  # around a generated part of a page
WRITTEN = re.compile(
    r"^Written by `([^`]+)`", re.MULTILINE
)  # at the top of a page that is generated as a whole
FIGURE = re.compile(r"[\d.,]+(e-\d+)?")


@cache
def tracked() -> frozenset[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return frozenset(name for name in names if name and (ROOT / name).is_file())


PAGES = sorted(name for name in tracked() if name.endswith(".md") and not (ROOT / name).is_symlink())


def cells(row: str) -> int:
    """The number of cells of a table's row: what bars separate that are not escaped."""
    return len(re.findall(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))) + 1


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def heading(inline: Token) -> str:
    return "".join(each.content for each in inline.children or [] if each.type in ("text", "code_inline"))


def sections(text: str) -> dict[str, str]:
    """The text below each heading, up to the next heading of its level or a higher one, by the heading's anchor."""
    tokens = PARSER.parse(text)
    lines = text.splitlines()
    found = [
        (int(token.tag[1]), token.map[0], heading(tokens[index + 1]))
        for index, token in enumerate(tokens)
        if token.type == "heading_open" and token.map
    ]
    result: dict[str, str] = {}
    for index, (level, first, title) in enumerate(found):
        last = next((line for other, line, _ in found[index + 1 :] if other <= level), len(lines))
        anchor, count = slug(title), 0
        while (name := f"{anchor}-{count}" if count else anchor) in result:
            count += 1
        result[name] = "\n".join(lines[first:last])
    return result


@cache
def sections_of(page: str) -> dict[str, str]:
    return sections((ROOT / page).read_text())


def broken_blocks(text: str) -> Iterator[str]:
    """Tables and code that a reader would see as other text, each with its line."""
    lines = text.splitlines()
    for token in PARSER.parse(text):
        first, last = token.map or (0, 0)
        if token.type == "table_open":
            columns = cells(lines[first])
            for number in range(first, last):
                if cells(lines[number]) != columns:
                    yield f"line {number + 1}: {columns} columns in the head, {cells(lines[number])} in this row"
        elif token.type == "fence" and lines[last - 1].strip() != token.markup:
            yield f"line {first + 1}: the code block does not end"
        elif token.type == "inline":
            for number, line in enumerate(lines[first:last], first + 1):
                if token.level == 1 and re.match(r"\s*\||.*\|\s*$", line):
                    yield f"line {number}: a table's row in a paragraph"
            texts = [each.content for each in token.children or [] if each.type == "text"]
            if any("`" in text for text in texts):
                yield f"line {first + 1}: a code span does not end"
            if any("][" in text for text in texts):
                yield f"line {first + 1}: the target of a link is not defined"


def links(text: str) -> Iterator[tuple[str, str, bool]]:
    """The text and the target of each link and picture within the repository, and if it is a cell of a table."""
    tokens = PARSER.parse(text)
    for before, token in itertools.pairwise(tokens):
        children = token.children or []
        for index, child in enumerate(children):
            target = unquote(str(child.attrGet("href") or child.attrGet("src") or ""))
            if target and not re.match(r"[a-z]+:", target):
                yield children[min(index + 1, len(children) - 1)].content, target, before.type == "td_open"


def broken_links(page: str, text: str) -> Iterator[str]:
    """Links to files and sections that do not exist, and figures of tables that are not in the linked section."""
    for label, target, is_cell in links(text):
        path, _, anchor = target.partition("#")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if name != page and name not in tracked() and not (ROOT / name).is_dir():
            yield f"{target}: there is no such file"
        elif name.endswith(".md"):
            parts = sections(text) if name == page else sections_of(name)
            if anchor and anchor not in parts:
                yield f"{target}: there is no such section"
            elif is_cell and FIGURE.fullmatch(label):
                section = re.sub(r"e-0", "e-", parts[anchor] if anchor else (ROOT / name).read_text())
                if not re.search(rf"(?<![\d.]){re.escape(label)}(?![\d]|\.\d)", section):
                    yield f"{target}: {label} is not there"


def broken_markers(text: str) -> Iterator[str]:
    """Generated parts without a beginning or an end, or whose program does not exist."""
    commands = WRITTEN.findall(text)
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if (begin := BEGIN.fullmatch(line)) or line == END:
            if bool(begin) is inside:
                yield f"line {number}: {'a generated part in another one' if begin else 'an end without a beginning'}"
            inside = begin is not None
            commands += [begin[1]] if begin else []
    if inside:
        yield "a generated part does not end"
    for command in commands:
        if not program_exists(command):
            yield f"there is no `{command}`"


def program_exists(command: str) -> bool:
    match command.split():
        case [("convert-kimi" | "kimi-llama" | "validate-kimi"), *_]:
            return True
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module) is not None
        case [script, *_]:
            return script in tracked()
    return False


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_author_meant(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [*broken_blocks(text), *broken_links(page, text), *broken_markers(text)] == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("| a | b |\n| --- | --- |\n| c |", "line 3: 2 columns in the head, 1 in this row"),
        ("| a | b |\n| --- | --- |\n| `c|d` | e |", "line 3: 2 columns in the head, 3 in this row"),
        ("A sentence, then\n| c | d |\nand more.", "line 2: a table's row in a paragraph"),
        ("| a | b |\n| c | d |", "line 1: a table's row in a paragraph"),
        ("Some `code without an end.", "line 1: a code span does not end"),
        ("[1.2][b]\n\nA line.\n[b]: page.md", "line 1: the target of a link is not defined"),
        ("a\n\n```sh\nls", "line 3: the code block does not end"),
        ("[a](no-page.md)", "no-page.md: there is no such file"),
        ("![a](no.svg)", "no.svg: there is no such file"),
        ("[a](docs/faq.md#no-section)", "docs/faq.md#no-section: there is no such section"),
        ("# A `b`\n\n[a](#a-c)", "#a-c: there is no such section"),
        ("# A\n\n1.25\n\n# B\n\n| a |\n| --- |\n| [1.2](#a) |", "#a: 1.2 is not there"),
        ("<!-- generated: tools/run patches index -->\n", "a generated part does not end"),
        ("<!-- end -->", "line 1: an end without a beginning"),
        ("Written by `scripts/none`; do not edit.", "there is no `scripts/none`"),
    ],
)
def test_a_broken_page_is_found(text: str, error: str) -> None:
    assert error in [*broken_blocks(text), *broken_links("page.md", text), *broken_markers(text)]
