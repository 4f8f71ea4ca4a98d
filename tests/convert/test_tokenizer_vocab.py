"""The vocabulary read from tiktoken.model has tiktoken's ids, and GGUF's types, names and stop tokens."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import TokenType
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_checkpoint import BYTES, SPECIAL, write_tokenizer
from tokenizer_cases import CORPUS, config, one_piece, train_ranks
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.byte_bpe import bytes_to_text, last_merge, merges_from_ranks, text_to_bytes
from kimi_gguf.convert.model.families import load_vocab
from kimi_gguf.convert.model.vocab import Vocab


def merged_ids(vocab: Vocab, piece: bytes) -> list[int]:
    """Ids of one piece by the merge list only: the earliest merge first, the leftmost of equals."""
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(vocab.merges)}
    parts = list(bytes_to_text(piece))
    while True:
        found = [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]
        if not found:
            return [vocab.tokens.index(part) for part in parts]
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    return train_ranks(500)


@pytest.fixture(scope="module")
def vocab(ranks: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), ranks)
    return load_vocab(folder, config(len(ranks)))


def test_bytes_are_spelt_as_gpt2_spells_them() -> None:
    assert {byte: bytes_to_text(bytes([byte])) for byte in range(256)} == bytes_to_unicode()
    assert text_to_bytes(bytes_to_text(bytes(range(256)))) == bytes(range(256))


def test_merges_from_ranks_give_tiktokens_ids(vocab: Vocab, ranks: list[bytes]) -> None:
    for word in CORPUS.split():
        assert merged_ids(vocab, word.encode()) == one_piece(ranks).encode_ordinary(word)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=30), st.text("abc", max_size=60)
)
def test_merges_hold_for_any_order_of_ranks(words: list[str], text: str) -> None:
    """Also if a token has a lower rank than its parts, which training never produces."""
    extra = [word.encode() for word in words]
    while unreachable := merges_from_ranks(BYTES + extra)[1]:
        extra = [token for i, token in enumerate(extra) if i + 256 not in unreachable]
    assume(extra)
    merges, _ = merges_from_ranks(BYTES + extra)
    spelt = [f"{bytes_to_text(left)} {bytes_to_text(right)}" for left, right in merges]
    tokens = [bytes_to_text(token) for token in BYTES + extra]
    vocab = Vocab(tokens, [1] * len(tokens), spelt, None, 0, None, None, None, None, "kimi-k2")
    assert merged_ids(vocab, text.encode()) == one_piece(BYTES + extra).encode_ordinary(text)


def test_a_token_no_merge_leads_to_is_refused(tmp_path: Path) -> None:
    ranks = {token: i for i, token in enumerate([*BYTES, b"ab", b"abcd"])}
    assert last_merge(b"abcd", ranks) == [b"ab", b"c", b"d"]
    write_tokenizer(tmp_path, [*BYTES, b"ab", b"abcd"])
    with pytest.raises(ConvertError, match=r"tiktoken\.model: 1 tokens cannot .* first rank 257, b'abcd'"):
        load_vocab(tmp_path, config(258))


def test_a_vocabulary_of_full_size_takes_seconds() -> None:
    """163,584 ranks of up to 16 bytes; the limit is several times the duration on a slow core."""
    rng = random.Random(0)
    ranks = dict.fromkeys(BYTES)
    pool = list(BYTES)
    while len(pool) < 163_584:
        token = rng.choice(pool) + rng.choice(pool)
        if len(token) <= 16 and token not in ranks:
            ranks[token] = None
            pool.append(token)
    start = time.process_time()
    merges, unreachable = merges_from_ranks(pool)
    assert time.process_time() - start < 30
    assert len(merges) + len(unreachable) == 163_584 - 256


def test_special_tokens_follow_the_ranks_and_unnamed_ones_are_reserved(
    vocab: Vocab, ranks: list[bytes]
) -> None:
    n = len(ranks)
    assert len(vocab.tokens) == len(vocab.types) == n + 256
    for i in range(256):
        assert vocab.tokens[n + i] == SPECIAL.get(i, f"<|reserved_token_{n + i}|>")


def test_types_tell_special_from_shown_tokens(vocab: Vocab, ranks: list[bytes]) -> None:
    of = dict(zip(vocab.tokens, vocab.types, strict=True))
    assert set(vocab.types[: len(ranks)]) == {TokenType.NORMAL}
    assert of["<|im_end|>"] == of["[PAD]"] == of[f"<|reserved_token_{len(ranks) + 5}|>"] == TokenType.CONTROL
    assert of["<|tool_call_begin|>"] == of["<|tool_calls_section_end|>"] == TokenType.USER_DEFINED


def test_rows_past_the_special_ids_are_unused(ranks: list[bytes], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ranks)
    padded = load_vocab(tmp_path, config(len(ranks), rows=300))
    assert padded.types[-300:][256:258] == [TokenType.CONTROL] * 2
    assert padded.types[-42:] == [TokenType.UNUSED] * 42


def test_names_for_the_two_ids_past_the_embedding_are_left_out(ranks: list[bytes], tmp_path: Path) -> None:
    n = len(ranks)
    beyond = {str(n + 256): {"content": "<|beyond|>", "special": True}}
    write_tokenizer(tmp_path, ranks, added_tokens_decoder=beyond)
    assert "<|beyond|>" not in load_vocab(tmp_path, config(n)).tokens


def test_configs_eos_ends_a_text_not_the_tokenizers(vocab: Vocab, ranks: list[bytes]) -> None:
    ids = (vocab.bos_id, vocab.eos_id, vocab.eot_id, vocab.pad_id, vocab.unk_id)
    names = [vocab.tokens[i] for i in ids if i]
    assert names == ["[BOS]", "<|im_end|>", "<|im_end|>", "[PAD]", "[UNK]"]


def test_without_configs_ids_the_tokenizers_names_count(ranks: list[bytes], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ranks, eos_token={"content": "[EOS]"}, pad_token=None)
    bare = replace(config(len(ranks)), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    vocab = load_vocab(tmp_path, bare)
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id) == (len(ranks), len(ranks) + 1, None)
    write_tokenizer(tmp_path, ranks, eos_token=None)
    with pytest.raises(ConvertError, match="eos_token_id: expected a token id"):
        load_vocab(tmp_path, bare)


def test_the_chat_template_comes_from_its_file_first(ranks: list[bytes], tmp_path: Path) -> None:
    conf = config(len(ranks))
    write_tokenizer(tmp_path, ranks, chat_template="settings")
    assert load_vocab(tmp_path, conf).chat_template == "settings"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "named"}]
    write_tokenizer(tmp_path, ranks, chat_template=named)
    assert load_vocab(tmp_path, conf).chat_template == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_vocab(tmp_path, conf).chat_template == "file"
    (tmp_path / "chat_template.jinja").unlink()
    write_tokenizer(tmp_path, ranks, chat_template=None)
    assert load_vocab(tmp_path, conf).chat_template is None


def test_none_of_the_checkpoints_code_runs(ranks: list[bytes], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ranks)
    (tmp_path / "tokenization_kimi.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tiktoken.py").write_text("raise SystemExit('ran')")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["auto_map"]
    load_vocab(tmp_path, config(len(ranks)))
