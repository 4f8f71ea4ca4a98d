"""Reads a checkpoint's vocabulary for GGUF without running the checkpoint's Python code.

Input: `tiktoken.model` (or a re-saved `tokenizer.json`), `tokenizer_config.json`, `chat_template.jinja`.
Output: a `Vocab` for GGUF's `tokenizer.ggml.*` keys (model `gpt2`, pre-tokenizer `kimi-k2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.byte_bpe import bytes_to_text, merges_from_ranks
from kimi_gguf.convert.model.config import KimiConfig
from kimi_gguf.convert.model.vocab_files import (
    SpecialToken,
    added_tokens,
    excerpt,
    read_text,
    read_tiktoken_model,
    read_tokenizer_json,
)
from kimi_gguf.convert.source.json_file import read_object

SPECIAL_IDS = 258  # how many ids past the ranks the hub's tokenizer class makes special


@dataclass(frozen=True)
class Vocab:
    """What `tokenizer.ggml.*` holds; `tokens` and `types` are as long as the embedding has rows."""

    tokens: list[str]  # ranks in GPT-2's byte spelling, special tokens literally
    types: list[int]  # gguf.TokenType
    merges: list[str]  # "left right", in rank order
    bos_id: int | None
    eos_id: int | None  # config.json's: the token that ends an answer
    eot_id: int | None
    pad_id: int | None
    unk_id: int | None
    chat_template: str | None


def load_vocab(folder: Path, config: KimiConfig) -> Vocab:
    """The vocabulary of the checkpoint in `folder`, `config.vocab_size` tokens long.

    Raises ConvertError, naming file and line, for anything missing, malformed or contradictory.
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
    check_distinct(tokens, len(ranks), named_in)
    ids = {content: len(ranks) + i for i, content in enumerate(specials)}
    vocab = Vocab(
        tokens=tokens,
        types=[int(TokenType.NORMAL)] * len(ranks) + types,
        merges=[f"{bytes_to_text(left)} {bytes_to_text(right)}" for left, right in merges],
        bos_id=token_id("bos", config.bos_token_id, settings, ids, config),
        eos_id=token_id("eos", config.eos_token_id, settings, ids, config),
        eot_id=ids.get("<|im_end|>", ids.get("[EOT]")),
        pad_id=token_id("pad", config.pad_token_id, settings, ids, config),
        unk_id=token_id("unk", None, settings, ids, config),
        chat_template=chat_template(folder, settings, settings_path),
    )
    if vocab.eos_id is None:
        raise ConvertError(
            f"{folder}: neither config.json nor tokenizer_config.json says which token ends a text"
        )
    return vocab


def recovered_merges(ranks: list[bytes], path: Path) -> list[tuple[bytes, bytes]]:
    """The merge list that gives the ids tiktoken gives for these ranks.

    A token no merges lead to is refused: tiktoken gives it for a piece of text equal to it, llama.cpp, which
    merges from single bytes, never would.
    """
    merges, unreachable = merges_from_ranks(ranks)
    if unreachable:
        rank = unreachable[0]
        raise ConvertError(
            f"{path}: {len(unreachable)} tokens cannot be made by merging others, first rank {rank}, "
            f"{excerpt(ranks[rank])}; GGUF's merge list cannot hold them: ids would not be the model's"
        )
    return merges


def check_same_merges(
    needed: list[tuple[bytes, bytes]], written: list[tuple[bytes, bytes]], ranks: list[bytes], path: Path
) -> None:
    """Refuse a tokenizer.json whose merges act otherwise than its ranks.

    Writers list every way to cut a token in two; only one can ever happen, so more than the needed ones do no
    harm, as long as all come in the order of the tokens they make.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    made = [rank_of.get(left + right, -1) for left, right in written]
    if -1 in made or made != sorted(made) or not set(needed) <= set(written):
        raise ConvertError(
            f"{path}: model.merges does not follow from the order of model.vocab, so its ids are not those "
            "of a tiktoken.model; take tiktoken.model from the original checkpoint"
        )


def special_rows(
    named: dict[int, SpecialToken], path: Path, num_ranks: int, vocab_size: int
) -> tuple[list[str], list[int]]:
    """Spelling and type of every token past the ranks, up to the embedding's last row.

    The hub's tokenizer class takes the SPECIAL_IDS ids after the ranks, calls the unnamed ones
    `<|reserved_token_ID|>` and matches them all in a text; two lie past the embedding and are left out here.
    The types are what llama.cpp does with them: CONTROL is matched on request and not shown, USER_DEFINED
    (`special: false`) always matched and shown, UNUSED (rows past the special ids) neither.
    """
    if vocab_size < num_ranks:
        raise ConvertError(
            f"{path.parent}: the tokenizer has {num_ranks} ordinary tokens, config.json's vocab_size is only "
            f"{vocab_size}; tokenizer and config are not of the same model"
        )
    last = num_ranks + SPECIAL_IDS
    outside = [i for i in named if not num_ranks <= i < max(vocab_size, last)]
    if outside:
        kind = "an ordinary token's" if outside[0] < num_ranks else "beyond the embedding"
        raise ConvertError(
            f"{path}: the special token {excerpt(named[outside[0]].content)} has id {outside[0]}, which is "
            f"{kind} (special ids are {num_ranks} to {max(vocab_size, last) - 1})"
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


def check_distinct(tokens: list[str], num_ranks: int, path: Path) -> None:
    """Refuse two tokens of one spelling: llama.cpp aborts on such a file."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (earlier := seen.setdefault(token, i)) != i:
            kind = "ordinary" if earlier < num_ranks else "special"
            raise ConvertError(
                f"{path}: special token {i}, {excerpt(token)}, is spelt like the {kind} token {earlier}"
            )


def token_id(
    kind: str, configured: int | None, settings: dict[str, Any], ids: dict[str, int], config: KimiConfig
) -> int | None:
    """The id of the bos, eos, pad or unk token: config.json's word, else tokenizer_config.json's name."""
    if configured is not None:
        if not 0 <= configured < config.vocab_size:
            raise ConvertError(
                f"config.json: {kind}_token_id is {configured}, but there are {config.vocab_size} tokens"
            )
        return configured
    name = settings.get(f"{kind}_token")
    content = name.get("content") if isinstance(name, dict) else name
    return ids.get(content) if isinstance(content, str) else None


def chat_template(folder: Path, settings: dict[str, Any], settings_path: Path) -> str | None:
    """The chat template: `chat_template.jinja` if it is there (as in transformers), else the settings'."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str) or "\0" in template:
        raise ConvertError(
            f"{settings_path}: 'chat_template' must be text without NUL, found {excerpt(template)}"
        )
    try:
        template.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConvertError(f"{settings_path}: 'chat_template' holds half a surrogate pair") from error
    return template
