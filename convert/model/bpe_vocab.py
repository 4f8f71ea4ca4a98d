"""Reads a byte-level BPE vocabulary from `tokenizer.json`, as the Ling models have it.

Input: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`. Output: a `Vocab`. Its pre-tokenizer is that
of llama.cpp with the same split pattern; its merges are those of the file.

Source: the `tokenizers` library's BPE, ByteLevel and Split; llama.cpp's table of split patterns (llama-vocab.cpp).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from kimi_gguf.convert.errors import ConvertError, excerpt
from kimi_gguf.convert.model.byte_bpe import bytes_to_text, text_to_bytes
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.vocab import Vocab, chat_template, check_distinct, token_id
from kimi_gguf.convert.model.vocab_files import SpecialToken, check_ranks, merge_pairs, tokens_of_json
from kimi_gguf.convert.source.json_file import read_object

# Split pattern of a tokenizer.json -> llama.cpp's name (tokenizer.ggml.pre).
PATTERNS: Final = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": (
        "bailingmoe2"
    ),
}
END_OF_TURN: Final = "<|role_end|>"
# Settings of the model in tokenizer.json that would give other ids; null is as good as the value.
_PLAIN: Final = {
    "unk_token": None,
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_TRIMMED: Final = ("lstrip", "rstrip", "single_word")
_REMEDY: Final = "llama.cpp would produce other token ids; use the tokenizer.json of the original checkpoint"


def load_bpe_vocab(folder: Path, config: ModelConfig) -> Vocab:
    """The vocabulary of the checkpoint in `folder`, `config.vocab_size` tokens long.

    Raises `ConvertError`, naming file and key, for anything missing, malformed or contradictory.
    """
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    root, settings = read_object(path), read_object(settings_path)
    model = root.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ConvertError(path, expected="a 'model' of type BPE", found=excerpt(model))
    for key, value in _PLAIN.items():
        found = model.get(key)
        if found is not None and (found != value or type(found) is not type(value)):
            raise ConvertError(
                f"{path}: model.{key}", expected=f"{value!r}", found=excerpt(found), todo=_REMEDY
            )
    pre = _pre_tokenizer(root.get("pre_tokenizer"), path)
    named = tokens_of_json(root, path)
    ordinary = _ordinary(model.get("vocab"), named, config.vocab_size, path)
    merges = _merges(model.get("merges"), ordinary, path)
    tokens, types = _rows(ordinary, named, config.vocab_size)
    specials = {token.content: i for i, token in named.items()}
    check_distinct(tokens, set(ordinary), path)
    add_bos = _add_bos(root.get("post_processor"), settings, specials, path)
    vocab = Vocab(
        tokens=tokens,
        types=types,
        merges=merges,
        bos_id=token_id("bos", config.bos_token_id, settings, specials),
        eos_id=token_id("eos", config.eos_token_id, settings, specials),
        eot_id=specials.get(END_OF_TURN),
        pad_id=token_id("pad", config.pad_token_id, settings, specials),
        unk_id=token_id("unk", None, settings, specials),
        chat_template=chat_template(folder, settings, settings_path),
        pre=pre,
        add_bos=add_bos,
        notes=tuple(_notes(root, path)),
    )
    if vocab.eos_id is None:
        raise ConvertError(
            f"{folder}: eos_token_id",
            expected="a token id in config.json, or eos_token in tokenizer_config.json",
            found="neither",
            todo="without it generation never ends",
        )
    if add_bos and vocab.bos_id is None:
        raise ConvertError(
            f"{settings_path}: bos_token",
            expected="a token, because texts start with it",
            found="none",
            todo="add it",
        )
    return vocab


def _pre_tokenizer(value: object, path: Path) -> str:
    """llama.cpp's name of the pre-tokenizer: one split by a known pattern, then GPT-2's spelling of bytes."""
    stages = value.get("pretokenizers") if isinstance(value, dict) else None
    if isinstance(stages, list) and len(stages) == 2 and all(isinstance(stage, dict) for stage in stages):
        split, spell = stages
        pattern = split.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        plain = (
            split.get("type") == "Split"
            and (split.get("behavior"), split.get("invert", False)) == ("Isolated", False)
            and spell.get("type") == "ByteLevel"
            and (spell.get("add_prefix_space"), spell.get("use_regex")) == (False, False)
        )
        if plain and isinstance(regex, str) and regex in PATTERNS:
            return PATTERNS[regex]
    raise ConvertError(
        f"{path}: pre_tokenizer",
        expected=(f"a Split by one of the known patterns ({', '.join(PATTERNS.values())}) and ByteLevel"),
        found=excerpt(value),
        todo=_REMEDY,
    )


def _ordinary(vocab: object, named: dict[int, SpecialToken], size: int, path: Path) -> dict[int, bytes]:
    """The ordinary tokens as bytes by id, in order."""
    if not isinstance(vocab, dict):
        raise ConvertError(path, expected="an object model.vocab", found=excerpt(vocab))
    outside = [i for i in named if not 0 <= i < size]
    if outside:
        raise ConvertError(
            f"{path}: added token {excerpt(named[outside[0]].content)}",
            expected=f"an id below {size} (vocab_size in config.json)",
            found=f"{outside[0]}",
            todo="use the tokenizer and the config of the same model",
        )
    found: dict[int, bytes] = {}
    for text, number in vocab.items():
        place = f"{path}, model.vocab[{excerpt(text)}]"
        if type(number) is not int or not 0 <= number < size or number in found:
            expected = f"a unique id below {size} (vocab_size in config.json)"
            raise ConvertError(place, expected=expected, found=excerpt(number))
        if number in named:
            if text != named[number].content:
                other = excerpt(named[number].content)
                raise ConvertError(
                    f"{place}: its id {number} is that of the added token {other}", todo=_REMEDY
                )
            continue
        try:
            found[number] = text_to_bytes(text)
        except KeyError:
            raise ConvertError(place, expected="GPT-2's spelling of bytes") from None
    ordinary = dict(sorted(found.items()))
    check_ranks(ordinary.items(), path, "id")
    return ordinary


def _merges(value: object, ordinary: dict[int, bytes], path: Path) -> list[str]:
    """The merges in the file's order; both parts and the result must be tokens."""
    pairs = merge_pairs(value, path)
    tokens = set(ordinary.values())
    seen: set[tuple[bytes, bytes]] = set()
    for i, (left, right) in enumerate(pairs):
        place = f"{path}, model.merges[{i}]"
        missing = next((part for part in (left, right, left + right) if part not in tokens), None)
        if missing is not None:
            raise ConvertError(
                place,
                expected="parts and result among the tokens",
                found=f"{excerpt(missing)}, which is not",
            )
        if (left, right) in seen:
            raise ConvertError(
                f"{place}: the merge is already in the list", todo="which of the two counts is not defined"
            )
        seen.add((left, right))
    return [f"{bytes_to_text(left)} {bytes_to_text(right)}" for left, right in pairs]


def _rows(
    ordinary: dict[int, bytes], named: dict[int, SpecialToken], size: int
) -> tuple[list[str], list[int]]:
    """Spelling and type of every row of the embedding; rows without a token are UNUSED.

    llama.cpp matches CONTROL on request and does not show it, always matches and shows USER_DEFINED.
    """
    tokens: list[str] = []
    types: list[int] = []
    for i in range(size):
        if (token := named.get(i)) is not None:
            tokens.append(token.content)
            types.append(int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED))
        elif i in ordinary:
            tokens.append(bytes_to_text(ordinary[i]))
            types.append(int(TokenType.NORMAL))
        else:
            tokens.append(f"[PAD{i}]")
            types.append(int(TokenType.UNUSED))
    return tokens, types


def _add_bos(value: object, settings: dict[str, Any], specials: dict[str, int], path: Path) -> bool:
    """Whether a text starts with bos, by the template that `tokenizers` applies to a text."""
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    around: list[str] = []
    for stage in _stages(value, path):
        template = stage.get("single")
        if not isinstance(template, list):
            raise ConvertError(f"{path}: post_processor.single", expected="a list", found=excerpt(template))
        for piece in template:
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            around.append(str(special.get("id")) if isinstance(special, dict) else "")
    if around in ([], [""]):
        return False
    if around == [bos, ""] and bos in specials:
        return True
    shown = " ".join(name or "TEXT" for name in around)
    raise ConvertError(
        f"{path}: post_processor",
        expected=f"nothing around a text, or {excerpt(bos)} before it",
        found=f"{shown[:80]!r}",
        todo=_REMEDY,
    )


def _stages(value: object, path: Path) -> list[dict[str, Any]]:
    """The templates of a post-processor; ByteLevel changes offsets only."""
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "TemplateProcessing":
        return [value]
    inner = value.get("processors") if isinstance(value, dict) and kind == "Sequence" else None
    if isinstance(inner, list) and all(
        not isinstance(each, dict) or each.get("type") != "Sequence" for each in inner
    ):
        return [stage for each in inner for stage in _stages(each, path)]
    if kind == "ByteLevel":
        return []
    raise ConvertError(
        f"{path}: post_processor", expected="ByteLevel or a template", found=excerpt(value), todo=_REMEDY
    )


def _notes(root: dict[str, Any], path: Path) -> list[str]:
    """Differences that remain. Raises `ConvertError` for a normalizer that changes more than composed characters."""
    found: list[str] = []
    normalizer = root.get("normalizer")
    if normalizer is not None:
        kinds = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
        kinds = kinds if isinstance(kinds, list) else [normalizer]
        if kinds != [{"type": "NFC"}]:
            raise ConvertError(
                f"{path}: normalizer", expected="NFC or none", found=excerpt(normalizer), todo=_REMEDY
            )
        found.append(
            "the tokenizer composes characters first (NFC), llama.cpp does not: give it composed text"
        )
    entries = root.get("added_tokens") or []
    trimmed = [entry["content"] for entry in entries if any(entry.get(name) for name in _TRIMMED)]
    if trimmed:
        found.append(
            f"the tokenizer matches {len(trimmed)} added tokens with the spaces around them, or as whole words only; "
            f"llama.cpp does not: {excerpt(trimmed[0])}"
        )
    return found
