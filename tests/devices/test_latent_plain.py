"""MLA in long batches on devices without LATENT_ATTN: matmuls and flash attention, as a plain graph.

The devices are the CPU with separate memory (native/second_backend.cpp), without LATENT_ATTN, and the emulated Metal
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_script import Logits, PlayError, Setup, Step, assert_same, copy, cut, decode, play, text
from metal_program import dispatches, on_metal
from native_program import compile_backend
from random_checkpoint import Spec, write_checkpoint
from random_deepseek2 import VOCAB_SIZE, DeepseekSpec, write_deepseek2
from selection import some_of
from synthetic_case import error_of

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# Queries from which the plain graph is used with up to 512 keys, and with up to 1536.
FIRST = {"F32": 336, "F16": 240, "BF16": 240, "Q8_0": 240}
FIRST_LONGER = {"F16": 336}
IDS = np.random.default_rng(71).integers(0, VOCAB_SIZE, (2, 3584))
PLAIN = "SECOND0 REPEAT"  # an operator that only the plain graph has


@dataclass(frozen=True)
class World:
    """A model, a build, and the library with the device."""

    engine: Engine
    gguf: Path
    backend: Path
    folder: Path

    def play(
        self, steps: Sequence[Step], variables: dict[str, str] | None = None, **setup: Any
    ) -> tuple[Logits, str, set[str]]:
        """Logits, llama.cpp's log, and "DEVICE OPERATOR" for everything that the device computed."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        chosen = Setup(**{"backend": str(self.backend), "n_gpu_layers": 99, "flash_attention": True, **setup})
        environment = {"SECOND_LOG": str(log), "SECOND_REFUSES": "LATENT_ATTN", **(variables or {})}
        played = play(self.engine, self.gguf, chosen, steps, **environment)
        return played.logits, played.log, set(log.read_text().splitlines())

    def on_cpu(self, steps: Sequence[Step], **setup: Any) -> Logits:
        return play(self.engine, self.gguf, Setup(flash_attention=True, **setup), steps).logits


@pytest.fixture(scope="module", params=["kimi-linear", "deepseek2"])
def world(request: pytest.FixtureRequest, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("plain")
    gguf = folder / "model.gguf"
    if request.param == "deepseek2":
        write_deepseek2(gguf, DeepseekSpec())
    else:
        spec = Spec(layers="KM", heads=3, kv_lora=512, nope=128, rope=64, v_dim=128, seed=70)
        convert(write_checkpoint(folder / "checkpoint", spec), gguf, TYPES["F32"])
    return World(engine, gguf, compile_backend(engine, folder), folder)


def batches(*lengths: int, sequence: int = 0) -> list[Step]:
    """Batches of one sequence, one after the other."""
    steps, first = [], 0
    for length in lengths:
        steps.append(decode(*text(sequence, IDS[sequence][first : first + length], first)))
        first += length
    return steps


def test_the_logits_are_those_of_the_cpu(world: World) -> None:
    steps = batches(400, 1)
    logits, log, computed = world.play(steps)
    assert PLAIN in computed and "SECOND0 LATENT_ATTN" not in computed
    assert "uses matmuls and flash attention in large batches: SECOND0 does not have LATENT_ATTN" in log
    assert_same(logits, world.on_cpu(steps))


# Keys and values are rounded to F16. With an F16 cache, this is as much as the cache itself loses.
LOSSES = {"F16": 2.0, "BF16": 1.0, "Q8_0": 1.0}


@pytest.mark.parametrize("world", ["deepseek2"], indirect=True)  # no router, which would enlarge differences
@pytest.mark.parametrize("cache_type", LOSSES)
def test_other_caches(cache_type: str, world: World) -> None:
    steps = batches(300)
    exact = world.on_cpu(steps)
    logits, _, computed = world.play(steps, cache_type=cache_type)
    assert PLAIN in computed
    upstream, _, computed = world.play(steps, {"KIMI_OPS": "off"}, cache_type=cache_type)
    assert PLAIN not in computed
    assert error_of(logits, exact).in_all <= 1.05 * LOSSES[cache_type] * error_of(upstream, exact).in_all


@pytest.mark.parametrize("world", ["deepseek2"], indirect=True)
@pytest.mark.parametrize("cache_type", FIRST)
def test_few_queries_stay_absorbed(cache_type: str, world: World) -> None:
    first = FIRST[cache_type]
    assert PLAIN not in world.play(batches(first - 1), cache_type=cache_type)[2]
    assert PLAIN in world.play(batches(first), cache_type=cache_type)[2]


def test_the_sequences_own_keys_decide(world: World) -> None:
    few, many = FIRST["F16"], FIRST_LONGER["F16"]
    setup = {"cache_type": "F16", "cells": 1024}
    at_depth = [decode(*text(0, IDS[0][:200])), decode(*text(0, IDS[0][200:400], 200))]
    last = IDS[0][400:]
    assert PLAIN not in world.play([*at_depth, decode(*text(0, last[:few], 400))], **setup)[2]
    assert PLAIN in world.play([*at_depth, decode(*text(0, last[:many], 400))], **setup)[2]


# The other rows of the README's table: keys with the last batch -> queries from which the plain graph is used.
FIRST_WITH_KEYS = {
    2000: {"F32": 800, "F16": 352},
    4000: {"F32": 1200, "Q8_0": 400},
    6500: {"F32": 1552, "BF16": 432},
}


@pytest.mark.parametrize("keys", some_of(FIRST_WITH_KEYS, 2000, 4000))
def test_the_more_keys_the_more_queries(
    keys: int, metal_backend: Path, engine: Engine, tmp_path: Path
) -> None:
    gguf = write_deepseek2(tmp_path / "model.gguf", DeepseekSpec(layers=1, heads=2))
    ids = np.resize(IDS[0], keys)
    for cache_type, first in FIRST_WITH_KEYS[keys].items():
        setup = on_metal(
            metal_backend, cells=8192, n_ubatch=2048, cache_type=cache_type, flash_attention=True
        )
        depth, repeats = keys - first, []
        for queries in (0, first - 1, first):
            log = tmp_path / f"{cache_type}-{queries}"
            lengths = [*[2048] * (depth // 2048), depth % 2048, *([queries] if queries else [])]
            ends = np.cumsum(lengths)
            steps = [
                decode(*text(0, ids[end - n : end], end - n), wanted=[0])
                for n, end in zip(lengths, ends, strict=True)
            ]
            play(engine, gguf, setup, steps, KIMI_METAL_DRY="1", KIMI_METAL_LOG=str(log))
            repeats.append(sum(each.nodes.split()[0] == "REPEAT" for each in dispatches(log)))
        assert repeats[0] == repeats[1] < repeats[2]


@pytest.mark.parametrize(
    ("world", "unified"), [("kimi-linear", True), ("deepseek2", False)], indirect=["world"]
)
def test_sequences_that_share_tokens(unified: bool, world: World) -> None:
    """Cells of both, then cells of one each. The third sequence shares tokens of the second."""
    steps = [
        decode(*text(0, IDS[0][:60])),
        copy(0, 1),
        decode(*text(1, IDS[1][60:90], 60)),
        copy(1, 2),
        decode(*text(0, IDS[0][60:400], 60)),
        decode(*text(2, IDS[0][90:430], 90)),
        decode(*text(1, IDS[1][90:430], 90)),
    ]
    setup = {"n_seq_max": 3, "kv_unified": unified, "cells": 1024}
    logits, _, computed = world.play(steps, **setup)
    assert PLAIN in computed
    assert_same(logits, world.on_cpu(steps, **setup))


@pytest.mark.parametrize(
    ("world", "unified"), [("kimi-linear", False), ("deepseek2", True)], indirect=["world"]
)
def test_several_sequences(unified: bool, world: World) -> None:
    """A sequence reads its own cells. In a unified cache they are here between those of the other."""
    one, other = IDS[0], IDS[1]
    steps = [
        decode(*text(2, IDS[0][:40])),
        decode(*text(0, one[:30])),
        decode(*text(1, other[:20])),
        *(decode((0, 30 + n, int(one[30 + n])), (1, 20 + n, int(other[20 + n]))) for n in range(4)),
        cut(2, -1),
        decode(*text(1, other[24:364], 24)),  # the first 40 in the cells that are free now
        decode(*text(0, one[34:374], 34)),
        decode((0, 374, 1), (1, 364, 2)),
    ]
    setup = {"n_seq_max": 3, "kv_unified": unified}
    logits, _, computed = world.play(steps, **setup)
    assert PLAIN in computed
    assert_same(logits, world.on_cpu(steps, **setup))


@pytest.mark.parametrize("world", ["deepseek2"], indirect=True)  # no router, which would enlarge differences
def test_the_cells_of_others_do_not_count(world: World) -> None:
    """The form depends on the sequence's own keys, and the result does not depend on where they are."""
    few, setup = FIRST["F32"], {"n_seq_max": 3, "kv_unified": True, "cells": 1024}
    alone, _, _ = world.play(batches(few), **setup)
    others = [*batches(500, sequence=1), decode(*text(2, IDS[0][:40]))]
    logits, _, computed = world.play([*others, cut(2, -1), *batches(few)], **setup)
    assert PLAIN in computed
    assert np.array_equal(logits[-few:], alone)


@pytest.mark.parametrize("world", ["deepseek2"], indirect=True)
@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_an_ubatch_of_several_sequences_stays_absorbed(unified: bool, world: World) -> None:
    """With kimi-linear, each of these sequences has an ubatch of its own."""
    steps = [decode(*text(0, IDS[0][:256]), *text(1, IDS[1][:256]))]
    setup = {"n_seq_max": 2, "kv_unified": unified, "cache_type": "F16"}
    assert FIRST["F16"] <= 256
    assert PLAIN not in world.play(steps, **setup)[2]


@pytest.mark.full
def test_many_cells_stay_absorbed(metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    """A sequence of more than 131072 tokens. Memory for this, and for the plain graph before, has been reserved."""
    gguf = write_deepseek2(
        tmp_path / "model.gguf", DeepseekSpec(layers=1, hidden=64, ffn=64, heads=16, q_lora=64)
    )
    log, n = tmp_path / "log", 1 << 17
    setup = on_metal(metal_backend, cells=n + 4096, n_ubatch=4096, cache_type="Q8_0", flash_attention=True)
    ids = np.resize(IDS[0], n + 4096)
    steps = [decode(*text(0, ids[i : i + 4096], i), wanted=[0]) for i in range(0, len(ids), 4096)]
    said = play(engine, gguf, setup, steps, KIMI_METAL_DRY="1", KIMI_METAL_LOG=str(log)).log
    repeats = sum(each.nodes.split()[0] == "REPEAT" for each in dispatches(log))
    assert repeats == 16 * n // 4096
    assert "matches expectation" in said
    assert "does not match expectation" not in said


def test_a_device_without_an_operator_of_the_plain_graph(world: World) -> None:
    variables = {"SECOND_REFUSES": "LATENT_ATTN,REPEAT"}
    steps = batches(340)
    refusal = r"KIMI_OPS=require: layer [01]: .*; no plain graph: SECOND0 does not have REPEAT"
    with pytest.raises(PlayError, match=refusal):
        world.play(steps, variables)
    logits, log, computed = world.play(steps, {**variables, "KIMI_OPS": ""})
    assert "stays absorbed in large batches" in log and PLAIN not in computed
    assert_same(logits, world.on_cpu(steps))


@pytest.mark.parametrize("world", ["kimi-linear"], indirect=True)
@pytest.mark.parametrize("choice", ["off", "conv,scan", "conv,scan,mla,matmul,fuse,batch"])
def test_the_switch_disables_it(choice: str, world: World) -> None:
    assert PLAIN not in world.play(batches(340), {"KIMI_OPS": choice})[2]


@pytest.mark.parametrize(
    ("cells", "n_seq_max", "unified"), [(1024, 1, False), (1024, 4, True), (3584, 1, True), (3584, 4, False)]
)
def test_memory_is_reserved(
    cells: int, n_seq_max: int, unified: bool, metal_backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """For the largest batches of both forms on a full cache.

    With 1024 cells the absorbed form needs more, with 3584 the plain graph.
    """
    gguf = write_deepseek2(tmp_path / "model.gguf", DeepseekSpec(layers=1, heads=32))
    setup = on_metal(
        metal_backend,
        n_seq_max=n_seq_max,
        cells=cells,
        cache_type="Q8_0",
        kv_unified=unified,
        flash_attention=True,
    )
    depth, queries = cells - 512, {1024: 335, 3584: 399}[cells]
    absorbed = decode(*text(0, IDS[0][:queries], depth))
    steps = [*batches(*[512] * (cells // 512)), cut(0, depth), absorbed]
    log = play(engine, gguf, setup, steps, KIMI_METAL_DRY="1").log
    assert "matches expectation" in log
    assert "does not match expectation" not in log


def test_groups_of_heads(engine: Engine, tmp_path: Path) -> None:
    """A cache of 4096 cells has two groups, with 17 and 16 heads."""
    gguf = write_deepseek2(tmp_path / "model.gguf", DeepseekSpec(layers=1, heads=33))
    world = World(engine, gguf, compile_backend(engine, tmp_path), tmp_path)
    steps, setup = batches(340), {"cells": 4096}
    logits, _, computed = world.play(steps, **setup)
    assert PLAIN in computed
    assert_same(logits, world.on_cpu(steps, **setup))


@pytest.mark.parametrize(
    "cache_type",
    ["F32", pytest.param("F16", marks=pytest.mark.full), pytest.param("Q8_0", marks=pytest.mark.full)],
)
def test_metal(cache_type: str, metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    """The logits are as close to the CPU's as with upstream's graph on the same device."""
    spec = DeepseekSpec(layers=1, hidden=64, ffn=64, heads=1, q_lora=64)
    gguf = write_deepseek2(tmp_path / "model.gguf", spec)
    steps = batches(FIRST[cache_type])
    exact = play(engine, gguf, Setup(flash_attention=True), steps).logits
    setup = on_metal(metal_backend, flash_attention=True, cache_type=cache_type)
    error = {}
    for choice in ("require", "off"):
        log = str(tmp_path / choice)
        logits = play(engine, gguf, setup, steps, KIMI_OPS=choice, KIMI_METAL_LOG=log).logits
        error[choice] = error_of(logits, exact).in_all
    assert error["require"] <= 1.05 * LOSSES.get(cache_type, 1.0) * error["off"]
    key_type = "f32" if cache_type == "F32" else "f16"
    kernel = f"kernel_flash_attn_ext_{key_type}_dk192_dv128"
    assert any(each.kernel.startswith(kernel) for each in dispatches(tmp_path / "require"))


# Dispatches of a layer with F32 weights and 5 groups of heads, as 16384 cells and 32 heads have.
OF_ABSORBED = {"q: k_b, concat": 2, "attention": 1, "v_b, contiguous": 2}
OF_PLAIN = {
    "q: concat": 1,
    "k_b transposed, rows as F32, their ends as F16": 3,
    "two matmuls, REPEAT, two CPY": 5 * 5,
    "attention": 5 * 2,
}
OF_PLAIN |= {"joining the groups": 4}


def test_dispatches(metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    gguf = write_deepseek2(tmp_path / "model.gguf", DeepseekSpec(layers=1, heads=32))
    setup = on_metal(metal_backend, flash_attention=True, cache_type="F16", cells=16384)
    counted = []
    for tokens in (FIRST["F16"] - 1, FIRST["F16"]):
        log = tmp_path / f"{tokens}"
        play(engine, gguf, setup, batches(tokens), KIMI_METAL_DRY="1", KIMI_METAL_LOG=str(log))
        counted.append(len(dispatches(log)))
    assert counted[1] - counted[0] == sum(OF_PLAIN.values()) - sum(OF_ABSORBED.values())
