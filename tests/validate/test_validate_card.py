"""`validate-kimi card`: a folder of GGUF files becomes a page for a hub, whose figures are those of the reports."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from gguf import GGUFWriter
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from random_checkpoint import Spec, write_checkpoint
from test_validate_stored import GOLDEN

from kimi_gguf.convert.card.folder import earlier_card, figures_of, made_of
from kimi_gguf.convert.card.text import Basis, Listed, Made, made_in
from kimi_gguf.convert.card.text import card_text as convert_card_text
from kimi_gguf.convert.cli import main as convert_kimi
from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import RECIPES
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.version import VERSION
from kimi_gguf.validate import card_files
from kimi_gguf.validate.card import CardFile, card_text, draw_plots, recommended
from kimi_gguf.validate.cli import main
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.provenance import gguf_facts
from kimi_gguf.validate.stored import read_report

SHORT = ["--tokens", "256", "--threads", "1", "--quiet"]
SHA256, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
KEYS: Mapping[str, object] = {"general.architecture": "kimi-linear", "general.name": "Some Model"}


def rows(card: str) -> dict[str, list[str]]:
    """The rows of the table of files, by file."""
    section = card.partition("\n## Files\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(.+\.gguf)` \| (.*) \|$", section, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}


@pytest.fixture(scope="module")
def demo_hub(
    tmp_path_factory: pytest.TempPathFactory, demo_dir: Path, demo_gguf: Callable[[str], Path], engine: Engine
) -> Path:
    """The demo in two types, with the card."""
    folder = tmp_path_factory.mktemp("hub")
    for kind in ("Q8_0", "BF16"):
        shutil.copy(demo_gguf(kind), folder)
    words = ["card", str(folder), "--checkpoint", str(demo_dir), "--text", str(demo_dir / "heldout.txt")]
    assert main([*words, *SHORT]) == 0
    return folder


@pytest.mark.engine
def test_the_table_has_the_figures_of_the_reports(demo_hub: Path) -> None:
    card = (demo_hub / "README.md").read_text()
    table = rows(card)
    assert list(table) == ["demo-Q8_0.gguf", "demo-BF16.gguf"]  # by size
    for name, cells in table.items():
        report = json.loads(
            (demo_hub / "validation" / name.removesuffix(".gguf") / "report.json").read_text()
        )
        assert float(cells[2]) == pytest.approx(report["runs"][0]["all"]["kld_mean"], rel=0.06)
        assert report["ids"] | {"count": 256, "generated": 0} == report["ids"]
        assert cells[-1] == "yes"  # the smaller file has the larger KLD
        assert (demo_hub / re.findall(r"\]\(<(.*)>\)", cells[7])[0]).is_file()
    assert "kimi-llama chat demo-Q8_0.gguf" in card and "llama-cli -m demo-Q8_0.gguf" in card


@pytest.mark.engine
def test_every_picture_of_the_card_exists(demo_hub: Path) -> None:
    pictures = re.findall(r"!\[.+\]\((.+)\)", (demo_hub / "README.md").read_text())
    assert len(pictures) == 5
    for picture in pictures:
        assert (demo_hub / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(demo_hub.rglob(".*"))


def rendered(card: str) -> str:
    """The HTML of a card without its front matter, with the tables of GitHub's Markdown, which hubs show."""
    return MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])


def links(html: str) -> list[str]:
    """Paths that the page refers to in its own folder."""
    return [unquote(link) for link in re.findall(r'(?:href|src)="([^":]*)"', html)]


@pytest.mark.engine
def test_the_rendered_card_refers_to_files_next_to_it(demo_hub: Path) -> None:
    html = rendered((demo_hub / "README.md").read_text())
    assert [html.count(f"<{tag}") for tag in ("table>", "img ", "a ")] == [3, 5, 2]
    assert not re.search(r"^(<p>)?\|", html, re.MULTILINE)  # no row outside of a table
    assert len(links(html)) == 7
    assert all((demo_hub / link).is_file() for link in links(html))


@pytest.mark.parametrize(
    "name", ["a b (1).gguf", "a|b.gguf", "größe_x_y.gguf", "a<b>[c](d).gguf", "50%25.gguf"]
)
def test_the_link_of_a_strange_name_leads_to_its_report(name: str) -> None:
    html = rendered(card_text([card_file(name)], ["kld"], []))
    assert f"validation/{name.removesuffix('.gguf')}/report.html" in links(html)
    assert html.count("<tr>") == html.count("</tr>")
    (row,) = re.findall(r"<tr>\n<td><code>.*?</tr>", html[html.index("Files") :], re.DOTALL)
    assert row.count("<td") == 10


@pytest.mark.engine
def test_a_new_file_is_validated_and_the_others_are_not(
    demo_hub: Path, demo_dir: Path, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(demo_hub, folder)
    shutil.copy(demo_gguf("Q4_0"), folder)
    (folder / "demo-BF16.gguf").write_bytes(
        (folder / "demo-Q8_0.gguf").read_bytes()
    )  # its report is of another file
    before = {path: path.read_bytes() for path in folder.rglob("report.json")}
    words = ["card", str(folder), "--checkpoint", str(demo_dir), "--text", str(demo_dir / "heldout.txt")]
    assert main([*words, *SHORT]) == 2  # README.md exists
    assert main([*words, *SHORT, "--force"]) == 0
    changed = {path.parent.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"demo-BF16"}
    assert set(rows((folder / "README.md").read_text())) == {
        f"demo-{kind}.gguf" for kind in ("Q4_0", "Q8_0", "BF16")
    }


@pytest.mark.engine
def test_a_kept_report_without_upstream_is_not_one_with_upstream(
    demo_hub: Path,
    demo_dir: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def validate(*_: object) -> None:
        raise ValidateError("measured again")

    words = ["card", str(demo_hub), "--checkpoint", str(demo_dir), "--text", str(demo_dir / "heldout.txt")]
    monkeypatch.setattr(card_files, "validate", validate)
    for upstream, status in ((None, 0), (engine, 2)):
        monkeypatch.setattr("kimi_gguf.validate.cli._engines", lambda _, found=upstream: (engine, found))
        assert main([*words, *SHORT, "--force"]) == status
        assert ("measured again" in capsys.readouterr().err) == (status == 2)


@pytest.mark.engine
@pytest.mark.usefixtures("engine")
def test_what_the_converter_wrote_is_kept(tmp_path: Path) -> None:
    """convert-kimi --model-card, then the card with figures, and again with another file."""
    checkpoint = write_checkpoint(tmp_path / "Some-Model-48B-A3B-Instruct", Spec(layers="KM", seed=33))
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    hub = tmp_path / "hub"
    hub.mkdir()
    words = [str(checkpoint), "-o", str(hub / "a b.gguf"), "--type", "F32", "--split-max-size", "300K"]
    assert convert_kimi([*words, "--quantized-by", "me", "--model-card", "--quiet"]) == 0
    first = (hub / "README.md").read_text()
    validate = ["card", str(hub), "--checkpoint", str(checkpoint), *SHORT, "--tokens", "16"]
    assert main(validate) == 2  # only with --force
    main([*validate, "--force"])
    second = (hub / "README.md").read_text()
    rewritten = {  # what the other card says in other words
        "# Some-Model-48B-A3B-Instruct, F32 for llama.cpp", "| type | F32 |", "## How to check it",
        "This command converts the checkpoint again and compares all bytes:",
        *re.findall(r"^\| SHA-256 .*? \|", first, re.MULTILINE),
    }  # fmt: skip
    assert len(rewritten) == 6
    lines = first.splitlines()
    assert len([line for line in lines if "-of-0000" in line]) > 4
    kept = [line for line in lines if not any(line.startswith(text) for text in rewritten)]
    assert [line for line in kept if line not in second.splitlines()] == []
    for sha256 in re.findall(r"`([0-9a-f]{64})`", first):
        assert sha256 in second
    assert list(rows(second)) == ["a b-00001-of-00003.gguf"] and second.count("![") == 4

    assert convert_kimi([str(checkpoint), "-o", str(hub / "c.gguf"), "--type", "BF16", "--quiet"]) == 0
    main([*validate, "--force"])
    third = (hub / "README.md").read_text()
    assert len(rows(third)) == 2
    assert third.count("Made by kimi-gguf") == 1
    assert "convert-kimi Some-Model-48B-A3B-Instruct -o 'a b.gguf'" in third


@pytest.mark.parametrize(
    ("name", "sha256", "known"),
    [("a|b", SHA256, True), ("a", SHA256, True), ("a|b", OTHER, False), ("a|b", SHA256[:-1], False)],
)
def test_a_command_is_kept_while_the_content_is_the_same(name: str, sha256: str, known: bool) -> None:
    """Also under another name, which is then the one that the command writes."""
    made = Made("1.0", ("convert-kimi", "a", "-o", "a|b.gguf"), (SHA256,))
    earlier = list(made_in(card_text([replace(card_file(), made=made)], ["kld"], [])))
    expected = made.named(f"{name}.gguf")
    assert made_of(earlier, Path(f"{name}.gguf"), [sha256]) == (expected if known else None)
    assert made_of(earlier, Path("x-00001-of-00002.gguf"), [sha256, OTHER]) is None


@pytest.mark.parametrize("name", ["x", "x  y", "x`y", "x\ny", "x-00001-of-00001"])
def test_each_command_stays_with_its_files(name: str) -> None:
    """Also if a single file and splits have the same stem, and whatever their name is."""
    single = Made("1.0", ("convert-kimi", "a", "-o", f"{name}.gguf"), (SHA256,))
    splits = Made("1.0", ("convert-kimi", "b", "-o", f"{name}.gguf"), (SHA256, OTHER))
    for order in ([single, splits], [splits, single]):
        earlier = list(made_in(card_text([replace(card_file(), made=made) for made in order], ["kld"], [])))
        assert made_of(earlier, Path(f"{name}.gguf"), [SHA256]) == single
        assert made_of(earlier, Path(f"{name}-00001-of-00002.gguf"), [SHA256, OTHER]) == splits
        assert made_of(earlier, Path(f"{name}-00001-of-00002.gguf"), [OTHER, SHA256]) is None


def test_commands_are_kept_in_a_card_with_the_line_ends_of_windows(tmp_path: Path) -> None:
    made = Made("1.0", ("convert-kimi", "a", "-o", "b.gguf"), (SHA256,), ("a note",))
    card = card_text([replace(card_file(), made=made)], ["kld"], [])
    (tmp_path / "README.md").write_bytes(card.replace("\n", "\r\n").encode())
    assert list(made_in(earlier_card(tmp_path))) == [made]
    made = replace(made, command=(*made.command, "--name", "x\r\ny"))
    (tmp_path / "README.md").write_bytes(f"{made.text()}\n".encode())
    assert list(made_in(earlier_card(tmp_path))) == [made]


@pytest.mark.parametrize(
    "line", ["```sh", "Made by kimi-gguf 1:\n\n```sh", "````sh\n```sh", "```sh\n'a\n```", "- a"]
)
def test_a_hostile_card_is_read_in_linear_time(line: str) -> None:
    head = f"<!-- SHA-256: {SHA256} -->\nMade by kimi-gguf 1:\n\n```sh\nconvert-kimi a -o b\n"
    for text in (f"{line}\n" * 30_000, head + "a" * 1_000_000 + "\n```\n", f"{head}{line}\n" * 4000):
        began = time.process_time()
        list(made_in(text))
        assert (
            time.process_time() - began < 5
        )  # a second even on a slow machine; quadratic time takes minutes


def test_a_command_inside_of_another_block_is_no_command() -> None:
    made = Made("1.0", ("convert-kimi", "a", "-o", "b.gguf"), (SHA256,))
    assert list(made_in(f"````sh\nkimi-llama chat '\n{made.text()}\n'\n````\n")) == []


def test_notes_of_a_file_stay_with_its_command() -> None:
    made = Made("1.0", ("convert-kimi", "a", "-o", "b.gguf"), (SHA256,), ("one note", "another"))
    other = Made("1.0", ("convert-kimi", "a", "-o", "c.gguf"), (SHA256, OTHER))
    for order in ([made, other], [other, made]):
        assert list(made_in("\n\n".join(each.text() for each in order))) == order
    card = card_text([replace(card_file(), made=made), replace(card_file(), made=other)], ["kld"], ["a note"])
    assert list(made_in(card)) == [made, other]


def test_the_card_names_the_builds_of_the_reports() -> None:
    """Not the build that writes the card."""
    old = card_file("old.gguf")
    new = replace(old, path=Path("new.gguf"), report=replace(old.report, engine="kimi-gguf 9.9, llama.cpp x"))
    engine = "kimi-gguf 1.2.3, llama.cpp c0ffee (patched, source tree 343434343434)"
    assert f"| validated with | {engine} |" in card_text([old], ["kld"], [])
    assert "| validated with | kimi-gguf 9.9, llama.cpp x |" in card_text([new, new], ["kld"], [])
    both = card_text([new, old], ["kld"], [])
    assert f"| validated with | `new.gguf`: kimi-gguf 9.9, llama.cpp x; `old.gguf`: {engine} |" in both
    assert VERSION not in both


@pytest.mark.engine
def test_the_commands_of_the_card_give_its_figures(
    demo_hub: Path, demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader runs them: in the folder of the files, with the checkpoint and the text."""
    (line,) = re.findall(
        r"^validate-kimi demo-Q8_0.gguf .*$", (demo_hub / "README.md").read_text(), re.MULTILINE
    )
    hub = tmp_path / "hub"
    shutil.copytree(demo_hub, hub)
    shutil.copy(demo_dir / "heldout.txt", hub)
    monkeypatch.chdir(hub)
    assert main(shlex.split(line.replace("CHECKPOINT", shlex.quote(str(demo_dir))))[1:]) == 0
    again, before = (
        read_report(hub / each / "report.json") for each in ("report-demo-Q8_0", "validation/demo-Q8_0")
    )
    assert again.basis == before.basis and again.gates == before.gates
    assert again.headline.all == before.headline.all


@pytest.mark.parametrize(
    ("changed", "source", "words"),
    [
        ({}, (), "--tokens 64 --generate 0"),
        ({"generated": 2}, (), "--tokens 62 --generate 2"),
        ({}, ("--ids", "a b"), "--ids 'a b' --generate 0"),
        (
            {"options": RunOptions(n_batch=7, n_ubatch=5, cache_type="Q8_0"), "upstream": True},
            ("--text", "x.txt"),
            "--text x.txt --tokens 64 --generate 0 --batch 7 --ubatch 5 --cache-type Q8_0 --upstream",
        ),
        (
            {"backend": "cuda", "options": RunOptions(n_gpu_layers=999)},
            (),
            "--tokens 64 --generate 0 --build cuda --gpu-layers 999",
        ),
    ],
)
def test_the_commands_of_the_card_have_the_options_of_the_reports(
    changed: dict[str, Any], source: tuple[str, ...], words: str
) -> None:
    file = card_file()
    report = replace(file.report, **{"generated": 0, "upstream": False, **changed})
    card = card_text([replace(file, report=report, source=source)], ["kld"], [])
    assert f"\nvalidate-kimi x.gguf --checkpoint CHECKPOINT {words} --out report-x\n" in card
    assert not source or f"`{source[1]}`" in card


def test_the_importance_matrix_is_named() -> None:
    keys = {"quantize.imatrix.file": "/home/me/im`a|.gguf", "quantize.imatrix.dataset": "data/cal<b>.txt"}
    part = ("`x.gguf`", "10", "3", "3 F32", f"`{SHA256}`")
    card = card_text([replace(card_file(), keys={**KEYS, **keys}, parts=[part])], ["kld"], [])
    assert f"| `x.gguf` | 10 | 3 | 3 F32 | `{SHA256}` | `im a\\|.gguf`, made with cal\\<b\\>.txt |" in card
    assert "importance" not in card_text([replace(card_file(), parts=[part])], ["kld"], [])


@pytest.mark.parametrize(
    "text", ["'", "convert-kimi", "rm -r x", "convert-kimi a --type b", "convert-kimi a -o b.gguf --imatrix"]
)
def test_other_texts_in_a_card_are_not_commands(text: str) -> None:
    made = Made("1.0", ("convert-kimi", "a", "-o", "b\n```.gguf"), (SHA256,))
    wrong = f"<!-- SHA-256: {SHA256} -->\nMade by kimi-gguf 1.0:\n\n```sh\n{text}\n```"
    card = f"{wrong}\n\n{made.text()}\n"
    assert list(made_in(card)) == [made]


@pytest.mark.engine
def test_a_wrong_file_is_marked_and_not_recommended(engine: Engine, tmp_path: Path) -> None:
    spec = Spec(layers="KM", seed=31)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", spec)
    other = write_checkpoint(tmp_path / "other", replace(spec, seed=32))
    (tmp_path / "hub").mkdir()
    convert(checkpoint, tmp_path / "hub" / "right.gguf", TYPES["F32"], Options(name="right"))
    convert(other, tmp_path / "hub" / "wrong.gguf", TYPES["F32"], Options(split_max_size=300_000))
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")  # the files do not name it
    assert main(["card", str(tmp_path / "hub"), "--checkpoint", str(checkpoint), *SHORT]) == 1
    card = (tmp_path / "hub" / "README.md").read_text()
    table = rows(card)
    assert '\nlicense: "mit"\n' in card.split("\n---\n")[0] and "| licence | mit |" in card
    wrong = next(name for name in table if name.startswith("wrong-00001-of-"))
    assert "**FAIL**" in table[wrong][7] and "validation/wrong/report.html" in table[wrong][7]
    assert (table[wrong][-1].strip(), table["right.gguf"][-1]) == ("", "yes")


@pytest.mark.engine
def test_limits_of_a_mix_are_those_of_its_lowest_type(engine: Engine, demo_dir: Path, tmp_path: Path) -> None:
    """In the demo most elements of this mix are Q8_0; the limits of Q8_0 would fail it."""
    convert(demo_dir, tmp_path / "q4.gguf", RECIPES["kimi-q4"])
    facts = gguf_facts(tmp_path / "q4.gguf", lambda done, total: None)
    assert (facts["type"], facts["lowest_type"]) == ("Q8_0", "Q4_K")
    words = [
        str(tmp_path / "q4.gguf"),
        "--checkpoint",
        str(demo_dir),
        "--text",
        str(demo_dir / "heldout.txt"),
    ]
    assert main([*words, "--out", str(tmp_path / "report"), "--generate", "0", *SHORT]) == 0


def card_file(
    name: str = "x.gguf", size: int = 10, kld: float = 0.1, passed: bool = True, **keys: Any
) -> CardFile:
    report = read_report(GOLDEN / "report.json")
    run = replace(report.headline, all=replace(report.headline.all, kld_mean=kld))
    report = replace(report, name=name, bytes=size, passed=passed, runs=[run])
    return CardFile(Path(name), KEYS | keys, elements={"Q8_0": 90, "F32": 10}, report=report)


def test_gguf_files_that_are_no_models_are_left_out(tmp_path: Path) -> None:
    """Importances, adapters and vision parts may be published in the same folder."""
    for kind in ("imatrix", "adapter", "mmproj", "model", None):
        writer = GGUFWriter(tmp_path / f"{kind}.gguf", "kimi-linear")
        if kind is not None:
            writer.add_type(kind)
        writer.add_tensor("x", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    assert [path.name for path in card_files.models_of(tmp_path)] == [
        "None.gguf",
        "damaged.gguf",
        "model.gguf",
    ]
    kinds = {path.name: kind for path, kind in card_files.other_kinds(tmp_path).items()}
    assert kinds == {f"{kind}.gguf": kind for kind in ("adapter", "imatrix", "mmproj")}


def test_a_file_is_recommended_if_no_smaller_one_is_as_good() -> None:
    small, worse, large = card_file("s", 10, 0.1), card_file("w", 20, 0.2), card_file("l", 30, 0.01)
    failed, nan = card_file("f", 5, 0.001, passed=False), card_file("n", 1, float("nan"))
    negative, infinite = card_file("m", 1, -1.0), card_file("i", 1, float("inf"))
    assert recommended([small, worse, large, failed, nan, negative, infinite]) == [small, large]


def test_files_whose_reports_cannot_be_compared_are_not_recommended() -> None:
    one = card_file("a")
    for field in fields(Basis):
        basis: Basis = replace(one.report.basis, **{field.name: ("other",)})
        other = replace(one, path=Path("b"), report=replace(one.report, basis=basis))
        card = card_text([one, other], ["kld"], [])
        assert recommended([one, other]) == [] and "cannot be compared" in card
    assert len(recommended([one, one])) == 2


@pytest.mark.parametrize(
    ("floors", "said"),
    [
        (
            [(0, 0), (0, 0)],
            "The noise floor is 0: with another ubatch size, the logits are exactly the same.",
        ),
        ([(0, 0), (2e-13, 3e-14)], "causes an NMSE of at most 2.0e-13 and a mean KLD of at most 3.0e-14 ("),
        ([(2e-13, -3e-18)], "causes an NMSE of at most 2.0e-13 ("),
        ([(2e-13, 0)], "causes an NMSE of at most 2.0e-13 ("),
    ],
)
def test_the_card_says_what_rounding_causes(floors: list[tuple[float, float]], said: str) -> None:
    """Not "a mean KLD of at most 0". Where all differences are tiny, a KLD is rounding itself, also below 0."""
    files = []
    for nmse, kld in floors:
        file = card_file(f"{len(files)}.gguf")
        floor = replace(file.report.floor, nmse=nmse, kld_mean=kld)
        files.append(replace(file, report=replace(file.report, floor=floor)))
    card = card_text(files, ["kld"], [])
    assert said in card and "of at most 0" not in card
    assert "Perplexity depends on the text as much as on the model" in card


def test_both_cards_read_the_same_figures(tmp_path: Path) -> None:
    report = GOLDEN / "report.json"
    place = tmp_path / "validation" / "x"
    keep(report, place)
    stored = read_report(report)
    assert figures_of(tmp_path, tmp_path / "x.gguf", [stored.sha256]) == stored.figures


def keep(report: Path, place: Path) -> None:
    """Put a report into a folder, with pages that name its file and time as those of all versions do."""
    place.mkdir(parents=True)
    shutil.copy(report, place / "report.json")
    stored = read_report(report)
    for page in ("report.md", "report.html"):
        (place / page).write_text(f"sha256 {stored.sha256}; {stored.created}")


@pytest.mark.parametrize("page", ["report.md", "report.html"])
@pytest.mark.parametrize("changed", ["sha256", "created", None])
def test_a_report_counts_only_with_its_own_pages(tmp_path: Path, page: str, changed: str | None) -> None:
    """The card has the JSON's figures and links to the pages; they must not be missing, or of another run."""
    place = tmp_path / "validation" / "x"
    keep(GOLDEN / "report.json", place)
    stored = read_report(place / "report.json")

    def found() -> bool:
        kept = card_files._kept(place) is not None
        assert kept == (figures_of(tmp_path, tmp_path / "x.gguf", [stored.sha256]) is not None)
        return kept

    assert found()
    text = (place / page).read_text()
    if changed is None:
        (place / page).unlink()
    else:
        (place / page).write_text(text.replace(getattr(stored, changed), "another"))
    assert not found()


def test_a_kept_report_is_without_what_a_killed_run_left(tmp_path: Path) -> None:
    place = tmp_path / "x"
    keep(GOLDEN / "report.json", place)
    (place / ".report.abcd").mkdir()
    assert card_files._kept(place) is not None and not list(place.glob(".*"))


def test_one_rule_recommends_in_both_cards() -> None:
    """The only file that passed is recommended."""
    good, bad = card_file("a.gguf", 10, 0.2), card_file("b.gguf", 5, 0.1, passed=False)
    assert recommended([good, bad]) == [good]
    new, other = (
        Listed(file.path, KEYS, nbytes=file.report.bytes, figures=file.report.figures) for file in (good, bad)
    )
    short = convert_card_text(new, [other], [])
    assert re.findall(r"^\| `(.)\.gguf` \| .* \| (yes|) \|$", short, re.MULTILINE) == [
        ("b", ""),
        ("a", "yes"),
    ]


@pytest.mark.parametrize("kld", [True, "0.1", 10**400])
def test_a_stored_figure_is_a_number(tmp_path: Path, kld: object) -> None:
    data = json.loads((GOLDEN / "report.json").read_text())
    data["runs"][0]["all"]["kld_mean"] = kld
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ValidateError, match="damaged"):
        read_report(tmp_path / "report.json")


CONFIG = "kimi_gguf.source.config_sha256"


def test_the_card_has_the_facts_of_all_files() -> None:
    """Not only of the smallest, which may be of another converter."""
    small = card_file("small.gguf", 1)
    keys = {"general.license": "mit", "general.quantized_by": "me", CONFIG: SHA256}
    ours, more = card_file("ours.gguf", 2, **keys), card_file("more.gguf", 3, **keys)
    for order in ([small, ours, more], [more, ours, small]):
        card = card_text(order, ["kld"], [])
        assert '\nlicense: "mit"\n' in card and '\nquantized_by: "me"\n' in card and f"`{SHA256}`" in card
        section = card.partition("\n## Differences from")[2]
        assert "Of `ours.gguf`, `more.gguf`:" in section and "small.gguf" not in section
    assert "`ours.gguf`" not in card_text([ours, more], ["kld"], []).partition("\n## Differences from")[2]


def test_files_of_different_licences_have_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The front matter has one licence. A file without one gets that of the checkpoint."""
    checkpoint, hub = write_checkpoint(tmp_path / "checkpoint", Spec(layers="KM")), tmp_path / "hub"
    hub.mkdir()
    convert(checkpoint, hub / "none.gguf", TYPES["F32"])
    for licence in ("mit", "apache-2.0"):
        (checkpoint / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        convert(checkpoint, hub / f"{licence}.gguf", TYPES["F32"])
    monkeypatch.setattr("kimi_gguf.validate.cli._engines", lambda _: pytest.fail("no difference was found"))
    for removed in (None, "none", "mit"):
        if removed:
            (hub / f"{removed}.gguf").rename(tmp_path / f"{removed}.gguf")
        if removed == "mit":  # what remains has the checkpoint's licence
            (tmp_path / "none.gguf").rename(hub / "none.gguf")
            card_files.check_licences(card_files.models_of(hub), checkpoint)
            (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
        assert main(["card", str(hub), "--checkpoint", str(checkpoint)]) == 2
        error = capsys.readouterr().err
        assert "licence: expected 'apache-2.0" in error and "found 'mit" in error


def test_equal_files_are_both_recommended() -> None:
    assert len(recommended([card_file("a"), card_file("b")])) == 2


def test_a_card_of_another_converter_s_file() -> None:
    card = card_text([card_file()], ["kld"], [])
    assert "| `x.gguf` | 10 bytes | Q8_0 90 %, F32 10 %; 0.80 bits per weight | 0.1 |" in card
    assert "## Differences" not in card  # not a file of convert-kimi


HOSTILE = (
    "a\n---\nlicense: mit\n",
    "```\n# x",
    "`x` | <script>",
    '"x"\\',
    "](<javascript:x>)",
    "$x^",
    "_$\\frac$",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_text(text: str) -> None:
    report = read_report(GOLDEN / "report.json")
    report = replace(
        report,
        basis=replace(report.basis, precision=text, cache_type=text),
        name=text, type=text, checkpoint=text, source=text, engine=text,
        unchecked=[text],
    )  # fmt: skip
    name = text.replace("/", "") + ".gguf"
    keys = {**KEYS, "general.name": text, "general.license": text, "general.size_label": text}
    keys |= {"general.base_model.0.organization": text, "general.base_model.0.name": text}
    keys |= {f"kimi_gguf.source.{key}": text for key in ("config_sha256", "headers_sha256")}
    card = card_text([CardFile(Path(name), keys, elements={"Q8_0": 1}, report=report)], ["kld"], [text])
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert [line.split(":")[0] for line in head.splitlines() if ":" in line] == [
        "base_model", "base_model_relation", "license", "library_name", "pipeline_tag", "tags",
    ]  # fmt: skip
    fence = re.search(r"^(`{3,})sh\n(.*?)\n\1$", body, re.MULTILINE | re.DOTALL)
    assert fence is not None
    prose = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert "\n# x" not in prose
    html = rendered(card)
    assert "<script" not in html and 'href="javascript' not in html
    (row,) = (line for line in prose.splitlines() if "validation/" in line and "report.html" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 11


@pytest.mark.parametrize(("size", "unit", "shown"), [(5_000_000, "MB", 5), (300_000_000, "GB", 0.3)])
def test_sizes_have_a_unit_that_fits(
    size: int, unit: str, shown: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "kimi_gguf.validate.card.images", lambda lines, plots, form: drawn.append((lines, plots)) or {}
    )
    draw_plots([card_file("a", size, 0.1), card_file("b", size // 2, 0.2)])
    ((lines, plots),) = drawn
    axes = Figure().subplots()
    plots["kld_by_size"][1](axes, lines)
    assert axes.get_xlabel() == unit
    assert max(float(point.get_xdata()[0]) for point in axes.lines) == pytest.approx(shown)


def test_hostile_names_do_not_break_the_plots() -> None:
    plots = draw_plots([card_file(f"{text.replace('/', '')}.gguf") for text in HOSTILE])
    assert len(plots) == 5


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "expected a folder of GGUF files"),
        (lambda folder: folder.write_text(""), "expected a folder of GGUF files"),
        (lambda folder: folder.mkdir(), "expected GGUF files, found none"),
    ],
)
def test_a_folder_without_files_gives_status_2(
    prepare: Callable[[Path], object],
    said: str,
    demo_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(tmp_path / "hub")
    assert main(["card", str(tmp_path / "hub"), "--checkpoint", str(demo_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("validate-kimi: error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["kld.png", "KLD_by_size.PNG", ".", ".."])
def test_a_name_whose_report_has_no_place_is_refused_before_anything_is_measured(
    name: str, demo_dir: Path, tmp_path: Path
) -> None:
    """The plots have their names in the same folder; ".." is another one."""
    with pytest.raises(ValidateError, match="cannot be the folder of its report; rename the file"):
        card_files.check_card_place(tmp_path, [tmp_path / f"{name}.gguf"], False, demo_dir)


def test_a_plot_that_cannot_be_written_is_found_before_anything_is_measured(
    demo_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "validation/agreement.png").mkdir(parents=True)
    with pytest.raises(ValidateError, match=r"agreement\.png: expected a plot"):
        card_files.check_card_place(tmp_path, [tmp_path / "x.gguf"], False, demo_dir)


def test_every_file_is_opened_before_one_is_validated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validating a file takes minutes or hours; a bad one after it would be found then."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", Spec(layers="KM"))
    good, other, hub = tmp_path / "good.gguf", tmp_path / "other.gguf", tmp_path / "hub"
    convert(checkpoint, good, TYPES["F32"])
    convert(write_checkpoint(tmp_path / "checkpoint of other", Spec(layers="KMK")), other, TYPES["F32"])
    options = Options(split_max_size=good.stat().st_size // 2)
    convert(checkpoint, tmp_path / "s.gguf", TYPES["F32"], options)
    first, *later = sorted(tmp_path.glob("s-*.gguf"))
    tensorless, truncated = tmp_path / "tensorless.gguf", tmp_path / "truncated.gguf"
    writer = GGUFWriter(tensorless, "kimi-linear")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    truncated.write_bytes(good.read_bytes()[:-100])
    monkeypatch.setattr("kimi_gguf.validate.cli._engines", lambda _: pytest.fail("nothing was found"))
    for files, said in (
        ([other], "other.gguf: blk.2.attn_norm.weight: expected no such tensor"),
        ([tensorless], "tensorless.gguf: expected tensors, found none"),
        ([truncated], "truncated.gguf: not a readable GGUF file"),
        ([first, *later[:-1]], f"{later[-1].name}: not found"),
        (later, f"{later[0].name}: split 2 of {len(later) + 1}, but {first.name} is missing"),
    ):
        shutil.rmtree(hub, ignore_errors=True)
        hub.mkdir()
        shutil.copy(good, hub / "a.gguf")
        for file in files:
            shutil.copy(file, hub)
        assert main(["card", str(hub), "--checkpoint", str(checkpoint)]) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Callable[[], object]]]:
    """A checkpoint next to hub/a.gguf, which is taken as validated; and what is called during the validation."""
    checkpoint, meanwhile = write_checkpoint(tmp_path / "checkpoint", Spec(layers="KM")), []
    (tmp_path / "hub").mkdir()
    assert convert_kimi([str(checkpoint), "-o", str(tmp_path / "hub/a.gguf"), "--model-card", "--quiet"]) == 0

    def files(*_: object) -> list[CardFile]:
        for action in meanwhile:
            action()
        return [replace(card_file(), path=tmp_path / "hub/a.gguf")]

    monkeypatch.setattr("kimi_gguf.validate.cli._engines", lambda _: (None, None))
    monkeypatch.setattr(card_files, "card_files", files)
    return checkpoint, meanwhile


@pytest.mark.parametrize(("what", "listed"), [("added", 2), ("replaced", 1), ("removed", 1)])
def test_a_card_that_a_conversion_writes_meanwhile_is_kept(
    validated: tuple[Path, list[Callable[[], object]]],
    what: str,
    listed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, meanwhile = validated
    hub = checkpoint.with_name("hub")
    name = "b.gguf" if what == "added" else "a.gguf"
    words = [str(checkpoint), "-o", str(hub / name), "--type", "F16", "--model-card", "--force", "--quiet"]
    meanwhile.append((hub / name).unlink if what == "removed" else lambda: convert_kimi(words))
    before = (hub / "README.md").read_bytes()
    assert main(["card", str(hub), "--checkpoint", str(checkpoint), "--force"]) == 2
    assert f"{name}: was added, replaced or removed meanwhile" in capsys.readouterr().err
    after = (hub / "README.md").read_bytes()
    assert (after == before) == (what == "removed")
    assert after.count(b"Made by kimi-gguf") == listed and b"mean KLD" not in after


def test_a_card_that_appears_meanwhile_is_not_overwritten_without_force(
    validated: tuple[Path, list[Callable[[], object]]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, meanwhile = validated
    card = checkpoint.with_name("hub") / "README.md"
    card.unlink()
    meanwhile.append(lambda: card.write_text("precious"))
    assert main(["card", str(card.parent), "--checkpoint", str(checkpoint)]) == 2
    assert "README.md: already exists" in capsys.readouterr().err
    assert card.read_text() == "precious"


def test_the_card_is_written_while_no_conversion_writes_it(
    validated: tuple[Path, list[Callable[[], object]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder is locked while the card is written, and is not during the validation, which takes long."""
    checkpoint, meanwhile = validated
    hub = checkpoint.with_name("hub")
    locked: list[bool] = []
    write = card_files.write_card

    def try_lock() -> None:
        handle = os.open(hub, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(False)
        except BlockingIOError:
            locked.append(True)
        finally:
            os.close(handle)

    def write_card(*arguments: Any) -> Path:
        try_lock()
        return write(*arguments)

    meanwhile.append(try_lock)
    monkeypatch.setattr(card_files, "write_card", write_card)
    (hub / "validation").mkdir()
    assert main(["card", str(hub), "--checkpoint", str(checkpoint), "--force"]) == 0
    assert f"note: {hub / 'README.md'}: has no `license:`" in capsys.readouterr().err
    assert locked == [False, True] and "a.gguf" in rows((hub / "README.md").read_text())


def test_only_a_file_is_read_as_an_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a pipe would wait forever, and a file of any size would fill the memory."""
    places = [tmp_path / name for name in ("pipe", "large", "absent")]
    for place in places:
        keep(GOLDEN / "report.json", place)
        assert card_files._kept(place) is not None
        (place / "report.json").unlink()
    monkeypatch.setattr(card_files, "read_report", lambda _: pytest.fail("it was read"))
    os.mkfifo(tmp_path / "pipe/report.json")
    with (tmp_path / "large/report.json").open("wb") as file:
        file.truncate(card_files.MOST_REPORT + 1)  # without blocks on disk
    assert [card_files._kept(place) for place in places] == [None] * 3


def test_the_checkpoints_own_card_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", Spec(layers="KM"))
    (checkpoint / "README.md").write_text("precious")
    convert(checkpoint, checkpoint / "x.gguf", TYPES["F32"])
    assert main(["card", str(checkpoint), "--checkpoint", str(checkpoint), "--force"]) == 2
    assert "is a file of the checkpoint" in capsys.readouterr().err
    assert (checkpoint / "README.md").read_text() == "precious" and not (checkpoint / "validation").exists()
