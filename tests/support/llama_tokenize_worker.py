"""Tokenize texts with one llama.cpp build; a process of its own, so that no two builds share one.

Usage: llama_tokenize_worker.py MODEL.gguf TEXTS OUT [--special]
TEXTS: for each text its length (uint32) and bytes. OUT: for each text its number of ids (uint32) and the ids
(int32). --special: special tokens are matched in the text. Standard output: the processor time of the
tokenizing alone in seconds, then the ids that end a generation.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import time
from pathlib import Path

import llama_cpp


def main(model_path: str, texts_path: str, out_path: str, *options: str) -> None:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    content = Path(texts_path).read_bytes()
    texts = []
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        texts.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    room = max(map(len, texts)) + 16
    ids = (llama_cpp.llama_token * room)()
    with Path(out_path).open("wb") as out:
        seconds = 0.0
        for text in texts:
            start = time.process_time()
            count = llama_cpp.llama_tokenize(vocab, text, len(text), ids, room, False, "--special" in options)
            seconds += time.process_time() - start
            out.write(struct.pack("<I", count) + ctypes.string_at(ids, 4 * count))
    ends = [i for i in range(llama_cpp.llama_vocab_n_tokens(vocab)) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    print(seconds, *ends)


if __name__ == "__main__":
    main(*sys.argv[1:])
