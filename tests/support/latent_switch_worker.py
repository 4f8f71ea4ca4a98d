"""Contexts of one model under different KIMI_OPS, in one process, taking turns.

`python latent_switch_worker.py GGUF FOLDER PROMPT CHOICE...`: FOLDER/ids.npy holds token ids [T]. Each context
decodes the first PROMPT of them at once and the rest one by one; its logits [T, V] go to FOLDER/CHOICE.npy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.llama_worker import Decoder, Model, plan_batches


def main(gguf: str, folder: str, prompt: int, choices: list[str]) -> None:
    os.chdir(folder)
    ids = np.load("ids.npy")
    options = RunOptions(n_batch=prompt, step_from=prompt, flash_attention=True, cache_type="F16")
    model = Model(gguf, options, vocab_only=False)
    decoders = {}
    for choice in choices:
        os.environ["KIMI_OPS"] = choice
        decoders[choice] = Decoder(model, options, [len(ids)], None)
    del os.environ["KIMI_OPS"]
    logits = {choice: np.empty((len(ids), model.n_vocab), np.float32) for choice in choices}
    for places in plan_batches([len(ids)], options):
        for choice, decode in decoders.items():
            rows = [p for _, p in places]
            logits[choice][rows] = decode(places, [int(ids[p]) for p in rows])
    for choice in choices:
        np.save(f"{choice}.npy", logits[choice])
    sys.stdout.flush()
    os._exit(0)  # as llama_worker.py ends


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
