"""Compare the metrics' sensitivity: `tools/run fault_table CHECKPOINT TEXT > TABLE.md`.

Input: a checkpoint and a text file. Output: a Markdown table on standard output with one row for each deliberate
fault. Each row compares the correct reference with the faulty one. llama.cpp is used only to tokenize the text.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import ensure
from kimi_gguf.tools.faults import faults_of
from kimi_gguf.validate.llama import tokenize
from kimi_gguf.validate.measure import Ids, truth
from kimi_gguf.validate.metrics import compare, compare_choices, summarise
from kimi_gguf.validate.probe import reference_of
from kimi_gguf.validate.report import error_text, share_text

TOKENS = 512
COMMAND = "tools/run fault_table"


def table(checkpoint_folder: Path, ids: Ids) -> str:
    """One row for each fault: metrics of the logits, and perplexity."""
    with open_checkpoint(checkpoint_folder) as checkpoint:
        sound = [truth(reference_of(checkpoint, quiet), ids) for quiet in (False, True)]
        rows = []
        for name, model in faults_of(checkpoint.config.architecture).items():
            found = [truth(reference_of(checkpoint, quiet, model=model), ids) for quiet in (False, True)]
            plain, probe = (
                summarise(compare(right.logits, wrong.logits, ids))
                for right, wrong in zip(sound, found, strict=True)
            )
            choices = compare_choices(sound[0].experts, sound[0].margins, found[0].experts, len(ids))
            rows.append(
                f"| {name} | {error_text(plain.nmse)} | {error_text(plain.nmse_median)} "
                f"| {error_text(plain.kld_mean)} | {share_text(plain.top1)} | {int(choices.differs.sum())} "
                f"| {plain.ppl_reference:.2f} → {plain.ppl_test:.2f} "
                f"({100 * (plain.ppl_test / plain.ppl_reference - 1):+.2f} %) | {error_text(probe.nmse)} |"
            )
    head = (
        "| fault | NMSE | median NMSE | mean KLD | top-1 agreement | positions with expert mismatches "
        "| perplexity | NMSE in the quiet probe |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    return "\n".join([head, *rows])


HEAD = """\
# What single faults change

Written by `{command}`; do not edit. The correct float32 reference against one with a
planted fault, on {count} tokens (ids sha256 {digest}): perplexity and top-1 agreement hardly show
faults that the NMSE of the quiet probe shows.
"""


def main() -> int:
    if len(sys.argv) != 3:
        print(f"usage: {COMMAND} CHECKPOINT TEXT", file=sys.stderr)
        return 2
    checkpoint, text = Path(sys.argv[1]), Path(sys.argv[2])
    with TemporaryDirectory() as folder:
        gguf = Path(folder) / "vocabulary.gguf"
        convert(checkpoint, gguf, TYPES["Q8_0"])
        ids = np.array(tokenize(ensure(), gguf, text.read_text(encoding="utf-8"))[:TOKENS])
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16]
    print(HEAD.format(command=f"{COMMAND} {' '.join(sys.argv[1:])}", count=len(ids), digest=digest))
    print(table(checkpoint, ids))
    return 0


if __name__ == "__main__":
    sys.exit(main())
