"""The model card that a conversion writes next to its files.

Input: the plan, the files, and the command. Output: the card's text, once the files' SHA-256 are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from kimi_gguf.convert.card.folder import Hashed, figures_of, is_utf8, others_of
from kimi_gguf.convert.card.text import Listed, Made, card_text, file_row, source_of
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.plan import Plan, model_notes
from kimi_gguf.engine.progress import Reporter, Silent
from kimi_gguf.engine.version import VERSION

Reporting = Callable[[], AbstractContextManager[Reporter]]


def new_card(
    plan: Plan, paths: Sequence[Path], config: ModelConfig, command: Sequence[str], reporting: Reporting
) -> Callable[[Sequence[str]], str]:
    """The model card of the output's folder as a function of the SHA-256 of the new files `paths`; it reads the folder
    when it is called."""
    keys = {key.name: key.value for key in plan.keys}
    notes = tuple(model_notes(config))
    own_notes = tuple(note for note in plan.notes if note not in notes)
    words, known = (command[0], source_of(keys) or command[1], *command[2:]), Hashed()
    for word in (paths[0].name, *words):
        if not is_utf8(word):
            todo = "choose another name, or omit --model-card"
            raise ConvertError(f"{word!a}", expected="a name in UTF-8", found="other bytes", todo=todo)
    with reporting() as reporter:  # most of the hashing, while progress can be shown
        others_of(paths[0].parent, paths, keys, reporter, known)

    def text(hashes: Sequence[str]) -> str:
        others = others_of(paths[0].parent, paths, keys, Silent(), known)
        made = Made(VERSION, words, tuple(hashes), own_notes)
        files = zip(paths, plan.files, hashes, strict=True)
        rows = [file_row(path.name, file.nbytes, file.tensors, sha256) for path, file, sha256 in files]
        figures = figures_of(paths[0].parent, paths[0], hashes)
        return card_text(Listed(paths[0], keys, rows, made, plan.nbytes, figures), others, notes)

    return text
