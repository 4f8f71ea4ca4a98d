"""The F32 gate: an F32 GGUF in patched llama.cpp compared with transformers, for models of many shapes.

NMSE of logits at most 1e-10 in total and 1e-8 at the worst position, F32 cache, flash attention on and off.
Positions where the reference's own router margin is below 1e-6 are counted separately.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_script import assert_same
from random_checkpoint import VOCAB_SIZE, Spec, write_checkpoint
from synthetic_case import reference_of
from test_reference import TIE, smallest_margin, token_by_token, transformers_logits

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits
from kimi_gguf.validate.reference import Trace

pytestmark = pytest.mark.engine

TOKENS = 130

SPECS = [
    Spec(layers="KM", heads=2, kda_head_dim=32, std=0.02, seed=10),
    Spec(layers="MK", heads=4, kda_head_dim=64, experts=8, seed=11),
    Spec(layers="KKKM", heads=8, kda_head_dim=32, hidden=96, seed=12),
    Spec(layers="KKMKKM", heads=3, kda_head_dim=64, experts=16, experts_used=4, std=0.05, seed=13),
    Spec(layers="MKKMK", heads=4, q_lora=24, seed=14),
    Spec(layers="KKM", kda_head_dim=128, kv_lora=512, nope=128, rope=64, v_dim=128, std=0.02, seed=15),
    Spec(layers="KMK", heads=2, q_lora=16, std=0.2, dense_layers=0, seed=16),
    Spec(layers="KKM", experts=8, experts_used=3, groups=4, topk_groups=2, shared_experts=2, seed=17),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_f32_logits_equal_transformers(
    tmp_path: Path, spec: Spec, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_by_token(monkeypatch)
    folder = write_checkpoint(tmp_path / "checkpoint", spec)
    ids = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(spec.seed))
    expected = transformers_logits(folder, ids).double().numpy()
    trace = Trace()
    reference_of(spec).logits(ids, trace)
    tied = (smallest_margin(trace) < TIE).numpy()
    assert tied.mean() < 0.05, "too many ties to say anything: choose another seed"

    gguf = tmp_path / "model.gguf"
    convert(folder, gguf, TYPES["F32"])
    for flash_attention in (False, True):
        got = run_logits(engine, gguf, ids.numpy(), RunOptions(flash_attention=flash_attention))
        assert_same(got[~tied], expected[~tied])
