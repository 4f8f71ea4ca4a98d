"""The report in its three forms: complete, self-contained, and without made-up numbers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from matplotlib.figure import Figure
from validate_case import FLASH, TOKENS, run_with

from kimi_gguf.convert.card.text import plain
from kimi_gguf.validate.gates import Evidence, judge
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.metrics import Summary
from kimi_gguf.validate.plots import Line, by_position
from kimi_gguf.validate.provenance import gguf_facts
from kimi_gguf.validate.report import (
    SCHEMA,
    Greedy,
    Report,
    Rival,
    Worst,
    error_text,
    share_text,
    to_html,
    to_json,
    to_markdown,
    write,
)
from kimi_gguf.validate.sample_text import BUILT_IN
from kimi_gguf.validate.tensors import Bounded, TensorProof

VOID = {"meta", "br", "img", "hr", "link", "input"}


@pytest.fixture(scope="module")
def report() -> Report:
    runs = [run_with(1e-3, flipped=3), run_with(1e-3, flipped=2, variant=FLASH)]
    upstream = [run_with(2e-3), run_with(2e-3, variant=FLASH)]
    tensors = TensorProof(exact=5, rounded=2)
    return Report(
        version="1.2.3",
        created="2026-01-02T03:04:05Z",
        seconds=1.0,
        gguf={
            "name": "model.gguf",
            "bytes": 10,
            "sha256": "ab" * 32,
            "type": "BF16",
            "lowest_type": "BF16",
            "tensors": 7,
        },
        checkpoint={"name": "folder", "parameters": 5, "files": [{"name": "a", "sha256": "cd" * 32}]},
        ids={"source": "a text", "count": TOKENS, "generated": 2, "sha256": "ef" * 32},
        engine={
            "kind": "patched",
            "backends": ["cpu"],
            "commit": "c0ffee",
            "package": "p==1",
            "archive_sha256": "12" * 32,
            "tree_sha256": "34" * 32,
            "patches": [{"name": "0001-x.patch", "subject": "Norms <&> constants"}],
        },
        machine={"processor": "Z80", "cores": 1, "memory_gib": 0.1, "system": "CP/M"},
        reference={"implementation": "plain", "precision": "float32", "torch": "2"},
        options=RunOptions(),
        floor_ubatch=48,
        runs=runs,
        rivals=[Rival("upstream llama.cpp", upstream, ""), Rival("other.gguf", [], "it aborts")],
        floor=run_with(1e-6).all,
        tensors=tensors,
        greedy=Greedy(2, 1, 1, 0.01),
        worst=[Worst(4, "before <b>", "x", "y", 0.5, 0.1, True, 1e-3)],
        gates=judge(Evidence("BF16", runs, upstream, tensors)),
    )


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return to_html(report)


def test_json_holds_every_figure_and_names_its_schema(report: Report) -> None:
    data = json.loads(to_json(report))
    assert data["schema"] == SCHEMA
    assert data["passed"] is report.passed is True
    run = data["runs"][0]
    assert run["all"]["positions"] == TOKENS
    assert run["all"].keys() == set(Summary.__dataclass_fields__)
    assert run["other_experts"]["positions"] == 3
    assert len(run["per_position"]["kld"]) == TOKENS
    assert data["gguf"]["sha256"] == "ab" * 32 and data["ids"]["sha256"] == "ef" * 32
    assert data["engine"]["tree_sha256"] == "34" * 32
    assert data["noise_floor"]["n_ubatch"] == 48
    assert "KL(reference || test)" in data["direction"]


def test_upstream_that_could_not_run_is_said(report: Report) -> None:
    rivals = [Rival("upstream llama.cpp", [], "killed"), Rival("other.gguf", [], "it aborts")]
    said = replace(report, rivals=rivals).unchecked
    assert set(said) - set(report.unchecked) == {
        "Upstream llama.cpp could not run, so this file was not compared with it."
    }


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    writer = gguf_py.GGUFWriter(tmp_path / "m\udcff.gguf", "kimi-linear")
    writer.add_name("Kimi?")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "m\udcff.gguf"
    file.write_bytes(file.read_bytes().replace(b"Kimi?", b"Kimi\xff"))
    facts = gguf_facts(file, lambda done, total: None)
    assert (facts["model"], facts["name"]) == (r"Kimi\udcff", r"m\udcff.gguf")


def test_nan_is_null_in_json_and_a_dash_in_text(report: Report) -> None:
    """No position has other experts, so these figures do not exist."""
    runs = [run_with(1e-3)]
    data = json.loads(to_json(replace(report, runs=runs)))
    assert data["runs"][0]["other_experts"]["nmse"] is None
    assert error_text(math.nan) == share_text(math.nan) == "–"


def test_html_is_well_formed_and_needs_no_other_file(html: str) -> None:
    check_nesting(html)
    assert html.count("data:image/svg+xml;base64,") == 4
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert attribute.startswith("data:")
    assert "@import" not in html and "url(" not in html


def test_html_shows_text_of_the_model_as_text(html: str) -> None:
    assert "before &lt;b&gt;" in html and "Norms &lt;&amp;&gt; constants" in html


def test_both_readable_forms_show_verdict_gates_hashes_and_noise_floor(report: Report, html: str) -> None:
    for text in (html, to_markdown(report)):
        assert re.search(r"\bPASS\b|: pass", text)
        for gate in report.gates:
            assert gate.title in text.replace("&#39;", "'")
        for said in ("ab" * 32, "noise floor", "upstream llama.cpp", "Z80", "c0ffee", "KL(reference || "):
            assert said in text


def test_both_readable_forms_say_what_the_size_of_a_perplexity_means(report: Report, html: str) -> None:
    for text in (html, to_markdown(report)):
        assert "Perplexity depends on the text as much as on the model" in text


def test_only_with_the_built_in_text_a_perplexity_is_said_to_be_its(report: Report, html: str) -> None:
    built_in = replace(report, ids={**report.ids, "source": BUILT_IN})
    for form in (to_markdown, to_html):
        assert "the built-in text for the demo" in form(built_in)
        assert "built-in" not in form(report)


def test_the_tokens_that_llama_cpp_generated_are_not_said_to_be_of_the_text(report: Report) -> None:
    given = replace(report, ids={**report.ids, "generated": 0})
    for form in (to_markdown, to_html):
        assert f"({TOKENS - 2} of a text and 2 generated by llama.cpp)" in form(report)
        assert "(a text)" in form(given) and "generated by llama.cpp)" not in form(given)


def test_one_is_no_plural(report: Report) -> None:
    for form in (to_markdown, to_html):
        assert "1 thread," in form(report) and "2 threads," in form(
            replace(report, options=RunOptions(threads=2))
        )


def test_marks_of_one_line_are_not_taken_for_those_of_all() -> None:
    """Expert mismatches are marked on the last line only."""
    lines = [Line(label, "#000000", run_with(1e-3, flipped=2).curves) for label in ("other", "this file")]
    for drawn, label in ((lines, "expert mismatch of this file"), (lines[1:], "expert mismatch")):
        axes = Figure().subplots()
        by_position(axes, drawn)
        assert axes.get_legend_handles_labels()[1][-1] == label


def test_a_noise_floor_of_exactly_0_is_explained(report: Report, html: str) -> None:
    said = "with another ubatch size, the logits are exactly the same"
    silent = replace(report, floor=run_with(0).all)
    assert said in to_markdown(silent) and said in to_html(silent)
    assert said not in to_markdown(report) and said not in html


def test_a_failed_gate_fails_the_report_and_is_shown(report: Report) -> None:
    bad = replace(report, gates=judge(Evidence("F32", report.runs, [], report.tensors)))
    assert not bad.passed
    assert "**FAIL**" in to_markdown(bad)
    assert json.loads(to_json(bad))["passed"] is False


def test_tensors_checked_by_their_nmse_are_shown_with_their_limits(report: Report) -> None:
    """Name, type, NMSE and limit of a tensor over its limit, and what was not checked, in all three forms."""
    tensors = TensorProof(exact=5)
    tensors.bounded = [
        Bounded("blk.1.attn_q.weight", "Q4_K", 0.0052, 0.06, 0.013, 0.5),
        Bounded("blk.1.attn_output.weight", "Q4_K", 0.973, 0.06, 1.0, 0.5),
        Bounded("blk.1.ffn_up.weight", "Q2_K", 0.1, 0.3, 0.4, None),
    ]
    failure = "blk.1.attn_output.weight (Q4_K): NMSE: expected at most 0.06, found 0.973"
    tensors.fail(failure)
    gates = judge(Evidence("Q4_K", report.runs, [], tensors))
    bad = replace(
        report, gguf={**report.gguf, "type": "Q4_K", "lowest_type": "Q4_K"}, tensors=tensors, gates=gates
    )
    assert not bad.passed and not tensors.proved
    data, markdown, html = json.loads(to_json(bad)), to_markdown(bad), to_html(bad)
    assert [each["nmse"] for each in data["tensors"]["bounded"]] == [0.0052, 0.973, 0.1]
    for said in (
        failure,
        "No limits of the logits exist for Q4_K except the error of upstream.",
        "3 tensors were checked only by their NMSE",
    ):
        assert said in "".join(data["tensors"]["failures"] + data["unchecked"])
        assert said in html
        assert (plain(said) if said == failure else said) in markdown  # names of tensors are escaped
    assert "No limits of the logits exist for Q4_K." in replace(bad, rivals=[]).unchecked
    assert "| Q4_K | 2 | 0.973 | 0.06 | 1 | 0.5 |" in markdown
    assert "| Q2_K | 1 | 0.1 | 0.3 | 0.4 |  |" in markdown
    check_nesting(html)


def test_nothing_is_said_to_be_unchecked_if_everything_is(report: Report) -> None:
    assert report.unchecked == [] and json.loads(to_json(report))["tensors"]["proved"]
    assert "checked only" not in to_markdown(report) + to_html(report)


def test_a_rival_that_does_not_run_is_said(html: str) -> None:
    assert "other.gguf</b> cannot run: it aborts" in html


def test_the_first_diverging_layer_is_named(report: Report) -> None:
    assert report.diverging is None
    bad = replace(report, runs=[run_with(0.1)])
    assert bad.diverging is not None and bad.diverging.layer == 0
    assert "The first layer that diverges is 0 (KDA)" in to_html(bad)


def test_write_makes_the_folder_and_three_files(report: Report, tmp_path: Path) -> None:
    html = write(report, tmp_path / "a" / "b")
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize("renamed", range(3))
def test_after_a_kill_the_pages_are_those_of_the_json(
    renamed: int, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON that is newer than its pages would stay so forever: its figures are taken for the file's."""
    write(replace(report, gguf={**report.gguf, "sha256": "99" * 32}), tmp_path)
    rename, renames = Path.replace, iter(range(3))

    def killed(path: Path, target: Path) -> Path:
        if next(renames) == renamed:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(report, tmp_path)
    names = {path.name for path in tmp_path.iterdir() if "99" * 32 not in path.read_text()}
    assert "report.json" not in names and len(names) == renamed
    assert not (tmp_path / "report.json").exists()  # nor the old one


def test_what_a_killed_run_left_is_removed(report: Report, tmp_path: Path) -> None:
    (tmp_path / ".report.abcd").mkdir()
    (tmp_path / ".report.abcd" / "report.md").write_text("a part")
    write(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.14e-13, "4.1e-13"), (0.0, "0"), (0.0123, "0.012"), (2.18, "2.2"), (9.99e-3, "1.0e-2")],
)
def test_errors_are_shown_in_two_digits(value: float, text: str) -> None:
    assert error_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.0, "100 %"), (0.99999, "99.99 %"), (0.98765, "98.77 %")])
def test_a_share_never_rounds_up_to_all(value: float, text: str) -> None:
    assert share_text(value) == text


def check_nesting(html: str) -> None:
    """Every opened element is closed, in the correct order."""

    class Nesting(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in VOID:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    parser = Nesting()
    parser.feed(html)
    assert not parser.open
