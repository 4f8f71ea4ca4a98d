"""The command that runs llama.cpp's own converter from the pinned archive.

Its tokenizer step would run the checkpoint's Python. Instead, the tokenizer's keys are left out, or copied from one of
our GGUF files, so that both files have the same vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.engine.builds import upstream_source

FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}

SCRIPT = """
import json, sys
from pathlib import Path
import gguf, torch
from conversion import get_model_class

def copy_tokenizer(path, writer):
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)

with torch.inference_mode():
    for job in json.loads(sys.argv[1]):
        vocab = job["vocabulary"]
        source = Path(job["source"])
        config = json.loads((source / "config.json").read_text())
        model = get_model_class(config["architectures"][0])
        model.set_vocab = lambda self: copy_tokenizer(vocab, self.gguf_writer) if vocab else None
        model.no_mtp = not job["mtp"]
        # As it is stored: AutoConfig renames keys of bailing_hybrid, and the converter then does not find them.
        stored = {"hparams": config} if config["model_type"] == "bailing_hybrid" else {}
        model(source, gguf.LlamaFileType[job["type"]], Path(job["output"]), **stored).write()
"""


@dataclass(frozen=True)
class Job:
    """A conversion. vocabulary: a GGUF file whose tokenizer keys are copied. mtp: False is its --no-mtp."""

    source: Path
    output: Path
    type: str
    vocabulary: Path | None = None
    mtp: bool = True


def environment(folder: Path | None = None) -> dict[str, str]:
    """The environment of the command; `folder` has llama.cpp's sources (default: those of the pin)."""
    folder = folder or upstream_source() / "llama.cpp"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "gguf-py"), str(folder)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def command(jobs: Sequence[Job]) -> list[str]:
    """The command that does all jobs in one process: for small jobs most of the time is spent on starting it."""
    described = [vars(job) | {"type": FILE_TYPES[job.type]} for job in jobs]
    return [sys.executable, "-c", SCRIPT, json.dumps(described, default=str)]
