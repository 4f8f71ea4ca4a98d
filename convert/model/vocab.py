"""Reads a checkpoint's vocabulary for GGUF without running the checkpoint's Python code.

Input: `tiktoken.model` (or a re-saved `tokenizer.json`), `tokenizer_config.json`, `chat_template.jinja`.
Output: a `Vocab` for GGUF's `tokenizer.ggml.*` keys (model `gpt2`, pre-tokenizer `kimi-k2`).
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf import TokenType
from jinja2 import Environment, TemplateSyntaxError

from kimi_gguf.convert.errors import ConvertError, excerpt
from kimi_gguf.convert.model.byte_bpe import bytes_to_text, merges_from_ranks
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.vocab_files import (
    SpecialToken,
    added_tokens,
    checked_text,
    read_text,
    read_tiktoken_model,
    read_tokenizer_json,
)
from kimi_gguf.convert.source.json_file import read_object

# transformers' tag around what the assistant says, which llama.cpp ignores.
_GENERATION: Final = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SPECIAL_IDS = 258  # how many ids past the ranks the hub's tokenizer class makes special


@dataclass(frozen=True)
class Vocab:
    """The values of `tokenizer.ggml.*`; `tokens` and `types` have an entry for each row of the embedding."""

    tokens: list[str]  # ranks in GPT-2's spelling of bytes, special tokens literally
    types: list[int]  # gguf.TokenType
    merges: list[str]  # "left right", in rank order
    bos_id: int | None
    eos_id: int | None  # config.json's: the token that ends an answer
    eot_id: int | None
    pad_id: int | None
    unk_id: int | None
    chat_template: str | None
    pre: str  # llama.cpp's name of the split pattern, tokenizer.ggml.pre
    add_bos: bool = False  # whether a text starts with bos
    eom_id: int | None = None  # a third token that ends an answer
    notes: tuple[str, ...] = ()  # what llama.cpp does differently from the checkpoint's tokenizer


def load_tiktoken_vocab(folder: Path, config: ModelConfig) -> Vocab:
    """The vocabulary of the checkpoint in `folder`, `config.vocab_size` tokens long.

    Raises `ConvertError`, naming file and line, for anything missing, malformed or contradictory.
    """
    settings_path = folder / "tokenizer_config.json"
    settings = read_object(settings_path)
    ranks_path, tokenizer_json = folder / "tiktoken.model", folder / "tokenizer.json"
    if ranks_path.exists() or not tokenizer_json.exists():
        ranks = read_tiktoken_model(ranks_path)
        named, named_in = added_tokens(settings, settings_path), settings_path
        merges = recovered_merges(ranks, ranks_path)
    else:
        ranks, named, written_merges = read_tokenizer_json(tokenizer_json)
        named_in = tokenizer_json
        merges = recovered_merges(ranks, tokenizer_json)
        check_same_merges(merges, written_merges, ranks, tokenizer_json)

    specials, types = special_rows(named, named_in, len(ranks), config.vocab_size)
    tokens = [bytes_to_text(token) for token in ranks] + specials
    check_distinct(tokens, range(len(ranks)), named_in)
    ids = {content: len(ranks) + i for i, content in enumerate(specials)}
    vocab = Vocab(
        tokens=tokens,
        types=[int(TokenType.NORMAL)] * len(ranks) + types,
        merges=[f"{bytes_to_text(left)} {bytes_to_text(right)}" for left, right in merges],
        bos_id=token_id("bos", config.bos_token_id, settings, ids),
        eos_id=token_id("eos", config.eos_token_id, settings, ids),
        eot_id=ids.get("<|im_end|>", ids.get("[EOT]")),
        pad_id=token_id("pad", config.pad_token_id, settings, ids),
        unk_id=token_id("unk", None, settings, ids),
        chat_template=chat_template(folder, settings, settings_path),
        pre="kimi-k2",
    )
    if vocab.eos_id is None:
        raise ConvertError(
            f"{folder}: eos_token_id",
            expected="a token id in config.json, or eos_token in tokenizer_config.json",
            found="neither",
            todo="without it generation never ends",
        )
    return vocab


def recovered_merges(ranks: list[bytes], path: Path) -> list[tuple[bytes, bytes]]:
    """The merge list that produces the same ids as tiktoken with these ranks.

    Raises `ConvertError` for a token that no merges produce: tiktoken produces it for a piece of text that equals it,
    but llama.cpp, which merges from single bytes, never would.
    """
    merges, unreachable = merges_from_ranks(ranks)
    if unreachable:
        rank = unreachable[0]
        raise ConvertError(
            f"{path}: {len(unreachable)} tokens cannot be made by merging others, first rank "
            f"{rank}, {excerpt(ranks[rank])}",
            todo="a GGUF file cannot represent them, so its token ids would be wrong",
        )
    return merges


def check_same_merges(
    needed: list[tuple[bytes, bytes]], written: list[tuple[bytes, bytes]], ranks: list[bytes], path: Path
) -> None:
    """Raise `ConvertError` if the merges of a tokenizer.json produce other ids than its ranks.

    Writers list every way to split a token in two, of which only one can happen. Additional merges are harmless if
    all are in the order of the tokens that they make.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    made = [rank_of.get(left + right, -1) for left, right in written]
    if -1 in made or made != sorted(made) or not set(needed) <= set(written):
        raise ConvertError(
            f"{path}: model.merges does not follow from the order of model.vocab, so its token "
            "ids differ from those of tiktoken.model",
            todo="use tiktoken.model of the original checkpoint",
        )


def special_rows(
    named: dict[int, SpecialToken], path: Path, num_ranks: int, vocab_size: int
) -> tuple[list[str], list[int]]:
    """Spelling and type of every token after the ranks, up to the embedding's last row.

    The hub's tokenizer class uses the SPECIAL_IDS ids after the ranks, names the unnamed ones
    `<|reserved_token_ID|>`, and matches all of them in a text. Two are beyond the embedding and are left out here.
    llama.cpp matches CONTROL on request and does not show it, always matches and shows USER_DEFINED
    (`special: false`), and ignores UNUSED (rows after the special ids).
    """
    if vocab_size < num_ranks:
        raise ConvertError(
            f"{path.parent}: vocab_size in config.json",
            expected=f"at least {num_ranks}, the tokenizer's ordinary tokens",
            found=vocab_size,
            todo="use the tokenizer and the config of the same model",
        )
    last = num_ranks + SPECIAL_IDS
    outside = [i for i in named if not num_ranks <= i < max(vocab_size, last)]
    if outside:
        name = excerpt(named[outside[0]].content)
        raise ConvertError(
            f"{path}: the special token {name}",
            expected=f"an id from {num_ranks} to {max(vocab_size, last) - 1}",
            found=f"{outside[0]}",
        )
    spellings: list[str] = []
    types: list[TokenType] = []
    for i in range(num_ranks, vocab_size):
        token = named.get(i)
        spellings.append(token.content if token else f"<|reserved_token_{i}|>")
        if token is None:
            types.append(TokenType.CONTROL if i < last else TokenType.UNUSED)
        else:
            types.append(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    return spellings, [int(t) for t in types]


def check_distinct(tokens: list[str], ordinary: Container[int], path: Path) -> None:
    """Raise `ConvertError` if two tokens have the same text: llama.cpp aborts on such a file."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (earlier := seen.setdefault(token, i)) != i:
            kind = "ordinary" if earlier in ordinary else "special"
            raise ConvertError(
                f"{path}: special token {i}, {excerpt(token)}, has the same text as {kind} token {earlier}",
                todo="rename one of them, or download the file again",
            )


def token_id(kind: str, configured: int | None, settings: dict[str, Any], ids: dict[str, int]) -> int | None:
    """The id of the bos, eos, pad or unk token: that of config.json, else by its name in tokenizer_config.json."""
    if configured is not None:
        return configured
    name = settings.get(f"{kind}_token")
    content = name.get("content") if isinstance(name, dict) else name
    return ids.get(content) if isinstance(content, str) else None


def chat_template(folder: Path, settings: dict[str, Any], settings_path: Path) -> str | None:
    """The chat template: `chat_template.jinja` if it exists (as in transformers), else that of the settings; of a list
    the one with the name "default". Raises `ConvertError` for one that does not parse."""
    file, where = folder / "chat_template.jinja", f"{settings_path}: 'chat_template'"
    template = read_text(file) if file.exists() else settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        if "default" not in named:
            found = ", ".join(named)
            todo = "write the one to use into chat_template.jinja"
            raise ConvertError(where, expected='a template with the name "default"', found=found, todo=todo)
        template = named["default"]
    if template is None:
        return None
    return parsed(checked_text(template, where), str(file if file.exists() else where))


def parsed(template: str, where: str) -> str:
    """The template, if Jinja can parse it; it is not run. Raises `ConvertError`."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise ConvertError(
            f"{where}, line {error.lineno}: {error.message}",
            todo="correct the chat template, or give another one with --chat-template",
        ) from None
    return template
