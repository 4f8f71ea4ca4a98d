"""0024-huge-pages: large CPU buffers and mapped models are given huge pages where Linux has them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
from native_program import compile_program, compile_shim, run_program
from random_checkpoint import Spec
from small_memory import SHIM, complete
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
EVENT = re.compile(r"(MADV_HUGEPAGE|MADV_NOHUGEPAGE|MADV_POPULATE_READ|MAP_POPULATE) (0x[0-9a-f]+|\(nil\))")

release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no transparent huge pages"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("model"), Spec(seed=24), "F16")


def events(engine: Engine, model: Path, folder: Path, **environment: str) -> list[tuple[str, str]]:
    """What a program asks of Linux for the mapped model: calls and addresses, in order."""
    found = EVENT.findall(complete(engine, model, compile_shim(SHIM, folder), **environment))
    mapped = {address for call, address in found if "POPULATE" in call}
    return [event for event in found if event[1] in mapped]


def test_linux_is_asked_for_huge_pages(tmp_path: Path, engine: Engine) -> None:
    run_program(compile_program(engine, "huge-pages-test.cpp", tmp_path))


@pytest.mark.skipif(release < (5, 14), reason="Linux has MADV_POPULATE_READ since 5.14")
def test_huge_pages_are_advised_while_a_mapped_model_is_read(
    model: Path, tmp_path: Path, engine: Engine
) -> None:
    calls = [call for call, _ in events(engine, model, tmp_path)]
    assert calls == ["MADV_HUGEPAGE", "MADV_POPULATE_READ", "MADV_NOHUGEPAGE"]


def test_kernels_before_5_14_read_the_model_when_they_map_it(
    model: Path, tmp_path: Path, engine: Engine
) -> None:
    calls = [call for call, _ in events(engine, model, tmp_path, OLD_KERNEL="1")]
    assert calls == ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MAP_POPULATE"]
