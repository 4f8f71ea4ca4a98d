"""The errors of fetching, building and running llama.cpp, and of reading what it writes."""

from kimi_gguf.patches.errors import KimiError


class EngineError(KimiError):
    """llama.cpp cannot be fetched, built, found or run, or a file for it cannot be read."""
