"""generation_config.json of a checkpoint: the sampling that its publisher recommends, and further end tokens.

Input: the checkpoint's folder, its config and vocabulary. Output: `Generation`. llama.cpp uses the keys
`general.sampling.*` unless the user gives other values. It stops at the tokens eos, eot and eom of the metadata, and at
those that it knows by their text. What is missing or invalid in the file is not used, and a note says so: a model is
whole without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.source.json_file import read_object

GENERATION: Final = "generation_config.json"
# Key in the file, key of GGUF, least and greatest value, whether it is a whole number; in upstream's order.
_SAMPLING: Final = (
    ("top_k", "top_k", 0, 2**31 - 1, True),
    ("top_p", "top_p", 0.0, 1.0, False),
    ("min_p", "min_p", 0.0, 1.0, False),
    ("temperature", "temp", 0.0, 100.0, False),
    ("repetition_penalty", "penalty_repeat", 0.01, 100.0, False),
)
# Tokens at which llama.cpp always stops, by their text.
_ALWAYS_STOP: Final = frozenset({"<|im_end|>", "[EOS]", "[EOT]", "<|endoftext|>"})


@dataclass(frozen=True)
class Generation:
    """What the file adds to a model."""

    vocab: Vocab  # with all end tokens
    keys: tuple[Key, ...]
    notes: tuple[str, ...]


def read_generation(folder: Path, config: ModelConfig, vocab: Vocab) -> Generation:
    """Raises `ConvertError` for more end tokens than GGUF can name."""
    notes: list[str] = []
    data: Mapping[str, Any] = {}
    if (file := folder / GENERATION).exists():
        try:
            data = read_object(file)
        except ConvertError as error:
            notes.append(f"{GENERATION} is not used: {error}")
    keys = tuple(_sampling(data, notes))
    if keys:
        notes.append(
            "recommended sampling: "
            + ", ".join(f"{key.name.rpartition('.')[2]} {key.value:g}" for key in keys)
        )
    end_tokens = (*config.more_eos_token_ids, *_end_tokens(data, config, notes))
    return Generation(_with_end_tokens(vocab, end_tokens, folder), keys, tuple(notes))


def _sampling(data: Mapping[str, Any], notes: list[str]) -> Iterator[Key]:
    if data.get("do_sample") is False:  # the most likely token: other keys are leftovers
        return
    for name, key, least, most, whole in _SAMPLING:
        value = data.get(name)
        if value is None:
            continue
        number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and not whole)
        if isinstance(value, bool) or not number or not least <= value <= most:
            notes.append(f"{GENERATION}: {name} is not used: expected {least} to {most}, found {value!r:.40}")
        else:
            kind = ValueType.INT32 if whole else ValueType.FLOAT32
            yield Key(f"general.sampling.{key}", kind, value if whole else float(value))


def _end_tokens(data: Mapping[str, Any], config: ModelConfig, notes: list[str]) -> tuple[int, ...]:
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        return tuple(ids)
    notes.append(f"{GENERATION}: eos_token_id is not used: expected token ids, found {value!r:.40}")
    return ()


def _with_end_tokens(vocab: Vocab, end_tokens: tuple[int, ...], folder: Path) -> Vocab:
    """The vocabulary with the end tokens that llama.cpp does not know, as eot and eom."""
    known = {vocab.eos_id, vocab.eot_id}
    further = [i for i in dict.fromkeys(end_tokens) if i not in known and vocab.tokens[i] not in _ALWAYS_STOP]
    free = [name for name in ("eot_id", "eom_id") if getattr(vocab, name) is None]
    if len(further) > len(free):
        named = ", ".join(f"{i} ({vocab.tokens[i]!r:.40})" for i in further)
        raise ConvertError(
            f"{folder}: eos_token_id in config.json and {GENERATION}",
            expected=f"at most {len(free)} besides {vocab.tokens[vocab.eos_id or 0]!r} and the texts that llama.cpp "
            f"knows ({', '.join(sorted(_ALWAYS_STOP))})",
            found=named,
            todo="list fewer: GGUF names three",
        )
    return replace(vocab, **dict(zip(free, further, strict=False)))  # type: ignore[arg-type]
