"""generation_config.json: recommended sampling and end tokens, as llama.cpp reads them from the file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
from random_checkpoint import NUM_RANKS, Spec, write_checkpoint

from kimi_gguf.convert import cli
from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine

SAMPLING = {"temperature": 0.5, "top_p": 0.75, "top_k": 30, "min_p": 0.125, "repetition_penalty": 1.25}
KEYS = {"temp": 0.5, "top_p": 0.75, "top_k": 30, "min_p": 0.125, "penalty_repeat": 1.25}
END = NUM_RANKS + 2  # the config's end token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), Spec())


def converted(checkpoint: Path, out: Path, generation: object) -> dict[str, Any]:
    """The keys of the file that is made with this generation_config.json."""
    file = checkpoint / "generation_config.json"
    file.write_text(generation if isinstance(generation, str) else json.dumps(generation))
    try:
        convert(checkpoint, out, TYPES["F32"])
    finally:
        file.unlink()
    return {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}


def sampling(keys: dict[str, Any]) -> dict[str, Any]:
    start = "general.sampling."
    return {name.removeprefix(start): value for name, value in keys.items() if name.startswith(start)}


def test_recommended_sampling_is_written(checkpoint: Path, tmp_path: Path) -> None:
    assert sampling(converted(checkpoint, tmp_path / "a.gguf", {**SAMPLING, "do_sample": True})) == KEYS
    assert sampling(converted(checkpoint, tmp_path / "b.gguf", {**SAMPLING, "do_sample": False})) == {}
    (checkpoint / "generation_config.json").write_text(json.dumps(SAMPLING))
    assert cli.main(["verify", str(tmp_path / "a.gguf"), "--checkpoint", str(checkpoint)]) == 0
    (checkpoint / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        ({"temperature": -1}, "temperature is not used: expected 0.0 to 100.0, found -1"),
        ({"top_k": 1.5}, "top_k is not used"),
        ({"top_p": "0.9"}, "top_p is not used"),
        ({"min_p": True}, "min_p is not used"),
        ({"eos_token_id": ["x"]}, "eos_token_id is not used: expected token ids"),
        ("{", "generation_config.json is not used"),
        ("[]", "generation_config.json is not used"),
    ],
)
def test_what_is_invalid_is_left_out_with_a_note(
    checkpoint: Path, tmp_path: Path, wrong: object, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling(converted(checkpoint, tmp_path / "x.gguf", wrong)) == {}
    (checkpoint / "generation_config.json").write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
    assert cli.main([str(checkpoint), "--dry-run"]) == 0
    (checkpoint / "generation_config.json").unlink()
    assert note in capsys.readouterr().out


def test_further_end_tokens_are_named_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """The vocabulary has an eot; a token that llama.cpp knows by its text needs no key."""
    keys = converted(checkpoint, tmp_path / "x.gguf", {"eos_token_id": [END, 5, NUM_RANKS + 1]})
    ids = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")}
    assert ids == {"eos": END, "eot": END, "eom": 5}
    with pytest.raises(ConvertError, match=r"found 5 \('.*'\), 6 .*GGUF names three"):
        converted(checkpoint, tmp_path / "y.gguf", {"eos_token_id": [END, 5, 6]})


@pytest.mark.engine
def test_llama_cpp_uses_them(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    converted(checkpoint, tmp_path / "x.gguf", {**SAMPLING, "eos_token_id": [END, 5]})
    command = [
        engine.bin / "llama-completion",
        "-m",
        tmp_path / "x.gguf",
        "-p",
        "a",
        "-n",
        "1",
        "-no-cnv",
        "-lv",
        "4",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    log = ended.stdout + ended.stderr
    assert "temp = 0.500" in log and "top_p = 0.750" in log and "top_k = 30" in log, log[-3000:]
    assert "EOM token" in log
