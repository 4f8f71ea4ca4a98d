"""However a conversion ends, no invalid file has the output's name, and --resume completes it with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from convert_tools import convert, fresh_checkpoint, killed_conversions, split_safetensors, start_convert
from random_checkpoint import Spec

from kimi_gguf.convert.conversion import Options, plan_only
from kimi_gguf.convert.conversion import convert as convert_in_python
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output import growing, unfinished
from kimi_gguf.convert.output.writer import ProgressCallback
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.file_hash import Digest
from kimi_gguf.engine.tensor_types import Bytes

SPEC = Spec(layers="KKM", hidden=128, experts=16, seed=40)
KEPT = {".x.gguf.unfinished"}


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> bytes:
    assert convert(source, "-o", tmp_path / "whole.gguf").status == 0
    return (tmp_path / "whole.gguf").read_bytes()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is entered in the journal, not only one per second."""
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def stop_after(
    tensors: int, act: Callable[[], None]
) -> Callable[[Plan], contextlib.AbstractContextManager[ProgressCallback]]:
    """Progress that calls a function when this number of tensors have begun to be written."""

    @contextlib.contextmanager
    def progress(plan: Plan) -> Iterator[ProgressCallback]:
        seen: set[str] = set()

        def report(tensor: object, nbytes: int) -> None:
            seen.add(str(getattr(tensor, "name", "")))
            if len(seen) == tensors:
                act()

        yield report

    return progress


def stop_in(name: str, chunks: int) -> Callable[[Plan], contextlib.AbstractContextManager[ProgressCallback]]:
    """Progress that interrupts when this number of chunks of a tensor are written; each expert is one."""

    @contextlib.contextmanager
    def progress(plan: Plan) -> Iterator[ProgressCallback]:
        left = iter(range(chunks - 1))

        def report(tensor: PlannedTensor, nbytes: int) -> None:
            if tensor.name == name and next(left, None) is None:
                assert nbytes < tensor.nbytes
                interrupt()

        yield report

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(source: Path, out: Path, kind: str = "BF16", after: int = 30) -> None:
    """Leave an unfinished file."""
    with pytest.raises(KeyboardInterrupt):
        convert_in_python(source, out / "x.gguf", TYPES[kind], progress=stop_after(after, interrupt))
    assert names(out) == KEPT


def assert_resumes(source: Path, out: Path, expected: bytes) -> None:
    """`--resume` succeeds with the bytes of an uninterrupted conversion."""
    assert convert(source, "-o", out / "x.gguf", "--resume").status == 0
    assert (out / "x.gguf").read_bytes() == expected and names(out) == {"x.gguf"}


@pytest.mark.parametrize(
    "kind, kills",
    [
        ("BF16", 60),
        pytest.param("BF16", 100, marks=pytest.mark.full),
        pytest.param("Q4_K_M", 30, marks=pytest.mark.engine),
    ],
)
def test_killed_at_random_instants(tmp_path: Path, source: Path, out: Path, kind: str, kills: int) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert convert(source, "-o", whole / "x.gguf", "--type", kind, "--name", "whole").status == 0
    found = killed_conversions(source, out / "x.gguf", kills, kind, 0, whole)
    assert found["wrong"] == 0 and found["killed"] == kills and found["refused"] == 0
    assert found["resumed"] > kills // 4, "too few were killed in the middle"
    assert names(out) == {"x.gguf"}


def test_after_an_interrupt_resume_goes_on(
    source: Path, out: Path, expected: bytes, noted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, out)
    read: list[str] = []
    elements = unfinished.Unfinished.finished

    def count(self: unfinished.Unfinished, done: int, digest: Digest | None = None) -> None:
        read.append(str(done))
        elements(self, done, digest)

    monkeypatch.setattr(unfinished.Unfinished, "finished", count)
    assert_resumes(source, out, expected)
    assert int(read[0]) >= 29, "it started again"


@pytest.mark.parametrize("after", [2, 30])
def test_the_card_of_a_resumed_file_has_its_hash(
    source: Path, out: Path, expected: bytes, noted: None, after: int
) -> None:
    """Of what both runs wrote."""
    interrupted(source, out, after=after)
    assert convert(source, "-o", out / "x.gguf", "--resume", "--model-card").status == 0
    assert (out / "x.gguf").read_bytes() == expected
    assert f"| `{hashlib.sha256(expected).hexdigest()}` |" in (out / "README.md").read_text()


@pytest.mark.parametrize("size", [[], ["--split-max-size", "200K"]])
def test_a_card_does_not_certify_kept_bytes_that_changed(
    source: Path, out: Path, noted: None, size: list[str]
) -> None:
    """Also in a split that is complete. The next run begins anew."""
    words = ["-o", out / "x.gguf", "--model-card", *size]
    options = Options(card=("convert-kimi", "a", "-o", "x.gguf"), split_max_size=200_000 if size else None)
    with pytest.raises(KeyboardInterrupt):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], options, progress=stop_after(30, interrupt))
    kept = min((out / ".x.gguf.unfinished").glob("*.gguf"))
    content = bytearray(kept.read_bytes())
    content[150_000] ^= 1
    kept.write_bytes(content)
    run = convert(source, *words, "--resume")
    assert run.status == 1 and f"{kept}: expected SHA-256" in run.err and not names(out)
    assert convert(source, *words, "--resume").status == 0


def test_resume_reads_and_writes_only_what_is_left(
    source: Path, out: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the experts of a layer: only the tensor that was being written is begun again."""
    stopped = "blk.1.ffn_down_exps.weight"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished, "SYNC_SECONDS", 0)
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], progress=stop_in(stopped, SPEC.experts // 2))
    plan = plan_only(source, TYPES["BF16"])
    left = [tensor.name for tensor in plan.tensors]
    left = left[left.index(stopped) :]
    assert len(left) > 10, "too little is left to tell from reading all of it"
    names = {name for t in plan.tensors if t.name in left for name, _ in t.output.inputs}
    headers, to_read = 0, 0
    for shard in source.glob("*.safetensors"):
        header, data = split_safetensors(shard)
        headers += shard.stat().st_size - len(data)
        spans = [entry["data_offsets"] for name, entry in header.items() if name in names]
        to_read += sum(end - begin for begin, end in spans)
    to_write = sum(tensor.nbytes for tensor in plan.tensors if tensor.name in left)

    read: list[int] = []
    written: list[int] = []
    preadv, write_all = os.preadv, growing._write_all

    def count_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(fd, buffers, offset))
        return read[-1]

    def count_written(fd: int, data: Bytes, offset: int) -> None:
        written.append(len(data))
        write_all(fd, data, offset)

    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 60)  # each entry in the journal writes a buffer again
    monkeypatch.setattr(os, "preadv", count_read)
    monkeypatch.setattr(growing, "_write_all", count_written)
    convert_in_python(source, out / "x.gguf", TYPES["BF16"], Options(resume=True))
    assert (out / "x.gguf").read_bytes() == expected
    assert to_read <= sum(read) <= to_read + 2 * headers  # read again at the end
    padding = 32 * len(left) + 2 * growing.SECTOR
    assert to_write <= sum(written) <= to_write + padding


def test_what_an_interrupted_run_left_is_discarded_only_with_force(
    source: Path, out: Path, expected: bytes, noted: None
) -> None:
    interrupted(source, out)
    kept = out / ".x.gguf.unfinished" / "x.gguf"
    before = kept.read_bytes()
    run = convert(source, "-o", out / "x.gguf")
    assert run.status == 1 and f"{kept.parent}: keeps {len(before):,} bytes of an earlier run" in run.err
    assert "--resume continues it" in run.err and "--force discards it" in run.err
    assert convert(source, "--dry-run", "-o", out / "x.gguf").status == 0
    assert kept.read_bytes() == before and names(out) == KEPT
    run = convert(source, "-o", out / "x.gguf", "--force", "--name", "another")
    assert run.status == 0 and "discarding .x.gguf.unfinished of an earlier run" in run.err
    assert (out / "x.gguf").read_bytes() != expected and names(out) == {"x.gguf"}


def test_a_run_that_was_killed_before_it_wrote_data_is_no_obstacle(
    source: Path, out: Path, expected: bytes
) -> None:
    (out / ".x.gguf.unfinished").mkdir()
    (out / ".x.gguf.unfinished" / "journal").write_bytes(b"")
    assert convert(source, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected and names(out) == {"x.gguf"}


def test_resume_with_nothing_there_begins(source: Path, out: Path, expected: bytes) -> None:
    assert_resumes(source, out, expected)


@pytest.mark.parametrize("change", [["--type", "F16"], ["--name", "another"]], ids=lambda words: words[0])
def test_resume_with_other_options_is_refused(
    source: Path, out: Path, noted: None, change: list[str]
) -> None:
    interrupted(source, out)
    run = convert(source, "-o", out / "x.gguf", "--resume", *change)
    assert run.status == 1 and "other options" in run.err
    assert "start again without --resume but with --force" in run.err
    assert names(out) == KEPT, "an unfinished output that could be resumed is kept"


def test_resume_from_another_checkpoint_is_refused(
    tmp_path: Path, source: Path, out: Path, noted: None
) -> None:
    interrupted(source, out)
    other = fresh_checkpoint(tmp_path / "other" / "model", SPEC)
    run = convert(other, "-o", out / "x.gguf", "--resume")
    assert run.status == 1 and "is of another checkpoint" in run.err and names(out) == KEPT


@pytest.mark.parametrize(
    "journal", [b"", b"nonsense\n", b'{"format": 9}\n', b"[]\n", b"\xff\xfe\n"], ids=repr
)
def test_an_invalid_journal_is_refused(source: Path, out: Path, noted: None, journal: bytes) -> None:
    interrupted(source, out)
    (out / ".x.gguf.unfinished" / "journal").write_bytes(journal)
    run = convert(source, "-o", out / "x.gguf", "--resume")
    assert run.status == 1 and ".x.gguf.unfinished/journal" in run.err and "Traceback" not in run.err
    todo = "start again without --resume but with --force, or remove .x.gguf.unfinished\n"
    assert run.err.endswith(todo)


def test_an_unfinished_file_shorter_than_its_journal_says_is_refused(
    source: Path, out: Path, noted: None
) -> None:
    interrupted(source, out)
    os.truncate(out / ".x.gguf.unfinished" / "x.gguf", 10_000)
    run = convert(source, "-o", out / "x.gguf", "--resume")
    assert run.status == 1 and "found 10000" in run.err


def test_the_last_line_of_a_journal_may_be_torn(
    source: Path, out: Path, expected: bytes, noted: None
) -> None:
    interrupted(source, out)
    journal = out / ".x.gguf.unfinished" / "journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert_resumes(source, out, expected)


def test_a_full_disk_is_survived(tmp_path: Path, source: Path, out: Path, expected: bytes) -> None:
    """A limit on the file size has the same effect as a full disk: a write in the middle fails."""
    command = "from kimi_gguf.convert import cli; from kimi_gguf.convert.output import unfinished; "
    command += "unfinished.SYNC_SECONDS = 0; raise SystemExit(cli.main())"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, len(expected) // 2))

    done = subprocess.run(
        [sys.executable, "-c", command, source, "-o", out / "x.gguf"],
        preexec_fn=limit, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be written" in done.stderr and "continue with --resume" in done.stderr
    assert names(out) == KEPT
    assert_resumes(source, out, expected)


def test_a_failing_disk_under_the_checkpoint_is_survived(
    source: Path, out: Path, expected: bytes, noted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_preadv, reads = os.preadv, 0

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal reads
        reads += 1
        if reads > 120:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    run = convert(source, "-o", out / "x.gguf")
    assert run.status == 1 and re.search(r"\.safetensors: '.*': cannot be read: Input/output error", run.err)
    assert names(out) == KEPT
    monkeypatch.undo()
    assert_resumes(source, out, expected)


def swap(source: Path) -> None:
    """Another file with the same name, which differs only in its content."""
    shard = source / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    (source / "new").write_bytes(content)
    (source / "new").replace(shard)


def write_into(source: Path) -> None:
    with (source / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))  # differs even if the clock is coarse


def remove(source: Path) -> None:
    (source / "model-00001-of-00002.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("change", [swap, write_into, remove], ids=lambda change: change.__name__)
@pytest.mark.parametrize("after", [1, 20, 55])
def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    source: Path, out: Path, change: Callable[[Path], None], after: int
) -> None:
    progress = stop_after(after, lambda: change(source))
    with pytest.raises(ConvertError, match=r"\.safetensors: was changed while it was read"):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], progress=progress)
    assert names(out) == set()


def test_two_runs_into_one_name_do_not_mix(source: Path, out: Path, expected: bytes) -> None:
    refused: list[str] = []

    def second() -> None:
        if not refused:
            run = convert(source, "-o", out / "x.gguf", "--resume")
            refused.append(run.err)

    convert_in_python(source, out / "x.gguf", TYPES["BF16"], progress=stop_after(10, second))
    assert len(refused) == 1 and "another conversion is writing it" in refused[0]
    assert (out / "x.gguf").read_bytes() == expected and names(out) == {"x.gguf"}


def test_two_processes_started_together_do_not_mix(source: Path, out: Path, expected: bytes) -> None:
    processes = [start_convert(source, "-o", out / "x.gguf") for _ in range(4)]
    statuses = [(p.communicate(timeout=120)[1], p.returncode) for p in processes]
    assert 0 in [status for _, status in statuses]
    refusals = ("another conversion", "already exists", "during the conversion")
    for err, status in statuses:
        assert status == 0 or any(refusal in err for refusal in refusals)
    assert (out / "x.gguf").read_bytes() == expected and names(out) == {"x.gguf"}


def test_where_the_page_cache_cannot_be_bypassed_the_bytes_are_the_same(
    source: Path, out: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "_bypass_cache", lambda fd, wanted: False)
    assert convert(source, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected


@pytest.mark.parametrize("buffer", [4096, 12288])
def test_the_size_of_the_buffer_does_not_change_the_output(
    source: Path, out: Path, expected: bytes, noted: None, monkeypatch: pytest.MonkeyPatch, buffer: int
) -> None:
    monkeypatch.setattr(growing, "BUFFER", buffer)
    interrupted(source, out, after=40)
    assert_resumes(source, out, expected)


def test_unfinished_files_are_on_the_disk_of_the_output(source: Path, out: Path, noted: None) -> None:
    """The hidden folder is next to the output: a rename suffices, and the free space was checked on this disk."""
    interrupted(source, out)
    assert (out / ".x.gguf.unfinished" / "x.gguf").stat().st_dev == out.stat().st_dev
    shutil.rmtree(out)
    out.mkdir()
    assert convert(source, "-o", out / "x.gguf", "--resume").status == 0
