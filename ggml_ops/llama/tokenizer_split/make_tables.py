"""Write kimi-split-data.h: for every code point, the character classes of the split pattern that contain it.

Input: the installed tiktoken, queried with regular expressions (its regex crate defines what the model's own
tokenizer does; the Unicode database is not copied). Output: the C++ table, as runs of
code points with equal classes. Run it again when tiktoken changes to another Unicode version:

    python ggml_ops/llama/tokenizer_split/make_tables.py
"""

from __future__ import annotations

from pathlib import Path

import tiktoken

from kimi_gguf.convert.model.byte_bpe import SPLIT_PATTERN

TABLE = Path(__file__).with_name("kimi-split-data.h")
PER_LINE = 9

# Name and bit in the C++ code, expression in the pattern.
CLASSES = {
    "HAN": r"[\p{Han}]",
    "UPPER": r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    "LOWER": r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    "LETTER": r"\p{L}",
    "NUMBER": r"\p{N}",
    "SPACE": r"\s",
    "NEWLINE": r"[\r\n]",
}
# Every code point that UTF-8 can encode: all except the surrogates.
SCALARS = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def matching(expression: str) -> set[str]:
    """The characters that a one-character expression matches in tiktoken."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=expression, mergeable_ranks=single_bytes, special_tokens={})
    return set(bytes(encoding.encode_ordinary(SCALARS)).decode())


def unicode_version() -> str:
    """The newest Unicode version with code points that tiktoken's regex crate knows."""
    newest = ""
    for major in range(10, 40):
        try:
            matching(rf"\p{{Age={major}.0}}")
        except ValueError:
            break
        newest = f"{major}.0"
    return newest


def class_bits() -> list[int]:
    """For each code point 0..0x10FFFF its classes, one bit each in the order of CLASSES."""
    bits = [0] * 0x110000
    for bit, (name, expression) in enumerate(CLASSES.items()):
        if expression not in SPLIT_PATTERN:
            raise AssertionError(f"{name}: {expression} does not stand in the split pattern")
        for character in matching(expression):
            bits[ord(character)] |= 1 << bit
    return bits


def table_text(bits: list[int]) -> str:
    """The header file: the classes' bits, then (first code point << 8 | classes) for each run."""
    firsts = [c for c in range(len(bits)) if c == 0 or bits[c] != bits[c - 1]]
    runs = [f"0x{first << 8 | bits[first]:08x}," for first in firsts]
    lines = ["    " + " ".join(runs[i : i + PER_LINE]) for i in range(0, len(runs), PER_LINE)]
    enum = [
        f"    KIMI_{name} = {1 << bit},".ljust(24) + f"// {expr}"
        for bit, (name, expr) in enumerate(CLASSES.items())
    ]
    versions = f"tiktoken {tiktoken.__version__}, Unicode {unicode_version()}"
    return "\n".join(
        [
            f"// Written by make_tables.py from {versions}. Do not edit.",
            "#pragma once",
            "",
            "#include <cstdint>",
            "",
            "// clang-format off",
            "// The character classes of the split pattern; a code point may be in several.",
            "enum kimi_class : uint8_t {",
            *enum,
            "};",
            "",
            "// Runs of code points with equal classes, in order: first code point << 8 | classes.",
            "static const uint32_t KIMI_CLASS_RUNS[] = {",
            *lines,
            "};",
            "// clang-format on",
            "",
        ]
    )


if __name__ == "__main__":
    TABLE.write_text(table_text(class_bits()))
