"""KDA_CONV and KDA_SCAN on the emulated Metal device: against float64, what they read and write, and whole models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulators.metal.build import libraries, preprocess
from emulators.metal.rules import violations
from llama_script import (
    Setup,
    Step,
    assert_same,
    decode,
    drafts_rolled_back,
    pauses,
    play,
    saved_for_another,
    text,
    together,
)
from metal_program import dispatches, on_metal, planted
from native_program import OPERATORS, compile_program, run_program
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.cuda_check import patched_ggml

pytestmark = pytest.mark.engine

ORDERS = ("forwards", "backwards")
KDA = {"KDA_CONV", "KDA_SCAN"}
# A device may round more than the emulated one, whose NMSE is at most that of some hundred roundings of float32.
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kda-device")
    return compile_program(engine, "kda-device-test.cpp", folder, ("kda",))


def result(program: Path, backend: Path, *chosen: object, **environment: str) -> str:
    """The hash of the results of all cases, each of which passed."""
    output = run_program(program, backend, *map(str, chosen), **environment).stdout
    assert ", 0 failed" in output
    (worst,) = re.findall(r"^largest NMSE that passed (.*)$", output, re.MULTILINE)
    assert float(worst) <= ROUNDING or "memory" in chosen
    found = re.search(r"^hash (\w+)$", output, re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("group", ["conv", "scan", "gates", "rows", "kept", "extra"])
def test_every_length_gate_row_and_order_of_lanes(group: str, program: Path, metal_backend: Path) -> None:
    forwards, backwards = (result(program, metal_backend, group, KIMI_METAL_ORDER=order) for order in ORDERS)
    assert forwards == backwards


def test_a_decay_of_nearly_1_over_thousands_of_tokens(program: Path, metal_backend: Path) -> None:
    result(program, metal_backend, "memory")


def test_a_copy_that_is_elided_is_one_dispatch_less_with_the_same_bits(
    program: Path, metal_backend: Path, tmp_path: Path
) -> None:
    """With one sequence and several, whose rows are their own or those of others."""
    for group in ("conv", "scan", "split", "rows"):
        ours, copied = tmp_path / f"{group}-ours", tmp_path / f"{group}-copied"
        hashes = {
            result(program, metal_backend, group, KIMI_METAL_LOG=str(ours)),
            result(program, metal_backend, group, KIMI_METAL_LOG=str(copied), GGML_METAL_FUSION_DISABLE="1"),
        }
        assert len(hashes) == 1
        elided = sum("+CPY" in each.nodes for each in dispatches(ours))
        assert elided > 0
        assert len(dispatches(ours)) == len(dispatches(copied)) - elided


@pytest.mark.parametrize("threads", ["1024", "512", "512:elide=0", "512:elide=1"])
def test_what_the_device_does_not_compute(threads: str, program: Path, metal_backend: Path) -> None:
    """Other head sizes and alignments, and kernels for which a threadgroup has too few threads."""
    result(program, metal_backend, "refused", KIMI_METAL_MAX_THREADS=threads)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# Fault -> the text in the kernel, what it is instead, the cases that find it, and a pattern of the message.
FAULTS = {
    "no barrier": (BARRIER, "", ("scan", 64, 1, 2, 1, 1), "threadgroup memory"),
    "no barrier in front of the norm": (
        f"{BARRIER}\n\n            if (sgitg < nt) {{\n                const",
        "if (sgitg < nt) { const",
        ("scan", 64, 1, 2, 1, 1),
        "threadgroup memory",
    ),
    "another stride": ("args.nb13 : args.nb03", "args.nb13 : args.nb02", ("scan", 64, 2, 3, 2, 1), "FAILED scan"),
    "rows that are overwritten": ("return simd_any(cross)", "return simd_any(false)", ("scan",), "another threadgroup"),
    "one channel too far": ("[ic + c]", "[ic + c + 1]", ("conv", 64, 2, 3, 1, 1), "another threadgroup"),
    "a kernel that does not compile": ("fma(p * u, u, u)", "wrong", ("scan", 64, 1, 1, 1, 1), "supports_op"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, program: Path, metal_backend: Path) -> None:
    right, wrong, chosen, message = FAULTS[fault]
    with (
        planted(metal_backend, "kda", right, wrong),
        pytest.raises(AssertionError, match=message),
    ):
        result(program, metal_backend, *chosen)


ARGUMENTS = "kimi_args.metal"  # a header: CMake puts it in front of each kernel of the embedded library


def test_the_library_contains_the_kernels_however_it_is_built(tmp_path: Path) -> None:
    """Both lists of ggml-metal name them; embedded, each is preprocessed without a file that it could include."""
    metal = patched_ggml("metal") / "src" / "ggml-metal"
    cmake = (metal / "CMakeLists.txt").read_text()
    inlined = set(re.findall(r'-e "/\\#include \\"([\w.]+)\\"/d"', cmake))
    lists = dict(re.findall(r"set\((METALLIB_KERNELS_\w+) +(.*)\)", cmake))
    common = lists["METALLIB_KERNELS_COMMON"].replace(
        "${METALLIB_KERNELS_KIMI}", lists["METALLIB_KERNELS_KIMI"]
    )
    in_front = re.findall(r"[\w.]+\.(?:h|metal)", common)
    assert in_front == ["common.h", ARGUMENTS]
    for kernel in OPERATORS.glob("*/metal/*.metal"):
        if kernel.name == ARGUMENTS:
            continue
        assert f"kernels/{kernel.name}\n" in cmake
        assert kernel.stem in libraries((metal / "ggml-metal-device.m").read_text())
        source = kernel.read_text()
        headers = [*in_front, *(name for name in ("dequantize.h", "quantize.h") if f'"{name}"' in source)]
        text = "".join((metal / "kernels" / name).read_text() for name in headers) + source
        text = text.replace('#include "ggml-metal-impl.h"\n', (metal / "ggml-metal-impl.h").read_text())
        text = re.sub(rf'#include "(?:{"|".join(inlined)})"\n|#pragma once\n', "", text)
        text = text.replace("__embed_ggml-common.h__", (metal.parent / "ggml-common.h").read_text())
        embedded = tmp_path / kernel.name
        embedded.write_text("#define GGML_METAL_EMBED_LIBRARY\n" + text)
        assert violations(preprocess(embedded, [])) == []


SPEC = Spec(layers="KKMK", heads=2, kda_head_dim=64, seed=40)
IDS = np.random.default_rng(42).integers(0, VOCAB_SIZE, (4, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("metal-kda"), SPEC)


def make(folder: Path, spec: Spec, file_type: str = "F32") -> Path:
    return make_gguf(folder, spec, file_type)


def several(sequence: int, first: int, count: int) -> Step:
    return decode(*text(sequence, IDS[sequence][first : first + count], first))


# Steps of at most 8 tokens over up to four sequences, and their setup.
CONVERSATIONS: dict[str, tuple[list[Step], dict[str, Any]]] = {
    "one sequence": ([several(0, 0, 8), several(0, 8, 7), *(together(IDS, n) for n in range(15, 20))], {}),
    "sequences that come, pause and go": (
        [
            *(several(s, 0, 5 + s) for s in range(3)),
            *pauses(IDS),
        ],
        {"n_seq_max": 4, "kv_unified": True},
    ),
    "drafts rolled back": drafts_rolled_back(IDS),
}


# Names of the tests -> conversation, order of lanes, number of layers on the device.
RUNS = {
    **{name: (name, "forwards", 999) for name in CONVERSATIONS},
    "backwards": ("drafts rolled back", "backwards", 999),
    "one KDA layer on the device": ("drafts rolled back", "forwards", 2),
}


def used(log: Path) -> set[str]:
    """The operators of KDA that ran, and those that they replace."""
    names = {each.nodes.split(" ")[0] for each in dispatches(log)}
    return {name for name in names if re.match("KDA|GATED_DELTA|SSM", name)}


@pytest.mark.parametrize("run", RUNS)
def test_a_model_on_the_device(
    run: str, metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    conversation, order, layers = RUNS[run]
    steps, chosen = CONVERSATIONS[conversation]
    expected = play(engine, model, Setup(**chosen), steps).logits
    log = tmp_path / "log"
    setup = on_metal(metal_backend, n_gpu_layers=layers, **chosen)
    variables = {"KIMI_METAL_LOG": str(log), "KIMI_METAL_ORDER": order, "KIMI_OPS": "conv,scan,require"}
    assert_same(play(engine, model, setup, steps, **variables).logits, expected)
    copied = KDA if conversation == "sequences that come, pause and go" else set()
    assert used(log) == {f"{each}+CPY" for each in KDA} | copied


def test_a_state_is_saved_on_the_device_and_restored(
    metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps = saved_for_another(IDS, tmp_path / "state")
    chosen = {"n_seq_max": 2}
    logits = play(engine, model, on_metal(metal_backend, **chosen), steps).logits
    assert_same(logits, play(engine, model, Setup(**chosen), steps).logits)
    np.testing.assert_array_equal(logits[-2:], logits[-4:-2])


def test_other_head_sizes_fall_back_and_say_why(metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    model = make(tmp_path, Spec(layers="KM", heads=2, kda_head_dim=32, seed=41))
    steps = [several(0, 0, 4), together(IDS, 4)]
    log = tmp_path / "log"
    played = play(engine, model, on_metal(metal_backend), steps, KIMI_OPS="", KIMI_METAL_LOG=str(log))
    assert "upstream's graph instead: MTL0, which holds layer 0, does not have KDA_CONV" in played.log
    assert not used(log) & {f"{each}+CPY" for each in KDA}
    assert_same(played.logits, play(engine, model, Setup(), steps).logits)


def test_kernels_that_need_more_threads_than_they_can_have(
    metal_backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps, log = [several(0, 0, 8), together(IDS, 8)], tmp_path / "log"
    variables = {"KIMI_OPS": "", "KIMI_METAL_MAX_THREADS": "256", "KIMI_METAL_LOG": str(log)}
    played = play(engine, model, on_metal(metal_backend), steps, **variables)
    assert "upstream's graph instead: MTL0, which holds layer 0, does not have KDA_SCAN" in played.log
    assert not used(log) & {f"{each}+CPY" for each in KDA}
    assert max(each.threads[0] * each.threads[1] for each in dispatches(log)) <= 256
    assert_same(played.logits, play(engine, model, Setup(), steps).logits)


PUBLISHED = Spec(
    layers="KKKMKKKM", hidden=256, heads=4, kda_head_dim=128, kv_lora=512, nope=128, rope=64, v_dim=128,
    experts=16, experts_used=8, moe_intermediate=64, seed=43,
)  # fmt: skip
# KIMI_OPS -> the operator with the recurrence, dispatches of a graph without our fusion of nodes.
GRAPHS = {"off": ("GATED_DELTA_NET+CPY", 400), "conv,scan": ("KDA_SCAN+CPY", 254)}


def test_what_a_token_needs(metal_backend: Path, engine: Engine, tmp_path: Path) -> None:
    """Dispatches of the graph; bytes of the recurrence for one head, as in the README."""
    model = make(tmp_path, PUBLISHED, "Q8_0")
    setup = on_metal(metal_backend, flash_attention=True, cache_type="F16")
    readme = (OPERATORS / "kda" / "README.md").read_text()
    recurrence = []
    for chosen, (operator, count) in GRAPHS.items():
        log = tmp_path / chosen
        play(
            engine,
            model,
            setup,
            [together(IDS, 0), together(IDS, 1)],
            KIMI_OPS=chosen,
            KIMI_METAL_LOG=str(log),
        )
        lines = log.read_text().splitlines()
        begin = [i for i, line in enumerate(lines) if line.startswith("encoder")][-2]  # a graph has two
        log.write_text("\n".join(lines[begin:]))
        ran = dispatches(log)
        # upstream's copies, which fix 0069 leaves out
        copies = PUBLISHED.layers.count("M") if chosen == "off" else 0
        assert len(ran) + copies == count
        recurrence.append(next(each for each in ran if each.nodes.startswith(f"{operator} ")))
    theirs, ours = recurrence
    heads = PUBLISHED.heads
    assert f"| bytes read | {theirs.bytes_read // heads} | {ours.bytes_read // heads} |\n" in readme
    assert f"| bytes written | {theirs.bytes_written // heads} | {ours.bytes_written // heads} |\n" in readme
