"""`kimi-llama build --wheel`: one file that pip installs, with this build's libraries."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny_llama

from kimi_gguf.engine import builds as engine
from kimi_gguf.engine.build_spec import VERIFY
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.wheel import make_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the patched miniature."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = tiny_llama.make(folder)
    built = engine.load(tiny.build())
    assert built is not None
    return make_wheel(built, folder / "dist")


def test_the_name_tells_version_series_and_platform(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.startswith("llama_cpp_python-1.0+kimi.")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert list(wheel.parent.iterdir()) == [wheel]


def test_pip_installs_it_and_its_library_is_the_patched_one(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(tmp_path), str(wheel)], check=True)
    assert (tmp_path / "llama_cpp/__init__.py").is_file()
    (library,) = (tmp_path / "llama_cpp/lib").glob("libllama*")
    assert ctypes.CDLL(str(library))._Z6answerv() == 2


def test_it_carries_both_licences_and_no_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert sum("/licenses/" in name for name in names) == 2
    assert len(names) == len(set(names))


@pytest.mark.engine
def test_the_real_wheel_loads_its_own_libraries(engine: Engine, tmp_path: Path) -> None:
    wheel = make_wheel(engine, tmp_path / "dist")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    probe = (
        "import llama_cpp; print(llama_cpp.__file__); llama_cpp.llama_backend_init();"
        "import llama_cpp.mtmd_cpp; print(open('/proc/self/maps').read())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    told = subprocess.run(
        [sys.executable, "-P", "-c", probe], env=environment, capture_output=True, text=True, check=True
    ).stdout
    mapped = {line.split()[-1] for line in told.splitlines() if "libllama" in line or "libggml" in line}
    assert mapped
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in mapped), mapped
    assert len({Path(path).name.split(".")[0] for path in mapped}) == len(mapped), "a library is loaded twice"

    verify = tmp_path / "site/llama_cpp/lib" / VERIFY
    assert (
        "no device needs the check"
        in subprocess.run([verify], capture_output=True, text=True, check=True).stdout
    )
