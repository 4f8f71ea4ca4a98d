"""GGUF files that earlier versions wrote still run, and have the weights of their checkpoint.

tests/golden/kimi-linear-0.1.0.gguf was written by the converter of version 0.1.0 from the random checkpoint below.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = Spec(layers="KM", hidden=32, kda_head_dim=32, intermediate=32, experts=4, seed=100)


@pytest.mark.engine
@pytest.mark.usefixtures("engine", "upstream")
def test_a_file_of_version_0_1_0_passes_on_both_builds(engine: Engine, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "golden", SPEC)
    words = [str(GOLDEN / "kimi-linear-0.1.0.gguf"), "--checkpoint", str(checkpoint), "--upstream"]
    words += ["--tokens", "40", "--generate", "4", "--threads", "1", "--out", str(tmp_path / "report")]
    assert main(words) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["tensors"]["proved"] and report["rivals"][0]["failed"] == ""
