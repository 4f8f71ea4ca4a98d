"""The sparse checkpoint has the published checkpoint's size, and the converter can plan it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_gguf.convert.conversion import plan_only
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.output.stream import Pace
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.tools.synthetic_checkpoint import num_bytes, smaller_config, tensors, write_synthetic


def test_it_has_the_published_tensor_count_parameters_and_bytes() -> None:
    every = list(tensors(published_config()))
    assert len({name for name, _, _ in every}) == 20_493
    assert sum(math.prod(shape) for _, _, shape in every) == 49_122_681_728
    assert sum(map(num_bytes, every)) == 98_245_528_576


def test_the_converter_plans_the_full_size_model_in_little_memory(tmp_path: Path) -> None:
    """BF16 has the checkpoint's bytes, slightly more for the small F32 tensors, and the metadata."""
    plan = plan_only(write_synthetic(tmp_path), TYPES["BF16"])
    assert len(plan.tensors) == 610
    assert 98_245_528_576 < plan.nbytes < 1.001 * 98_245_528_576


# Linux's own high-water mark: getrusage of a child starts with the memory of its parent.
MEASURED = """
import re, sys
from pathlib import Path
from kimi_gguf.convert.cli import main
status = main(sys.argv[1:])
print(status, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.mark.engine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("limit", [None, "500M"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, limit: str | None) -> None:
    """Real shapes with two of the 27 layers, 1.6 GB of weights: under 400 MB, of which 100 are numpy and Python.

    The sparse checkpoint of full size, 98 GB to Q4_0, peaked at 163 MB: memory does not depend on the layers.
    """
    source = write_synthetic(tmp_path / "model", smaller_config("KM", 96, 32000))
    arguments = [source, "-o", tmp_path / "x.gguf", "--type", "Q4_0", "--quiet"]
    arguments += ["--max-memory", limit] if limit else []
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, peak = map(int, done.stdout.split())
    assert status == 0 and (tmp_path / "x.gguf").stat().st_size > 400_000_000
    assert peak < 400_000_000


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"--max-memory: expected at least .* MiB, found 300 MiB"):
        Pace.within(300 << 20)
    assert Pace.within(500 << 20, threads=64).memory <= 500 << 20
