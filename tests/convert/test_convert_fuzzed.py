"""Ten thousand hostile inputs: each is converted according to its bytes, or refused with one line.

Small files are changed byte by byte and value by value in this process, so that a case takes milliseconds. The only
exception is `ConvertError`. After a refusal there is no file; after success the file is readable.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_tools import convert, fresh_checkpoint, join_safetensors, split_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoint import Spec

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.inspect_model import inspect_model
from kimi_gguf.convert.model.families import load_vocab, read_config
from kimi_gguf.convert.model.metadata import architecture_keys
from kimi_gguf.convert.output.gguf_header import key_bytes
from kimi_gguf.convert.source.byte_source import LocalFile
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.source.json_file import parse_object
from kimi_gguf.convert.source.safetensors_file import SafetensorsFile
from kimi_gguf.convert.types.imatrix import read_importances
from kimi_gguf.engine.gguf import GgufError, GgufFile

SPEC = Spec(layers="KM", hidden=32, heads=2, kda_head_dim=16, kv_lora=32, nope=16, v_dim=16, experts=2)
INTERESTING = [0, 1, 7, 8, 0x7F, 0x80, 0xFF, ord('"'), ord("{"), ord("["), ord("9"), ord("-")]


def mutated(rng: random.Random, content: bytes, reach: int) -> bytes:
    """One to four changes in the first `reach` bytes: bits, bytes, numbers, truncation, doubled or missing ranges."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(min(len(data), reach) or 1)
        end = min(at + rng.randrange(1, 24), len(data))
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice(INTERESTING)
            case 2:
                data[at : at + 8] = rng.choice([0, 1, 1 << 31, 1 << 63, (1 << 64) - 1]).to_bytes(8, "little")
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * rng.randrange(1, 4)
            case 5:
                data[at:end] = rng.randbytes(end - at)
            case _:
                del data[at : len(data) if rng.randrange(8) == 0 else at + 1]
    return bytes(data)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_checkpoint(tmp_path_factory.mktemp("fuzz") / "model", SPEC, shards=1)


@pytest.fixture
def folder(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def refusal(act: Any, *arguments: Any) -> str:
    """The message if `act` refuses, which must be one short line; else the empty string."""
    try:
        act(*arguments)
    except (ConvertError, GgufError) as error:
        message = str(error)
        assert "\n" not in message and 10 < len(message) < 2000, message
        return message
    return ""


def write_keys_of(config: str) -> None:
    """Read the text of a config.json, and make the bytes of the keys that a file gets from it."""
    for key in architecture_keys(read_config(parse_object(config, "c"), "config.json")):
        key_bytes(key)


def fuzz(path: Path, cases: int, seed: int, act: Any, reach: int = 1 << 20) -> list[str]:
    """The refusals of this number of changed files at the path."""
    rng, content = random.Random(seed), path.read_bytes()
    messages = []
    for _ in range(cases):
        path.write_bytes(mutated(rng, content, reach))
        messages.append(refusal(act, path))
    path.write_bytes(content)
    return [message for message in messages if message]


def open_safetensors(path: Path) -> None:
    with SafetensorsFile(LocalFile(path)) as file:
        for name, tensor in list(file.tensors.items())[:3]:
            if tensor.dtype in ("F32", "BF16"):
                file.read(name, 0, min(tensor.size, 4))


def test_safetensors_headers(folder: Path) -> None:
    length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    refused = fuzz(folder / "model.safetensors", 3000, 1, open_safetensors, reach=length + 8)
    assert len(refused) > 2500, "in a header nearly every byte matters"


def test_configs(folder: Path) -> None:
    def act(path: Path) -> None:
        read_config(path.read_bytes(), str(path))

    refused = fuzz(folder / "config.json", 2000, 2, act)
    assert 1000 < len(refused) < 1980


def test_tokenizers(folder: Path) -> None:
    config = read_config((folder / "config.json").read_bytes(), "config.json")
    for number, name in enumerate(("tiktoken.model", "tokenizer_config.json")):
        refused = fuzz(folder / name, 700, 3 + number, lambda path: load_vocab(folder, config))
        assert len(refused) > 100 and all(name in message for message in refused)


def gguf_and_imatrix(folder: Path) -> tuple[Path, Path]:
    from test_convert_like_quantize import write_imatrix, write_legacy_imatrix

    assert convert(folder, "-o", folder / "x.gguf").status == 0
    write_imatrix(folder / "imatrix.gguf", folder / "x.gguf", every=4)
    write_legacy_imatrix(folder / "imatrix.dat", folder / "x.gguf")
    return folder / "imatrix.gguf", folder / "imatrix.dat"


def test_gguf_files_and_importances(folder: Path) -> None:
    matrix, legacy = gguf_and_imatrix(folder)

    def open_gguf(path: Path) -> None:
        inspect_model(path, 1000)
        with GgufFile(path) as file:
            for tensor in list(file.tensors.values())[:3]:
                file.read(tensor, 0, 1)

    with pytest.raises(ConvertError, match="found a device"):
        read_importances(Path("/dev/zero"))
    cases = ((folder / "x.gguf", open_gguf), (matrix, read_importances), (legacy, read_importances))
    for seed, (path, act) in enumerate(cases):
        assert len(fuzz(path, 700, seed, act, reach=4000)) > 100


@pytest.mark.parametrize("part", [0, 1])
def test_models_in_parts(folder: Path, part: int) -> None:
    """One split is damaged; the model is opened through the first split."""
    assert convert(folder, "-o", folder / "x.gguf", "--split-max-size", "100K").status == 0
    parts = sorted(folder.glob("x-*"))

    def act(path: Path) -> None:
        inspect_model(parts[0], 1000)

    assert len(fuzz(parts[part], 300, part, act, reach=4000)) > 40


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
quick = settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(data=st.data())
def test_any_value_for_any_key_of_a_config(sound: Path, data: st.DataObject) -> None:
    config = json.loads((sound / "config.json").read_text())
    inner = config["linear_attn_config"]
    place = data.draw(st.sampled_from([config, config, inner]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    refusal(read_config, config, "config.json")


@quick
@given(data=st.data())
def test_any_value_in_a_safetensors_header(sound: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    header, content = split_safetensors(sound / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(header)))
    if isinstance(header[name], dict) and data.draw(st.booleans()):
        header[name][data.draw(st.sampled_from(sorted(header[name])))] = data.draw(json_values)
    else:
        header[name] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    join_safetensors(path, header, content)
    refusal(open_safetensors, path)


@quick
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_json(content: bytes) -> None:
    refusal(parse_object, content, "a file")


def hostile_weights(rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Weights with random bits, few of them not finite, so that some files pass."""
    for _ in range(count):
        bits = rng.integers(0, 1 << 16, 4096, dtype=np.uint16)
        if rng.random() < 0.7:
            bits &= np.uint16(0xBFFF)  # magnitudes below 2
        yield bits.tobytes()


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS", "MXFP4_MOE", "IQ3_S", "TQ1_0"])
def test_weights_of_any_bits(tmp_path: Path, kind: str) -> None:
    """Whole conversions: a readable file, or one line and no file."""
    source = fresh_checkpoint(tmp_path / "model", Spec(layers="KM", hidden=256, experts=2), shards=1)
    path, out = source / "model.safetensors", tmp_path / "out"
    content, rng = path.read_bytes(), np.random.default_rng(8)
    out.mkdir()
    statuses = []
    for bits in hostile_weights(rng, 12):
        at = int(rng.integers(len(content) // 2, len(content) - len(bits))) & ~1
        path.write_bytes(content[:at] + bits + content[at + len(bits) :])
        run = convert(source, "-o", out / "x.gguf", "--type", kind, "--quiet")
        assert run.status in (0, 1) and "Traceback" not in run.err
        if run.status == 0:
            assert run.err == ""
            with GgufFile(out / "x.gguf"):
                (out / "x.gguf").unlink()
        else:
            assert run.err.count("\n") == 1
        assert list(out.iterdir()) == []
        statuses.append(run.status)
    assert 0 in statuses and 1 in statuses


def test_whole_conversions_of_changed_checkpoints(tmp_path: Path, folder: Path) -> None:
    rng, out = random.Random(9), tmp_path / "out"
    out.mkdir()
    contents = {file: file.read_bytes() for file in folder.iterdir()}
    for _ in range(300):
        file = rng.choice(sorted(contents))
        file.write_bytes(mutated(rng, contents[file], 6000))
        run = convert(folder, "-o", out / "x.gguf", "--quiet")
        assert (run.status, run.err.count("\n")) in ((0, 0), (1, 1)), run.err
        assert [f.name for f in out.iterdir()] == ["x.gguf"] * (run.status == 0)
        (out / "x.gguf").unlink(missing_ok=True)
        file.write_bytes(contents[file])
    with open_checkpoint(folder):
        pass
