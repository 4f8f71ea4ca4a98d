"""scripts/prove-wheel: what the commands see, and what counts as left. test_release.py proves a wheel (--full)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_gguf.scripts.prove_wheel import Place, ProveError, check_tools, leftovers, main


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty prefix, without pip, so that it is made quickly."""
    made = Place(tmp_path)
    for folder in (made.home, made.temporary):
        folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.prefix], check=True)
    return made


def test_the_commands_see_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "KIMI_GGUF_CACHE", "KIMI_BUILD", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "of this machine")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    seen = place.environment()
    assert set(seen) - {name for name in seen if name.startswith(("PIP_", "SSL_"))} <= {
        "PATH", "HOME", "TMPDIR", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
        "no_proxy",
    }  # fmt: skip
    assert seen["PIP_INDEX_URL"] == "https://example.org/simple"
    check_tools(seen["PATH"])
    (place.prefix / "bin/git").touch(0o755)
    with pytest.raises(ProveError, match=r"expected no compiler and no git, found .*/prefix/bin/git"):
        check_tools(seen["PATH"])


def test_what_is_left_is_found(place: Place) -> None:
    """Not counted: what was there, another package with its compiled files, and caches."""
    (packages,) = place.prefix.glob("lib/python*/site-packages")
    (packages / "there.py").touch()
    before = place.files()
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
        (place.home / path).mkdir(parents=True)
    (packages / "kimi_gguf/engine").mkdir(parents=True)
    (place.prefix / "bin/kimi-llama").symlink_to("nowhere")
    (place.temporary / "x").touch()
    assert leftovers(place, before) == sorted(
        (
            compiled / "gone.cpython-311.pyc",
            packages / "kimi_gguf/engine",
            place.prefix / "bin/kimi-llama",
            place.home / ".config/kimi",
            place.temporary / "x",
        )
    )


def test_a_command_that_fails_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProveError, match="exit status 3\nwhat it said"):
        place.call("python", "-c", "print('what it said'); raise SystemExit(3)")
    assert "  python -c " in capsys.readouterr().out


def test_a_file_that_is_no_wheel_ends_with_status_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kimi_gguf-1.0-py3-none-any.whl").write_text("not a wheel")
    assert main([str(tmp_path / "kimi_gguf-1.0-py3-none-any.whl"), "--out", str(tmp_path / "out")]) == 1
    assert capfd.readouterr().err.startswith("prove-wheel: error: exit status 1\n")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none.whl")])
