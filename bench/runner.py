"""A process that holds one build and one loaded model, and is stopped while other processes are measured.

Input: a build, its libraries and environment, a model. Output: timings, states, memory figures. The process is
stopped with SIGSTOP, because its threads would otherwise spin at a barrier for a while after each graph.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.llama import LlamaError, OutOfMemoryError
from kimi_gguf.engine.worker import Progress, Worker, WorkerEndedError


class NoRoomError(EngineError):
    """The model or the context does not fit in memory."""


class Runner(Worker):
    """One process; use it as a context manager. It ends when this process ends, also after a kill."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        super().__init__("-m", "kimi_gguf.bench.worker", environment=environment)
        self.name = name

    def __enter__(self) -> Runner:
        return self

    def ask(
        self, do: str, progress: Progress | None = None, timeout: float | None = None, **request: Any
    ) -> dict[str, Any]:
        """Continue the process for one request, then stop it again. Raises `EngineError`."""
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


# Of ggml_ops/matmul; empty: the default.
MATMUL_SWITCHES = ("KIMI_AMX", "KIMI_PREFETCH_IN_ORDER", "KIMI_REPACK")


def environment_of(engine: Engine, libraries: Path | None = None, switch: str = "require") -> dict[str, str]:
    """The environment of a build. libraries: used instead of its own. switch: KIMI_OPS of a patched build, if unset.

    Other switches have their defaults, because records and pages do not name them.
    """
    environment = engine.environment()
    if libraries is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries.resolve())
    if not engine.is_upstream:
        environment["KIMI_OPS"] = os.environ.get("KIMI_OPS", switch)
        environment |= dict.fromkeys(MATMUL_SWITCHES, "")
    return environment
