"""The process that holds llama.cpp for validation: `python -m kimi_gguf.validate.llama_worker`.

Input: the requests that `Requests` defines, by llama.py; the protocol is that of engine/worker.py.
Output: their answers; logits and recorded tensors as .npy files in the folder that a request names.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.engine.llama import Context, Hidden, Llama, LlamaError, Logits, Model, Token, library
from kimi_gguf.engine.worker import Progress, serve
from kimi_gguf.validate.llama import RunOptions

Place = tuple[int, int]  # sequence, position
DTYPES = {0: np.float32, 26: np.int32}  # GGML_TYPE_F32, GGML_TYPE_I32
MTP_CONTEXT = 1  # LLAMA_CONTEXT_TYPE_MTP
RECORDED = ("l_out", "ffn_moe_topk")  # tensors of the graph, one per layer: its output, the chosen experts


def plan_batches(lengths: list[int], options: RunOptions) -> list[list[Place]]:
    """The tokens of each llama_decode: every sequence advances by the same number of tokens per batch until it ends.

    lengths: tokens per sequence. A batch never crosses `step_from` or `save_restore_at`.
    """
    stops = [p for p in (options.step_from, options.save_restore_at) if p is not None]
    batches: list[list[Place]] = []
    start, longest = 0, max(lengths)
    while start < longest:
        stepping = options.step_from is not None and start >= options.step_from
        end = start + (1 if stepping else max(1, options.n_batch // len(lengths)))
        end = min([end, longest, *(p for p in stops if p > start)])
        batches.append([(s, p) for s, n in enumerate(lengths) for p in range(start, min(end, n))])
        start = end
    return batches


class Tensor(ctypes.Structure):
    """The first fields of ggml's `struct ggml_tensor` (ggml.h), up to the strides."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class Recorder:
    """Copies named tensors of the graph as they are computed (ggml's scheduler calls `__call__`).

    Rows are in the order of the tokens of one sequence, ubatch after ubatch.
    """

    def __init__(self) -> None:
        ggml = library("ggml-base")
        self.rows: dict[tuple[str, int], list[NDArray[Any]]] = {}  # by name and layer
        self._name = ggml.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._nbytes = ggml.ggml_nbytes
        self._nbytes.restype, self._nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._get = ggml.ggml_backend_tensor_get
        self._get.restype, self._get.argtypes = None, [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2

    def __call__(self, tensor: int, ask: bool, _data: int | None) -> bool:
        name, _, layer = self._name(tensor).decode().rpartition("-")
        wanted = name in RECORDED and layer.isdigit()
        if wanted and not ask:
            self.rows.setdefault((name, int(layer)), []).append(self._copy(tensor))
        return wanted or not ask

    def _copy(self, tensor: int) -> NDArray[Any]:
        """The tensor as an array [rows, columns], for any strides."""
        head = ctypes.cast(tensor, ctypes.POINTER(Tensor)).contents
        dtype = DTYPES[head.type]
        raw = np.empty(self._nbytes(tensor), dtype=np.uint8)
        self._get(tensor, raw.ctypes.data, 0, raw.nbytes)
        view: NDArray[Any] = np.ndarray(
            (head.ne[1], head.ne[0]), dtype, raw.data, strides=(head.nb[1], head.nb[0])
        )
        return view.copy()


class MtpLayer:
    """The layer that predicts a further token, in a context of its own.

    It reads each token with the hidden state of the token before it. There is none before the first token of a
    sequence: zeros, as in llama.cpp's drafts.
    """

    def __init__(self, context: Context, main: Context) -> None:
        """main: the context of the other layers."""
        self.context, self._main = context, main
        self._last: dict[int, Hidden] = {}  # by sequence: hidden state [M] of its last token
        main.keep_hidden()

    def decode(self, tokens: list[Token]) -> Logits:
        """Logits [tokens, V] for the batch that the main context has just decoded; sequence after sequence."""
        hidden = self._main.hidden().copy()
        before = np.zeros_like(hidden)
        for row, (sequence, _, _) in enumerate(tokens):
            before[row] = self._last.get(sequence, 0.0)
            self._last[sequence] = hidden[row]
        return self.context.decode(tokens, hidden=before)


def make_context(
    model: Model,
    options: RunOptions,
    lengths: list[int],
    recorder: Recorder | None = None,
    mtp: bool = False,
) -> Context:
    """A context for sequences of these lengths; mtp: of the MTP layer."""
    cells = max(lengths) * len(lengths)
    if options.n_ctx is not None and options.n_ctx < cells:
        raise LlamaError(f"n_ctx is {options.n_ctx}, and these sequences need {cells}")
    context = Context(
        model,
        cache_type=options.cache_type,
        flash_attention=options.flash_attention,
        threads=options.threads,
        eval_callback=recorder,
        n_ctx=options.n_ctx or -(-cells // (256 * len(lengths))) * 256 * len(lengths),
        n_batch=max(options.n_batch, len(lengths)),
        n_ubatch=options.n_ubatch,
        n_seq_max=len(lengths),
        kv_unified=options.kv_unified,
        ctx_type=MTP_CONTEXT if mtp else 0,
    )
    if options.lora:
        context.set_adapters(dict(options.lora))
    return context


def save_and_restore(context: Context, sequences: int) -> None:
    """Save the states of this number of sequences, clear the context, and restore them."""
    states = [context.save(s) for s in range(sequences)]
    context.clear()
    for s, state in enumerate(states):
        context.restore(s, state)


def check_ids(ids: list[int], model: Model) -> None:
    wrong = next((i for i, each in enumerate(ids) if not 0 <= each < model.n_vocab), None)
    if not ids or wrong is not None:
        found = "none" if wrong is None else f"{ids[wrong]} at index {wrong}"
        raise LlamaError(f"expected at least one token id, each in 0..{model.n_vocab - 1}, found {found}")


class Requests:
    """The requests; every request loads the file `gguf`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._llama = Llama()

    def _load(self, gguf: str, options: RunOptions) -> Model:
        return self._llama.load(
            gguf,
            n_gpu_layers=options.n_gpu_layers,
            use_extra_bufts=options.repack,
            load_mtp=options.mtp,
        )

    def logits(
        self, gguf: str, folder: str, options: dict[str, Any], sequences: list[list[int]]
    ) -> dict[str, Any]:
        """Save the logits of all sequences to logits-N.npy.

        With mtp also those of the MTP layer to mtp_logits-N.npy; with trace also those in RECORDED, one file per layer.
        """
        chosen, place, done = RunOptions(**options), Path(folder), 0
        model = self._load(gguf, chosen)
        for ids in sequences:
            check_ids(ids, model)
        recorder = Recorder() if chosen.trace else None
        lengths = [len(ids) for ids in sequences]
        context = make_context(model, chosen, lengths, recorder)
        contexts, mtp = [context], None
        if chosen.mtp:
            mtp = MtpLayer(make_context(model, chosen, lengths, recorder, mtp=True), context)
            contexts.append(mtp.context)
        outputs = {
            name: [
                np.lib.format.open_memmap(place / f"{name}-{i}.npy", "w+", np.float32, (n, model.n_vocab))
                for i, n in enumerate(lengths)
            ]
            for name in ("logits", "mtp_logits")[: len(contexts)]
        }

        def keep(name: str, logits: Logits) -> None:
            for row, (s, p) in enumerate(places):
                outputs[name][s][p] = logits[row]

        for places in plan_batches(lengths, chosen):
            if places[0][1] == chosen.save_restore_at:
                for each in contexts:
                    save_and_restore(each, len(sequences))
            tokens = [(s, p, sequences[s][p]) for s, p in places]
            keep("logits", context.decode(tokens))
            if mtp is not None:
                keep("mtp_logits", mtp.decode(tokens))
            done += len(places)
            self._progress(done, sum(lengths))
        for output in itertools.chain(*outputs.values()):
            output.flush()
        recorded: dict[str, list[int]] = {name: [] for name in RECORDED}
        for (name, layer), rows in ({} if recorder is None else recorder.rows).items():
            np.save(place / f"{name}-{layer}.npy", np.concatenate(rows))
            recorded[name].append(layer)
        return {**recorded, "system": self._llama.system}

    def continue_greedily(self, gguf: str, options: dict[str, Any], ids: list[int], count: int) -> list[int]:
        """Generate `count` tokens after the ids; each is the most likely one."""
        chosen = RunOptions(**options)
        model = self._load(gguf, chosen)
        check_ids(ids, model)
        context = make_context(model, chosen, [len(ids) + count])
        for places in plan_batches([len(ids)], chosen):
            logits = context.decode([(0, p, ids[p]) for _, p in places])
        written: list[int] = []
        while len(written) < count:
            written.append(int(logits[-1].argmax()))
            logits = context.decode([(0, len(ids) + len(written) - 1, written[-1])])
        return written

    def tokenize(self, gguf: str, text: str) -> list[int]:
        """The ids of the text."""
        return self._llama.load(gguf, vocab_only=True).tokenize(text.encode(), special=True)

    def pieces(self, gguf: str, ids: list[int]) -> list[str]:
        """The bytes of each of the ids, in hexadecimal."""
        model = self._llama.load(gguf, vocab_only=True)
        return [model.piece(token).hex() for token in ids]


if __name__ == "__main__":
    serve(Requests)
