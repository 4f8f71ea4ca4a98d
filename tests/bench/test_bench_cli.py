"""`kimi-llama bench` as a command: a tiny grid from end to end, its record and page, errors, Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_case import TINY, bench, command, record
from selection import some_of

from kimi_gguf.bench.merging import merged
from kimi_gguf.bench.page import MADE_BY, write_page
from kimi_gguf.bench.plot import MOST_NAME
from kimi_gguf.bench.record import load, save
from kimi_gguf.bench.report import markdown, one_line
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.toolchain import MAX_THREADS
from kimi_gguf.scripts import kimi_llama

WORKERS = "--workers 127.0.0.1:1"


@pytest.mark.engine
def test_a_tiny_grid_from_end_to_end(cache: Path, tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    sizes = ("--batch", "1,8", "--depth", "0,64", "--cache-type", "f16,q8_0")
    ended = bench(*TINY, *sizes, "--json", str(record), "--page", str(page))
    (data,) = load(record)
    (model,) = data["models"]
    cells = model["cells"]
    assert {(cell["cache_type"], cell["depth"], cell["batch"]) for cell in cells} == {
        (kind, depth, batch) for kind in ("f16", "q8_0") for depth in (0, 64) for batch in (1, 8)
    }
    for cell in cells:
        assert len(cell["samples"]["patched"]) >= 2
        assert cell["ratio"] == pytest.approx(
            cell["patched"]["tokens_per_second"] / cell["upstream"]["tokens_per_second"]
        )
        assert cell["floor"]["seconds"] > 0
        variants = set(cell["samples"]) | set(cell["ruled_out"])
        assert len(variants) == (5 if cell["cache_type"] == "f16" else 3)
    # after depth 64 all variants have the same state
    assert {variant.partition(", ")[0] for variant in model["about"]["shared"]} == {
        "patched", "upstream", "upstream -fa 0", "upstream --repack 0", "upstream --repack 0 -fa 0",
    }  # fmt: skip
    memory = next(iter(model["about"]["contexts"].values()))
    assert memory["kv"] and memory["recurrent"] and memory["compute"]
    text = page.read_text()
    assert "| tg at 64, 1 thread, q8_0 cache" in text
    assert "--batch 1,8 --depth 0,64" in text
    assert str(tmp_path) not in text and str(tmp_path) not in record.read_text()
    assert (tmp_path / "page.svg").is_file()
    assert "| tg at 64, 1 thread" in ended.stdout
    assert sorted(path.name.partition("-")[0] for path in (cache / "bench").iterdir()) == [
        "models", "programs", "states",
    ]  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize(
    "family",
    some_of(
        ("ling-3.0-tiny", "ling-3.0-flash", "glm-5.3-flash", "kimi-k3"),
        "ling-3.0-tiny",
        "glm-5.3-flash",
        "kimi-k3",
    ),
)
def test_every_variant_of_a_family_measures_the_same_logits(
    family: str, tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    record = tmp_path / "record.json"
    options = ("--type", "Q8_0", "--batch", "64", "--depth", "64", "--json", str(record))
    bench(*TINY, "--family", family, *options)
    (model,) = load(record)[0]["models"]
    assert len(model["cells"]) == 1
    shared = model["about"]["shared"]  # NMSE to patched after 64 tokens from one saved state
    assert len(shared) == 5
    assert max(shared.values()) < 0.05
    assert model["about"]["load"].keys() == {"patched", "upstream", "upstream --repack 0"}


@pytest.mark.engine
def test_one_process_at_a_time(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record = tmp_path / "record.json"
    tiny = [*TINY, "--type", "Q2_K", "--batch", "1,8", "--depth", "64"]
    ended = bench(*tiny, "--in-turns", "--json", str(record))
    (model,) = load(record)[0]["models"]
    everything = {"patched"} | {
        f"upstream{copy}{attention}" for copy in ("", " --repack 0") for attention in ("", " -fa 0")
    }
    for cell in model["cells"]:
        assert set(cell["samples"]) == everything
        assert {len(samples) for samples in cell["samples"].values()} == {2}
        assert cell["upstream"]["way"].startswith("upstream")
        assert cell["ratio"] == pytest.approx(
            cell["patched"]["tokens_per_second"] / cell["upstream"]["tokens_per_second"]
        )
    about = model["about"]
    assert set(about["load"]) == set(about["resident"]) == {name for name in everything if "-fa" not in name}
    assert all(each["peak"] >= each["private"] > 0 for each in about["resident"].values())
    assert len(about["shared"]) == len(everything)  # their logits after 64 tokens were compared
    assert about["load"]["patched"]["seconds"] > 0
    assert re.search(r"(?m)^\| patched \| \d", ended.stdout)


@pytest.mark.engine
def test_the_demo_and_a_file_of_one_s_own(
    cache: Path, tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    sizes = ("--batch", "1", "--depth", "0", "--threads", "1", "--seconds", "0.05")
    bench("--demo", *sizes)
    (file,) = (cache / "bench" / "models").glob("demo-Q8_0-*.gguf")
    bench(str(file), *sizes, "--json", str(tmp_path / "record.json"))
    assert len(load(tmp_path / "record.json")[0]["models"][0]["cells"]) == 1


@pytest.mark.engine
def test_several_sequences_decode_in_one_batch(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record = tmp_path / "record.json"
    bench(*TINY, "--batch", "1", "--depth", "64", "--sequences", "3", "--json", str(record))
    assert [cell["tokens"] for cell in load(record)[0]["models"][0]["cells"]] == [3]


@pytest.mark.engine
def test_cells_after_the_budget_are_reported(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record = tmp_path / "record.json"
    ended = bench(*TINY, "--batch", "1,8", "--depth", "0", "--budget", "0.001", "--json", str(record))
    reason = "the time of --budget was used up"
    assert f"Not measured: pp8 at 0, 1 thread: {reason}" in ended.stderr
    (model,) = load(record)[0]["models"]
    assert model["cells"] == []
    missing = [(each["batch"], each["reason"]) for each in model["about"]["not_measured"]]
    assert missing == [(1, reason), (8, reason)]


@pytest.mark.engine
def test_the_hybrid_against_all_mla(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    bench(*TINY, "--hybrid", "--depth", "4096,6000,9000", "--json", str(record), "--page", str(page))
    rows = load(record)[0]["hybrid"]["rows"]
    assert [row["depth"] for row in rows] == [4096, 6000, 9000]
    for row in rows:
        one_layer = (row["depth"] + 1) * 576 * 2
        assert row["cache_bytes"] == {"3:1": one_layer, "all MLA": 4 * one_layer}
        assert row["seconds"]["all MLA"] > row["seconds"]["3:1"]
    assert "1048576 (extrapolated)" in page.read_text()


def started(moment: str, *words: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A bench that would measure for minutes, once it reports `moment`, and pidfds of the processes that it started."""
    process = subprocess.Popen(
        command(*TINY, "--seconds", "600", "--batch", "1", *words),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if f"] {moment}" in line:
            break
    assert f"] {moment}" in seen, seen
    time.sleep(0.5)
    workers = [os.pidfd_open(pid) for pid in children(process.pid)]
    assert workers
    return process, workers


def running_after(seconds: float, workers: list[int]) -> list[int]:
    """Those of the processes that still run after so long. Closes the pidfds.

    A pidfd cannot mean another process: on a small machine other tests use up all ids of processes within seconds.
    """
    deadline = time.monotonic() + seconds
    left = []
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], max(0, deadline - time.monotonic()))
        left += [] if ended else [worker]
        os.close(worker)
    return left


@pytest.mark.engine
@pytest.mark.parametrize(("moment", "depth"), [("filling", "60000"), ("tg at", "0")])
def test_ctrl_c_ends_everything(
    moment: str, depth: str, cache: Path, tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    record = tmp_path / "record.json"
    process, workers = started(moment, "--depth", depth, "--json", str(record))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130, rest
    assert "interrupted" in rest and "Traceback" not in rest
    assert not running_after(0, workers)
    assert not record.exists()
    assert not [path for path in (cache / "bench").rglob("*") if "unfinished" in path.name]
    assert not list((cache / "bench").glob("states/*"))


@pytest.mark.engine
def test_a_killed_bench_leaves_no_process_behind(engine: Engine, upstream: Engine) -> None:
    process, workers = started("tg at", "--depth", "0")
    process.kill()
    process.communicate()
    assert not running_after(10, workers)


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        ("absent.gguf", "absent.gguf: no such file", 1),
        ("text.gguf", "text.gguf: not a GGUF file", 1),
        ("--json absent/record.json", "absent/record.json: its folder does not exist", 1),
        ("--libraries absent", "absent: no libraries of a build", 1),
        ("--records text.gguf --page page.md", "text.gguf: not a record of the bench", 1),
        ("--records text.gguf", "needs --page", 2),
        ("--records absent.json --page page.md", "bench: found No such file or directory; name", 1),
        (
            "--draw absent.toml",
            "expected a TOML file such as docs/bench.toml, found No such file or directory",
            1,
        ),
        ("--draw .", "found Is a directory; name another file", 1),
        (
            "--workers 127.0.0.1:1",
            "127.0.0.1:1: no connection: expected a worker that listens there, found",
            1,
        ),
        ("--demo --type Q4_0", "Q8_0 or BF16", 2),
        (f"{WORKERS} --json a.json", "found --json;", 2),
        (f"{WORKERS} --record=a.json", "found --record;", 2),
        (f"{WORKERS} --page a.md --seconds 1", "found --page, --seconds;", 2),
        (f"{WORKERS} --sequences 2", "found --sequences;", 2),
        (f"{WORKERS} --in-turns", "found --in-turns;", 2),
        (f"{WORKERS} --grid", "found --grid;", 2),
        (f"{WORKERS} --hybrid", "found --hybrid;", 2),
        (f"{WORKERS} --draw bench.toml", "found --draw;", 2),
        (f"{WORKERS} --records a.json", "found --records;", 2),
        (f"{WORKERS} --threads 1,2", "expected one value of --threads, found 1,2;", 2),
        (f"{WORKERS} --cache-type f16,q8_0", "expected one value of --cache-type, found f16,q8_0;", 2),
    ],
)
def test_errors_are_one_message_and_a_status(
    words: str,
    message: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kimi_gguf.bench.run.select", None)  # no build is made
    Path("text.gguf").write_text("hello")
    assert kimi_llama.main(["bench", *words.split()]) == status
    found = capsys.readouterr()
    assert message in found.err
    assert "Traceback" not in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.gguf"]


@pytest.mark.parametrize(
    "words", ["--batch 0", "--depth -1", "--type Q9", "--cache-type f17", "--seconds 0", "--layers x"]
)
def test_wrong_arguments_have_status_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        kimi_llama.main(["bench", *words.split()])
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected", "ending"),
    [
        ("bench model.gguf --threads 1,{}", "whole numbers", ", separated by commas"),
        ("worker --threads {}", "one number", ""),
    ],
)
def test_threads_are_at_least_one_and_at_most_what_ggml_has_room_for(
    words: str, expected: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    header = (upstream_source() / "llama.cpp/ggml/include/ggml.h").read_text()
    assert re.search(rf"#define GGML_MAX_N_THREADS +{MAX_THREADS}\n", header)
    parse = kimi_llama._parser().parse_args
    parse(words.format(MAX_THREADS).split())
    for number in (0, MAX_THREADS + 1):
        given = words.format(number).split()
        with pytest.raises(SystemExit) as ended:
            parse(given)
        assert ended.value.code == 2
        said = f"argument --threads: '{given[-1]}': expected {expected} from 1 to {MAX_THREADS}{ending}\n"
        assert capsys.readouterr().err.endswith(said)


def test_an_option_for_one_number_refuses_several(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kimi_llama.main(["bench", "--ubatch", "1,2"])
    assert capsys.readouterr().err.endswith("argument --ubatch: '1,2': expected one number from 1 on\n")


@pytest.mark.parametrize("words", ["--depth 0", "--batch 1", "--type Q8_0"])
def test_single_matmuls_have_no_options_of_models(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kimi_llama.main(["bench", "--matmuls", *words.split()]) == 2
    assert "leave out --type, --batch and --depth" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--layers=4", "--type=Q8_0", "--shapes=tiny"])
def test_a_file_has_no_options_of_generated_models(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_gguf.bench.run.open_model", lambda _: None)
    assert kimi_llama.main(["bench", "model.gguf", option]) == 2
    said = "model.gguf is measured as it is: expected no options of a generated model"
    assert f"{said}, found {option.partition('=')[0]};" in capsys.readouterr().err


def test_a_worker_is_named_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert kimi_llama.main(["bench", "--workers", "10.0.0.2:50052,foo"]) == 2
    assert "expected HOST:PORT,... such as 10.0.0.2:50052, found foo; " in capsys.readouterr().err


@pytest.fixture
def one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a model and a llama-bench that notes its arguments; there is no upstream."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    Path("llama-bench").write_text('#!/bin/sh\necho "$@" > arguments\n')
    Path("llama-bench").chmod(0o755)
    engine = SimpleNamespace(bin=tmp_path)
    monkeypatch.setattr("kimi_gguf.bench.run.exists_or_compiles", lambda *_: False)
    monkeypatch.setattr("kimi_gguf.bench.run.chosen_build", lambda _: engine)
    monkeypatch.setattr("kimi_gguf.bench.run.open_model", lambda _: None)
    return tmp_path


def test_one_build_is_measured_by_llama_bench(one_build: Path) -> None:
    assert kimi_llama.main(["bench", "model.gguf", "--depth=0,64", "--threads", "1,2"]) == 0
    assert (one_build / "arguments").read_text() == "-m model.gguf -fa 1 -t 1,2 -d 0,64\n"


def test_one_build_does_not_measure_other_files_than_the_named_one(
    one_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama-bench separates names by commas."""
    assert kimi_llama.main(["bench", "model.gguf,b.gguf"]) == 1
    assert "model.gguf,b.gguf: llama-bench reads this as several names; rename it" in capsys.readouterr().err
    assert not (one_build / "arguments").exists()


@pytest.mark.parametrize(
    "words", ["--json a.json", "--json=a.json", "--record a.json", "--page a.md", "--batch 8", "--in-turns"]
)
def test_one_build_has_no_record_and_no_other_options(
    one_build: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(one_build.iterdir())
    assert kimi_llama.main(["bench", "model.gguf", "--depth", "0", *words.split()]) == 1
    error = capsys.readouterr().err
    assert f"found {words.partition(' ')[0].partition('=')[0]};" in error and "which makes no record" in error
    assert sorted(one_build.iterdir()) == before, "nothing was measured or written"


def test_a_page_takes_equal_cells_from_the_latest_record(tmp_path: Path) -> None:
    records = [record("2026-01-02", 2.0), record("2026-01-01", 1.0), record("2026-01-01", 3.0, depth=64)]
    records[0]["engines"] = {"patched": records[0]["engines"]["patched"] | {"commit": "56789-ours"}}
    assert [cell["ratio"] for cell in merged(records)["m"]["cells"]] == [2.0, 3.0]
    for i, each in enumerate(records):
        save([each], tmp_path / f"{i}.json")
    write_page([load(tmp_path / f"{i}.json")[0] for i in range(3)], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| tg at 0, 2 threads | 10 ± 1.0 % | 20 ± 1.0 % | 2.00 |" in text
    assert "Measured 2026-01-01 to 2026-01-02" in text
    commands = [
        f"{day}` ({build}-ours, kimi-gguf of an unknown commit, {day})"
        for day, build in (("2026-01-01", "01234"), ("2026-01-02", "56789"))
    ]
    assert re.findall(r"(?m)^- `kimi-llama bench (.*)", text) == commands


def test_the_memory_table_is_of_the_latest_record_with_the_largest_cache() -> None:
    records = [record(f"2026-01-0{day}", float(day)) for day in (1, 2, 3)]
    for each, kv in zip(records, (45.0, 45.0, 2.2), strict=True):
        each["models"][0]["about"]["contexts"] = {"patched, fa": {"kv": {"CPU": kv}, "of": each["created"]}}
    contexts = merged(records[::-1])["m"]["model"]["about"]["contexts"]
    assert contexts["patched, fa"]["of"] == records[1]["created"]


def test_files_of_other_sizes_with_one_name_are_models_of_their_own(tmp_path: Path) -> None:
    records = [record(f"2026-01-0{day}", float(day)) for day in (1, 2, 3)]
    for each, nbytes in zip(records, (100, 200, 100), strict=True):
        each["models"][0]["bytes"] = nbytes
    ratios = {title: [cell["ratio"] for cell in model["cells"]] for title, model in merged(records).items()}
    assert ratios == {"m, 100 bytes": [3.0], "m, 200 bytes": [2.0]}
    assert merged(records[::2]).keys() == {"m"}
    write_page(records, tmp_path / "page.md")
    assert re.findall(r"(?m)^## (m.*)", (tmp_path / "page.md").read_text()) == [*ratios]


def test_libraries_other_than_those_of_patched_have_sections_of_their_own(tmp_path: Path) -> None:
    records = [record(f"2026-01-0{day}", float(day)) for day in (1, 2)]
    records[1]["libraries"] = "bin"
    write_page(records, tmp_path / "page.md")
    own, found, theirs = (tmp_path / "page.md").read_text().partition("# Libraries in bin\n")
    assert found
    for text, ratio, other in ((own, "1.00", "2.00"), (theirs, "2.00", "1.00")):
        assert "## m\n" in text and f"| {ratio} |" in text and f"| {other} |" not in text


@pytest.mark.parametrize("name", ["a/b", "../b", "a|b", "a\nb", "a b", "$a_{$", "\ud800", "a" * 300])
def test_every_name_of_a_model_has_a_heading_and_a_row_of_the_picture(name: str, tmp_path: Path) -> None:
    made = record("2026-01-01", 2.0)
    made["models"][0]["name"] = name
    write_page([made], tmp_path / "page.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md", "page.svg"]
    assert len(re.findall(r"(?m)^## ", (tmp_path / "page.md").read_text())) == 3
    row = one_line(name)[:MOST_NAME].encode("utf-8", "replace").decode() or "unnamed"
    assert f">{row}</text>" in (tmp_path / "page.svg").read_text()


def test_a_cell_of_a_table_is_one_cell_on_one_line() -> None:
    assert markdown([("a", "b"), ("c|d\ne", "f")]) == "| a | b |\n| --- | --- |\n| c\\|d e | f |\n"


def test_other_work_marks_the_ratio_and_leaves_the_cell_s_name(tmp_path: Path) -> None:
    disturbed = record("2026-01-01", 2.0)
    disturbed["models"][0]["cells"][0]["others"] = 1.0
    write_page([disturbed], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| tg at 0, 2 threads | 10 ± 1.0 % | 20 ± 1.0 % | 2.00 * |" in text
    assert "* other work was running on the machine" in text


def test_a_page_names_cells_that_were_not_measured_with_the_reason(tmp_path: Path) -> None:
    made = record("2026-01-01", 2.0)
    (model,) = made["models"]
    names = ("cache_type", "sequences", "threads", "batch", "ubatch", "device")
    options = {name: model["cells"][0][name] for name in names}
    missing = [options | {"depth": 64, "reason": "no room"}, options | {"depth": 0, "reason": "no time"}]
    model["about"] |= {"not_measured": missing, "left_out": {"upstream -fa 0": "no memory"}}
    write_page([made], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "- Not measured: tg at 64, 2 threads: no room.\n" in text
    assert "- Not run: upstream -fa 0: no memory.\n" in text
    assert "no time" not in text, "another record has measured it"
    model["cells"] = []
    write_page([made], tmp_path / "page.md")
    assert "- Not measured: tg at 0, 2 threads: no time.\n" in (tmp_path / "page.md").read_text()


def test_a_page_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"old\n{MADE_BY}")
    broken = record("2026-01-01", 1.0)
    del broken["models"][0]["cells"][0]["floor"]
    with pytest.raises(KeyError):
        write_page([broken], page)
    assert page.read_text().startswith("old\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
