"""A hundred damaged checkpoints: each results in one clear error, an error status, no traceback and no file.

The name and number of a case determine the damage. In a safetensors header or an index either every byte matters
or none does, so any damage is tested: if it is not detected, the output must be the same as that of the valid
checkpoint. In a config or a vocabulary a changed digit may describe another model, so only the syntax is damaged:
truncated files, invalid text, missing punctuation, doubled or missing lines, values of a wrong kind.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_tools import convert, fresh_checkpoint, start_convert
from random_checkpoint import Spec

SPEC = Spec(layers="KM")
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Damage = Callable[[random.Random, bytes], bytes]


def cut(rng: random.Random, content: bytes) -> bytes:
    """The file is truncated."""
    return content[: rng.randrange(len(content))]


def garble(rng: random.Random, content: bytes) -> bytes:
    """A range of bytes is replaced by noise."""
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 64), len(content) - start)
    return content[:start] + rng.randbytes(length) + content[start + length :]


def double(rng: random.Random, content: bytes) -> bytes:
    """A range of bytes appears twice."""
    start = rng.randrange(len(content))
    end = min(start + rng.randrange(1, 200), len(content))
    return content[:end] + content[start:end] + content[end:]


def lose(rng: random.Random, content: bytes) -> bytes:
    """A range of bytes is removed."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 200) :]


def flip(rng: random.Random, content: bytes) -> bytes:
    """One bit is flipped."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def deepen(rng: random.Random, content: bytes) -> bytes:
    """Brackets are nested without end."""
    return rng.choice([b"[", b'{"a":']) * rng.randrange(10_000, 200_000)


def not_text(rng: random.Random, content: bytes) -> bytes:
    """A byte that is never valid in UTF-8."""
    at = rng.randrange(len(content))
    return content[:at] + b"\xff" + content[at:]


def lose_mark(rng: random.Random, content: bytes) -> bytes:
    """A comma, colon or bracket at the end of a line of JSON is removed."""
    ends = [i for i, byte in enumerate(content[:-1]) if byte in b",:{[" and content[i + 1] == ord("\n")]
    at = rng.choice(ends)
    return content[:at] + content[at + 1 :]


def double_line(rng: random.Random, content: bytes) -> bytes:
    """A line appears twice: a key with a plain value, or a rank."""
    lines = content.splitlines(keepends=True)
    plain = [i for i, line in enumerate(lines) if line.endswith(b",\n") and b'": ' in line]
    at = rng.choice(plain or range(len(lines)))
    return b"".join([*lines[:at], lines[at], *lines[at:]])


def lose_line(rng: random.Random, content: bytes) -> bytes:
    """A line of the ranks is removed."""
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines) - 1)]
    return b"".join(lines)


def cut_line(rng: random.Random, content: bytes) -> bytes:
    """The file is truncated within a line."""
    return content[: content.rindex(b" ", 0, rng.randrange(len(content) // 2, len(content)))]


SIZES = (b"hidden_size", b"vocab_size", b"num_hidden_layers", b"kv_lora_rank", b"num_experts", b"v_head_dim")


def huge(rng: random.Random, content: bytes) -> bytes:
    """A size is replaced by a number with hundreds or thousands of digits."""
    name = b'"' + rng.choice(SIZES) + b'": '
    at = content.index(name) + len(name)
    return content[:at] + b"9" * rng.choice([20, 400, 5000]) + content[at:]


def retype(rng: random.Random, content: bytes) -> bytes:
    """A size is replaced by something that is not a whole number."""
    name = b'"' + rng.choice(SIZES) + b'": '
    at = content.index(name) + len(name)
    value = rng.choice([b"null", b"[]", b"{}", b'"64"', b"64.5", b"-1", b"true", b"NaN", b"1e999"])
    return content[:at] + value + content[content.index(b",", at) :]


ANY_DAMAGE: list[Damage] = [cut, garble, double, lose, flip, deepen]
JSON_DAMAGE: list[Damage] = [cut, deepen, not_text, lose_mark, double_line]


def in_header(damage: Damage, right_length: bool) -> Damage:
    """Damage to a safetensors file's header, with the length corrected, or with the old length."""

    def change(rng: random.Random, content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = damage(rng, content[8 : 8 + length])
        return struct.pack("<Q", len(header) if right_length else length) + header + content[8 + length :]

    return change


def length_changed(rng: random.Random, content: bytes) -> bytes:
    """The length of the header is changed."""
    (length,) = struct.unpack("<Q", content[:8])
    other = rng.choice([0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", other) + content[8:]


def data_cut(rng: random.Random, content: bytes) -> bytes:
    """The data is truncated, as after a broken download."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[: rng.randrange(8 + length, len(content))]


def data_longer(rng: random.Random, content: bytes) -> bytes:
    """Bytes follow the data."""
    return content + rng.randbytes(rng.randrange(1, 100))


CASES: list[tuple[str, str, Damage]] = [
    *((f"header {d.__name__}", SHARD, in_header(d, True)) for d in ANY_DAMAGE),
    *((f"header {d.__name__}, its length kept", SHARD, in_header(d, False)) for d in (cut, double, lose)),
    ("header length", SHARD, length_changed),
    ("data cut", SHARD, data_cut),
    ("data longer", SHARD, data_longer),
    *((f"index {d.__name__}", INDEX, d) for d in ANY_DAMAGE),
    *((f"config {d.__name__}", "config.json", d) for d in (*JSON_DAMAGE, huge, retype)),
    *((f"tokenizer config {d.__name__}", "tokenizer_config.json", d) for d in JSON_DAMAGE),
    *((f"ranks {d.__name__}", "tiktoken.model", d) for d in (cut_line, not_text, double_line, lose_line)),
]
ROUNDS = 3  # with different random numbers: 102 checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of the undamaged checkpoint."""
    folder = tmp_path_factory.mktemp("sound")
    source = fresh_checkpoint(folder / "model", SPEC)
    assert convert(source, "-o", folder / "x.gguf", "--quiet").status == 0
    return (folder / "x.gguf").read_bytes()


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("name, file, damage", CASES, ids=[case[0] for case in CASES])
def test_damage_gives_one_clear_error_and_no_file(
    tmp_path: Path, sound: bytes, name: str, file: str, damage: Damage, seed: int
) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC)
    rng = random.Random(f"{name} {seed}")
    before = (source / file).read_bytes()
    after = damage(rng, before)
    (source / file).write_bytes(after)
    (tmp_path / "out").mkdir()
    run = convert(source, "-o", tmp_path / "out" / "x.gguf", "--quiet")
    left = list((tmp_path / "out").iterdir())
    if run.status == 0:
        assert file in (SHARD, INDEX), "the damage went unnoticed"
        assert left[0].read_bytes() == sound, "damage changed the model without an error"
        return
    assert run.status == 1
    assert run.err.startswith("convert-kimi: error: ") and run.err.count("\n") == 1, run.err
    assert file.split(".")[0].split("-")[0] in run.err
    assert left == []


@pytest.mark.parametrize("name", ["header deepen", "config cut", "ranks not_text"])
def test_damage_gives_no_traceback_from_the_command_itself(tmp_path: Path, name: str) -> None:
    """The same in a separate process, which would print a traceback."""
    source = fresh_checkpoint(tmp_path / "model", SPEC)
    file, damage = next(case[1:] for case in CASES if case[0] == name)
    content = (source / file).read_bytes()
    (source / file).write_bytes(damage(random.Random(name), content))
    process = start_convert(source, "-o", tmp_path / "x.gguf")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1 and err.startswith("convert-kimi: error: ")
    assert not (tmp_path / "x.gguf").exists()
