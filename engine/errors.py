"""The errors of fetching, building and running llama.cpp, and of reading what it writes."""

import shlex
import sys

from kimi_gguf.patches.errors import KimiError


class EngineError(KimiError):
    """llama.cpp cannot be fetched, built, found or run, or a file for it cannot be read."""


class UsageError(EngineError):
    """Wrong arguments, as of argparse: the exit status is 2."""


class UnfinishedError(EngineError):
    """A build reached its time limit; what is compiled is kept, and the next build continues."""


def reason(error: Exception) -> str:
    """What an error of Python or the system says, without the number and the path that messages of the system have."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def install(*packages: str) -> str:
    """The command that installs packages for the Python that runs. (No index has this project's own package.)"""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])
