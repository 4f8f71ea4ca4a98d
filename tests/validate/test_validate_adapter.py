"""`validate-kimi --adapter`: the reference has the adapter; the file has it merged, or runs with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_ling3
import torch
from random_peft import write_adapter

from kimi_gguf.convert.adapter.gguf import convert_adapter
from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.validate.cli import main

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine", "one_core")]
SHORT = ("--tokens", "48", "--generate", "4", "--threads", "1", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an MTP layer, its adapter and their files, in F32."""
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "base").mkdir()
    random_ling3.write_checkpoint(folder / "base", random_ling3.LingSpec(mtp=True, dtype=torch.float32))
    write_adapter(folder / "adapter", folder / "base")
    convert(folder / "base", folder / "base.gguf", TYPES["F32"])
    convert(
        folder / "base", folder / "merged.gguf", TYPES["F32"], Options(adapters=((folder / "adapter", 0.5),))
    )
    convert_adapter(folder / "adapter", folder / "base", folder / "adapter.gguf")
    return folder


@pytest.mark.parametrize(
    ("file", "words", "status"),
    [
        ("merged.gguf", ["--adapter", "adapter:0.5"], 0),
        ("base.gguf", ["--adapter", "adapter:0.5", "--lora", "adapter.gguf:0.5"], 0),
        ("base.gguf", ["--adapter", "adapter:0.5", "--lora", "adapter.gguf:0.4"], 1),
        ("base.gguf", ["--adapter", "adapter:0.5"], 1),
        ("merged.gguf", [], 1),
    ],
)
def test_the_gates_hold_for_the_file_with_the_adapter_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: list[str], status: int
) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "report"
    assert main([file, "--checkpoint", "base", *words, "--out", str(out), *SHORT]) == status
    report = json.loads((out / "report.json").read_text())
    assert [(adapter["name"], adapter["scale"]) for adapter in report["checkpoint"].get("adapters", [])] == [
        ("adapter", 0.5) for word in words if word == "--adapter"
    ]
    assert [adapter["name"] for adapter in report["gguf"].get("lora", [])] == [
        "adapter.gguf" for word in words if word == "--lora"
    ]
    assert str(folder) not in (out / "report.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "adapter.gguf"], "--lora: the reference has no adapter"),
        (["--adapter", "adapter", "--lora", "absent.gguf"], "absent.gguf"),
        (["--adapter", "absent"], "absent"),
    ],
)
def test_wrong_adapters_are_refused_at_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert main(["base.gguf", "--checkpoint", "base", *words, "--out", str(tmp_path / "out"), *SHORT]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
