"""The error that this package raises for bad input and for llama.cpp runs that did not finish."""

from kimi_gguf.patches.errors import KimiError


class ValidateError(KimiError):
    """The message names the file or step, what was expected, what was found, and what to do."""
