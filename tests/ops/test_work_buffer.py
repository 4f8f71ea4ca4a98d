"""The memory that ggml plans for the operators of a graph, for many threads and the 48B's shapes.

The model is a file without data, and nothing is computed: native/planned_work.cpp replaces ggml_graph_compute.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from llama_script import Setup, decode, play, text, threads
from native_program import compile_library

from kimi_gguf.bench.shapes import BenchModel, plan_of, quantized_types
from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

MODEL = BenchModel("kimi-linear", layers=4, experts=256, type="Q4_K_M")  # layers of each kind
MIB = 1 << 20
# MiB by number of queries. Latent attention needs the most.
MOST = {512: 107, 4096: 248}


@pytest.fixture(scope="module")
def empty_model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's header, and a hole instead of its data."""
    (whole,) = plan_of(MODEL, quantized_types(MODEL, engine.bin / "llama-quantize")).files
    path = tmp_path_factory.mktemp("empty") / "model.gguf"
    with path.open("wb") as file:
        file.write(whole.header)
        file.truncate(whole.nbytes)
    return path


@pytest.mark.parametrize("tokens", MOST)
def test_the_work_buffer_of_128_threads(
    tokens: int, empty_model: Path, engine: Engine, tmp_path: Path
) -> None:
    library = compile_library(engine, "planned_work.cpp", tmp_path)
    setup = Setup(
        tensors_on=((".", "CPU"),),  # weights are not repacked, which would read all of them
        flash_attention=True, cache_type="F16", n_ubatch=tokens, cells=tokens,
    )  # fmt: skip
    steps = [threads(128), decode(*text(0, np.zeros(tokens, np.int64)), wanted=[0])]
    log = play(engine, empty_model, setup, steps, LD_PRELOAD=str(library)).log
    (planned,) = re.findall(r"planned work: 128 threads, (\d+) bytes", log)
    assert round(int(planned) / MIB) <= MOST[tokens]
