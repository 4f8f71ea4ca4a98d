"""The operators of llama.cpp's graph of a batch, as ggml's scheduler lists them.

Input: a build, a GGUF, token ids for one batch, `RunOptions`. Output: the operators' names, cut to ten letters.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import Ids, RunOptions, run


def operators_of_last_graph(
    engine: Engine, gguf: Path, ids: Ids, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Decode the ids and read the graph of the last batch; KIMI_OPS is that of the environment."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", "2")
    log = run(engine, gguf, [ids], options).log
    graph = log[log.rindex("## SPLIT") :]
    return set(re.findall(r"node #\s*\d+ \(\s*(\w+)\)", graph))
