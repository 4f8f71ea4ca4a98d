"""Entry points of the commands. Ctrl-C ends each of them quietly with status 130, also while it is imported; without a
reader of its output, after `| head`, it ends quietly with status 141.

The commands catch an interrupt of their work themselves: they say what is left behind.
"""

import sys
from collections.abc import Callable
from io import TextIOWrapper


def convert_kimi() -> int:
    """Run `convert-kimi`; return its exit status."""

    def load() -> Callable[[], int]:
        from kimi_gguf.convert.cli import main

        return main

    return _run(load)


def validate_kimi() -> int:
    """Run `validate-kimi`; return its exit status."""

    def load() -> Callable[[], int]:
        from kimi_gguf.validate.cli import main

        return main

    return _run(load)


def kimi_llama() -> int:
    """Run `kimi-llama`; return its exit status."""

    def load() -> Callable[[], int]:
        from kimi_gguf.scripts.kimi_llama import main

        return main

    return _run(load)


def _run(load: Callable[[], Callable[[], int]]) -> int:
    """Import a command's `main` and run it; return its exit status, 130 after an interrupt, 141 without a reader."""
    try:
        try:
            from kimi_gguf.engine.interrupts import interrupt_ends_process

            with interrupt_ends_process():
                main = load()
            if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(
                    errors="backslashreplace"
                )  # names of files and keys can have any bytes
            try:
                return main()
            finally:  # also after SystemExit, as of --help
                if sys.stdout is not None:
                    sys.stdout.flush()
        finally:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C while Python ends
    except MemoryError:
        from pathlib import Path

        from kimi_gguf.engine.limits import memory

        limit = memory()
        room = f": {limit.value >> 20} MiB are available ({limit.source})" if limit else ""
        print(f"{Path(sys.argv[0]).name}: error: out of memory{room}; raise the limit", file=sys.stderr)
        return 2  # of validate-kimi, 1 is a gate that failed
    except KeyboardInterrupt:
        return 130  # engine.interrupts.INTERRUPTED, which may not be imported yet
    except BrokenPipeError:
        import os

        for stream in (1, 2):  # Python writes what is left in their buffers while it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 141  # engine.interrupts.NO_READER
