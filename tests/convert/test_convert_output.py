"""The output file: complete or missing, never in place of another file, and preceded by a plan."""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import (
    Run,
    assert_refused,
    convert,
    edited_tensors,
    fresh_checkpoint,
    gguf_types,
    start_convert,
)
from gguf import GGUFReader
from random_checkpoint import Spec

from kimi_gguf.convert.conversion import convert as convert_in_python
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.writer import ProgressCallback
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.types.file_types import TYPES

SPEC = Spec(layers="KM")
# Takes long enough to write that a signal arrives in the middle: 40 MB of F32.
LARGE = Spec(layers="KM", hidden=512, intermediate=4096, moe_intermediate=512, experts=8, seed=3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_in_the_middle_leaves_no_file(tmp_path: Path, out: Path, number: signal.Signals) -> None:
    source = fresh_checkpoint(tmp_path / "model", LARGE)
    for _ in range(20):
        # If the tests run in the background, signals may be ignored, which a child process inherits.
        heed = partial(signal.signal, number, signal.SIG_DFL)
        process = start_convert(source, "-o", out / "x.gguf", "--type", "Q8_0", preexec_fn=heed)
        deadline = time.monotonic() + 60
        while not list(out.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        (out / "x.gguf").unlink()  # the conversion finished before the signal
    assert process.returncode == 130
    kept = {file.name for file in out.iterdir()}
    if "kept" in err:  # a step was finished already
        assert err == "convert-kimi: interrupted; continue with --resume (.x.gguf.unfinished is kept)\n"
        assert kept == {".x.gguf.unfinished"}
    else:
        assert err == "convert-kimi: interrupted; nothing was written\n" and kept == set()


def test_under_nohup_a_hangup_is_ignored(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", LARGE)
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = start_convert(source, "-o", out / "x.gguf", preexec_fn=ignore)
    while not list(out.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and [file.name for file in out.iterdir()] == ["x.gguf"]


def test_a_full_disk_in_the_middle_leaves_no_file(source: Path, out: Path) -> None:
    """A limit on the file size has the same effect as a full disk: a write in the middle fails."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start_convert(source, "-o", out / "x.gguf", preexec_fn=limit)
    run = Run(process.wait(timeout=60), "", process.communicate()[1])
    assert_refused(run, out, "x.gguf", "cannot be written", "nothing was written")


def test_a_current_directory_that_was_removed_is_an_error(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir fails there with ENOENT, as if another process had removed the folder of the unfinished output."""
    gone = out / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    process = start_convert(source.resolve(), "-o", "x.gguf")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "x.gguf: cannot be written" in said


def test_a_small_disk_is_reported_first(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "1,000 bytes free", "free disk space")


def test_an_existing_file_is_kept_unless_forced(source: Path, out: Path) -> None:
    (out / "x.gguf").write_text("precious")
    run = convert(source, "-o", out / "x.gguf")
    assert run.status == 1 and "--force" in run.err
    assert (out / "x.gguf").read_text() == "precious"
    assert convert(source, "-o", out / "x.gguf", "--force").status == 0
    assert GGUFReader(out / "x.gguf").get_field("general.architecture") is not None


def test_a_file_made_by_someone_else_meanwhile_is_kept(source: Path, out: Path) -> None:

    @contextlib.contextmanager
    def meanwhile(plan: Plan) -> Iterator[ProgressCallback]:
        (out / "x.gguf").write_text("precious")
        yield lambda tensor, nbytes: None

    with pytest.raises(ConvertError, match=r"created by another program.* --resume --force"):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], progress=meanwhile)
    assert {file.name for file in out.iterdir()} == {".x.gguf.unfinished", "x.gguf"}
    assert (out / "x.gguf").read_text() == "precious"
    assert convert(source, "-o", out / "x.gguf", "--resume", "--force").status == 0
    assert [GGUFReader(file).get_field("split.count") for file in out.iterdir()] == [None]


def test_a_forced_but_failing_run_keeps_the_existing_file(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", Spec(layers="KM", std=1e6, dtype=torch.float32))
    (out / "x.gguf").write_text("precious")
    run = convert(source, "-o", out / "x.gguf", "--force", "--type", "F16")
    assert run.status == 1 and "F16" in run.err
    assert [file.name for file in out.iterdir()] == ["x.gguf"]
    assert (out / "x.gguf").read_text() == "precious"


def test_a_folder_that_is_missing_or_the_output_is_refused(tmp_path: Path, source: Path, out: Path) -> None:
    assert_refused(convert(source, "-o", out / "no" / "x.gguf"), out, "folder does not exist")
    assert_refused(convert(source, "-o", tmp_path, "--force"), out, "found a folder")


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json", "tiktoken.model"],
)
def test_a_file_of_the_checkpoint_is_never_overwritten(tmp_path: Path, source: Path, name: str) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    link = tmp_path / "link.gguf"
    link.symlink_to(source / name)
    for output in (source / name, link):
        run = convert(source, "-o", output, "--force")
        assert run.status == 1 and "file of the checkpoint" in run.err
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_output_into_the_checkpoints_own_folder(source: Path) -> None:
    assert convert(source, "-o", source / "x.gguf").status == 0
    assert convert(source, "-o", source / "x.gguf", "--force").status == 0


def test_the_file_has_ordinary_permissions(source: Path, out: Path) -> None:
    (out / "plain").touch()
    assert convert(source, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").stat().st_mode == (out / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_plan_is_what_is_written(source: Path, out: Path, kind: str) -> None:
    plan = convert(source, "--dry-run", "--type", kind)
    assert plan.status == 0 and plan.err == "" and list(out.iterdir()) == []
    assert convert(source, "-o", out / "x.gguf", "--type", kind).status == 0
    rows = [line.split() for line in plan.out.splitlines()[1:-1]]
    reader = GGUFReader(out / "x.gguf")
    planned = {row[0]: row[1] for row in rows}
    assert planned == gguf_types(out / "x.gguf")
    for row, tensor in zip(rows, reader.tensors, strict=True):
        shape = "".join(row[2 : row.index(f"{tensor.n_bytes:,}")])
        assert shape == "x".join(str(n) for n in tensor.shape), tensor.name
    assert f"{(out / 'x.gguf').stat().st_size:,} bytes" in plan.out.splitlines()[-1]


def test_the_plan_names_every_source_once_per_use(source: Path) -> None:
    text = convert(source, "--dry-run").out
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.A_log (-exp)",
        "model.layers.1.self_attn.kv_b_proj.weight (k part, transposed per head)",
        "experts.0.w1.weight .. model.layers.1.block_sparse_moe.experts.3.w1.weight",
    ):
        assert name in text


def test_rows_that_are_not_whole_blocks_stay_f16_and_are_said(tmp_path: Path, out: Path) -> None:
    """A head size of 16 and an expert width of 48 are not multiples of 32."""
    spec = Spec(layers="KM", kda_head_dim=16, moe_intermediate=48, heads=4, nope=16)
    source = fresh_checkpoint(tmp_path / "model", spec)
    run = convert(source, "-o", out / "x.gguf", "--type", "Q8_0")
    assert run.status == 0 and "tensors stay F16" in run.err
    types = gguf_types(out / "x.gguf")
    fallen = {name for name, kind in types.items() if kind == "F16"}
    assert fallen == {
        "blk.0.ssm_f_b.weight",
        "blk.0.ssm_g_b.weight",
        "blk.1.attn_k_b.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.1.ffn_down_shexp.weight",
    }


def test_what_unpatched_llama_cpp_cannot_run_is_said(tmp_path: Path) -> None:
    lora = fresh_checkpoint(tmp_path / "lora", Spec(layers="KM", q_lora=16))
    assert "q_lora_rank" in convert(lora, "--dry-run").out
    only_kda = fresh_checkpoint(tmp_path / "kda", Spec(layers="KK"))
    assert "all layers are KDA" in convert(only_kda, "--dry-run").out
    assert "note" not in convert(fresh_checkpoint(tmp_path / "m", SPEC), "--dry-run").out


def test_gate_parameters_that_were_rounded_on_saving_are_said(single: Path) -> None:
    """As transformers does with `from_pretrained(dtype=torch.bfloat16)`; the published parameters are F32."""
    with edited_tensors(single / "model.safetensors") as tensors:
        name = "model.layers.0.self_attn.A_log"
        _, shape, content = tensors[name]
        halves = np.frombuffer(content, np.uint16)[1::2]
        tensors[name] = ("BF16", shape, halves.tobytes())
    run = convert(single, "--dry-run")
    assert run.status == 0
    assert run.out.splitlines()[-1].startswith("note: 1 gate parameters are not F32") and name in run.out


def test_quiet_prints_nothing_and_the_rest_goes_to_standard_error(source: Path, out: Path) -> None:
    quiet = convert(source, "-o", out / "a", "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")
    told = convert(source, "-o", out / "b")
    assert told.out == "" and "tensors" in told.err


def test_progress_is_plain_lines_without_a_terminal(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_gguf.convert.progress.PLAIN_INTERVAL", 0)
    lines = convert(source, "-o", out / "x.gguf").err.splitlines()
    assert " % (output.weight), " in lines[0] and lines[0].endswith(" left")
    assert lines[-2].startswith("convert-kimi: 100 % (blk.1.ffn_up_shexp.weight), ")
    assert lines[-2].endswith(" MB/s, 0 s left")
    percents = [int(line.split()[1]) for line in lines[:-1]]
    assert percents == sorted(percents)


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", LARGE)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kimi_gguf.convert.cli", str(source), "-o", str(out / "x.gguf")]
    process = subprocess.Popen(command, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed when the process ends
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert "\u2501".encode() in shown and b"MB" in shown and b"x.gguf" in shown


@pytest.mark.parametrize("arguments", [[], ["model"], ["model", "-o", "x", "--type", "Q9_9"], ["--frob"]])
def test_wrong_arguments_end_with_2_and_usage(arguments: list[str]) -> None:
    run = convert(*arguments)
    assert run.status == 2 and run.err.startswith("usage: convert-kimi") and run.out == ""


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, out: Path) -> None:
    assert_refused(convert(tmp_path / "no", "-o", out / "x.gguf"), out, "not found")
    (tmp_path / "empty").mkdir()
    assert_refused(
        convert(tmp_path / "empty", "-o", out / "x.gguf"), out, ".safetensors files, found nothing"
    )
    (tmp_path / "x.txt").touch()
    assert_refused(convert(tmp_path / "x.txt", "-o", out / "x.gguf"), out, "expected a checkpoint folder")


def test_a_pipe_is_refused_without_waiting(single: Path, out: Path) -> None:
    """Opening a pipe would wait for a writer that does not exist."""
    for name in ("model.safetensors", "config.json"):
        content = (single / name).read_bytes()
        (single / name).unlink()
        os.mkfifo(single / name)
        assert_refused(convert(single, "-o", out / "x.gguf"), out, name, "found a pipe")
        (single / name).unlink()
        (single / name).write_bytes(content)


def test_a_name_that_is_not_text_is_refused(source: Path, out: Path) -> None:
    assert_refused(convert(source, "-o", out / "x.gguf", "--name", "\udcff"), out, "expected valid text")


def test_progress_that_nobody_reads_is_no_fault_of_the_disk(source: Path, out: Path) -> None:
    @contextlib.contextmanager
    def unread(plan: Plan) -> Iterator[ProgressCallback]:
        def report(tensor: PlannedTensor, nbytes: int) -> None:
            raise BrokenPipeError

        yield report

    with pytest.raises(BrokenPipeError):
        convert_in_python(source, out / "x.gguf", TYPES["BF16"], progress=unread)
    assert list(out.iterdir()) == []


def test_the_command_is_installed(source: Path, out: Path) -> None:
    command = shutil.which("convert-kimi", path=str(Path(sys.executable).parent))
    assert command is not None
    subprocess.run([command, source, "-o", out / "x.gguf"], check=True, capture_output=True)
    assert (out / "x.gguf").exists()
