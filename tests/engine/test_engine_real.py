"""The real llama.cpp, patched and upstream: both builds work, and neither loads libraries of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_engine_series import git_am

from kimi_gguf.engine.build_spec import PROGRAMS, TEST_PROGRAMS, VERIFY
from kimi_gguf.engine.builds import Engine, ensure, find, upstream_source
from kimi_gguf.patches.export import export_patches
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree, tree_hash

pytestmark = pytest.mark.engine
COMMAND = [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama"]


def output(*command: str | Path, **environment: str) -> str:
    """Everything that a command writes to standard output and standard error."""
    told = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return told.stdout + told.stderr


def test_both_builds_hold_all_programs_and_tests(engine: Engine, upstream: Engine) -> None:
    for build in (engine, upstream):
        missing = {VERIFY} if build.is_upstream else set()
        assert {path.name for path in build.bin.iterdir()} == {*PROGRAMS, *TEST_PROGRAMS} - missing
        assert not [path for path in build.lib.iterdir() if path.is_symlink()]


def test_building_again_makes_nothing(engine: Engine) -> None:
    times = {path: path.stat().st_mtime_ns for path in engine.folder.rglob("*")}
    assert output(*COMMAND, "build") == f"{engine.folder}\n"
    assert {path: path.stat().st_mtime_ns for path in engine.folder.rglob("*")} == times
    assert ensure(tests=True) == engine


def test_doctor_finds_all_well(engine: Engine, upstream: Engine) -> None:
    report = json.loads(output(*COMMAND, "doctor", "--json"))
    assert not [check for each in report["engines"] for check in each["checks"] if not check["passed"]]
    assert report["healthy"] is True
    assert report["pin"]["llama_cpp_commit"] == load_pin().llama_cpp_commit
    assert {engine.key, upstream.key} <= {each["key"] for each in report["engines"]}


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is Linux's")
def test_patched_and_upstream_do_not_load_each_others_libraries(engine: Engine, upstream: Engine) -> None:
    for own, other in ((engine, upstream), (upstream, engine)):
        for program in own.bin.iterdir():
            listed = output(program, LD_TRACE_LOADED_OBJECTS="1", LD_LIBRARY_PATH=str(other.lib))
            assert str(own.folder.resolve()) in listed
            assert str(other.folder.resolve()) not in listed, program.name


def test_llama_cpp_python_loads_the_builds_libraries(engine: Engine, upstream: Engine) -> None:
    probe = "import llama_cpp as l; l.llama_backend_init(); print(open('/proc/self/maps').read())"
    for own, other in ((engine, upstream), (upstream, engine)):
        environment = {**own.environment(), "LD_LIBRARY_PATH": str(other.lib)}
        told = output(sys.executable, "-P", "-c", probe, **environment)
        assert str(own.lib.resolve() / "libllama.so") in told
        assert str(other.folder.resolve()) not in told


def test_the_manifest_tells_pin_patches_and_tree(engine: Engine, upstream: Engine) -> None:
    pin, series = load_pin(), load_series()
    assert engine.manifest["tree_sha256"] == pin.patched_tree_sha256
    assert upstream.manifest["tree_sha256"] == pin.upstream_tree_sha256
    assert [patch["name"] for patch in engine.manifest["patches"]] == [patch.name for patch in series.patches]
    assert upstream.manifest["patches"] == []
    for build in (engine, upstream):
        assert build.manifest["commit"] in output(build.bin / "llama-cli", "--version")
    assert engine.manifest["options"] == upstream.manifest["options"]


def test_path_and_find_give_the_build(engine: Engine, upstream: Engine) -> None:
    assert find() == engine
    assert find(upstream=True) == upstream
    assert output(*COMMAND, "path", "--upstream") == f"{upstream.folder}\n"


def test_what_is_exported_applies_to_upstreams_source(tmp_path: Path) -> None:
    series = load_series()
    upstream = Tree(upstream_source() / "llama.cpp").without(("docs/", "media/", "models/"))
    upstream.write_to(tmp_path / "llama.cpp")
    expected = Tree(tmp_path / "llama.cpp")
    assert series.apply(expected) == len(series.patches)
    git_am(tmp_path / "llama.cpp", export_patches(series, tmp_path / "mail"))
    assert tree_hash(tmp_path / "llama.cpp") == expected.hash()


FIXES = {patch.name.removesuffix(".patch"): patch for patch in load_series().fixes().patches}


@pytest.mark.parametrize("name", FIXES)
def test_each_fix_applies_alone_or_on_the_one_it_names(name: str) -> None:
    fix = FIXES[name]
    tree = Tree(upstream_source() / "llama.cpp")
    for needed in fix.needs:
        FIXES[needed].apply(tree)
    fix.apply(tree)
    assert tree.changed()
