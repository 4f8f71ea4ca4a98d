"""However a split conversion ends, a first split has its name only together with all other splits of the same run."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from convert_tools import Run, convert, killed_conversions
from random_checkpoint import Spec
from selection import some_of

from kimi_gguf.convert.conversion import Options
from kimi_gguf.convert.conversion import convert as convert_in_python
from kimi_gguf.convert.output import unfinished
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.file_hash import Digest
from kimi_gguf.engine.split_names import place_in_set

SPEC = Spec(layers="KKM", hidden=128, experts=16, seed=40)
SIZE = 300_000
NAMES = ("one", "two")  # of the model: two conversions with the same splits and different bytes

# The process kills itself with SIGKILL after this number of renames; 0: before the first.
DIES_AMONG_RENAMES = """
import os, pathlib, signal, sys
from kimi_gguf.convert.cli import main

left, replace = int(sys.argv[1]), pathlib.Path.replace

def counted(self, target):
    global left
    if left > 0:
        replace(self, target)
        left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.replace = counted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> dict[str, dict[str, bytes]]:
    """By the model's name, the splits of an undisturbed conversion."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        assert to_parts(source, tmp_path / name, name).status == 0
    found = {name: contents(tmp_path / name) for name in NAMES}
    assert found["one"] != found["two"] and list(found["one"]) == list(found["two"])
    assert len(found["one"]) > 3
    return found


def to_parts(source: Path, out: Path, name: str = "one", *options: str) -> Run:
    return convert(source, "-o", out / "x.gguf", "--split-max-size", f"{SIZE}B", "--name", name, *options)


def contents(folder: Path) -> dict[str, bytes]:
    """The visible files with their names, in order."""
    shown = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in shown}


def killed_among_renames(source: Path, out: Path, renames: int, name: str = "one", *options: str) -> None:
    command = [sys.executable, "-c", DIES_AMONG_RENAMES, str(renames), source, "-o", out / "x.gguf"]
    command += ["--split-max-size", f"{SIZE}B", "--name", name, *options]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", some_of((40, 60), 40))
def test_killed_at_random_instants(
    tmp_path: Path, source: Path, out: Path, expected: dict[str, dict[str, bytes]], kills: int
) -> None:
    folders = [tmp_path / name for name in NAMES]
    found = killed_conversions(source, out / "x.gguf", kills, "BF16", SIZE, *folders)
    assert found["wrong"] == 0 and found["killed"] == kills, found
    too_few = "too few were killed in the middle"
    assert found["resumed"] > kills // 6 and found["loadable"] > kills // 6, too_few


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_among_renames_no_first_part_is_there(
    source: Path, out: Path, expected: dict[str, dict[str, bytes]], renames: int
) -> None:
    killed_among_renames(source, out, renames)
    there = contents(out)
    assert len(there) == renames and min(expected["one"]) not in there
    assert to_parts(source, out, "one", "--resume").status == 0
    assert contents(out) == expected["one"] and not (out / ".x.gguf.unfinished").exists()


@pytest.mark.parametrize("renames", [0, 2])
def test_the_card_of_resumed_splits_has_their_hashes(source: Path, out: Path, renames: int) -> None:
    """Also of those that already have their names."""
    killed_among_renames(source, out, renames)
    assert to_parts(source, out, "one", "--resume", "--model-card").status == 0
    card = (out / "README.md").read_text()
    splits = list(out.glob("x-*.gguf"))
    assert len(splits) > 3
    for split in splits:
        hashed = hashlib.sha256(split.read_bytes()).hexdigest()
        assert re.search(rf"^\| `{split.name}` \| .* \| `{hashed}` \|$", card, re.MULTILINE), split.name


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_among_renames_over_an_old_set_nothing_is_mixed(
    source: Path, out: Path, expected: dict[str, dict[str, bytes]], renames: int
) -> None:
    assert to_parts(source, out, "two").status == 0
    killed_among_renames(source, out, renames, "one", "--force")
    there = contents(out)
    assert min(expected["one"]) not in there
    assert to_parts(source, out, "one", "--resume", "--force").status == 0
    assert contents(out) == expected["one"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_run_of_another_kind_clears_away_what_was_renamed(source: Path, out: Path, renames: int) -> None:
    """One file instead of splits, or other splits: no file of the earlier output is left."""
    for options in ([], ["--split-max-size", "500K"]):
        killed_among_renames(source, out, renames)
        old = set(contents(out))
        assert len(old) == renames
        size = sum(path.stat().st_size for path in out.rglob("x*.gguf"))
        run = convert(source, "-o", out / "x.gguf", *options)
        assert run.status == 1 and f"keeps {size:,} bytes of an earlier run" in run.err
        assert set(contents(out)) == old
        run = convert(source, "-o", out / "x.gguf", *options, "--force")
        assert run.status == 0 and "discarding .x.gguf.unfinished of an earlier run" in run.err
        assert not old & set(contents(out))
        assert not (out / ".x.gguf.unfinished").exists()
        for path in out.iterdir():
            path.unlink()


def test_resume_of_renamed_parts_with_other_options_is_refused(source: Path, out: Path) -> None:
    killed_among_renames(source, out, 2)
    before = contents(out)
    run = to_parts(source, out, "two", "--resume")
    assert run.status == 1 and "other options" in run.err
    assert contents(out) == before and (out / ".x.gguf.unfinished").is_dir()


def test_a_file_of_someone_else_among_the_renamed_is_kept(source: Path, out: Path) -> None:
    killed_among_renames(source, out, 2)
    names = sorted(contents(out))
    (out / names[0]).unlink()
    (out / names[0]).write_text("precious")
    for options in ([], ["--resume"]):
        run = to_parts(source, out, "one", *options)
        assert run.status == 1 and f"{names[0]}: already exists" in run.err
        assert (out / names[0]).read_text() == "precious"


def test_killed_when_all_was_done_but_the_clearing(
    source: Path, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """All files are renamed: a run without --force does not change them, one with --resume removes the folder."""
    killed_among_renames(source, out, len(expected["one"]))
    assert contents(out) == expected["one"] and (out / ".x.gguf.unfinished").is_dir()
    run = to_parts(source, out, "one")
    assert run.status == 1 and "already exists" in run.err and contents(out) == expected["one"]
    assert to_parts(source, out, "one", "--resume").status == 0
    assert contents(out) == expected["one"] and not (out / ".x.gguf.unfinished").exists()


def test_resume_goes_on_in_the_part_where_it_stopped(
    source: Path, out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)
    begun: list[int] = []
    begin = unfinished.Unfinished.begin

    def count(self: unfinished.Unfinished, number: int) -> None:
        begun.append(number)
        if len(begun) == 3:
            raise KeyboardInterrupt
        begin(self, number)

    monkeypatch.setattr(unfinished.Unfinished, "begin", count)
    with pytest.raises(KeyboardInterrupt):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], Options("one", split_max_size=SIZE))
    assert begun == [0, 1, 2] and contents(out) == {}
    assert to_parts(source, out, "one", "--resume").status == 0
    assert begun[3:] == list(range(2, len(expected["one"]))) and contents(out) == expected["one"]


def test_a_finished_part_that_was_cut_meanwhile_is_refused(source: Path, out: Path) -> None:
    killed_among_renames(source, out, 0)
    first = sorted((out / ".x.gguf.unfinished").glob("x-*"))[0]
    os.truncate(first, 1000)
    run = to_parts(source, out, "one", "--resume")
    assert run.status == 1 and first.name in run.err and "found 1000" in run.err


@pytest.mark.parametrize(
    "whole", ['"x"', "[]", '{"../../x": 1}', '{"x.gguf": "1"}', '{"": 1}', "null", '{"x\\u0000": 1}']
)
def test_an_invalid_record_of_renamed_files_is_harmless(source: Path, out: Path, whole: str) -> None:
    killed_among_renames(source, out, 0)
    with (out / ".x.gguf.unfinished" / "journal").open("a") as file:
        file.write(f'{{"whole": {whole}}}\n')
    run = to_parts(source, out, "one", "--force")
    assert run.status == 0 and all(place_in_set(out / name) for name in contents(out))


def test_a_split_with_all_tensors_is_unfinished_until_it_is_closed(
    source: Path, out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file still ends with the padding to a whole sector."""
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)

    def stop(self: unfinished.Unfinished, done: int, digest: Digest | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished.Unfinished, "end", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], Options("one", split_max_size=SIZE))
    monkeypatch.undo()
    assert to_parts(source, out, "one", "--resume").status == 0
    assert contents(out) == expected["one"]
