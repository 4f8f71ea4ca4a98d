"""The committed page of the bench: one command writes it again with the same bytes; partial runs do not change it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from bench_case import record

from kimi_gguf.bench.manifest import read_manifest
from kimi_gguf.bench.record import add, load, save
from kimi_gguf.bench.run import shown_command
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.scripts import kimi_llama
from kimi_gguf.tools import measure_conversion, measure_k3

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_pages_are_drawn_from_the_committed_records(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "bench-records", tmp_path / "bench-records")
    pages = []
    manifests = list(DOCS.glob("bench*.toml"))
    for manifest in manifests:
        shutil.copy(manifest, tmp_path)
    for manifest in manifests:
        assert kimi_llama.main(["bench", "--draw", str(tmp_path / manifest.name)]) == 0
        pages.append(read_manifest(manifest).page.name)
    drawn = sorted(path.name for path in tmp_path.glob("bench*") if path.suffix in (".md", ".svg"))
    assert drawn == sorted([*pages, *(page.replace(".md", ".svg") for page in pages)])
    for name in drawn:
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), name


CONVERSIONS = {"conversion": measure_conversion, "conversion-k3": measure_k3}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_committed_page_of_conversions_is_drawn_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    page, record = tmp_path / "page.md", DOCS / "bench-records" / f"{name}.json"
    monkeypatch.setattr("sys.argv", ["measure", "--draw", str(record), "--page", str(page)])
    CONVERSIONS[name].main()
    assert page.read_bytes() == (DOCS / f"bench-{name}.md").read_bytes()


@pytest.mark.parametrize("measure", CONVERSIONS.values(), ids=CONVERSIONS)
def test_what_is_no_record_of_conversions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: ModuleType
) -> None:
    page, record = tmp_path / "page.md", tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["measure", "--draw", str(record), "--page", str(page)])
    for text in ("", "[]", '{"machine": {}}'):
        record.write_text(text)
        with pytest.raises(SystemExit, match=r"record\.json is not a record of measure"):
            measure.main()
    assert not page.exists()


def test_a_command_without_a_record_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(record("2026-01-01", 2.0), tmp_path / "records.json")
    manifest = tmp_path / "bench.toml"
    manifest.write_text(
        'title = "Bench"\npage = "bench.md"\nrecords = "records.json"\ncommands = ["kimi-llama bench absent"]\n'
    )
    assert kimi_llama.main(["bench", "--draw", str(manifest)]) == 1
    assert "no record of kimi-llama bench absent" in capsys.readouterr().err
    assert not (tmp_path / "bench.md").exists()


def test_a_recorded_command_is_that_of_the_manifest() -> None:
    words = ["bench", "--hybrid", "--json", "out/hybrid.json"]
    for added in ([], ["--record", "docs/machine.json"], ["--record=docs/machine.json"]):
        assert shown_command(words + added) == "kimi-llama bench --hybrid --json hybrid.json"
    assert shown_command(["bench", "--record", "a.json", "--matmuls"]) == "kimi-llama bench --matmuls"


def test_a_partial_run_does_not_overwrite_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "bench.md"
    page.write_text("old")
    assert kimi_llama.main(["bench", "--page", str(page)]) == 1
    assert "a run does not overwrite a page" in capsys.readouterr().err
    add(record("2026-01-01", 2.0), tmp_path / "records.json")
    (tmp_path / "bench.toml").write_text(
        'title = "Bench"\npage = "bench.md"\nrecords = "records.json"\ncommands = ["kimi-llama bench"]\n'
    )
    assert kimi_llama.main(["bench", "--records", str(tmp_path / "records.json"), "--page", str(page)]) == 1
    assert "this page has a manifest" in capsys.readouterr().err
    assert page.read_text() == "old"


@pytest.mark.parametrize(
    "text",
    [
        "title = 5",
        "page = 5",
        "records = 5",
        "commands = 5",
        "commands = []",
        "commands = 'kimi-llama bench'",
        "commands = [5]",
        "x",
    ],
)
def test_a_damaged_manifest_is_one_message(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        "title": 'title = "Bench"',
        "page": 'page = "bench.md"',
        "records": 'records = "records.json"',
        "commands": 'commands = ["a"]',
    }
    lines[text.split()[0]] = text
    (tmp_path / "bench.toml").write_text("\n".join(lines.values()))
    assert kimi_llama.main(["bench", "--draw", str(tmp_path / "bench.toml")]) == 1
    assert "bench.toml: " in capsys.readouterr().err


RECORDS = Path(__file__).parents[1] / "golden/bench-records.json"


@pytest.mark.parametrize("schema", [0, 2, [1], None, "1", True])
def test_another_schema_is_refused(schema: object, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(json.loads(RECORDS.read_text()) | {"schema": schema}))
    with pytest.raises(EngineError, match="expected schema 1"):
        load(file)


def test_a_record_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("[" * 200_000)
    with pytest.raises(EngineError, match="not a record of the bench"):
        load(file)


@pytest.mark.parametrize(
    "place",
    ["switch", "libraries", "operators", "hybrid", "engines.patched", "models.0.name", "models.0.about",
     "models.0.about.contexts", "models.0.cells.0.ratio", "models.0.cells.0.threads", "models.0.cells.0.floor",
     "models.0.cells.0.patched.spread", "models.0.cells.0.floor.share", "limits.0.read"],
)  # fmt: skip
def test_a_record_that_lacks_a_key_is_one_message_with_the_file_and_the_key(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "record.json", tmp_path / "page.md"
    whole = json.loads(RECORDS.read_text())
    whole["records"] = [record for record in whole["records"] if "--sequences 4" in record["command"]]
    within = whole["records"][0]
    *path, key = place.split(".")
    for name in path:
        within = within[int(name) if name.isdigit() else name]
    del within[key]
    file.write_text(json.dumps(whole))
    assert kimi_llama.main(["bench", "--records", str(file), "--page", str(page)]) == 1
    assert f"{file}: damaged: expected the key {key!r}; measure again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("part", ["machine", "models", "engines", "command", "records"])
def test_a_damaged_record_is_one_message(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.json"
    save([record("2026-01-01", 2.0)], file)
    whole = json.loads(file.read_text())
    (whole if part in whole else whole["records"][0])[part] = 5
    file.write_text(json.dumps(whole))
    assert kimi_llama.main(["bench", "--records", str(file), "--page", str(tmp_path / "page.md")]) == 1
    assert "records.json: damaged" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("name", ["serving.md", "bench.txt"])
def test_only_pages_of_the_bench_are_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(record("2026-01-01", 2.0), tmp_path / "records.json")
    (tmp_path / "serving.md").write_text("prose")
    words = ["bench", "--records", str(tmp_path / "records.json"), "--page", str(tmp_path / name)]
    assert kimi_llama.main(words) == 1
    assert name in capsys.readouterr().err
    assert (tmp_path / "serving.md").read_text() == "prose"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["records.json", "serving.md"]


def test_json_replaces_only_the_record_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save([record("2026-01-01", 2.0), record("2026-01-02", 2.0)], tmp_path / "machine.json")
    (tmp_path / "page.md").write_text("prose")
    for name, message in (("machine.json", "the record of one run"), ("page.md", "a record of the bench")):
        before = (tmp_path / name).read_bytes()
        assert kimi_llama.main(["bench", "--json", str(tmp_path / name)]) == 1
        assert f"{name}: not {message}" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before


def test_records_are_added_to_a_machine_s_file(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    one, two, other = (record(f"2026-01-0{day}", 2.0) for day in (1, 2, 3))
    add(two, file)
    add(one, file)
    assert load(file) == [one, two]
    other["machine"] = {**other["machine"], "cores": 64}
    with pytest.raises(EngineError, match="records of another machine"):
        add(other, file)
    assert load(file) == [one, two]


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_machine_s_file_has_what_pages_show(in_turns: bool, tmp_path: Path) -> None:
    """The table of turns needs samples; all else that only the record of a run has is left out."""
    one = record("2026-01-01", 2.0)
    (model,) = one["models"]
    model["about"] |= {
        "resident": {"patched": {"private": 1}} if in_turns else {},
        "shared": {"patched": 0.0},
    }
    model["cells"][0] |= {"samples": {"patched": [0.1]}, "steps": 3}
    add(one, tmp_path / "machine.json")
    (kept,) = load(tmp_path / "machine.json")[0]["models"]
    assert model["about"].keys() - kept["about"].keys() == {"shared"}
    assert model["cells"][0].keys() - kept["cells"][0].keys() == {"steps"} | (
        {"samples"} - {"samples" * in_turns}
    )


@pytest.mark.parametrize("changed", ["nothing", "libraries", "name", "bytes"])
def test_a_record_replaces_one_of_the_same_command_model_and_libraries(changed: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    old, new = record("2026-01-01", 1.0), record("2026-01-02", 2.0)
    new["command"] = old["command"]
    if changed == "libraries":
        new["libraries"] = "bin"
    elif changed != "nothing":
        new["models"][0][changed] = {"name": "n", "bytes": 100}[changed]
    add(old, file)
    add(new, file)
    assert load(file) == ([new] if changed == "nothing" else [old, new])
