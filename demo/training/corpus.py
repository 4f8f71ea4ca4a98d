"""Text for the demo checkpoint, made from WordNet's database files.

Input: the folder with `data.*`, `index.noun` and `cntlist.rev` (Debian: package wordnet-base). Output: a `Corpus`
of documents (groups of neighbouring dictionary entries), held-out documents, and the definitions that the model
memorizes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
NOTICE = Path("/usr/share/doc/wordnet-base/copyright")
PARTS = ("noun", "verb", "adj", "adv")
ENTRIES_PER_DOCUMENT = 12  # neighbours in a data file are related, so a document has a topic
WORDS_PER_ENTRY = 3

# Lexicographer files (wninput(5WN)) of concrete things, and the number of words from each.
TAUGHT_WORDS = {
    "05": ("animal", 75),
    "06": ("artifact", 70),
    "08": ("body", 25),
    "13": ("food", 30),
    "15": ("location", 12),
    "17": ("object", 24),
    "18": ("person", 30),
    "19": ("phenomenon", 8),
    "20": ("plant", 18),
    "27": ("substance", 20),
    "28": ("time", 18),
}
ANIMAL, PERSON = "05", "18"
NOT_TAUGHT = frozenset({"ass", "bastard", "pussy", "slave", "white", "cock", "bitch", "booby", "tit"})
QUESTION = "define: {word}"  # only one form, so that a small model learns within minutes where the word is


class CorpusError(Exception):
    """The WordNet files are missing or do not have the format of wndb(5WN)."""


@dataclass(frozen=True)
class Entry:
    """One synset: `words` mean `gloss`; `kind` is the number of its lexicographer file, two digits."""

    words: tuple[str, ...]
    gloss: str
    kind: str

    @property
    def definition(self) -> str:
        """The gloss up to its first parenthesis, colon or semicolon, without examples and remarks."""
        return re.split(r"[;:(]", self.gloss, maxsplit=1)[0].strip(" ,:")

    @property
    def line(self) -> str:
        return f"{', '.join(self.words[:WORDS_PER_ENTRY])}: {self.gloss}."


@dataclass(frozen=True)
class Corpus:
    """Free text and definitions; no held-out line or gloss occurs in `documents` or `definitions`."""

    documents: list[str]
    heldout: list[str]
    definitions: dict[str, str]


def read_entries(folder: Path, part: str) -> dict[str, Entry]:
    """Entries of `data.<part>` by their offset (8 digits), in file order."""
    return dict(_parse_data(_open(folder, f"data.{part}")))


def build_corpus(folder: Path, seed: int, heldout_bytes: int = 30_000) -> Corpus:
    """Splits WordNet into training documents, about `heldout_bytes` of held-out ones, and taught words."""
    parts = {part: read_entries(folder, part) for part in PARTS}
    documents: list[list[Entry]] = []
    for entries in parts.values():
        plain = [entry for entry in entries.values() if _is_plain(entry)]
        documents += [
            plain[start : start + ENTRIES_PER_DOCUMENT]
            for start in range(0, len(plain), ENTRIES_PER_DOCUMENT)
        ]
    random.Random(seed).shuffle(documents)

    heldout: list[list[Entry]] = []
    while documents and sum(len(_text(document)) for document in heldout) < heldout_bytes:
        heldout.append(documents.pop())
    kept_back = {entry.gloss for document in heldout for entry in document}
    training = [[entry for entry in document if entry.gloss not in kept_back] for document in documents]
    definitions = {
        word: definition
        for word, definition in taught_definitions(folder, parts["noun"]).items()
        if not any(gloss.startswith(definition) for gloss in kept_back)
    }
    return Corpus(
        documents=[_text(document) for document in training if document],
        heldout=[_text(document) for document in heldout],
        definitions=definitions,
    )


def taught_definitions(folder: Path, nouns: dict[str, Entry]) -> dict[str, str]:
    """The commonest concrete nouns, by tag count, with the definition of one sense each.

    The sense is the first (most frequent) one; if it is a person and another one is an animal, the animal.
    """
    counts = _tag_counts(folder)
    candidates: dict[str, list[tuple[int, str, str]]] = {kind: [] for kind in TAUGHT_WORDS}
    for word, offsets in _noun_senses(folder):
        senses = [nouns[offset] for offset in offsets if offset in nouns]
        sense = senses[0]
        if sense.kind == PERSON:
            sense = next((other for other in senses if other.kind == ANIMAL), sense)
        definition = sense.definition
        tags = counts.get(word, 0)
        common = sense.kind in candidates and tags > 0 and word in sense.words
        if common and _is_teachable(word, definition):
            candidates[sense.kind].append((-tags, word, definition))
    return {
        word: definition
        for kind, (_, wanted) in TAUGHT_WORDS.items()
        for _, word, definition in sorted(candidates[kind])[:wanted]
    }


def question(word: str) -> str:
    """The user's question for the definition of `word`."""
    return QUESTION.format(word=word)


def answer(word: str, definition: str) -> str:
    return f"{word}: {definition}."


def exchange(word: str, definition: str) -> list[tuple[str, str]]:
    """The question and the answer as (role, text) messages."""
    return [("user", question(word)), ("assistant", answer(word, definition))]


def _text(document: list[Entry]) -> str:
    return "".join(f"{entry.line}\n" for entry in document) + "\n"


def _is_plain(entry: Entry) -> bool:
    """Whether the entry is common English: ASCII, no proper name, no Latin genus."""
    return entry.line.isascii() and entry.words[0].islower()


def _is_teachable(word: str, definition: str) -> bool:
    return (
        re.fullmatch(r"[a-z]{3,10}", word) is not None
        and word not in NOT_TAUGHT
        and re.fullmatch(r"[a-z][A-Za-z ,'-]{9,61}", definition) is not None
        and re.search(rf"\b{word}s?\b", definition) is None
    )


def _open(folder: Path, name: str) -> list[str]:
    path = folder / name
    if not path.is_file():
        raise CorpusError(
            f"{path}: not found. Install WordNet (Debian, Ubuntu: apt-get install wordnet-base) "
            "or name the folder that holds it with --wordnet."
        )
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parse_data(lines: list[str]) -> Iterator[tuple[str, Entry]]:
    """wndb(5WN): offset, lexicographer file, type, word count (hex), (word, lex id)..., pointers | gloss."""
    for line in lines:
        if line.startswith("  "):  # the licence at the top of each file
            continue
        fields, _, gloss = line.partition(" | ")
        offset, kind, _, count, *rest = fields.split(" ")
        words = tuple(
            re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]
        )
        yield offset, Entry(words, re.sub(r"\s+", " ", gloss).strip().rstrip(".;:, "), kind)


def _noun_senses(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each noun of `index.noun` with the offsets of its senses, the most frequent first."""
    for line in _open(folder, "index.noun"):
        if line.startswith("  "):
            continue
        fields = line.split()
        yield fields[0], fields[-int(fields[2]) :]


def _tag_counts(folder: Path) -> dict[str, int]:
    """How often each noun was tagged in the semantic concordance, over all its senses."""
    counts: dict[str, int] = {}
    for line in _open(folder, "cntlist.rev"):
        key, _, count = line.split(" ")
        word, _, rest = key.partition("%")
        if rest.startswith("1:"):  # 1 is the noun
            counts[word] = counts.get(word, 0) + int(count)
    return counts


def read_notice(path: Path) -> str:
    """WordNet's copyright and licence text, which copies of its text must include."""
    if not path.is_file():
        raise CorpusError(f"{path}: not found. Name the file with WordNet's licence with --notice.")
    return path.read_text(encoding="utf-8")
