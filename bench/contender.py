"""A long-lived process with one build and one loaded model, frozen while others are measured.

Input: a build, its libraries and environment, a model. Output: timings, states, memory figures. A frozen
process (SIGSTOP) burns nothing: its threads would otherwise spin at a barrier for a while after each graph.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_gguf.engine.llama import LlamaError, OutOfMemoryError
from kimi_gguf.engine.worker import Progress, Worker, WorkerEndedError
from kimi_gguf.patches.errors import EngineError


class NoRoomError(EngineError):
    """What was asked for does not fit into memory."""


class Contender(Worker):
    """One process; use as a context manager. It ends with this process, however that ends."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        super().__init__("-m", "kimi_gguf.bench.worker", environment=environment)
        self.name = name

    def __enter__(self) -> Contender:
        return self

    def ask(
        self, do: str, progress: Progress | None = None, timeout: float | None = None, **request: Any
    ) -> dict[str, Any]:
        """Wake the process, let it answer one request, freeze it again. Raises `EngineError`."""
        self.send_signal(signal.SIGCONT)
        try:
            answer: dict[str, Any] = super().ask(do, progress, timeout, **request)
            return answer
        except WorkerEndedError as error:
            raise EngineError(
                f"{self.name}: {error}", todo="run the same model with kimi-llama run"
            ) from None
        except LlamaError as error:
            kind = NoRoomError if isinstance(error, OutOfMemoryError) else EngineError
            raise kind(f"{self.name}: {error}", todo="see the message of llama.cpp") from None
        finally:
            self.send_signal(signal.SIGSTOP)


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
