"""llama.cpp's own converter from the pinned archive, run in a process of its own on checkpoints of the tests.

Its tokenizer step would run the checkpoint's Python. It is replaced: the tokenizer's keys are left out, or
taken over from a GGUF file of ours, so that both files hold the same vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
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
from conversion.kimi_linear import KimiLinearModel

def take_over(path, writer):
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)

with torch.inference_mode():
    for job in json.loads(sys.argv[1]):
        vocab = job["vocabulary"]
        KimiLinearModel.set_vocab = lambda self: take_over(vocab, self.gguf_writer) if vocab else None
        KimiLinearModel(Path(job["source"]), gguf.LlamaFileType[job["type"]], Path(job["output"])).write()
"""


@dataclass(frozen=True)
class Job:
    """A conversion; with `vocabulary`, a GGUF file, the tokenizer's keys are taken over from it."""

    source: Path
    output: Path
    type: str
    vocabulary: Path | None = None


def environment() -> dict[str, str]:
    """Variables under which the command runs."""
    folder = upstream_source() / "llama.cpp"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "gguf-py"), str(folder)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def command(jobs: Sequence[Job]) -> list[str]:
    """The command that does all jobs, in one process: most of its time on small ones goes into starting it."""
    described = [
        {
            "source": str(job.source),
            "output": str(job.output),
            "type": FILE_TYPES[job.type],
            "vocabulary": job.vocabulary and str(job.vocabulary),
        }
        for job in jobs
    ]
    return [sys.executable, "-c", SCRIPT, json.dumps(described)]


def upstream_convert(jobs: Sequence[Job]) -> None:
    """Convert all."""
    done = subprocess.run(
        command(jobs), env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
