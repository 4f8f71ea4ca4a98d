"""0005-kimi-linear-kv-b: files with an unsplit attn_kv_b run correctly, with any cache that their keys describe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import Spec
from synthetic_case import Case, Tensors, make_case, rewrite

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions, run

pytestmark = pytest.mark.engine

SPEC = Spec(layers="MKMK", heads=4, nope=48, rope=16, v_dim=24, seed=60)
HEADS = [SPEC.heads if kind == "M" else 0 for kind in SPEC.layers]
PLAIN = {"attention.key_length": SPEC.nope + SPEC.rope, "attention.value_length": SPEC.v_dim}
NOT_MLA = {"attention.key_length_mla": 0, "attention.value_length_mla": 0}
KEYS = {
    "keys of a latent cache": {},
    "one KV head, no MLA keys": {**PLAIN, **NOT_MLA},
    "all KV heads": {"attention.head_count_kv": HEADS, **PLAIN},
    "all KV heads, no MLA keys": {"attention.head_count_kv": HEADS, **PLAIN, **NOT_MLA},
}


def unsplit(tensors: Tensors, layers: tuple[int, ...] = (0, 2)) -> Tensors:
    """k_b [heads, latent, nope] and v_b [heads, v, latent] as kv_b [heads * (nope + v), latent]."""
    out = dict(tensors)
    for layer in layers:
        k, v = (out.pop(f"blk.{layer}.attn_{x}_b.weight") for x in "kv")
        kv = np.concatenate([k.transpose(0, 2, 1), v], axis=1)
        out[f"blk.{layer}.attn_kv_b.weight"] = kv.reshape(-1, kv.shape[-1])
    return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("kv-b"), SPEC)


@pytest.mark.parametrize(("keys", "flash_attention"), [*zip(KEYS, (False, True, True, False), strict=True)])
def test_unsplit_kv_b_runs_right(
    tmp_path: Path, case: Case, keys: str, flash_attention: bool, engine: Engine
) -> None:
    old = rewrite(case.gguf, tmp_path / "old.gguf", unsplit, KEYS[keys])
    assert case.error(engine, old, flash_attention=flash_attention).passes


def test_one_token_at_a_time_and_after_a_restore(tmp_path: Path, case: Case, engine: Engine) -> None:
    old = rewrite(case.gguf, tmp_path / "old.gguf", unsplit)
    assert case.error(engine, old, step_from=80, save_restore_at=60).passes


def test_the_cost_is_logged(tmp_path: Path, case: Case, engine: Engine) -> None:
    old = rewrite(case.gguf, tmp_path / "old.gguf", unsplit)
    log = run(engine, old, [case.ids], RunOptions()).log
    assert "attn_kv_b is not split: the cache takes 352 values per token and MLA layer instead of 80" in log


def test_a_mixture_of_both_forms_is_refused_by_name(tmp_path: Path, case: Case, engine: Engine) -> None:
    mixed = rewrite(case.gguf, tmp_path / "mixed.gguf", lambda all_: unsplit(all_, layers=(0,)))
    with pytest.raises(ValidateError, match=r"blk\.2\.attn_kv_b\.weight"):
        case.error(engine, mixed)
