"""A small tokenizer.json with the published Ling 3 tokenizer's pattern, normalizer and special tokens.

Output: the file's object, the vocabulary's size, ids of the special tokens. The merges are trained on a few texts; the
bytes of a file depend only on this module.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Of tokenizer.json; the regular expression is one for Oniguruma.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's what you've seen: they're here, I'll go, we'd stay. ",
    "def camelCase(self, HTTPServer): return {'key': [1, 23, 456, 7890], \"x\": None}\n\n    if a != b:\n\t\tpass\r\n",
    "Größe, Übermut und Fußgänger; où est l'été? El niño comió piña. Žluťoučký kůň, İstanbul, Москва и Київ. ",
    "世界和平，人人有責。北京市の天気は晴れです。日本語々のテスト。 안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया ",
    "3.14159 ½ Ⅷ ٣٤٥ १२३ 👩‍👩‍👧 🇨🇭 → ∑ ≤ … — „Zitat“ «texte» ☃\u00a0\u3000 \n\n",
)
NUM_RANKS = 400
NAMES = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>",
    "<think>", "</think>", "<tool_call>", "</tool_call>",
)  # fmt: skip
SPECIAL = {name: NUM_RANKS + i for i, name in enumerate(NAMES)}
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # `special: false`: they are shown
VOCAB_SIZE = NUM_RANKS + len(NAMES) + 5  # the embedding has rows without a token
CHAT_TEMPLATE = (
    "{% for m in messages %}<role>{{ m['role'] | upper }}</role>{{ m['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


@cache
def _text() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens(
        [AddedToken(name, special=name not in NOT_SPECIAL, normalized=False) for name in NAMES]
    )
    return tokenizer.to_str()


def tokenizer_json() -> dict[str, Any]:
    """A new copy of the object."""
    content: dict[str, Any] = json.loads(_text())
    return content
