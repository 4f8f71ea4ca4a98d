"""Patch 0007: sequences with streams of their own, in a number that does not divide the ubatch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import VOCAB_SIZE, Spec, write_checkpoint

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions, run, run_logits

pytestmark = pytest.mark.engine

OPTIONS = RunOptions(n_batch=512, n_ubatch=512, kv_unified=False)


def test_three_streams_run_and_agree_with_each_alone(
    tmp_path: Path, engine: Engine, pristine: Engine
) -> None:
    spec = Spec(layers="KMKM", seed=70)
    gguf = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "checkpoint", spec), gguf, TYPES["F32"])
    texts = list(np.random.default_rng(70).integers(0, VOCAB_SIZE, (3, 40)))
    with pytest.raises(ValidateError, match="ggml_can_repeat"):
        run(pristine, gguf, texts, OPTIONS)
    for ids, got in zip(texts, run(engine, gguf, texts, OPTIONS).logits, strict=True):
        alone = run_logits(engine, gguf, ids, OPTIONS)
        assert np.square(got - alone).sum() <= 1e-10 * np.square(alone).sum()
