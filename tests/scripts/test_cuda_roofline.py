"""docs/gpu-roofline.md is what the model makes of the stored counts, and says if these are of earlier sources."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_case import record

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.scripts import cuda_check, cuda_counts
from kimi_gguf.scripts.cuda_counts import KERNELS, Kernel
from kimi_gguf.scripts.cuda_roofline import (
    CHANGED,
    COUNTS,
    MATRICES,
    PAGE,
    RECORDS,
    as_json,
    fresh_counts,
    gain_of_decompressed,
    gains_in_runs,
    least_decompressed,
    least_gain,
    main,
    measured_times,
    most_uneven,
    page,
    switch_table,
)
from kimi_gguf.scripts.gpu_calibration import Compared, attention, errors, ratio_errors
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, GPUS, Gpu
from kimi_gguf.scripts.gpu_model import (
    BLOCK_BYTES,
    FILL,
    LAUNCH,
    Forward,
    Launch,
    Model,
    attend,
    attention_in_runs,
    conversion,
    decompressed,
    equal_parts,
    flash_attention,
    kda_floor,
    kda_forward,
    kda_step,
    mma_cycles,
    multiply,
    ours_by_default,
    run_lengths,
    run_of_keys,
    steps_or_chunks,
    upstream_attention,
    upstream_multiply,
)

AGAIN = "run: .venv/bin/python -m kimi_gguf.scripts.cuda_roofline"
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
GEFORCE = next(gpu for gpu in GPUS if gpu.name == "RTX 4090")


def counts(**phase: Any) -> dict[str, Any]:
    """Counts of one kernel with one phase."""
    use = {"registers": 64, "shared": 0, "main": [{"cycles": 0, "issued": 0, "mma": {}} | phase], "rest": []}
    return {"constants": {}, "kernels": {"k": {str(gpu.architecture): use for gpu in GPUS}}}


def test_the_page_of_registers_is_of_these_sources() -> None:
    page_of_registers = (PAGE.parent / "cuda-registers.md").read_text()
    again = "run: .venv/bin/python -m kimi_gguf.scripts.cuda_check --page docs/cuda-registers.md"
    assert f"Digest of the sources without comments: {cuda_check.sources_digest()}." in page_of_registers, (
        again
    )


def test_the_page_is_of_the_stored_counts() -> None:
    stored = json.loads(COUNTS.read_text())
    assert PAGE.read_text() == page(stored, measured_times(RECORDS)), f"{AGAIN} --stored"


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
    architecture = min(stored["kernels"]["steps"])
    found = cuda_counts.count((int(architecture),), only="kda/cuda/kda-scan-steps.cu")
    assert set(found) == {"steps", "steps, four rows a thread", "finish"}
    for name, of_architectures in found.items():
        assert of_architectures[architecture] == stored["kernels"][name][architecture], AGAIN


def test_counting_one_architecture_keeps_the_others_of_the_same_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_counts, "compiler", lambda: "nvcc")
    monkeypatch.setattr(cuda_counts, "sources_digest", lambda: "now")
    monkeypatch.setattr(cuda_counts, "constants", lambda: {})
    monkeypatch.setattr(cuda_counts, "count", lambda chosen: {"k": {str(each): "new" for each in chosen}})
    stored = {
        "compiler": "nvcc",
        "sources": "now",
        "kernels": {"k": {"120": "old", "90": "old", "80": "old"}},
    }
    found = fresh_counts((90,), stored)["kernels"]["k"]
    assert list(found.items()) == [("80", "old"), ("90", "new"), ("120", "old")]
    for other in ({"sources": "then"}, {"compiler": "another"}):
        assert fresh_counts((90,), stored | other)["kernels"]["k"] == {"90": "new"}
    assert set(fresh_counts((), None)["kernels"]["k"]) == {str(gpu.architecture) for gpu in GPUS}


def test_every_kernel_is_stored_and_devices_that_are_not_counted_are_named() -> None:
    stored = json.loads(COUNTS.read_text())
    assert set(stored["kernels"]) == {each.name for each in KERNELS}
    assert json.loads(as_json(stored)) == stored
    model, text = Model(stored), PAGE.read_text()
    known = [gpu.name for gpu in GPUS if model.knows(gpu)]
    assert known
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


def named(name: str) -> Gpu:
    """The device of this name."""
    return next(gpu for gpu in GPUS if gpu.name == name)


def stored_model() -> Model:
    """The model with the stored counts."""
    return Model(json.loads(COUNTS.read_text()))


def test_attention_reads_each_key_once_and_covers_all_tiles() -> None:
    model = stored_model()
    for kind, row in (("f16", 1152), ("q8_0", 612)):
        main_launch, join = attend(model, H100, kind, 1, 65536)
        partial = 4 * 512 * 32 * main_launch.blocks
        assert main_launch.bytes == row * 65536 + partial and join.bytes == partial
        assert 0 <= main_launch.blocks * main_launch.turns - 65536 / 32 < main_launch.turns
    theirs, _ = flash_attention("f16", 8, 65536)(model, next(filter(model.knows, GPUS)))
    assert theirs.blocks * (theirs.turns + 1) == pytest.approx(65536 / 32 * 4), (
        "two groups of heads by two of queries"
    )


def test_runs_of_keys_compute_each_tile_with_each_step_once() -> None:
    """More blocks than output tiles; the work is upstream's, so the time is near that of a copy of the whole cache."""
    assert equal_parts(116736, 58112, 256) == [38912] * 3
    assert equal_parts(300, 256, 16) == [160, 140]
    model = stored_model()
    for gpu in filter(model.knows, GPUS):
        for queries in (11, 64, 200):
            main, add = run_of_keys(model, gpu, "q8_0", queries, 38912)
            tiles = -(-queries // 4) * 2
            assert main.blocks % gpu.multiprocessors == 0 and 1.25 * tiles <= main.blocks
            assert main.blocks * (main.turns + 1) == pytest.approx(tiles * 38912 / 32)
            assert add.blocks == 32 * queries
            whole = upstream_attention(model, gpu, "q8_0", queries, 116736)
            assert 0.7 < attention_in_runs(model, gpu, "q8_0", queries, 116736) / whole < 1.1


def test_long_quantized_caches_lose_little_to_a_copy_of_everything() -> None:
    model = stored_model()
    assert least_gain(model, spares=True) > 1.0 > min(gains_in_runs(model)) > 0.95


def test_splits_are_as_many_as_fit_the_device_or_fewer() -> None:
    model = stored_model()
    for gpu in GPUS:
        for queries in (1, 2, 3, 8, 200):
            main_launch = attend(model, gpu, "q8_0", queries, 65536)[0]
            waves = main_launch.blocks / gpu.multiprocessors
            assert waves <= (1 if queries <= 8 else 6), "few blocks of rows fill a wave"
    assert [each.kernel for each in attend(model, H100, "f16", 400, 65536)] == ["attend f16"], "one split"
    assert attend(model, H100, "f16", 200, 65536)[0].blocks == 600, (
        "three splits fill five waves instead of two"
    )


def test_a_run_fills_the_places_of_prepare() -> None:
    model = stored_model()
    assert run_lengths(model, named("H200"), 32, 24) == 3 * [8], "256 of 264 places"
    assert run_lengths(model, named("RTX 3090"), 32, 128) == [*25 * [5], 3], "160 of 164"
    assert run_lengths(model, named("A100"), 32, 22) == [*3 * [6], 4], "two waves of 13 chunks exceed 48 MiB"
    assert run_lengths(model, named("H200"), 32, 3) == [3]


def test_long_sequences_have_long_runs_between_the_first_and_the_last() -> None:
    model = stored_model()
    assert run_lengths(model, named("H200"), 32, 128) == [8, *7 * [16], 8]
    assert run_lengths(model, named("H200"), 32, 75) == [8, *3 * [16], 11, 8]
    assert run_lengths(model, named("H200"), 32, 65) == [8, *3 * [16], 8, 1]
    assert run_lengths(model, named("H200"), 32, 32) == [8, 16, 8]
    assert run_lengths(model, named("H200"), 32, 31) == [*3 * [8], 7], "less than four runs"


def test_the_ring_is_short_where_shared_memory_is_small() -> None:
    model = stored_model()
    for gpu in filter(model.knows, GPUS):
        run = kda_forward(model, gpu).runs[0]
        short = gpu.shared == 100 << 10
        two_warps = gpu.multiprocessors >= 128  # a scheduler for each
        kernel = "states" + ", two warps" * two_warps + ", short ring" * short
        assert run.states.kernel == kernel
        assert run.states.shared == (3 if short else 5) * 16384 + (24576 if two_warps else 0)
        assert model.resident(run.states, gpu) == (1 if short and two_warps else 2)
        assert run.prepare.kernel == ("prepare, one set of rows" if short else "prepare")
        assert model.resident(run.prepare, gpu) == 2
    assert kda_forward(model, H100, heads=99).runs[0].states.kernel == "states of whole heads"


def moved(forward: Forward) -> float:
    """Bytes of all launches."""
    return sum(run.prepare.bytes + run.states.bytes + run.finish.bytes for run in forward.runs)


def test_a_forward_pass_reads_and_writes_its_tensors_once_and_more_if_a_run_exceeds_the_l2() -> None:
    model = stored_model()
    tensors = 6 * 4 * 32 * 128 * 8192
    large, small = replace(H100, l2=1 << 20), replace(H100, l2=1)
    assert moved(kda_forward(model, large)) == pytest.approx(tensors)
    between = 2 * model.constants["chunk bytes"] * 32 * 128
    spilled = moved(kda_forward(model, small))
    assert spilled == pytest.approx(tensors * 8 / 6 + between), (
        "and the output is written, read and written again"
    )


def beside_counts(registers: int = 64) -> dict[str, Any]:
    """Counts of two kernels: 1000 and 500 cycles, a tenth of them issued."""
    made = counts(cycles=1000, issued=100)
    first = made["kernels"]["k"]
    made["kernels"] = {"first": first, "second": counts(cycles=500, issued=50)["kernels"]["k"]}
    for uses in made["kernels"].values():
        for each in uses:
            uses[each] = uses[each] | {"registers": registers}
    return made


def test_kernels_beside_each_other_take_as_long_as_the_longer_one_if_both_fit() -> None:
    model, gpu = Model(beside_counts()), H100
    first, second = Launch("first", 132, 4, 100, 0), Launch("second", 132, 4, 100, 0)
    assert (model.beside(first, second, gpu) - LAUNCH) * gpu.clock == pytest.approx(100 * 1000)
    many = replace(second, blocks=2 * 7 * 132)  # seven fit beside the first; two rounds of 500 cycles
    assert model.room(first, 1, second, gpu) == 7
    assert (model.beside(first, many, gpu) - LAUNCH) * gpu.clock == pytest.approx(100 * 1000)
    crowded = Model(beside_counts(registers=255))
    assert crowded.room(first, 2, second, gpu) == 0
    alone = replace(first, blocks=2 * 132)
    assert (crowded.beside(alone, second, gpu) - LAUNCH) * gpu.clock == pytest.approx(100 * 1500), (
        "the second one starts when the first one has ended"
    )


def test_what_two_kernels_want_of_a_unit_adds_up() -> None:
    made = beside_counts()
    for uses in made["kernels"].values():
        for each in uses:
            uses[each] = uses[each] | {"main": [{"cycles": 1000, "issued": 800, "mma": {}}]}
    model = Model(made)
    first, second = Launch("first", 132, 4, 100, 0), Launch("second", 132, 4, 100, 0)
    assert (model.beside(first, second, H100) - LAUNCH) * H100.clock >= 100 * 1600
    moved = replace(first, bytes=1e9), replace(second, bytes=1e9)
    assert model.beside(*moved, H100) == pytest.approx(2e9 / (DRAM_SHARE * 3.35e12) + FILL + LAUNCH)


def test_one_half_per_value_is_the_default() -> None:
    model = stored_model()
    plain, exact = (
        {each.kernel: each for each in decompressed(model, "f16", 512, 8192, exact)}
        for exact in (False, True)
    )
    assert "decompressed" in plain and "decompressed, exact" in exact
    # 17536 and 25728 bytes per key: 3712 and 2560 keys in 64 MiB, in blocks of 128
    assert plain["expand keys"].times == 3 and exact["expand keys, exact"].times == 4


def test_many_sequences_use_blocks_of_256_threads() -> None:
    assert (kda_step(H100, 4).kernel, kda_step(H100, 4).warps) == ("steps", 16)
    assert (kda_step(H100, 5).kernel, kda_step(H100, 5).warps) == ("steps, four rows a thread", 8)


def test_upstreams_copy_of_a_cache_is_in_the_l2_if_it_fits() -> None:
    rate = GEFORCE.bandwidth * DRAM_SHARE
    assert conversion("f16", 1 << 20, GEFORCE) == 0
    assert conversion("q8_0", 4096, GEFORCE) == pytest.approx(612 * 4096 / rate + FILL + LAUNCH)
    assert conversion("q8_0", 1 << 17, GEFORCE) == pytest.approx(
        (612 + 1152) * (1 << 17) / rate + FILL + LAUNCH
    )


def test_no_default_is_slower_than_upstream_with_up_to_8_queries() -> None:
    model = stored_model()
    found = 0
    for gpu in filter(model.knows, GPUS):
        for kind in ("f16", "q8_0"):
            for queries in range(1, 9):
                for keys in (
                    4096,
                    8192,
                    10000,
                    12000,
                    12289,
                    14000,
                    16384,
                    40000,
                    65536,
                    131072,
                    262144,
                    524288,
                ):
                    if ours_by_default(model, gpu, kind, queries, keys):
                        found += 1
                        ours = model.total(attend(model, gpu, kind, queries, keys), gpu)
                        theirs = upstream_attention(model, gpu, kind, queries, keys)
                        assert ours <= theirs, (gpu.name, kind, queries, keys)
    assert found, "else this test says nothing"


GUARD = 1.6  # how much too good the model was for LATENT_ATTN with 512 queries on an H200
MEASURED = ("H200", "H100")  # the same multiprocessor


@pytest.mark.parametrize("heads", [16, 32, 64, 96])  # others have other kernels of upstream
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_latent_attn_is_hardly_slower_than_upstream_where_it_is_the_default(
    gpu: Gpu, exact: bool, heads: int
) -> None:
    """A few numbers of queries fill only a part of the device's last wave."""
    model, found = stored_model(), 0
    too_good = GUARD if gpu.family == "GeForce" else 1.0
    least = 0.81 if gpu.name in MEASURED and not exact else 0.87
    for keys in (512, 1024, 2048, 4096, 16384, 65536):
        first, last = least_decompressed(gpu, keys, exact, heads), min(keys, 3072)
        found += first <= last
        for queries in {*range(first, last + 1, 64), *most_uneven(first, last)}:
            gain = gain_of_decompressed(model, gpu, queries, keys, exact, heads) / too_good
            assert gain >= (1 if (heads, queries) == (32, 2048) else least), (keys, queries)
    assert (found == 0) == (exact and gpu.family == "GeForce"), (
        "there no ubatch of up to 2048 tokens is exact"
    )


def test_the_h200_is_faster_with_latent_attn_from_the_measured_number_of_queries_on() -> None:
    """The model says 0.9 there; a whole model with 192 tokens was faster (docs/measure-on-gpu.md)."""
    assert least_decompressed(named("H200"), 4096) == 176
    assert gain_of_decompressed(stored_model(), named("H200"), 192, 4096) > 0.9


def test_no_matmul_of_one_column_is_slower_on_a_device_for_data_centres() -> None:
    model = stored_model()
    for gpu in (gpu for gpu in GPUS if gpu.family == "data centre"):
        for kind in BLOCK_BYTES:
            for columns, rows in MATRICES:
                ours, theirs = (
                    multiply(model, gpu, kind, columns, rows),
                    upstream_multiply(model, gpu, kind, columns, rows),
                )
                assert ours.bytes == theirs.bytes == rows * columns // 32 * BLOCK_BYTES[kind]
                assert model.estimate(ours, gpu).seconds <= model.estimate(theirs, gpu).seconds, (
                    gpu.name,
                    kind,
                    rows,
                )


def test_warps_share_rows_where_there_are_few_or_long_ones() -> None:
    model, h200 = stored_model(), named("H200")
    whole = multiply(
        model, h200, "q4_0", 2304, 163840
    )  # 72 blocks of two lanes, 144 lanes: five steps of a warp
    assert (whole.blocks, whole.warps, whole.turns) == (163840 // 8, 4, 5)
    few = multiply(model, h200, "q4_0", 2304, 1024)
    assert (few.blocks, few.turns) == (512, 2), "four warps for two rows: two steps each"
    theirs = upstream_multiply(model, h200, "q4_0", 2304, 1024)
    assert theirs.blocks == 1024


def test_chunks_begin_where_they_are_counted_to_be_faster() -> None:
    text = (cuda_counts.OPERATORS / "kda" / "cuda" / "kda-scan.cu").read_text()
    roomy, small = (int(n) for n in re.findall(r"CHUNKS_FROM\w*\s*= (\d+);", text))
    _, *rows = switch_table(stored_model(), measured_times(RECORDS))
    for gpu, row in zip(filter(stored_model().knows, GPUS), rows, strict=True):
        chosen = roomy if gpu.block_shared >= stored_model().constants["roomy"] else small
        assert 0.7 <= chosen / int(row[-1]) <= 1.3, gpu.name
    chunk, step = steps_or_chunks(stored_model(), H100)
    assert 10 * step < chunk < 64 * step


def test_errors_are_of_what_was_measured_and_leave_out_calls_from_the_host() -> None:
    model = stored_model()
    least, most = errors(model, {})
    assert 0 < least < most < 1, "the model leaves out what takes time"
    for ours, theirs in attention(model):
        assert least <= ours.share <= most and least <= theirs.share <= most
    low, high = ratio_errors(model)
    assert low < 1 < high
    tokens = ("H200", "KDA_SCAN", "head_size=128,head_count=32,n_seq_tokens=512,n_seqs=1")
    assert errors(model, {tokens: 1.0})[0] < 1e-3 < errors(model, {})[0]
    assert Compared("a", 2.0, 1.0).share == 0.5


def test_the_defaults_are_those_of_the_code() -> None:
    text = (cuda_counts.OPERATORS / "latent_attention" / "cuda" / "latent-ggml.cu").read_text()
    body = text.split("limit_of(")[1].split("\n}")[0]
    (rows, *keys), *_ = re.findall(r"return \{ (\d+), fast_sums \? (\d+) : (\d+) \};", body.split("q4_0:")[1])
    found = stored_model().constants
    for device, least in zip(("data centre", "GeForce"), keys, strict=True):
        assert (found[f"q8_0 rows, {device}"], found[f"q8_0 keys, {device}"]) == (int(rows), int(least))
    assert "case latent_cuda::cache_type::f16:" in body
    (rows, least), *_ = re.findall(
        r"return fast_sums \? limit\{ (\d+), (\d+) \} : limit\{\};", body.split("bf16:")[1]
    )
    assert (found["f16 rows, data centre"], found["f16 keys, data centre"]) == (int(rows), int(least))
    assert found["f16 rows, GeForce"] == found["f16 keys, GeForce"] == 0
    (mebibytes,) = re.findall(r"MAX_COPY = (\d+) << 20;", text)
    assert found["largest copy"] == int(mebibytes) << 20
    assert f"MOST_DIRECT = {found['direct rows']};" in text
    limits = (cuda_counts.OPERATORS / "latent_attention" / "cuda" / "latent-runs.cuh").read_text()
    for device, name in (("data centre", "DATA_CENTRE_RUNS "), ("GeForce", "GEFORCE_RUNS     ")):
        assert f"{name}= {{ {found[f'run keys, {device}']}, {found['group rows']} }};" in limits


def test_kda_has_the_times_of_its_aims() -> None:
    model = stored_model()
    for name, most in (("H200", 1.0e-3), ("RTX 3090", 3.0e-3)):
        gpu = named(name)
        if model.knows(gpu):
            assert max(kda_floor(gpu)) < kda_forward(model, gpu).seconds(model, gpu) <= most


def test_a_kernel_that_is_not_in_the_code_is_named() -> None:
    kernel = Kernel("gone", "kda/cuda/kda-conv.cu", "gone_kernel", "loop")
    with pytest.raises(
        EngineError, match=r"kda-conv.cu: gone: expected one kernel whose name has gone_kernel"
    ):
        cuda_counts.measured(kernel, {}, {}, 90)


def test_measured_times_are_on_the_page(tmp_path: Path) -> None:
    made = record("2026-01-01", 2.0)
    name = next(filter(stored_model().knows, GPUS)).name
    made["device"] = {"description": f"NVIDIA GeForce {name}"}
    shape = "head_size=128,head_count=32,n_seq_tokens=8192,n_seqs=1,n_snapshots=1"
    attention = "hsk=576,hsv=512,nh=1,kv=65536,nb=1,mask=1,type_K=q8_0,type_V=q8_0"
    made["device_operators"] = [
        {"operator": "KDA_SCAN", "parameters": shape, "patched": 1234.0, "upstream": None},
        {
            "operator": "FLASH_ATTN_EXT",
            "parameters": attention + ",exact=0",
            "patched": 56.7,
            "upstream": None,
        },
        {
            "operator": "FLASH_ATTN_EXT",
            "parameters": attention + ",exact=1",
            "patched": 99.9,
            "upstream": None,
        },
    ]
    file, out = tmp_path / "record.json", tmp_path / "page.md"
    file.write_text(json.dumps(made))
    assert measured_times([file])[name, "FLASH_ATTN_EXT", "kv=65536,nb=1,type_K=q8_0"] == pytest.approx(
        56.7e-6
    )
    assert main(["--stored", "--page", str(out), "--records", str(file)]) == 0
    text = out.read_text()
    row = text.partition("## KDA")[2].partition(f"| {name} |")[2].partition("\n")[0]
    assert "| 1.23 ms |" in row
    assert "; measured 56.7 µs" in text.partition(f"### {name}")[2].partition("###")[0]
    assert text.count(", measured |") == PAGE.read_text().count(", measured |"), "those of the documentation"


def test_what_cannot_be_used_is_an_error_and_leaves_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record("2026-01-01", 2.0)
    made["device"] = {"description": "the CPU with memory of its own"}
    made["device_operators"] = [{"operator": "KDA_SCAN", "parameters": "", "patched": 1.0, "upstream": None}]
    file, counts, out = tmp_path / "record.json", tmp_path / "counts.json", tmp_path / "page.md"
    file.write_text(json.dumps(made))
    assert main(["--stored", "--page", str(out), "--records", str(file)]) == 1
    said = capsys.readouterr().err
    assert f"{file}: times of a device that the model does not have: expected H200" in said
    for text in ("", "{}", "[1]"):
        counts.write_text(text)
        assert main(["--stored", "--page", str(out), "--counts", str(counts)]) == 1
        assert f"{counts}: not counts of this command" in capsys.readouterr().err
    for words in (["--architecture", "99"], ["--stored", "--architecture", "90"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--page", str(out), "--counts", str(counts)])
        assert ended.value.code == 2
    assert not out.exists()


def test_a_change_of_the_code_but_not_of_a_comment_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.cu"
    monkeypatch.setattr(cuda_check, "cuda_sources", lambda: [source])
    digests = []
    for text in ("int x;  // one\n", "int  x; // two\n\n", "int y;\n"):
        source.write_text(text)
        digests.append(cuda_counts.sources_digest())
    assert digests[0] == digests[1] != digests[2]
    monkeypatch.setattr(cuda_counts, "KERNELS", (replace(KERNELS[0], main="loop"),))
    assert cuda_counts.sources_digest() != digests[2]
