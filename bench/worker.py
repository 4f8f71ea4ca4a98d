"""The process that holds one build of llama.cpp and one loaded model: `python -m kimi_gguf.bench.worker`.

Input: the requests that `Requests` defines, by runner.py; the protocol is that of engine/worker.py.
Output: their answers; states and logits as files that a request names.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_gguf.bench.state import Bytes, StateError, plain_layout, repeated
from kimi_gguf.engine.llama import Context, Llama, LlamaError, Logits, Model
from kimi_gguf.engine.worker import Progress, serve

# Lines of llama.cpp's log about memory: buffer, part and MiB; and the names of the parts in records.
MEMORY = re.compile(r"(\S+) +(model|KV|RS|output|compute) buffer size = +([\d.]+) MiB")
PARTS = {"model": "weights", "KV": "kv", "RS": "recurrent", "output": "output", "compute": "compute"}

FALLBACK = re.compile(r"operators not used|stays absorbed")  # ggml_ops/*/graph


class Requests:
    """The requests, and the model and its contexts, one for each set of options."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._fallbacks: list[str] = []  # operators that were not used, and the reasons
        self._memory: dict[str, dict[str, float]] = {}  # figure -> buffer -> MiB, since the last reset
        self._llama = Llama(self._on_line)
        self._model: Model | None = None
        self._contexts: dict[str, BenchContext] = {}

    def _on_line(self, line: str) -> None:
        if FALLBACK.search(line) and line not in self._fallbacks:
            self._fallbacks.append(line)
        if match := MEMORY.search(line):
            buffers = self._memory.setdefault(PARTS[match[2]], {})
            buffers[match[1]] = buffers.get(match[1], 0.0) + float(match[3])

    def _load_backend(self) -> None:
        """Load the backend that GGML_BACKEND_PATH names, as llama.cpp's programs do."""
        if path := os.environ.get("GGML_BACKEND_PATH"):
            self._llama.load_backend(path)

    def devices(self) -> dict[str, Any]:
        """The available devices."""
        self._load_backend()
        return {"devices": self._llama.devices()}

    def load(
        self, gguf: str, repack: bool, device: str | None = None, workers: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Load the model, on a device or on workers with all layers; `seconds` is the time of loading alone."""
        params: dict[str, Any] = {"n_gpu_layers": -1 if workers else 0}
        for endpoint in workers:
            self._llama.add_worker(endpoint)
        if device is not None:
            self._load_backend()
            params = {"n_gpu_layers": -1, "split_mode": self._llama.api.LLAMA_SPLIT_MODE_NONE}
        self._memory = {}
        began = time.perf_counter()
        self._model = self._llama.load(gguf, device and [device], use_extra_bufts=repack, **params)
        return {
            "seconds": time.perf_counter() - began,
            "memory": self._memory,
            "n_vocab": self._model.n_vocab,
            "system": self._llama.system,
        }

    def traffic(self, workers: Sequence[str]) -> dict[str, int]:
        """Bytes sent to and received from the workers so far."""
        sent, received = zip(*map(self._llama.traffic, workers), strict=True) if workers else ((0,), (0,))
        return {"sent": sum(sent), "received": sum(received)}

    def context(self, name: str, **options: Any) -> dict[str, Any]:
        """Create the context `name` if it does not exist; see BenchContext for the options."""
        if name not in self._contexts:
            self._memory = {}
            assert self._model is not None
            context = BenchContext(self._model, **options)
            context.memory = self._memory
            self._contexts[name] = context
        return {"memory": self._contexts[name].memory, "fallbacks": self._fallbacks}

    def free(self, name: str) -> dict[str, Any]:
        """Free a context and its state."""
        self._contexts.pop(name).free()
        return {}

    def fill(self, name: str, depth: int, file: str) -> dict[str, Any]:
        """Decode up to `depth` tokens of every sequence of a context; keep and save that state."""
        context = self._contexts[name]
        context.fill(depth, self._progress)
        with Path(file).open("wb") as out:
            for state in context.states:
                out.write(len(state).to_bytes(8, "little"))
                out.write(state.data)
        return {}

    def restore(self, name: str, file: str, depth: int | None = None) -> dict[str, Any]:
        """Load and keep the states of a file. depth: repeat them up to this number of tokens, and do not keep them.

        Returns the depth at which llama.cpp continues.
        """
        context, states = self._contexts[name], read_states(file)
        context.keep(states if depth is None else [repeated(state, depth) for state in states])
        if depth is not None:
            context.states = []
        return {"depth": context.depth}

    def empty(self, name: str) -> dict[str, Any]:
        """Remove all tokens from the context."""
        self._contexts[name].keep([])
        return {}

    def time(
        self, name: str, batch: int, steps: int, warm: int, threads: int, back: bool = True
    ) -> dict[str, Any]:
        """Seconds of each of `steps` decodes of `batch` tokens per sequence, after the kept state.

        warm: untimed decodes before them. back: restore the state first; otherwise continue at the current position.
        """
        return {"seconds": self._contexts[name].time(batch, steps, warm, threads, back)}

    def logits(self, name: str, threads: int, file: str, empty: bool) -> dict[str, Any]:
        """Save the logits of one more token of the first sequence as .npy.

        empty: of the same token, as the first one of an empty context.
        """
        np.save(file, self._contexts[name].next_logits(threads, empty))
        return {}


class BenchContext(Context):
    """A context and the state that is restored before each measurement."""

    def __init__(
        self, model: Model, n_ctx: int, n_batch: int, sequences: int, flash: bool, **options: Any
    ) -> None:
        """n_ctx: cells per sequence. n_batch: tokens per decode over all sequences. options: of Context."""
        super().__init__(
            model, flash_attention=flash, n_ctx=n_ctx * sequences, n_seq_max=sequences,
            n_batch=max(n_batch, sequences), no_perf=True, **options,
        )  # fmt: skip
        self.sequences, self.flash = sequences, flash
        self.memory: dict[str, dict[str, float]] = {}
        # the same prompt for every build
        self._ids = np.random.default_rng(1).integers(0, model.n_vocab, 1 << 16).tolist()
        self.states: list[Bytes] = []
        self.depth = 0  # tokens per sequence in `states`
        self._at = 0  # tokens per sequence in the context

    def keep(self, states: list[Bytes]) -> None:
        """Keep the state of each sequence and restore it."""
        if states and len(states) != self.sequences:
            raise LlamaError(f"a state of {len(states)} sequences for a context of {self.sequences}")
        self.states = [plain_layout(state) for state in states] if not self.flash else states
        self.put_back()

    def put_back(self) -> None:
        """Restore the kept state."""
        self.clear(data=False)
        for sequence, state in enumerate(self.states):
            self.restore(sequence, state)
        self._at = self.depth = self.length(0)

    def fill(self, depth: int, progress: Progress) -> None:
        """Decode up to `depth` tokens per sequence, and keep that state."""
        if self.depth == depth == 0:
            return
        self.put_back()
        step = max(1, min(512, self.n_batch) // self.sequences)
        while self._at < depth:
            self._next(min(step, depth - self._at))
            self.run()
            progress(self._at, depth)
        self.states, self.depth = [self.save(sequence) for sequence in range(self.sequences)], depth

    def time(self, batch: int, steps: int, warm: int, threads: int, back: bool) -> list[float]:
        """See Requests.time."""
        self.set_threads(threads)
        if back:
            self.put_back()
        seconds = []
        for _ in range(warm + steps):
            self._next(batch)
            began = time.perf_counter()
            self.run()
            seconds.append(time.perf_counter() - began)
        return seconds[warm:]

    def next_logits(self, threads: int, empty: bool) -> Logits:
        """See Requests.logits. Raises `LlamaError` if the context's state is not the restored one."""
        self.set_threads(threads)
        self.put_back()
        for sequence, state in enumerate(self.states):
            if not np.array_equal(self.save(sequence), state):
                raise LlamaError(f"sequence {sequence}: the state is not the one that was restored")
        if empty:
            self.clear(data=False)
            self.prepare([(0, 0, self._ids[self._at % len(self._ids)])], None)
        else:
            self._next(1)
        self.run()
        row: Logits = self.logits()[0].copy()
        if empty:
            self.put_back()
        return row

    def _next(self, count: int) -> None:
        """Add the next `count` tokens of every sequence to the batch; as in a prompt, only the last has logits."""
        ids, wanted = self._ids, range(count - 1, count * self.sequences, count)
        tokens = [
            (sequence, self._at + i, ids[(self._at + i + 1000 * sequence) % len(ids)])
            for sequence in range(self.sequences)
            for i in range(count)
        ]
        self.prepare(tokens, wanted)
        self._at += count


def read_states(file: str) -> list[Bytes]:
    """The states in a file, one for each sequence."""
    data, states, at = np.fromfile(file, np.uint8), [], 0
    while at < len(data):
        size = int(data[at : at + 8].view("<u8")[0])
        states.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return states


if __name__ == "__main__":
    serve(Requests, errors=(StateError,))
