"""`kimi-llama bench` on a device: the CPU with separate memory (native/second_backend.cpp) replaces a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench_case import TINY, bench, record
from native_program import ROOT, compile_backend

from kimi_gguf.bench import device as devices
from kimi_gguf.bench.device_operators import parsed
from kimi_gguf.bench.models import bench_folder
from kimi_gguf.bench.page import device_operators_tables, write_page
from kimi_gguf.bench.record import load
from kimi_gguf.bench.roofline import Demand, Peaks
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.compiling import advice
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.tools.bench_gpu import TESTED

ON = ("--device", "SECOND0", *TINY, "--seconds", "0.01")
DEVICE = {"backend": "cuda", "name": "CUDA0", "description": "NVIDIA Something", "memory": 80 << 30, "free": 79 << 30,
          "driver": "NVIDIA 1.2"}  # fmt: skip


@pytest.fixture
def backend(engine: Engine, upstream: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_BACKEND_PATH", str(compile_backend(engine, tmp_path)))


@pytest.mark.engine
@pytest.mark.usefixtures("backend")
def test_both_builds_compute_every_layer_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, file, page = tmp_path / "computed", tmp_path / "record.json", tmp_path / "page.md"
    monkeypatch.setenv("SECOND_LOG", str(computed))
    sizes = ("--batch", "1,40", "--depth", "0,16", "--cache-type", "f16,q8_0", "--ubatch", "32")
    bench(*ON, *sizes, "--json", str(file), "--page", str(page))
    lines = set(computed.read_text().splitlines())
    assert {"SECOND0 KDA_SCAN", "SECOND0 GATED_DELTA_NET"} <= lines, "patched and upstream"
    (data,) = load(file)
    assert data["device"] == {"backend": "cpu", "name": "SECOND0", "description": "the CPU with memory of its own",
                              "memory": 4 << 30, "free": 4 << 30, "driver": None}  # fmt: skip
    (model,) = data["models"]
    assert len(model["cells"]) == 8
    for cell in model["cells"]:
        variants = {"patched", "upstream"} | ({"upstream -fa 0"} if cell["cache_type"] == "f16" else set())
        assert set(cell["samples"]) | set(cell["ruled_out"]) == variants
        assert (cell["device"], cell["ubatch"]) == ("SECOND0", 32)
        assert cell["floor"]["seconds"] > 0
    for loaded in model["about"]["load"].values():  # only the token embeddings are on the CPU
        assert loaded["memory"]["weights"]["SECOND0"] > 10 * loaded["memory"]["weights"].get("CPU", 0)
    assert model["about"]["fallbacks"] == {}
    text = page.read_text()
    assert "# Bench on the CPU with memory of its own" in text
    assert "| tg at 16, ubatch 32, q8_0 cache |" in text
    assert data["checkout"] in text and data["engines"]["patched"]["commit"] in text
    assert str(tmp_path) not in text


@pytest.mark.engine
@pytest.mark.usefixtures("backend")
def test_fallbacks_on_the_device_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIMI_OPS", raising=False)
    monkeypatch.setenv("SECOND_REFUSES", "KDA_SCAN")
    page = tmp_path / "page.md"
    bench(*ON, "--batch", "1", "--depth", "0", "--page", str(page))
    assert "Falls back: kda: operators not used, upstream's graph instead: SECOND0" in page.read_text()


@pytest.mark.engine
@pytest.mark.usefixtures("backend")
def test_cells_and_variants_that_do_not_fit_in_memory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECOND_MEMORY", "64")
    file = tmp_path / "record.json"
    ended = bench(*ON, "--batch", "300", "--depth", "2000,30000", "--json", str(file))
    assert "1 × 30000 tokens (f16 cache) do not fit the device: caches of " in ended.stderr
    assert "upstream -fa 0 is left out: upstream: llama.cpp cannot make a context: SECOND0" in ended.stderr
    (model,) = load(file)[0]["models"]
    (cell,), (missing,) = model["cells"], model["about"]["not_measured"]
    assert (cell["depth"], missing["depth"]) == (2000, 30000)
    assert "do not fit the device: caches of " in missing["reason"]
    assert set(model["about"]["left_out"]) == {"upstream -fa 0"}
    assert set(cell["samples"]) | set(cell["ruled_out"]) == {"patched", "upstream"}
    monkeypatch.setenv("SECOND_MEMORY", "8")
    ended = bench(*ON, "--batch", "1", "--depth", "0", status=1)
    assert "too large to compare builds on SECOND0" in ended.stderr


@pytest.mark.engine
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        ("--device CUDA7", "no device CUDA7", 1),
        ("--device CPU", "no device CPU", 1),
        ("--device SECOND0 --hybrid", "on the CPU only", 2),
    ],
)
def test_unknown_devices_and_what_they_do_not_measure(words: str, message: str, status: int) -> None:
    ended = bench(*words.split(), status=status)
    assert message in ended.stderr and "Traceback" not in ended.stderr


def rehearse(out: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "bench-gpu", "--rehearse", "--out", out, *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def states(out: Path) -> dict[str, str]:
    """What --list says of each stage."""
    return {line.split()[0]: line.split()[1] for line in rehearse(out, "--list").stdout.splitlines()}


@pytest.mark.engine
def test_bench_gpu_tests_and_times_operators_and_writes_a_page(
    tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    out = tmp_path / "out"
    ended = rehearse(out)
    assert ended.returncode == 0, ended.stderr
    for operator in TESTED:
        (line,) = [line for line in ended.stdout.splitlines() if line.startswith(f"bench-gpu: {operator}: ")]
        passed, _, total = line.split()[2].partition("/")
        assert passed == total and int(passed) > 3 and "0 not supported" in line
    page = (out / "bench-gpu.md").read_text()
    headings = ("## Peak rates of the device", "KDA_SCAN: head_size")
    for part in (*headings, "| pp150 at 64 |", "| tg at 96, q8_0 cache |"):
        assert part in page
    rows = [row for file in out.glob("times-*.json") for row in load(file)[0]["device_operators"]]
    by = {row["operator"]: row for row in rows}
    assert set(by) == {"KDA_CONV", "KDA_SCAN", "FLASH_ATTN_EXT", "LATENT_ATTN", "GATED_DELTA_NET", "MUL_MAT"}
    assert all(row["patched"] > 0 for row in rows)
    assert by["KDA_SCAN"]["upstream"] is None and by["GATED_DELTA_NET"]["upstream"] > 0
    assert by["GATED_DELTA_NET"]["parameters"] == "kda=1,n_seq_tokens=1"
    assert by["MUL_MAT"]["parameters"] == "type=Q4_0,n_columns=512,n_rows=2304"
    assert by["MUL_MAT"]["upstream"] > 0

    # finished stages are not run again; one whose output was changed is, and so are those of another model
    assert set(states(out).values()) == {"finished"}
    before = (out / "test-KDA_CONV.txt").stat().st_mtime_ns
    (out / "times-KDA_CONV.json").write_text("{}")
    assert [name for name, state in states(out).items() if state == "left"] == ["times-KDA_CONV"]
    ended = rehearse(out)
    again = [
        line for line in ended.stdout.splitlines() if line.startswith("bench-gpu: ") and ":" not in line[11:]
    ]
    assert again[0] == "bench-gpu: times-KDA_CONV" and len(again) == 2, "and the page"
    assert (out / "test-KDA_CONV.txt").stat().st_mtime_ns == before
    model = next(bench_folder().rglob("models/*.gguf"))
    listed = rehearse(out, model, "--list").stdout.splitlines()
    assert {line.split()[0].partition("-")[0] for line in listed if "left" in line} == {"model"}


@pytest.mark.engine
def test_a_wrong_operator_on_the_device_ends_bench_gpu(
    tmp_path: Path, engine: Engine, upstream: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECOND_SPOILS", "KDA_SCAN")
    out = tmp_path / "out"
    ended = rehearse(out)
    assert ended.returncode == 1
    assert "KDA_SCAN fails on the device" in ended.stderr and "FAIL" in ended.stderr
    assert "bench-gpu: KDA_CONV: " in ended.stdout and "LATENT_ATTN" not in ended.stdout
    assert not list(out.glob("*.json"))
    found = states(out)
    assert (found["test-KDA_CONV"], found["test-KDA_SCAN"]) == ("finished", "left")


@pytest.mark.engine
def test_a_stage_of_bench_gpu_ends_at_its_limit_and_is_left(
    tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    ended = rehearse(
        tmp_path / "out", "--stage", "test-KDA_SCAN", "--stage", "times-KDA_CONV", "--limit", "0.3"
    )
    assert ended.returncode == 3, ended.stderr
    assert "test-KDA_SCAN did not end within 0 s; raise --limit" in ended.stderr
    assert "bench-gpu: left: test-KDA_SCAN times-KDA_CONV; run the same command again" in ended.stdout
    assert not list((tmp_path / "out").glob("*.json")) and not list((tmp_path / "out").glob("test*.txt"))
    ended = rehearse(tmp_path / "out", "--stage", "test-KDA_CONV", "--total", "0.000001")
    assert (ended.returncode, "left: test-KDA_CONV" in ended.stdout) == (3, True)


def test_a_device_s_floor_uses_the_rate_of_its_fastest_type() -> None:
    demand = Demand(1e9, 0.0, 1e6, {"Q4_0": 4e12, "F32": 1e12}, 5e12, 0.0)
    gpu = Peaks(threads=0, read=1e12, f32=1e13, int8=2e14, bf16=4e14, f16=5e14)
    assert demand.floor(gpu) == (pytest.approx(0.02), "compute")
    cpu = Peaks(threads=2, read=1e12, f32=1e13, int8=2e14, bf16=4e14)
    assert demand.floor(cpu)[0] == pytest.approx(4e12 / 2e14 + 1e12 / 1e13 + 5e12 / 1e13)


def test_the_output_of_test_backend_ops_is_parsed() -> None:
    fields = "test_time, op_name, op_params, supported, time_us"
    line = "INSERT INTO test_backend_ops ({}) VALUES ('now', 'KDA_SCAN', '{}', '{}', '{}');"
    text = "\n".join([
        "CREATE TABLE", "failed to allocate tensors", line.format(fields, "n=1,ne=[1,2]", 1, 12.5),
        line.format(fields, "n=2,ne=[1,2]", 0, 0.0), line.format(fields, "name=a=1;b=2,type=f32,ne=[3]", 1, 7.0),
    ])  # fmt: skip
    assert parsed(text) == {("KDA_SCAN", "n=1,ne=[1,2]"): 12.5, ("KDA_SCAN", "a=1,b=2"): 7.0}


def test_a_table_of_operators_shows_the_parameters_that_differ() -> None:
    rows = [
        {"operator": "A", "parameters": f"type=f16,ne=[1,2],n={n}", "upstream": upstream, "patched": 500.0}
        for n, upstream in ((1, 1000.0), (2, None))
    ]
    ((heading, table),) = device_operators_tables(rows)
    assert heading == "A: type=f16, ne=[1,2]"
    assert table[1:] == [("n=1", "1 ms", "500 µs", "2.00"), ("n=2", "not available", "500 µs", "")]


def on_device(ratio: float, **cell: Any) -> dict[str, Any]:
    made = record("2026-01-01", ratio)
    made |= {"device": DEVICE, "checkout": "abc", "device_operators": []}
    made["models"][0]["cells"][0] |= {"device": "CUDA0", "ubatch": 512, "floor": None, **cell}
    return made


def test_a_page_names_the_device_and_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    write_page([on_device(2.0)], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "# Bench on NVIDIA Something\n" in text
    assert "(CUDA0, 80 GiB, driver NVIDIA 1.2, cuda)" in text and "kimi-gguf abc" in text
    assert "The device's peak rates were not measured." in text
    assert "| tg at 0 | 10 ± 1.0 % | 20 ± 1.0 % | 2.00 | unknown |  |" in text


def test_a_page_is_of_one_machine(tmp_path: Path) -> None:
    one, other = record("2026-01-01", 2.0), record("2026-01-02", 2.0)
    other["machine"] = other["machine"] | {"processor": "two"}
    with pytest.raises(EngineError, match=r"found one, 2 cores, CPU and two, 2 cores, CPU;"):
        write_page([one, other], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_the_driver_s_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.driver_of("cuda") is None
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "580.1"\necho "580.1"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert devices.driver_of("cuda") == "NVIDIA 580.1"


def test_advice_for_a_build_that_failed() -> None:
    log = 'CMake Error:\n  Target "ggml-cuda" links to:\n\n    CUDA::cublas\n\n  but the target was not found.\n'
    assert "whole CUDA toolkit, with cuBLAS" in advice(log)
    assert "no memory left" in advice("c++: fatal error: Killed signal terminated program cc1plus")
    assert advice("error: expected ';'") == "correct what the log shows, then build again"
