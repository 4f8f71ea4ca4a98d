"""Upstream's own test programs have the same results with the patched build as with the upstream one, or better.

The programs read models from a folder; `test-llama-archs -o` makes one small model per architecture. Without
--full, only those that the patches affect: kimi-linear and the architectures that share its memory, attention or norms.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import cores

pytestmark = pytest.mark.engine

TOUCHED = "kimi-linear|kimi-k3|deepseek2|qwen3next|bailingmoe3|jamba|falcon-h1|lfm2|minimax-01|glm4|llama"
ALL = ".*"
full = pytest.mark.full
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ROLLBACK = "test-recurrent-state-rollback"


def outcome(engine: Engine, folder: Path, program: str, *arguments: str) -> list[str]:
    """Lines of the program, which must exit with status 0. `folder`: where it may write."""
    ended = subprocess.run(
        [engine.bin / program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    lines = COLOUR.sub("", ended.stdout + ended.stderr).splitlines()
    assert ended.returncode == 0, f"{program} {' '.join(arguments)}: " + "\n".join(lines[-10:])
    return lines


def verdicts(engine: Engine, folder: Path, program: str, *arguments: str) -> list[str]:
    """The lines of the program with a verdict."""
    lines = outcome(engine, folder, program, *arguments)
    return [line for line in lines if re.search(r"\b(OK|PASS|SKIP|passed)\b", line)]


def table(build: Engine, folder: Path, archs: str, program: str) -> list[str]:
    """A line of verdicts per architecture. Each build makes its own models, because the patched build supports more."""
    models = folder / "models"
    models.mkdir(parents=True)
    verdicts(build, folder, "test-llama-archs", "-a", archs, "-o", str(models))
    found = verdicts(build, folder, program, "--models", str(models), "-t", "1")
    lines = [line for line in found if ".gguf " in line]
    assert len(lines) == len(list(models.glob("*.gguf"))) > 0
    return lines


@pytest.mark.parametrize("archs", [TOUCHED, pytest.param(ALL, marks=full)], ids=["touched", "all"])
def test_architectures(tmp_path: Path, archs: str, engine: Engine) -> None:
    # the status is sufficient; the last lines may be missing, as the program exits before its log is written
    assert verdicts(engine, tmp_path, "test-llama-archs", "-a", archs)


@pytest.mark.parametrize("program", ["test-save-load-state", ROLLBACK])
@pytest.mark.parametrize("archs", [TOUCHED, pytest.param(ALL, marks=full)], ids=["touched", "all"])
def test_states_of_small_models(
    tmp_path: Path, archs: str, program: str, engine: Engine, upstream: Engine
) -> None:
    expected = table(upstream, tmp_path / "upstream", archs, program)
    if program == ROLLBACK:
        expected = [with_rollback(line) for line in expected]
    assert table(engine, tmp_path / "patched", archs, program) == expected


def with_rollback(line: str) -> str:
    """A line of upstream's table as expected if kimi-linear can roll back: upstream skips it."""
    if not line.startswith("kimi-linear"):
        return line
    assert "SKIP" in line and "PASS" not in line, line
    return line.replace("SKIP", "PASS")


def test_save_and_load_of_the_demo(tmp_path: Path, demo_gguf: Callable[[str], Path], engine: Engine) -> None:
    outcome(engine, tmp_path, "test-save-load-state", "-m", str(demo_gguf("BF16")), "-t", "1")


@pytest.mark.parametrize("choice", ["require", "off"])
@pytest.mark.parametrize("weights", ["F32", "BF16", "Q8_0"])
def test_rollback_of_the_demo(
    tmp_path: Path, demo_gguf: Callable[[str], Path], choice: str, weights: str, engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the operators and with upstream's graph; the program fills the caches with zeros, then with garbage."""
    monkeypatch.setenv("KIMI_OPS", choice)
    said = outcome(engine, tmp_path, ROLLBACK, "-m", str(demo_gguf(weights)), "-t", "1")
    assert not any("skipping" in line for line in said)
    for done in ("rollback checkpoint restored successfully", "multi-seq split replay matched"):
        assert sum(done in line for line in said) == 2, said


def test_upstream_does_not_roll_back_the_demo(
    tmp_path: Path, demo_gguf: Callable[[str], Path], upstream: Engine
) -> None:
    said = outcome(upstream, tmp_path, ROLLBACK, "-m", str(demo_gguf("BF16")), "-t", "1")
    assert any("skipping" in line for line in said)


@pytest.mark.parametrize(
    "chosen",
    [["-o", "FLASH_ATTN_EXT", "-p", "hsk=576"], ["-o", "GATED_DELTA_NET"], pytest.param([], marks=full)],
    ids=["latent attention", "delta rule", "all"],
)
def test_operators(tmp_path: Path, chosen: list[str], engine: Engine) -> None:
    options = ["test", "-b", "CPU", "-j", str(2 * cores()), *chosen]
    assert any("Backend CPU: OK" in line for line in verdicts(engine, tmp_path, "test-backend-ops", *options))
