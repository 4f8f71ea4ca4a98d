"""Logits of llama.cpp at every position, computed in a separate process.

Input: an engine (a folder of libraries), a GGUF file, token ids, `RunOptions`.
Output: logits as numpy arrays and, on request, each layer's output and llama.cpp's own choice of experts.

The process exists because two builds of llama.cpp (patched and upstream) must never share one, and because
llama.cpp aborts on some bad input. The requests are in llama_worker.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.engine.llama import LlamaError, Logits
from kimi_gguf.engine.worker import Progress, Worker
from kimi_gguf.validate.errors import ValidateError

Ids = Sequence[int] | NDArray[np.integer[Any]]
# Of K and V, as llama.cpp's --cache-type-k has them.
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")


def is_quantized(cache_type: str) -> bool:
    """Whether a type of cache is quantized: llama.cpp then requires flash attention."""
    return cache_type not in ("F32", "F16", "BF16")


class Engine(Protocol):
    """A build of llama.cpp, as the environment with which llama-cpp-python loads it."""

    def environment(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class RunOptions:
    """How llama.cpp runs; the defaults are the most exact ones (float32 cache, plain attention)."""

    n_batch: int = 512  # tokens per llama_decode, over all sequences
    n_ubatch: int = 512  # tokens per graph
    n_ctx: int | None = None  # cells in total; None: as many as the sequences need
    threads: int = 1
    flash_attention: bool = False
    cache_type: str = "F32"  # one of CACHE_TYPES
    step_from: int | None = None  # from this position on, one token per sequence and llama_decode
    save_restore_at: int | None = None  # where sequences are saved, cleared and restored
    kv_unified: bool = False
    repack: bool = True  # let the CPU backend rearrange weights (llama.cpp's --repack)
    n_gpu_layers: int = 0
    trace: bool = False  # record layer outputs and chosen experts; one sequence only
    mtp: bool = False  # also run the MTP layer, on the same tokens
    lora: tuple[tuple[str, float], ...] = ()  # GGUF adapters and their scales


@dataclass(frozen=True)
class LlamaRun:
    """The results of a run. Arrays of one sequence are [T, ...] in the order of its ids."""

    logits: list[Logits]  # per sequence [T, V]
    mtp_logits: list[Logits] = field(default_factory=list)  # those of the MTP layer, with mtp
    layer_outputs: dict[int, Logits] = field(default_factory=dict)  # by layer [T, M]; with trace
    # by MoE layer [T, K], with trace; the MTP layer is the last
    experts: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    system: str = ""  # llama.cpp's own line about the CPU features and backends it uses
    log: str = ""  # the whole log


def run_logits(
    engine: Engine, gguf: Path, ids: Ids, options: RunOptions | None = None, progress: Progress | None = None
) -> Logits:
    """Logits [T, V] for the token ids [T] of one sequence. Raises ValidateError."""
    return run(engine, gguf, [ids], options, progress).logits[0]


def run(
    engine: Engine,
    gguf: Path,
    sequences: Sequence[Ids],
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> LlamaRun:
    """Decode the sequences in parallel, as a server with as many slots does. Raises ValidateError."""
    options = options or RunOptions()
    if options.trace and len(sequences) != 1:
        raise ValidateError(f"a traced run takes one sequence, and {len(sequences)} were given")
    with tempfile.TemporaryDirectory(prefix="kimi-validate-") as name:
        folder = Path(name)
        listed = [_listed(ids) for ids in sequences]
        request = {"folder": name, "options": asdict(options), "sequences": listed}
        answer, log = _ask(engine, gguf, "logits", progress, **request)
        return LlamaRun(
            logits=[np.load(folder / f"logits-{i}.npy") for i in range(len(sequences))],
            mtp_logits=[np.load(folder / f"mtp_logits-{i}.npy") for i in range(len(sequences) * options.mtp)],
            layer_outputs={i: np.load(folder / f"l_out-{i}.npy") for i in answer["l_out"]},
            experts={i: np.load(folder / f"ffn_moe_topk-{i}.npy") for i in answer["ffn_moe_topk"]},
            system=answer["system"],
            log=log,
        )


def continue_greedily(
    engine: Engine, gguf: Path, ids: Ids, count: int, options: RunOptions | None = None
) -> list[int]:
    """The `count` token ids that llama.cpp generates after `ids` with greedy sampling."""
    chosen = asdict(options or RunOptions())
    written: list[int]
    written, _ = _ask(engine, gguf, "continue_greedily", options=chosen, ids=_listed(ids), count=count)
    return written


def tokenize(engine: Engine, gguf: Path, text: str) -> list[int]:
    """Token ids of the text by the GGUF's own vocabulary; special tokens are matched, none is added."""
    ids: list[int] = _ask(engine, gguf, "tokenize", text=text)[0]
    return ids


def pieces(engine: Engine, gguf: Path, ids: Ids) -> list[bytes]:
    """The bytes of each token."""
    return [bytes.fromhex(piece) for piece in _ask(engine, gguf, "pieces", ids=_listed(ids))[0]]


def _listed(ids: Ids) -> list[int]:
    listed: list[int] = np.asarray(ids, dtype=np.int32).tolist()
    return listed


def _ask(
    engine: Engine, gguf: Path, do: str, progress: Progress | None = None, **request: Any
) -> tuple[Any, str]:
    """The answer of a new worker to one request about the file, and the log."""
    if not gguf.is_file():
        raise ValidateError(f"{gguf}: no such file")
    with Worker("-m", "kimi_gguf.validate.llama_worker", environment=engine.environment()) as worker:
        try:
            return worker.ask(do, progress, gguf=str(gguf.absolute()), **request), worker.log
        except LlamaError as error:
            raise ValidateError(f"{gguf}: {error}") from None
