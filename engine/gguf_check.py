"""Checks that a path can be a model, and that it can draft, before a program starts or a build is made.

Input: a path. Output: none, or `EngineError`.
"""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.gguf import GgufError, GgufModel, UnknownGgufError, key_of
from kimi_gguf.engine.path_check import check_path
from kimi_gguf.engine.split_names import place_in_set


def check_gguf(path: Path) -> None:
    """Raise `EngineError` for a missing file, or one that does not start as a GGUF file. Given the first split of a
    model (NAME-00001-of-00003.gguf), check all splits."""
    for split in all_splits(path):
        _check_file(split)


def check_whole(path: Path) -> None:
    """`check_gguf`, and raise `EngineError` for a damaged header, or if the file ends before its tensors do. Files of a
    kind that this project cannot read are left to llama.cpp."""
    check_gguf(path)
    try:
        GgufModel(path).close()
    except UnknownGgufError:
        return
    except GgufError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: GgufError) -> EngineError:
    """The error for a file of the user that cannot be read."""
    message = str(error).removeprefix(f"{path}: ")
    return EngineError(f"{path}: a damaged GGUF file: {message}", todo="convert or download it again")


def all_splits(path: Path) -> list[Path]:
    """The files of a model, from the name of its first or only file; llama.cpp finds the others in the same way.
    Raises `EngineError` for the name of a split that is not the first."""
    number, splits = place_in_set(path) or (1, [path])
    if number != 1:
        what = f"{path}: split {number} of {len(splits)}"
        raise EngineError(what, expected="the first split", todo=f"give {splits[0].name}")
    return splits


def has_mtp(file: GgufModel) -> bool:
    """Whether the file has layers that predict further tokens."""
    return bool(file.keys.get(f"{file.keys.get('general.architecture')}.nextn_predict_layers"))


def check_mtp(path: Path) -> None:
    """Raise `EngineError` for a model without an MTP layer, which cannot draft with it."""
    with GgufModel(path) as file:
        if not has_mtp(file):
            raise EngineError(
                f"{path}: cannot draft with draft-mtp",
                expected="a file with an MTP layer",
                found="none",
                todo="convert a Ling 3 checkpoint that has one, without --no-mtp, or use other drafts "
                "(-md DRAFT, --spec-type ngram-cache)",
            )


def check_tokenizer(path: Path) -> None:
    """Raise `EngineError` for a model without a tokenizer. `kimi-llama bench` generates such models, and llama.cpp
    aborts when it tokenizes a text with one. Files that this project cannot read are left to llama.cpp."""
    try:
        tokenizer = key_of(path, "tokenizer.ggml.model")
    except GgufError:
        return
    if tokenizer in ("no_vocab", "none"):
        raise EngineError(
            f"{path}: has no tokenizer, so it cannot read or write text",
            expected="a tokenizer (tokenizer.ggml.model)",
            found=repr(tokenizer),
            todo=f"give a converted model; to measure this one: kimi-llama bench {path}",
        )


def may_begin_text(path: Path) -> bool:
    """Whether the model can write a text without a prompt: its file says that a BOS token is added, or does not say
    whether, or cannot be read by this project."""
    try:
        if key_of(path, "tokenizer.ggml.add_bos_token") is not False:
            return True
        return bool(key_of(path, "tokenizer.ggml.pre") == "gemma4")  # llama.cpp adds one anyway
    except GgufError:
        return True


def _check_file(path: Path) -> None:
    check_path(path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise EngineError(f"{path}: is {kind_of(path)}", expected="a GGUF file", todo="name a file on disk")
    if path.is_dir():
        raise EngineError(
            f"{path}: is a folder",
            expected="a GGUF file",
            todo=f"convert it first: convert-kimi {path} -o model.gguf",
        )
    if not path.is_file():
        raise EngineError(
            f"{path}: no such file",
            expected="a GGUF file",
            todo="make one with: convert-kimi CHECKPOINT -o model.gguf --type Q8_0"
            if place_in_set(path) is None
            else "put all splits of the model into one folder",
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise EngineError(
            f"{path}: not a GGUF file",
            expected="b'GGUF' as its first bytes",
            found=repr(magic) if magic else "an empty file",
            todo="give a GGUF file; convert-kimi makes one from a checkpoint",
        )
