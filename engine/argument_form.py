"""Arguments of programs that take files by position: words after MODEL, then options.

llama-quantize and llama-gguf-split read options before their files only, and would take one file for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.engine.errors import UsageError


@dataclass(frozen=True)
class ArgumentForm:
    """`kimi-llama NAME MODEL WORDS [--OPTION ...]`."""

    name: str
    words: str  # as in the usage
    first: str  # what the words are, for a sentence
    options: Mapping[str, int]  # the options, and how many words follow each

    def usage(self, model: Path) -> str:
        """What to write."""
        return f"write: kimi-llama {self.name} {model} {self.words} [--OPTION ...]"

    def parse(self, model: Path, given: Sequence[str]) -> tuple[list[str], list[str]]:
        """(words, options). Raises `UsageError` for options before the words, for a word that belongs to no option, and
        for an option without its value. What follows an option that is not known here is left to the program."""
        begin = next((i for i, word in enumerate(given) if word.startswith("--")), len(given))
        if begin == 0 and given:
            raise UsageError(
                f"{self.name}: wrong order",
                expected=f"{self.first} before options",
                found=given[0],
                todo=self.usage(model),
            )
        option, missing = "", 0
        for word in (*given[begin:], "--"):
            if word.startswith("--"):
                if missing > 0:
                    raise UsageError(
                        f"{self.name}: {option}", expected="a value", found="nothing", todo=self.usage(model)
                    )
                option, missing = word, self.options.get(word, -1)
            elif missing == 0:
                raise UsageError(
                    f"{self.name}: wrong order",
                    expected=f"{self.first} before options",
                    found=f"{word} after {option}",
                    todo=self.usage(model),
                )
            else:
                missing -= 1
        return list(given[:begin]), list(given[begin:])
