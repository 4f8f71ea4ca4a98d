"""LoRA adapters on all architectures with KDA: the logits of a model into which the adapter was merged beforehand.

However the tokens are decoded: with the operators and without, in long ubatches (for which latent attention expands
keys and values) and short ones, with flash attention and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_operators import LISTED, operators_in
from llama_script import WORKER, Setup, Step, adapters, assert_same, batches, cut, draft, play, text
from random_adapter import (
    Adapter,
    is_matrix,
    kind_of,
    merged,
    random_pair,
    shapes,
    write_adapter,
    write_pairs,
)
from random_checkpoint import Spec
from random_family import FamilySpec, write_family
from synthetic_case import error_of, make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.llama import LlamaError, Logits
from kimi_gguf.engine.worker import Worker

pytestmark = pytest.mark.engine

TOKENS = 150
IDS = np.random.default_rng(7).integers(0, 128, TOKENS)
SPECS = [
    Spec(layers="KKMK", heads=4, kda_head_dim=64, q_lora=24, seed=60),
    FamilySpec("bailingmoe3", "KKMK", mtp=True, clamped=True, seed=70),
    FamilySpec("glm5-next", "KMKM", rope=0, value=64, index_heads=8, std=0.3, seed=74),
    FamilySpec("kimi-k3", "KKMKM", seed=74),
]
CHOICES = ("require", "off")  # values of KIMI_OPS: the operators, upstream's graph
WAYS: dict[str, dict[str, Any]] = {
    "at once": {"n_ubatch": 512},
    "ubatches of 7": {"n_ubatch": 7},
}
FLASH = {"plain": False, "flash": True}
AT_ONCE = batches(IDS, (TOKENS,))
EFFECT = 1e-7  # NMSE between a model and the model with any of these adapters: at least


@dataclass(frozen=True)
class Model:
    """A file, an adapter of all its matrices, and the file with that adapter merged."""

    gguf: Path
    adapter: Adapter
    merged: Path
    architecture: str
    mtp: bool

    def steps(self) -> list[Step]:
        """Decode the text at once, also with the MTP layer."""
        return [draft(*text(0, IDS))] if self.mtp else AT_ONCE


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: getattr(spec, "architecture", "kimi-linear"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    spec, folder = request.param, tmp_path_factory.mktemp("adapters")
    is_family = isinstance(spec, FamilySpec)
    gguf = write_family(folder / "model.gguf", spec) if is_family else make_gguf(folder, spec)
    names = [name for name, shape in shapes(gguf).items() if is_matrix(name, shape)]
    adapter = write_adapter(folder / "adapter.gguf", gguf, names)
    both = merged(folder / "merged.gguf", gguf, [(adapter, 1.0)])
    name = spec.architecture if is_family else "kimi-linear"
    return Model(gguf, adapter, both, name, is_family and spec.mtp)


@pytest.fixture(scope="module", params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def worker(choice: str, engine: Engine) -> Iterator[Worker]:
    """A process for each value of KIMI_OPS."""
    with Worker(str(WORKER), environment={**engine.environment(), "KIMI_OPS": choice}) as process:
        yield process


def run(worker: Worker, gguf: Path, setup: Setup, steps: Sequence[Step]) -> Logits:
    file = gguf.with_suffix(".npy")
    worker.ask("play", gguf=str(gguf), setup=asdict(setup), steps=list(steps), file=str(file))
    return np.load(file)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flash", FLASH)
def test_an_adapter_of_all_matrices_is_the_merged_model(
    model: Model, worker: Worker, way: str, flash: str
) -> None:
    setup = Setup(flash_attention=FLASH[flash], mtp=model.mtp, **WAYS[way])
    got = run(worker, model.gguf, setup, [adapters({model.adapter.file: 1.0}), *model.steps()])
    expected = run(worker, model.merged, setup, model.steps())
    assert_same(got, expected)
    assert error_of(run(worker, model.gguf, setup, model.steps()), expected).in_all > 0.01


def test_an_adapter_of_one_kind_of_matrix_is_the_merged_model(
    model: Model, choice: str, worker: Worker, tmp_path: Path
) -> None:
    """Each kind with one value of KIMI_OPS; the test of all matrices has both."""
    setup = Setup(flash_attention=True, mtp=model.mtp)
    base = run(worker, model.gguf, setup, model.steps())
    kinds = sorted({kind_of(name) for name in model.adapter.pairs})
    for kind in kinds[CHOICES.index(choice) :: len(CHOICES)]:
        names = [name for name in model.adapter.pairs if kind_of(name) == kind]
        adapter = write_adapter(tmp_path / f"{kind}.gguf", model.gguf, names, seed=1)
        expected = run(
            worker, merged(tmp_path / f"m-{kind}.gguf", model.gguf, [(adapter, 1.0)]), setup, model.steps()
        )
        got = run(worker, model.gguf, setup, [adapters({adapter.file: 1.0}), *model.steps()])
        error = error_of(got, expected)
        assert error.passes, f"{kind}: {error}"
        assert error_of(base, expected).in_all > EFFECT, f"{kind} has no effect"


def test_adapters_add_up_with_their_scales_and_change_between_decodes(
    model: Model, worker: Worker, tmp_path: Path
) -> None:
    """Of one context; tokens alone, so that graphs are reused, after a prompt that is long enough for LATENT_ATTN."""
    other = write_adapter(tmp_path / "other.gguf", model.gguf, list(model.adapter.pairs)[::2], seed=2)
    cases = {
        model.merged: {model.adapter.file: 1.0},
        merged(tmp_path / "two.gguf", model.gguf, [(model.adapter, 0.5), (other, -1.0)]): {
            model.adapter.file: 0.5,
            other.file: -1.0,
        },
        model.gguf: {},
        merged(tmp_path / "half.gguf", model.gguf, [(model.adapter, 0.5)]): {model.adapter.file: 0.5},
    }
    setup = Setup(flash_attention=True)
    steps = batches(IDS, (140, 1, 1, 1, 1))
    got = run(
        worker,
        model.gguf,
        setup,
        [step for scales in cases.values() for step in (adapters(scales), *steps, cut(0, -1))],
    )
    for part, file in zip(np.split(got, len(cases)), cases, strict=True):
        assert_same(part, run(worker, file, setup, steps))


def test_latent_attention_is_absorbed_where_an_adapter_of_k_b_or_v_b_is_active(
    model: Model, engine: Engine, tmp_path: Path
) -> None:
    if model.architecture == "glm5-next":
        return  # its sparse attention is always absorbed
    for kinds, is_absorbed in (
        (("attn_k_b",), True),
        (("attn_v_b",), True),
        (("attn_output", "ssm_f_a"), False),
    ):
        names = [name for name in model.adapter.pairs if kind_of(name) in kinds]
        file = write_adapter(tmp_path / f"{kinds[0]}.gguf", model.gguf, names).file
        played = play(
            engine, model.gguf, Setup(flash_attention=True), [adapters({file: 1.0}), *AT_ONCE], **LISTED
        )
        assert ("LATENT_ATT" not in operators_in(played.log)) == is_absorbed, kinds


def test_a_tensor_without_effect_is_refused_by_name(model: Model, worker: Worker, tmp_path: Path) -> None:
    """Convolutions, norms, biases, tensors that the model does not have; wrong ranks and numbers of matrices."""
    unusable = {kind_of(n): n for n, shape in shapes(model.gguf).items() if not is_matrix(n, shape)}
    assert len(unusable) > 8
    names = [*unusable.values(), "blk.0.attn_qkw.weight", "blk.77.attn_q.weight"]
    random = np.random.default_rng(0)
    cases: dict[str, dict[str, Any]] = {}
    for name in names:
        shape = shapes(model.gguf).get(name, (8, 8))
        cases[name] = {name: random_pair(name, shape if len(shape) > 1 else (1, *shape), random)}
    values = {kind_of(name): (name, pair) for name, pair in model.adapter.pairs.items()}
    name, (a, b) = values["attn_v_b"]
    cases[f"{name}.lora_b"] = {name: (a, np.concatenate([b, b]))}
    name, (a, b) = values["ffn_up_exps"]
    cases[f"{name}.lora_a"] = {name: (a[:-1], b)}
    name, (a, b) = values["token_embd"]
    cases["token_embd.weight.lora_a"] = {name: (a[:, 1:].copy(), b)}
    worker.ask("begin", gguf=str(model.gguf), setup=asdict(Setup(mtp=model.mtp)))
    for i, (word, pairs) in enumerate(cases.items()):
        file = write_pairs(tmp_path / f"{i}.gguf", model.architecture, pairs)
        with pytest.raises(LlamaError) as caught:
            worker.ask("step", step=adapters({file: 1.0}))
        assert f"'{word}'" in str(caught.value), str(caught.value)
