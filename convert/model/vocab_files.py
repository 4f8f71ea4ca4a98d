"""The vocabulary files of a checkpoint, parsed and checked as untrusted data.

Input: `tiktoken.model`, `tokenizer.json`, `tokenizer_config.json`. Output: token bytes in rank order, special tokens
by id, settings. Every error is a ConvertError that names the file and the line or key.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError, excerpt
from kimi_gguf.convert.model.byte_bpe import MAX_TOKEN_BYTES, SPLIT_PATTERN, text_to_bytes
from kimi_gguf.convert.source.json_file import read_object, read_small_file

TOKENIZER: Final = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_RANKS = 1 << 20


@dataclass(frozen=True)
class SpecialToken:
    """One entry of `added_tokens_decoder`: matched whole in a text, before any splitting."""

    content: str
    special: bool  # False: shown in the output and matched in a user's text as well


def read_text(path: Path) -> str:
    """A UTF-8 text file without NUL."""
    content = read_small_file(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"{error.object[error.start]:#x}"
        raise ConvertError(f"{path}, line {line}", expected="UTF-8", found=f"byte {found}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConvertError(f"{path}, line {line}", expected="text", found="a NUL character")
    return text


def checked_text(value: object, where: str) -> str:
    """`value`, if it is text without NUL that UTF-8 can encode."""
    if not isinstance(value, str) or "\0" in value:
        raise ConvertError(where, expected="text without NUL", found=excerpt(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConvertError(where, expected="text", found=f"an unpaired surrogate: {excerpt(value)}") from None
    return value


def check_ranks(tokens: Iterable[tuple[int, bytes]], path: Path, where: str) -> None:
    """Raise `ConvertError` if a single byte is missing, a token appears twice, or a token is empty or too long.

    where: "line" or "id", by which the file numbers its tokens; lines count from 1, ids from 0.
    """
    first = 1 if where == "line" else 0
    places: dict[bytes, int] = {}
    for rank, token in tokens:
        place = f"{path}, {where} {rank + first}"
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ConvertError(f"{place}: token", expected=f"1 to {MAX_TOKEN_BYTES} bytes", found=len(token))
        if (earlier := places.setdefault(token, rank)) != rank:
            raise ConvertError(f"{place}: the token {excerpt(token)} is already in {where} {earlier + first}")
    missing = [byte for byte in range(256) if bytes([byte]) not in places]
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ConvertError(
            path,
            expected="a token for each single byte",
            found=f"none for {len(missing)} of 256 ({shown})",
            todo="the file is damaged or is not a byte-level vocabulary",
        )


def read_tiktoken_model(path: Path) -> list[bytes]:
    """The tokens of a `tiktoken.model`, index = rank: one line `base64 rank` each, ranks 0, 1, 2, ..."""
    tokens: list[bytes] = []
    lines = read_small_file(path).removesuffix(b"\n").split(b"\n")
    if len(lines) > MAX_RANKS:
        raise ConvertError(path, expected=f"at most {MAX_RANKS} tokens", found=f"{len(lines)} lines")
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) != 2:
            raise ConvertError(f"{path}, line {number}", expected="'base64 rank'", found=excerpt(line))
        encoded, rank = fields
        if rank != b"%d" % len(tokens):
            raise ConvertError(
                f"{path}, line {number}",
                expected=f"rank {len(tokens)}",
                found=excerpt(rank),
                todo="ranks must count up from 0",
            )
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
        except (binascii.Error, ValueError) as error:
            found = f"{excerpt(encoded)} ({error})"
            raise ConvertError(f"{path}, line {number}", expected="base64", found=found) from None
    check_ranks(enumerate(tokens), path, "line")
    return tokens


def special_token(content: object, special: object, where: str) -> SpecialToken:
    """Check the two fields of an added token; `where` names its place in an error."""
    content = checked_text(content, f"{where}, 'content'")
    if not 0 < len(content) <= MAX_TOKEN_BYTES:
        size = f"expected 1 to {MAX_TOKEN_BYTES} characters, found {len(content)}"
        raise ConvertError(f"{where}, 'content': {size}")
    if not isinstance(special, bool):
        raise ConvertError(f"{where}, 'special'", expected="true or false", found=excerpt(special))
    return SpecialToken(content, special)


def added_tokens(settings: dict[str, Any], path: Path) -> dict[int, SpecialToken]:
    """`added_tokens_decoder` of a tokenizer_config.json: special tokens by id."""
    entries = settings.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise ConvertError(
            path,
            expected="an object 'added_tokens_decoder' (the names of the special tokens)",
            found=excerpt(entries),
        )
    named: dict[int, SpecialToken] = {}
    for key, entry in entries.items():
        where = f"{path}, added_tokens_decoder[{excerpt(key)}]"
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and str(int(key)) == key):
            raise ConvertError(where, expected="a token id in plain decimal as the key")
        if not isinstance(entry, dict):
            raise ConvertError(where, expected="an object", found=excerpt(entry))
        named[int(key)] = special_token(entry.get("content"), entry.get("special", False), where)
    return named


def read_tokenizer_json(path: Path) -> tuple[list[bytes], dict[int, SpecialToken], list[tuple[bytes, bytes]]]:
    """A `tokenizer.json` written by transformers, if it is the same byte-level BPE as a tiktoken.model.

    Returns (tokens by rank, special tokens by id, the file's merges in order).
    """
    root = read_object(path)
    model = root.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ConvertError(path, expected="a 'model' of type BPE", found=excerpt(model))
    if SPLIT_PATTERN not in split_patterns(root.get("pre_tokenizer")):
        raise ConvertError(
            f"{path}: pre_tokenizer",
            expected="the split pattern of Kimi K2",
            found="another one, which gives other token ids",
            todo="use tiktoken.model of the original checkpoint",
        )
    if root.get("normalizer") is not None:
        raise ConvertError(f"{path}: normalizer", expected="none", found=f"{excerpt(root['normalizer'])}")
    named = tokens_of_json(root, path)
    tokens = vocab_in_order(model.get("vocab"), named, path)
    return tokens, named, merge_pairs(model.get("merges"), path)


def tokens_of_json(root: dict[str, Any], path: Path) -> dict[int, SpecialToken]:
    """`added_tokens` of a tokenizer.json: special tokens by id."""
    entries = root.get("added_tokens") or []
    if not isinstance(entries, list):
        raise ConvertError(path, expected="a list added_tokens", found=excerpt(entries))
    named: dict[int, SpecialToken] = {}
    for i, entry in enumerate(entries):
        where = f"{path}, added_tokens[{i}]"
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or entry["id"] in named:
            raise ConvertError(where, expected="an object with a unique 'id'", found=excerpt(entry))
        named[entry["id"]] = special_token(entry.get("content"), entry.get("special", False), where)
    return named


def split_patterns(pre_tokenizer: object) -> list[str]:
    """The regular expressions a tokenizer.json splits by."""
    if not isinstance(pre_tokenizer, dict):
        return []
    stages = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not isinstance(stages, list):
        return []
    patterns = [s.get("pattern") for s in stages if isinstance(s, dict) and s.get("type") == "Split"]
    return [p["Regex"] for p in patterns if isinstance(p, dict) and isinstance(p.get("Regex"), str)]


def vocab_in_order(vocab: object, named: dict[int, SpecialToken], path: Path) -> list[bytes]:
    """A tokenizer.json's `vocab` (spelling to id) without its special tokens, as bytes by rank."""
    if not isinstance(vocab, dict):
        raise ConvertError(path, expected="an object model.vocab", found=excerpt(vocab))
    plain: dict[int, str] = {}
    for text, rank in vocab.items():
        if type(rank) is not int or rank in plain:
            place = f"{path}, model.vocab[{excerpt(text)}]"
            raise ConvertError(place, expected="a unique id", found=excerpt(rank))
        if rank not in named:
            plain[rank] = text
    tokens: list[bytes] = []
    for rank in range(len(plain)):
        if rank not in plain:
            raise ConvertError(
                f"{path}: model.vocab",
                expected=f"ids 0 to {len(plain) - 1} for the ordinary tokens",
                found=f"none with id {rank}",
            )
        try:
            tokens.append(text_to_bytes(plain[rank]))
        except KeyError:
            raise ConvertError(
                f"{path}, model.vocab[{excerpt(plain[rank])}]", expected="GPT-2's spelling of bytes"
            ) from None
    check_ranks(enumerate(tokens), path, "id")
    return tokens


def merge_pairs(merges: object, path: Path) -> list[tuple[bytes, bytes]]:
    """A tokenizer.json's `merges`, each "left right" or ["left", "right"]."""
    if not isinstance(merges, list):
        raise ConvertError(path, expected="a list model.merges", found=excerpt(merges))
    pairs: list[tuple[bytes, bytes]] = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = parts
            pairs.append((text_to_bytes(left), text_to_bytes(right)))
        except (KeyError, TypeError, ValueError):
            what = f"expected two tokens, found {excerpt(merge)}"
            raise ConvertError(f"{path}, model.merges[{i}]: {what}") from None
    return pairs
