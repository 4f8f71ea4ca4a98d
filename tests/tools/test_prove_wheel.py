"""tools/prove-wheel: what the commands see, and what counts as left. test_release.py proves a wheel (--full)."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stand_in_wheel import pip_folder

from kimi_gguf.engine.wheel import record_line
from kimi_gguf.tools.prove_wheel import ProveError, Sandbox, check_tools, leftovers


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """An empty prefix, without pip, so that it is made quickly."""
    made = Sandbox(tmp_path)
    for folder in (made.home, made.temporary):
        folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.prefix], check=True)
    return made


def test_the_commands_see_no_compiler(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "KIMI_GGUF_CACHE", "KIMI_BUILD", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "of this machine")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    seen = sandbox.environment()
    assert set(seen) - {name for name in seen if name.startswith(("PIP_", "SSL_"))} <= {
        "PATH", "HOME", "TMPDIR", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
        "no_proxy",
    }  # fmt: skip
    assert seen["PIP_INDEX_URL"] == "https://example.org/simple"
    for name in ("bash", "less", "basename", "kimi-llama"):
        (sandbox.prefix / "bin" / name).touch(0o755)
    check_tools(seen["PATH"])
    for name in (
        "git", "x86_64-linux-gnu-gcc", "clang++-19", "tcc", "as", "ld", "ld.gold", "ld.lld-19", "gmake", "samu", "c99",
    ):  # fmt: skip
        tool = sandbox.prefix / "bin" / name
        tool.touch(0o755)
        with pytest.raises(
            ProveError, match=rf"expected no compiler and no git, found .*/bin/{re.escape(name)}$"
        ):
            check_tools(seen["PATH"])
        tool.unlink()


def test_what_is_left_is_found(sandbox: Sandbox) -> None:
    """Not counted: what was there, another package with its compiled files, and caches."""
    (packages,) = sandbox.prefix.glob("lib/python*/site-packages")
    (packages / "there.py").touch()
    before = sandbox.files()
    (packages / "other-1.0.dist-info").mkdir()
    record = packages / "other-1.0.dist-info/RECORD"
    record.write_text("other.py,,\nother-1.0.dist-info/RECORD,,\nother-1.0.dist-info/METADATA,,\n")
    (record.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (packages / "other.py").touch()
    compiled = packages / "__pycache__"
    compiled.mkdir(exist_ok=True)
    for name in ("other", "gone"):
        (compiled / f"{name}.cpython-311.pyc").touch()
    for path in (".cache/kimi-gguf/engines", ".config/matplotlib", ".config/kimi"):
        (sandbox.home / path).mkdir(parents=True)
    (packages / "kimi_gguf/engine").mkdir(parents=True)
    (sandbox.prefix / "bin/kimi-llama").symlink_to("nowhere")
    (sandbox.temporary / "x").touch()
    assert leftovers(sandbox, before) == sorted(
        (
            compiled / "gone.cpython-311.pyc",
            packages / "kimi_gguf/engine",
            sandbox.prefix / "bin/kimi-llama",
            sandbox.home / ".config/kimi",
            sandbox.temporary / "x",
        )
    )


def write_wheel(folder: Path, name: str, files: dict[str, str], requires: str = "") -> Path:
    """A wheel of version 1 with these files."""
    info = f"{name}-1.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [record_line(each, text.encode()) for each, text in files.items()]
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in (*files.items(), (f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]))):
            archive.writestr(each, text)
    return path


@pytest.fixture
def sandbox_with_pip(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The prefix sees this environment's pip. Packages come from `tmp_path`/packages alone."""
    (packages,) = sandbox.prefix.glob("lib/python*/site-packages")
    (packages / "pip.pth").write_text(f"{pip_folder().parent}\n")
    (tmp_path / "packages").mkdir()
    for name, text in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "packages"))):
        monkeypatch.setenv(name, text)
    return sandbox


def test_a_compiler_that_pip_installs_is_found(sandbox_with_pip: Sandbox, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "brings", {"brings-1.data/scripts/ninja": "#!python\n"})
    with pytest.raises(ProveError, match=r"expected no compiler and no git, found .*/prefix/bin/ninja"):
        sandbox_with_pip.install(wheel)
