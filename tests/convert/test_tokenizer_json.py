"""A tokenizer.json instead of tiktoken.model: the same vocabulary, or a refusal with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import SPECIAL, TOOL_CALL_MARKS, write_tokenizer
from tokenizer_cases import config, train_ranks
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.byte_bpe import SPLIT_PATTERN, bytes_to_text
from kimi_gguf.convert.model.families import load_vocab

RANKS = train_ranks(120)
N = len(RANKS)


def every_split(ranks: list[bytes]) -> list[tuple[str, str]]:
    """The merges that transformers writes for a tiktoken.model: every split of each token into two tokens."""
    known = set(ranks)
    return [
        (bytes_to_text(token[:i]), bytes_to_text(token[i:]))
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def write_fast(folder: Path) -> dict[str, Any]:
    """Write a tokenizer.json of RANKS with the tokenizers library, next to the settings; return its content."""
    write_tokenizer(folder, RANKS, added_tokens_decoder={})
    (folder / "tiktoken.model").unlink()
    vocab = {bytes_to_text(token): rank for rank, token in enumerate(RANKS)}
    fast = Tokenizer(models.BPE(vocab, every_split(RANKS)))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    fast.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for i in range(256):
        name = SPECIAL.get(i, f"<|reserved_token_{N + i}|>")
        fast.add_special_tokens([AddedToken(name, special=True)])
    content: dict[str, Any] = json.loads(fast.to_str())
    for entry in content["added_tokens"]:
        entry["special"] = entry["id"] - N not in TOOL_CALL_MARKS
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


def test_a_resaved_tokenizer_gives_the_same_vocabulary(tmp_path: Path) -> None:
    write_fast(tmp_path / "fast")
    write_tokenizer(tmp_path / "hub", RANKS)
    assert len(every_split(RANKS)) > len(RANKS) - 256
    assert load_vocab(tmp_path / "fast", config(N)) == load_vocab(tmp_path / "hub", config(N))


def test_tiktoken_model_is_read_where_both_are_there(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, RANKS)
    (tmp_path / "tokenizer.json").write_text("not read")
    load_vocab(tmp_path, config(N))


def swap_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[300], list(vocab)[301]
    vocab[first], vocab[second] = vocab[second], vocab[first]


Change = Callable[[dict[str, Any]], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "no model": (lambda c: c.pop("model"), "expected a 'model' of type BPE"),
    "another model": (lambda c: c["model"].update(type="Unigram"), "expected a 'model' of type BPE"),
    "another pattern": (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0), "expected the split pattern"),
    "no pattern": (lambda c: c.update(pre_tokenizer=None), "expected the split pattern"),
    "a normalizer": (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer: expected none"),
    "a merge missing": (lambda c: c["model"]["merges"].pop(), "model.merges does not follow"),
    "merges in another order": (lambda c: c["model"]["merges"].reverse(), "model.merges does not follow"),
    "ids in another order": (swap_ids, "model.merges does not follow"),
    "a merge to no token": (lambda c: c["model"]["merges"].append("Z Z"), "model.merges does not follow"),
    "a merge of three": (lambda c: c["model"]["merges"].append("a b c"), r"merges\[\d+\]: expected two"),
    "a merge that is no text": (lambda c: c["model"]["merges"].append(7), r"merges\[\d+\]: expected two"),
    "merges that are no list": (lambda c: c["model"].update(merges={}), "expected a list model.merges"),
    "no object of tokens": (lambda c: c["model"].update(vocab=[]), "expected an object model.vocab"),
    "a token that spells no bytes": (
        lambda c: c["model"]["vocab"].update({"世": c["model"]["vocab"].pop("a")}),
        "expected GPT-2's spelling of bytes",
    ),
    "an id past the others": (lambda c: c["model"]["vocab"].update({"世": N + 999}), "found none with id"),
    "an id that is no number": (lambda c: c["model"]["vocab"].update(a=True), "expected a unique id"),
    "an id twice": (lambda c: c["model"]["vocab"].update(a=66), "expected a unique id"),
    "a gap in the ids": (lambda c: c["model"]["vocab"].pop("a"), "found none with id"),
    "an added token without id": (lambda c: c["added_tokens"].append({"content": "x"}), "with a unique 'id'"),
    "an added token twice": (lambda c: c["added_tokens"].append(c["added_tokens"][0]), "with a unique 'id'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_json_that_is_not_the_models_is_refused(
    change: Change, message: str, tmp_path: Path
) -> None:
    content = write_fast(tmp_path)
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConvertError, match=rf"tokenizer\.json.*{message}"):
        load_vocab(tmp_path, config(N))
