"""The vocabulary files of a checkpoint, parsed and checked as untrusted data.

Input: `tiktoken.model`, `tokenizer.json`, `tokenizer_config.json`. Output: token bytes in rank order, special tokens
by id, settings. Every error is a ConvertError that names the file and the line or key.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.byte_bpe import MAX_TOKEN_BYTES, SPLIT_PATTERN, text_to_bytes
from kimi_gguf.convert.source.json_file import read_object

TOKENIZER: Final = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_FILE_BYTES = 64 << 20  # the real tiktoken.model has 2.8 MB, a tokenizer.json of it about 20
MAX_RANKS = 1 << 20


@dataclass(frozen=True)
class SpecialToken:
    """One entry of `added_tokens_decoder`: matched whole in a text, before any splitting."""

    content: str
    special: bool  # False: shown in the output and matched in a user's text as well


def excerpt(value: object) -> str:
    """At most 60 characters of something found in a file, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_file(path: Path) -> bytes:
    """A regular file's content, refused above MAX_FILE_BYTES."""
    try:
        if not path.is_file():
            raise ConvertError(f"{path}: not there, or not a regular file; copy it from the checkpoint")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ConvertError(
                f"{path}: {size} bytes, more than the {MAX_FILE_BYTES} a tokenizer file may have"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """A UTF-8 text file without NUL."""
    content = read_file(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConvertError(f"{path}, line {line}: not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise ConvertError(
            f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL character"
        )
    return text


def check_ranks(tokens: list[bytes], path: Path, where: str) -> None:
    """Refuse a vocabulary without one of the 256 bytes, with a token twice, or with one beyond all bounds.

    where: how the file calls the place of a token ("line" or "id"); lines count from 1, ids from 0.
    """
    first = 1 if where == "line" else 0
    places: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        place = f"{path}, {where} {rank + first}"
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ConvertError(f"{place}: a token of {len(token)} bytes; expected 1 to {MAX_TOKEN_BYTES}")
        if (earlier := places.setdefault(token, rank)) != rank:
            raise ConvertError(
                f"{place}: the token {excerpt(token)} stands already in {where} {earlier + first}"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in places]
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ConvertError(
            f"{path}: no token for {len(missing)} of the 256 single bytes ({shown}); the file is damaged or "
            "is not a byte-level vocabulary"
        )


def read_tiktoken_model(path: Path) -> list[bytes]:
    """The tokens of a `tiktoken.model`, index = rank: one line `base64 rank` each, ranks 0, 1, 2, ..."""
    tokens: list[bytes] = []
    lines = read_file(path).removesuffix(b"\n").split(b"\n")
    if len(lines) > MAX_RANKS:
        raise ConvertError(
            f"{path}: {len(lines)} lines, more than the {MAX_RANKS} tokens a vocabulary may have"
        )
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) != 2:
            raise ConvertError(f"{path}, line {number}: expected 'base64 rank', found {excerpt(line)}")
        encoded, rank = fields
        if rank != b"%d" % len(tokens):
            raise ConvertError(
                f"{path}, line {number}: expected rank {len(tokens)}, found {excerpt(rank)}; ranks must "
                "count up from 0, each once"
            )
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ConvertError(f"{path}, line {number}: {excerpt(encoded)} is not base64: {error}") from error
    check_ranks(tokens, path, "line")
    return tokens


def special_token(content: object, special: object, where: str) -> SpecialToken:
    """Check one added token's two fields; `where` names its place in an error."""
    if not isinstance(content, str) or not content or "\0" in content:
        raise ConvertError(f"{where}: expected a non-empty 'content' without NUL, found {excerpt(content)}")
    if len(content) > MAX_TOKEN_BYTES:
        raise ConvertError(
            f"{where}: 'content' of {len(content)} characters; at most {MAX_TOKEN_BYTES} are meant"
        )
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConvertError(f"{where}: 'content' {excerpt(content)} holds half a surrogate pair") from error
    if not isinstance(special, bool):
        raise ConvertError(f"{where}: 'special' must be true or false, found {excerpt(special)}")
    return SpecialToken(content, special)


def added_tokens(settings: dict[str, Any], path: Path) -> dict[int, SpecialToken]:
    """`added_tokens_decoder` of a tokenizer_config.json: special tokens by id."""
    entries = settings.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise ConvertError(
            f"{path}: expected an object 'added_tokens_decoder' (the names of the special tokens), "
            f"found {excerpt(entries)}"
        )
    named: dict[int, SpecialToken] = {}
    for key, entry in entries.items():
        where = f"{path}, added_tokens_decoder[{excerpt(key)}]"
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and str(int(key)) == key):
            raise ConvertError(f"{where}: the key must be a token id in plain decimal")
        if not isinstance(entry, dict):
            raise ConvertError(f"{where}: expected an object, found {excerpt(entry)}")
        named[int(key)] = special_token(entry.get("content"), entry.get("special", False), where)
    return named


def read_tokenizer_json(path: Path) -> tuple[list[bytes], dict[int, SpecialToken], list[tuple[bytes, bytes]]]:
    """A `tokenizer.json` written by transformers, if it is the same byte-level BPE as a tiktoken.model.

    Returns (tokens by rank, special tokens by id, the file's merges in order).
    """
    root = read_object(path)
    model = root.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ConvertError(f"{path}: expected a 'model' of type BPE, found {excerpt(model)}")
    if SPLIT_PATTERN not in split_patterns(root.get("pre_tokenizer")):
        raise ConvertError(
            f"{path}: its pre_tokenizer is not the model's own split pattern, so its ids are not those the "
            "model was trained on; take tiktoken.model from the original checkpoint"
        )
    if root.get("normalizer") is not None:
        raise ConvertError(f"{path}: it has a normalizer ({excerpt(root['normalizer'])}); the model has none")
    named: dict[int, SpecialToken] = {}
    for i, entry in enumerate(root.get("added_tokens") or []):
        where = f"{path}, added_tokens[{i}]"
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or entry["id"] in named:
            raise ConvertError(f"{where}: expected an object with an 'id' of its own, found {excerpt(entry)}")
        named[entry["id"]] = special_token(entry.get("content"), entry.get("special", False), where)
    tokens = vocab_in_order(model.get("vocab"), named, path)
    return tokens, named, merge_pairs(model.get("merges"), path)


def split_patterns(pre_tokenizer: object) -> list[str]:
    """The regular expressions a tokenizer.json splits by."""
    if not isinstance(pre_tokenizer, dict):
        return []
    stages = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [s.get("pattern") for s in stages if isinstance(s, dict) and s.get("type") == "Split"]
    return [p["Regex"] for p in patterns if isinstance(p, dict) and isinstance(p.get("Regex"), str)]


def vocab_in_order(vocab: object, named: dict[int, SpecialToken], path: Path) -> list[bytes]:
    """A tokenizer.json's `vocab` (spelling to id) without its special tokens, as bytes by rank."""
    if not isinstance(vocab, dict):
        raise ConvertError(f"{path}: expected an object model.vocab, found {excerpt(vocab)}")
    plain: dict[int, str] = {}
    for text, rank in vocab.items():
        if type(rank) is not int or rank in plain:
            raise ConvertError(
                f"{path}, model.vocab[{excerpt(text)}]: expected an id of its own, found {excerpt(rank)}"
            )
        if rank not in named:
            plain[rank] = text
    tokens: list[bytes] = []
    for rank in range(len(plain)):
        if rank not in plain:
            raise ConvertError(
                f"{path}: model.vocab has {len(plain)} ordinary tokens, but none with id {rank}"
            )
        try:
            tokens.append(text_to_bytes(plain[rank]))
        except KeyError as error:
            raise ConvertError(
                f"{path}, model.vocab[{excerpt(plain[rank])}]: not in GPT-2's byte spelling"
            ) from error
    check_ranks(tokens, path, "id")
    return tokens


def merge_pairs(merges: object, path: Path) -> list[tuple[bytes, bytes]]:
    """A tokenizer.json's `merges`, each "left right" or ["left", "right"]."""
    if not isinstance(merges, list):
        raise ConvertError(f"{path}: expected a list model.merges, found {excerpt(merges)}")
    pairs: list[tuple[bytes, bytes]] = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = parts
            pairs.append((text_to_bytes(left), text_to_bytes(right)))
        except (KeyError, TypeError, ValueError) as error:
            raise ConvertError(
                f"{path}, model.merges[{i}]: expected two tokens, found {excerpt(merge)}"
            ) from error
    return pairs
