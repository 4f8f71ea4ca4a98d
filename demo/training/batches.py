"""Training batches for the demo checkpoint: rows of whole documents and conversations.

Input: a `Corpus` and an `Encoder`. Output: ids [B, T+1] and a mask [B, T] of the tokens in the loss: all tokens of
documents, and the assistant's tokens (with `<|im_end|>`) of conversations.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from corpus import Corpus, exchange
from tokenizer import Encoder, chat_ids
from torch import Tensor

from kimi_gguf.tools.tokenizer_files import SYSTEM_MESSAGE

CONVERSATION_SHARE = 0.30  # of all tokens
MAX_TURNS = 3

Segment = tuple[list[int], bool]  # ids, whether they are in the loss


class Batches:
    """An infinite, seeded stream; `state` and `resume` continue it after an interruption."""

    def __init__(self, corpus: Corpus, encoder: Encoder, seed: int, rows: int, length: int) -> None:
        self.encoder, self.rows, self.length = encoder, rows, length
        self.documents = [encoder.encode(document) for document in corpus.documents]
        self.definitions = corpus.definitions
        self.random = random.Random(seed)
        self.unread: dict[str, list[Any]] = {"documents": [], "words": []}
        self.tokens = {"text": 0, "conversation": 0}

    def state(self) -> dict[str, Any]:
        return {"random": self.random.getstate(), "unread": self.unread, "tokens": self.tokens}

    def resume(self, state: dict[str, Any]) -> None:
        self.random.setstate(state["random"])
        self.unread, self.tokens = state["unread"], state["tokens"]

    def next(self) -> tuple[Tensor, Tensor]:
        """ids [B, T+1] int64; mask [B, T] float32, 1 if the next token is in the loss."""
        rows = [self._row() for _ in range(self.rows)]
        ids = torch.tensor([[token for token, _ in row] for row in rows])
        mask = torch.tensor([[float(learn) for _, learn in row[1:]] for row in rows])
        return ids, mask

    def _row(self) -> list[tuple[int, bool]]:
        row: list[tuple[int, bool]] = []
        while len(row) <= self.length:
            spent = self.tokens["conversation"] / max(1, sum(self.tokens.values()))
            kind = "conversation" if spent < CONVERSATION_SHARE else "text"
            segments = self._conversation() if kind == "conversation" else [(self._document(), True)]
            added = [(token, learn) for ids, learn in segments for token in ids]
            added = added[: self.length + 1 - len(row)]
            self.tokens[kind] += len(added)
            row += added
        return row

    def _document(self) -> list[int]:
        return self.documents[self._draw("documents", len(self.documents))]

    def _conversation(self) -> list[Segment]:
        words = list(self.definitions)
        messages = [("system", SYSTEM_MESSAGE)]
        for _ in range(self.random.randint(1, MAX_TURNS)):
            word = words[self._draw("words", len(words))]
            messages += exchange(word, self.definitions[word])
        return chat_ids(self.encoder, messages)

    def _draw(self, name: str, count: int) -> int:
        """The numbers below `count` in random order, repeated forever."""
        if not self.unread[name]:
            self.unread[name] = self.random.sample(range(count), count)
        drawn: int = self.unread[name].pop()
        return drawn


def windows(ids: list[int], length: int) -> Tensor:
    """Windows [n, length + 1] that overlap by one token; an incomplete last window is dropped."""
    return torch.tensor([ids[a : a + length + 1] for a in range(0, len(ids) - length, length)])
