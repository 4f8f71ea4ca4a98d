"""Load: every answer is the one that is given alone, and the server's memory stays constant.

`KIMI_LOAD=1800` runs the mixed load for that many seconds.
"""

from __future__ import annotations

import os
import random
import re
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llama_server import EXACT
from selection import some_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.equal_requests import SYSTEM, ask_together
from kimi_gguf.tools.server import RunningServer, running

pytestmark = pytest.mark.engine

SECONDS = float(os.environ.get("KIMI_LOAD", "20"))
CLIENTS = 12
COUNT = 12
QUESTIONS = [
    f"define: {word}" for word in ("elephant", "river", "ivory", "to walk", "stone", "a large tree", "salt")
]
GROWTH = 1.10  # limit for the memory at the end, relative to the largest in the first 30 % of the time


def chat(server: RunningServer, question: str, **more: object) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    request = {"messages": messages, "max_tokens": COUNT, "temperature": 0} | more
    return str(server.post("/v1/chat/completions", request)["choices"][0]["message"]["content"])


def raw(server: RunningServer, question: str) -> str:
    request = {"prompt": f"{SYSTEM}{question}\n", "n_predict": COUNT, "temperature": 0, "cache_prompt": True}
    return str(server.post("/completion", request)["content"])


def resident(server: RunningServer) -> int:
    """Resident memory in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def refused(server: RunningServer, chance: random.Random) -> None:
    """Send a request that cannot be answered; the status must be 4xx."""
    wrong = chance.choice(
        [{"messages": []}, {"messages": "x"}, {"prompt": "word " * 9000}, {"prompt": 1.5}, {"prompt": []}]
    )
    path = "/completion" if "prompt" in wrong else "/v1/chat/completions"
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, wrong)
    assert 400 <= caught.value.code < 500


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_mixed_load(tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]) -> None:
    options = ("--slot-save-path", f"{tmp_path}/", "--cache-ram", "32", "--ctx-checkpoints-ram", "8")
    command = (engine.bin / "llama-server", "--model", demo_gguf("F32"), *EXACT, *options, "--verbosity", "2")
    with running(tmp_path / "server.log", *command) as server:
        alone = {(ask, question): ask(server, question) for ask in (chat, raw) for question in QUESTIONS}
        assert len(set(alone.values())) >= len(QUESTIONS)
        end, sizes = time.monotonic() + SECONDS, []

        def client(seed: int) -> int:
            chance, done = random.Random(seed), 0
            while time.monotonic() < end:
                kind = chance.random()
                if kind < 0.05:
                    refused(server, chance)
                elif kind < 0.15:  # long, and not greedy
                    chat(
                        server, "tell me about " + "stones " * chance.randrange(400), temperature=1, seed=seed
                    )
                else:
                    ask, question = chance.choice(list(alone))
                    assert ask(server, question) == alone[ask, question]
                done += 1
                if seed == 0:
                    sizes.append((time.monotonic(), resident(server)))
            return done

        with ThreadPoolExecutor(CLIENTS) as pool:
            done = list(pool.map(client, range(CLIENTS)))
        assert min(done) > 0
        assert server.process.poll() is None
        early = max(size for when, size in sizes if when < end - 0.7 * SECONDS)
        assert sizes[-1][1] <= GROWTH * early, f"{early} bytes grew to {sizes[-1][1]}"


@pytest.mark.parametrize("kind", some_of(("F32", "Q4_0", "Q4_K_M", "Q8_0", "BF16"), "Q4_K_M", "BF16"))
def test_equal_requests_among_others_have_one_answer(
    kind: str, tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    """Twelve equal greedy requests among twelve others, with the default slots, caches and threads."""
    with running(tmp_path / "server.log", engine.bin / "llama-server", "--model", demo_gguf(kind)) as server:
        answers = ask_together(server)
    assert len(set(answers.others)) > 1
    assert answers.as_alone == len(answers.equal) == 12
