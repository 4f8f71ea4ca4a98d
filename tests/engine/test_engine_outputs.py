"""`kimi-llama imatrix|perplexity|tokenize|split`: what they write is complete under its name, or it is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from gguf import GGUFReader
from shell_program import write_program
from tiny_llama import call

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf_split import DELETE, DRY_RUN, MERGE, OPTIONS, check_arguments
from kimi_gguf.scripts import kimi_llama

# In place of the programs: `last` is the last word, for all of them the output.
PROGRAM = """\
for last; do :; done
echo "$@"
"""
WRITES = 'printf copy > "$last.at_5"; printf whole > "$last"\n'
FAILS = 'printf copy > "$last.at_5"; printf half > "$last"; exit 3\n'


@pytest.fixture
def with_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    tiny = tiny_llama.make(tmp_path)
    tiny.build()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(tiny_llama.NO_TENSORS)

    def write(name: str, does: str) -> Path:
        write_program(Path(call(tmp_path, "path").stdout.rstrip("\n"), "bin", name), PROGRAM + does)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("imatrix", ["-f", "text.txt"]),
        ("imatrix", ["-o", "other.gguf", "-f", "text.txt", "--output", "imatrix.gguf"]),
        ("perplexity", ["-f", "text.txt", "--save-all-logits", "imatrix.gguf"]),
    ],
)
def test_the_output_of_an_option_is_complete_or_as_before(
    with_program: Callable[[str, str], Path], command: str, words: list[str]
) -> None:
    """Copies that llama-imatrix saves on request stay: they are the work of hours."""
    folder = with_program(f"llama-{command}", FAILS)
    (folder / "imatrix.gguf").write_text("earlier")
    before = {path.name for path in folder.iterdir()}
    assert call(folder, command, "model.gguf", *words).returncode == 3
    assert {path.name for path in folder.iterdir()} - before == {"imatrix.gguf.at_5"}
    assert (folder / "imatrix.gguf").read_text() == "earlier"

    with_program(f"llama-{command}", WRITES)
    ended = call(folder, command, "model.gguf", *words)
    assert ended.returncode == 0 and (folder / "imatrix.gguf").read_text() == "whole"
    assert "-f text.txt" in ended.stdout and "other.gguf" not in ended.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("imatrix", ["--in-file", "imatrix.gguf", "--show-statistics"]),
        ("perplexity", ["-f", "text.txt"]),
        ("perplexity", ["--kl-divergence", "--kl-divergence-base", "logits"]),
        ("tokenize", ["-p", "text", "--ids"]),
    ],
)
def test_a_command_without_an_output_gets_its_words_as_they_are(
    with_program: Callable[[str, str], Path], command: str, words: list[str]
) -> None:
    folder = with_program(f"llama-{command}", "exit 7\n")
    ended = call(folder, command, "model.gguf", *words)
    assert ended.returncode == 7 and ended.stdout.endswith(" ".join(words) + "\n")


@pytest.mark.parametrize("words", [["-o"], ["-o", "no/folder/i.gguf"], ["-o", "."]])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    with_program: Callable[[str, str], Path], words: list[str]
) -> None:
    folder = with_program("llama-imatrix", "exit 7\n")
    ended = call(folder, "imatrix", "model.gguf", *words)
    assert ended.returncode in (1, 2) and words[-1].split("/")[0] in ended.stderr


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("m.gguf", [], "split: the output: expected one name that ends in .gguf, found nothing"),
        ("m.gguf", ["out"], "expected one name that ends in .gguf, found out"),
        ("m.gguf", ["--split", "out.gguf"], "split: wrong order: expected the output before options"),
        ("m.gguf", ["out.gguf", "--split-max-size"], "split: --split-max-size: expected a value"),
        ("m.gguf", ["out.gguf", DELETE], "expected splits that stay until the merged file is complete"),
        ("m.gguf", ["out.gguf", MERGE], "cannot be merged: expected the first split"),
        ("m-00002-of-00003.gguf", ["out.gguf", MERGE], "found split 2 of 3"),
        ("m-00001-of-00003.gguf", ["out.gguf"], "is one split of 3: expected a model in one file"),
    ],
)
def test_what_cannot_be_split_or_merged_is_refused(model: str, words: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=re.escape(message)):
        check_arguments(Path(model), words)


@pytest.mark.engine
def test_the_options_of_split_are_those_of_the_real_program(engine: Engine) -> None:
    command = [engine.bin / "llama-gguf-split", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    listed = re.findall(r"^  (--[a-z-]+)( N\S*)?", text, re.MULTILINE)
    assert {name for name, _ in listed} - {"--version"} == set(OPTIONS)
    assert all(OPTIONS[name] for name, value in listed if value)


@pytest.mark.engine
@pytest.mark.usefixtures("one_core")
def test_importances_and_splits_of_the_demo(
    engine: Engine,
    tmp_path: Path,
    demo_gguf: Callable[[str], Path],
    demo_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With the real programs: importances that quantize a model, and splits that merge to the same tensors."""
    monkeypatch.chdir(tmp_path)
    model, text = str(demo_gguf("BF16")), str(demo_dir / "heldout.txt")

    def run(*words: str) -> None:
        assert kimi_llama.main(words) == 0, capfd.readouterr().err

    run("imatrix", model, "-f", text, "--chunks", "1", "-c", "128", "--no-ppl")
    names = {tensor.name for tensor in GGUFReader("imatrix.gguf").tensors}
    assert "blk.0.attn_q.weight.in_sum2" in names
    run("quantize", model, "q.gguf", "IQ4_NL", "--imatrix", "imatrix.gguf")
    run("split", model, "s.gguf", "--split-max-size", "3M")
    splits = sorted(tmp_path.glob("s-*.gguf"))
    assert len(splits) > 2
    run("split", model, "dry.gguf", DRY_RUN)
    capfd.readouterr()
    run("split", splits[0].name, "whole.gguf", MERGE)
    assert "unfinished" not in "".join(capfd.readouterr())
    whole, before = (
        {tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in ("whole.gguf", model)
    )
    assert whole.keys() == before.keys()
    assert all(
        np.array_equal(tensor.data.ravel(), before[name].data.ravel()) for name, tensor in whole.items()
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "imatrix.gguf", "q.gguf", "whole.gguf", *(path.name for path in splits),
    }  # fmt: skip
