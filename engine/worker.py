"""A process that holds one build of llama.cpp, and the protocol of its requests.

Input, one line of JSON on standard input per request: {"do": NAME, ...}. Output, for each one line on standard output:
{"ok": ANSWER} or {"error": ONE LINE, "out_of_memory": BOOL}, and before it perhaps {"progress": [DONE, TOTAL]}.
Arrays go through .npy files that a request names. The process calls `serve`; its parent uses `Worker`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Timer
from typing import Any

from kimi_gguf.engine.llama import LlamaError, OutOfMemoryError

Progress = Callable[[int, int], None]  # done, total
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerEndedError(LlamaError):
    """The process ended without an answer."""


class Worker:
    """One process; use it as a context manager. It ends when this process ends, also after a kill."""

    def __init__(self, *command: str, environment: Mapping[str, str]) -> None:
        """command: Python's arguments. environment: of the build."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", *command],  # nothing is imported from the current directory
            env={**os.environ, "GGML_NO_BACKTRACE": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            process_group=0,  # Ctrl-C is handled by the parent
        )

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The log of llama.cpp and everything the process wrote to standard error."""
        file = self._stderr.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(
            errors="replace"
        )  # pread keeps the file position

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; its log is gone."""
        self.kill()
        self._stderr.close()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing if the process has ended."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process, even if it is stopped."""
        self._process.kill()  # SIGKILL also ends a stopped process
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def ask(
        self, do: str, progress: Progress | None = None, timeout: float | None = None, **request: Any
    ) -> Any:
        """Send one request and return its answer. timeout: seconds. Raises `LlamaError`."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = Timer(timeout or 0, process.kill)
        if timeout is not None:
            timer.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"do": do, **request}) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "ok" in answer:
                    return answer["ok"]
                if "error" in answer:
                    raise (OutOfMemoryError if answer["out_of_memory"] else LlamaError)(answer["error"])
                if progress is not None:
                    progress(*answer["progress"])
        finally:
            timer.cancel()
        raise WorkerEndedError(f"the llama.cpp process {self._ending()}")

    def _ending(self) -> str:
        """How the process ended, and the most informative line of its log."""
        status = self._process.wait()
        lines = [line.strip() for line in self.log.splitlines() if line.strip()] or ["it said nothing"]
        telling = [line for line in lines if "GGML_ASSERT" in line or "rror" in line] or lines
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{how}: {telling[-1]}"


def serve(start: Callable[[Progress], object], errors: tuple[type[Exception], ...] = ()) -> None:
    """Answer requests until standard input is closed. Never returns.

    start: creates the object whose methods are the requests. errors: additional exceptions that become answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output printed by a library must not become an answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    expected: tuple[type[Exception], ...] = (LlamaError, OSError, ImportError, *errors)
    requests = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            requests = requests or start(lambda done, total: say({"progress": [done, total]}))
            answer = {"ok": getattr(requests, request.pop("do"))(**request)}
        except expected as error:
            text = " ".join(str(error).split())
            answer = {"error": text, "out_of_memory": isinstance(error, OutOfMemoryError)}
        say(answer)
    os._exit(0)  # frees llama.cpp's memory without running destructors
