"""docs/gpu-roofline.md is what the model makes of the stored counts, and says if these are of earlier sources."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_case import record

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.scripts import cuda_counts
from kimi_gguf.scripts.cuda_counts import KERNELS, Kernel
from kimi_gguf.scripts.cuda_roofline import CHANGED, COUNTS, PAGE, as_json, main, measured_times, page
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, GPUS
from kimi_gguf.scripts.gpu_model import FILL, LAUNCH, Launch, Model, attend, flash_attention, mma_cycles

AGAIN = "run: .venv/bin/python -m kimi_gguf.scripts.cuda_roofline"
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
GEFORCE = next(gpu for gpu in GPUS if gpu.name == "RTX 4090")


def counts(**phase: Any) -> dict[str, Any]:
    """Counts of one kernel with one phase."""
    use = {"registers": 64, "shared": 0, "main": [{"cycles": 0, "issued": 0, "mma": {}} | phase], "rest": []}
    return {"constants": {}, "kernels": {"k": {str(gpu.architecture): use for gpu in GPUS}}}


def test_the_page_is_of_the_stored_counts() -> None:
    stored = json.loads(COUNTS.read_text())
    assert PAGE.read_text() == page(stored, {}), f"{AGAIN} --stored"


def test_the_page_says_whether_the_kernels_have_changed_since() -> None:
    stored = json.loads(COUNTS.read_text())
    assert CHANGED in page(stored | {"sources": "other"}, {})
    assert CHANGED not in page(stored | {"sources": cuda_counts.sources_digest()}, {})


def test_counting_again_gives_the_stored_counts() -> None:
    try:
        compiler, _ = cuda_counts.compiler(), cuda_counts.find_nvdisasm()
    except KimiError as error:
        if os.environ.get("KIMI_CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    stored = json.loads(COUNTS.read_text())
    if stored["compiler"] != compiler:
        pytest.skip(f"the stored counts are of {stored['compiler']}, this is {compiler}")
    if stored["sources"] != cuda_counts.sources_digest():
        assert CHANGED in PAGE.read_text()
        return
    found = cuda_counts.count((90,), only="kda/cuda/kda-scan-steps.cu")
    assert set(found) == {"steps", "finish"}
    for name, of_architectures in found.items():
        assert of_architectures["90"] == stored["kernels"][name]["90"], AGAIN


def test_every_kernel_is_stored_and_devices_that_are_not_counted_are_named() -> None:
    stored = json.loads(COUNTS.read_text())
    assert set(stored["kernels"]) == {each.name for each in KERNELS}
    assert json.loads(as_json(stored)) == stored
    model, text = Model(stored), PAGE.read_text()
    known = [gpu.name for gpu in GPUS if model.knows(gpu)]
    assert {"H200", "H100"} <= set(known)
    for gpu in GPUS:
        assert (f"### {gpu.name}\n" in text) == (gpu.name in known)
        assert (gpu.name in text.partition("Not counted yet: ")[2].partition("\n")[0]) == (
            gpu.name not in known
        )


@pytest.mark.parametrize(
    ("phase", "cycles"),
    [
        ({"cycles": 9000}, 9000),
        ({"issued": 1000}, 2 * 1000),  # two warps for each of four schedulers
        ({"mma": {"HMMA.16816.F32.BF16": 100}}, 2 * 100 * 32),
        ({"mma": {"HMMA.16816.F16": 100}}, 2 * 100 * 16),
        ({"mma": {"HMMA.1688.F32": 100}}, 2 * 100 * 16),
        ({"shared": 100}, 8 * 100),  # shared by all warps
        ({"quarter": 100}, 2 * 100 * 8),
        ({"fma": 100}, 2 * 100),
        ({"alu": 100}, 2 * 100 * 2),
    ],
)
def test_a_phase_takes_as_long_as_its_slowest_unit(phase: dict[str, Any], cycles: float) -> None:
    model = Model(counts(**phase))
    seconds = model.estimate(Launch("k", 1, 8, 10, 0), GEFORCE).seconds
    assert seconds == pytest.approx(max(10 * cycles / GEFORCE.clock, FILL) + LAUNCH)


def test_blocks_overlap_until_a_unit_is_full_and_memory_is_a_limit() -> None:
    model = Model(counts(cycles=1000, issued=300))

    def cycles(blocks: int) -> float:
        return (model.estimate(Launch("k", blocks, 4, 100, 0), H100).seconds - LAUNCH) * H100.clock

    assert model.resident(Launch("k", 1, 4, 1, 0), H100) == 8, (
        "64 registers of 128 threads: an eighth of them"
    )
    assert cycles(132) == cycles(3 * 132) == pytest.approx(100 * 1000)
    assert cycles(4 * 132) == pytest.approx(100 * 4 * 300)
    assert cycles(16 * 132) == pytest.approx(2 * cycles(8 * 132))
    found = model.estimate(Launch("k", 1, 4, 1, 1e9), H100)
    assert (found.bound, found.seconds) == (
        "memory",
        pytest.approx(1e9 / (DRAM_SHARE * 3.35e12) + FILL + LAUNCH),
    )


def test_shared_memory_and_threads_limit_the_blocks() -> None:
    model = Model(counts())
    assert model.resident(Launch("k", 1, 8, 1, 0, shared=90 << 10), GEFORCE) == 1
    assert model.resident(Launch("k", 1, 8, 1, 0, shared=90 << 10), H100) == 2
    assert model.resident(Launch("k", 1, 32, 1, 0), GEFORCE) == 1, "1024 of 1536 threads"


def test_mma_has_its_published_rate() -> None:
    for name, teraflops in (("A100", 312), ("RTX 3090", 71), ("RTX 4090", 165.2), ("RTX 5090", 209.5)):
        (gpu,) = (gpu for gpu in GPUS if gpu.name == name)
        cycles = mma_cycles("HMMA.16816.F32", gpu)
        rate = 2 * 16 * 8 * 16 / cycles * 4 * gpu.multiprocessors * gpu.clock
        assert rate / 1e12 == pytest.approx(teraflops, rel=0.01), name


def test_attention_reads_each_key_once_and_covers_all_tiles() -> None:
    model = Model(json.loads(COUNTS.read_text()))
    for kind, row in (("f16", 1152), ("q8_0", 612)):
        main_launch, join = attend(model, kind, 1, 65536)
        partial = 4 * 512 * 32 * main_launch.blocks
        assert main_launch.bytes == row * 65536 + partial and join.bytes == partial
        assert main_launch.blocks * main_launch.turns * model.constants["tile"] == 65536
    theirs, _ = flash_attention("f16", 8, 65536)(model, H100)
    assert theirs.blocks * (theirs.turns + 1) == pytest.approx(65536 / 32 * 4), (
        "two groups of heads by two of queries"
    )


def test_a_kernel_that_is_not_in_the_code_is_named() -> None:
    kernel = Kernel("gone", "kda/cuda/kda-conv.cu", "gone_kernel", "loop")
    with pytest.raises(
        EngineError, match=r"kda-conv.cu: gone: expected one kernel whose name has gone_kernel"
    ):
        cuda_counts.measured(kernel, {}, {}, 90)


def test_measured_times_are_on_the_page(tmp_path: Path) -> None:
    made = record("2026-01-01", 2.0)
    made["device"] = {"description": "NVIDIA H100 80GB HBM3"}
    shape = "head_size=128,head_count=32,n_seq_tokens=8192,n_seqs=1,n_snapshots=1"
    attention = "hsk=576,hsv=512,nh=1,kv=65536,nb=1,mask=1,type_K=q8_0,type_V=q8_0"
    made["device_operators"] = [
        {"operator": "KDA_SCAN", "parameters": shape, "patched": 1234.0, "upstream": None},
        {"operator": "FLASH_ATTN_EXT", "parameters": attention, "patched": 56.7, "upstream": 60.0},
    ]
    file, out = tmp_path / "record.json", tmp_path / "page.md"
    file.write_text(json.dumps(made))
    assert measured_times([file])["H100", "FLASH_ATTN_EXT", "kv=65536,nb=1,type_K=q8_0"] == pytest.approx(
        56.7e-6
    )
    assert main(["--stored", "--page", str(out), "--records", str(file)]) == 0
    text = out.read_text()
    assert "1.23 ms" in text.partition("| H100 |")[2].partition("\n")[0] or "| 1.23 ms |" in text
    assert "; measured 56.7 µs" in text.partition("### H100")[2].partition("###")[0]


def test_a_change_of_the_code_but_not_of_a_comment_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.cu"
    monkeypatch.setattr(cuda_counts, "cuda_sources", lambda: [source])
    digests = []
    for text in ("int x;  // one\n", "int  x; // two\n\n", "int y;\n"):
        source.write_text(text)
        digests.append(cuda_counts.sources_digest())
    assert digests[0] == digests[1] != digests[2]
    monkeypatch.setattr(cuda_counts, "KERNELS", (replace(KERNELS[0], main="loop"),))
    assert cuda_counts.sources_digest() != digests[2]
