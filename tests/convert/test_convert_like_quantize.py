"""One pass gives the same bytes as two: conversion to BF16, then llama-quantize of the pinned llama.cpp.

Which type each tensor gets is compared for every type on each of three random checkpoints, with and without an
importance matrix, from what both say without quantizing (--dry-run). All keys and all tensors in their order, and the
whole data section, are compared for every type on one checkpoint without and on another one with an importance matrix,
and with each of llama-quantize's own options on one checkpoint (`scripts/test --full`: all of them on all).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_tools import convert, fresh_checkpoint, write_imatrix
from gguf import GGUFReader
from random_checkpoint import Spec

from kimi_gguf.bench.shapes import types_in_dry_run
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.gguf import GgufFile

pytestmark = pytest.mark.engine

# The rules depend on: eight experts, or at least four; the first and last eighth and sixteenth of the layers; whether
# the first layer's heads share keys; rows of whole blocks of 256, of 32 only, or of neither.
ODD_ROWS = "odd rows, one head"
SPECS = {
    "eight experts, sixteen layers": Spec(
        layers="KKKM" * 4, hidden=256, experts=8, moe_intermediate=32, kv_lora=256, std=0.02, seed=30,
    ),
    "16 experts, latent first": Spec(
        layers="MK", heads=4, hidden=256, experts=16, experts_used=8, moe_intermediate=32, seed=31,
    ),
    ODD_ROWS: Spec(
        layers="KKMKKKMKK", hidden=320, heads=1, nope=20, kda_head_dim=48, moe_intermediate=256,
        intermediate=256, experts=2, std=1.0, seed=32,
    ),
}  # fmt: skip
FEW_LAYERS = list(SPECS).index("16 experts, latent first")
LOWEST = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
QUANTIZED = [kind for kind in TYPES if TYPES[kind].quantized]  # the others: test_convert_against_upstream
NO_FALLBACK = {"Q1_0"}  # llama-quantize has no fallback for rows that are not whole blocks of these


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the result of upstream's first step."""

    source: Path
    bf16: Path
    imatrix: Path


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    source = fresh_checkpoint(folder / "model", SPECS[request.param])
    assert convert(source, "-o", folder / "bf16.gguf", "--type", "BF16").status == 0
    write_imatrix(folder / "imatrix.gguf", folder / "bf16.gguf", every=1)
    return Case(source, folder / "bf16.gguf", folder / "imatrix.gguf")


def quantize(engine: Engine, case: Case, output: Path, kind: str, *options: str) -> str | None:
    """Upstream's second step; returns its message if it refused."""
    command = [str(engine.bin / "llama-quantize"), *options, str(case.bf16), str(output), kind, "2"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode in (0, 1), f"llama-quantize died of signal {-done.returncode}: {done.stderr}"
    return None if done.returncode == 0 else done.stdout + done.stderr


Tensors = list[tuple[str, str, tuple[int, ...]]]


def contents(path: Path) -> tuple[list[tuple[str, Any]], Tensors, bytes]:
    """Keys in order, tensors in order, and the whole data section (gguf's reader does not know every type).

    llama-quantize omits trailing dimensions of 1.
    """
    with GgufFile(path) as file:
        tensors = [(t.name, t.type.name, (*t.ne, 1, 1, 1)[:4]) for t in file.tensors.values()]
        start = min(t.offset for t in file.tensors.values())
        return list(file.keys.items()), tensors, path.read_bytes()[start:]


def assert_alike(upstream: Engine, case: Case, folder: Path, kind: str, *options: str) -> None:
    """Both refuse, or both write the same file."""
    theirs_path, ours_path = folder / "theirs.gguf", folder / "ours.gguf"
    refused = quantize(upstream, case, theirs_path, kind, *options)
    run = convert(case.source, "-o", ours_path, "--type", kind, *options)
    if refused is not None:
        assert run.status == 1, f"llama-quantize refused: {refused[-600:]}"
        return
    assert run.status == 0, run.err
    for mine, other in zip(contents(ours_path), contents(theirs_path), strict=True):
        assert mine == other


# --pure has rules for rows only.
RUNS = [
    *((name, options) for options in ((), ("--imatrix",)) for name in SPECS),
    (ODD_ROWS, ("--pure", "--imatrix")),
]


def given(options: tuple[str, ...], case: Case) -> list[str]:
    return [*options, str(case.imatrix)] if options else []


@pytest.mark.parametrize(
    ("case", "options"),
    RUNS,
    indirect=["case"],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else part,
)
def test_the_type_of_each_tensor(upstream: Engine, case: Case, options: tuple[str, ...]) -> None:
    for kind in QUANTIZED:
        command = [upstream.bin / "llama-quantize", "--dry-run", *given(options, case), case.bf16, kind, "2"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        run = convert(case.source, "--dry-run", "--type", kind, *given(options, case))
        if done.returncode != 0 or "will require an imatrix" in done.stdout + done.stderr:
            assert run.status == 1, (kind, done.stdout[-600:])
            continue
        assert run.status == 0, (kind, run.err)
        wanted = types_in_dry_run((done.stdout + done.stderr).splitlines())
        found = dict(re.findall(r"(?m)^(\S+) +([A-Z]+\d\w*) +\d", run.out))
        assert len(wanted) == len(found) > 30
        assert found == wanted, kind


def some_runs() -> list[Any]:
    """Every type on every checkpoint; most of them are only run by `scripts/test --full`."""
    found = []
    for number, kind in enumerate(QUANTIZED):
        with_imatrix = FEW_LAYERS if kind in LOWEST else number + 1  # the lowest types take longest
        chosen = set() if kind == "IQ1_S" else {len(SPECS) + with_imatrix % len(SPECS)}  # IQ1_M is as slow
        if not kind.startswith("IQ"):
            chosen.add(number % len(SPECS))
        for index, (name, options) in enumerate(RUNS):
            marks = () if index in chosen else (pytest.mark.full,)
            found.append(pytest.param(kind, name, options, id=" ".join((kind, name, *options)), marks=marks))
    return found


@pytest.mark.parametrize(("kind", "case", "options"), some_runs(), indirect=["case"])
def test_every_type(
    upstream: Engine, tmp_path: Path, case: Case, kind: str, options: tuple[str, ...]
) -> None:
    assert_alike(upstream, case, tmp_path, kind, *given(options, case))


def in_turns(values: Sequence[Any]) -> list[Any]:
    """Each value with one checkpoint, in turns; with the others by `--full` only. Values that are tuples are joined."""
    found = []
    for number, value in enumerate(values):
        for index, name in enumerate(SPECS):
            marks = () if number % len(SPECS) == index else pytest.mark.full
            words = f"{value[0]} {' '.join(value[1])}" if isinstance(value, tuple) else value
            found.append(pytest.param(value, name, id=f"{words} {name}", marks=marks))
    return found


OPTIONS = [
    ("Q4_K_M", ("--output-tensor-type", "q8_0", "--token-embedding-type", "Q5_1")),
    ("Q2_K", ("--tensor-type", "ATTN_V=q8_0", "--tensor-type", r"blk\.[0-3]\.ffn_down=bf16")),
    ("Q3_K_L", ("--tensor-type", "shexp=Q6_K", "--tensor-type", "ffn=iq4_nl", "--pure")),
    ("BF16", ("--output-tensor-type", "F16")),
    ("MXFP4_MOE", ("--tensor-type", "attn_k_b=q8_0")),
    ("Q5_K_M", ("--tensor-type", "attn_(q|k)=mxfp4", "--tensor-type", "ssm_.*=f16")),
    ("Q8_0", ("--tensor-type", "ffn_(up|gate)=tq2_0", "--token-embedding-type", "f32")),
]


@pytest.mark.parametrize(("chosen", "case"), in_turns(OPTIONS), indirect=["case"])
def test_options(upstream: Engine, tmp_path: Path, case: Case, chosen: tuple[str, tuple[str, ...]]) -> None:
    kind, options = chosen
    assert_alike(upstream, case, tmp_path, kind, *options)


@pytest.mark.parametrize(
    ("kind", "case"), in_turns(["Q4_0", "Q5_0", "IQ4_NL", "Q3_K_M", "IQ3_XXS"]), indirect=["case"]
)
def test_importances_of_some_tensors_only(upstream: Engine, tmp_path: Path, case: Case, kind: str) -> None:
    some = tmp_path / "some.gguf"
    write_imatrix(some, case.bf16, every=3)
    assert_alike(upstream, case, tmp_path, kind, "--imatrix", str(some))


@pytest.mark.parametrize(("kind", "case"), in_turns(["Q4_K_M", "Q2_K"]), indirect=["case"])
def test_importances_in_the_older_form(upstream: Engine, tmp_path: Path, case: Case, kind: str) -> None:
    legacy = tmp_path / "imatrix.dat"
    write_legacy_imatrix(legacy, case.bf16)
    assert_alike(upstream, case, tmp_path, kind, "--imatrix", str(legacy))


def write_legacy_imatrix(path: Path, model: Path) -> None:
    rng = np.random.default_rng(2)
    matrices = [t for t in GGUFReader(model).tensors if t.tensor_type.name == "BF16"]
    parts = [np.int32(len(matrices)).tobytes()]
    for tensor in matrices:
        name, shape = tensor.name.encode(), [int(n) for n in tensor.shape]
        values = rng.gamma(0.7, size=shape[0] * (shape[2] if len(shape) > 2 else 1)).astype(np.float32)
        parts += [np.int32(len(name)).tobytes(), name, np.array([5, values.size], "i4").tobytes()]
        parts.append((values * 5).astype(np.float32).tobytes())
    parts += [np.array([3, 4], "i4").tobytes(), b"text"]
    path.write_bytes(b"".join(parts))


def test_without_importances_the_lowest_types_are_refused_as_by_llama_quantize(
    upstream: Engine, tmp_path: Path, case: Case
) -> None:
    """Exactly these types are refused; in all other cases above files are compared."""
    refused = set()
    for kind in TYPES:
        command = [str(upstream.bin / "llama-quantize"), "--dry-run", str(case.bf16), kind, "2"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        run = convert(case.source, "--dry-run", "--type", kind)
        unwanted = done.returncode == 1 or "will require an imatrix" in done.stdout + done.stderr
        assert unwanted == (run.status == 1), (kind, run.err)
        if unwanted:
            refused.add(kind)
            need = "requires an importance matrix; give"
            words = "no fallback type" if kind in NO_FALLBACK else need
            assert words in run.err
    assert refused <= LOWEST | NO_FALLBACK and refused >= (LOWEST | NO_FALLBACK) - {"IQ3_XS", "IQ3_XXS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_f32_and_f16_weights_are_not_rounded_before_quantization(
    upstream: Engine, tmp_path: Path, dtype: torch.dtype
) -> None:
    """F32 or F16 weights are quantised without rounding in between: the bytes of F32 conversion and llama-quantize."""
    spec = replace(SPECS[ODD_ROWS], dtype=dtype, std=0.05)
    source = fresh_checkpoint(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "f32.gguf", "--type", "F32").status == 0
    for kind in ("Q4_K_M", "Q8_0", "IQ4_XS"):
        assert_alike(upstream, Case(source, tmp_path / "f32.gguf", tmp_path), tmp_path, kind)
        (tmp_path / "ours.gguf").unlink()
