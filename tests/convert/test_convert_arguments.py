"""Mistakes in arguments are answered with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert_tools import convert
from random_checkpoint import Spec

from kimi_gguf.convert.source.origin import CARD

SPEC = Spec(layers="KM", seed=80)


@pytest.mark.parametrize(
    "option, wrong, meant", [("--type", "q4_KM", "Q4_K_M"), ("--output-tensor-type", "Q6K", "Q6_K")]
)
def test_a_misspelt_type_is_answered_with_the_nearest(
    source: Path, option: str, wrong: str, meant: str
) -> None:
    run = convert(source, "--dry-run", option, wrong)
    assert run.status == 2 and run.err.endswith(f"found '{wrong}'; did you mean {meant}?\n")


def test_a_limit_of_memory_without_a_unit_is_refused(source: Path) -> None:
    run = convert(source, "--dry-run", "--max-memory", "700")
    assert run.status == 2 and run.err.endswith("expected at least 1M, such as 700M or 1.5G, found '700'\n")


@pytest.mark.parametrize("name", ["kimi-q4", "KIMI-Q3", "mxfp4"])
def test_a_recipe_given_as_a_type_is_answered_with_its_option(source: Path, name: str) -> None:
    run = convert(source, "--dry-run", "--type", name)
    assert run.status == 2 and run.err.endswith(
        f": {name!r} is a mix of several types: --recipe {name.lower()}\n"
    )


def test_a_type_like_no_other_has_no_nearest(source: Path) -> None:
    run = convert(source, "--dry-run", "--type", "small")
    assert run.status == 2 and run.err.endswith("found 'small'\n")


@pytest.mark.parametrize(
    "words, hint",
    [
        (["inspekt", "x.gguf"], "; did you mean inspect?"),
        (["Verify"], "; did you mean verify?"),
        (["transform", "model"], ""),
    ],
)
def test_an_unknown_command_is_named(words: list[str], hint: str) -> None:
    run = convert(*words)
    assert run.status == 2
    assert run.err.endswith(f"error: '{words[0]}': expected a checkpoint, verify or inspect{hint}\n")


def test_a_checkpoint_may_be_called_like_a_misspelt_command(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.rename(source.with_name("inspec"))
    monkeypatch.chdir(source.parent)
    assert convert("inspec", "--dry-run").status == 0
    assert convert("inspec", "x.gguf").err.endswith("unrecognized arguments: x.gguf\n")


def test_a_checkpoint_of_the_hub_is_not_a_command() -> None:
    assert convert("owner/name", "x.gguf").err.endswith("unrecognized arguments: x.gguf\n")


@pytest.mark.parametrize(
    "given", [["--type", "Q4_0"], ["--pure"], ["--type", "Q4_0", "--pure"]], ids=" ".join
)
def test_a_recipe_names_the_options_that_it_excludes(source: Path, given: list[str]) -> None:
    run = convert(source, "--dry-run", "--recipe", "kimi-q4", *given)
    excluded = " and ".join(word for word in given if word.startswith("--"))
    assert run.status == 2 and run.err.endswith(f"; remove {excluded}\n")


def test_the_help_says_when_llama_cpp_must_be_built() -> None:
    words = " ".join(convert("--help").out.split())
    assert "use llama.cpp: the wheel contains it, elsewhere run `kimi-llama build`" in words


def test_a_card_in_the_way_cannot_get_another_name(source: Path, out: Path) -> None:
    (out / CARD).write_text("precious")
    run = convert(source, "-o", out / "x.gguf", "--model-card")
    assert run.status == 1 and f"{out / CARD}: already exists; --force replaces it" in run.err
    assert "omit --model-card" in run.err and "another name" not in run.err
    assert (out / CARD).read_text() == "precious"
    (out / CARD).unlink()
    (out / CARD).mkdir()
    run = convert(source, "-o", out / "x.gguf", "--model-card")
    assert run.status == 1 and "found a folder; remove it, or omit --model-card" in run.err
    (source / CARD).write_text("of the checkpoint")
    run = convert(source, "-o", source / "x.gguf", "--model-card", "--force")
    assert run.status == 1 and "write to another folder, or omit --model-card" in run.err
    assert (source / CARD).read_text() == "of the checkpoint"


def test_inspect_of_a_folder_of_gguf_files_names_one(source: Path, out: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (out / name).write_bytes(b"GGUF")
    run = convert("inspect", out)
    assert run.status == 1 and run.err.endswith(f"name one of them, for example {out / 'a.gguf'}\n")
    (source / "a.gguf").write_bytes(b"GGUF")
    assert convert("inspect", source).status == 0


@pytest.mark.parametrize(
    ("ending", "said"), [("", "not found; expected a checkpoint folder"), (".gguf", "expected a path")]
)
def test_inspect_of_a_name_that_is_too_long(ending: str, said: str) -> None:
    run = convert("inspect", "x" * 5000 + ending)
    shown = f"{'x' * 40}...{'x' * (37 - len(ending))}{ending}"
    assert run.status == 1 and run.err.startswith(f"convert-kimi: error: {shown}: {said}")
