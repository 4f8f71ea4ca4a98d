"""llama.cpp played step by step in a process of its own: what runs where, and what happens to states on the way.

In: a build, a GGUF, a `Setup` (devices, cache, sequences) and steps made by `decode`, `save`, `load`, `cut`. Out:
`Played` with the logits of every decoded token, in order, and the log. `PlayError` holds why llama.cpp refused.
The worker is this file run as a program: FOLDER/request.json in, FOLDER/answer.npy or FOLDER/error out.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from kimi_gguf.engine.builds import Engine

Logits = NDArray[np.float32]
Step = list[Any]


@dataclass(frozen=True)
class Setup:
    """How the model and its context are made; the defaults keep all of it on the CPU, in float32."""

    backend: str | None = None  # a shared library with another backend, loaded first
    devices: tuple[str, ...] | None = None  # by name; None: llama.cpp's own choice
    n_gpu_layers: int = 0  # the output counts as one
    offload_kqv: bool = True
    op_offload: bool = True
    flash_attention: bool = False
    cache_type: str = "F32"
    n_seq_max: int = 1
    n_rs_seq: int = 0  # states kept for taking tokens back
    kv_unified: bool = False
    n_ubatch: int = 512
    cells: int = 512  # of each sequence


@dataclass(frozen=True)
class Played:
    """Logits [tokens, V] in the order in which they were decoded, and what llama.cpp logged."""

    logits: Logits
    log: str


class PlayError(Exception):
    """Why there are no logits: what llama.cpp said."""


def decode(*tokens: tuple[int, int, int]) -> Step:
    """One llama_decode of (sequence, position, token id)."""
    return ["decode", [[int(number) for number in token] for token in tokens]]


def text(sequence: int, ids: Sequence[int] | NDArray[np.int64], first: int = 0) -> list[tuple[int, int, int]]:
    """Tokens for `decode`: the ids of one sequence from position `first` on."""
    return [(sequence, first + i, int(token)) for i, token in enumerate(ids)]


def save(sequence: int, file: Path) -> Step:
    """Write the state of a sequence into a file."""
    return ["save", sequence, str(file)]


def load(sequence: int, file: Path) -> Step:
    """Give a sequence the state that a file holds."""
    return ["load", sequence, str(file)]


def cut(sequence: int, first: int) -> Step:
    """Take back the tokens of a sequence from position `first` on; -1 empties it."""
    return ["cut", sequence, first]


def play(engine: Engine, model: Path, setup: Setup, steps: Sequence[Step], **environment: str) -> Played:
    """Play the steps on a build. Raises `PlayError`."""
    with tempfile.TemporaryDirectory(prefix="kimi-play-") as name:
        folder = Path(name)
        request = {"model": str(model), "setup": asdict(setup), "steps": list(steps)}
        (folder / "request.json").write_text(json.dumps(request))
        told = {**engine.environment(), "GGML_NO_BACKTRACE": "1", **environment}
        ended = subprocess.run(
            [sys.executable, __file__, name], env=told, capture_output=True, text=True, check=False
        )
        log = folder / "llama.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        if ended.returncode != 0:
            error = folder / "error"
            reason = (
                error.read_text() if error.exists() else f"status {ended.returncode}: {ended.stderr[-500:]}"
            )
            raise PlayError(f"{reason}\n{said[-1500:]}")
        return Played(np.load(folder / "answer.npy"), said)


def assert_same(got: Logits, expected: Logits) -> None:
    """The gate of the project for one model run in two ways: NMSE 1e-10 in all, 1e-8 at the worst position."""
    assert got.shape == expected.shape
    error = np.square(got.astype(np.float64) - expected).sum(1)
    power = np.square(expected.astype(np.float64)).sum(1)
    assert error.sum() / power.sum() <= 1e-10
    assert (error / power).max() <= 1e-8


class Player:
    """The worker's side: a model, a context, and a method a step."""

    def __init__(self, path: str, setup: Setup) -> None:
        import llama_cpp as api

        self.api: Any = api
        self.errors: list[str] = []
        self.log = Path("llama.log").open("w")  # noqa: SIM115 - as long as the process
        self._on_log = api.llama_log_callback(self._said)
        api.llama_log_set(self._on_log, None)
        api.llama_backend_init()
        self.model = self._expect(self._load(path, setup), "the model cannot be loaded")
        self.context = self._expect(
            api.llama_init_from_model(self.model, self._params(setup)), "no context can be made"
        )
        self.memory = api.llama_get_memory(self.context)
        self.vocab: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(4096, 0, 1)
        self.logits: list[Logits] = []

    def decode(self, tokens: list[list[int]]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 1
            batch.seq_id[i][0] = sequence
        status = self.api.llama_decode(self.context, batch)
        self._expect(status == 0, f"llama_decode gave {status} at {tokens[0][:2]}")
        rows = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(tokens), self.vocab))
        self.logits.append(rows.copy())

    def save(self, sequence: int, file: str) -> None:
        size = self.api.llama_state_seq_get_size(self.context, sequence)
        state = (ctypes.c_uint8 * size)()
        written = self.api.llama_state_seq_get_data(self.context, state, size, sequence)
        self._expect(written == size > 0, f"the state of sequence {sequence} cannot be saved")
        Path(file).write_bytes(bytes(state))

    def load(self, sequence: int, file: str) -> None:
        state = Path(file).read_bytes()
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        read = self.api.llama_state_seq_set_data(self.context, data, len(state), sequence)
        self._expect(read == len(state), f"{file}: the state of sequence {sequence} cannot be restored")

    def cut(self, sequence: int, first: int) -> None:
        done = self.api.llama_memory_seq_rm(self.memory, sequence, first, -1)
        self._expect(done, f"sequence {sequence} cannot be cut at {first}")

    def _load(self, path: str, setup: Setup) -> Any:
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = setup.n_gpu_layers
        if setup.backend is not None:
            ggml = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libggml.so"))
            ggml.ggml_backend_load.restype = ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
            loaded = ggml.ggml_backend_load(setup.backend.encode())
            self._expect(loaded, f"{setup.backend}: the backend cannot be loaded")
            if setup.devices is not None:
                found = [ggml.ggml_backend_dev_by_name(name.encode()) for name in setup.devices]
                self._expect(all(found), f"not all of {setup.devices} are there")
                self._devices = (ctypes.c_void_p * (len(found) + 1))(*found, None)
                params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        return self.api.llama_model_load_from_file(path.encode(), params)

    def _params(self, setup: Setup) -> Any:
        p = self.api.llama_context_default_params()
        p.n_ctx = setup.cells * setup.n_seq_max
        p.n_batch, p.n_ubatch = 4096, setup.n_ubatch
        p.n_seq_max, p.n_rs_seq, p.kv_unified = setup.n_seq_max, setup.n_rs_seq, setup.kv_unified
        p.n_threads = p.n_threads_batch = 1
        p.offload_kqv, p.op_offload = setup.offload_kqv, setup.op_offload
        p.flash_attn_type = int(setup.flash_attention)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        p.type_k = p.type_v = gguf.GGMLQuantizationType[setup.cache_type].value
        return p

    def _expect(self, good: Any, what: str) -> Any:
        if not good:
            raise PlayError(f"{what}: {'; '.join(self.errors) or 'it gave no reason'}")
        return good

    def _said(self, level: int, line: bytes, _data: int | None) -> None:
        self.log.write(line.decode(errors="replace"))
        self.log.flush()
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(line.decode(errors="replace").strip())


def main() -> int:
    os.chdir(sys.argv[1])
    request = json.loads(Path("request.json").read_text())
    try:
        player = Player(request["model"], Setup(**request["setup"]))
        for name, *arguments in request["steps"]:
            getattr(player, name)(*arguments)
    except PlayError as error:
        Path("error").write_text(str(error))
        return 1
    np.save("answer.npy", np.concatenate(player.logits))
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's memory goes with the process


if __name__ == "__main__":
    sys.exit(main())
