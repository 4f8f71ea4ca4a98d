"""Shared by the tokenizer tests: vocabularies, tiktoken as the oracle, llama.cpp as the tested side, texts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import tiktoken
from gguf import GGUFValueType as ValueType
from llama_script import WORKER
from random_checkpoint import BYTES, Spec
from random_checkpoint import config as config_json

from kimi_gguf.convert.model.byte_bpe import SPLIT_PATTERN
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import read_config
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.metadata import tokenizer_keys
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.output.gguf_header import header_bytes
from kimi_gguf.engine.llama import LlamaError
from kimi_gguf.engine.worker import Worker

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's what you've seen: they're here, I'll go, we'd stay. "
    "def camelCase(self, HTTPServer): return {'key': [1, 23, 456, 7890], \"x\": None}\n\n"
    "    if a != b:\n\t\tpass\r\n"
    "Größe, Übermut und Fußgänger; où est l'été? El niño comió piña. Žluťoučký kůň, İstanbul, Москва и Київ. "
    "世界和平，人人有責。北京市の天気は晴れです。日本語々のテスト。〇一二三 "
    "안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया "
    "cafe\u0301 e\u0301te\u0301 3.14159 ½ Ⅷ ٣٤٥ १२३ 👩‍👩‍👧 🇨🇭 → ∑ ≤ … — „Zitat“ «texte» ☃\u00a0\u3000 "
)


def config(num_ranks: int, rows: int = 256) -> ModelConfig:
    """A config for a vocabulary of `num_ranks` ordinary tokens and `rows` additional ones."""
    base = read_config(config_json(Spec(), "hub"), "config.json")
    return replace(
        base,
        vocab_size=num_ranks + rows,
        bos_token_id=num_ranks,
        eos_token_id=num_ranks + 2,
        pad_token_id=num_ranks + 255,
    )


def train_ranks(merges: int) -> list[bytes]:
    """A vocabulary as in a tiktoken.model: the 256 bytes, then `merges` tokens trained on CORPUS."""
    split = CORPUS.replace(" ", "\0 ").split("\0")
    words = Counter(tuple(bytes([byte]) for byte in word.encode()) for word in split)
    ranks = list(BYTES)
    while len(ranks) < 256 + merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in ranks:
            ranks.append(left + right)
        joined: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            parts = list(word)
            at = 0
            while at < len(parts) - 1:
                if parts[at] == left and parts[at + 1] == right:
                    parts[at : at + 2] = [left + right]
                at += 1
            joined[tuple(parts)] += count
        words = joined
    return ranks


def every_pair_ranks(seed: int) -> list[bytes]:
    """A vocabulary in which any two bytes merge, in random order, so that the ids depend on where a piece ends."""
    pairs = [left + right for left in BYTES for right in BYTES]
    random.Random(seed).shuffle(pairs)
    return BYTES + pairs


def oracle(
    ranks: Sequence[bytes], special: Mapping[str, int] | None = None, pattern: str = SPLIT_PATTERN
) -> tiktoken.Encoding:
    """The same encoding that the model's own tokenizer class builds from these files."""
    tokens = {token: rank for rank, token in enumerate(ranks)}
    marks = dict(special or {})
    return tiktoken.Encoding("kimi", pat_str=pattern, mergeable_ranks=tokens, special_tokens=marks)


def one_piece(ranks: Sequence[bytes]) -> tiktoken.Encoding:
    """tiktoken with these ranks and without splitting."""
    return oracle(ranks, pattern=r"(?s).+")


def write_vocab_gguf(path: Path, vocab: Vocab) -> Path:
    """A GGUF file that has only a vocabulary."""
    keys = [Key("general.architecture", ValueType.STRING, "kimi-linear"), *tokenizer_keys(vocab)]
    path.write_bytes(header_bytes(keys, [], []))
    return path


@dataclass(frozen=True)
class LlamaAnswer:
    """The result of llama.cpp for some texts."""

    ids: list[list[int]]  # of each text
    seconds: float  # processor time of tokenizing alone
    stops: list[int]  # the ids that end a generation


def llama_tokenize(
    environment: Mapping[str, str], model: Path, texts: Sequence[bytes], special: bool = False
) -> LlamaAnswer:
    """Tokenize in a process with a build's environment. special: whether special tokens are matched."""
    with Worker(str(WORKER), environment=environment) as worker:
        try:
            listed = [text.hex() for text in texts]
            return LlamaAnswer(**worker.ask("tokenize", gguf=str(model), texts=listed, special=special))
        except LlamaError:
            raise AssertionError(f"llama.cpp could not tokenize: {worker.log[-2000:]}") from None


# Short strings for every boundary in the pattern; hostile texts are random sequences of them.
FRAGMENTS = [
    *"aAbZéÉßſKÅıİǅǆΩωЖж",  # cased letters of several alphabets; a long s, the Kelvin and Angstrom signs
    *"אبकกაꭰ",  # letters without case, Georgian, Cherokee
    *"ªºʰˢー々ゝ",  # modifiers and letters that look like marks; an iteration mark that is Han
    *"\u0301\u0903\u20dd\U00016ff0",  # marks: non-spacing, spacing, enclosing, Han
    *"漢字世〇〡〻⺀⼀豈㐀\U00020000\U0002f800\U00031350",  # Han letters, numbers, radicals
    *"0179²½Ⅷ٣१๓①一\U0001d7d8",  # numbers of all three kinds; one of them is a letter
    *"'’`ʼ\"!.,-_/()…—¿「」$€+<^",
    *("'s", "'S", "'ſ", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'Ve"),
    *("'m", "'M", "'ll", "'lL", "'d", "'D", "'l", "'r"),
    *"☃☺\u2764\ufe0f\u200d👩\U0001f3fd🇨",  # symbols and what emoji are made of
    *" \t\n\r\v\f",  # white space, and characters that only look like it
    *("  ", "\r\n", "\n\n"),
    *"\x85\xa0\u1680\u2003\u2028\u3000\u180e\u200b\u2060\ufeff\x1c\0\x7f\xad",
    *"\u0378\ue000\U0010ffff\U000e0001\ufffd",  # unassigned, private, last, replacement character
    *"\U00016f00\u1c80\U0001e4d0\U00010d50",  # assigned after Unicode 5, 9, 15, 16
    *("camelCase", "HTTPServer", "iPhone", "don't", "I'M"),
]


def hostile_texts(count: int, seed: int, longest: int = 40) -> list[str]:
    """Random sequences of FRAGMENTS; half of them use only four fragments, so that runs occur."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        pool = rng.sample(FRAGMENTS, 4) if i % 2 else FRAGMENTS
        texts.append("".join(rng.choices(pool, k=rng.randint(1, longest))))
    return texts
