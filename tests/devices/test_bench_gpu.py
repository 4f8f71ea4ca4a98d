"""tools/bench-gpu without a device: arguments, builds that do not end, folders for machines without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_gguf.engine import build as building
from kimi_gguf.engine.errors import EngineError, UnfinishedError
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


def test_a_damaged_state_file_makes_every_stage_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place("cpu", tmp_path, True, None)
    (stage,) = [each for each in stages(place) if each.name == "times-KDA_CONV"]
    (tmp_path / "times-KDA_CONV.json").write_text("{}")
    damaged = ("", "[1", "[]", json.dumps({"times-KDA_CONV": 3}), json.dumps({"times-KDA_CONV": {}}))
    for text in (*damaged, json.dumps({"times-KDA_CONV": {"inputs": {}, "sha256": "0"}})):
        (tmp_path / "stages.state").write_text(text)
        assert not Campaign(place).done(stage)
        said = f"bench-gpu: {tmp_path}/stages.state: damaged; all stages count as left\n"
        assert capsys.readouterr().err == (said if text in damaged else "")


def test_an_output_is_replaced_only_by_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("cpu", tmp_path, True, None)
    times, test = (next(each for each in stages(place) if each.group == group) for group in ("times", "test"))
    monkeypatch.setattr(Campaign, "inputs", lambda *_: {"builds": []})
    monkeypatch.setattr(Campaign, "engine", lambda *_, **__: SimpleNamespace(bin=tmp_path))
    campaign = Campaign(place)

    def wrote(text: str, status: int) -> None:
        def call(command: list[str], _limit: float, _name: str, output: Path | None = None, **_: str) -> None:
            (output or Path(command[-1])).write_text(text)
            if status:
                raise EngineError("ended with status 1")

        monkeypatch.setattr(bench_gpu, "call", call)

    for stage, complete in ((times, "{}"), (test, "3/3 tests passed\n")):
        wrote(complete, 0)
        campaign.run(stage, 1)
        assert campaign.done(stage)
        wrote("half", 1 if stage is times else 0)
        with pytest.raises(EngineError):
            campaign.run(stage, 1)
        assert Campaign(place).done(stage) and campaign.output(stage).read_text() == complete


def test_a_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--rehearse", "--list", "--out", str(tmp_path / "file")]) == 1
    assert f"bench-gpu: error: [Errno 17] File exists: '{tmp_path}/file'" in capsys.readouterr().err
    assert main(["--rehearse", "--stage", "page", "--out", str(tmp_path / "new")]) == 1
    assert f"{tmp_path}/new: no finished stage to draw; run the stages times" in capsys.readouterr().err


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


def test_an_interrupted_unpacking_of_wheels_is_repeated(tmp_path: Path) -> None:
    test_a_prepared_folder_replaces_the_network(tmp_path)
    packages = tmp_path / "source" / "packages"
    packages.rename(tmp_path / "source" / "packages.new")
    (tmp_path / "source" / "packages.new" / "sitecustomize.py").unlink()
    command = [ROOT / "tools/bench-gpu", "--source", tmp_path / "source", "--rehearse", "--list"]
    environment = os.environ | {"PYTHON": sys.executable, "KIMI_GGUF_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (packages / "sitecustomize.py").is_file() and not packages.with_name("packages.new").exists()


def test_packed_sources_are_taken_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "adopt_source", lambda pin, cache, packed: taken.append(packed))
    assert main(["--source", str(tmp_path), "--rehearse", "--list", "--out", str(tmp_path / "out")]) == 0
    assert taken == [tmp_path / "llama.cpp.tar.xz"]
