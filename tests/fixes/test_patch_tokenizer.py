"""The patched llama.cpp produces tiktoken's ids for every text; upstream does not.

The oracle is tiktoken with the model's own pattern and the same ranks. Most tests use a vocabulary in which
any two bytes merge, in random order, so that the ids depend on where a piece of text ends.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_checkpoint import BYTES, SPECIAL, TOOL_CALL_MARKS, write_tokenizer
from tokenizer_cases import (
    config,
    every_pair_ranks,
    hostile_texts,
    llama_tokenize,
    one_piece,
    oracle,
    train_ranks,
    write_vocab_gguf,
)

from kimi_gguf.convert.model.byte_bpe import merges_from_ranks
from kimi_gguf.convert.model.families import load_vocab
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.ggml_ops.llama.tokenizer_split.make_tables import SCALARS

pytestmark = pytest.mark.engine


# Tokens that are not special, although they are added: they are matched in every text.
SHOWN = {SPECIAL[i] for i in TOOL_CALL_MARKS}


@dataclass(frozen=True)
class Tokenizer:
    """One vocabulary in tiktoken and llama.cpp."""

    ranks: list[bytes]
    model: Path
    tiktoken: tiktoken.Encoding

    def ids(self, engine: Engine, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """llama.cpp's ids of each text."""
        encoded = [text.encode() for text in texts]
        return llama_tokenize(engine.environment(), self.model, encoded, special).ids

    def wrong(self, engine: Engine, texts: Sequence[str]) -> list[str]:
        """The texts for which llama.cpp's ids differ from tiktoken's."""
        found = self.ids(engine, texts)
        wanted = self.tiktoken.encode_batch(
            list(texts), num_threads=1, allowed_special=SHOWN, disallowed_special=()
        )
        return [text for text, ids, right in zip(texts, found, wanted, strict=True) if ids != right]


def make(folder: Path, ranks: list[bytes]) -> Tokenizer:
    special = {SPECIAL.get(i, f"<|reserved_token_{len(ranks) + i}|>"): len(ranks) + i for i in range(256)}
    vocab = load_vocab(write_tokenizer(folder, ranks), config(len(ranks)))
    return Tokenizer(ranks, write_vocab_gguf(folder / "vocab.gguf", vocab), oracle(ranks, special))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Any two bytes merge."""
    return make(tmp_path_factory.mktemp("pairs"), every_pair_ranks(1))


@pytest.fixture(scope="module")
def other_pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Any two bytes merge, in another order."""
    return make(tmp_path_factory.mktemp("other_pairs"), every_pair_ranks(2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small vocabulary that is similar to a real one."""
    return make(tmp_path_factory.mktemp("trained"), train_ranks(600))


# Text, and the pieces that the pattern splits it into, determined by hand. Upstream splits these differently ...
SEAMS = {
    "a capital after a small letter": ("camelCase", ["camel", "Case"]),
    "a combining mark in a word": ("ne\u0301e", ["ne\u0301e"]),
    "a combining mark after a capital": ("E\u0301A", ["E\u0301", "A"]),
    "a mark first": ("\u0301AB", ["\u0301", "AB"]),
    "a modifier before capitals": ("ʰAB", ["ʰ", "AB"]),
    "a Han iteration mark": ("々字", ["々字"]),
    "a Han number": ("世〇年", ["世〇年"]),
    "a radical": ("⺀a", ["⺀", "a"]),
    "a Han mark": ("\U00016ff0漢", ["\U00016ff0漢"]),
    "Han of an extension": ("\U00030000\U00031350字", ["\U00030000\U00031350字"]),
    "a long s in a contraction": ("it'ſa", ["it'ſ", "a"]),
    "a title-case letter": ("aǅb", ["a", "ǅb"]),
    "a letter of Unicode 16": ("A\u1c8ab", ["A\u1c8ab"]),
}
# ... and these in the same way.
AGREED = {
    "capitals before a capitalised word": ("HTTPServer", ["HTTPServer"]),
    "a capital after a contraction": ("I'mOk", ["I'm", "Ok"]),
    "a Han number after a digit": ("1〇世", ["1〇", "世"]),
    "Hangzhou numerals": ("〡〢x", ["〡〢", "x"]),
    "a radical after a symbol": ("!⺀", ["!⺀"]),
    "an unassigned code point": (" \u0378!", [" \u0378!"]),
    "private ones": ("\ue000\ue001 ", ["\ue000\ue001", " "]),
}
NAMED = SEAMS | AGREED


@pytest.fixture(scope="module")
def seams(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every piece of SEAMS and every whole text is a token, so that an additional or missing split changes the ids."""
    pieces = [piece.encode() for _, pieces in SEAMS.values() for piece in pieces]
    tokens = [piece[:end] for piece in pieces for end in range(2, 99)]
    ranks = list(dict.fromkeys([*BYTES, *tokens, *(text.encode() for text, _ in SEAMS.values())]))
    while unreachable := merges_from_ranks(ranks)[1]:
        ranks = [token for rank, token in enumerate(ranks) if rank not in unreachable]
    return make(tmp_path_factory.mktemp("seams"), ranks)


@pytest.mark.parametrize(("text", "pieces"), NAMED.values(), ids=NAMED.keys())
def test_the_oracle_cuts_as_the_pattern_reads(text: str, pieces: list[str], seams: Tokenizer) -> None:
    assert "".join(pieces) == text
    whole = one_piece(seams.ranks)
    by_hand = [i for piece in pieces for i in whole.encode_ordinary(piece)]
    assert seams.tiktoken.encode_ordinary(text) == by_hand


def test_named_seams_are_right(engine: Engine, seams: Tokenizer) -> None:
    assert seams.wrong(engine, [text for text, _ in NAMED.values()]) == []


def test_upstream_has_seams_wrong(upstream: Engine, seams: Tokenizer) -> None:
    texts = [text for text, _ in NAMED.values()]
    assert seams.wrong(upstream, texts) == [text for text, _ in SEAMS.values()]


def in_context(characters: str) -> list[str]:
    """Texts with each of the characters alone, doubled, and next to letters, digits and an apostrophe."""
    per_text = 64
    return [
        "\n".join(f"a{c}b A{c}{c}B {c} 1{c}2 x'{c}" for c in characters[i : i + per_text])
        for i in range(0, len(characters), per_text)
    ]


def test_assigned_code_points_in_context(engine: Engine, pairs: Tokenizer) -> None:
    """Every code point of planes 0 to 3, which have all characters; every 61st of the others."""
    later = SCALARS.index("\U00040000")
    assert pairs.wrong(engine, in_context(SCALARS[:later] + SCALARS[later::61])) == []


@pytest.mark.full
def test_every_code_point_in_context(engine: Engine, pairs: Tokenizer, other_pairs: Tokenizer) -> None:
    for tokenizer in (pairs, other_pairs):
        assert tokenizer.wrong(engine, in_context(SCALARS)) == []


def test_code_points_alone(engine: Engine, pairs: Tokenizer) -> None:
    """All code points of the alphabets, every 61st of the others."""
    assert pairs.wrong(engine, [c for c in SCALARS if ord(c) < 0x3400 or ord(c) % 61 == 0]) == []


def test_hostile_mixtures(
    engine: Engine, pairs: Tokenizer, other_pairs: Tokenizer, trained: Tokenizer
) -> None:
    for seed, tokenizer in enumerate((pairs, other_pairs, trained)):
        assert tokenizer.wrong(engine, hostile_texts(20_000, seed)) == []


def test_long_runs(engine: Engine, trained: Tokenizer) -> None:
    """Longer than any look-ahead of a matcher, shorter than the limit of tiktoken's backtracking."""
    runs = ["A", "a", "ʰA", "\u0301", "漢", "1", "!", " ", "\n", " \n", "\t", "'", "aB", "ªº", "\u200d"]
    texts = [f"x{run * 5000}{end}" for run in runs for end in ("", "b", "B", " ", "\r\n")]
    assert trained.wrong(engine, texts) == []


@settings(max_examples=10, deadline=None, derandomize=True)
@example(texts=["<|tool_call_end|>"])  # hypothesis also takes texts from the constants of the sources
@given(texts=st.lists(st.text(max_size=30), min_size=100, max_size=400))
def test_texts_that_hypothesis_makes(engine: Engine, pairs: Tokenizer, texts: list[str]) -> None:
    assert pairs.wrong(engine, texts) == []


ILL_FORMED = [
    b"\xff", b"\xc3", b"a\x80b", b"caf\xe9 au lait", b"\xe4\xb8", b"\xe4\xb8x", b"\xe4\xb8\xe4\xb8\x96",
    b"\xf0\x9f\x91", b"\xf0\x9f\x91 \xf0\x9f\x91\xa9", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf",
    b"\xed\xa0\x80\xed\xb0\x80", b"\xf4\x90\x80\x80", b"\xf7\xbf\xbf\xbf", b"\xfe\xff\x00a",
]  # fmt: skip


def test_ill_formed_bytes_are_replaced_as_python_replaces_them(engine: Engine, pairs: Tokenizer) -> None:
    rng = random.Random(0)
    leads = [b"\xc2", b"\xe0", b"\xe1", b"\xed", b"\xee", b"\xf0", b"\xf1", b"\xf4", b"\xf5"]
    trails = [b"\x7f", b"\x80", b"\x8f", b"\x90", b"\x9f", b"\xa0", b"\xbf", b"\xc0", b"a", b" "]
    mixed = [b"".join(rng.choice(rng.choice([leads, trails])) for _ in range(12)) for _ in range(5000)]
    texts = [*ILL_FORMED, *mixed, *(rng.randbytes(20) for _ in range(5000))]
    found = llama_tokenize(engine.environment(), pairs.model, texts).ids
    for text, ids in zip(texts, found, strict=True):
        assert ids == pairs.tiktoken.encode_ordinary(text.decode("utf-8", "replace")), text


def test_special_tokens_are_matched_on_request(engine: Engine, trained: Tokenizer) -> None:
    texts = [
        "<|im_system|>system<|im_middle|>You are here<|im_end|><|im_user|>user<|im_middle|>hi<|im_end|>",
        "a<|tool_calls_section_begin|><|tool_call_begin|>x<|tool_call_argument_begin|>{}<|tool_call_end|>",
        f"[BOS]a[EOS] [EOT]\n[PAD][UNK]<|reserved_token_{len(trained.ranks) + 5}|>",
        "<|im_end|",
        "<|im_end |>[eos]",
        "世<|im_end|>界 <|im_end|>\n",
    ]
    expected = [trained.tiktoken.encode(text, allowed_special="all") for text in texts]
    assert trained.ids(engine, texts, special=True) == expected


def test_without_request_only_tokens_that_are_not_special_are_matched(
    engine: Engine, trained: Tokenizer
) -> None:
    texts = [f"a{name}b" for name in SPECIAL.values()]
    assert trained.ids(engine, texts) == [
        trained.tiktoken.encode(text, allowed_special=SHOWN, disallowed_special=()) for text in texts
    ]


def test_generation_stops_at_both_end_tokens(engine: Engine, trained: Tokenizer) -> None:
    names = {len(trained.ranks) + i: name for i, name in SPECIAL.items()}
    stops = {names[i] for i in llama_tokenize(engine.environment(), trained.model, [b"a"]).stops}
    assert stops == {"<|im_end|>", "[EOS]", "[EOT]", "[PAD]"}


VOCABULARIES = "bert-bge deepseek-llm falcon gemma-4 gpt-2 llama-bpe llama-spm qwen2".split()  # noqa: SIM905


@pytest.mark.parametrize("name", VOCABULARIES)
def test_other_vocabularies_pass_upstreams_test(name: str, engine: Engine) -> None:
    model = upstream_source() / "llama.cpp" / "models" / f"ggml-vocab-{name}.gguf"
    command = [engine.bin / "test-tokenizer-0", model]
    assert subprocess.run(command, capture_output=True, cwd=model.parent).returncode == 0
