"""The switch KIMI_OPS: each context keeps the value with which it was created, in every part of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_script import PlayError, Setup, context, decode, play, text, use
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import cpuinfo
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

PROMPT, TOKENS = 128, 136
SPEC = Spec(layers="KM", hidden=128, heads=3, kv_lora=512, nope=128, rope=64, v_dim=128, seed=50)
CHOICES = ("off", "conv,scan", "conv,scan,mla", "conv,scan,mla,matmul", "conv,scan,mla,matmul,fuse")
# Of CHOICES, those whose logits differ from those of the previous one. KDA and attention differ in bits that the
# 8-bit activations of Q8_0 may hide; the matmuls of F32 weights are upstream's; fused nodes give the same bits.
DIFFERENT = {"F32": (1, 2), "Q8_0": (3,)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi-ops")
    convert(write_checkpoint(folder / "checkpoint", SPEC), folder / "model.gguf", TYPES["F32"])
    return folder / "model.gguf"


@pytest.mark.parametrize("kind", DIFFERENT)
def test_contexts_of_one_process_keep_their_choice(
    kind: str, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contexts alternate token by token, so that each reuses its graph between those of the others."""
    model = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "checkpoint", SPEC), model, TYPES[kind])
    ids = np.random.default_rng(50).integers(0, 300, TOKENS)
    setup = Setup(flash_attention=True, cache_type="F16", n_ubatch=PROMPT, cells=256)
    batches = [decode(*text(0, ids[:PROMPT])), *(decode((0, i, int(ids[i]))) for i in range(PROMPT, TOKENS))]
    contexts = [context(KIMI_OPS=choice) for choice in CHOICES]
    turns = [step for batch in batches for i in range(len(CHOICES)) for step in (use(i + 1), batch)]
    together = play(engine, model, setup, [*contexts, *turns]).logits
    prompts, rest = together[: len(CHOICES) * PROMPT], together[len(CHOICES) * PROMPT :]
    alone = []
    options = RunOptions(n_batch=PROMPT, step_from=PROMPT, flash_attention=True, cache_type="F16")
    for i, choice in enumerate(CHOICES):
        monkeypatch.setenv("KIMI_OPS", choice)
        alone.append(run_logits(engine, model, ids, options))
        mine = np.concatenate([prompts[i * PROMPT :][:PROMPT], rest[i :: len(CHOICES)]])
        np.testing.assert_array_equal(mine, alone[i], err_msg=choice)
    for i in DIFFERENT[kind]:
        assert not np.array_equal(alone[i - 1], alone[i]), f"{CHOICES[i]} computes what {CHOICES[i - 1]} does"


@pytest.mark.parametrize(
    ("value", "reason"), [("off,exact", "'off' cannot be combined"), ("exactly", "'exactly' is none of")]
)
def test_values_that_are_refused(value: str, reason: str, model: Path, engine: Engine) -> None:
    with pytest.raises(PlayError, match=reason):
        play(engine, model, Setup(), [], KIMI_OPS=value)


def test_the_old_name_of_matmul_is_accepted_with_a_note(tmp_path: Path, engine: Engine) -> None:
    model = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "checkpoint", SPEC), model, TYPES["Q8_0"])
    steps = [decode(*text(0, np.arange(PROMPT)))]
    old, new, off = (play(engine, model, Setup(), steps, KIMI_OPS=name) for name in ("moe", "matmul", "off"))
    np.testing.assert_array_equal(old.logits, new.logits)
    assert not np.array_equal(old.logits, off.logits)
    assert ["'moe' is now 'matmul'" in played.log for played in (old, new)] == [True, False]


@pytest.mark.parametrize("cache_type", ["F32", "F16"])
def test_on_the_cpu_exact_multiplies_values_in_float32(cache_type: str, model: Path, engine: Engine) -> None:
    """Without it, AVX2 and AVX-512 processors multiply the values of an F16 cache as 16-bit integers."""
    steps = [decode(*text(0, np.arange(PROMPT)))]
    setup = Setup(flash_attention=True, cache_type=cache_type)
    usual, exact = (play(engine, model, setup, steps, KIMI_OPS=each).logits for each in ("", "exact"))
    integers = cache_type == "F16" and "avx2" in cpuinfo("flags")
    assert np.array_equal(usual, exact) != integers
    assert np.square(usual - exact).sum() <= 1e-7 * np.square(exact).sum()
