"""Byte-level BPE: the model's split pattern, GPT-2's spelling of bytes, and merges from ranks.

Input: token bytes in rank order. Output: the printable spelling that GGUF stores (`bytes_to_text`) and, for each
token longer than one byte, the two tokens that it is merged from (`merges_from_ranks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

# The K2 family splits text with this pattern before merging; the syntax is that of Rust's regex crate (`&&` is set
# intersection). GGUF names it by the pre-tokenizer `kimi-k2`.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _printable_code_points() -> list[int]:
    """The code points for the bytes 0..255: a printable Latin-1 byte is itself, the others are numbered from U+0100
    in byte order (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    itself = set(printable)
    return [byte if byte in itself else next(others) for byte in range(256)]


_BYTE_TO_TEXT = dict(enumerate(_printable_code_points()))
_TEXT_TO_BYTE = {code: byte for byte, code in _BYTE_TO_TEXT.items()}

MAX_TOKEN_BYTES = 1024  # far more than any real token; limits the quadratic cost


def bytes_to_text(token: bytes) -> str:
    """GPT-2's printable spelling of a token, one code point per byte."""
    return token.decode("latin-1").translate(_BYTE_TO_TEXT)


def text_to_bytes(text: str) -> bytes:
    """The inverse of `bytes_to_text`. Raises `KeyError` for a character that is not the spelling of a byte."""
    return bytes(_TEXT_TO_BYTE[ord(character)] for character in text)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of `token` before the last merge of byte-pair encoding: two if merges can make it, else more.

    The pair with the lowest rank is merged first, the leftmost of equals, as in tiktoken. In a longer text the same
    merges happen in the same order as long as none crosses the token's ends, so no other pair becomes the token
    there.
    """
    nothing = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    pairs = [ranks.get(a + b, nothing) for a, b in pairwise(parts)]
    while len(parts) > 2:
        best = min(pairs)
        if best == nothing:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        if at > 0:
            pairs[at - 1] = ranks.get(parts[at - 1] + parts[at], nothing)
        if at < len(pairs):
            pairs[at] = ranks.get(parts[at] + parts[at + 1], nothing)
    return parts


def merges_from_ranks(tokens: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], list[int]]:
    """The merge of every token longer than one byte, in rank order.

    tokens: distinct, index = rank, every single byte among them, none above MAX_TOKEN_BYTES.
    Returns (merges, unreachable): unreachable are the ranks of tokens that no sequence of merges makes; tiktoken
    produces them only for text that equals the token, which a merge list cannot express.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    unreachable: list[int] = []
    for rank, token in enumerate(tokens):
        if len(token) < 2:
            continue
        parts = last_merge(token, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unreachable.append(rank)
    return merges, unreachable
