"""0074-server-unknown-ids: slots, adapters and samplers that do not exist are errors that name them."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_server import Server, serving

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(
    engine: Engine, demo_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(
        engine, folder, demo_gguf("F32"), "-np", "2", "-c", "256", "--slot-save-path", str(folder)
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "content", "status", "said"),
    [
        *(
            (f"/slots/{slot}?action={action}", {"filename": "x.bin"}, 404, f"slot {slot} does not exist")
            for slot, action in ((99, "save"), (2, "restore"), (-1, "erase"))
        ),
        ("/slots/1?action=erase", {}, 200, '"id_slot":1'),
        ("/completion", {"id_slot": 5}, 404, "slot 5 does not exist"),
        ("/completion", {"id_slot": -2}, 404, "slot -2 does not exist"),
        ("/completion", {"id_slot": 1}, 200, '"id_slot":1'),
        ("/completion", {"lora": [{"id": 3, "scale": 1.0}]}, 400, "no adapter 3, the server has 0"),
        ("/lora-adapters", [{"id": 0, "scale": 1.0}], 400, "no adapter 0, the server has 0"),
        ("/completion", {"samplers": ["top_k", "nope"]}, 400, "unknown sampler 'nope'"),
        ("/completion", {"samplers": ["top-k", "temperature"]}, 200, '"samplers":["top_k","temperature"]'),
    ],
)
def test_what_does_not_exist_is_named(
    server: Server, path: str, content: Any, status: int, said: str
) -> None:
    if path == "/completion":
        content = {"prompt": "The sea", "n_predict": 1, **content}
    try:
        found, text = 200, json.dumps(server.post(path, content), separators=(",", ":"))
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read().decode()
    assert found == status and said in text, text
