"""Dispatches for one decoded token of the 48B model, counted by the emulated Metal device without running kernels.

The model has the layers, experts and cache rows of the 48B; its other dimensions are small, which does not change the
graph.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from llama_script import decode, play
from metal_program import dispatches, on_metal
from random_checkpoint import Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SPEC = Spec(
    layers="KKKM" * 6 + "KKM", kda_head_dim=64, kv_lora=512, nope=128, rope=64, v_dim=128,
    experts=256, experts_used=8, seed=60,
)  # fmt: skip
KDA, MLA = SPEC.layers.count("K"), SPEC.layers.count("M")
MOE = len(SPEC.layers) - SPEC.dense_layers
# Dispatches of upstream's graph for one token of one sequence, by what they compute. Norms include their weights.
OF_KDA = {
    "norm": 1,
    "conv state of the sequence": 1,
    "q, k, v: matmul, concat with the state, new state, convolution, silu": 15,
    "norms of q and k": 2,
    "gates: two matmuls, bias, softplus, product": 5,
    "beta: matmul, sigmoid": 2,
    "recurrence with the state of the sequence, contiguous output": 3,
    "output gate: two matmuls, sigmoid": 3,
    "output: norm, product, contiguous, matmul": 4,
}
OF_KDA_WITH_OPERATORS = {
    "norm": 1,
    "matmuls of q, k, v, gates, beta, output gate, output": 3 + 2 + 1 + 2 + 1,
    "KDA_CONV, KDA_SCAN": 2,
}
OF_MLA = {
    "norm": 1,
    "queries: matmul, absorbed, concat": 3,
    "cache: matmul, norm, concat, write": 4,
    "attention, join of its parts": 2,
    "output: v_b, contiguous, matmul": 3,
}
OF_MOE = {
    "residual, norm": 2,
    "router: matmul, sigmoid, bias, sort, weights, sum, clamp, quotient, scale": 9,
    "experts: gate, up, swiglu, down, sum": 5,
    "shared expert: gate, up, swiglu, down": 4,
    "sum with shared expert and residual": 1,
}
OF_DENSE = {"residual, norm": 2, "gate, up, swiglu, down": 4, "residual": 1}
OF_OUTPUT = {"rows of the last layer": 2, "norm, matmul": 2}
UPSTREAM = (
    KDA * sum(OF_KDA.values())
    + MLA * sum(OF_MLA.values())
    + MOE * sum(OF_MOE.values())
    + sum(OF_DENSE.values())
    + sum(OF_OUTPUT.values())
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metal-48b")
    return make_gguf(folder, SPEC, "Q8_0")


def kernels_for_a_token(
    engine: Engine, model: Path, backend: Path, folder: Path, **environment: str
) -> Counter[str]:
    """How often each kernel is dispatched for the second of two tokens."""
    setup = on_metal(backend, flash_attention=True, cache_type="F16")
    counted = []
    for tokens in (1, 2):
        log = folder / f"{tokens}"
        steps = [decode((0, i, i)) for i in range(tokens)]
        play(engine, model, setup, steps, KIMI_METAL_DRY="1", KIMI_METAL_LOG=str(log), **environment)
        counted.append(Counter(each.kernel for each in dispatches(log)))
    return counted[1] - counted[0]


# Our fusions: a router with its matmul needs two dispatches, not nine; the norm after a residual includes its ADDs; the
# attention of a single token is not copied.
COPIES = Counter({"kernel_cpy_f32_f32": MLA})
FUSED = UPSTREAM - MOE * 7 - 2 * len(SPEC.layers) - COPIES.total()


def test_upstreams_graph(metal_backend: Path, model: Path, engine: Engine, tmp_path: Path) -> None:
    counted = kernels_for_a_token(engine, model, metal_backend, tmp_path, KIMI_OPS="off")
    assert UPSTREAM == 1368
    assert counted.total() == UPSTREAM - COPIES.total()  # fix 0069 leaves them out, whatever KIMI_OPS says


def test_fused_nodes(metal_backend: Path, model: Path, engine: Engine, tmp_path: Path) -> None:
    counted = kernels_for_a_token(engine, model, metal_backend, tmp_path, KIMI_OPS="fuse")
    assert counted.total() == FUSED == 1125


def test_all_operators(metal_backend: Path, model: Path, engine: Engine, tmp_path: Path) -> None:
    counted = kernels_for_a_token(engine, model, metal_backend, tmp_path, KIMI_OPS="conv,scan,mla,fuse")
    assert counted.total() == FUSED - KDA * (sum(OF_KDA.values()) - sum(OF_KDA_WITH_OPERATORS.values()))
    assert counted.total() == 645  # in ggml_ops/fusion/README.md
