"""A stored report is read, and nothing else. tests/golden has one, written when the schema was defined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_validate_report import report as report_fixture

from kimi_gguf.validate.cli import main
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.report import SCHEMA, Report, to_json
from kimi_gguf.validate.stored import read_report

GOLDEN = Path(__file__).parents[1] / "golden"
REPORT = GOLDEN / "report.json"
report = report_fixture


def test_a_report_gives_the_figures_that_its_json_has() -> None:
    data = json.loads(REPORT.read_text())
    found = read_report(REPORT)
    run = data["runs"][0]
    assert (found.name, found.bytes, found.passed) == ("model.gguf", 10, True)
    assert found.headline.all.kld_mean == run["all"]["kld_mean"] > 0
    assert found.headline.curves.nmse.tolist() == run["per_position"]["nmse"]
    assert [layer.kind for layer in found.headline.curves.layers] == ["kda", "kda", "mla"]
    assert found.headline.curves.differs.sum() == 3
    assert len(found.gates) == len(data["gates"])


def test_a_report_says_which_versions_made_it(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(to_json(report))
    found = read_report(tmp_path / "report.json")
    assert found.engine == "kimi-gguf 1.2.3, llama.cpp c0ffee (patched, source tree 343434343434)"


def test_a_report_has_every_field_of_the_golden_one(report: Report) -> None:
    """A field may be added; if one is removed or changes its type, the schema needs a new number."""

    def shape(data: Any) -> Any:
        if isinstance(data, dict):
            return {name: shape(value) for name, value in data.items()}
        return shape(data[0]) if isinstance(data, list) and data else type(data).__name__

    def contains(found: Any, expected: Any, where: str) -> None:
        if isinstance(expected, dict):
            assert expected.keys() <= found.keys(), where
            for name in expected:
                contains(found[name], expected[name], f"{where}.{name}")
        else:
            assert found == expected, where

    found = json.loads(to_json(report))
    contains(shape(found), shape(json.loads(REPORT.read_text())), "report")


def test_a_new_report_is_read_back(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(to_json(report))
    found = read_report(tmp_path / "report.json")
    assert found.basis.schema == SCHEMA and found.passed == report.passed
    assert found.headline.all.nmse == pytest.approx(report.headline.all.nmse, rel=1e-5)
    assert math.isclose(found.floor.kld_mean, report.floor.kld_mean, rel_tol=1e-5)
    assert found.headline.curves.top1.tolist() == report.headline.at.top1.tolist()


def test_null_is_a_figure_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(REPORT.read_text())
    data["noise_floor"]["kld_mean"] = data["runs"][0]["layers"][0]["nmse"] = None
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert math.isnan(read_report(tmp_path / "report.json").floor.kld_mean)
    assert main(["show", str(tmp_path / "report.json")]) == 0
    assert "–" in capsys.readouterr().out


def test_show_prints_the_figures_of_several_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(REPORT), str(REPORT)]) == 0
    said = capsys.readouterr().out
    assert said.count("model.gguf, plain attention") == 2 and "pass, " in said
    assert "different tokens" not in said and "Perplexity depends on the text" in said


def test_show_tells_of_failed_gates_and_of_other_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(REPORT.read_text())
    data["passed"] = data["gates"][0]["passed"] = False
    data["ids"]["sha256"] = "00"
    data["gguf"]["name"] = "[red]\x1b[2Jx"
    (tmp_path / "bad.json").write_text(json.dumps(data))
    assert main(["show", str(REPORT), str(tmp_path / "bad.json")]) == 1
    said = capsys.readouterr().out
    assert "FAIL, " in said and "different tokens" in said and "[red] [2Jx" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a report"),
        (b"\xff", "not a report"),
        (b"[" * 100_000, "not a report"),
        (b"[]", "schema"),
        (b'{"schema": 3}', "schema"),
        (b'{"schema": "kimi-gguf/validation-report/2"}', "or a later one"),
        (b'{"schema": "kimi-gguf/validation-report/1"}', "damaged: found KeyError: 'gguf'"),
    ],
)
def test_what_is_not_a_report_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(ValidateError, match=r"report\.json: .*") as caught:
        read_report(file)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("gates",), []),
        (("gates", 0, "passed"), False),
        (("passed",), False),
        (("runs", 0, "all", "kld_mean"), 1e308),
        (("runs", 0, "all", "kld_mean"), -0.1),
        (("runs", 0, "all", "kld_p99"), math.nan),
        (("runs", 0, "all", "ppl_test"), math.inf),
        (("runs", 0, "all", "top1"), 1.01),
        (("runs", 0, "per_position", "nmse", 5), -1e-9),
        (("runs", 0, "per_position", "top1", 5), 1),
        (("runs", 0, "layers", 0, "layer"), 10**400),
        (("runs", 0, "layers", 0, "positions"), -1),
        (("gguf", "bytes"), 10**400),
    ],
)
def test_a_report_that_cannot_be_is_refused(
    place: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    """A verdict that is not that of the gates, and figures that nobody can have measured."""
    changed = data = json.loads(REPORT.read_text())
    for key in place[:-1]:
        changed = changed[key]
    changed[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ValidateError, match="damaged"):
        read_report(tmp_path / "report.json")


def _leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    return [path, *(leaf for key, value in items for leaf in _leaves(value, (*path, key)))]


def test_a_damaged_report_never_raises_another_error(tmp_path: Path) -> None:
    """Each value of a report is replaced by values of every type; what is not read may be anything."""
    data = json.loads(REPORT.read_text())
    file, refused = tmp_path / "report.json", 0
    for path in _leaves(data)[1:]:
        for value in (None, "x", 1, -1.5, True, [], {}, [[1]], 10**400):
            place = damaged = json.loads(json.dumps(data))
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            file.write_text(json.dumps(damaged))
            try:
                read_report(file)
            except ValidateError:
                refused += 1
    assert refused > 500
