"""The one Python binding of llama.cpp: models, contexts, batches, memory, tokens, devices.

Input: the build that `LLAMA_CPP_LIB_PATH` names, through its package llama_cpp; parameters with their names in llama.h.
Output: logits and states as numpy arrays; `LlamaError` with the reason that llama.cpp logged.
Only for processes that hold one build (worker.py): patched and upstream libraries have the same names.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from kimi_gguf.patches.errors import KimiError

Logits = NDArray[np.float32]
Hidden = NDArray[np.float32]
State = NDArray[np.uint8]
Token = tuple[int, int, int]  # sequence, position, token id
EvalCallback = Callable[[int, bool, int | None], bool]  # tensor address, ask or report, user data

LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
OUT_OF_MEMORY = re.compile(r"alloc|out of memory", re.IGNORECASE)
DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # ggml_backend_dev_type


class LlamaError(KimiError):
    """One line about an operation that failed in llama.cpp."""


class OutOfMemoryError(LlamaError):
    """There is not enough memory."""


def library(name: str) -> ctypes.CDLL:
    """A library of the build, such as ggml."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / f"lib{name}.{suffix}"))


class Llama:
    """The build: its log and its devices. Create one per process."""

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        """on_line: receives every line of the log, which is also written to standard error."""
        import llama_cpp

        self.api: Any = llama_cpp
        self._errors: list[str] = []
        self._on_line = on_line
        self._callback = llama_cpp.llama_log_callback(self._on_log)
        llama_cpp.llama_log_set(self._callback, None)
        llama_cpp.llama_backend_init()

    def _on_log(self, level: int, text: bytes, _data: int | None) -> None:
        os.write(2, text)
        line = text.decode(errors="replace").strip()
        if level == LOG_ERROR:
            self._errors.append(line)
        if self._on_line is not None:
            self._on_line(line)

    def error(self, what: str) -> LlamaError:
        """An error with `what` failed and the errors that llama.cpp has logged since the last call."""
        reason = "; ".join(self._errors) or "it gave no reason"
        self._errors.clear()
        return LlamaError(f"{what}: {reason}")

    def cannot(self, what: str) -> LlamaError:
        """The error for a call that allocates memory."""
        error = self.error(f"llama.cpp cannot {what}")
        return OutOfMemoryError(str(error)) if OUT_OF_MEMORY.search(str(error)) else error

    @property
    def system(self) -> str:
        """llama.cpp's own line about the CPU features and backends it uses."""
        return str(self.api.llama_print_system_info().decode(errors="replace").strip())

    def load_backend(self, path: str) -> None:
        """Load a library with another backend, as llama.cpp's programs do with GGML_BACKEND_PATH."""
        ggml = library("ggml")
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        if not ggml.ggml_backend_load(path.encode()):
            raise LlamaError(f"{path}: the backend cannot be loaded", todo="see its log")

    def add_worker(self, endpoint: str) -> None:
        """Add the devices of a worker (`kimi-llama worker`), such as 10.0.0.2:50052."""
        rpc = library("ggml-rpc")
        rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
        registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        if not registry:
            raise self.error(f"the worker {endpoint} cannot be used")
        library("ggml").ggml_backend_register(ctypes.c_void_p(registry))

    def traffic(self, endpoint: str) -> tuple[int, int]:
        """Bytes sent to and received from a worker since the connection was made (patched builds only)."""
        sent, received = ctypes.c_uint64(), ctypes.c_uint64()
        library("ggml-rpc").ggml_backend_rpc_traffic(
            endpoint.encode(), ctypes.byref(sent), ctypes.byref(received)
        )
        return sent.value, received.value

    def devices(self) -> list[dict[str, Any]]:
        """Name, description, kind and memory of each device."""
        ggml, listed = library("ggml"), []
        ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        for name in ("name", "description"):
            getattr(ggml, f"ggml_backend_dev_{name}").restype = ctypes.c_char_p
        for i in range(ggml.ggml_backend_dev_count()):
            device = ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(i)))
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            listed.append({
                "name": ggml.ggml_backend_dev_name(device).decode(),
                "description": ggml.ggml_backend_dev_description(device).decode(errors="replace"),
                "kind": DEVICE_TYPES[ggml.ggml_backend_dev_type(device)],
                "memory": total.value,
                "free": free.value,
            })  # fmt: skip
        return listed

    def load(self, gguf: str, devices: Sequence[str] | None = None, **params: Any) -> Model:
        """Load a model. devices: by name; None: llama.cpp's choice. params: of llama_model_params."""
        p = self.api.llama_model_default_params()
        _assign(p, params)
        if devices is not None:
            ggml = library("ggml")
            ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
            handles = [ggml.ggml_backend_dev_by_name(name.encode()) for name in devices]
            if not all(handles):
                names = ", ".join(device["name"] for device in self.devices())
                raise LlamaError(
                    "devices", expected=", ".join(devices), found=names, todo="choose of those found"
                )
            listed = (ctypes.c_void_p * (len(handles) + 1))(
                *handles, None
            )  # must live until the model is loaded
            p.devices = ctypes.cast(listed, ctypes.c_void_p)
        handle = self.api.llama_model_load_from_file(gguf.encode(), p)
        if not handle:
            raise self.cannot("load it")
        return Model(self, handle)


class Model:
    """A loaded GGUF file. Its memory is freed with the process."""

    def __init__(self, llama: Llama, handle: Any) -> None:
        self.llama, self.handle = llama, handle
        self.vocab = llama.api.llama_model_get_vocab(handle)
        self.n_vocab: int = llama.api.llama_vocab_n_tokens(self.vocab)
        self._adapters: dict[str, Any] = {}

    def adapter(self, file: str) -> Any:
        """A LoRA adapter of the model, a GGUF file; it is loaded once."""
        if file not in self._adapters:
            adapter = self.llama.api.llama_adapter_lora_init(self.handle, os.fsencode(file))
            if not adapter:
                raise self.llama.error(f"{file} cannot be loaded")
            self._adapters[file] = adapter
        return self._adapters[file]

    def tokenize(self, text: bytes, special: bool) -> list[int]:
        """Token ids; special: whether special tokens in the text are matched. No token is added."""
        room = len(text) + 16
        ids = (self.llama.api.llama_token * room)()
        count = self.llama.api.llama_tokenize(self.vocab, text, len(text), ids, room, False, special)
        if count < 0:
            raise self.llama.error("llama.cpp cannot tokenise the text")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        buffer = ctypes.create_string_buffer(4096)
        size = self.llama.api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(0, size)]

    def end_tokens(self) -> list[int]:
        """The ids of the tokens that end a generation."""
        return [i for i in range(self.n_vocab) if self.llama.api.llama_vocab_is_eog(self.vocab, i)]


class Context:
    """A llama_context, its memory and the batch that feeds it."""

    def __init__(
        self,
        model: Model,
        *,
        cache_type: str = "F16",
        flash_attention: bool | None = None,
        threads: int = 1,
        eval_callback: EvalCallback | None = None,
        **params: Any,
    ) -> None:
        """cache_type: of K and V, by ggml's name. flash_attention: None: llama.cpp's choice.

        params: of llama_context_params.
        """
        self.model, self._llama, self._api = model, model.llama, model.llama.api
        p = self._api.llama_context_default_params()
        p.n_threads = p.n_threads_batch = threads
        if flash_attention is not None:
            p.flash_attn_type = int(flash_attention)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        kind = GGMLQuantizationType.__members__.get(cache_type.upper())  # llama_cpp lacks some, such as BF16
        if kind is None:
            raise LlamaError(
                "type of the cache", expected="one of ggml's types, such as F16", found=cache_type
            )
        p.type_k = p.type_v = int(kind)
        if eval_callback is not None:
            self._callback = self._api.ggml_backend_sched_eval_callback(eval_callback)
            p.cb_eval = self._callback
        _assign(p, params)
        self.handle = self._api.llama_init_from_model(model.handle, p)
        if not self.handle:
            raise self._llama.cannot("make a context")
        self._memory = self._api.llama_get_memory(self.handle)
        self.n_batch = int(p.n_batch)
        self._batch = self._api.llama_batch_init(self.n_batch, 0, 1)
        self._rows = 0  # number of tokens in the batch with logits
        self._read: Hidden | None = None  # must live until the batch is decoded

    def free(self) -> None:
        """Free the context; it must not be used after that."""
        self._api.llama_free(self.handle)

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        """From here on, use these LoRA adapters (GGUF files) with their scales, and no others."""
        handles = [self.model.adapter(file) for file in scales]
        array = (self._api.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        values = (ctypes.c_float * len(handles))(*scales.values())
        if self._api.llama_set_adapters_lora(self.handle, array, len(handles), values) != 0:
            raise self._llama.error("the adapters cannot be used")

    def set_threads(self, threads: int) -> None:
        """Set the number of threads for prompts and for single tokens."""
        self._api.llama_set_n_threads(self.handle, threads, threads)

    def decode(
        self, tokens: Sequence[Token], wanted: Collection[int] | None = None, hidden: Hidden | None = None
    ) -> Logits:
        """Decode the tokens and return the logits [wanted, V], which are valid until the next call.

        wanted: indices of the tokens with logits; None: all. hidden [tokens, M]: see `prepare`.
        """
        self.prepare(tokens, wanted, hidden)
        self.run()
        return self.logits()

    def prepare(
        self, tokens: Sequence[Token], wanted: Collection[int] | None = None, hidden: Hidden | None = None
    ) -> None:
        """Put the tokens into the batch.

        hidden [tokens, M]: what an MTP context (`ctx_type`) reads with each token: the state of the token before it.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        self._read = None if hidden is None else np.ascontiguousarray(hidden)
        batch.embd = None if self._read is None else self._read.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        for i, (sequence, position, token) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted is None or i in wanted
        self._rows = len(tokens) if wanted is None else len(wanted)

    def run(self) -> None:
        """Decode the batch and wait until it is finished."""
        status = self._api.llama_decode(self.handle, self._batch)
        if status != 0:
            raise self._llama.error(f"llama_decode returned {status} at position {self._batch.pos[0]}")
        self._api.llama_synchronize(self.handle)

    def logits(self) -> Logits:
        """Logits [wanted, V] of the wanted tokens, in batch order; valid until the next batch."""
        shape = (self._rows, self.model.n_vocab)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self.handle), shape)

    def keep_hidden(self) -> None:
        """From here on, keep the hidden state of every token (llama_set_embeddings_nextn, a C++ function)."""
        keep = library("llama")["_Z26llama_set_embeddings_nextnP13llama_contextbb"]
        keep.argtypes, keep.restype = (ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool), None
        keep(self.handle, True, False)

    def hidden(self) -> Hidden:
        """Hidden states [tokens, M] after the output norm, in batch order; valid until the next batch."""
        get = library("llama")["_Z26llama_get_embeddings_nextnP13llama_context"]
        get.argtypes, get.restype = (ctypes.c_void_p,), ctypes.POINTER(ctypes.c_float)
        shape = (self._batch.n_tokens, self._api.llama_model_n_embd_out(self.model.handle))
        return np.ctypeslib.as_array(get(self.handle), shape)

    def remove(self, sequence: int, start: int, end: int = -1) -> bool:
        """Remove positions [start, end) of a sequence (-1: from the first, to the last); False if llama.cpp refuses."""
        return bool(self._api.llama_memory_seq_rm(self._memory, sequence, start, end))

    def copy(self, sequence: int, to: int) -> None:
        """Let another sequence share the tokens of this one."""
        self._api.llama_memory_seq_cp(self._memory, sequence, to, -1, -1)

    def keep_only(self, sequence: int) -> None:
        """Remove all other sequences."""
        self._api.llama_memory_seq_keep(self._memory, sequence)

    def clear(self, data: bool = True) -> None:
        """Clear the memory; data: also zero the buffers."""
        self._api.llama_memory_clear(self._memory, data)

    def length(self, sequence: int) -> int:
        """The position that follows the sequence's last token."""
        return int(self._api.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def save(self, sequence: int) -> State:
        """Return the state of a sequence."""
        size = self._api.llama_state_seq_get_size(self.handle, sequence)
        state = np.empty(size, np.uint8)
        if not size == self._api.llama_state_seq_get_data(self.handle, _pointer(state), size, sequence) > 0:
            raise self._llama.error(f"the state of sequence {sequence} cannot be saved")
        return state

    def restore(self, sequence: int, state: State) -> None:
        """Restore the state of a sequence."""
        size = len(state)
        if self._api.llama_state_seq_set_data(self.handle, _pointer(state), size, sequence) != size:
            raise self._llama.error(f"the state of sequence {sequence} cannot be restored")


def _pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _assign(struct: Any, params: Mapping[str, Any]) -> None:
    """Set fields by name; check that they exist and hold the value: ctypes adds unknown names and wraps integers."""
    for name, value in params.items():
        if not hasattr(struct, name):
            raise LlamaError(f"{type(struct).__name__} has no field {name}")
        setattr(struct, name, value)
        if isinstance(value, int) and getattr(struct, name) != value:
            raise LlamaError(
                f"{type(struct).__name__}.{name}",
                expected="a number that fits",
                found=value,
                todo="use a smaller one",
            )
