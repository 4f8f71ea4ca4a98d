"""Builds: complete or missing, made once; the upstream build uses the same scratch folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from ggml_variant import require_tools
from shell_program import write_program

from kimi_gguf.engine import build as building
from kimi_gguf.engine import builds, toolchain
from kimi_gguf.engine.build_spec import make_build_spec
from kimi_gguf.engine.errors import EngineError, UnfinishedError
from kimi_gguf.engine.progress import Silent
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.tools import release


@pytest.fixture
def tiny(tmp_path: Path) -> tiny_llama.Tiny:
    return tiny_llama.make(tmp_path)


def answer(place: Path) -> str:
    """The output of the build's llama-cli."""
    return subprocess.run([str(place / "bin/llama-cli")], capture_output=True, text=True, check=True).stdout


def names(folder: Path) -> list[str]:
    """All names in a folder, including hidden files; empty if the folder does not exist."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refused(tiny: tiny_llama.Tiny, reason: str, **options: Any) -> str:
    """The message of a build that is refused for this reason; no files are left."""
    with pytest.raises(KimiError, match=reason) as caught:
        tiny.build(**options)
    assert names(tiny.cache.engines) == names(tiny.cache.work) == []
    return str(caught.value)


def test_patched_and_upstream_differ_and_each_loads_its_own_library(
    tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched, upstream = tiny.build(), tiny.build(upstream=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(upstream / "lib"))
    commit = tiny.pin.short_commit
    assert answer(patched) == f"{commit}-kimi-{tiny.series.digest()[:8]} answer 2\n"
    assert answer(upstream) == f"{commit} answer 1\n"
    assert (patched / "python/llama_cpp/__init__.py").is_file()
    assert names(patched.parent) == sorted([patched.name, upstream.name])


def test_the_upstream_build_compiles_only_what_the_patches_touch(
    tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", without(shutil.which, "ccache"))
    tiny.build()
    log = (tiny.build(upstream=True) / "build.log").read_text()
    assert "answer.cpp" in log
    assert "steady.cpp" not in log


def test_tests_are_added_to_a_build_that_has_none(tiny: tiny_llama.Tiny) -> None:
    place = tiny.build()
    assert "test-unicode" not in names(place / "bin")
    for tests in (True, False):
        assert tiny.build(tests=tests) == place
        assert {"llama-cli", "test-unicode"} <= set(names(place / "bin"))
    assert building.read_manifest(place)["tests"] is True  # type: ignore[index]


def test_a_tree_other_than_the_pinned_one_is_not_built(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    write = tmp_path / "ops/llama/tiny/kimi.h"
    write.write_text(write.read_text().replace("2", "3"))
    changed = tiny_llama.load(tmp_path, patched=tiny.pin.patched_tree_sha256)
    assert tiny.pin.patched_tree_sha256 in refused(changed, "not the pinned one")


def test_code_that_does_not_compile_leaves_only_a_log(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path, patch=tiny_llama.PATCH.replace("KIMI_ANSWER;", "KIMI_ANSWER + oops;"))
    patched = tmp_path / "patched/src/answer.cpp"
    patched.write_text(patched.read_text().replace("KIMI_ANSWER;", "KIMI_ANSWER + oops;"))
    tiny = tiny_llama.load(tmp_path)
    said = refused(tiny, "does not compile")
    (log,) = tiny.cache.logs.iterdir()
    assert "oops" in said and str(log) in said


def without(which: object, *missing: str) -> object:
    """`shutil.which` on a machine where some programs are missing."""
    return lambda name, *args, **kw: None if Path(name).name in missing else which(name, *args, **kw)  # type: ignore[operator]


def test_a_missing_compiler_is_named(tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", without(shutil.which, "c++", "g++", "clang++"))
    assert "install" in refused(tiny, r"no C\+\+ compiler found")
    assert names(tiny.cache.root) == []


def test_a_missing_build_tool_is_named(tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(toolchain.shutil, "which", without(shutil.which, "ninja"))
    assert "pip install" in refused(tiny, "ninja is not installed")


def test_a_full_disk_is_said_before_the_work_begins(
    tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5, 5))
    assert "KIMI_GGUF_CACHE" in refused(tiny, "not enough space")


def slow_compiler(folder: Path, does: str, before: str = "") -> Path:
    """A C++ compiler that runs shell commands first, `does` for one of llama.cpp's sources alone."""
    real = shutil.which("c++")
    text = f'{before}\ncase "$*" in *steady.cpp*) {does};; esac\nexec {real} "$@"'
    return write_program(folder / "slow-c++", text)


@contextlib.contextmanager
def slow_build(tiny: tiny_llama.Tiny, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A build in a separate process that hangs in its compiler."""
    # Only llama.cpp's own files hang: CMake must first find a working compiler.
    hang = f"echo $$ > {tmp_path}/started && mv {tmp_path}/started {tmp_path}/hangs; exec sleep 300"
    slow = slow_compiler(tmp_path, hang)
    command = ["kimi-llama", "build", "--archive", str(tiny.archive)]
    child = tiny_llama.start(tmp_path, *command, CXX=str(slow), CCACHE_DISABLE="1")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "hangs").exists():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline, "the compiler was never called"
            time.sleep(0.05)
        yield child
    finally:
        child.kill()
        child.wait()


def alive(pid: int) -> bool:
    """Whether a process is still running."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_build_leaves_nothing(
    tiny: tiny_llama.Tiny, tmp_path: Path, how: signal.Signals
) -> None:
    with slow_build(tiny, tmp_path) as child:
        child.send_signal(how)
        _, printed = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in printed
    assert names(tiny.cache.engines) == names(tiny.cache.work) == []
    if sys.platform == "linux":
        assert not alive(int((tmp_path / "hangs").read_text()))


def test_after_a_killed_build_the_next_one_starts_clean(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    with slow_build(tiny, tmp_path) as child:
        child.kill()
        child.communicate(timeout=60)
    assert names(tiny.cache.engines) == []
    # Ninja outlives the killed command and holds the lock until it ends.
    hanging = int((tmp_path / "hangs").read_text())
    os.kill(hanging, signal.SIGKILL)
    (leftover,) = tiny.cache.work.iterdir()
    assert not (leftover / "complete").exists()
    unpacked = tiny_llama.write_tree(tiny.cache.engines / ".0123.new", {"bin/llama-cli": "half written"})
    assert answer(tiny.build()).endswith("answer 2\n")
    assert not leftover.exists()
    assert not unpacked.exists()


def test_a_build_that_reaches_its_limit_is_continued(
    tiny: tiny_llama.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    slow = slow_compiler(tmp_path, f"test -e {tmp_path}/fast || exec sleep 300", f'echo "$*" >> {calls}')
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    with pytest.raises(UnfinishedError, match=r"after 3 s(.|\n)* steps done(.|\n)*build again"):
        tiny.build(limit=3)
    assert names(tiny.cache.engines) == []
    (tmp_path / "fast").touch()
    calls.unlink()
    assert answer(tiny.build(limit=100)).endswith("answer 2\n")
    compiled = {
        words.split()[-1].rpartition("/")[2] for words in calls.read_text().splitlines() if " -c " in words
    }
    assert "steady.cpp" in compiled and "answer.cpp" not in compiled


def test_two_builds_of_one_key_do_not_mix(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    both = [tiny_llama.start(tmp_path, "build") for _ in range(2)]
    printed = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert sum("compile" in errors for _, errors in printed) == 1, printed


def test_a_checkout_is_built_and_not_touched(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    checkout = tiny_llama.write_tree(tmp_path / "checkout", {**tiny_llama.FILES, "new.txt": "another\n"})
    place = tiny.build(source=checkout)
    assert answer(place).endswith("answer 2\n")
    assert answer(place).startswith("tree-"), "another tree than the pinned one is not given for its commit"
    assert not (checkout / "src/kimi.h").exists()
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["source"] == str(checkout)
    assert place != tiny.build()


def test_another_revision_says_which_patch_and_file(tmp_path: Path) -> None:
    files = {**tiny_llama.FILES, "src/answer.cpp": "int answer(int x) {\n    return x;\n}\n"}
    tiny = tiny_llama.make(tmp_path, files)
    said = refused(tiny, r"0001-answer\.patch does not apply", source=tmp_path / "tree")
    assert "src/answer.cpp" in said


def test_a_folder_that_is_not_llama_cpp_is_refused(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tiny, r"not a llama\.cpp source folder", source=tmp_path / "empty")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(EngineError, match="cpu, cpu-all, cuda, metal, vulkan"):
        make_build_spec(backend="abacus")


def test_a_program_that_does_not_run_is_not_installed(tmp_path: Path) -> None:
    broken = "int main() { return 3; }\n"
    tiny = tiny_llama.make(tmp_path, {**tiny_llama.FILES, "tools/llama-cli.cpp": broken})
    with pytest.raises(EngineError, match="does not run"):
        tiny.build()
    assert names(tiny.cache.engines) == []


def test_the_folder_is_not_in_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilations in folders of different lengths give the same bytes. Assertions name their source's path."""
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    files = {**tiny_llama.FILES, "src/steady.cpp": "const char * steady() {\n    return __FILE__;\n}\n"}
    places = [tiny_llama.make(tmp_path / name, files).build() for name in ("one", "another/place")]
    contents = [
        {
            path.relative_to(place): path.read_bytes()
            for kind in ("bin", "lib")
            for path in (place / kind).iterdir()
        }
        for place in places
    ]
    assert contents[0] == contents[1]
    (library,) = {content for path, content in contents[0].items() if path.name.startswith("libllama")}
    assert b"src/steady.cpp" in library


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="compiles for Linux with Debian's tools")
def test_a_cross_compiled_build_runs_in_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = "aarch64-linux-gnu"
    require_tools({f"{prefix}-g++": f"g++-{prefix}", "qemu-aarch64": "qemu-user"})
    monkeypatch.setenv("CC", f"{prefix}-gcc")
    monkeypatch.setenv("CXX", f"{prefix}-g++")
    tiny = tiny_llama.make(tmp_path)
    settings = release.cross_compilation("aarch64")
    spec = make_build_spec(backend="cpu-all", defines=settings)
    assert spec.cpu == "aarch64"
    spec = dataclasses.replace(spec, pin=tiny.pin, series=tiny.series)
    place = building.build(spec, tiny.cache, tiny.archive, False, Silent())
    assert (place / "bin/llama-cli").read_bytes()[18:20] == b"\xb7\x00"  # e_machine of AArch64, 183
    emulator = dict(settings)["CMAKE_CROSSCOMPILING_EMULATOR"].split(";")
    assert building.check_runs(place, emulator).endswith(" answer 2")
    with pytest.raises(EngineError, match="found no program no-such-emulator"):
        building.check_runs(place, ["no-such-emulator"])


def test_the_sources_wait_for_a_running_build_and_say_so(
    tiny: tiny_llama.Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    building.pinned_source(tiny.pin, tiny.cache, tiny.archive, Silent())
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tiny.cache.root))
    monkeypatch.setattr(builds, "load_pin", lambda: tiny.pin)
    printed = ""
    with ThreadPoolExecutor() as other:
        with building.build_lock(tiny.cache, Silent()):
            waiting = other.submit(builds.upstream_source)
            deadline = time.monotonic() + 30
            while "waiting" not in printed and not waiting.done() and time.monotonic() < deadline:
                time.sleep(0.01)
                printed += capsys.readouterr().err
            assert not waiting.done()
            assert f"another build is running in {tiny.cache.root}; waiting for it to end" in printed
        assert (waiting.result(timeout=30) / "llama.cpp/LICENSE").is_file()
