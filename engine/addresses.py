"""Addresses of workers (`kimi-llama worker`), as users name them: HOST:PORT,..."""

from __future__ import annotations

import re

from kimi_gguf.engine.errors import UsageError


def addresses(text: str) -> tuple[str, ...]:
    """The addresses, HOST:PORT each. Raises `UsageError`: llama.cpp would describe its own option instead."""
    workers = tuple(text.split(","))
    for worker in workers:
        if not re.fullmatch(r"[^:\s]+:[0-9]{1,5}", worker):
            raise UsageError(
                "--workers: no address of a worker",
                expected="HOST:PORT,... such as 10.0.0.2:50052",
                found=worker or "nothing",
                todo="start each worker on its machine: kimi-llama worker --help",
            )
    return workers
