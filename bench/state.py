"""Edits the saved state of a sequence: for contexts without flash attention, and repeated to any depth.

Input: the bytes of llama_state_seq_get_data for one stream with latent attention. Output: the edited bytes.
The layout (llama.cpp, llama_kv_cache::state_write and llama_memory_recurrent::state_write): a mark and the
number of the sequence; streams, cells; the position and sequence of each cell; whether V is transposed, layers; for
each layer the type, the row size and a row per cell; then the recurrent part: cells, the position, and states; then
the indexer's cache, if there is one, laid out like the first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEAD = 8  # bytes of the mark and the sequence number
CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
ROWS = np.dtype([("type", "<i4"), ("size", "<u8")])  # packed, as written

Bytes = NDArray[np.uint8]


class StateError(ValueError):
    """The bytes do not have the expected layout."""


def _check(condition: bool) -> None:
    if not condition:
        raise StateError("the saved state is not laid out as this llama.cpp lays it out")


def _cells(state: Bytes) -> int:
    """Number of cells of the only stream."""
    streams, cells = state[HEAD : HEAD + 8].view("<u4").tolist()
    _check(streams == 1 and cells > 0)
    return int(cells)


def plain_layout(state: Bytes) -> Bytes:
    """The state for a context without flash attention.

    With latent attention the cache stores only K, and V is the beginning of each row. Both layouts therefore have the
    same bytes; only the flag for a transposed V differs. An indexer (GLM-5.3-Flash) has a second cache of keys at the
    end, which begins with the same table of cells.
    """
    flag = HEAD + 8 + _cells(state) * CELL.itemsize
    cells = state[HEAD:flag].tobytes()
    second = state.tobytes().find(cells, flag)
    changed = state.copy()
    for at in (flag, *([second + len(cells)] if second >= 0 else [])):
        _check(state[at : at + 4].tobytes() in (bytes(4), b"\1\0\0\0"))
        changed[at : at + 4] = (1, 0, 0, 0)
    return changed


def repeated(state: Bytes, depth: int) -> Bytes:
    """The state of `depth` tokens, made by repeating the cache rows of the given state.

    The time of attention does not depend on the values, so a large depth does not require hours of decoding.
    The recurrent part is unchanged except for its position.
    """
    cells = _cells(state)
    at = HEAD + 8 + cells * CELL.itemsize
    transposed, layers = state[at : at + 8].view("<u4").tolist()
    _check(transposed == 0 and 0 < layers <= 512)
    places = np.zeros(depth, CELL)
    places["position"], places["sequences"] = np.arange(depth), 1
    counts = np.array([1, depth], "<u4")
    parts = [state[:HEAD], counts.view(np.uint8), places.view(np.uint8), state[at : at + 8]]
    at += 8
    for _ in range(layers):
        _check(at + ROWS.itemsize <= len(state))
        header = state[at : at + ROWS.itemsize]
        size = int(header.view(ROWS)["size"][0])
        _check(0 < size <= 1 << 20)
        at += ROWS.itemsize
        rows = state[at : at + cells * size]
        parts += [header, *depth // cells * [rows], rows[: depth % cells * size]]
        at += cells * size
    recurrent = state[at:].copy()
    _check(len(recurrent) >= 8 and recurrent[:4].view("<u4")[0] == 1)
    _check(recurrent[4:8].view("<i4")[0] == cells - 1)
    recurrent[4:8] = np.array([depth - 1], "<i4").view(np.uint8)
    return np.concatenate([*parts, recurrent])
