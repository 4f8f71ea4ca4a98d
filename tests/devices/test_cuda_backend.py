"""The CUDA kernels called by ggml-cuda's own host code, in whole models.

The device is that of second_backend.cpp. Patched ggml-cuda decides which operators it supports, which nodes it computes
with one call and whether it launches a captured graph again (native/cuda/second_cuda.cu); our kernels run on the
emulator, the CPU replaces upstream's. Graphs are therefore those of llama.cpp, with its caches, sequences and rollback.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_program import (
    GEFORCE,
    GGML_OPTIONS,
    LATENT,
    LATENT_GLUE,
    LATENT_KERNELS,
    LATENT_STORE,
    NATIVE,
    OPERATORS,
    SHARED,
)
from emulators.cuda import compile_objects, link_program
from llama_script import Logits, Setup, Step, decode, drafts_rolled_back, pauses, play, text, together
from native_program import (
    compile_program,
    ggml_libraries,
    roll_back_on_device,
    run_program,
)
from random_checkpoint import VOCAB_SIZE, Spec
from random_family import ON_DEVICES, FamilySpec, write_family
from selection import some_of
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.cuda_check import DEFINITIONS, patched_ggml

pytestmark = pytest.mark.engine

# Upstream's sources in which ggml-cuda selects kernels, and their functions that launch kernels (renamed here).
HOST = ("fattn.cu", "topk-moe.cu", "mmvf.cu", "mmvq.cu", "quantize.cu")
ASIDE = ("topk_moe", "mul_mat_vec_f")
ASKS = re.compile("_use_|supported|get_to_|_ar_")  # functions of upstream that launch nothing
KDA_FOLDER = OPERATORS / "kda" / "cuda"
# They use ggml-cuda's context, whose layout depends on these definitions.
CONTEXT = [
    *sorted(KDA_FOLDER.glob("*.cu")),
    *LATENT_GLUE,
    LATENT_STORE,
    OPERATORS / "matmul" / "cuda" / "matvec.cu",
    OPERATORS / "fusion" / "cuda" / "norm.cu",
]
GRAPHS_DEFINED = [*DEFINITIONS, "-DGGML_CUDA_USE_GRAPHS"]
SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=40)
ALL = len(SPEC.layers) + 1  # the output counts as a layer
PUBLISHED = Spec(
    layers="KKKMKKKM", hidden=576, heads=4, kda_head_dim=128, kv_lora=512, nope=128, rope=64, v_dim=128,
    experts=16, experts_used=8, moe_intermediate=544, seed=43,
)  # fmt: skip
KDA = {"KDA_CONV", "KDA_SCAN"}
ERROR = 1e-7  # NMSE; the same bound as for the operators
SEQUENCES = 4
IDS = np.random.default_rng(42).integers(0, VOCAB_SIZE, (SEQUENCES, 200))


@pytest.fixture(scope="module")
def backend(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the devices."""
    folder = tmp_path_factory.mktemp("cuda-backend")
    ggml = patched_ggml()
    upstream = ggml / "src" / "ggml-cuda"
    include, system = [KDA_FOLDER, LATENT], [ggml / "include", ggml / "src", upstream]
    objects = []
    for name, sources, chosen in (
        ("context", [*CONTEXT, NATIVE.parent / "second_backend.cpp"], GRAPHS_DEFINED),
        ("latent", LATENT_KERNELS, GEFORCE),  # test_cuda_latent.py has the same objects
    ):
        objects += compile_objects(
            sources,
            folder / name,
            include=[*include, *SHARED],
            system=system,
            options=["-Werror", *GGML_OPTIONS, *chosen],
        )
    aside = [f"-Dggml_cuda_{prefix}{name}=aside_{prefix}{name}" for name in ASIDE for prefix in ("", "op_")]
    for name, sources, chosen in (
        ("device", [NATIVE / "second_cuda.cu"], []),
        ("host", [upstream / name for name in HOST], aside),
    ):
        objects += compile_objects(
            sources,
            folder / name,
            include=[*include, *SHARED, NATIVE, upstream],
            system=system,
            options=[*GRAPHS_DEFINED, *chosen, "-DNDEBUG", "-O0", "-w"],
        )
    link = ["-shared", "-fPIC", *ggml_libraries(engine)]
    whole = link_program(objects, folder / "without-upstreams-kernels.so", link=link)
    missing = write_missing(whole, engine, folder / "missing.c")
    return link_program([*objects, missing], folder / "libsecond-cuda.so", link=link)


def symbols(library: Path, which: str) -> set[str]:
    """Names that a library defines, or requires from elsewhere."""
    said = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    kinds = "U" if which == "--undefined-only" else "BDRTVW"
    return {line.split()[-1] for line in said.splitlines() if line.split()[-2] in kinds and "@" not in line}


def write_missing(library: Path, engine: Engine, source: Path) -> Path:
    """C for the functions that the library requires and ggml does not have: each only counts its calls."""
    there = set[str]().union(*(symbols(each, "--defined-only") for each in engine.lib.glob("libggml*.so")))
    wanted = sorted(symbols(library, "--undefined-only") - there)
    assert all("cuda" in name for name in wanted), wanted
    lines = []
    for i, name in enumerate(wanted):
        counter = "upstream_missing" if ASKS.search(name) else "upstream_launches"
        lines.append(f'long f{i}(void) __asm__("{name}"); long f{i}(void) {{ ++{counter}; return 0; }}')
    source.write_text("\n".join(["extern int upstream_missing, upstream_launches;", *lines, ""]))
    return source


def ran(log: Path) -> set[str]:
    """The kernels that ran: "DEVICE kernel OPERATOR", "... and its copy". Without fused nodes."""
    return {
        line for line in log.read_text().splitlines() if " kernel " in line and not line.endswith(", fused")
    }


def fused(log: Path) -> set[str]:
    """The first operators of fused nodes that ran."""
    return set(re.findall(r"^SECOND0 kernel (\w+), fused$", log.read_text(), re.MULTILINE))


@pytest.mark.parametrize("group", ["conv", "scan", "gates", "rows", "kept", "extra", "refused"])
def test_layouts_gates_and_copies_of_kda(group: str, backend: Path, engine: Engine, tmp_path: Path) -> None:
    """The cases of the Metal kernels' test, on a device with tensor cores and on one without."""
    program = compile_program(engine, "kda-device-test.cpp", tmp_path, ("kda",))
    for capability in ("800", "750"):
        assert ", 0 failed" in run_program(program, backend, group, SECOND_CAPABILITY=capability).stdout


def test_the_operators_verify_themselves(backend: Path, engine: Engine, tmp_path: Path) -> None:
    """The cases of kimi-verify on kernels that are right, within its time for slow devices."""
    log = tmp_path / "log"
    variables = {"GGML_BACKEND_PATH": str(backend), "KIMI_VERIFY_SECONDS": "300", "SECOND_MATVEC": "1"}
    variables["SECOND_LOG"] = str(log)
    report = run_program(engine.bin / "kimi-verify", **variables).stdout
    assert re.findall(r"^result\t(.+)\tpassed\t", report, re.MULTILINE) == [
        "KDA_CONV", "KDA_SCAN", "elided state copies", "absorbed latent attention", "LATENT_ATTN", "fused nodes",
        "matmuls of one column",
    ], report  # fmt: skip
    assert {f"SECOND0 kernel {each}" for each in (*KDA, "LATENT_ATTN", "MUL_MAT", "MUL_MAT_ID")} <= ran(log)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda-model")
    return make_gguf(folder, SPEC)


def prompts(*lengths: int) -> list[Step]:
    return [decode(*text(s, IDS[s][:length])) for s, length in enumerate(lengths) if length]


# Steps over up to four sequences, and their setup.
CONVERSATIONS: dict[str, tuple[list[Step], dict[str, Any]]] = {
    "one sequence": ([*prompts(150), *(together(IDS, n) for n in range(150, 160))], {"n_seq_max": 1}),
    "two, in chunks and token by token": (
        [*prompts(130, 70), *(together(IDS, 130 + i, 70 + i) for i in range(8))],
        {"n_seq_max": 2},
    ),
    "sequences that come, pause and go": (
        [
            *prompts(5, 6, 7),
            *pauses(IDS),
        ],
        {"n_seq_max": 4, "kv_unified": True},
    ),
    "drafts rolled back": drafts_rolled_back(IDS, 20, 30),
}


def assert_near(got: Logits, expected: Logits, bound: float = ERROR) -> None:
    error = np.square(got.astype(np.float64) - expected).sum(1)
    assert (error / np.square(expected.astype(np.float64)).sum(1)).max() <= bound


# Layers on the device, and whether the caches are there too.
@pytest.mark.parametrize(
    ("conversation", "layers", "kqv"),
    [
        ("one sequence", ALL, False),
        ("two, in chunks and token by token", 2, True),
        ("sequences that come, pause and go", ALL, True),
        ("drafts rolled back", ALL, True),
        ("drafts rolled back", 2, False),
    ],
)
def test_a_model_on_the_device(
    conversation: str, layers: int, kqv: bool, backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    steps, chosen = CONVERSATIONS[conversation]
    expected = play(engine, model, Setup(**chosen), steps).logits
    setup = Setup(backend=str(backend), n_gpu_layers=layers, offload_kqv=kqv, op_offload=False, **chosen)
    played = play(engine, model, setup, steps, SECOND_LOG=str(tmp_path / "log"))
    assert_near(played.logits, expected)
    assert fused(tmp_path / "log") <= {"ADD", "RMS_NORM"}
    copied = " and its copy" if kqv else ""  # for any batch, cells and rows of its sequences
    assert ran(tmp_path / "log") == {f"SECOND0 kernel {each}{copied}" for each in KDA}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A typical model: quantised, with heads and number of used experts as in the 48B."""
    folder = tmp_path_factory.mktemp("cuda-quantised")
    return make_gguf(folder, PUBLISHED, "Q8_0")


@pytest.mark.parametrize(
    ("sequences", "snapshots", "flash"), [(1, 0, True), (1, 3, False), (3, 0, False), (3, 3, True)]
)
def test_a_captured_graph_is_launched_again(
    sequences: int,
    snapshots: int,
    flash: bool,
    backend: Path,
    published: Path,
    engine: Engine,
    tmp_path: Path,
) -> None:
    """From the third token on: the first has no previous state, and its states have different addresses."""
    steps = [together(IDS, *[i] * sequences) for i in range(10)]
    setup = Setup(n_seq_max=sequences, n_rs_seq=snapshots, flash_attention=flash, cache_type="F16")
    graphs = graphs_of(engine, published, backend, setup, steps, tmp_path / "log")
    assert [again for _, again, _ in graphs] == ["anew"] * 2 + ["again"] * (len(steps) - 2)


UNFUSED = "conv,scan,mla,matmul,batch,plain"  # KIMI_OPS: all but the fusion of nodes
# Cache type -> NMSE of the logits with and without fused nodes: a value at a boundary of Q8_1, or of the cache's type,
# is rounded the other way.
ERROR_OF_FUSION = {"F32": 1e-6, "F16": 1e-6, "BF16": 1e-6, "Q8_0": 1e-5, "Q4_0": 1e-3}


@pytest.mark.parametrize("cache_type", some_of(ERROR_OF_FUSION, "Q8_0"))
def test_a_decoded_token_with_quantized_weights(
    cache_type: str, backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """The emulator computes its matmuls, in both models from inputs in Q8_1."""
    model = make_gguf(tmp_path, replace(PUBLISHED, layers="KM"), "Q8_0")
    steps = [together(IDS, i) for i in range(3)]
    setup = Setup(backend=str(backend), n_gpu_layers=99, flash_attention=True, cache_type=cache_type)
    logits = {}
    for operators in ("", UNFUSED):
        log = tmp_path / f"log-{operators}"
        switches = {"KIMI_OPS": operators, "SECOND_LOG": str(log), "SECOND_MATVEC": "1"}
        logits[operators] = play(engine, model, setup, steps, **switches).logits
        norms = fused(log) & {"ADD", "RMS_NORM"}
        assert norms == (set() if operators else {"ADD", "RMS_NORM"})
    assert_near(logits[""], logits[UNFUSED], ERROR_OF_FUSION[cache_type])


# Layer -> layers of two models that differ by one such layer, with experts; the device's compute capability; most
# launches, as a share of upstream's.
ONE_LAYER = {
    "KDA": ("KM", "KKM", "800", 0.6),
    "MLA": ("KM", "KMM", "800", 0.6),
    "KDA, GeForce": ("KM", "KKM", "890", 0.6),
    "MLA, GeForce": ("KM", "KMM", "890", 0.8),
}


@pytest.mark.parametrize("layer", ONE_LAYER)
def test_how_much_ggml_cuda_launches_for_a_layer(
    layer: str, backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """A token of one sequence; upstream's graph runs on the same ggml-cuda, fused as there."""
    *models, capability, most = ONE_LAYER[layer]
    setup = Setup(flash_attention=True, cache_type="F16")
    steps = [together(IDS, i) for i in range(4)]
    counts = {}
    for operators in ("off", ""):
        of_models = []
        for layers in models:
            model = make_gguf(tmp_path / f"{layers}-{operators}", replace(PUBLISHED, layers=layers), "Q8_0")
            log = tmp_path / f"{layers}-{operators}.log"
            switches = {"KIMI_OPS": operators, "SECOND_CAPABILITY": capability}
            graphs = graphs_of(engine, model, backend, setup, steps, log, **switches)
            of_models.append(int(graphs[-1][-1]))
        counts[operators] = of_models[1] - of_models[0]
    upstream = counts["off"] + layer.startswith("MLA")  # the copy that fix 0069 leaves out
    assert counts[""] <= most * upstream
    page = (OPERATORS / "kda" / "README.md").read_text()
    assert f"| {layer} | {upstream} | {counts['']} | {100 * counts[''] / upstream:.0f} % |\n" in page


# Cache type, KIMI_OPS, compute capability and heads -> number of queries from which LATENT_ATTN is used, with as many
# keys: the first lines of CUDA's table; with 16 heads (`with_heads`) 640 for up to 512 keys, then 512.
FIRST_DECOMPRESSED = {
    ("Q8_0", "", "900", 4): 320,
    ("F16", "", "800", 4): 320,
    ("F16", "", "800", 16): 513,
    ("F16", "exact", "800", 4): 496,
    ("F16", "", "890", 4): 2048,
}


@pytest.mark.parametrize(
    ("cache_type", "operators", "capability", "heads"),
    [
        pytest.param(*key, id=" ".join(map(str, key)), marks=() if key[0] == "Q8_0" else pytest.mark.full)
        for key in FIRST_DECOMPRESSED
    ],
)
def test_many_queries_take_the_decompressed_form(
    cache_type: str,
    operators: str,
    capability: str,
    heads: int,
    backend: Path,
    engine: Engine,
    tmp_path: Path,
) -> None:
    first = FIRST_DECOMPRESSED[cache_type, operators, capability, heads]
    model = make_gguf(tmp_path / "model", replace(PUBLISHED, layers="KM", heads=heads), "Q8_0")
    used = {}
    variables = {"KIMI_OPS": operators, "SECOND_CAPABILITY": capability}
    for queries in (first - 1, first):
        steps = [decode(*text(0, np.resize(IDS[0], queries)))]
        setup = Setup(
            backend=str(backend),
            n_gpu_layers=99,
            n_ubatch=2048,
            cells=2048,
            flash_attention=True,
            cache_type=cache_type,
        )
        log = tmp_path / f"{queries}"
        play(engine, model, setup, steps, SECOND_LOG=str(log), **variables)
        used[queries] = {each for each in log.read_text().splitlines() if "ATTN" in each}
    kernel = {"SECOND0 kernel FLASH_ATTN_EXT"} if operators else set()  # otherwise it is upstream's
    assert used == {
        first - 1: {"SECOND0 FLASH_ATTN_EXT", *kernel},
        first: {"SECOND0 LATENT_ATTN", "SECOND0 kernel LATENT_ATTN"},
    }


def graphs_of(
    engine: Engine, model: Path, backend: Path, setup: Setup, steps: list[Step], log: Path, **environment: str
) -> list[list[str]]:
    """The columns of SECOND_GRAPHS for each step, with all layers on the device: one graph each."""
    chosen = replace(setup, backend=str(backend), n_gpu_layers=99)
    play(engine, model, chosen, steps, SECOND_GRAPHS=str(log), **environment)
    graphs = [line.split() for line in log.read_text().splitlines()]
    assert len(graphs) == len(steps)
    return graphs


@pytest.mark.parametrize("order", some_of(("forwards", "backwards", "7"), "7"))
def test_rollback_of_states_on_the_device(
    order: str, backend: Path, model: Path, engine: Engine, tmp_path: Path
) -> None:
    variables = {"KIMI_CUDA_ORDER": order, "KIMI_OPS": "conv,scan,require"}
    roll_back_on_device(engine, model, backend, ALL, tmp_path / "log", **variables)
    assert ran(tmp_path / "log") == {f"SECOND0 kernel {each} and its copy" for each in KDA}


# Steps and their setup, layers on the device, and the operator in which a prompt's attention is computed.
PLACED: dict[str, tuple[list[Step], dict[str, Any], int, str]] = {
    "drafts rolled back, two layers": (*CONVERSATIONS["drafts rolled back"], 3, "FLASH_ATTN_EXT"),
    "expanded keys, all layers": (
        [decode(*text(0, np.resize(IDS[0], 520)))],  # with 16 heads LATENT_ATTN starts at 512
        {"cache_type": "Q8_0", "n_ubatch": 1024, "cells": 1024},
        ALL,
        "LATENT_ATTN",
    ),
}
ERROR_OF_CACHE = {
    "F32": ERROR,
    "Q8_0": 2e-5,
}  # NMSE; with Q8_0 a value at a boundary is rounded the other way


@pytest.mark.parametrize(
    ("spec", "placed"),
    [
        pytest.param(spec, placed, id=f"{spec.id}-{placed}", marks=pytest.mark.full if slow else ())
        for spec in ON_DEVICES
        for placed in PLACED
        for slow in [spec.heads > 32]
    ],
)
def test_the_family_on_the_device(
    spec: FamilySpec, placed: str, backend: Path, engine: Engine, tmp_path: Path
) -> None:
    """Ling 3, GLM-5.3-Flash and Kimi K3: other gates, other numbers of heads, latent attention with or without RoPE."""
    steps, chosen, layers, attention = PLACED[placed]
    sparse = spec.architecture == "glm5-next"
    if sparse and attention == "LATENT_ATTN":
        steps = prompts(130)  # in longer ones its indexer chooses between near ties
    model, log = write_family(tmp_path / "model.gguf", spec), tmp_path / "log"
    setup = Setup(flash_attention=True, op_offload=False, **chosen)
    expected = play(engine, model, setup, steps).logits
    placement = replace(setup, backend=str(backend), n_gpu_layers=layers)
    played = play(engine, model, placement, steps, SECOND_LOG=str(log), KIMI_OPS="exact,require")
    assert_near(played.logits, expected, ERROR_OF_CACHE[setup.cache_type])
    used = {f"SECOND0 kernel {each} and its copy" for each in KDA}
    if not sparse:  # sparse attention is upstream's
        used |= {f"SECOND0 kernel {attention}"}
    assert ran(log) == used
    assert "SECOND0 FLASH_ATTN_EXT" in log.read_text() or attention == "LATENT_ATTN"


COMPUTE_BUFFER = re.compile(r"SECOND0 compute buffer size = +([0-9.]+) MiB")
CELLS = 16384
LATENT_ROW = 576


def compute_buffer(engine: Engine, model: Path, backend: Path, setup: Setup, operators: str) -> float:
    """MiB that llama.cpp reserves on the device for nodes, which is what --fit and the memory breakdown count."""
    chosen = replace(setup, backend=str(backend), n_gpu_layers=99, flash_attention=True, cells=CELLS)
    log = play(engine, model, chosen, [together(IDS, 0)], KIMI_OPS=operators).log
    return float(COMPUTE_BUFFER.findall(log)[-1])


@pytest.mark.parametrize(
    ("n_ubatch", "operators", "copied"), [(1, "", False), (64, "exact", False), (64, "", True)]
)
def test_no_f16_copy_of_the_cache_is_reserved_where_our_kernels_compute(
    n_ubatch: int, operators: str, copied: bool, backend: Path, published: Path, engine: Engine
) -> None:
    setup = Setup(cache_type="Q8_0", n_ubatch=n_ubatch)
    upstream = compute_buffer(engine, published, backend, setup, "off")
    ours = compute_buffer(engine, published, backend, setup, operators)
    copy = CELLS * LATENT_ROW * 2 / 2**20
    assert upstream > copy
    assert (ours > copy) is copied
    assert copied or upstream - ours > 0.7 * copy  # the copy of 4095 keys is reserved


def test_the_scratch_of_latent_attn_is_reserved(backend: Path, published: Path, engine: Engine) -> None:
    """Of its four heads, for all cells: expanded keys and values, rows as halves, weights as floats and halves."""
    scratch = (CELLS * (4 * 256 + LATENT_ROW) * 2 + 4 * 131072 * (4 + 2)) / 2**20
    setup = Setup(cache_type="F16", n_ubatch=512)
    assert compute_buffer(engine, published, backend, setup, "") > scratch
    assert compute_buffer(engine, published, backend, replace(setup, n_ubatch=64), "") < scratch


def test_the_scratch_of_kda_scan_is_reserved(backend: Path, engine: Engine, tmp_path: Path) -> None:
    """Of its four heads: two runs of four chunks. A device without these kernels reserves none.

    Not all of it is visible: without it, other nodes of the graph need most memory.
    """
    model = make_gguf(tmp_path, replace(PUBLISHED, hidden=256, moe_intermediate=64), "Q8_0")
    scratch = 2 * 4 * 4 * 139 / 1024
    setup = Setup(backend=str(backend), n_gpu_layers=99, flash_attention=True, n_ubatch=300, cells=512)
    sizes = {}
    for capability in ("800", "750"):
        log = play(engine, model, setup, [together(IDS, 0)], SECOND_CAPABILITY=capability).log
        sizes[capability] = float(COMPUTE_BUFFER.findall(log)[-1])
    assert scratch / 4 < sizes["800"] - sizes["750"] < scratch


# How experts are kept on the CPU -> Setup: --n-cpu-moe 4 and -ot of all experts; long batches on the device or not.
EXPERTS_ON_THE_CPU: dict[str, dict[str, Any]] = {
    "n-cpu-moe": {"tensors_on": ((r"blk\.[0-3]\.ffn_(up|down|gate)_exps", "CPU"),), "op_offload": False},
    "override-tensor": {"tensors_on": ((r"ffn_(up|down|gate)_exps", "CPU"),), "op_offload": False},
    "override-tensor, long batches": {
        "tensors_on": ((r"ffn_(up|down|gate)_exps", "CPU"),),
        "op_offload": True,
    },
}


@pytest.mark.parametrize(
    ("placement", "operators"),
    [
        pytest.param(placement, operators, marks=() if few else pytest.mark.full)
        for placement in EXPERTS_ON_THE_CPU
        for operators in ("require", "exact,require")
        for few in [(placement, operators) == ("override-tensor, long batches", "require")]
    ],
)
def test_experts_on_the_cpu(
    placement: str, operators: str, backend: Path, published: Path, engine: Engine, tmp_path: Path
) -> None:
    """KDA and attention on the device, routed experts on the CPU: each operator where it belongs.

    The logits are those of a run with everything on the device; near ties of the router make those of the CPU differ.
    """
    ids = np.resize(IDS[0], 500)
    steps = [decode(*text(0, ids)), *(decode((0, n, int(IDS[1][n - 500]))) for n in range(500, 503))]
    chosen = EXPERTS_ON_THE_CPU[placement]
    whole = Setup(backend=str(backend), n_gpu_layers=99, flash_attention=True, cache_type="F16")
    expected = play(engine, published, whole, steps, KIMI_OPS=operators).logits
    setup = replace(whole, **chosen)
    takes = {"SECOND_TAKES": "1"} if chosen["op_offload"] else {}
    log = tmp_path / "log"
    played = play(engine, published, setup, steps, SECOND_LOG=str(log), KIMI_OPS=operators, **takes)
    assert_near(played.logits, expected)
    kernels = {f"SECOND0 kernel {each} and its copy" for each in KDA}
    absorbed = {"SECOND0 kernel FLASH_ATTN_EXT"} if "exact" in operators else set()
    assert ran(log) == kernels | absorbed | {"SECOND0 kernel LATENT_ATTN"}
    on_device = {line.removeprefix("SECOND0 ") for line in log.read_text().splitlines()}
    assert ("MUL_MAT_ID" in on_device) is (placement != "override-tensor")
    assert "MUL_MAT" in on_device
    if operators == "require":
        others = play(engine, published, setup, steps, KIMI_OPS="conv,scan,mla,fuse,batch,plain", **takes)
        assert not np.array_equal(others.logits, played.logits), (
            "our matmul computes the experts, in another order"
        )


# Of seven layers, in Q8_0.
EXPERTS_MIB = 7 * 16 * 3 * 256 * 64 * 34 // 32 // 2**20
BUFFERS = re.compile(r"SECOND0 (?:model|KV|RS|compute) buffer size = +([0-9.]+) MiB")


def complete(
    engine: Engine, model: Path, backend: Path, memory: int, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Two tokens by llama-completion on a device with `memory` MiB. --fit leaves nothing of it free."""
    words = ["-m", str(model), "-p", "a b c", "-n", "2", "-no-cnv", "--temp", "0", "-fa", "on", "-c", "4096"]
    words += ["-dev", "SECOND0"]
    variables = os.environ | engine.environment() | environment
    variables |= {"GGML_BACKEND_PATH": str(backend), "SECOND_MEMORY": str(memory)}
    program = [engine.bin / "llama-completion", *words, "--fit-target", "0", *options]
    return subprocess.run(
        program, env=variables, capture_output=True, check=False, timeout=300, encoding="latin-1"
    )


# What places the experts -> options, and whether some experts remain on the device.
FITTED = {
    "fit": ((), True),
    "n-cpu-moe": (("--n-cpu-moe", "8"), False),
    "override-tensor": (("-ot", "ffn_(up|down|gate)_exps=CPU"), False),
}


@pytest.mark.parametrize("placement", FITTED)
def test_fit_counts_what_our_operators_need(
    placement: str, backend: Path, published: Path, engine: Engine, tmp_path: Path
) -> None:
    """The device has room for all but half of the experts; without --fit the same run is out of memory."""
    options, partly = FITTED[placement]
    whole = complete(engine, published, backend, 4096, "--fit", "off", "-ngl", "99", "-v")
    assert whole.returncode == 0, whole.stderr[-2000:]
    needed = sum(map(float, BUFFERS.findall(whole.stderr)))
    memory = int(needed) - EXPERTS_MIB // 2
    assert complete(engine, published, backend, memory, "--fit", "off", "-ngl", "99").returncode != 0
    log = tmp_path / "log"
    fitted = complete(engine, published, backend, memory, *options, SECOND_LOG=str(log))
    assert fitted.returncode == 0, fitted.stderr[-2000:]
    assert fitted.stdout == whole.stdout
    assert {f"SECOND0 kernel {each} and its copy" for each in KDA} <= ran(log)
    assert ("SECOND0 MUL_MAT_ID" in log.read_text().splitlines()) is partly
