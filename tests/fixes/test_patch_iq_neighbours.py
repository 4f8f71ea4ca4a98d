"""Blocks of IQ types are the same as upstream's, and the tables they need are made much faster."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.tensor_types import TENSOR_TYPES

pytestmark = pytest.mark.engine

# Upstream makes the tables of the first four in about 6 seconds, those of the last two in 25.
TYPES = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "IQ2_S", "IQ1_S")
SLOW = ("IQ2_S", "IQ1_S")

# A separate process, because patched and upstream libraries must not meet in one.
PROGRAM = """
import ctypes, glob, hashlib, json, sys, time
import numpy as np
ggml = ctypes.CDLL(glob.glob(sys.argv[1] + "/libggml-base.*")[0])
pointer, number = ctypes.c_void_p, ctypes.c_int64
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
kind, rows, columns = int(sys.argv[2]), 64, 512
began = time.process_time()
ggml.ggml_quantize_init(kind)
seconds = time.process_time() - began
random = np.random.default_rng(7)
values = random.standard_normal((rows, columns), dtype=np.float32)
importances = random.random(columns, dtype=np.float32) + 0.1
blocks = np.zeros(rows * columns * 4, dtype=np.uint8)
size = ggml.ggml_quantize_chunk(
    kind, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, importances.ctypes.data
)
print(json.dumps({"seconds": seconds, "size": size, "blocks": hashlib.sha256(blocks[:size]).hexdigest()}))
"""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full if kind in SLOW else ()) for kind in TYPES]
)
def test_blocks_are_upstreams_and_their_tables_take_a_fraction_of_the_time(
    kind: str, engine: Engine, upstream: Engine
) -> None:
    ours, theirs = (quantized(build, TENSOR_TYPES[kind].number) for build in (engine, upstream))
    assert 0 < ours["size"] == theirs["size"]
    assert ours["blocks"] == theirs["blocks"]
    assert ours["seconds"] < theirs["seconds"] / 4


def quantized(build: Engine, kind: int) -> dict[str, str | float]:
    """Size and hash of quantized random rows, and the processor time that the type's tables took."""
    command = [sys.executable, "-c", PROGRAM, str(build.lib), str(kind)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = json.loads(output)
    assert isinstance(report, dict)
    return report
