"""The converter's errors: problems with an input or an output path."""

from kimi_gguf.patches.errors import KimiError


class ConvertError(KimiError):
    """An error that the user can fix; the message names file and tensor, what was expected and what was found."""


class ReadError(ConvertError):
    """Reading the source failed; the data written so far are valid, and --resume can continue."""


def excerpt(value: object) -> str:
    """At most 60 characters of something found in a file, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
