"""The operators of llama.cpp's graph of a batch, as ggml's scheduler lists them.

Input: a build, a GGUF, token ids for one batch, `RunOptions`; or the log of a run with LISTED in its environment.
Output: the operators' names, cut to ten letters.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_program import OPERATORS

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import Ids, RunOptions, run

LISTED = {"GGML_SCHED_DEBUG": "2"}  # the log has the nodes of each graph


def first_chunked() -> int:
    """The number of tokens of a sequence from which KDA_SCAN computes chunks; fewer are computed in steps."""
    header = (OPERATORS / "kda" / "ggml-kda-scan.h").read_text()
    (number,) = re.findall(r"(?m)^#define GGML_KDA_SCAN_CHUNKED_FROM (\d+)$", header)
    return int(number)


def operators_of_last_graph(
    engine: Engine, gguf: Path, ids: Ids, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Decode the ids and read the graph of the last batch; KIMI_OPS is that of the environment."""
    for name, value in LISTED.items():
        monkeypatch.setenv(name, value)
    return operators_in(run(engine, gguf, [ids], options).log)


def operators_in(log: str) -> set[str]:
    """The operators of the last graph that the log lists."""
    graph = log[log.rindex("## SPLIT") :]
    return set(re.findall(r"node #\s*\d+ \(\s*(\w+)\)", graph))
