"""Trains a byte-level BPE tokenizer for the demo checkpoint.

Input: training text. Output: ranks, and an encoder for training.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]
import tiktoken
from model import NUM_RANKS

from kimi_gguf.convert.model.byte_bpe import SPLIT_PATTERN
from kimi_gguf.tools.tokenizer_files import MODEL_FILE, OFFSET, SPECIAL

MIN_COUNT = 3  # rarer pieces do not count for merges

SPLIT = regex.compile(SPLIT_PATTERN, regex.V1)  # V1: character sets with intersections, as in the pattern

Pair = tuple[int, int]


def train_ranks(
    texts: Iterable[str], num_ranks: int = NUM_RANKS, frequent: Mapping[str, int] | None = None
) -> list[bytes]:
    """Byte-pair merges by frequency inside split pieces; the rank order is the merge order.

    The first 256 ranks are the single bytes. Of equally frequent pairs the one with the lower ranks is merged first, so
    the result depends only on the text. `frequent`: further texts, and how often each counts.
    """
    pieces = Counter(piece for text in texts for piece in SPLIT.findall(text))
    for text, times in (frequent or {}).items():
        for piece in SPLIT.findall(text):
            pieces[piece] += times
    pieces = Counter({piece: count for piece, count in pieces.items() if count >= MIN_COUNT})
    words = [list(piece.encode()) for piece in pieces]
    counts = list(pieces.values())
    ranks = [bytes([value]) for value in range(256)]
    pairs: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[index]
            where[pair].add(index)

    while len(ranks) < num_ranks:
        if not pairs:
            raise ValueError(f"the text: expected {num_ranks} ranks, found {len(ranks)}")
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        new = len(ranks)
        ranks.append(ranks[best[0]] + ranks[best[1]])
        for index in where.pop(best):
            word = words[index]
            merged = _merge(word, best, new)
            for pair in pairwise(word):
                pairs[pair] -= counts[index]
                if not pairs[pair]:
                    del pairs[pair]
            for pair in pairwise(merged):
                pairs[pair] += counts[index]
                where[pair].add(index)
            words[index] = merged
    return ranks


class Encoder:
    """Text to ids and back; special tokens are added by name with `special`, never parsed out of text."""

    def __init__(self, ranks: list[bytes]) -> None:
        self.ranks = ranks
        numbers = {token: rank for rank, token in enumerate(ranks)}
        self._bpe = tiktoken.Encoding("", pat_str=SPLIT_PATTERN, mergeable_ranks=numbers, special_tokens={})
        self._tokens = dict(enumerate(ranks))
        self._tokens |= {len(ranks) + offset: text.encode() for offset, (text, _) in SPECIAL.items()}

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        lines = (folder / MODEL_FILE).read_text(encoding="ascii").splitlines()
        return cls([base64.b64decode(line.split(" ")[0]) for line in lines])

    def special(self, text: str) -> int:
        return len(self.ranks) + OFFSET[text]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode_ordinary(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens by name, reserved ones as `<|reserved|>`."""
        parts = (self._tokens.get(token, b"<|reserved|>") for token in ids)
        return b"".join(parts).decode(errors="replace")


def chat_ids(encoder: Encoder, messages: list[tuple[str, str]]) -> list[tuple[list[int], bool]]:
    """(role, text) messages in the chat template's form, as (ids, is it an assistant's text) segments.

    An assistant's segment ends with `<|im_end|>`; everything else is prompt.
    """
    middle, end = encoder.special("<|im_middle|>"), encoder.special("<|im_end|>")
    segments: list[tuple[list[int], bool]] = []
    for role, text in messages:
        head = [encoder.special(f"<|im_{role}|>"), *encoder.encode(role), middle]
        body = [*encoder.encode(text), end]
        segments += [(head, False), (body, role == "assistant")]
    return segments


def _merge(word: list[int], pair: Pair, new: int) -> list[int]:
    merged: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
