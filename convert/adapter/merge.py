"""Opens a checkpoint with adapters merged into it: its tensors are read with what the adapters add.

Input: a checkpoint, the folders of PEFT adapters with their scales. Output: a `Checkpoint`, whose adapted tensors are
float32. For each adapter, in the order in which they are given: W + scale * (the sum over the ranks, in their order, of
column times row), each operation rounded to float32. The bits depend neither on the number of threads nor on how
many rows are read at once, which those of a matrix product of a library do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from kimi_gguf.convert.adapter.pairs import Adapter, Matrix, Pair, open_adapter
from kimi_gguf.convert.adapter.peft_config import CONFIG
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.source.checkpoint import Addition, Checkpoint, Merged, open_checkpoint
from kimi_gguf.engine.file_hash import CHUNK

_ELEMENTS = 1 << 16  # of a block of rows that stays in a core's cache while all ranks are added


@contextmanager
def open_merged(
    source: Path | str, adapters: Sequence[tuple[Path, float]], mtp: bool = True
) -> Iterator[Checkpoint]:
    """Open a checkpoint (as `open_checkpoint`) with adapters and their scales. Raises `ConvertError`."""
    with open_checkpoint(source, mtp) as checkpoint, ExitStack() as stack:
        opened = [
            (stack.enter_context(open_adapter(folder, checkpoint)), scale) for folder, scale in adapters
        ]
        for adapter, scale in opened:
            if adapter.config.invocation_tokens:
                raise ConvertError(
                    f"{adapter.folder / CONFIG}: alora_invocation_tokens",
                    expected="none",
                    found=list(adapter.config.invocation_tokens),
                    todo="it is active in a part of the text only: convert it to a file of its own, for --lora",
                )
            additions = {name: _addition(pair, scale) for name, pair in adapter.pairs.items()}
            merged = Merged(adapter.folder.absolute().name, _sha256(adapter), scale)
            checkpoint.merge(merged, additions, adapter.memory)
        yield checkpoint
        for adapter, _ in opened:
            adapter.check_unchanged()


def _sha256(adapter: Adapter) -> str:
    """Of its config and weights."""
    total = hashlib.sha256()
    for path in adapter.files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                total.update(chunk)
    return total.hexdigest()


def _addition(pair: Pair, scale: float) -> Addition:
    factor = np.float32(pair.scale * scale)

    def add(values: Matrix, first: int) -> None:
        a, b = pair.factors()
        columns = a.shape[1]
        step = max(_ELEMENTS // columns, 1)
        row, end = first // columns, first + len(values)
        while row * columns < end:
            block = b[row : row + step]
            total = block[:, :1] * a[0]
            for k in range(1, len(a)):
                total += block[:, k : k + 1] * a[k]
            begin, stop = max(row * columns, first), min((row + step) * columns, end)
            part = total.reshape(-1)[begin - row * columns : stop - row * columns]
            values[begin - first : stop - first] += factor * part
            row += step

    return add
