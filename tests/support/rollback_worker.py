"""Take tokens back in a llama.cpp memory, in a process of its own: `rollback_worker.py MODEL STEPS LOGITS`.

STEPS is a JSON list. ["decode", [[seq, from, to], ...]] is one llama_decode of those positions of the sequences,
whose logits behind the last token of each go to LOGITS; ["remove", seq, from] takes back the positions from
there on; ["copy", seq, to_seq]; ["clear"]; ["reload", seq] saves a sequence, clears the memory and restores it.
LOGITS: .npy [rows, V]. Standard output: a JSON list of what each "remove" answered.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

N_SEQS = 3
N_TOKENS = 64
N_BACK = 8


def token(seq: int, pos: int, vocab: int) -> int:
    """The token of a sequence at a position."""
    return (7 * pos + 31 * seq + 1) % vocab


class Memory:
    """A context whose sequences are fed and taken back."""

    def __init__(self, gguf: str) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            gguf.encode(), llama_cpp.llama_model_default_params()
        )
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256 * N_SEQS, N_TOKENS, N_TOKENS
        params.n_seq_max, params.n_rs_seq = N_SEQS, N_BACK
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(N_TOKENS, 0, 1)
        self.rows: list[Any] = []

    def decode(self, parts: list[list[int]]) -> None:
        i, last = 0, []
        for seq, start, end in parts:
            for pos in range(start, end):
                self.batch.token[i], self.batch.pos[i] = token(seq, pos, self.vocab), pos
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, seq
                self.batch.logits[i] = pos == end - 1
                i += 1
            last.append(i - 1)
        self.batch.n_tokens = i
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        for i in last:
            row = llama_cpp.llama_get_logits_ith(self.context, i)
            self.rows.append(np.ctypeslib.as_array(row, shape=(self.vocab,)).copy())

    def remove(self, seq: int, start: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, seq, start, -1))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def copy(self, seq: int, to: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, seq, to, -1, -1)

    def reload(self, seq: int) -> None:
        size = llama_cpp.llama_state_seq_get_size(self.context, seq)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.context, state, size, seq) == size
        self.clear()
        assert llama_cpp.llama_state_seq_set_data(self.context, state, size, seq) == size


def main(gguf: str, steps: str, out: str) -> None:
    memory = Memory(gguf)
    said = [getattr(memory, step)(*given) for step, *given in json.loads(Path(steps).read_text())]
    np.save(out, np.array(memory.rows))
    print(json.dumps([answer for answer in said if answer is not None]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
