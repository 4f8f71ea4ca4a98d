"""A tokenizer.json of the Ling models: llama.cpp gives the ids of the `tokenizers` library, or there is a refusal."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from ling_tokenizer import CHAT_TEMPLATE, NOT_SPECIAL, NUM_RANKS, SPECIAL, TEXTS, VOCAB_SIZE, tokenizer_json
from random_ling3 import LingSpec, config, write_tokenizer
from test_convert_fuzzed import fuzz, refusal
from tokenizer_cases import hostile_texts, llama_tokenize, write_vocab_gguf
from tokenizers import Tokenizer

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.bpe_vocab import load_bpe_vocab
from kimi_gguf.convert.model.byte_bpe import bytes_to_text
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import load_vocab, read_config
from kimi_gguf.engine.builds import Engine

CONFIG: ModelConfig = read_config(config(LingSpec()), "config.json")
Change = Callable[[dict[str, Any]], object]


def write(folder: Path, content: dict[str, Any], **settings: object) -> Path:
    write_tokenizer(folder, **settings)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def every_pair_json(seed: int) -> dict[str, Any]:
    """A vocabulary in which any two bytes merge, in random order, so that the ids depend on where a piece ends."""
    singles = [bytes_to_text(bytes([byte])) for byte in range(256)]
    pairs = [(left, right) for left in singles for right in singles]
    random.Random(seed).shuffle(pairs)
    content = tokenizer_json()
    tokens = singles + [left + right for left, right in pairs]
    content["model"] |= {
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [list(p) for p in pairs],
    }
    content["added_tokens"] = []
    return content


def composed(texts: list[str]) -> list[str]:
    """llama.cpp does not normalise, so it gets what the tokenizer would make of a text."""
    return [unicodedata.normalize("NFC", text) for text in texts]


# (?i:s) is also the long s in the library's regular expressions; in llama.cpp's pattern it is s and S only. And the
# two have different versions of Unicode: U+10D50 is a letter since version 16.
LONG_S, NEW_LETTER = "'\u017f", "\U00010d50"


def both_ids(
    folder: Path, engine: Engine, content: dict[str, Any], texts: list[str]
) -> list[tuple[str, list[int], list[int]]]:
    """Each text with the library's ids and llama.cpp's."""
    size = max(len(content["model"]["vocab"]) + 16, VOCAB_SIZE)
    changed = config(LingSpec()) | {"vocab_size": size}
    vocab = load_bpe_vocab(write(folder, content), read_config(changed, "config.json"))
    model = write_vocab_gguf(folder / "vocab.gguf", vocab)
    library = Tokenizer.from_str(json.dumps(content))
    library.normalizer = None  # type: ignore[assignment]
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    found = llama_tokenize(engine.environment(), model, [text.encode() for text in texts]).ids
    return list(zip(texts, expected, found, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("content", [tokenizer_json(), every_pair_json(1)], ids=["trained", "every pair"])
@pytest.mark.parametrize("build", ["engine", pytest.param("upstream", marks=pytest.mark.full)])
def test_llama_cpp_produces_the_ids_of_the_library(
    tmp_path: Path, build: str, content: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    texts = [text for text in composed([*TEXTS, *hostile_texts(3000, 11)])]
    texts = [text for text in texts if LONG_S not in text and NEW_LETTER not in text]
    assert len(texts) > 2000
    answers = both_ids(tmp_path, request.getfixturevalue(build), content, texts)
    assert [answer for answer in answers if answer[1] != answer[2]] == []


@pytest.mark.engine
def test_code_points_at_which_their_kind_changes(tmp_path: Path, engine: Engine) -> None:
    """The first and the last of each run of letters, numbers, separators or others that this Python knows."""
    kinds = [unicodedata.category(chr(code)) for code in range(0x110000)]
    chosen = [
        code
        for code, kind in enumerate(kinds)
        if kind not in ("Cn", "Cs") and not kinds[code - 1][0] == kind[0] == kinds[(code + 1) % 0x110000][0]
    ]
    assert len(chosen) > 2000
    texts = [text for code in chosen for text in (f"b{chr(code)}1", f"!{chr(code)}")]
    answers = both_ids(tmp_path, engine, every_pair_json(1), texts)
    assert [answer for answer in answers if answer[1] != answer[2]] == []


@pytest.mark.engine
def test_the_texts_that_llama_cpp_splits_differently(tmp_path: Path, engine: Engine) -> None:
    answers = both_ids(tmp_path, engine, every_pair_json(1), [f"b{LONG_S}b", f"b{NEW_LETTER}"])
    assert [answer[1] != answer[2] for answer in answers] == [True, True]


@pytest.mark.engine
def test_special_tokens_are_matched_as_by_the_library(tmp_path: Path, engine: Engine) -> None:
    content = tokenizer_json()
    vocab = load_vocab(write(tmp_path, content), CONFIG)
    model = write_vocab_gguf(tmp_path / "vocab.gguf", vocab)
    library = Tokenizer.from_str(json.dumps(content))
    rng = random.Random(5)
    texts = ["".join(rng.choices([*SPECIAL, "a", " ", "\n", "<", "role>", "the"], k=12)) for _ in range(300)]
    answer = llama_tokenize(engine.environment(), model, [text.encode() for text in texts], special=True)
    assert answer.ids == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert sorted(answer.stops) == sorted((SPECIAL["<|endoftext|>"], SPECIAL["<|role_end|>"]))


def test_the_values_of_the_file(tmp_path: Path) -> None:
    vocab = load_vocab(write(tmp_path, tokenizer_json()), CONFIG)
    assert len(vocab.tokens) == len(vocab.types) == VOCAB_SIZE
    assert vocab.pre == "bailingmoe2"
    assert (vocab.eos_id, vocab.eot_id) == (SPECIAL["<|role_end|>"], SPECIAL["<|role_end|>"])
    assert (vocab.bos_id, vocab.pad_id, vocab.unk_id) == (
        SPECIAL["<|startoftext|>"],
        SPECIAL["<|endoftext|>"],
        None,
    )
    assert vocab.chat_template == CHAT_TEMPLATE
    assert not vocab.add_bos
    for name, number in SPECIAL.items():
        kind = TokenType.USER_DEFINED if name in NOT_SPECIAL else TokenType.CONTROL
        assert (vocab.tokens[number], vocab.types[number]) == (name, kind)
    assert set(vocab.types[:NUM_RANKS]) == {TokenType.NORMAL}
    assert set(vocab.types[-5:]) == {TokenType.UNUSED}
    assert [note for note in vocab.notes if "NFC" in note]
    assert vocab.merges == [" ".join(pair) for pair in tokenizer_json()["model"]["merges"]]


def template(*pieces: str) -> dict[str, Any]:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if p == "A" else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in pieces
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("post_processor", "add_bos"),
    [
        (BYTE_LEVEL, False),
        (template("A"), False),
        (template("<|startoftext|>", "A"), True),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template("<|startoftext|>", "A")]}, True),
    ],
    ids=["bytes", "empty template", "bos", "both"],
)
def test_add_bos_follows_from_the_template(
    tmp_path: Path, post_processor: dict[str, Any], add_bos: bool
) -> None:
    content = tokenizer_json() | {"post_processor": post_processor}
    assert load_vocab(write(tmp_path, content), CONFIG).add_bos is add_bos


def test_ids_may_have_gaps_and_added_tokens_between(tmp_path: Path) -> None:
    content = tokenizer_json()
    for entry in content["added_tokens"]:
        entry["id"] += 3
    content["model"]["vocab"][content["added_tokens"][0]["content"]] = content["added_tokens"][0]["id"]
    vocab = load_vocab(write(tmp_path, content), CONFIG)
    assert vocab.types[NUM_RANKS : NUM_RANKS + 3] == [TokenType.UNUSED] * 3
    assert vocab.tokens[NUM_RANKS + 3] == "<|startoftext|>"


def model(**values: object) -> Change:
    return lambda c: c["model"].update(values)


def stage(number: int, **values: object) -> Change:
    return lambda c: c["pre_tokenizer"]["pretokenizers"][number].update(values)


REFUSED: dict[str, tuple[Change, str]] = {
    "no model": (lambda c: c.pop("model"), "expected a 'model' of type BPE"),
    "another model": (model(type="Unigram"), "expected a 'model' of type BPE"),
    "whole words first": (model(ignore_merges=True), "model.ignore_merges: expected False"),
    "dropped merges": (model(dropout=0.1), "model.dropout: expected None"),
    "bytes as hexadecimal numbers": (model(byte_fallback=True), "model.byte_fallback"),
    "a suffix of words": (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    "an unknown token": (model(unk_token="[UNK]"), "model.unk_token"),
    "another pattern": (stage(0, pattern={"Regex": r"\p{N}{1,3}|.+"}), "pre_tokenizer: expected a Split"),
    "a pattern that is a text": (stage(0, pattern={"String": " "}), "pre_tokenizer"),
    "matches removed": (stage(0, behavior="Removed"), "pre_tokenizer"),
    "matches inverted": (stage(0, invert=True), "pre_tokenizer"),
    "a space in front": (stage(1, add_prefix_space=True), "pre_tokenizer"),
    "GPT-2's pattern too": (stage(1, use_regex=True), "pre_tokenizer"),
    "no pattern": (lambda c: c.update(pre_tokenizer=BYTE_LEVEL), "pre_tokenizer"),
    "a third stage": (
        lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}),
        "pre_tokenizer",
    ),
    "another normalizer": (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizer: expected NFC"),
    "two normalizers": (
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
        "normalizer",
    ),
    "a token after the text": (lambda c: c.update(post_processor=template("A", "[CLS]")), "post_processor"),
    "another token before it": (lambda c: c.update(post_processor=template("[CLS]", "A")), "post_processor"),
    "another post-processor": (lambda c: c.update(post_processor={"type": "BertProcessing"}), "post_processor"),
    "a merge of no token": (lambda c: c["model"]["merges"].append(["Q", "Q"]), "expected parts and result"),
    "a merge twice": (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "already in the list"),
    "a merge of three": (lambda c: c["model"]["merges"].append("a b c"), r"merges\[\d+\]: expected two"),
    "merges that are no list": (model(merges={}), "expected a list model.merges"),
    "no object of tokens": (model(vocab=[]), "expected an object model.vocab"),
    "a token that spells no bytes": (lambda c: c["model"]["vocab"].update({"世": 415}), "GPT-2's spelling"),
    "an id past the embedding": (lambda c: c["model"]["vocab"].update({"Zq": VOCAB_SIZE}), "a unique id below"),
    "an id that is no number": (lambda c: c["model"]["vocab"].update(a=True), "a unique id below"),
    "an id twice": (lambda c: c["model"]["vocab"].update(a=66), "a unique id below"),
    "a byte missing": (lambda c: c["model"]["vocab"].pop("a"), "none for 1 of 256"),
    "the id of an added token": (lambda c: c["model"]["vocab"].update(Zq=SPECIAL["[CLS]"]), "of the added token"),
    "an added token past the embedding": (
        lambda c: c["added_tokens"][0].update(id=VOCAB_SIZE),
        "added token .*: expected an id below",
    ),
    "an added token twice": (lambda c: c["added_tokens"].append(c["added_tokens"][0]), "with a unique 'id'"),
    "added tokens that are no list": (lambda c: c.update(added_tokens={"a": 1}), "expected a list added_tokens"),
    "two added tokens with one text": (
        lambda c: c["added_tokens"][0].update(content="[CLS]"),
        "has the same text",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    content = tokenizer_json()
    change(content)
    with pytest.raises(ConvertError, match=rf"tokenizer\.json.*{message}") as caught:
        load_vocab(write(tmp_path, content), CONFIG)
    assert "\n" not in str(caught.value)


def test_settings_that_are_missing(tmp_path: Path) -> None:
    without_eos = {**config(LingSpec()), "eos_token_id": None}
    write(tmp_path, tokenizer_json(), eos_token=None)
    with pytest.raises(ConvertError, match="eos_token_id: expected a token id"):
        load_vocab(tmp_path, read_config(without_eos, "config.json"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConvertError, match=r"tokenizer\.json: not found; copy it"):
        load_vocab(tmp_path, CONFIG)


def test_trimmed_tokens_are_noted(tmp_path: Path) -> None:
    content = tokenizer_json()
    content["added_tokens"][2]["lstrip"] = True
    assert [note for note in load_vocab(write(tmp_path, content), CONFIG).notes if "[CLS]" in note]


def test_hostile_tokenizers(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json())
    for number, name in enumerate(("tokenizer.json", "tokenizer_config.json")):
        refused = fuzz(tmp_path / name, 700, 3 + number, lambda path: load_vocab(tmp_path, CONFIG))
        assert len(refused) > 100 and all(name in message for message in refused)
    rng, values = random.Random(9), [None, True, 0, -1, 1e9, "", "x", [], [1], {}, {"type": "ByteLevel"}]
    refused_values = 0
    for _ in range(1500):
        content = tokenizer_json()
        at: Any = content
        for _ in range(rng.randint(0, 4)):  # walk down, then replace what is there
            inner = [
                key
                for key in (at if isinstance(at, dict) else range(len(at)))
                if isinstance(at[key], dict | list) and at[key]
            ]
            if not inner:
                break
            at = at[rng.choice(inner)]
        at[rng.choice(list(at) if isinstance(at, dict) else range(len(at)))] = rng.choice(values)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        refused_values += bool(refusal(load_vocab, tmp_path, CONFIG))
    assert refused_values > 500
