"""The process that holds one build of llama.cpp and one loaded model: `python -m kimi_gguf.bench.worker`.

Flows in: one request a line on standard input, JSON, {"do": one of REQUESTS, ...}. Flows out: for each an answer on
standard output: {"ok": {...}} or {"error": "one line", "room": whether memory was lacking}, before it perhaps
{"progress": [done, total]} lines.
Parent and protocol: contender.py. `LLAMA_CPP_LIB_PATH` names the build; two builds never share a process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.bench.ggml_devices import Devices
from kimi_gguf.bench.state import Bytes, StateError, plain_layout, repeated

LOG_ERROR = 4  # ggml's level
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# What llama.cpp's log says of memory: which figure, and the line's form; sizes in MiB.
MEMORY = (
    ("weights", re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")),
    ("kv", re.compile(r"(\S+) KV buffer size = +([\d.]+) MiB")),
    ("recurrent", re.compile(r"(\S+) RS buffer size = +([\d.]+) MiB")),
    ("output", re.compile(r"(\S+) +output buffer size = +([\d.]+) MiB")),
    ("compute", re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB")),
)

FALLBACK = re.compile(r"operators not used|stays absorbed")  # ggml_ops/*/graph
NO_ROOM = re.compile(r"alloc|out of memory", re.IGNORECASE)


class WorkerError(Exception):
    """One line for the person who asked."""


class NoRoomError(WorkerError):
    """Memory was lacking."""


class Llama:
    """The build, the model and its contexts, one for each set of options."""

    def __init__(self, answers: TextIO) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._answers = answers
        self.errors: list[str] = []
        self.fallbacks: list[str] = []  # what our operators did not serve, and why
        self.memory: dict[str, dict[str, float]] = {}  # figure -> buffer -> MiB, since it was last emptied
        self._log = llama_cpp.llama_log_callback(self._on_log)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.contexts: dict[str, Context] = {}

    def _on_log(self, level: int, text: bytes, _data: int | None) -> None:
        line = text.decode(errors="replace").strip()
        if level == LOG_ERROR:
            self.errors.append(line)
        if FALLBACK.search(line) and line not in self.fallbacks:
            self.fallbacks.append(line)
        for name, pattern in MEMORY:
            if match := pattern.search(line):
                buffers = self.memory.setdefault(name, {})
                buffers[match[1]] = buffers.get(match[1], 0.0) + float(match[2])

    def said(self) -> str:
        """What llama.cpp gave as errors since it was last asked, in one line."""
        errors, self.errors = self.errors, []
        return "; ".join(errors) or "it gave no reason"

    def failure(self, what: str) -> WorkerError:
        """What llama.cpp could not do, and whether for want of memory."""
        said = self.said()
        return (NoRoomError if NO_ROOM.search(said) else WorkerError)(f"llama.cpp cannot {what}: {said}")

    def progress(self, done: int, total: int) -> None:
        """Tell the parent."""
        print(json.dumps({"progress": [done, total]}), file=self._answers, flush=True)

    def devices(self) -> dict[str, Any]:
        """What there is to compute on."""
        return {"devices": Devices().listed()}

    def load(self, gguf: str, repack: bool, device: str | None = None) -> dict[str, Any]:
        """Load the model, all of it onto a device; `seconds` is the time of loading alone."""
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        if device is not None:
            params.n_gpu_layers = -1
            params.split_mode = self.api.LLAMA_SPLIT_MODE_NONE
            alone = Devices().alone(device)  # lives until the model is loaded
            params.devices = ctypes.cast(alone, ctypes.c_void_p)
        params.use_extra_bufts = repack
        self.memory = {}
        began = time.perf_counter()
        self.model = self.api.llama_model_load_from_file(gguf.encode(), params)
        seconds = time.perf_counter() - began
        if not self.model:
            raise self.failure("load it")
        return {
            "seconds": seconds,
            "memory": self.memory,
            "n_vocab": self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model)),
            "system": self.api.llama_print_system_info().decode(errors="replace").strip(),
        }

    def context(self, name: str, **options: Any) -> dict[str, Any]:
        """Make the context `name`, if it is not there; see Context for the options."""
        if name not in self.contexts:
            self.memory = {}
            self.contexts[name] = Context(self, **options)
        return {"memory": self.contexts[name].memory, "fallbacks": self.fallbacks}

    def free(self, name: str) -> dict[str, Any]:
        """Free a context and its state."""
        context = self.contexts.pop(name, None)
        if context is not None:
            self.api.llama_free(context.context)
        return {}

    def fill(self, name: str, depth: int, file: str) -> dict[str, Any]:
        """Bring every sequence of a context from where it stands to `depth` tokens; keep and save that state."""
        self.contexts[name].fill(depth)
        with Path(file).open("wb") as out:
            for state in self.contexts[name].states:
                out.write(len(state).to_bytes(8, "little"))
                out.write(state.data)
        return {}

    def restore(self, name: str, file: str) -> dict[str, Any]:
        """Take the state of a file for the context's, from now on."""
        self.contexts[name].keep(read_states(file))
        return {}

    def repeat(self, name: str, file: str, depth: int) -> dict[str, Any]:
        """The state of a file, repeated to `depth` tokens, into the context; it is not kept.

        The answer's depth is the one at which llama.cpp goes on.
        """
        context = self.contexts[name]
        context.keep([repeated(state, depth) for state in read_states(file)])
        context.states = []
        return {"depth": context.depth}

    def empty(self, name: str) -> dict[str, Any]:
        """No tokens in the context from now on."""
        self.contexts[name].keep([])
        return {}

    def time(
        self, name: str, batch: int, steps: int, warm: int, threads: int, back: bool = True
    ) -> dict[str, Any]:
        """Seconds of each of `steps` decodes of `batch` tokens a sequence, behind the kept state.

        warm: decodes before them, untimed. back: restore the state first; else go on from where the context is.
        """
        return {"seconds": self.contexts[name].time(batch, steps, warm, threads, back)}

    def logits(self, name: str, threads: int, file: str) -> dict[str, Any]:
        """Logits of one more token of the first sequence, as .npy."""
        np.save(file, self.contexts[name].next_logits(threads))
        return {}


class Context:
    """A llama_context and the state that it is put back to before each measurement."""

    def __init__(
        self,
        llama: Llama,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        sequences: int,
        flash: bool,
        cache_type: str,
        threads: int,
    ) -> None:
        """n_ctx: cells of each sequence. n_batch: tokens of a decode over all sequences. cache_type: of K and V."""
        api = llama.api
        self.llama, self.api, self.sequences, self.flash = llama, api, sequences, flash
        p = api.llama_context_default_params()
        p.n_ctx, p.n_seq_max = n_ctx * sequences, sequences
        p.n_batch, p.n_ubatch = max(n_batch, sequences), n_ubatch
        p.n_threads = p.n_threads_batch = threads
        kinds = (api.LLAMA_FLASH_ATTN_TYPE_DISABLED, api.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        p.flash_attn_type = kinds[flash]
        kind = getattr(api, f"GGML_TYPE_{cache_type.upper()}", None)
        if kind is None:
            raise WorkerError(f"cache type {cache_type!r} is not one of ggml's types")
        p.type_k = p.type_v = kind
        p.no_perf = True
        self.context = api.llama_init_from_model(llama.model, p)
        if not self.context:
            raise llama.failure("make a context")
        self.memory = llama.memory
        self.n_batch = int(p.n_batch)
        self._batch = api.llama_batch_init(self.n_batch, 0, 1)
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(llama.model))
        self._ids = (
            np.random.default_rng(1).integers(0, n_vocab, 1 << 16).tolist()
        )  # the prompt of every build
        self.states: list[Bytes] = []
        self.depth = 0  # tokens of a sequence in `states`
        self._at = 0  # tokens of a sequence in the context

    def keep(self, states: list[Bytes]) -> None:
        """From now on this is the state, of each sequence."""
        if states and len(states) != self.sequences:
            raise WorkerError(f"a state of {len(states)} sequences for a context of {self.sequences}")
        self.states = [plain_layout(state) for state in states] if not self.flash else states
        self.put_back()

    def put_back(self) -> None:
        """The kept state into the context."""
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, False)
        for sequence, state in enumerate(self.states):
            buffer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self.api.llama_state_seq_set_data(self.context, buffer, len(state), sequence) == 0:
                raise WorkerError(f"a saved state cannot be loaded: {self.llama.said()}")
        self._at = self.depth = int(self.api.llama_memory_seq_pos_max(memory, 0)) + 1

    def fill(self, depth: int) -> None:
        """Decode up to `depth` tokens a sequence, and keep that."""
        if self.depth == depth == 0:
            return
        self.put_back()
        step = max(1, min(512, self.n_batch) // self.sequences)
        while self._at < depth:
            self._decode(min(step, depth - self._at))
            self.llama.progress(self._at, depth)
        states = []
        for sequence in range(self.sequences):
            size = self.api.llama_state_seq_get_size(self.context, sequence)
            state = np.empty(size, np.uint8)
            buffer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self.api.llama_state_seq_get_data(self.context, buffer, size, sequence) != size:
                raise WorkerError(f"the state cannot be saved: {self.llama.said()}")
            states.append(state)
        self.states, self.depth = states, depth

    def time(self, batch: int, steps: int, warm: int, threads: int, back: bool) -> list[float]:
        """See Llama.time."""
        self.api.llama_set_n_threads(self.context, threads, threads)
        if back:
            self.put_back()
        seconds = []
        for _ in range(warm + steps):
            self._prepare(batch)
            began = time.perf_counter()
            self._run(batch)
            seconds.append(time.perf_counter() - began)
        return seconds[warm:]

    def next_logits(self, threads: int) -> NDArray[np.float32]:
        """See Llama.logits."""
        self.api.llama_set_n_threads(self.context, threads, threads)
        self.put_back()
        self._decode(1)
        row = self.api.llama_get_logits_ith(self.context, 0)
        n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.llama.model))
        return np.ctypeslib.as_array(row, (n_vocab,)).copy()

    def _decode(self, count: int) -> None:
        self._prepare(count)
        self._run(count)

    def _prepare(self, count: int) -> None:
        """The next `count` tokens of every sequence; logits of each one's last token, as when a prompt is read."""
        batch, row = self._batch, 0
        for sequence in range(self.sequences):
            for i in range(count):
                batch.token[row] = self._ids[(self._at + i + 1000 * sequence) % len(self._ids)]
                batch.pos[row] = self._at + i
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = i == count - 1
                row += 1
        batch.n_tokens = row

    def _run(self, count: int) -> None:
        """Decode what was prepared."""
        status = self.api.llama_decode(self.context, self._batch)
        if status != 0:
            raise WorkerError(f"llama_decode failed with status {status}: {self.llama.said()}")
        self.api.llama_synchronize(self.context)
        self._at += count


def read_states(file: str) -> list[Bytes]:
    """The states in a file, one for each sequence."""
    data, states, at = np.fromfile(file, np.uint8), [], 0
    while at < len(data):
        size = int(data[at : at + 8].view("<u8")[0])
        states.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return states


REQUESTS = ("devices", "load", "context", "free", "fill", "restore", "repeat", "empty", "time", "logits")


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    llama = Llama(answers)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do not in REQUESTS:
                raise WorkerError(f"unknown request {do!r}")
            answer = {"ok": getattr(llama, do)(**request)}
        except (WorkerError, StateError, OSError) as error:
            answer = {"error": " ".join(str(error).split()), "room": isinstance(error, NoRoomError)}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # llama.cpp's memory goes with the process


if __name__ == "__main__":
    main()
