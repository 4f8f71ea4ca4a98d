"""Damaged or contradictory vocabulary files: each raises one ConvertError that names the location."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from random_checkpoint import write_tokenizer
from tokenizer_cases import config, train_ranks

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.families import load_vocab
from kimi_gguf.convert.model.vocab_files import split_patterns

RANKS = train_ranks(40)
N = len(RANKS)
LINES = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(RANKS)]


def changed(line: int, content: bytes) -> bytes:
    """tiktoken.model with one line (from 1) replaced."""
    return b"\n".join([*LINES[: line - 1], content, *LINES[line:]]) + b"\n"


MODELS = {
    "empty": (b"", r"line 1: expected 'base64 rank', found b''"),
    "binary": (bytes(range(256)) * 9, r"line 1"),
    "not base64": (changed(7, b"@@@@ 6"), r"line 7: expected base64, found b'@@@@'"),
    "base64 of the wrong length": (changed(7, b"AAA 6"), r"line 7: expected base64, found b'AAA'"),
    "base64 beyond ASCII": (changed(7, "äö== 6".encode()), r"line 7: expected base64"),
    "no rank": (changed(9, b"CA=="), r"line 9: expected 'base64 rank'"),
    "three fields": (changed(9, b"CA== 8 8"), r"line 9: expected 'base64 rank'"),
    "blank line": (changed(9, b""), r"line 9: expected 'base64 rank'"),
    "a rank that is no number": (changed(9, b"CA== eight"), r"line 9: expected rank 8, found b'eight'"),
    "a rank in other digits": (changed(9, "CA== ٨".encode()), r"line 9: expected rank 8"),
    "a negative rank": (changed(9, b"CA== -8"), r"line 9: expected rank 8, found b'-8'"),
    "a rank of thousands of digits": (changed(9, b"CA== " + b"9" * 9000), r"line 9: expected rank 8"),
    "ranks out of order": (b"\n".join(LINES[1::-1] + LINES[2:]), r"line 1: expected rank 0, found b'1'"),
    "a gap in the ranks": (b"\n".join(LINES[:20] + LINES[21:]), r"line 21: expected rank 20, found b'21'"),
    "a rank twice": (changed(10, LINES[8]), r"line 10: expected rank 9, found b'8'"),
    "a token twice": (changed(N, LINES[256].split()[0] + b" %d" % (N - 1)), r"is already in line"),
    "an empty token": (changed(N, b"==== %d" % (N - 1)), rf"line {N}"),
    "a huge line": (
        changed(N, base64.b64encode(b"x" * 99999) + b" %d" % (N - 1)),
        rf"line {N}: token: expected 1 to 1024 bytes, found 99999",
    ),
    "a byte missing": (
        b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(RANKS[1:])),
        r"found none for 1 of 256 \(0x00\)",
    ),
    "no bytes at all": (b"AAAA 0\n", r"found none for 256 of 256 \(0x00, 0x01, 0x02, 0x03, \.\.\.\)"),
    "two million lines": (b"\n" * 2_000_000, r"found 2000000 lines"),
}


def added(**entries: object) -> bytes:
    """tokenizer_config.json with these added tokens; id_123 is the key "123"."""
    tokens = {key.removeprefix("id_"): entry for key, entry in entries.items()}
    return json.dumps({"added_tokens_decoder": tokens}).encode()


END = {"content": "<|im_end|>", "special": True}
SETTINGS = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"added_tokens_decoder": {', "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "nested deeply": (b'{"a":' * 100_000, "nested too deeply"),
    "a list": (b"[]", "expected a JSON object"),
    "a key twice": (b'{"added_tokens_decoder": {}, "added_tokens_decoder": {}}', "appears twice"),
    "no added tokens": (b"{}", "expected an object 'added_tokens_decoder'"),
    "added tokens as a list": (b'{"added_tokens_decoder": []}', "expected an object 'added_tokens_decoder'"),
    "an id that is no number": (added(first=END), "expected a token id in plain decimal"),
    "an id with a sign": (added(**{f"+{N}": END}), "expected a token id in plain decimal"),
    "an id with a leading zero": (added(**{f"0{N}": END}), "expected a token id in plain decimal"),
    "an id of thousands of digits": (added(**{"9" * 9000: END}), "expected a token id in plain decimal"),
    "an id of an ordinary token": (added(id_7=END), rf"expected an id from {N} to {N + 257}, found 7"),
    "an id beyond the embedding": (
        added(**{str(N + 258): END}),
        rf"expected an id from {N} to {N + 257}, found {N + 258}",
    ),
    "an entry that is no object": (added(**{str(N): "[BOS]"}), "expected an object, found '\\[BOS\\]'"),
    "no content": (added(**{str(N): {"special": True}}), "'content': expected text"),
    "empty content": (added(**{str(N): {"content": ""}}), "'content': expected 1 to 1024 characters"),
    "content that is no text": (added(**{str(N): {"content": 7}}), "'content': expected text"),
    "a NUL in the content": (added(**{str(N): {"content": "a\0b"}}), "without NUL"),
    "half a surrogate pair": (added(**{str(N): {"content": "\ud800"}}), "unpaired surrogate"),
    "huge content": (added(**{str(N): {"content": "x" * 5000}}), "found 5000"),
    "special that is no truth value": (
        added(**{str(N): {"content": "a", "special": 1}}),
        "'special': expected true or false",
    ),
    "a name twice": (
        added(**{str(N): END, str(N + 1): END}),
        rf"special token {N + 1}, .* has the same text as special token {N}",
    ),
    "a name like a rank": (
        added(**{str(N): {"content": "A"}}),
        rf"special token {N}, 'A', has the same text as ordinary",
    ),
    "a name like a reserved one": (
        added(**{str(N): {"content": f"<|reserved_token_{N + 9}|>"}}),
        rf"special token {N + 9}, .* has the same text as special token {N}",
    ),
}


DAMAGED = [
    *(("tiktoken.model", content, message) for content, message in MODELS.values()),
    *(("tokenizer_config.json", content, message) for content, message in SETTINGS.values()),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path, RANKS)


@pytest.mark.parametrize("name, content, message", DAMAGED, ids=[*MODELS, *(f"token: {s}" for s in SETTINGS)])
def test_a_damaged_file_is_refused(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ConvertError, match=rf"{re.escape(name)}.*{message}"):
        load_vocab(folder, config(N))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_missing_file_or_a_folder_in_its_place_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if name != "chat_template.jinja":
        with pytest.raises(ConvertError, match=name):
            load_vocab(folder, config(N))
    (folder / name).mkdir()
    with pytest.raises(ConvertError, match=name):
        load_vocab(folder, config(N))


@pytest.mark.parametrize("template", [7, {"a": 1}, "nul \0", "half \ud800"])
def test_a_template_that_is_no_text_is_refused(template: object, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS, chat_template=template)
    with pytest.raises(ConvertError, match="'chat_template'"):
        load_vocab(tmp_path, config(N))


def test_a_template_whose_name_is_no_text_is_left_out(tmp_path: Path) -> None:
    templates = [{"name": [], "template": "one"}, {"name": "default", "template": "two"}]
    write_tokenizer(tmp_path, RANKS, chat_template=templates)
    assert load_vocab(tmp_path, config(N)).chat_template == "two"


@pytest.mark.parametrize("stages", [None, 7, "Split"])
def test_stages_that_are_no_list_have_no_patterns(stages: object) -> None:
    assert split_patterns({"type": "Sequence", "pretokenizers": stages}) == []


@pytest.mark.parametrize("content", [b"\xff", b"line\nnul \0"])
def test_a_template_file_that_is_no_text_is_refused(content: bytes, folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ConvertError, match=r"chat_template\.jinja, line [12]"):
        load_vocab(folder, config(N))


def test_more_ranks_than_the_embedding_has_rows_are_refused(folder: Path) -> None:
    with pytest.raises(ConvertError, match=rf"vocab_size in config\.json: .* {N}, .* found {N - 1}"):
        load_vocab(folder, config(N, rows=-1))
