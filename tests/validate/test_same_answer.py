"""The logits do not depend on how a text is split into batches: NMSE 1e-10 in total, 1e-8 at the worst position.

The text is long enough for the operators' forms for large batches; small batches are tested too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_script import assert_same
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run, run_logits

pytestmark = pytest.mark.engine

SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=40)
TOKENS = 200  # decompressed attention starts at 160
IDS = np.random.default_rng(40).integers(0, VOCAB_SIZE, (3, TOKENS))

WAYS = {
    "ubatches of 1": RunOptions(n_batch=TOKENS, n_ubatch=1),
    "ubatches of 7": RunOptions(n_batch=TOKENS, n_ubatch=7),
    "ubatches of 64": RunOptions(n_batch=TOKENS, n_ubatch=64),
    "batches of 33": RunOptions(n_batch=33, n_ubatch=33),
    "token by token from the start": RunOptions(step_from=0),
    "token by token after a prefill": RunOptions(step_from=100),
    "saved and restored in the middle": RunOptions(save_restore_at=75),
    "two threads": RunOptions(threads=2),
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("same-answer"), SPEC)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flash_attention", [False, True], ids=["plain", "flash"])
def test_any_way_of_feeding_a_text_gives_the_same_logits(
    gguf: Path, engine: Engine, flash_attention: bool, way: str
) -> None:
    at_once = run_logits(engine, gguf, IDS[0], RunOptions(flash_attention=flash_attention))
    got = run_logits(engine, gguf, IDS[0], replace(WAYS[way], flash_attention=flash_attention))
    assert_same(got, at_once)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_sequences_side_by_side_do_not_touch_each_other(gguf: Path, engine: Engine, unified: bool) -> None:
    texts = [ids[:length] for ids, length in zip(IDS, (TOKENS, 61, 120), strict=True)]
    alone = [run_logits(engine, gguf, ids) for ids in texts]
    for options in (
        RunOptions(kv_unified=unified),
        RunOptions(kv_unified=unified, n_batch=40, n_ubatch=40),
        RunOptions(kv_unified=unified, step_from=50),
    ):
        together = run(engine, gguf, texts, options).logits
        for got, expected in zip(together, alone, strict=True):
            assert_same(got, expected)
