"""The script that trains the demo checkpoint: its corpus, tokenizer, batches, and training steps."""

from __future__ import annotations

import random
from pathlib import Path

import jinja2
import pytest
import torch

from kimi_gguf.scripts.tokenizer_files import CHAT_TEMPLATE, SYSTEM_MESSAGE, write_tokenizer
from kimi_gguf.scripts.training import corpus as wordnet_corpus
from kimi_gguf.scripts.training import train
from kimi_gguf.scripts.training.batches import Batches, windows
from kimi_gguf.scripts.training.corpus import Corpus, CorpusError, build_corpus, read_entries
from kimi_gguf.scripts.training.export import export, load
from kimi_gguf.scripts.training.model import DemoModel, Router, demo_config
from kimi_gguf.scripts.training.tokenizer import SPLIT, Encoder, chat_ids, train_ranks

LICENCE_LINES = "  1 This software and database is being provided to you, the LICENSEE, by  \n" * 3
TIGER = (
    "02129604 05 n 02 tiger 0 Panthera_tigris 0 001 @ 02127808 n 0000 "
    '| large feline of forests in Asia; "a tiger"  '
)
TEXTS = [
    "tiger: large feline of forests in most of Asia; endangered.\n\n",
    "It's what \"you'LL\" see: camelCase, HTTPServer, 1234567 words   and\t\ttabs \r\n\r\n  end  ",
    "世界和平、人々 cafe\u0301 ÀÉÎ naïve 👩‍👩‍👧 ½ Ⅷ",
]


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """A dictionary in the form of wndb(5WN): 201 nouns, one verb, one adjective, one adverb."""
    nouns, index, counts = [LICENCE_LINES], [LICENCE_LINES], []
    for number in range(200):
        word = "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}") + "ish"
        nouns.append(f"{number:08} 05 n 01 {word} 0 000 | a beast with {word[:2]} stripes on its back  \n")
        index.append(f"{word} n 1 0 1 1 {number:08}  \n")
        counts.append(f"{word}%1:05:00:: 1 {number + 1}\n")
    (tmp_path / "data.noun").write_text("".join(nouns) + TIGER + "\n")
    (tmp_path / "index.noun").write_text("".join(index) + "tiger n 1 1 @ 1 1 02129604  \n")
    (tmp_path / "cntlist.rev").write_text("".join(counts) + "tiger%1:05:00:: 1 999\n")
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(
            f"{LICENCE_LINES}00000001 00 a 01 big(a) 0 000 | of size {part}\n"
        )
    return tmp_path


def test_reads_words_kind_and_definition(wordnet: Path) -> None:
    entry = read_entries(wordnet, "noun")["02129604"]
    assert entry.words == ("tiger", "Panthera tigris")
    assert entry.kind == "05"
    assert entry.definition == "large feline of forests in Asia"
    assert entry.line == 'tiger, Panthera tigris: large feline of forests in Asia; "a tiger".'
    assert read_entries(wordnet, "adj")["00000001"].words == ("big",)


def test_teaches_the_words_with_most_tags(wordnet: Path) -> None:
    definitions = build_corpus(wordnet, seed=0, heldout_bytes=0).definitions
    wanted = wordnet_corpus.TAUGHT_WORDS[wordnet_corpus.ANIMAL][1]
    assert len(definitions) == wanted
    assert list(definitions)[:2] == ["tiger", "bjjish"]  # 999 tags, then number 199


@pytest.mark.parametrize("seed", range(5))
def test_heldout_text_is_in_no_training_text(wordnet: Path, seed: int) -> None:
    corpus = build_corpus(wordnet, seed, heldout_bytes=2000)
    assert_disjoint(corpus)
    assert 2000 <= sum(len(text) for text in corpus.heldout) < 4000


@pytest.mark.skipif(not wordnet_corpus.WORDNET.is_dir(), reason="wordnet-base is not installed")
def test_the_real_dictionary_splits_too() -> None:
    corpus = build_corpus(wordnet_corpus.WORDNET, seed=0)
    assert_disjoint(corpus)
    assert corpus.definitions["river"] == "a large natural stream of water"


def assert_disjoint(corpus: Corpus) -> None:
    heldout = {line.partition(": ")[2] for text in corpus.heldout for line in text.splitlines() if line}
    training = {line.partition(": ")[2] for text in corpus.documents for line in text.splitlines() if line}
    assert heldout and training
    assert not heldout & training
    assert not [d for d in corpus.definitions.values() if any(line.startswith(d) for line in heldout)]


def test_a_missing_dictionary_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CorpusError, match="wordnet-base"):
        build_corpus(tmp_path, seed=0)
    status = train.main(["--out", str(tmp_path / "out"), "--wordnet", str(tmp_path / "none")])
    assert status == 1
    assert "apt-get install wordnet-base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_written_tokenizer_loads_encodes_and_decodes(tmp_path: Path) -> None:
    ranks = train_ranks(TEXTS * 3, num_ranks=330)
    write_tokenizer(tmp_path, ranks, context_length=4096)
    encoder = Encoder.load(tmp_path)
    assert encoder.ranks == ranks
    for text in TEXTS:
        ids = encoder.encode(text)
        assert ids == [token for piece in SPLIT.findall(text) for token in encoder.encode(piece)]
        assert encoder.decode(ids) == text


def test_ranks_are_in_merge_order() -> None:
    ranks = train_ranks([" abab" * 4 + " cd" * 7], num_ranks=260)
    assert ranks[:256] == [bytes([value]) for value in range(256)]
    # "ab" occurs 8 times; " c" and "cd" 7 times, and a space has the lower rank; " ab" and "abab" 4 times
    assert ranks[256:] == [b"ab", b" c", b" cd", b" ab"]
    encoder = Encoder(ranks)
    assert [encoder.encode(token.decode()) for token in ranks[256:]] == [[256], [257], [258], [259]]


def test_frequent_texts_become_single_tokens() -> None:
    ranks = train_ranks([" abab" * 4], num_ranks=258, frequent={" xyz": 9})
    assert ranks[256:] == [b" x", b"yz"]  # 9 times each, compared with 8 of "ab"


def test_an_exported_folder_loads_as_the_rounded_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = DemoModel(demo_config())
    for router in model.routers():
        router.e_score_correction_bias.normal_()
    export(tmp_path, model, [bytes([value]) for value in range(256)], ["held: out.\n"], "a notice")
    loaded = load(tmp_path, model.config).state_dict()
    for name, tensor in model.state_dict().items():
        exact = name.endswith((".A_log", ".dt_bias"))
        assert torch.equal(loaded[name], tensor if exact else tensor.bfloat16().float()), name


def test_conversations_have_the_form_of_the_chat_template() -> None:
    encoder = Encoder([bytes([value]) for value in range(256)])
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    messages = [("user", "define: tiger"), ("assistant", "a feline"), ("user", "What is it?")]
    dicts = [{"role": role, "content": text} for role, text in messages]
    expected = (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>define: tiger<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>a feline<|im_end|>"
        "<|im_user|>user<|im_middle|>What is it?<|im_end|>"
    )
    segments = chat_ids(encoder, [("system", SYSTEM_MESSAGE), *messages])
    assert encoder.decode(token for ids, _ in segments for token in ids) == expected
    assert template.render(messages=dicts) == expected
    assert template.render(messages=dicts, add_generation_prompt=True) == (
        expected + "<|im_assistant|>assistant<|im_middle|>"
    )
    own = [{"role": "system", "content": [{"type": "text", "text": "Be brief"}]}]
    assert template.render(messages=own) == "<|im_system|>system<|im_middle|>Be brief<|im_end|>"
    assert [learn for _, learn in segments] == [False, False, False, False, False, True, False, False]


def corpus_of(count: int) -> Corpus:
    words = [f"w{number}" for number in range(count)]
    return Corpus(
        [f"{word}: text.\n\n" for word in words], ["held: out.\n\n"], dict.fromkeys(words, "a thing")
    )


def test_batches_mix_text_and_conversations_and_learn_only_answers() -> None:
    encoder = Encoder([bytes([value]) for value in range(256)])
    batches = Batches(corpus_of(9), encoder, seed=1, rows=4, length=256)
    for _ in range(20):
        ids, mask = batches.next()
        assert ids.shape == (4, 257) and mask.shape == (4, 256)
        asked = (ids[:, 1:] == encoder.special("<|im_user|>")) | (
            ids[:, 1:] == encoder.special("<|im_middle|>")
        )
        assert not mask[asked].any()
    share = batches.tokens["conversation"] / sum(batches.tokens.values())
    assert share == pytest.approx(0.30, abs=0.05)


def test_windows_overlap_by_the_token_to_predict() -> None:
    assert windows(list(range(10)), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(list(range(9)), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_balancing_raises_the_bias_of_experts_with_less_than_their_share() -> None:
    router = Router(demo_config())
    router.load.copy_(torch.tensor([10.0, 0.0, 5.0, 5.0, 8.0, 2.0]))
    router.balance(0.25)
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0, -0.25, 0.25]
    assert not router.load.any()


def test_schedule_warms_up_and_ends_low() -> None:
    factors = [train.schedule(step, 1000) for step in range(1000)]
    assert factors[0] < 0.05
    assert max(factors) == pytest.approx(1.0, abs=1e-3)
    assert factors[-1] == pytest.approx(train.FINAL_RATE, rel=0.01)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    random.seed(99)  # the run must not depend on the global generator
    encoder = Encoder([bytes([value]) for value in range(256)])
    settings = train.Settings(steps=3, rows=2, length=40, rate=1e-3, seed=5)

    def start(file: str) -> train.Run:
        return train.Run(corpus_of(9), encoder, settings, tmp_path / file)

    whole = start("whole")
    losses = [whole.advance() for _ in range(3)]
    part = start("part")
    part.advance()
    part.save()
    continued = start("part")
    continued.resume()
    assert [continued.advance(), continued.advance()] == losses[1:]
    for (name, expected), found in zip(
        whole.model.state_dict().items(), continued.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert losses[-1] < losses[0]

    other = train.Run(corpus_of(8), encoder, settings, tmp_path / "part")
    with pytest.raises(SystemExit, match="other text"):
        other.resume()
