"""The model card and the metadata: every fact that a reader needs, and nothing about the machine that made them."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from convert_tools import convert, fresh_checkpoint, gguf_keys, gguf_types, start_convert
from gguf import GGUFReader
from huggingface_hub import metadata_load
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from random_checkpoint import Spec
from random_peft import write_adapter
from test_convert_like_quantize import write_imatrix

from kimi_gguf.convert.card import folder as card_folder
from kimi_gguf.convert.card.folder import Hashed, figures_of, may_be_of, others_of
from kimi_gguf.convert.card.text import Listed, Made, card_text, made_in, plain, table, yaml_text
from kimi_gguf.convert.conversion import Options, plan_only
from kimi_gguf.convert.conversion import convert as convert_in_python
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.output.writer import ProgressCallback
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.source.origin import licence_keys
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.file_hash import FileHashes
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.progress import Silent

SPEC = Spec(layers="KKM", hidden=256, heads=4, seed=70)
ORIGIN = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
base_model:
- org/Some-Model-48B-A3B-Base
---
"""


def front_matter(card: str) -> dict[str, str]:
    """Plain `key: "text"` lines between the two `---`."""
    head = card.split("---\n")[1]
    return dict(re.findall(r'^(\w+): "(.*)"$', head, re.MULTILINE))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def commands(card: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)\n```$", card, re.MULTILINE | re.DOTALL)
    return [shlex.split(block) for block in blocks]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = fresh_checkpoint(tmp_path / "Some-Model-48B-A3B-Instruct", SPEC)
    (folder / "README.md").write_text(ORIGIN)
    return folder


def test_the_demos_card_names_what_it_must(demo_dir: Path, out: Path) -> None:
    file = out / "demo.gguf"
    run = convert(demo_dir, "-o", file, "--type", "F16", "--model-card")
    cards = [out / "README.md", demo_dir / "README.md"]
    assert (
        run.status == 0 and f"note: {cards[0]}: has no `license:`, because {cards[1]} names none" in run.err
    )
    assert run.err.count(str(cards[0])) == run.err.count(str(cards[1])) == 2  # both must be edited
    assert {path.name for path in out.iterdir()} == {"demo.gguf", "README.md"}
    card = (out / "README.md").read_text()
    for fact in (
        "# demo, GGUF files for llama.cpp",
        hashlib.sha256((demo_dir / "config.json").read_bytes()).hexdigest(),
        str(gguf_keys(file)["kimi_gguf.source.headers_sha256"]),
        f"| `demo.gguf` | {file.stat().st_size:,} | {len(GGUFReader(file).tensors)} | ",
        f" | `{sha256(file)}` |",
        "5.8M-A4.6M",
        "`attention.value_length` is the width of the latent, 512,",
        "(`<|im_end|>`)",
    ):
        assert fact in card, fact
    assert front_matter(card) == {"library_name": "gguf", "pipeline_tag": "text-generation"}
    assert "tags:\n- gguf\n- llama.cpp\n- kimi-linear\n---" in card
    assert commands(card) == [
        ["convert-kimi", "demo", "-o", "demo.gguf", "--type", "F16", "--model-card"],
        ["python", "-m", "pip", "install", "kimi_gguf-*.whl"],
        ["kimi-llama", "chat", "demo.gguf"],
        ["llama-cli", "-m", "demo.gguf"],
        ["convert-kimi", "verify", "demo.gguf", "--checkpoint", "demo"],
    ]


def test_base_model_and_licence_are_in_card_and_file(source: Path, out: Path) -> None:
    run = convert(source, "-o", out / "x.gguf", "--model-card", "--quantized-by", "somebody")
    assert run.status == 0 and "license" not in run.err
    assert front_matter((out / "README.md").read_text()) == {
        "base_model": "org/Some-Model-48B-A3B-Base",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "a-licence",
        "license_link": "https://example.org/licence",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "somebody",
    }
    keys = {name: value for name, value in gguf_keys(out / "x.gguf").items() if name.startswith("general.")}
    assert keys == {
        "general.architecture": "kimi-linear",
        "general.type": "model",
        "general.name": "Some-Model-48B-A3B-Instruct",
        "general.finetune": "Instruct",
        "general.basename": "Some-Model",
        "general.quantized_by": "somebody",
        "general.size_label": keys["general.size_label"],
        "general.license": "other",
        "general.license.name": "a-licence",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Some-Model-48B-A3B-Base",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Some-Model-48B-A3B-Base",
        "general.quantization_version": 2,
        "general.file_type": 32,
    }


NAME, LINK = "license_name: a\n", "license_link: LICENSE\n"


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("license: apache-2.0\n", ("apache-2.0",)),
        ("license: 'mit'  # comment\n", ("mit",)),
        ('license: "mit"\n', ("mit",)),
        ("license:\n- cc-by-4.0\n", ("cc-by-4.0",)),
        (f"license: other\n{NAME}{LINK}", ("other", "a", "LICENSE")),
        ("license: other\nlicense_name: Some Licence 1.0 (new)\n", ("other", "Some Licence 1.0 (new)")),
        (f"license: a b\n{NAME}{LINK}", ()),
        (NAME, ()),
        (f"license: {'a' * 65}\n", ()),
        ("license: !!python/object/apply:os.system [ls]\n", ()),
        ("license: *anchor\n", ()),
        ("license: a\x1b[31m\n", ()),
        ("license: a](javascript:x)\n", ()),
        ("license: other\nlicense_name: <script>\nlicense_link: javascript:x\n", ("other",)),
        ("license: other\nlicense_link: ../../LICENSE\n", ("other",)),
        ("license: other\nlicense_link: https://example.org/a)[b](c\n", ("other",)),
        (f"x: {'a' * (1 << 16)}\nlicense: mit\n", ()),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_short_plain_values_name_a_licence(
    tmp_path: Path, lines: str, licence: tuple[str, ...], mark: str
) -> None:
    (tmp_path / "README.md").write_text(f"{mark}---\n{lines}---\n", encoding="utf-8")
    assert tuple(licence_keys(tmp_path).values()) == licence


def test_a_card_that_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe would wait forever."""
    os.mkfifo(tmp_path / "README.md")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was opened"))
    assert licence_keys(tmp_path) == {}


def test_a_hub_caches_checkpoint_is_named_by_its_id(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "models--org--Some-Model" / "snapshots" / ("0123456789" * 4), SPEC)
    assert convert(source, "-o", out / "x.gguf", "--model-card").status == 0
    card = (out / "README.md").read_text()
    assert front_matter(card)["base_model"] == "org/Some-Model"
    assert commands(card)[0][1].split("@")[0] == "org/Some-Model"


@pytest.mark.engine
def test_the_command_in_the_card_gives_the_same_bytes(
    tmp_path: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(source, "-o", tmp_path / "bf16.gguf").status == 0
    write_imatrix(tmp_path / "imatrix.gguf", tmp_path / "bf16.gguf", every=1)
    monkeypatch.chdir(tmp_path)  # the metadata has the path of the importance matrix as it was given
    options = ["--type", "Q4_K_S", "--imatrix", "imatrix.gguf", "--split-max-size", "400K"]
    options += ["--tensor-type", "ssm_beta=Q8_0", "--output-tensor-type", "Q6_K", "--name", "a 'name'"]
    write_adapter(tmp_path / "tuned", source)
    options += ["--token-embedding-type", "Q5_K", "--adapter", "tuned:0.3", "--adapter", "tuned:-0.12345678"]
    assert convert(source, "-o", out / "x y.gguf", *options, "--model-card").status == 0
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    card = made["README.md"].decode()
    assert str(tmp_path) not in card and "`imatrix.gguf`" in card and "calibration.txt" in card
    for path in out.iterdir():
        path.unlink()
    again, *_, check = commands(card)
    assert again[again.index("--split-max-size") + 1] == "400K"
    assert "| merged adapter | `tuned`, scale 0.3, SHA-256 `" in card
    for name in (source.name, "imatrix.gguf", "tuned"):
        (out / name).symlink_to(tmp_path / name)
    monkeypatch.chdir(out)
    assert convert(*again[1:]).status == 0
    assert {name: (out / name).read_bytes() for name in made} == made
    assert convert(*check[1:]).status == 0


def test_parts_are_listed_with_their_bytes(source: Path, out: Path) -> None:
    assert convert(source, "-o", out / "x.gguf", "--model-card", "--split-max-size", "700K").status == 0
    card = (out / "README.md").read_text()
    parts = sorted(out.glob("x-*"))
    assert len(parts) > 1 and ["llama-cli", "-m", parts[0].name] in commands(card)
    for part in parts:
        types = list(gguf_types(part).values())
        assert f"| `{part.name}` | {part.stat().st_size:,} | {len(types)} |" in card
        assert f" | `{sha256(part)}` |" in card


def listed(card: str) -> dict[str, str]:
    """The SHA-256 of every file that the card lists."""
    return dict(re.findall(r"^\| `(.+\.gguf)` \| .* \| `([0-9a-f]{64})` \|", card, re.MULTILINE))


def made(card: str) -> list[str]:
    """The output of every command that made a file."""
    return [words[3] for words in commands(card) if words[0] == "convert-kimi" and words[2] == "-o"]


def test_a_second_file_is_added_to_the_card(source: Path, out: Path) -> None:
    """Each with its command; a file of another converter or checkpoint is left out, and so is a damaged one."""
    other = fresh_checkpoint(out.parent / "other", replace(SPEC, seed=71, hidden=128))
    assert convert(other, "-o", out / "other.gguf").status == 0
    (out / "damaged.gguf").write_bytes(b"GGUF")
    words = ["--type", "F16", "--split-max-size", "700K"]
    assert convert(source, "-o", out / "a.gguf", *words, "--model-card").status == 0
    assert convert(source, "-o", out / "b.gguf", "--type", "F32", "--model-card", "--force").status == 0
    card = (out / "README.md").read_text()
    files = [*sorted(out.glob("a-0*.gguf")), out / "b.gguf"]
    assert len(files) > 2 and list(listed(card).items()) == [(file.name, sha256(file)) for file in files]
    assert made(card) == ["a.gguf", "b.gguf"]
    assert ["kimi-llama", "chat", "b.gguf"] in commands(card) and "KLD" not in card
    checks = [words for block in commands(card) if "verify" in block for words in [block]]
    assert len(checks) == 1 and {files[0].name, "b.gguf"} <= set(checks[0])


@pytest.mark.parametrize("force", [False, True])
def test_two_conversions_at_once_give_one_card_of_both(source: Path, out: Path, force: bool) -> None:
    """The second one ends while the first one writes. What exists is overwritten only with --force."""

    @contextlib.contextmanager
    def meanwhile(plan: Plan) -> Iterator[ProgressCallback]:
        assert convert(source, "-o", out / "b.gguf", "--type", "F16", "--model-card").status == 0
        yield lambda tensor, nbytes: None

    card = ("convert-kimi", source.name, "-o", "a.gguf", "--model-card")
    options = Options(overwrite=force, card=card)
    if force:
        convert_in_python(source, out / "a.gguf", TYPES["BF16"], options, progress=meanwhile)
    else:
        with pytest.raises(ConvertError, match=r"README.md: was created .* --resume --force"):
            convert_in_python(source, out / "a.gguf", TYPES["BF16"], options, progress=meanwhile)
        assert list(listed((out / "README.md").read_text())) == ["b.gguf"]
        assert (out / ".a.gguf.unfinished" / "a.gguf").stat().st_size == plan_only(
            source, TYPES["BF16"]
        ).nbytes
        words = ["-o", out / "a.gguf", "--model-card", "--resume", "--force", "--json"]
        run = convert(source, *words)
        assert run.status == 0
    written = (out / "README.md").read_text()
    assert listed(written) == {file.name: sha256(file) for file in out.glob("*.gguf")}
    assert sorted(made(written)) == sorted(listed(written)) == ["a.gguf", "b.gguf"]
    assert {path.name for path in out.iterdir()} == {"a.gguf", "b.gguf", "README.md"}


def test_cards_of_a_folder_are_written_one_at_a_time(source: Path, out: Path, tmp_path: Path) -> None:
    """A conversion waits for the card of another one, and then lists its file, too."""
    assert convert(source, "-o", tmp_path / "b.gguf", "--type", "F16").status == 0
    nbytes = plan_only(source, TYPES["BF16"]).nbytes
    growing = out / ".a.gguf.unfinished" / "a.gguf"
    with folder_lock(out, wait=True):
        process = start_convert(source, "-o", out / "a.gguf", "--model-card")
        while process.poll() is None and not (growing.exists() and growing.stat().st_size == nbytes):
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        shutil.copy(tmp_path / "b.gguf", out)
    assert process.wait(timeout=60) == 0
    assert set(listed((out / "README.md").read_text())) == {"a.gguf", "b.gguf"}


def test_a_command_is_kept_by_the_content_of_the_file(source: Path, out: Path) -> None:
    """Not by its size or name: other bytes of the same size have no command, a renamed file has."""
    for name in ("same.gguf", "changed.gguf"):
        words = ["--type", "F16", "--name", name[:4], "--model-card", "--force"]
        assert convert(source, "-o", out / name, *words).status == 0
    content = bytearray((out / "changed.gguf").read_bytes())
    content[-1] ^= 1
    (out / "changed.gguf").write_bytes(content)
    (out / "same.gguf").rename(out / "new name.gguf")
    assert convert(source, "-o", out / "z.gguf", "--type", "BF16", "--model-card", "--force").status == 0
    card = (out / "README.md").read_text()
    assert listed(card) == {file.name: sha256(file) for file in out.glob("*.gguf")} and len(listed(card)) == 3
    assert sorted(made(card)) == ["new name.gguf", "z.gguf"]


def write_report(file: Path, **changed: object) -> None:
    """The parts of a report that the card shows."""
    found = dict.fromkeys(("ids", "checkpoint", "precision", "cache_type", "schema"), "a")
    found |= {"sha256": sha256(file), "kld": 0.5, "passed": True} | changed
    report = {
        "schema": found["schema"],
        "gguf": {"sha256": found["sha256"]},
        "checkpoint": {"files": [{"sha256": "config"}, {"sha256": found["checkpoint"]}]},
        "created": "2026-01-02T03:04:05Z",
        "passed": found["passed"],
        "gates": [{"passed": True}, {"passed": found["passed"]}],
        "ids": {"sha256": found["ids"]},
        "reference": {"precision": found["precision"]},
        "options": {"cache_type": found["cache_type"]},
        "runs": [{"all": {"kld_mean": found["kld"]}}],
    }
    place = file.parent / "validation" / file.stem / "report.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(report))
    for page in ("report.md", "report.html"):
        place.with_name(page).write_text(f"{found['sha256']} {report['created']}")


def figures(card: str) -> dict[str, list[str]]:
    """The cells of each model in the table of figures."""
    rows = re.findall(r"^\| `(.+\.gguf)` \| ([^|]*) \| ([^|]*) \| (yes|) \|$", card, re.MULTILINE)
    return {name: cells for name, *cells in rows}


def test_figures_are_those_of_reports_about_the_same_bytes(source: Path, out: Path) -> None:
    for name, kind in (("a", "F16"), ("b", "BF16"), ("c", "F32"), ("d", "BF16")):
        assert convert(source, "-o", out / f"{name}.gguf", "--type", kind).status == 0
    words = ["-o", out / "z.gguf", "--type", "BF16", "--model-card", "--force"]
    assert (
        convert(source, *words).status == 0
    )  # the same bytes, which have a report when they are written again
    link = "[{}](<validation/{}/report.html>)"
    expected = {
        "a.gguf": ["0.00012", link.format("pass", "a"), "yes"],
        "b.gguf": ["0.5", link.format("**FAIL**", "b"), ""],
        "c.gguf": ["1.2e-09", link.format("pass", "c"), "yes"],
        "d.gguf": ["", "not validated", ""],
        "z.gguf": ["0.6", link.format("pass", "z"), ""],
    }
    write_report(out / "a.gguf", kld=0.000123)
    write_report(out / "b.gguf", passed=False)
    write_report(out / "c.gguf", kld=1.2e-9)
    write_report(out / "d.gguf", sha256="0" * 64)
    write_report(out / "z.gguf", kld=0.6)
    assert convert(source, *words).status == 0
    card = (out / "README.md").read_text()
    assert figures(card) == expected
    assert ["kimi-llama", "chat", "a.gguf"] in commands(card)  # the smallest that is recommended


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listed]:
    """A folder with two models of one checkpoint, and a new model."""
    source = fresh_checkpoint(tmp_path_factory.mktemp("two") / "model", SPEC)
    folder = source.parent / "out"
    folder.mkdir()
    for name, kind in (("a", "F16"), ("b", "F32")):
        assert convert(source, "-o", folder / f"{name}.gguf", "--type", kind).status == 0
    keys = {key.name: key.value for key in plan_only(source, TYPES["BF16"]).keys}
    return folder, Listed(folder / "new.gguf", keys)


def card_of(folder: Path, new: Listed) -> str:
    return card_text(new, others_of(folder, [new.path], new.keys, Silent(), Hashed()), [])


@pytest.mark.parametrize("name", ["ids", "checkpoint", "precision", "cache_type", "schema"])
def test_reports_that_cannot_be_compared_recommend_nothing(two_files: tuple[Path, Listed], name: str) -> None:
    folder, new = two_files
    write_report(folder / "a.gguf")
    write_report(folder / "b.gguf", kld=0.1)
    validated = replace(
        new, nbytes=1, figures=figures_of(folder, folder / "a.gguf", [sha256(folder / "a.gguf")])
    )
    assert [cells[2] for cells in figures(card_of(folder, validated)).values()] == ["yes", "", "yes"]
    write_report(folder / "b.gguf", kld=0.1, **{name: "b"})
    card = card_of(folder, validated)
    assert "cannot be compared" in card and {cells[2] for cells in figures(card).values()} == {""}


def test_files_are_recommended_only_if_the_new_one_has_the_same_weights(
    two_files: tuple[Path, Listed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tune may have the same config and headers. A report or a commit proves that the weights are the same;
    models of different commits are not in one card."""
    folder, new = two_files
    write_report(folder / "a.gguf")
    write_report(folder / "b.gguf", kld=0.1)
    card = card_of(folder, new)
    assert {cells[2] for cells in figures(card).values()} == {""} and "nothing proves that `new.gguf`" in card
    hub = {"general.source.huggingface.repository": "a/b", "kimi_gguf.source.commit": "c"}
    others = [
        replace(other, keys={**other.keys, **hub})
        for other in others_of(folder, [], new.keys, Silent(), Hashed())
    ]
    card = card_text(replace(new, keys={**new.keys, **hub}), others, [])
    assert (
        sorted(cells[2] for cells in figures(card).values()) == ["", "yes", "yes"]
        and "nothing proves" not in card
    )
    for key in hub:
        other = {**new.keys, **hub, key: "other"}
        assert not may_be_of(other, {**new.keys, **hub}) and may_be_of(new.keys, other)
    adapter = {
        f"kimi_gguf.adapter.0.{key}": value for key, value in (("name", "a"), ("sha256", "b"), ("scale", 1.0))
    }
    assert not may_be_of(new.keys, {**new.keys, **adapter})


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), FileNotFoundError(2, "No such file")])
def test_a_file_that_cannot_be_read_is_left_out(
    two_files: tuple[Path, Listed], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """Also one that is removed while it is hashed."""
    hash_files = card_folder.hash_files

    def failing(paths: Sequence[Path], progress: Callable[[int, int], None]) -> FileHashes:
        if paths[0].name == "a.gguf":
            raise error
        return hash_files(paths, progress)

    monkeypatch.setattr(card_folder, "hash_files", failing)
    assert list(listed(card_of(*two_files))) == ["b.gguf"]


def test_links_and_names_that_are_not_utf_8_are_left_out(source: Path, out: Path) -> None:
    """A link to the output would have the hash of the file that is replaced; a link to another folder is a file."""
    elsewhere = out.parent / "elsewhere.gguf"
    assert convert(source, "-o", elsewhere, "--type", "F32").status == 0
    assert convert(source, "-o", out / "a.gguf", "--type", "F16").status == 0
    shutil.copy(out / "a.gguf", out / os.fsdecode(b"\xff.gguf"))
    (out / "link.gguf").symlink_to("a.gguf")
    (out / "blob.gguf").symlink_to(elsewhere)
    assert convert(source, "-o", out / "a.gguf", "--model-card", "--force").status == 0
    card = (out / "README.md").read_text()
    assert listed(card) == {"a.gguf": sha256(out / "a.gguf"), "blob.gguf": sha256(elsewhere)}


@pytest.mark.parametrize("words", [["-o", "{out}/\udcff.gguf"], ["-o", "{out}/x.gguf", "--name", "\udcff"]])
def test_a_name_that_is_not_utf_8_is_an_error(source: Path, out: Path, words: list[str]) -> None:
    run = convert(source, *(word.format(out=out) for word in words), "--model-card")
    assert run.status == 1 and "\\udcff" in run.err and "expected a name in UTF-8" in run.err
    assert run.err.count("\n") == 1 and not list(out.iterdir())


NOT_KLD = ["null", "true", '"0.5"', "-1", "NaN", "Infinity", "1e40", "1" + "0" * 400, "1" * 5000, "[1]"]


@pytest.mark.parametrize("kld", NOT_KLD)
def test_a_kld_that_is_no_number_is_no_report(two_files: tuple[Path, Listed], kld: str) -> None:
    file = two_files[0] / "a.gguf"
    write_report(file, kld=0.25)
    assert figures_of(file.parent, file, [sha256(file)]) is not None
    place = file.parent / "validation/a/report.json"
    place.write_text(place.read_text().replace("0.25", kld))
    assert figures_of(file.parent, file, [sha256(file)]) is None


@pytest.mark.parametrize("gates", ["[]", '[{"passed": false}]', '[{"passed": 1}]', "[{}]", "1"])
def test_a_verdict_without_its_gates_is_no_report(two_files: tuple[Path, Listed], gates: str) -> None:
    file = two_files[0] / "a.gguf"
    write_report(file)
    place = file.parent / "validation/a/report.json"
    text = place.read_text()
    place.write_text(text.replace(json.dumps([{"passed": True}] * 2), gates))
    assert place.read_text() != text and figures_of(file.parent, file, [sha256(file)]) is None


@pytest.mark.parametrize("text", ["", "[]", '{"runs": []}', "[" * 9999])
def test_a_report_that_is_none_is_no_error(two_files: tuple[Path, Listed], text: str) -> None:
    file = two_files[0] / "a.gguf"
    write_report(file)
    (file.parent / "validation/a/report.json").write_text(text)
    assert figures_of(file.parent, file, [sha256(file)]) is None


def test_what_plain_llama_cpp_cannot_run_is_not_recommended_for_it(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", Spec(layers="KM", q_lora=16))
    assert convert(source, "-o", out / "x.gguf", "--model-card").status == 0
    card = (out / "README.md").read_text()
    assert "llama-cli" not in card and "upstream llama.cpp cannot load this model" in card


def test_an_existing_card_is_kept_unless_forced(source: Path, out: Path) -> None:
    (out / "README.md").write_text("precious")
    run = convert(source, "-o", out / "x.gguf", "--model-card")
    assert run.status == 1 and "README.md: already exists" in run.err
    assert [path.read_text() for path in out.iterdir()] == ["precious"]
    assert convert(source, "-o", out / "x.gguf", "--model-card", "--force").status == 0
    assert (out / "README.md").read_text().startswith("---\n")


def test_a_gguf_file_is_not_named_as_weights(source: Path) -> None:
    """It would make the folder ambiguous: a checkpoint in shards, and a model.safetensors."""
    run = convert(source, "-o", source / "model.safetensors")
    assert run.status == 1 and "model.safetensors: expected a name for a GGUF file" in run.err
    assert not (source / "model.safetensors").exists()


def test_the_checkpoints_own_card_is_never_overwritten(source: Path) -> None:
    run = convert(source, "-o", source / "x.gguf", "--model-card", "--force")
    assert run.status == 1 and "README.md: is a file of the checkpoint" in run.err
    assert (source / "README.md").read_text() == ORIGIN and not (source / "x.gguf").exists()


@pytest.mark.parametrize("name", ["a\n---\nlicense: mit\n", "```\n# x", "`x` | <script>", '"x"\\', "Ωμέγα"])
def test_a_hostile_name_ends_neither_heading_nor_code_nor_front_matter(
    source: Path, out: Path, name: str
) -> None:
    run = convert(source, "-o", out / "x.gguf", "--model-card", "--name", name, "--quantized-by", name)
    assert run.status == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    head = card.split("\n---\n")[0].splitlines()
    assert [line.split(":")[0] for line in head if ":" in line] == [
        "base_model", "base_model_relation", "license", "license_name", "license_link", "library_name",
        "pipeline_tag", "quantized_by", "tags",
    ]  # fmt: skip
    assert "<script>" not in card.split("\n---\n", 1)[1].split("Made by")[0]
    fence = re.search(r"^(`{3,})sh\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)
    assert fence is not None and name in shlex.split(fence[2])


MARKDOWN = "a1 *_~`&;#!|\\$@:=+<>()[]{}^-./'\",?%w\n\u2028\t😀é"
HOSTILE = (
    "**b** _i_ ~~s~~", "https://evil.example/x", "www.evil.example", "a@evil.example", "&lt;script&gt; &#60;b&#62;",
    "![x](https://evil.example/y)", "1. one", "1) one", "- one", "+ one", "* one", "---", "> quoted", "# heading",
    "    code", "a \\", "a|b\\|c", "$x$ \\(y\\)", "<!-- comment", "a #", "Kimi_K2_v1 is 5.8M-A4.6M", "[x]: y", "[^1]",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(text: str) -> None:
    check_shown(text)


@given(st.text(MARKDOWN))
@example("\\&#124;")
def test_any_text_is_shown_as_it_is(text: str) -> None:
    check_shown(text)


def check_shown(text: str) -> None:
    """In a heading, an item of a list and a cell, by Markdown with the tables of hubs; and as it is read back."""
    render = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
    words = " ".join(text.split())
    shown = html.escape(words).replace("&#x27;", "'")
    written = {
        f"# {plain(text)}, files\n": f"<h1>{shown}, files</h1>\n",
        f"- x {plain(text)}\n": f"<ul>\n<li>x {shown}</li>\n</ul>\n".replace("x </li>", "x</li>"),
        table(("", ""), [("x", plain(text))]): f"<td>{shown}</td>\n</tr>",
    }
    if words:
        written[f"- {plain(text)}\n"] = f"<ul>\n<li>{shown}</li>\n</ul>\n"
    for markdown, expected in written.items():
        assert expected in render(markdown).replace("\u2060", ""), markdown
    linked = re.search(r"@(?!\u2060)|(?i:www\.)|\w://", plain(text))  # hubs make links of addresses
    assert linked is None
    made = Made("1.0", ("convert-kimi", "a", "-o", "b"), (64 * "0",), (text,))
    assert [each.notes for each in made_in(f"\n{made.text()}\n")] == [(words,)]


@pytest.mark.parametrize(
    "text",
    [
        "😀 me",
        "\x7f\x85\x9f",
        "\ufeff\u2028\u2029\ufffe",
        '\0\t\n"\\',
        "日本 \U0010ffff",
        "yes",
        "{a: 1}",
        "é",
    ],
)
def test_the_hub_reads_any_text_of_the_front_matter(text: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\nquantized_by: {yaml_text(text)}\n---\n", encoding="utf-8")
    assert metadata_load(card) == {"quantized_by": text}
    assert all(c in yaml_text(text) for c in text if c.isalpha()), "a person can read it"
