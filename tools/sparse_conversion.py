"""Converts without storing zeros, for sparse checkpoints of a published model's size.

    tools/run sparse_conversion SRC [OUT] [--resume]

Input: a checkpoint; without OUT it is only planned. Output: the GGUF file, with holes where it is zero, and on standard
output a JSON object: the plan's number of tensors and bytes, seconds, and the peak of the resident memory in bytes.
Every tensor is entered in the journal, so that a killed conversion of few tensors can be resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from kimi_gguf.bench.load import resident_memory
from kimi_gguf.convert.conversion import Options, convert, plan_only
from kimi_gguf.convert.output import growing, unfinished
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.engine.tensor_types import Bytes

_write_all = growing._write_all


def _write_sparse(fd: int, data: Bytes, offset: int) -> None:
    """Write `data` at `offset`, or leave a hole if it is zero and the file has no data there."""
    end = offset + len(data)
    if not data.any():
        os.ftruncate(fd, max(end, os.fstat(fd).st_size))
        try:
            if os.lseek(fd, offset, os.SEEK_DATA) >= end:
                return
        except OSError:
            return  # no data from `offset` on
    _write_all(fd, data, offset)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, nargs="?", help="file to write (default: only plan)")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished output")
    parsed = parser.parse_args()
    wanted, began = TypeRequest(TYPES["BF16"], default=True), time.monotonic()
    if parsed.output is None:
        plan = plan_only(parsed.source, wanted)
    else:
        unfinished.SYNC_SECONDS = 0
        growing._write_all = _write_sparse
        plan = convert(parsed.source, parsed.output, wanted, Options(resume=parsed.resume))
    seconds, peak = time.monotonic() - began, resident_memory(os.getpid()).get("peak", 0)
    found = {"tensors": len(plan.tensors), "bytes": plan.nbytes, "seconds": seconds, "peak": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
