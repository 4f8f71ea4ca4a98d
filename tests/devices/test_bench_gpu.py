"""tools/bench-gpu without a device: arguments, builds that do not end, folders for machines without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kimi_gguf.engine.errors import UnfinishedError
from kimi_gguf.tools import bench_gpu
from kimi_gguf.tools.bench_gpu import Campaign, Place, main, stages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rehearse --stage tests", "no stage tests; expected: build test times model page build-patched"),
        ("--backend cuda", "no nvidia-smi, so no NVIDIA driver"),
        ("nothing.gguf", "nothing.gguf: no such file"),
        ("--limit soon", "argument --limit: 'soon': expected seconds, more than 0"),
        ("--total 0", "argument --total: '0': expected seconds, more than 0"),
        ("--limit nan", "argument --limit: 'nan': expected seconds, more than 0"),
        ("--limit inf", "argument --limit: 'inf': expected seconds, more than 0"),
    ],
)
def test_wrong_arguments_have_status_2(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        status: Any = main([*words.split(), "--out", str(tmp_path)])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_every_stage_of_a_device_is_an_argument_list_that_the_bench_accepts(tmp_path: Path) -> None:
    from kimi_gguf.scripts.kimi_llama import _parser

    for backend in ("cuda", "metal", "vulkan"):
        names = []
        for stage in stages(Place(backend, tmp_path, False, tmp_path / "model.gguf")):
            names.append(stage.name)
            if stage.group in ("times", "model"):
                parsed = _parser().parse_args(["bench", *stage.words])
                assert parsed.backend == backend
                assert (parsed.model is None) == (stage.group == "times")
        assert len(set(names)) == len(names) == 20


def test_a_build_that_does_not_end_leaves_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = []

    def ensure(*_: object, limit: float, **__: object) -> None:
        limits.append(limit)
        raise UnfinishedError("llama.cpp is not compiled after 7 s", todo="build again: it continues")

    monkeypatch.setattr(bench_gpu, "ensure", ensure)
    monkeypatch.setattr(Campaign, "engine", lambda *_, **__: None)
    out = ["--rehearse", "--out", str(tmp_path)]
    assert main([*out, "--limit", "7", "--stage", "build", "--stage", "test-KDA_CONV"]) == 3
    assert limits == [7]
    printed = capsys.readouterr()
    assert "left: build-patched build-upstream test-KDA_CONV" in printed.out and "it continues" in printed.err
    assert main([*out, "--stage", "times-KDA_CONV"]) == 1
    assert "times-KDA_CONV: there is no build; run the stage build first" in capsys.readouterr().err


def test_prepare_packs_the_sources_and_downloads_what_bench_gpu_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1)

    monkeypatch.setattr(
        bench_gpu.building, "pack_source", lambda pin, cache, packed, reporter: packed.touch()
    )
    monkeypatch.setattr(bench_gpu.subprocess, "run", run)
    assert main(["--prepare", str(tmp_path / "new"), "--python", "3.12"]) == 0
    assert (tmp_path / "new" / "llama.cpp.tar.xz").is_file()
    (command,) = commands
    assert command[command.index("--python-version") + 1] == "3.12" and "--only-binary=:all:" in command
    for package in ("numpy", "gguf", "cmake", "ninja"):
        assert any(word.startswith(package) for word in command)
    assert not any(word.startswith(("torch", "matplotlib")) for word in command)
    assert main(["--prepare", str(tmp_path / "new")]) == 1
    assert "pip could not download" in capsys.readouterr().err


def test_a_prepared_folder_replaces_the_network(tmp_path: Path) -> None:
    wheel = tmp_path / "source" / "wheels" / "onlyhere-1-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as file:
        # Python imports it when it starts
        file.writestr("sitecustomize.py", "import sys; print('the folder is used', file=sys.stderr)")
        file.writestr("onlyhere-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1\n")
        file.writestr(
            "onlyhere-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("onlyhere-1.dist-info/RECORD", "")
    command = [ROOT / "tools/bench-gpu", "--source", tmp_path / "source", "--rehearse", "--list"]
    environment = os.environ | {"PYTHON": sys.executable, "KIMI_GGUF_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 1 and "the folder is used" in ended.stderr
    assert f"{tmp_path}/source/llama.cpp.tar.xz: no such file" in ended.stderr and "--prepare" in ended.stderr


@pytest.mark.parametrize("form", ["--source {}", "--source={}"])
@pytest.mark.parametrize(("folder", "wrong"), [("", "no wheels in it"), ("/missing", "no such folder")])
def test_a_folder_without_wheels_is_refused(form: str, folder: str, wrong: str, tmp_path: Path) -> None:
    source = f"{tmp_path}{folder}"
    command = [ROOT / "tools/bench-gpu", *form.format(source).split(), "--list"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"{source}: {wrong}; write it on a machine with a network" in ended.stderr
