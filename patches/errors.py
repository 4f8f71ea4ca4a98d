"""The base of the project's errors, and the errors of the patch series."""

from __future__ import annotations


class KimiError(Exception):
    """An error that the user can correct: what happened, what was expected and found, and what to do."""

    def __init__(
        self, what: object, *, expected: object = None, found: object = None, todo: str | None = None
    ) -> None:
        self.what = str(what)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.todo = todo
        facts = [
            f"{label} {value}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        super().__init__(
            "; ".join(filter(None, [": ".join(filter(None, [self.what, ", ".join(facts)])), todo]))
        )


class PatchError(KimiError):
    """The pin or a patch is invalid, or the series does not apply."""
