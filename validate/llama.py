"""Logits of llama.cpp at every position, computed in a process of its own.

Flows in: an engine (a folder of libraries), a GGUF file, token ids, `RunOptions`.
Flows out: logits as numpy arrays and, on request, each layer's output and llama.cpp's own choice of experts.

The process exists because two builds of llama.cpp (patched and pristine) must never share one, and because
llama.cpp aborts on some bad input. What is said to the worker and what it answers is in llama_worker.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.validate.errors import ValidateError

Ids = Sequence[int] | NDArray[np.integer[Any]]
Logits = NDArray[np.float32]
Progress = Callable[[int, int], None]  # tokens done, tokens in all


class Engine(Protocol):
    """A build of llama.cpp: what its environment must hold for llama-cpp-python to load it."""

    def environment(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class RunOptions:
    """How llama.cpp runs; the defaults are the exact ones (float32 cache, plain attention)."""

    n_batch: int = 512  # tokens per llama_decode, over all sequences
    n_ubatch: int = 512  # tokens per graph
    n_ctx: int | None = None  # cells in all; None: what the sequences need
    threads: int = 1
    flash_attention: bool = False
    cache_type: str = "F32"  # of K and V alike, by ggml's name: F32, F16, BF16, Q8_0, Q4_0, ...
    step_from: int | None = None  # from this position on, one token per sequence and llama_decode
    save_restore_at: int | None = None  # here every sequence is saved, the memory cleared, and all restored
    kv_unified: bool = False
    repack: bool = True  # let the CPU backend rearrange weights (llama.cpp's --repack)
    n_gpu_layers: int = 0
    trace: bool = False  # record layer outputs and chosen experts; one sequence only


@dataclass(frozen=True)
class LlamaRun:
    """What a run left. Arrays of one sequence are [T, ...] in the order of its ids."""

    logits: list[Logits]  # per sequence [T, V]
    layer_outputs: dict[int, Logits] = field(default_factory=dict)  # by layer [T, M]; with trace
    experts: dict[int, NDArray[np.int32]] = field(default_factory=dict)  # by MoE layer [T, K]; with trace
    system: str = ""  # llama.cpp's own line about the CPU features and backends it uses
    log: str = ""  # everything it logged


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
    """Decode the sequences side by side, as a server with as many slots would. Raises ValidateError."""
    options = options or RunOptions()
    if options.trace and len(sequences) != 1:
        raise ValidateError(f"a traced run takes one sequence, and {len(sequences)} were given")
    with tempfile.TemporaryDirectory(prefix="kimi-validate-") as name:
        folder = Path(name)
        for i, ids in enumerate(sequences):
            np.save(folder / f"ids-{i}.npy", np.asarray(ids, dtype=np.int32))
        request = {"task": "logits", "options": asdict(options), "sequences": len(sequences)}
        answer = _ask(engine, gguf, folder, request, progress)
        return LlamaRun(
            logits=[np.load(folder / f"logits-{i}.npy") for i in range(len(sequences))],
            layer_outputs={i: np.load(folder / f"l_out-{i}.npy") for i in answer["l_out"]},
            experts={i: np.load(folder / f"ffn_moe_topk-{i}.npy") for i in answer["ffn_moe_topk"]},
            system=answer["system"],
            log=(folder / "llama.log").read_text(errors="replace"),
        )


def continue_greedily(
    engine: Engine, gguf: Path, ids: Ids, count: int, options: RunOptions | None = None
) -> list[int]:
    """The `count` token ids that llama.cpp writes after `ids`, always taking the most likely one."""
    with tempfile.TemporaryDirectory(prefix="kimi-validate-") as name:
        np.save(Path(name) / "ids-0.npy", np.asarray(ids, dtype=np.int32))
        request = {"task": "continue", "options": asdict(options or RunOptions()), "count": count}
        answer = _ask(engine, gguf, Path(name), request, None)
        return [int(i) for i in answer["ids"]]


def tokenize(engine: Engine, gguf: Path, text: str) -> list[int]:
    """Token ids of the text by the GGUF's own vocabulary; special tokens are recognised, none is added."""
    with tempfile.TemporaryDirectory(prefix="kimi-validate-") as name:
        (Path(name) / "text").write_bytes(text.encode())
        answer = _ask(engine, gguf, Path(name), {"task": "tokenize"}, None)
        return [int(i) for i in answer["ids"]]


def pieces(engine: Engine, gguf: Path, ids: Ids) -> list[bytes]:
    """The bytes that each token stands for."""
    with tempfile.TemporaryDirectory(prefix="kimi-validate-") as name:
        np.save(Path(name) / "ids-0.npy", np.asarray(ids, dtype=np.int32))
        answer = _ask(engine, gguf, Path(name), {"task": "pieces"}, None)
        return [bytes.fromhex(piece) for piece in answer["pieces"]]


def _ask(
    engine: Engine, gguf: Path, folder: Path, request: dict[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Run the worker in `folder` on one request about the file and read its answer."""
    if not gguf.is_file():
        raise ValidateError(f"{gguf}: no such file")
    (folder / "request.json").write_text(json.dumps(request | {"gguf": str(gguf.absolute())}))
    command = [sys.executable, "-m", "kimi_gguf.validate.llama_worker", str(folder)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", **engine.environment()}
    with (folder / "stderr").open("wb") as stderr:
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                done, _, total = line.partition(" ")
                if progress is not None and total.strip().isdigit():
                    progress(int(done), int(total))
            status = worker.wait()
        except BaseException:
            worker.kill()
            worker.wait()
            raise
    answer = folder / "answer.json"
    if status == 0 and answer.is_file():
        result: dict[str, Any] = json.loads(answer.read_text())
        return result
    raise ValidateError(f"{gguf}: {_reason(folder, status)}")


def _reason(folder: Path, status: int) -> str:
    """One line about why the worker ended: its own word, or the signal and the last thing llama.cpp said."""
    error = folder / "error"
    if error.is_file():
        return error.read_text()
    said = [line.strip() for line in (folder / "stderr").read_text(errors="replace").splitlines()]
    said = [line for line in said if line] or ["it said nothing"]
    telling = [line for line in said if "GGML_ASSERT" in line or "rror" in line] or said
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the llama.cpp process {how}: {telling[-1]}"
