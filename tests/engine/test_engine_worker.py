"""The process protocol, tested with requests that need no llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_gguf.engine.llama import LlamaError, OutOfMemoryError
from kimi_gguf.engine.worker import Worker, WorkerEndedError

REQUESTS = """
import os, time
from kimi_gguf.engine.llama import LlamaError, OutOfMemoryError
from kimi_gguf.engine.worker import serve

class Requests:
    def __init__(self, progress):
        self.progress, self.asked = progress, 0
    def count(self, step):
        print("a library's own words")
        self.progress(1, 2)
        self.asked += step
        return self.asked
    def fail(self, out_of_memory):
        raise (OutOfMemoryError if out_of_memory else LlamaError)("two\\nlines")
    def sleep(self):
        time.sleep(60)

serve(Requests)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "requests_of_a_test.py").write_text(REQUESTS)
    with Worker(str(tmp_path / "requests_of_a_test.py"), environment={}) as process:
        yield process


def test_nothing_is_imported_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('numpy of the current directory')")
    monkeypatch.chdir(tmp_path)
    with Worker("-c", f"import numpy\n{REQUESTS}", environment={}) as process:
        assert process.ask("count", step=2) == 2


def test_one_process_answers_one_request_after_another(worker: Worker) -> None:
    told: list[tuple[int, int]] = []
    assert worker.ask("count", lambda *step: told.append(step), step=2) == 2
    assert worker.ask("count", step=3) == 5
    assert told == [(1, 2)]


def test_an_error_is_one_line_and_the_process_lives_on(worker: Worker) -> None:
    with pytest.raises(LlamaError, match=r"^two lines$"):
        worker.ask("fail", out_of_memory=False)
    with pytest.raises(OutOfMemoryError):
        worker.ask("fail", out_of_memory=True)
    assert worker.ask("count", step=1) == 1


def test_a_request_that_takes_too_long_ends_the_process(worker: Worker) -> None:
    with pytest.raises(WorkerEndedError, match="was ended by SIGKILL"):
        worker.ask("sleep", timeout=1)
