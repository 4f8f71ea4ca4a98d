"""Layers on another device: the same logits for any placement of layers, caches and states; refusals are reported.

The device is the CPU with separate memory (native/second_backend.cpp): only this backend can access its memory, so the
scheduler has to split the graph and copy tensors as it does for a GPU. An operator that wrote its state to anything
except its result would lose it here.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_script import Logits, PlayError, Setup, Step, assert_same, decode, drafts_rolled_back, play, text
from native_program import compile_backend, roll_back_on_device
from random_checkpoint import VOCAB_SIZE, Spec
from random_family import ON_DEVICES, FamilySpec, write_family
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=40)
IDS = np.random.default_rng(41).integers(0, VOCAB_SIZE, (2, 220))
PREFILLED = (180, 70)  # of two sequences; the decompressed form starts at 160
DECODED = 20
ALL = len(SPEC.layers) + 1  # the output counts as a layer
# Layers on the device: none, the last KDA layer, also the MLA layer, all except the first, all.
LAYERS = (0, 2, 3, 4, ALL)
ATTENTION = {False: "plain", True: "flash"}
KDA = {"KDA_CONV", "KDA_SCAN"}


def conversation() -> list[Step]:
    """Two prompts one after the other, then both sequences token by token."""
    steps = [decode(*text(i, IDS[i][:length])) for i, length in enumerate(PREFILLED)]
    for i in range(DECODED):
        steps.append(decode(*((s, n + i, int(IDS[s][n + i])) for s, n in enumerate(PREFILLED))))
    return steps


@dataclass(frozen=True)
class World:
    """A model, a build, the library with the devices, and the logits of the plain CPU, by use of flash attention."""

    engine: Engine
    gguf: Path
    backend: Path
    expected: dict[bool, Logits]

    def play(
        self, log: Path, flash: bool, told: dict[str, str], **setup: Any
    ) -> tuple[Logits, str, set[str]]:
        """Logits, llama.cpp's log, and "DEVICE OPERATOR" for everything that the devices computed."""
        chosen = Setup(backend=str(self.backend), n_seq_max=2, flash_attention=flash, **setup)
        played = play(self.engine, self.gguf, chosen, conversation(), SECOND_LOG=str(log), **told)
        return played.logits, played.log, set(log.read_text().splitlines()) if log.exists() else set()


@pytest.fixture(scope="module")
def world(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("second")
    gguf = make_gguf(folder, SPEC)
    expected = {
        flash: play(engine, gguf, Setup(n_seq_max=2, flash_attention=flash), conversation()).logits
        for flash in ATTENTION
    }
    return World(engine, gguf, compile_backend(engine, folder), expected)


@pytest.mark.parametrize(
    ("layers", "flash", "kqv"),
    [
        pytest.param(layers, flash, kqv, id=f"{layers}-{ATTENTION[flash]}-{'kqv' if kqv else 'nkvo'}")
        for i, layers in enumerate(LAYERS)  # each pair of values
        for flash in ATTENTION
        for kqv in [flash == bool(i % 2)]
    ],
)
def test_any_placement_of_layers_and_caches(
    layers: int, flash: bool, kqv: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # decompressed attention refuses, by design, a cache that is on the CPU (tested below)
    monkeypatch.setenv("KIMI_OPS", "require" if kqv or not flash else "conv,scan")
    logits, log, computed = world.play(
        tmp_path / "log", flash, {}, n_gpu_layers=layers, offload_kqv=kqv, op_offload=False
    )
    assert_same(logits, world.expected[flash])
    assert "kda: operators in use" in log
    expected = {f"SECOND0 {name}" for name in KDA} if layers else set()
    if layers > 2 and flash:  # with -nkvo, llama.cpp copies the cache for the absorbed form
        expected |= {"SECOND0 FLASH_ATTN_EXT"} | ({"SECOND0 LATENT_ATTN"} if kqv else set())
    assert {each for each in computed if "KDA" in each or "ATTN" in each} == expected


@pytest.mark.parametrize("flash", ATTENTION, ids=ATTENTION.get)
def test_layers_over_two_devices(flash: bool, world: World, tmp_path: Path) -> None:
    logits, _, computed = world.play(tmp_path / "log", flash, {"SECOND_DEVICES": "2"}, n_gpu_layers=ALL)
    assert_same(logits, world.expected[flash])
    assert {f"SECOND{i} {name}" for i in range(2) for name in KDA} <= computed


def test_the_devices_named_are_the_ones_used(world: World, tmp_path: Path) -> None:
    told = {"SECOND_DEVICES": "3"}
    logits, _, computed = world.play(tmp_path / "log", True, told, n_gpu_layers=ALL, devices=("SECOND2",))
    assert_same(logits, world.expected[True])
    assert {each.split()[0] for each in computed} == {"SECOND2"}


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("flash", ATTENTION, ids=ATTENTION.get)
def test_a_device_that_takes_over_large_batches(
    layers: int, flash: bool, world: World, tmp_path: Path
) -> None:
    """Weights and states of these layers stay in the CPU's memory; the device computes prompts."""
    logits, _, computed = world.play(tmp_path / "log", flash, {"SECOND_TAKES": "1"}, n_gpu_layers=layers)
    assert_same(logits, world.expected[flash])
    assert {f"SECOND0 {name}" for name in KDA} <= computed


@pytest.mark.parametrize("refused", sorted(KDA))
@pytest.mark.parametrize("kqv", [True, False], ids=["kqv", "nkvo"])
def test_a_device_without_the_kda_operators_runs_upstreams_graph(
    refused: str, kqv: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"SECOND_REFUSES": refused}
    layer = 1 if kqv else 3
    setup = {"n_gpu_layers": ALL - layer, "offload_kqv": kqv}
    reason = f"SECOND0, which holds layer {layer}, does not have {refused}"
    monkeypatch.setenv("KIMI_OPS", "")
    logits, log, computed = world.play(tmp_path / "log", False, told, **setup)
    assert_same(logits, world.expected[False])
    assert f"kda: operators not used, upstream's graph instead: {reason}" in log
    assert "kda: operators in use" not in log
    assert not any("KDA" in each for each in computed)
    assert "SECOND0 GATED_DELTA_NET" in computed

    monkeypatch.setenv("KIMI_OPS", "require")
    with pytest.raises(PlayError, match=f"KIMI_OPS=require: KDA operators cannot be used: {reason}"):
        world.play(tmp_path / "log", False, told, **setup)


def test_a_device_that_holds_no_kda_layer_is_not_asked(world: World, tmp_path: Path) -> None:
    """It has only the output layer."""
    told = {"SECOND_REFUSES": ",".join(sorted(KDA))}
    logits, log, _ = world.play(tmp_path / "log", False, told, n_gpu_layers=1)
    assert_same(logits, world.expected[False])
    assert "kda: operators in use" in log


OBSTACLES: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "the device lacks it": (
        {"SECOND_REFUSES": "LATENT_ATTN"},
        {},
        "SECOND0 does not have LATENT_ATTN for f32 caches",
    ),
    "the cache stays behind": (
        {},
        {"offload_kqv": False},
        "its cache is on CPU and blk.2.attn_k_b.weight on SECOND0",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_where_decompressed_attention_cannot_run_it_stays_absorbed(
    obstacle: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, setup, reason = OBSTACLES[obstacle]
    setup = {"n_gpu_layers": ALL, **setup}
    monkeypatch.setenv("KIMI_OPS", "")
    logits, log, computed = world.play(tmp_path / "log", True, told, **setup)
    assert_same(logits, world.expected[True])
    assert f"latent attention: layer 2 stays absorbed in large batches: {reason}" in log
    assert "SECOND0 LATENT_ATTN" not in computed

    monkeypatch.setenv("KIMI_OPS", "require")
    message = f"KIMI_OPS=require: layer 2: decompressed latent attention: {reason}"
    with pytest.raises(PlayError, match=message):
        world.play(tmp_path / "log", True, told, **setup)


# Layers on the device, caches too, and flash attention.
PLACEMENTS = {
    "the last KDA layer": (2, True, True),
    "an MLA layer, caches on the CPU": (3, False, False),
    "all": (ALL, True, True),
}


@pytest.mark.parametrize(
    ("spec", "placement"),
    [
        pytest.param(spec, placement, id=f"{spec.id}-{placement}", marks=pytest.mark.full if slow else ())
        for spec in ON_DEVICES
        for placement in PLACEMENTS
        for slow in [spec.heads > 32 and placement != "all"]
    ],
)
def test_the_family_in_any_placement(spec: FamilySpec, placement: str, world: World, tmp_path: Path) -> None:
    """Ling 3, GLM-5.3-Flash and Kimi K3: a prompt with expanded keys, and drafts that are rolled back."""
    layers, kqv, flash = PLACEMENTS[placement]
    model = write_family(tmp_path / "model.gguf", spec)
    steps, chosen = drafts_rolled_back(IDS, 170, 20)
    chosen["flash_attention"] = flash
    expected = play(world.engine, model, Setup(**chosen), steps).logits
    log = tmp_path / "log"
    setup = Setup(
        backend=str(world.backend), n_gpu_layers=layers, offload_kqv=kqv, op_offload=False, **chosen
    )
    assert_same(play(world.engine, model, setup, steps, SECOND_LOG=str(log)).logits, expected)
    attention = set[str]()
    if layers == ALL:  # the attention of GLM-5.3-Flash is sparse: it expands no keys
        attention = {"FLASH_ATTN_EXT"} | ({"LATENT_ATTN"} if spec.architecture != "glm5-next" else set())
    computed = {each for each in log.read_text().splitlines() if "KDA" in each or "ATTN" in each}
    assert computed == {f"SECOND0 {name}" for name in KDA | attention}


@pytest.mark.parametrize("layers", [3, ALL])
def test_rollback_with_states_on_the_device(layers: int, world: World, tmp_path: Path) -> None:
    computed = roll_back_on_device(world.engine, world.gguf, world.backend, layers, tmp_path / "log")
    assert {f"SECOND0 {name}" for name in KDA} <= computed


TRESPASS = """
import ctypes, os, sys
ggml = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], "libggml.so"))
for name in ("ggml_backend_load", "ggml_backend_dev_by_name", "ggml_backend_dev_buffer_type",
             "ggml_backend_buft_alloc_buffer", "ggml_backend_buffer_get_base"):
    getattr(ggml, name).restype = ctypes.c_void_p
ggml.ggml_backend_load(sys.argv[1].encode())
device = ctypes.c_void_p(ggml.ggml_backend_dev_by_name(b"SECOND0"))
kind = ctypes.c_void_p(ggml.ggml_backend_dev_buffer_type(device))
buffer = ctypes.c_void_p(ggml.ggml_backend_buft_alloc_buffer(kind, ctypes.c_size_t(64)))
print("allocated", flush=True)
ctypes.string_at(ggml.ggml_backend_buffer_get_base(buffer), 1)
"""


def test_the_memory_of_a_device_is_closed_to_others(world: World) -> None:
    """A condition for the tests above."""
    ended = subprocess.run(
        [sys.executable, "-c", TRESPASS, str(world.backend)],
        env=world.engine.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout == "allocated\n"
    assert ended.returncode == -signal.SIGSEGV
