"""`validate-kimi` as a user or a CI job runs it: reports, exit status, one clear line for bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
from random_checkpoint import VOCAB_SIZE, Spec, write_checkpoint

from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate import provenance
from kimi_gguf.validate.cli import main

SPEC = Spec(layers="KM", experts=8, experts_used=3, seed=31)
SHORT = ["--tokens", "40", "--generate", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint", SPEC)


@pytest.fixture
def gguf(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "model.gguf", TYPES["F32"])
    return tmp_path / "model.gguf"


@pytest.mark.engine
@pytest.mark.usefixtures("engine", "upstream")
def test_a_sound_file_passes_and_three_reports_are_written(
    gguf: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main([str(gguf), "--checkpoint", str(checkpoint), "--upstream", "--out", str(out), *SHORT]) == 0
    said = capsys.readouterr().out
    assert "note  The reference has perplexity " in said and "Perplexity depends on the text" in said
    assert "PASS" in said and "FAIL" not in said and str(out / "report.html") in said
    report = json.loads((out / "report.json").read_text())
    assert report["passed"] and report["ids"]["count"] == 44
    assert [run["variant"]["key"] for run in report["runs"]] == ["plain", "flash", "quiet"]
    assert [rival["title"] for rival in report["rivals"]] == ["upstream llama.cpp"]
    assert report["engine"]["kind"] == "patched" and report["tensors"]["proved"]
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "report.html").read_text()


@pytest.mark.engine
def test_one_wrong_weight_gives_status_1(
    gguf: Path, checkpoint: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = gguf_py.GGUFReader(gguf, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.attn_kv_a_norm.weight").data[3] += 1.0
    reader.data.flush()
    del reader
    out = tmp_path / "report"
    assert main([str(gguf), "--checkpoint", str(checkpoint), "--out", str(out), *SHORT]) == 1
    assert "FAIL  tensors that differ from the checkpoint: 1" in capsys.readouterr().out
    assert not json.loads((out / "report.json").read_text())["passed"]


@pytest.mark.engine
@pytest.mark.usefixtures("engine")
def test_a_quantized_cache_is_run_with_flash_attention_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp has no other attention for it; the option's case does not matter."""
    (tmp_path / "checkpoint").mkdir()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", Spec(rope=32))
    convert(checkpoint, tmp_path / "model.gguf", TYPES["Q4_0"])
    words = [str(tmp_path / "model.gguf"), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "report")]
    assert main([*words, *SHORT, "--cache-type", "q8_0", "--against", words[0]]) == 0
    assert "a Q8_0 cache requires flash attention: nothing else is run" in capsys.readouterr().err
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [run["variant"]["key"] for run in report["runs"]] == ["flash"]
    assert [run["variant"]["key"] for rival in report["rivals"] for run in rival["runs"]] == ["flash"]


@pytest.mark.parametrize("kind", ["Q9", "I8", "F64", "Q4_K", ""])
def test_a_type_that_no_cache_has_is_refused_at_once(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["absent.gguf", "--checkpoint", "absent", "--cache-type", kind])
    assert (
        f"--cache-type: expected one of F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL, found {kind!r}"
        in (capsys.readouterr().err)
    )


@pytest.mark.engine
def test_given_ids_are_compared_as_they_are(
    gguf: Path, checkpoint: Path, engine: Engine, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("5, 6 7\n300,301\n")
    out = tmp_path / "report"
    command = [str(gguf), "--checkpoint", str(checkpoint), "--ids", str(ids), "--generate", "0", "--quiet"]
    assert main([*command, "--threads", "1", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["ids"]["source"], report["ids"]["count"]) == ("ids.txt", 5)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("command", "replaced"), [("report", "a split"), ("card", "the file"), ("card", "the checkpoint")]
)
def test_a_file_that_is_replaced_while_it_is_measured_has_no_report(
    command: str,
    replaced: str,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The report would name the hashes of other bytes than those that were measured."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SPEC)
    hub = tmp_path / "hub"
    hub.mkdir()
    convert(
        checkpoint,
        hub / "x.gguf",
        TYPES["F32"],
        Options(split_max_size=1 << 18 if replaced == "a split" else None),
    )
    files = sorted(hub.glob("*.gguf"))
    target = max(checkpoint.glob("*.safetensors")) if replaced == "the checkpoint" else files[-1]
    hashed = provenance.checkpoint_facts if replaced == "the checkpoint" else provenance.gguf_facts

    def replace_after(*arguments: Any) -> Any:
        facts = hashed(*arguments)
        shutil.copy(target, tmp_path / "copy")
        (tmp_path / "copy").replace(target)
        return facts

    monkeypatch.setattr(provenance, hashed.__name__, replace_after)
    words = ["card", str(hub)] if command == "card" else [str(files[0]), "--out", str(hub / "validation")]
    words += ["--generate", "0"] if command == "report" else []
    assert main([*words, "--checkpoint", str(checkpoint), "--tokens", "40", "--threads", "1"]) == 2
    assert f"{target}: was replaced, changed or removed while" in capsys.readouterr().err
    assert sorted(hub.rglob("*")) == files


@pytest.fixture
def refused(
    gguf: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, bytes, str], None]:
    """Check that an option's file results in status 2, a last line that names it or the reason, and no report."""

    def check(name: str, content: bytes, said: str) -> None:
        given, out = tmp_path / "given", tmp_path / "report"
        given.write_bytes(content)
        command = [str(gguf), "--checkpoint", str(checkpoint), name, str(given), "--out", str(out)]
        assert main([*command, "--threads", "1"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("validate-kimi: error: ") and said in error
        assert not out.exists()

    return check


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("--ids", str(VOCAB_SIZE).encode(), f"0..{VOCAB_SIZE - 1}"),
        ("--text", b"", "expected at least one token, found none"),
    ],
)
def test_tokens_that_cannot_be_compared_give_status_2(
    engine: Engine, refused: Callable[[str, bytes, str], None], name: str, content: bytes, said: str
) -> None:
    refused(name, content, said)


@pytest.mark.engine
def test_a_checkpoint_of_another_shape_gives_status_2(
    gguf: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", replace(SPEC, layers="KMK"))
    assert main([str(gguf), "--checkpoint", str(other), "--threads", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not match the checkpoint's shape: blk.2." in error and "missing from the file" in error


@pytest.mark.engine
def test_a_file_of_another_model_cannot_be_compared_with(
    gguf: Path, checkpoint: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    convert(
        write_checkpoint(tmp_path / "checkpoint of other", replace(SPEC, layers="KMK")), other, TYPES["F32"]
    )
    command = [str(gguf), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "report")]
    assert main([*command, "--against", str(other), "--threads", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "other.gguf: blk.2.attn_norm.weight: expected no such tensor" in error
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--batch 4294967312",
        "--ubatch 0",
        "--tokens 1048577",
        "--threads 513",
        "--threads 2²",
        "--gpu-layers -1",
    ],
)
def test_numbers_that_llama_cpp_cannot_hold_give_status_2(
    words: str, gguf: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(gguf), "--checkpoint", str(checkpoint), *words.split()])
    assert caught.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "left"), [("", "no report was written"), ("card ", "finished reports are kept")]
)
def test_sigterm_ends_it_like_ctrl_c(
    command: str,
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A build of llama.cpp that it has started then ends, too."""
    monkeypatch.setattr("kimi_gguf.validate.cli._load_packages", lambda: signal.raise_signal(signal.SIGTERM))
    assert main([*command.split(), str(tmp_path), "--checkpoint", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith(f"validate-kimi: interrupted; {left}")


def test_a_folder_that_cannot_be_written_is_reported_first(
    gguf: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can make a folder in /proc."""
    assert main([str(gguf), "--checkpoint", str(checkpoint), "--out", "/proc/report"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/proc/report: the report cannot be written there" in error


@pytest.mark.parametrize("taken", ["a file", "a folder named as a report"])
def test_a_place_that_cannot_have_the_report_gives_status_2_at_once(
    taken: str, gguf: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    if taken == "a file":
        out.write_text("kept")
    else:
        (out / "report.md").mkdir(parents=True)
    assert main([str(gguf), "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error
    assert (
        out.read_text() == "kept"
        if taken == "a file"
        else [each.name for each in out.iterdir()] == ["report.md"]
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("--ids", b"1 two 3", "expected token ids (integers), found 'two'"),
        ("--ids", "1 ²".encode(), "expected token ids (integers), found '²'"),
        ("--ids", b"1 " + b"9" * 5000, "expected token ids (integers), found '99"),
        ("--ids", b" ", "expected token ids, found an empty file"),
        ("--text", b"\xff\xfe", "expected UTF-8 text"),
        ("--against", b"GGUF", "not a readable GGUF file"),
        ("--checkpoint", b"{}", "expected a checkpoint folder"),
    ],
)
def test_a_bad_file_gives_status_2_and_one_line_that_names_it(
    refused: Callable[[str, bytes, str], None], name: str, content: bytes, said: str
) -> None:
    refused(name, content, said)


def test_a_gguf_without_tensors_gives_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its type is that of no tensor."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    assert main([str(tmp_path / "x.gguf"), "--checkpoint", str(checkpoint)]) == 2
    assert "x.gguf: expected tensors, found none" in capsys.readouterr().err


def test_a_missing_or_damaged_gguf_gives_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (None, b"", b"GGUF\3\0\0\0" + bytes(8) + b"\xff" * 8):
        if content is not None:
            (tmp_path / "x.gguf").write_bytes(content)
        assert main([str(tmp_path / "x.gguf"), "--checkpoint", str(checkpoint)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("validate-kimi: error: ") and "x.gguf" in error and error.count("\n") == 1


def test_a_missing_package_of_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from kimi_gguf.validate.cli import main; sys.exit(main())"
    )
    for words in (["x.gguf", "--checkpoint", "x"], ["card", "x", "--checkpoint", "x"]):
        command = [sys.executable, "-c", code, *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert "torch is missing" in ended.stderr
        assert "[validate]" in ended.stderr
        assert "Traceback" not in ended.stderr
