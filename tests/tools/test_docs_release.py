"""The commands of docs/release.md for signing, checking, installing and removing a release are run: with a temporary
key, a temporary repository, and a wheel with stand-ins for the programs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ggml_variant import require_tools
from stand_in_wheel import PROGRAMS, make_environment, write_wheel

PAGE = (Path(__file__).parents[2] / "docs/release.md").read_text()
SIGNING = ("git tag --sign", "gpg --detach-sign")
CHECKING = ("git verify-tag", "gpg --verify", "sha256sum ")


def documented(start: str) -> str:
    """The command that begins with `start`."""
    (command,) = re.findall(rf"^{start}.*$", PAGE, re.MULTILINE)
    return str(command)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """A home with a key for signing. Its path is short, because gpg's sockets are in it."""
    require_tools({"gpg": "gnupg"})
    with tempfile.TemporaryDirectory(prefix="gpg") as home:
        variables = os.environ | {"HOME": home, "GNUPGHOME": home, "GIT_CONFIG_NOSYSTEM": "1"}
        try:
            words = ["gpg", "--batch", "--passphrase", "", "--quick-generate-key", "a <a@example.org>"]
            subprocess.run(words, env=variables, capture_output=True, check=True)
            for name, value in (("user.name", "a"), ("user.email", "a@example.org")):
                subprocess.run(["git", "config", "--global", name, value], env=variables, check=True)
            yield variables
        finally:
            subprocess.run(["gpgconf", "--kill", "all"], env=variables)


@pytest.fixture
def checkout(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A repository with one commit, and a wheel with its hash in dist/."""
    write_wheel(tmp_path, "wheel")
    (wheel,) = (tmp_path / "dist").iterdir()
    script = f"sha256sum {wheel.name} > SHA256SUMS && git init -q .. && git commit -q --allow-empty -m first"
    subprocess.run(script, shell=True, cwd=wheel.parent, env=environment, check=True)
    return tmp_path


def run(command: str, folder: Path, environment: dict[str, str]) -> int:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True
    ).returncode


def test_a_release_is_signed_and_a_changed_one_is_refused(
    checkout: Path, environment: dict[str, str]
) -> None:
    dist = checkout / "dist"
    for start in SIGNING:
        assert run(documented(start), dist, environment) == 0, start
    tag, signature, hashes = map(documented, CHECKING)
    assert signature == "gpg --verify SHA256SUMS.asc" and hashes.endswith("--check SHA256SUMS")
    for command in (tag, signature, hashes):
        assert run(command, dist, environment) == 0, command
    (wheel,) = dist.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert run(hashes, dist, environment) != 0
    (dist / "SHA256SUMS").write_text("")
    assert run(signature, dist, environment) != 0


def test_the_wheel_is_installed_and_removed(tmp_path: Path) -> None:
    """With the commands of the page's first block, in a new environment."""
    write_wheel(tmp_path, "wheel")
    variables = make_environment(tmp_path / "venv")
    installs = re.findall(r"^python -m pip install .*$", PAGE, re.MULTILINE)
    assert len(installs) == 2
    for command in installs:
        assert run(command, tmp_path, variables) == 0, command
    programs = [tmp_path / "venv/bin" / name for name in PROGRAMS]
    assert all(program.exists() for program in programs)
    assert run("python -m pip uninstall --yes kimi_gguf", tmp_path, variables) == 0
    assert not any(program.exists() for program in programs)
