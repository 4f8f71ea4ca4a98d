"""Latent attention, absorbed (FLASH_ATTN_EXT) and decompressed (LATENT_ATTN): the operators, and the graph's choice.

Upstream's comparison with the plain path: LATENT_ATTN in test_kda_operators.py, FLASH_ATTN_EXT in
test_upstream_programs.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph_operators import LISTED, first_chunked, operators_in, operators_of_last_graph
from llama_script import Setup, batches, context, decode, fetch, play, store, text, threads, use
from native_program import compile_program, run_program
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import Case, make_case, make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run, run_logits

pytestmark = pytest.mark.engine

TOKENS = 400  # as one ubatch they are enough for the decompressed form; ubatches of 64 are not
# Head sizes of the 48B, for which the operators are optimised, and others.
SHAPES = {
    "48B": Spec(layers="KM", heads=3, kv_lora=512, nope=128, rope=64, v_dim=128, seed=50),
    "small": Spec(layers="MKM", heads=4, rope=32, seed=51),
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("latent"), SHAPES[request.param], TOKENS)


@pytest.mark.parametrize("cases", ["3", pytest.param("1", marks=pytest.mark.full)], ids=["some", "all"])
def test_every_type_length_mask_and_number_of_threads(cases: str, tmp_path: Path, engine: Engine) -> None:
    program = compile_program(engine, "latent-attn-test.cpp", tmp_path, ("latent_attention",))
    run_program(program, KIMI_CASES=cases)


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("queries", [1, 70])
def test_a_node_switched_off_has_the_bits_of_upstream(
    queries: int, cache_type: str, tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    hashes = {}
    for name, build in (("ours", engine), ("upstream", upstream)):
        (tmp_path / name).mkdir()
        program = compile_program(build, "latent-attn-hash.cpp", tmp_path / name, ("latent_attention",))
        for plain in (0, 1):
            hashes[name, plain] = run_program(program, str(queries), cache_type, str(plain)).stdout
    assert hashes["ours", 1] == hashes["upstream", 1] == hashes["upstream", 0] != hashes["ours", 0]


def test_where_cache_and_weights_lie_decides(tmp_path: Path, engine: Engine) -> None:
    program = compile_program(
        engine,
        "test_latent_place.cpp",
        tmp_path,
        ("latent_attention", "latent_attention/graph"),
        ("latent_attention/graph/llama-latent-place.cpp",),
    )
    run_program(program)


def test_fewer_threads_than_planned(tmp_path: Path, engine: Engine) -> None:
    """OpenMP starts fewer threads than ggml planned memory for."""
    program = compile_program(engine, "latent-attn-test.cpp", tmp_path, ("latent_attention",))
    run_program(program, KIMI_CASES="29", OMP_THREAD_LIMIT="5")


@pytest.mark.parametrize("n_ubatch", [TOKENS, 64], ids=["decompressed", "absorbed"])
@pytest.mark.parametrize("choice", ["require", "off"])
def test_both_forms_give_the_models_logits(
    case: Case, n_ubatch: int, choice: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", choice)
    assert case.error(engine, n_ubatch=n_ubatch, flash_attention=True).passes


# Queries from which LATENT_ATTN is used, by cache type, with up to 512 keys: the first line of the graph's table.
FIRST_DECOMPRESSED = {"F16": 96, "Q8_0": 112}


@pytest.mark.parametrize("cache_type", FIRST_DECOMPRESSED)
def test_batches_of_many_queries_take_the_decompressed_form(
    case: Case, cache_type: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FIRST_DECOMPRESSED[cache_type]
    found = {n: operators(case, engine, monkeypatch, "require", n, cache_type) for n in (first - 1, first)}
    assert "LATENT_ATT" not in found[first - 1] and "FLASH_ATTN" in found[first - 1]
    assert "LATENT_ATT" in found[first] and "FLASH_ATTN" not in found[first]


@pytest.mark.parametrize("choice", ["off", "conv,scan"])
def test_the_switch_disables_the_decompressed_form(
    case: Case, choice: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "LATENT_ATT" not in operators(case, engine, monkeypatch, choice, TOKENS, "F16")


def operators(
    case: Case, engine: Engine, monkeypatch: pytest.MonkeyPatch, choice: str, tokens: int, cache_type: str
) -> set[str]:
    """The operators in the graph of one batch with this number of tokens."""
    monkeypatch.setenv("KIMI_OPS", choice)
    options = RunOptions(
        n_batch=tokens, n_ubatch=tokens, n_ctx=512, flash_attention=True, cache_type=cache_type
    )
    return operators_of_last_graph(engine, case.gguf, case.ids[:tokens], options, monkeypatch)


# Form -> tokens of a ubatch, numbers of threads, and the types of the cache in the default tier: each type in one form.
FORMS = {
    "decompressed": (TOKENS, (2, 7), ("F16", "Q8_0")),
    "decompressed, many": (TOKENS, (33, 100), ("Q8_0",)),
    "absorbed": (1, (2, 7), ("F32", "Q4_0")),
}


@pytest.mark.parametrize(
    ("n_ubatch", "counts", "cache_type"),
    [
        pytest.param(n_ubatch, counts, cache_type, id=f"{form}-{cache_type}", marks=mark)
        for form, (n_ubatch, counts, types) in FORMS.items()
        for cache_type in ("F32", "F16", "Q8_0", "Q4_0")
        for mark in [() if cache_type in types else pytest.mark.full]
    ],
)
def test_the_same_bits_for_any_number_of_threads(
    case: Case,
    n_ubatch: int,
    counts: tuple[int, ...],
    cache_type: str,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    ids = case.ids if n_ubatch > 1 else case.ids[:300]
    options = RunOptions(n_ubatch=n_ubatch, flash_attention=True, cache_type=cache_type, threads=1)
    one = run_logits(engine, case.gguf, ids, options)
    for count in counts:
        many = run_logits(engine, case.gguf, ids, replace(options, threads=count))
        np.testing.assert_array_equal(one, many, f"{count} threads")


# The heads of the 48B, and a prompt whose keys are many splits.
HEADS = Spec(layers="KM", heads=32, kda_head_dim=128, kv_lora=512, nope=128, rope=64, v_dim=128, seed=52)
PROMPT, SIZES = 2048, range(1, 9)
THREADS = (1, 2, 7, 33)
LONG = np.random.default_rng(52).integers(0, VOCAB_SIZE, PROMPT + sum(SIZES))
WITHOUT_MLA = "conv,scan,matmul,fuse,batch"  # all of KIMI_OPS but mla


@pytest.fixture(scope="module")
def full_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("full"), HEADS)


@pytest.mark.parametrize(
    "cache_type",
    [
        pytest.param("F32", marks=pytest.mark.full),
        "F16",
        "Q8_0",
        pytest.param("Q4_0", marks=pytest.mark.full),
    ],
)
def test_small_batches_after_a_long_prompt_have_the_same_bits_for_any_number_of_threads(
    cache_type: str, full_heads: Path, engine: Engine
) -> None:
    """The absorbed form alone, and KDA_SCAN in steps. Upstream's kernel in another context: it has other bits."""
    small = [fetch(0, "prompt"), *batches(LONG, SIZES, PROMPT)]
    steps = [threads(2), decode(*text(0, LONG[:PROMPT]), wanted=[]), store(0, "prompt")]
    steps += [context(KIMI_OPS=WITHOUT_MLA), *small, use(0)]
    for count in THREADS:
        steps += [threads(count), *small]
    setup = Setup(flash_attention=True, cache_type=cache_type, cells=2560)
    played = play(engine, full_heads, setup, steps, **LISTED, KIMI_OPS="require")

    upstreams, one, *others = np.split(played.logits, 1 + len(THREADS))
    for count, many in zip(THREADS[1:], others, strict=True):
        np.testing.assert_array_equal(one, many, f"{count} threads")
    assert not (one == upstreams).all()
    last = operators_in(played.log)
    assert {"FLASH_ATTN", "KDA_SCAN"} < last and "LATENT_ATT" not in last
    assert first_chunked() > max(SIZES)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_sequences_side_by_side(
    case: Case, unified: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    options = RunOptions(n_batch=2 * TOKENS, n_ubatch=2 * TOKENS, flash_attention=True, kv_unified=unified)
    together = run(engine, case.gguf, [case.ids, case.ids[::-1]], options).logits[0]
    error = np.square(together - case.logits).sum(1) / np.square(case.logits).sum(1)
    assert error.max() <= 1e-8
