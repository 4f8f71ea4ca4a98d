"""The process of llama_script.py and of the tokenizer's tests; the protocol is that of engine/worker.py."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np

from kimi_gguf.engine.llama import Context, Llama, LlamaError, Logits, State, Token, library
from kimi_gguf.engine.worker import Progress, serve
from kimi_gguf.validate.llama_worker import MTP_CONTEXT, MtpLayer

ABORT_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)  # ggml_abort_callback


MANY = 1 << 30  # more nodes than a graph has


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def buffers_of(tensors_on: list[tuple[str, str]]) -> ctypes.Array[Override]:
    """The patterns of tensors, each with the memory of its device."""
    ggml = library("ggml")
    for name in ("ggml_backend_dev_by_name", "ggml_backend_dev_buffer_type"):
        getattr(ggml, name).restype = ctypes.c_void_p
    found = [
        (
            pattern.encode(),
            ggml.ggml_backend_dev_buffer_type(
                ctypes.c_void_p(ggml.ggml_backend_dev_by_name(device.encode()))
            ),
        )
        for pattern, device in tensors_on
    ]
    return (Override * (len(found) + 1))(*found)


class Player:
    """Contexts of one model, and a method a step. Answers other than None are collected."""

    def __init__(self, llama: Llama, gguf: str, setup: dict[str, Any]) -> None:
        backend = setup.pop("backend")
        if backend is not None:
            llama.load_backend(backend)
        for endpoint in setup.pop("workers"):
            llama.add_worker(endpoint)
        overrides = buffers_of(setup.pop("tensors_on"))  # must live until the model is loaded
        self._model = llama.load(
            gguf,
            devices=setup.pop("devices"),
            n_gpu_layers=setup.pop("n_gpu_layers"),
            tensor_buft_overrides=ctypes.addressof(overrides),
            load_mtp=setup["mtp"],
        )
        n_ctx = setup.pop("cells") * setup["n_seq_max"]
        self._setup = {**setup, "n_ctx": n_ctx, "n_batch": 4096}
        self._mtp, pooling = self._setup.pop("mtp"), self._setup.pop("pooling")
        if pooling is not None:
            self._setup |= {"embeddings": True, "pooling_type": pooling}
        self._contexts: list[Context] = []
        self._drafts: list[Context] = []  # of the MTP layer, one for each of the others
        self._nodes_left: int | None = None
        self._stored: dict[str, State] = {}
        self._abort_callback = ABORT_CALLBACK(self._is_aborted)
        self.context({})
        self.logits: list[Logits] = []

    def context(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._contexts.append(Context(self._model, **self._setup, abort_callback=self._abort_callback))
        if self._mtp:
            self._drafts.append(Context(self._model, **self._setup, ctx_type=MTP_CONTEXT))
        for name in environment:
            del os.environ[name]
        self.use(-1)

    def free(self) -> None:
        for context in (*self._contexts, *self._drafts):
            context.free()

    def use(self, number: int) -> None:
        self._context = self._contexts[number]

    def decode(self, tokens: list[Token], wanted: list[int] | None) -> None:
        self.logits.append(self._context.decode(tokens, wanted).copy())

    def adapters(self, scales: dict[str, float]) -> None:
        """From here on, use these adapters and no others. scales: by file."""
        for context in (self._context, *self._drafts):
            context.set_adapters(scales)

    def control(self, scale: float) -> None:
        """From here on, add a random control vector to the output of each layer."""
        api, model = self._model.llama.api, self._model.handle
        width, layers = api.llama_model_n_embd(model), api.llama_model_n_layer(model)
        values = np.random.default_rng(3).standard_normal(width * (layers - 1)).astype(np.float32) * scale
        data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if api.llama_set_adapter_cvec(self._context.handle, data, values.size, width, 1, layers) != 0:
            raise self._model.llama.error("the control vector cannot be used")

    def embed(self, tokens: list[Token]) -> None:
        """Decode; the embeddings of the sequences are kept as logits, without pooling those of the tokens."""
        api, handle = self._model.llama.api, self._context.handle
        self._context.prepare(tokens)
        self._context.run()
        width = api.llama_model_n_embd(self._model.handle)
        if self._setup["pooling_type"] == 0:
            rows = [np.ctypeslib.as_array(api.llama_get_embeddings(handle), (len(tokens), width))]
        else:
            sequences = sorted({sequence for sequence, _, _ in tokens})
            rows = [
                np.ctypeslib.as_array(api.llama_get_embeddings_seq(handle, s), (1, width)) for s in sequences
            ]
        self.logits.append(np.concatenate(rows))

    def draft(self, tokens: list[Token]) -> None:
        """Decode, also with the MTP layer, whose logits are kept after the others."""
        layer = MtpLayer(self._drafts[0], self._context)
        self.logits.append(self._context.decode(tokens).copy())
        self.logits.append(layer.decode(tokens).copy())

    def attempt(self, tokens: list[Token], nodes: int | None) -> bool:
        """Decode, and abort after so many nodes; None: not. The last token of each sequence gives logits.

        Were they decoded?
        """
        last = {sequence: i for i, (sequence, _, _) in enumerate(tokens)}
        self._context.prepare(tokens, wanted=sorted(last.values()))
        self._nodes_left = nodes
        try:
            self._context.run()
        except LlamaError:
            return False
        finally:
            self._nodes_left = None
        self.logits.append(self._context.logits().copy())
        return True

    def count_nodes(self, tokens: list[Token]) -> int:
        """Decode, and count the nodes that the CPU computes one by one."""
        self._context.prepare(tokens, wanted=[len(tokens) - 1])
        self._nodes_left = MANY
        self._context.run()
        computed, self._nodes_left = MANY - self._nodes_left, None
        self.logits.append(self._context.logits().copy())
        return computed

    def _is_aborted(self, _data: object) -> bool:
        if self._nodes_left is None:
            return False
        self._nodes_left -= 1
        return self._nodes_left < 0

    def save(self, sequence: int, file: str) -> None:
        self._context.save(sequence).tofile(file)

    def load(self, sequence: int, file: str) -> None:
        self._context.restore(sequence, np.fromfile(file, np.uint8))

    def store(self, sequence: int, name: str) -> bool:
        """Keep the state of a sequence under a name. Could it be saved?"""
        try:
            self._stored[name] = self._context.save(sequence)
        except LlamaError:
            return False
        return True

    def fetch(self, sequence: int, name: str) -> None:
        self._context.restore(sequence, self._stored[name])

    def length(self, sequence: int) -> int:
        return self._context.length(sequence)

    def reload(self, sequence: int) -> None:
        state = self._context.save(sequence)
        self.clear()
        self._context.restore(sequence, state)

    def remove(self, sequence: int, first: int, end: int = -1) -> bool:
        return self._context.remove(sequence, first, end)

    def keep(self, sequence: int) -> None:
        self._context.keep_only(sequence)

    def cut(self, sequence: int, first: int) -> None:
        if not self.remove(sequence, first):
            raise LlamaError(f"sequence {sequence} cannot be cut at {first}")

    def omit_front(self) -> None:
        """From here on, no batch keeps the recurrent state in front of it (llama_set_rs_keep_front, a C++ function)."""
        keep_front = library("llama")["_Z23llama_set_rs_keep_frontP13llama_contextb"]
        keep_front.argtypes, keep_front.restype = (ctypes.c_void_p, ctypes.c_bool), None
        keep_front(self._context.handle, False)

    def copy(self, sequence: int, to: int) -> None:
        self._context.copy(sequence, to)

    def threads(self, count: int) -> None:
        self._context.set_threads(count)

    def clear(self) -> None:
        self._context.clear()


class Requests:
    """What can be asked."""

    def __init__(self, _progress: Progress) -> None:
        self._llama = Llama()

    def play(self, gguf: str, setup: dict[str, Any], steps: list[list[Any]], file: str) -> list[bool]:
        """Play the steps; their logits go to the file. Answers what each removal answered."""
        player = Player(self._llama, gguf, setup)
        said = [getattr(player, step)(*given) for step, *given in steps]
        np.save(file, np.concatenate(player.logits))
        player.free()
        return [answer for answer in said if answer is not None]

    def begin(self, gguf: str, setup: dict[str, Any]) -> None:
        """Make a context for `step`."""
        self._player = Player(self._llama, gguf, setup)

    def step(self, step: list[Any]) -> tuple[Any, list[list[float]]]:
        """Play one step. Answers its answer, and the logits that it gave."""
        self._player.logits.clear()
        name, *given = step
        answer = getattr(self._player, name)(*given)
        return answer, [row.tolist() for rows in self._player.logits for row in rows]

    def tokenize(self, gguf: str, texts: list[str], special: bool) -> dict[str, Any]:
        """Tokenize texts in hexadecimal; seconds: of the processor, for that alone."""
        model = self._llama.load(gguf, vocab_only=True)
        ids, seconds = [], 0.0
        for text in map(bytes.fromhex, texts):
            start = time.process_time()
            ids.append(model.tokenize(text, special))
            seconds += time.process_time() - start
        return {"ids": ids, "seconds": seconds, "stops": model.end_tokens()}


if __name__ == "__main__":
    serve(Requests)
