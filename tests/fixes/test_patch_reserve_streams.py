"""Patch 0007: sequences with separate streams, whose number does not divide the ubatch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import error_of, make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run, run_logits

pytestmark = pytest.mark.engine

OPTIONS = RunOptions(n_batch=512, n_ubatch=512, kv_unified=False)


def test_three_streams_run_and_agree_with_each_alone(tmp_path: Path, engine: Engine) -> None:
    gguf = make_gguf(tmp_path, Spec(layers="KMKM", seed=70))
    texts = list(np.random.default_rng(70).integers(0, VOCAB_SIZE, (3, 40)))
    for ids, got in zip(texts, run(engine, gguf, texts, OPTIONS).logits, strict=True):
        assert error_of(got, run_logits(engine, gguf, ids, OPTIONS)).in_all <= 1e-10
