"""The table that compares the matmuls with ik_llama.cpp has the medians of its record."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
README = ROOT / "ggml_ops" / "matmul" / "README.md"
RECORD = ROOT / "docs" / "bench-records" / "ik-llama.json"
TESTS = {"pp512": "prefill of 512 tokens", "tg64": "decoding"}


def test_the_table_has_the_medians_of_the_record() -> None:
    runs = json.loads(RECORD.read_text())["runs"]
    text = README.read_text()
    for built in ("AVX2", "this CPU"):
        for test, what in TESTS.items():
            cells = []
            for build, rtr in (("ik_llama.cpp", False), ("ik_llama.cpp", True), ("patched", False)):
                samples = [
                    sample
                    for run in runs
                    if (run["built for"], run["build"], run["test"]) == (built, build, test)
                    and "-Q4_0-" in run["command"]
                    and ("-rtr 1" in run["command"]) == rtr
                    for sample in run["tokens_per_second"]
                ]
                assert len(samples) == 9
                cells.append(f"{median(samples):.1f}")
            assert f"| built for {built}: {what} | {' | '.join(cells)} |\n" in text
