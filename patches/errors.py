"""The one error type of the engine: fetching, patching, building and running llama.cpp."""

from __future__ import annotations


class EngineError(Exception):
    """An error that the user can correct: what happened, what was expected and found, and what to do."""

    def __init__(
        self, what: str, *, expected: str | None = None, found: str | None = None, todo: str | None = None
    ) -> None:
        self.what, self.expected, self.found, self.todo = what, expected, found, todo
        facts = ", ".join(
            f"{label} {text}" for label, text in (("expected", expected), ("found", found)) if text
        )
        super().__init__("; ".join(filter(None, [": ".join(filter(None, [what, facts])), todo])))
