"""The character classes in C++ equal those of tiktoken's regular expressions, code point by code point."""

from __future__ import annotations

import re

from kimi_gguf.ggml_ops.llama.tokenizer_split.make_tables import CLASSES, TABLE, class_bits, unicode_version


def table_bits() -> list[int]:
    """The C++ table, expanded."""
    runs = [int(word, 16) for word in re.findall(r"0x[0-9a-f]{8}", TABLE.read_text())]
    bits = [0] * 0x110000
    for run, after in zip(runs, [*runs[1:], 0x110000 << 8], strict=True):
        bits[run >> 8 : after >> 8] = [run & 0xFF] * ((after >> 8) - (run >> 8))
    return bits


def test_the_table_is_tiktokens() -> None:
    text = TABLE.read_text()
    for bit, name in enumerate(CLASSES):
        assert f"KIMI_{name} = {1 << bit}," in text
    written = re.search(r"Unicode (\d+\.\d+)\.", text)
    assert written is not None
    assert written[1] == unicode_version(), "tiktoken has another Unicode version: run make_tables.py again"
    table, right = table_bits(), class_bits()
    assert [hex(c) for c in range(0x110000) if table[c] != right[c]] == []
