"""The CUDA kernels and ggml's side of them as a backend: upstream's own comparison of devices, and whole models.

The device is that of second_backend.cpp with our kernels, from their real sources on the emulator
(native/cuda/second_cuda.cu); what is not ours the CPU computes. So graphs are those that llama.cpp builds, with its
caches, sequences and rollback.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_program import NATIVE, OPERATORS, compile_cuda
from llama_script import Logits, Setup, Step, cut, decode, play, text
from random_checkpoint import VOCAB_SIZE, Spec, write_checkpoint

from kimi_gguf.convert.pipeline import convert
from kimi_gguf.convert.quantise import TYPES
from kimi_gguf.scripts.cuda_check import patched_headers
from kimi_gguf.scripts.engine import Engine, upstream_source

pytestmark = pytest.mark.engine

KDA_FOLDERS = [OPERATORS / name / "cuda" for name in ("kda_common", "kda_conv", "kda_scan")]
LATENT = OPERATORS / "latent_attention" / "cuda"
SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=40)
ALL = len(SPEC.layers) + 1  # the output counts as a layer
KDA = {"KDA_CONV", "KDA_SCAN"}
ERROR = 1e-7  # NMSE; the operators' own bound
SEQUENCES = 4
IDS = np.random.default_rng(42).integers(0, VOCAB_SIZE, (SEQUENCES, 200))


@pytest.fixture(scope="module")
def backend(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of devices."""
    folder = tmp_path_factory.mktemp("cuda-backend")
    headers = folder / "patched"
    headers.mkdir()
    ggml = upstream_source() / "llama.cpp" / "ggml" / "src"
    return compile_cuda(
        [
            *(source for each in KDA_FOLDERS for source in sorted(each.glob("*.cu"))),
            LATENT / "latent-attend.cu",
            LATENT / "latent-ggml.cu",
            NATIVE / "second_cuda.cu",
            NATIVE.parent / "second_backend.cpp",
        ],
        folder / "libsecond-cuda.so",
        include=[*KDA_FOLDERS, LATENT],
        system=[patched_headers(headers), ggml, ggml / "ggml-cuda"],
        options=["-DGGML_CUDA_NO_VMM", "-Wno-unused-function", "-Wno-unused-parameter", "-fPIC"],
        link=[
            "-shared",
            f"-L{engine.lib}",
            "-lggml",
            "-lggml-cpu",
            "-lggml-base",
            f"-Wl,-rpath,{engine.lib}",
        ],
    )


def ran(log: Path) -> set[str]:
    """Which kernels did: "DEVICE kernel OPERATOR", "... and its copy"."""
    return {line for line in log.read_text().splitlines() if " kernel " in line}


# Operator -> which of its cases; how many there are, more than; whether some are kernels with the copy behind them.
COMPARED = {
    "KDA_CONV": (".*", 60, True),
    "KDA_SCAN": (".*", 100, True),
    "FLASH_ATTN_EXT": ("hsk=576,hsv=512,.*type_K=(f32|bf16|q8_0|q4_0)", 40, False),
}


@pytest.mark.parametrize("operator", COMPARED)
def test_upstreams_comparison_of_devices(
    operator: str, backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """test-backend-ops: its cases and bounds, the CPU's plain path as the truth."""
    cases, count, copied = COMPARED[operator]
    told = {"GGML_BACKEND_PATH": str(backend), "SECOND_LOG": str(tmp_path / "log"), "GGML_NO_BACKTRACE": "1"}
    ended = subprocess.run(
        [engine.bin / "test-backend-ops", "test", "-b", "SECOND0", "-o", operator, "-p", cases],
        env={**engine.environment(), **told}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert sum(operator in line and "OK" in line for line in ended.stdout.splitlines()) > count
    kernel = f"SECOND0 kernel {operator}"
    assert ran(tmp_path / "log") == {kernel, *([f"{kernel} and its copy"] if copied else [])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda-model")
    convert(write_checkpoint(folder / "checkpoint", SPEC), folder / "model.gguf", TYPES["F32"])
    return folder / "model.gguf"


def together(*positions: int | None) -> Step:
    """One token of each sequence that has a position here."""
    return decode(*((s, n, int(IDS[s][n])) for s, n in enumerate(positions) if n is not None))


def prompts(*lengths: int) -> list[Step]:
    return [decode(*text(s, IDS[s][:length])) for s, length in enumerate(lengths) if length]


# Steps over up to four sequences, and how they are set up.
CONVERSATIONS: dict[str, tuple[list[Step], dict[str, Any]]] = {
    "one sequence": ([*prompts(150), *(together(n) for n in range(150, 160))], {"n_seq_max": 1}),
    "two, in chunks and token by token": (
        [*prompts(130, 70), *(together(130 + i, 70 + i) for i in range(8))],
        {"n_seq_max": 2},
    ),
    "sequences that come, pause and go": (
        [
            *prompts(5, 6, 7),
            together(5, 6, 7),
            together(6, None, 8),  # cells apart: the one between them moves behind
            together(7, 7),
            together(None, 8, 9, 0),
            cut(1, -1),
            together(8, None, 10, 1),
            together(9, 0, 11, 2),
            together(10, 1, 12, 3),
        ],
        {"n_seq_max": 4, "kv_unified": True},
    ),
    "drafts taken back": (
        [
            *prompts(20, 30),
            decode(*text(0, IDS[0][20:24], 20), *text(1, IDS[1][30:34], 30)),
            cut(0, 22),
            cut(1, 31),
            together(22, 31),
            together(23, 32),
            decode(*text(0, IDS[0][24:27], 24), *text(1, IDS[1][33:36], 33)),
            cut(1, 34),
            together(27, 34),
        ],
        {"n_seq_max": 2, "n_rs_seq": 4},
    ),
}


def assert_near(got: Logits, expected: Logits) -> None:
    error = np.square(got.astype(np.float64) - expected).sum(1)
    assert (error / np.square(expected.astype(np.float64)).sum(1)).max() <= ERROR


@pytest.mark.parametrize("kqv", [True, False], ids=["kqv", "nkvo"])
@pytest.mark.parametrize("layers", [2, ALL])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_model_on_the_device(
    conversation: str, layers: int, kqv: bool, backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps, chosen = CONVERSATIONS[conversation]
    expected = play(engine, model, Setup(**chosen), steps).logits
    setup = Setup(backend=str(backend), n_gpu_layers=layers, offload_kqv=kqv, op_offload=False, **chosen)
    played = play(engine, model, setup, steps, SECOND_LOG=str(tmp_path / "log"))
    assert_near(played.logits, expected)
    copied = " and its copy" if kqv else ""  # whatever the batch, the cells and the rows of its sequences
    assert ran(tmp_path / "log") == {f"SECOND0 kernel {each}{copied}" for each in KDA}


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize(("sequences", "snapshots"), [(1, 0), (1, 3), (3, 0), (3, 3)])
def test_from_token_to_token_the_graph_stays(
    sequences: int, snapshots: int, flash: bool, backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    """So ggml-cuda launches what it has captured; and of each KDA layer the copies of two states are gone."""
    steps = [together(*[i] * sequences) for i in range(20)]
    setup = Setup(
        backend=str(backend), n_gpu_layers=ALL, n_seq_max=sequences, n_rs_seq=snapshots, flash_attention=flash
    )
    log = tmp_path / "graphs"
    play(engine, model, setup, steps, SECOND_GRAPHS=str(log), KIMI_OPS="conv,scan,require")
    graphs = [line.split() for line in log.read_text().splitlines()]
    assert len(graphs) == len(steps)
    assert len({tuple(each) for each in graphs[2:]}) == 1
    _, nodes, left, hashed = graphs[-1]
    assert int(nodes) - int(left) == 2 * SPEC.layers.count("K")
    assert graphs[0][3] != hashed  # new sequences: zeros in place of a row


@pytest.mark.parametrize("order", ["forwards", "backwards", "7"])
def test_rollback_of_states_on_the_device(
    order: str, backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    """Upstream's program; it loads no backends, so the device registers itself."""
    told = {"LD_PRELOAD": str(backend), "SECOND_REGISTERS": "1", "GGML_NO_BACKTRACE": "1"}
    told |= {"SECOND_LOG": str(tmp_path / "log"), "KIMI_CUDA_ORDER": order, "KIMI_OPS": "conv,scan,require"}
    ended = subprocess.run(
        [engine.bin / "test-recurrent-state-rollback", "-m", model, "-t", "1", "-ngl", str(ALL)],
        env={**engine.environment(), **told}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-2000:]
    assert said.count("multi-seq split replay matched") == 2
    assert ran(tmp_path / "log") == {f"SECOND0 kernel {each} and its copy" for each in KDA}
