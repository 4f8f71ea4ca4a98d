"""Damaged or contradictory vocabulary files: one ConvertError that names the place, never anything else."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
from tokenizer_cases import config, train_ranks, write_tokenizer

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.vocab import load_vocab

RANKS = train_ranks(40)
N = len(RANKS)
LINES = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(RANKS)]


def changed(line: int, content: bytes) -> bytes:
    """tiktoken.model with one line (from 1) replaced."""
    return b"\n".join([*LINES[: line - 1], content, *LINES[line:]]) + b"\n"


MODELS = {
    "empty": (b"", r"line 1: expected 'base64 rank', found b''"),
    "binary": (bytes(range(256)) * 9, r"line 1"),
    "not base64": (changed(7, b"@@@@ 6"), r"line 7: b'@@@@' is not base64"),
    "base64 of the wrong length": (changed(7, b"AAA 6"), r"line 7: b'AAA' is not base64"),
    "base64 beyond ASCII": (changed(7, "äö== 6".encode()), r"line 7: .* is not base64"),
    "no rank": (changed(9, b"CA=="), r"line 9: expected 'base64 rank'"),
    "three fields": (changed(9, b"CA== 8 8"), r"line 9: expected 'base64 rank'"),
    "blank line": (changed(9, b""), r"line 9: expected 'base64 rank'"),
    "a rank that is no number": (changed(9, b"CA== eight"), r"line 9: expected rank 8, found b'eight'"),
    "a rank in other digits": (changed(9, "CA== ٨".encode()), r"line 9: expected rank 8"),
    "a negative rank": (changed(9, b"CA== -8"), r"line 9: expected rank 8, found b'-8'"),
    "a rank of thousands of digits": (changed(9, b"CA== " + b"9" * 9000), r"line 9: expected rank 8"),
    "ranks out of order": (
        b"\n".join([LINES[1], LINES[0], *LINES[2:]]),
        r"line 1: expected rank 0, found b'1'",
    ),
    "a gap in the ranks": (b"\n".join(LINES[:20] + LINES[21:]), r"line 21: expected rank 20, found b'21'"),
    "a rank twice": (changed(10, LINES[8]), r"line 10: expected rank 9, found b'8'"),
    "a token twice": (
        changed(300 if N > 300 else N, LINES[256].split()[0] + b" %d" % (N - 1)),
        r"stands already in line",
    ),
    "an empty token": (changed(N, b"==== %d" % (N - 1)), rf"line {N}"),
    "a huge line": (
        changed(N, base64.b64encode(b"x" * 99999) + b" %d" % (N - 1)),
        rf"line {N}: a token of 99999 bytes",
    ),
    "a byte missing": (
        b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(RANKS[1:])),
        r"no token for 1 of the 256 single bytes \(0x00\)",
    ),
    "no bytes at all": (
        b"AAAA 0\n",
        r"no token for 256 of the 256 single bytes \(0x00, 0x01, 0x02, 0x03, \.\.\.\)",
    ),
    "two million lines": (b"\n" * 2_000_000, r"2000000 lines"),
}


@pytest.mark.parametrize(("content", "message"), MODELS.values(), ids=MODELS.keys())
def test_a_damaged_tiktoken_model_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(ConvertError, match=rf"tiktoken\.model.*{message}"):
        load_vocab(tmp_path, config(N))


def added(**entries: object) -> bytes:
    """tokenizer_config.json with these added tokens; id_123 stands for the key "123"."""
    return json.dumps(
        {"added_tokens_decoder": {k.removeprefix("id_"): v for k, v in entries.items()}}
    ).encode()


END = {"content": "<|im_end|>", "special": True}
SETTINGS = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"added_tokens_decoder": {', "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "nested deeply": (b'{"a":' * 100_000, "nested too deeply"),
    "a list": (b"[]", "expected a JSON object"),
    "a key twice": (b'{"added_tokens_decoder": {}, "added_tokens_decoder": {}}', "stands twice"),
    "no added tokens": (b"{}", "expected an object 'added_tokens_decoder'"),
    "added tokens as a list": (b'{"added_tokens_decoder": []}', "expected an object 'added_tokens_decoder'"),
    "an id that is no number": (added(first=END), "must be a token id in plain decimal"),
    "an id with a sign": (added(**{f"+{N}": END}), "must be a token id in plain decimal"),
    "an id with a leading zero": (added(**{f"0{N}": END}), "must be a token id in plain decimal"),
    "an id of thousands of digits": (added(**{"9" * 9000: END}), "must be a token id in plain decimal"),
    "an id of an ordinary token": (added(id_7=END), "has id 7, which is an ordinary token's"),
    "an id beyond the embedding": (
        added(**{str(N + 258): END}),
        rf"has id {N + 258}, which is beyond the embedding",
    ),
    "an entry that is no object": (added(**{str(N): "[BOS]"}), "expected an object, found '\\[BOS\\]'"),
    "no content": (added(**{str(N): {"special": True}}), "expected a non-empty 'content'"),
    "empty content": (added(**{str(N): {"content": ""}}), "expected a non-empty 'content'"),
    "content that is no text": (added(**{str(N): {"content": 7}}), "expected a non-empty 'content'"),
    "a NUL in the content": (added(**{str(N): {"content": "a\0b"}}), "without NUL"),
    "half a surrogate pair": (added(**{str(N): {"content": "\ud800"}}), "half a surrogate pair"),
    "huge content": (added(**{str(N): {"content": "x" * 5000}}), "of 5000 characters"),
    "special that is no truth value": (
        added(**{str(N): {"content": "a", "special": 1}}),
        "must be true or false",
    ),
    "a name twice": (
        added(**{str(N): END, str(N + 1): END}),
        rf"special token {N + 1}, .* like the special token {N}",
    ),
    "a name like a rank": (
        added(**{str(N): {"content": "A"}}),
        rf"special token {N}, 'A', is spelt like the ordinary",
    ),
    "a name like a reserved one": (
        added(**{str(N): {"content": f"<|reserved_token_{N + 9}|>"}}),
        rf"special token {N + 9}, .* like the special token {N}",
    ),
}


@pytest.mark.parametrize(("content", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_damaged_settings_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConvertError, match=rf"tokenizer_config\.json.*{message}"):
        load_vocab(tmp_path, config(N))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_folder_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ConvertError, match=name):
        load_vocab(tmp_path, config(N))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / name).unlink()
    with pytest.raises(ConvertError, match=name):
        load_vocab(tmp_path, config(N))


@pytest.mark.parametrize("template", [7, {"a": 1}, "nul \0", "half \ud800"])
def test_a_template_that_is_no_text_is_refused(template: object, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS, chat_template=template)
    with pytest.raises(ConvertError, match="'chat_template'"):
        load_vocab(tmp_path, config(N))


@pytest.mark.parametrize("content", [b"\xff", b"line\nnul \0"])
def test_a_template_file_that_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ConvertError, match=r"chat_template\.jinja, line [12]"):
        load_vocab(tmp_path, config(N))


def test_more_ranks_than_the_embedding_has_rows_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    with pytest.raises(
        ConvertError, match=rf"{N} ordinary tokens, config\.json's vocab_size is only {N - 1}"
    ):
        load_vocab(tmp_path, config(N, rows=-1))


def test_an_end_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    with pytest.raises(ConvertError, match="pad_token_id"):
        load_vocab(tmp_path, config(N, rows=100))


def test_random_damage_never_ends_in_a_traceback(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_tokenizer(tmp_path, RANKS)
    whole = {name: (tmp_path / name).read_bytes() for name in ("tiktoken.model", "tokenizer_config.json")}
    refused = 0
    for _ in range(400):
        name = rng.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"\0", b"\n", b'"', b"}", rng.randbytes(2)]
            )
        for other, good in whole.items():
            (tmp_path / other).write_bytes(bytes(content) if other == name else good)
        try:
            load_vocab(tmp_path, config(N))
        except ConvertError as error:
            assert name in str(error)
            refused += 1
    assert refused > 200
