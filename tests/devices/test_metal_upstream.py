"""Upstream's Metal kernels and host code on the emulated device: upstream's own comparison with the CPU.

The host code of ggml-metal is compiled as it is (tests/emulators/metal); the device checks every access of the kernels
and that the host's memory barriers suffice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from metal_program import compile_metal_backend
from native_program import passed_cases
from selection import some_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.cuda_check import patched_ggml

pytestmark = pytest.mark.engine

DEVICE = "MTL0"
BARRIER = "ggml_metal_encoder_memory_barrier(ctx->enc);"
# Operator -> pattern of its cases; there are at least this number.
COMPARED = {
    "ADD": (r"type=f32,ne=\[(16,5,4,3|10,5,4,3)\]", 15),
    "RMS_NORM": (r"ne=\[(64|1025),5,4,3\]", 20),
    "SSM_CONV": (".*", 40),
    "GATED_DELTA_NET": (r"head_size=(32|64|128)", 25),
    # one column: matrix-vector kernels; 9 and 16: simdgroup matrices; 31 rows: vectors at any element
    "MUL_MAT": (
        r"type_a=(f32|f16|q4_0),type_b=f32,m=16,n=(1|9|16),k=256,bs=\[[0-9]*,1\],nr=\[1,1\]"
        r"|type_a=f32,type_b=f32,m=31,n=509,k=2051",
        16,
    ),
    # one query: vectors; 32: simdgroup matrices. 113 keys: the last block is padded.
    "FLASH_ATTN_EXT": (
        r"hsk=(64|128),hsv=(64|128),nh=4,nr23=\[1,1\],kv=113,nb=(1|3|32),mask=1,sinks=[01],max_bias=0.0+,"
        r"logit_softcap=0.0+,prec=f32,type_K=(f16|q8_0)",
        10,
    ),
}


# Operators that have cases which the device refuses, or which take too long.
LEFT_OUT = {
    "CONV_2D": "takes half an hour",
    "FLASH_ATTN_EXT": "takes hours; COMPARED has some of its cases",
    "LIGHTNING_INDEXER": "takes hours",
    "MUL_MAT_ID": "takes hours",
    "OPT_STEP_ADAMW": "writes to its sources",
    "SET_ROWS": "dispatches an empty grid for an empty tensor",
    "SOLVE_TRI": "lanes read what others of their simdgroup wrote, without a barrier",
}


# `bfloat` or 0 by a condition is ambiguous in C++.
NOT_BF16 = {"MUL_MAT"}


def environment(backend: Path, **more: str) -> dict[str, str]:
    """Of test-backend-ops; without the comparison of all variants of vector kernels, which takes minutes."""
    return {
        "GGML_BACKEND_PATH": str(backend),
        "GGML_NO_BACKTRACE": "1",
        "LLAMA_TEST_FA_VEC_DISABLE": "1",
        **more,
    }


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("operator", some_of(COMPARED, "RMS_NORM", "MUL_MAT"))
def test_upstreams_operators(operator: str, order: str, metal_backend: Path, engine: Engine) -> None:
    cases, count = COMPARED[operator]
    chosen = environment(metal_backend, KIMI_METAL_ORDER=order)
    found = passed_cases(engine, DEVICE, operator, "-p", cases, **chosen)
    assert found >= count


@pytest.mark.full
def test_every_case_of_the_operators(metal_backend: Path, engine: Engine) -> None:
    """What CI has no time for, without LEFT_OUT; operators of which the device supports no case pass."""
    program = engine.bin / "test-backend-ops"
    listed = subprocess.run(
        [program, "test", "--list-ops"], capture_output=True, text=True, check=True
    ).stdout
    operators = re.findall(r"^ +([A-Z0-9_]+)$", listed, re.MULTILINE)
    assert len(operators) > 100

    def failure(operator: str) -> str | None:
        command = [program, "test", "-b", DEVICE, "-o", operator]
        command += ["-p", "^(?!.*bf16)"] if operator in NOT_BF16 else []
        ended = subprocess.run(
            command, env=os.environ | environment(metal_backend), capture_output=True, text=True, check=False
        )
        said = (ended.stdout + ended.stderr).splitlines()
        return f"{operator}: " + "\n".join(said[-5:]) if ended.returncode != 0 else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [each for each in pool.map(failure, set(operators) - set(LEFT_OUT)) if each]
    assert failures == []


@pytest.mark.full
def test_a_missing_barrier_of_the_host_is_found(engine: Engine, tmp_path: Path) -> None:
    """Flash attention for one query: its second kernel reads what the first one has written."""
    ggml = Path(shutil.copytree(patched_ggml("metal"), tmp_path / "ggml"))
    source = ggml / "src" / "ggml-metal" / "ggml-metal-ops.cpp"
    text = source.read_text()
    assert text.count(BARRIER) == 1
    source.write_text(text.replace(BARRIER, ""))
    backend = compile_metal_backend(engine, ggml, tmp_path / "backend")
    case = r"hsk=64,hsv=64,nh=4,nr23=\[1,1\],kv=512,nb=1,mask=1,sinks=0,max_bias=0.0+,.*type_K=f16"
    ended = subprocess.run(
        [engine.bin / "test-backend-ops", "test", "-b", DEVICE, "-o", "FLASH_ATTN_EXT", "-p", case],
        env=os.environ | environment(backend),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert "concurrently: no memory barrier between" in ended.stderr, ended.stderr
