"""0017-server-recurrent-draft: an attention-only target and a hybrid draft model.

Both models are random and have the same vocabulary and embeddings. Their layers change the hidden state little, so that
the embeddings often decide the next token: some drafted tokens are accepted and some are rejected.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from llama_server import Server, serving
from random_checkpoint import Spec
from random_deepseek2 import DeepseekSpec, write_deepseek2
from synthetic_case import make_case

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

COUNT = 64
HIDDEN = 64
PROMPT = "the heat on it"
DIALOGUE = [
    PROMPT,
    PROMPT + " and so on",
    PROMPT + " and so on",
    PROMPT + " in the end",
    PROMPT[:8],
    "in other nd",
]
DRAFT = ["--spec-type", "draft-simple", "--spec-draft-n-max", "3", "-td", "1"]
ROLLBACKS = {"can roll back": [], "cannot roll back": ["-ub", "4"]}  # 3 drafted tokens require ubatches of 5


@dataclass(frozen=True)
class Models:
    target: Path
    draft: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    spec = Spec(layers="KKMK", heads=2, kda_head_dim=32, hidden=HIDDEN, std=0.05, seed=3)
    draft = make_case(folder, spec, scaled={"embed_tokens": 20.0}).gguf
    target = write_deepseek2(folder / "target.gguf", DeepseekSpec(hidden=HIDDEN, scale=0.3), like=draft)
    return Models(target, draft)


def converse(server: Server) -> list[tuple[int, ...]]:
    """Answers to the dialogue, in which each prompt shares its beginning with the one before."""
    return [server.complete(prompt, COUNT, cache_prompt=True).ids for prompt in DIALOGUE]


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, models: Models
) -> Iterator[list[tuple[int, ...]]]:
    """The answers without a draft model and without a prompt cache."""
    with serving(engine, tmp_path_factory.mktemp("plain"), models.target, "-np", "1") as server:
        yield [server.complete(prompt, COUNT).ids for prompt in DIALOGUE]


@pytest.mark.parametrize("options", ROLLBACKS.values(), ids=list(ROLLBACKS))
def test_the_server_writes_the_same(
    tmp_path: Path, engine: Engine, models: Models, expected: list[tuple[int, ...]], options: list[str]
) -> None:
    drafted = ["-np", "1", *DRAFT, "-md", str(models.draft), *options]
    with serving(engine, tmp_path, models.target, *drafted) as server:
        assert converse(server) == expected
        timings = server.complete(PROMPT, COUNT).timings
        assert 0 < timings["draft_n_accepted"] < timings["draft_n"]
        assert (server.account(1 + len(DIALOGUE)).restored > 0) == bool(options)


@pytest.mark.parametrize("options", ROLLBACKS.values(), ids=list(ROLLBACKS))
def test_the_tool_writes_the_same(engine: Engine, models: Models, options: list[str]) -> None:
    """The text is the same as with the target as its own draft model, and no batch fails."""
    command = [engine.bin / "llama-speculative-simple", "-m", models.target, "-p", PROMPT, "-n", str(COUNT)]
    command += ["--temp", "0", "--ignore-eos", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "on", *DRAFT]

    def run(draft: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options, "-md", draft], capture_output=True, check=True, text=True, errors="replace"
        )

    drafted, alone = run(models.draft), run(models.target)
    assert drafted.stdout == alone.stdout
    assert re.search(rf"n_predict = {COUNT}\b", drafted.stdout + drafted.stderr)
    accepted = re.search(r"n_accept +=  *(\d+)", drafted.stdout + drafted.stderr)
    assert accepted is not None and int(accepted[1]) > 0
