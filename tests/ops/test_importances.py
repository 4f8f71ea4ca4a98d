"""What looks into the graph sees a matmul of each matrix, whatever operators and lengths: importances by llama-imatrix.

Also control vectors and embeddings of each pooling: equal with the operators and without.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_script import Setup, Step, assert_same, batches, context, control, embed, play, text
from numpy.typing import NDArray
from random_adapter import EMBEDDING, is_matrix, shapes
from random_checkpoint import VOCAB_SIZE, Spec
from random_family import FamilySpec, write_family
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SPECS = [
    FamilySpec("bailingmoe3", "KKMK", vocab=VOCAB_SIZE, seed=70),
    FamilySpec("glm5-next", "KMKM", rope=0, value=64, index_heads=8, std=0.3, vocab=VOCAB_SIZE, seed=74),
    FamilySpec("kimi-k3", "KKMKM", vocab=VOCAB_SIZE, seed=74),
]
CHUNK = 256  # tokens: more than LATENT_ATTN needs
IDS = np.random.default_rng(7).integers(0, VOCAB_SIZE, 150)
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3}  # llama_pooling_type
Sums = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def kimi_linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("kimi"), Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=60))


@pytest.fixture(
    scope="module", params=[None, *SPECS], ids=lambda spec: spec.architecture if spec else "kimi-linear"
)
def model(
    request: pytest.FixtureRequest, kimi_linear: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param is None:
        return kimi_linear
    file = tmp_path_factory.mktemp("family") / "model.gguf"
    return write_family(file, request.param, vocabulary_of=kimi_linear)


def importances(engine: Engine, model: Path, folder: Path, choice: str, *options: str) -> Sums:
    """The sums that llama-imatrix writes, with KIMI_OPS set to a choice."""
    random = np.random.default_rng(1)
    (folder / "text").write_text(" ".join(random.choice(["the", "in", "at", "wren", "stone"], 1200)))
    file = folder / "imatrix.gguf"
    command = [
        engine.folder / "bin/llama-imatrix",
        "-m",
        model,
        "-f",
        folder / "text",
        "-o",
        file,
        "--no-ppl",
    ]
    arguments = [
        "--process-output",
        "--chunks",
        "2",
        "-fa",
        "on",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "-t",
        "1",
        *options,
    ]
    environment = {**os.environ, **engine.environment(), "KIMI_OPS": choice}
    subprocess.run([*map(str, command), *arguments], env=environment, check=True, capture_output=True)
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors}


def test_importances_are_those_of_upstreams_graph(model: Path, engine: Engine, tmp_path: Path) -> None:
    """In chunks and ubatches for which latent attention is decompressed, and in short ones."""
    matrices = {n for n, shape in shapes(model).items() if is_matrix(n, shape)} - {EMBEDDING}
    long = "-c", str(CHUNK), "-b", str(CHUNK)
    cases: tuple[tuple[str, ...], ...] = (long, (*long, "-ub", "48"), ("-c", "64"))
    for options in cases:
        expected = importances(engine, model, tmp_path, "off", *options)
        got = importances(engine, model, tmp_path, "require", *options)
        assert {name.rpartition(".")[0] for name in got} == matrices
        assert got.keys() == expected.keys()
        for name, sums in got.items():
            rounding = 1e-6 * expected[name].max()
            np.testing.assert_allclose(
                sums, expected[name], rtol=1e-4, atol=rounding, err_msg=f"{name} {options}"
            )


def equal_with_and_without_operators(engine: Engine, model: Path, setup: Setup, steps: list[Step]) -> None:
    played = play(
        engine, model, setup, [context(KIMI_OPS="require"), *steps, context(KIMI_OPS="off"), *steps]
    )
    ours, upstreams = np.split(played.logits, 2)
    assert (ours != upstreams).any(), "one graph ran twice"
    assert_same(ours, upstreams)


def test_a_control_vector_acts_as_on_upstreams_graph(model: Path, engine: Engine) -> None:
    plain = play(engine, model, Setup(), batches(IDS, (len(IDS),))).logits
    steps = [control(1.0), *batches(IDS, (140, 10))]
    equal_with_and_without_operators(engine, model, Setup(flash_attention=True), steps)
    assert not np.allclose(play(engine, model, Setup(), steps).logits, plain, atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_those_of_upstreams_graph(model: Path, engine: Engine, pooling: str) -> None:
    steps = [embed(*text(0, IDS), *text(1, IDS[:70]))]
    options: dict[str, Any] = {"pooling": POOLINGS[pooling], "flash_attention": True, "n_seq_max": 2}
    equal_with_and_without_operators(engine, model, Setup(**options), steps)
