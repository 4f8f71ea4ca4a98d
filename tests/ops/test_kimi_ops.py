"""The switch KIMI_OPS: each context keeps what it was created with, in every part of the choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.convert.pipeline import convert
from kimi_gguf.convert.types.tensor_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

WORKER = Path(__file__).parents[1] / "support" / "latent_switch_worker.py"
PROMPT, TOKENS = 128, 136
SPEC = Spec(layers="KM", hidden=128, heads=3, kv_lora=512, nope=128, rope=64, v_dim=128, seed=50)
CHOICES = (
    "off",
    "conv,scan",
    "conv,scan,mla",
    "conv,scan,mla,moe",
    "conv,scan,mla,moe,fuse",
)
# Of CHOICES, those whose logits differ from those of the choice before. KDA and attention differ in bits that the
# 8-bit activations of Q8_0 may hide; the matmuls of F32 weights are upstream's; fused nodes keep every bit.
DIFFERENT = {"F32": (1, 2), "Q8_0": (3,)}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_contexts_of_one_process_keep_their_choice(
    kind: str, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contexts take turns token by token, so that each reuses its graph between those of the others."""
    model = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "checkpoint", SPEC), model, TYPES[kind])
    ids = np.random.default_rng(50).integers(0, 300, TOKENS)
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    subprocess.run(
        [sys.executable, WORKER, model, tmp_path, str(PROMPT), *CHOICES],
        env={**os.environ, **engine.environment()},
        check=True,
    )
    alone = {}
    options = RunOptions(n_batch=PROMPT, step_from=PROMPT, flash_attention=True, cache_type="F16")
    for choice in CHOICES:
        monkeypatch.setenv("KIMI_OPS", choice)
        alone[choice] = run_logits(engine, model, ids, options)
        np.testing.assert_array_equal(np.load(tmp_path / f"{choice}.npy"), alone[choice], err_msg=choice)
    for at in DIFFERENT[kind]:
        one, other = CHOICES[at - 1 : at + 1]
        assert not np.array_equal(alone[one], alone[other]), f"{other} computes what {one} does"
