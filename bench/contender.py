"""A long-lived process with one build and one loaded model, frozen while others are measured.

Flows in: a build, its libraries and environment, a model. Flows out: timings, states, memory figures. A frozen
process (SIGSTOP) burns nothing: its threads would otherwise spin at a barrier for a while after each graph.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kimi_gguf.patches.errors import EngineError

Progress = Callable[[int, int], None]


class NoRoomError(EngineError):
    """What was asked for does not fit into memory."""


class Contender:
    """One process; use as a context manager. It ends with this process, however that ends."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", "kimi_gguf.bench.worker"]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            process_group=0,  # Ctrl-C is the parent's to act on
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the process, frozen or not."""
        self._process.kill()  # SIGKILL reaches a stopped process too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._said.close()

    def ask(self, do: str, progress: Progress | None = None, **request: Any) -> dict[str, Any]:
        """Wake the process, let it answer one request, freeze it again. Raises `EngineError`."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            answer = json.loads(line)
            if "progress" in answer:
                if progress is not None:
                    progress(*answer["progress"])
                continue
            process.send_signal(signal.SIGSTOP)
            if "error" in answer:
                kind = NoRoomError if answer["room"] else EngineError
                raise kind(f"{self.name}: {answer['error']}", todo="see the message of llama.cpp")
            result: dict[str, Any] = answer["ok"]
            return result
        raise EngineError(f"{self.name}: {self._ending()}", todo="run the same model with kimi-llama run")

    def _ending(self) -> str:
        status = self._process.wait()
        self._said.seek(0)
        said = [
            line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()
        ]
        telling = (
            [line for line in said if "GGML_ASSERT" in line or "rror" in line] or said or ["it said nothing"]
        )
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the llama.cpp process {how}: {telling[-1]}"


def environment_of(
    environment: Mapping[str, str], libraries: Path | None, ours: bool, switch: str = "require"
) -> dict[str, str]:
    """How a build is loaded; `libraries` replaces its own folder of libraries. switch: KIMI_OPS of ours if unset."""
    chosen = dict(environment)
    if libraries is not None:
        chosen["LLAMA_CPP_LIB_PATH"] = str(libraries.resolve())
    if ours:
        chosen["KIMI_OPS"] = os.environ.get("KIMI_OPS", switch)
    return chosen
