"""Records of every schema so far are read. tests/golden has one file of each, written by the code of its time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimi_gguf.bench.page import write_page
from kimi_gguf.bench.record import MACHINE_SCHEMA, SCHEMA, load_all
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.scripts import kimi_llama

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(schema: int) -> Path:
    return GOLDEN / f"bench-schema-{schema}.json"


def test_there_is_a_golden_file_of_each_schema() -> None:
    schemas = {int(path.stem.rpartition("-")[2]) for path in GOLDEN.glob("bench-schema-*.json")}
    assert schemas == set(range(1, max(SCHEMA, MACHINE_SCHEMA) + 1))
    assert all(json.loads(golden(schema).read_text())["schema"] == schema for schema in schemas)


def test_older_schemas_give_the_records_of_the_newer_ones() -> None:
    """The project converted its own records from 2 to 4; the files of 1 and 3 have one of them."""
    records = load_all(golden(4))
    assert load_all(golden(2)) == records
    (one,) = (record for record in records if "--sequences 4" in record["command"])
    assert load_all(golden(1)) == load_all(golden(3)) == [one]
    assert one["models"][0]["cells"][0]["upstream"]["tokens_per_second"] > 0


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_a_page_is_drawn_from_each_schema(schema: int, tmp_path: Path) -> None:
    write_page(load_all(golden(schema)), tmp_path / "bench.md")
    text = (tmp_path / "bench.md").read_text()
    assert "tg × 4 sequences at 4096" in text and "pristine" not in text


@pytest.mark.parametrize("schema", [0, 5, [1], None, "1"])
def test_another_schema_is_refused(schema: object, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(json.loads(golden(1).read_text()) | {"schema": schema}))
    with pytest.raises(EngineError, match="expected schema 3 or 4"):
        load_all(file)


def test_int8_rates_that_no_processor_has_are_left_out(tmp_path: Path) -> None:
    """peaks.cpp once measured them with AVX2. What memory bounds is still right."""
    data = json.loads(golden(3).read_text())
    (cell,) = data["models"][0]["cells"]
    for bound in ("memory", "products"):
        cell["floor"] |= {"bound": bound}
        for rates in (cell["floor"]["limits"], *data["limits"]):
            rates["int8"] = 5.6 * rates["f32"]
        file = tmp_path / f"{bound}.json"
        file.write_text(json.dumps(data))
        (record,) = load_all(file)
        floor = record["models"][0]["cells"][0]["floor"]
        assert all(rates["int8"] is None for rates in record["limits"])
        assert (floor and floor["limits"]["int8"]) is None
        assert (floor is None) == (bound == "products")
        write_page([record], tmp_path / f"{bound}.md")
        assert ("unknown" in (tmp_path / f"{bound}.md").read_text()) == (bound == "products")


@pytest.mark.parametrize(
    "change", [{"created": "2026-11-27T00:00:00+00:00"}, {"device": {"description": "a GPU"}}]
)
def test_int8_rates_of_later_records_and_of_devices_stay(change: dict[str, object], tmp_path: Path) -> None:
    """There a high ratio is a float32 rate that was measured too low."""
    data = json.loads(golden(3).read_text()) | change
    for rates in data["limits"]:
        rates["int8"] = 5.6 * rates["f32"]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(data))
    (record,) = load_all(file)
    assert record["limits"] == data["limits"] != []


def test_a_record_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("[" * 200_000)
    with pytest.raises(EngineError, match="not a record of the bench"):
        load_all(file)


def test_a_cell_without_a_least_time_is_damage(tmp_path: Path) -> None:
    data = json.loads(golden(3).read_text())
    del data["models"][0]["cells"][0]["floor"]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"record\.json: damaged: expected the key 'floor'"):
        load_all(file)


@pytest.mark.parametrize(
    "place",
    ["switch", "libraries", "operators", "hybrid", "machine.memory_gib", "engines.patched", "engines.patched.compilers",
     "engines.patched.compilers.C++", "models.0.name", "models.0.about", "models.0.about.contexts",
     "models.0.cells.0.ratio", "models.0.cells.0.threads", "models.0.cells.0.patched.spread",
     "models.0.cells.0.floor.share", "limits.0.read"],
)  # fmt: skip
@pytest.mark.parametrize("schema", [1, 3, 4])
def test_a_record_that_lacks_a_key_is_one_message_with_the_file_and_the_key(
    place: str, schema: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "record.json", tmp_path / "page.md"
    whole = json.loads(golden(schema).read_text())
    within = whole
    if schema == MACHINE_SCHEMA:
        whole["records"] = [each for each in whole["records"] if "--sequences 4" in each["command"]]
        engines = whole["records"][0]["engines"]
        if place.startswith("engines.patched."):
            within, place = whole["engines"][engines["patched"]], place.removeprefix("engines.patched.")
        elif not place.startswith("machine."):
            within = whole["records"][0]
    *path, key = place.split(".")
    for name in path:
        within = within[int(name) if name.isdigit() else name]
    del within[key]
    file.write_text(json.dumps(whole))
    assert kimi_llama.main(["bench", "--records", str(file), "--page", str(page)]) == 1
    assert f"{file}: damaged: expected the key {key!r}; measure again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_of_several_files_the_damaged_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(golden(3).read_text())
    del data["models"][0]["name"]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(data))
    records = [str(golden(4)), str(file), str(golden(3))]
    assert kimi_llama.main(["bench", "--records", *records, "--page", str(tmp_path / "page.md")]) == 1
    error = capsys.readouterr().err
    assert f"{file}: damaged: expected the key 'name'" in error and "golden" not in error
