"""`kimi-llama bench --workers` on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_case import TINY, bench
from rpc_workers import rpc_workers

from kimi_gguf.bench.cells import UBATCH
from kimi_gguf.bench.families import TINY as SHAPES
from kimi_gguf.engine.builds import Engine

MODEL = TINY[: TINY.index("--seconds")]


@pytest.mark.engine
def test_traffic_of_two_workers(tmp_path: Path, engine: Engine) -> None:
    with rpc_workers(engine, tmp_path, 2) as workers:
        listed = ",".join(worker.endpoint for worker in workers)
        ended = bench(*MODEL, "--workers", listed, "--batch", f"1,{UBATCH}", "--depth", "0")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines()]
    got = {
        (row[0], row[2]): [int(cell.replace(",", "")) for cell in row[4:]]
        for row in rows
        if row[1:2] == ["0"]
    }
    hidden, logits = 4 * SHAPES["hidden_size"], 4 * SHAPES["vocab_size"]
    for batch in ("1", str(UBATCH)):
        assert got[batch, "here"] == [0, 0]
        _, received = got[batch, "2 workers"]
        # the hidden state between the workers, and the logits of the last token
        assert received == pytest.approx(hidden + logits / int(batch), abs=64)
