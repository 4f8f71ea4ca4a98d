"""The converter's errors: everything wrong with an input or an output path."""


class ConvertError(Exception):
    """Something the user can mend; the message names the file, the tensor, what was expected and found."""


class ReadError(ConvertError):
    """The source failed while it was read; what is written so far is good, and can be gone on with."""
