"""A split output: the bytes of a single file, readable by llama.cpp and llama-gguf-split, whose splits we read too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_tools import assert_refused, convert, gguf_keys
from gguf import GGUFReader
from random_checkpoint import VOCAB_SIZE, Spec

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf import GgufModel
from kimi_gguf.engine.gguf_check import check_gguf
from kimi_gguf.validate.cli import main as validate
from kimi_gguf.validate.llama import run_logits

SPEC = Spec(layers="KKM", hidden=256, heads=4, experts=8, seed=60)
IDS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 40)
engine_kinds = pytest.mark.parametrize("kind", ["F32", pytest.param("Q8_0", marks=pytest.mark.engine)])


def split(source: Path, out: Path, size: str = "700K", *options: str) -> list[Path]:
    """The splits of a conversion, in order."""
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", size, *options)
    assert run.status == 0, run.err
    return sorted(out.glob("x-*.gguf"))


def split_and_whole(source: Path, out: Path, size: str, kind: str) -> tuple[list[Path], Path]:
    """The splits of a conversion, and the same model in one file."""
    whole = out.with_name("whole.gguf")
    assert convert(source, "-o", whole, "--type", kind).status == 0
    return split(source, out, size, "--type", kind), whole


def data(*paths: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of the files: type, shape and bytes, as gguf's own reader sees them; llama.cpp's tools omit
    trailing dimensions of 1."""
    return {
        tensor.name: (tensor.tensor_type.name, shape(tensor.shape), tensor.data.tobytes())
        for path in paths
        for tensor in GGUFReader(path).tensors
    }


def shape(ne: Any) -> tuple[int, ...]:
    return tuple(np.trim_zeros(np.array(ne, np.int64) - 1, "b") + 1)


def llama_split(engine: Engine, *arguments: object) -> None:
    command = [engine.bin / "llama-gguf-split", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@engine_kinds
def test_the_parts_have_the_bytes_of_the_whole(source: Path, out: Path, kind: str) -> None:
    parts, whole = split_and_whole(source, out, "400K", kind)
    count = len(parts)
    assert count > 2 and {p.name for p in out.iterdir()} == {
        f"x-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)
    }
    assert list(data(*parts).items()) == list(data(whole).items())
    assert sum(len(GGUFReader(part).tensors) for part in parts) == len(data(*parts)), "one appears twice"
    keys, first = gguf_keys(whole), gguf_keys(parts[0])
    assert {name: first[name] for name in keys} == keys and list(first)[: len(keys)] == list(keys)


def test_every_part_says_what_llama_cpp_asks(source: Path, out: Path) -> None:
    """Names and types as in llama-gguf-split: two unsigned 16-bit integers and a signed 32-bit integer."""
    parts = split(source, out)
    for number, part in enumerate(parts):
        reader = GGUFReader(part)
        found = {
            name: (field.types[0].name, field.contents())
            for name, field in reader.fields.items()
            if name.startswith("split.")
        }
        assert found == {
            "split.no": ("UINT16", number),
            "split.count": ("UINT16", len(parts)),
            "split.tensors.count": ("INT32", len(data(*parts))),
        }


def test_no_split_exceeds_the_size_or_has_space_for_the_next_tensor(source: Path, out: Path) -> None:
    parts = split(source, out)
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) <= 700_000
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + GGUFReader(following).tensors[0].n_bytes > 700_000


def test_the_size_counts_the_header_to_the_byte(tmp_path: Path, source: Path, out: Path) -> None:
    first = split(source, out)[0]
    size = first.stat().st_size
    for name, asked, same in (("a", size, True), ("b", size - 1, False)):
        (tmp_path / name).mkdir()
        found = split(source, tmp_path / name, f"{asked}B")[0]
        assert (list(data(found)) == list(data(first))) == same
        assert found.stat().st_size <= asked


def test_a_tensor_larger_than_a_part_gets_one_of_its_own(source: Path, out: Path) -> None:
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", "200K")
    assert run.status == 0
    large = [part for part in sorted(out.iterdir()) if part.stat().st_size > 200_000]
    assert large and all(len(GGUFReader(part).tensors) == 1 for part in large)
    for part in large:
        name = GGUFReader(part).tensors[0].name
        assert f"note: {name} is larger than --split-max-size" in run.err
        assert f"its split has {part.stat().st_size:,} bytes" in run.err
    for part in sorted(out.iterdir()):
        assert len(GGUFReader(part).tensors) >= 1


def test_what_fits_is_one_file_without_a_number(tmp_path: Path, source: Path, out: Path) -> None:
    assert split(source, out, "1G") == []
    assert convert(source, "-o", tmp_path / "whole.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("size", ["0", "-1", "5T", "1.5G", "G", "many"])
def test_an_invalid_size_is_a_wrong_argument(source: Path, out: Path, size: str) -> None:
    run = convert(source, "-o", out / "x.gguf", f"--split-max-size={size}")
    assert run.status == 2 and "expected a size such as 40G or 500M" in run.err


@pytest.mark.parametrize("size", ["1", "40", str(2**20 - 1)])
def test_a_small_size_without_a_unit_is_a_wrong_argument(source: Path, out: Path, size: str) -> None:
    """40 is meant as 40G; llama-gguf-split refuses all numbers without a unit."""
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", size)
    assert run.status == 2 and f"such as 40G or 500M, found '{size}'; {size}B would be bytes" in run.err
    for bytes_ in (f"{size}B", str(2**20)):
        assert convert(source, "--dry-run", "--split-max-size", bytes_).status == 0


def test_the_plan_shows_the_parts(source: Path, out: Path) -> None:
    plan = convert(source, "-o", out / "x.gguf", "--split-max-size", "700K", "--dry-run")
    assert plan.status == 0 and list(out.iterdir()) == []
    parts = split(source, out)
    planned = [line if line.startswith("x-") else line.split()[0] for line in plan.out.splitlines()[1:-1]]
    written: list[str] = []
    for part in parts:
        names = list(data(part))
        written += [f"{part.name}: {len(names)} tensors, {part.stat().st_size:,} bytes", *names]
    assert planned == written
    total = sum(part.stat().st_size for part in parts)
    assert plan.out.splitlines()[-1].endswith(f" {total:,} bytes in {len(parts)} splits")


def test_programs_are_told_all_files(source: Path, out: Path) -> None:
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", "700K", "--json")
    done = json.loads(run.out.splitlines()[-1])
    parts = sorted(out.iterdir())
    assert done["file"] == str(parts[0]) and done["files"] == [str(part) for part in parts]
    assert done["bytes"] == sum(part.stat().st_size for part in parts)


def test_space_for_all_splits_is_checked_first(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is space for each of them, but not for all."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", "700K")
    assert_refused(run, out, "1,000,000 bytes free", "free disk space")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_existing_part_is_kept_unless_forced(source: Path, out: Path, number: int) -> None:
    parts = split(source, out)
    expected = [part.read_bytes() for part in parts]
    for part in parts:
        part.unlink()
    parts[number].write_text("precious")
    run = convert(source, "-o", out / "x.gguf", "--split-max-size", "700K")
    assert run.status == 1 and f"{parts[number].name}: already exists" in run.err
    assert [path.read_text() for path in out.iterdir()] == ["precious"]
    assert [part.read_bytes() for part in split(source, out, "700K", "--force")] == expected


def test_the_name_of_a_split_is_refused_as_output(source: Path, out: Path) -> None:
    run = convert(source, "-o", out / "x-00001-of-00003.gguf", "--split-max-size", "700K")
    assert_refused(run, out, "give the name without -NNNNN-of-NNNNN")


# Splits of this converter, read by llama.cpp's programs.


@pytest.mark.engine
@engine_kinds
def test_llama_cpp_computes_the_same_from_parts(source: Path, out: Path, engine: Engine, kind: str) -> None:
    parts, whole = split_and_whole(source, out, "700K", kind)
    expected = run_logits(engine, whole, IDS)
    assert np.isfinite(expected).all() and expected.std() > 0
    assert np.array_equal(run_logits(engine, parts[0], IDS), expected)


@pytest.mark.engine
def test_parts_run_on_upstream_llama_cpp(source: Path, out: Path, upstream: Engine) -> None:
    assert np.isfinite(run_logits(upstream, split(source, out)[0], IDS)).all()


@pytest.mark.engine
def test_parts_in_a_hub_cache_run(tmp_path: Path, source: Path, out: Path, engine: Engine) -> None:
    """In the cache splits are links to files with other names; llama.cpp finds splits by the names of the links."""
    parts = split(source, out)
    (tmp_path / "snapshot").mkdir()
    for number, part in enumerate(parts):
        part.rename(out / f"{number:064x}")
        (tmp_path / "snapshot" / part.name).symlink_to(out / f"{number:064x}")
    first = tmp_path / "snapshot" / parts[0].name
    assert np.isfinite(run_logits(engine, first, IDS)).all()
    assert convert("verify", first, "--checkpoint", source).status == 0


@pytest.mark.engine
def test_validate_kimi_takes_the_first_part(
    demo_dir: Path, out: Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = split(demo_dir, out, "8M", "--type", "F32")
    words = [str(parts[0]), "--checkpoint", str(demo_dir), "--tokens", "64", "--generate", "4"]
    assert validate([*words, "--out", str(out / "report")]) == 0
    facts = json.loads((out / "report" / "report.json").read_text())["gguf"]
    whole = b"".join(part.read_bytes() for part in parts)
    assert facts["name"] == parts[0].name and facts["bytes"] == len(whole)
    assert facts["sha256"] == hashlib.sha256(whole).hexdigest() and facts["tensors"] == len(data(*parts))
    assert validate([str(parts[1]), *words[1:]]) != 0
    assert f"give {parts[0].name}" in capfd.readouterr().err
    parts[1].unlink()
    assert validate(words) != 0
    assert str(parts[1]) in capfd.readouterr().err


@pytest.mark.engine
@engine_kinds
def test_llama_gguf_split_merges_our_parts(
    tmp_path: Path, source: Path, out: Path, engine: Engine, kind: str
) -> None:
    parts, whole = split_and_whole(source, out, "700K", kind)
    llama_split(engine, "--merge", parts[0], tmp_path / "merged.gguf")
    assert list(data(tmp_path / "merged.gguf").items()) == list(data(whole).items())
    assert convert("verify", tmp_path / "merged.gguf", "--checkpoint", source).status == 0
    again = tmp_path / "again"
    again.mkdir()
    llama_split(engine, "--split-max-size", "1M", tmp_path / "merged.gguf", again / "y")
    assert convert("verify", min(again.iterdir()), "--checkpoint", source).status == 0


@pytest.mark.engine
def test_we_read_the_parts_of_llama_gguf_split(
    tmp_path: Path, source: Path, out: Path, engine: Engine
) -> None:
    assert convert(source, "-o", tmp_path / "whole.gguf").status == 0
    llama_split(engine, "--split-max-size", "1M", tmp_path / "whole.gguf", out / "y")
    parts = sorted(out.iterdir())
    assert len(parts) > 2
    run = convert("verify", parts[0], "--checkpoint", source)
    assert run.status == 0 and f" {len(data(*parts))} tensors" in run.out
    with GgufModel(parts[0]) as model:
        assert {name: model.read(t).tobytes() for name, t in model.tensors.items()} == {
            name: content for name, (_, _, content) in data(*parts).items()
        }


# Splits read by this project.


def test_verify_and_inspect_see_the_whole_model(tmp_path: Path, source: Path, out: Path) -> None:
    parts = split(source, out)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    assert convert("verify", parts[0], "--checkpoint", source).status == 0
    seen, whole = (inspected(path) for path in (parts[0], tmp_path / "x.gguf"))
    assert seen | {"path": ""} == whole | {"path": ""}


def inspected(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(convert("inspect", path, "--json").out)
    return found


def test_a_wrong_bit_in_a_later_part_is_named(source: Path, out: Path) -> None:
    parts = split(source, out)
    part = parts[-1]
    tensor = GGUFReader(part).tensors[-1]
    content = bytearray(part.read_bytes())
    content[int(tensor.data_offset)] ^= 1
    part.write_bytes(content)
    run = convert("verify", parts[0], "--checkpoint", source)
    assert run.status == 1 and run.out.startswith(f"{tensor.name} (")


def refused(parts: list[Path], source: Path, *words: str, given: int = 0) -> None:
    """verify and inspect refuse the model with one line that contains these words."""
    for arguments in (["verify", parts[given], "--checkpoint", source], ["inspect", parts[given]]):
        run = convert(*arguments)
        assert run.status == 1 and len(run.err.splitlines()) == 1, run.err
        assert [word for word in words if word not in run.err] == [], run.err


def test_a_part_that_is_not_the_first_is_refused(source: Path, out: Path) -> None:
    parts = split(source, out)
    refused(parts, source, parts[2].name, "is split 3", f"give the first one, {parts[0].name}", given=2)
    with pytest.raises(EngineError, match=rf"(?s)split 2 of {len(parts)}.*give {parts[0].name}"):
        check_gguf(parts[1])


def swap(parts: list[Path]) -> None:
    """The second and the third split are swapped."""
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)


# (change, the split that is named, words of the error, words of `check_gguf`'s error if it reads so far)
DAMAGED: dict[str, tuple[Callable[[list[Path]], object], int, list[str], str]] = {
    "missing": (
        lambda parts: parts[2].unlink(),
        2,
        ["not found, but the model has"],
        "no such file.*put all",
    ),
    "truncated": (lambda parts: os.truncate(parts[1], parts[1].stat().st_size - 1000), 1, ["truncated"], ""),
    "no GGUF": (lambda parts: parts[1].write_bytes(b"<html>"), 1, ["not a GGUF file"], "not a GGUF file"),
    "swapped": (swap, 1, ["split.no: expected 1", "found 2"], ""),
}


@pytest.mark.parametrize("change, number, words, checked", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_part_is_named(
    source: Path, out: Path, change: Any, number: int, words: Any, checked: str
) -> None:
    parts = split(source, out)
    check_gguf(parts[0])
    change(parts)
    refused(parts, source, str(parts[number]), *words)
    if checked:
        with pytest.raises(EngineError, match=rf"(?s){parts[number].name}: {checked}"):
            check_gguf(parts[0])


def test_a_part_of_another_conversion_is_named(tmp_path: Path, source: Path, out: Path) -> None:
    """The same shapes, types and number of splits."""
    parts = split(source, out)
    (tmp_path / "other").mkdir()
    others = split(source, tmp_path / "other", "700K", "--name", "another")
    assert [p.name for p in others] == [p.name for p in parts]
    shutil.copy(others[2], parts[2])
    refused(parts, source, str(parts[2]), "a split of another model")


def test_a_renamed_set_is_refused(source: Path, out: Path) -> None:
    parts = split(source, out)
    parts[0].rename(out / "z.gguf")
    refused([out / "z.gguf"], source, "expected a name like NAME-00001-of-")
