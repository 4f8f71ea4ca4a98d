"""Estimate the times of our CUDA kernels and of upstream's on GPUs, without having one.

    .venv/bin/python -m kimi_gguf.scripts.cuda_roofline              count again and write docs/gpu-roofline.md
    .venv/bin/python -m kimi_gguf.scripts.cuda_roofline --architecture 90   count these again, keep the others
    .venv/bin/python -m kimi_gguf.scripts.cuda_roofline --stored     write it from the stored counts: no nvcc is needed
    .venv/bin/python -m kimi_gguf.scripts.cuda_roofline --records out/gpu/*.json    with measured times next to them

Input: the machine instructions of the kernels (cuda_counts.py), the devices (gpu_devices.py). Output: the counts in
docs/gpu-sass.json, and the page. Run it again when kernels change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.bench.device_operators import RECURRENCE
from kimi_gguf.bench.page import short_time
from kimi_gguf.bench.record import load_all
from kimi_gguf.bench.report import Rows, markdown
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.scripts import cuda_counts
from kimi_gguf.scripts.cuda_counts import Data
from kimi_gguf.scripts.gpu_calibration import Measured, calibration_table, errors, ratio_errors, scan_shape
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, GPUS, HOPPER_MMA_SHARE, Gpu
from kimi_gguf.scripts.gpu_model import (
    BLOCK_BYTES,
    FILL,
    HEAD,
    HEADS,
    LAUNCH,
    ROW_BYTES,
    TOKENS,
    Model,
    absorbed,
    attend,
    decompressed,
    gated_delta_net,
    kda_floor,
    kda_forward,
    kernel_launches,
    multiply,
    ours_by_default,
    spares_copy,
    steps_or_chunks,
    upstream_absorbed,
    upstream_attention,
    upstream_multiply,
)
from kimi_gguf.scripts.latent_counts import CODES, EXACT, HALVES, ROWS, threshold, with_heads

ROOT = Path(__file__).resolve().parents[1]
COUNTS, PAGE = ROOT / "docs" / "gpu-sass.json", ROOT / "docs" / "gpu-roofline.md"
RECORDS = [ROOT / "docs" / "bench-records" / "nvidia-h200.json"]
KEYS = (4096, 16384, 65536, 131072, 524288)
QUERIES = (1, 2, 4, 8)
CACHES = ("f16", "q8_0")  # of the tables; others are compared, too
# The largest number of queries that LATENT_ATTN leaves to the absorbed form over long caches. Every number up to 256 is
# compared, and every 31st of the others; the tables have only those in QUERIES.
MOST_QUERIES = {
    family: threshold(CODES, family == "data centre", len(ROWS) - 1) - 1
    for family in ("data centre", "GeForce")
}
# Matrices of one column, columns × rows: the output matrix, q, k and v of a KDA layer together, q alone, a KDA layer's
# output, a square. Upstream has another kernel for rows of less than 2048 values.
MATRICES = ((2304, 163840), (2304, 12288), (2304, 4096), (4096, 2304), (4096, 4096))
MANY_KEYS = (512, 2048, 16384, 65536)  # of the table of LATENT_ATTN, and its queries
MANY_QUERIES = (128, 192, 256, 384, 480, 512, 640, 1024, 2048)


# Kernels whose code is not compiled here: only their bytes and multiply-adds are known. 24 heads, 8192 tokens.
FORWARDS = (("fla chunk_kda", 1153.9e-6), ("FlashKDA", 1003.2e-6))


def forwards_table(model: Model) -> Rows:
    """Published forward passes of KDA on an H100 next to our estimate and the floor."""
    (gpu,) = (gpu for gpu in GPUS if gpu.name == "H100")
    floor = max(kda_floor(gpu)) * 24 / HEADS
    rows: Rows = [("forward of 24 heads, 8192 tokens, H100", "time", "time / floor")]
    rows += [
        (f"{name}, published", short_time(seconds), f"{seconds / floor:.1f}") for name, seconds in FORWARDS
    ]
    if model.knows(gpu):
        ours = kda_forward(model, gpu, heads=24).seconds(model, gpu)
        rows.append(("ours, model", short_time(ours), f"{ours / floor:.1f}"))
    return rows


def devices_table() -> Rows:
    """What the model knows of each device."""
    rows: Rows = [("device", "compute capability", "multiprocessors", "clock", "bandwidth", "F16 mma.sync, F32 sums",
                   "shared memory", "L2", "source")]  # fmt: skip
    for gpu in GPUS:
        rate = 2 * gpu.mma_f32 * gpu.multiprocessors * gpu.clock
        rows.append((gpu.name, f"{gpu.architecture / 10}", str(gpu.multiprocessors), f"{gpu.clock / 1e9:.2f} GHz",
                     f"{gpu.bandwidth / 1e9:.0f} GB/s", f"{rate / 1e12:.0f} TFLOPS", f"{gpu.shared >> 10} KiB",
                     f"{gpu.l2} MiB", gpu.source))  # fmt: skip
    return rows


def kda_table(model: Model, measured: Measured) -> Rows:
    """The forward pass on each device."""
    rows: Rows = [("device", "runs", "prepare", "states", "finish", "KDA_SCAN", "measured", "floor: memory",
                   "floor: multiply-adds", "upstream's recurrence alone")]  # fmt: skip
    for gpu in filter(model.knows, GPUS):
        forward = kda_forward(model, gpu)
        upstream = model.estimate(gated_delta_net(HEADS, TOKENS, True), gpu).seconds
        found = measured.get((gpu.name, "KDA_SCAN", scan_shape(TOKENS)))
        rows.append((gpu.name, str(len(forward.runs)), *map(short_time, forward.sums(model, gpu)),
                     f"**{short_time(forward.seconds(model, gpu))}**", short_time(found) if found else "–",
                     *map(short_time, kda_floor(gpu)), short_time(upstream)))  # fmt: skip
    return rows


def switch_table(model: Model, measured: Measured) -> Rows:
    """From how many tokens on chunks are faster than steps: the H200's measured number, scaled by the model."""
    rows: Rows = [("device", "64 tokens in chunks", "a further step", "chunks are faster from (tokens)")]
    known = [gpu for gpu in GPUS if model.knows(gpu)]
    needed = [scan_shape(n) for n in (1, 16, 64)]
    base = next((gpu for gpu in known if all((gpu.name, "KDA_SCAN", n) in measured for n in needed)), None)
    for gpu in known:
        chunk, step = steps_or_chunks(model, gpu)
        cell = "–"
        if base is not None:
            one, sixteen, chunks = (measured[base.name, "KDA_SCAN", n] for n in needed)
            base_chunk, base_step = steps_or_chunks(model, base)
            tokens = 1 + (chunks - one) / ((sixteen - one) / 15)
            cell = f"{tokens * (chunk / base_chunk) / (step / base_step):.0f}"
        rows.append((gpu.name, short_time(chunk), short_time(step), cell))
    return rows


def decompressed_table(model: Model, exact: bool) -> Rows:
    """LATENT_ATTN on each device: upstream's time / ours by queries and keys, F16. Bold: where it is the default."""
    rows: Rows = [("device", "keys", *(str(n) for n in MANY_QUERIES))]
    for gpu in filter(model.knows, GPUS):
        for keys in MANY_KEYS:
            cells = []
            for queries in MANY_QUERIES:
                if queries > keys:
                    cells.append("")
                    continue
                ratio = gain_of_decompressed(model, gpu, queries, keys, exact)
                default = queries >= least_decompressed(gpu, keys, exact)
                cells.append(f"**{ratio:.2f}**" if default else f"{ratio:.2f}")
            rows.append((gpu.name, str(keys), *cells))
    return rows


def gain_of_decompressed(
    model: Model, gpu: Gpu, queries: int, keys: int, exact: bool = False, heads: int = HEADS
) -> float:
    """Upstream's time / that of LATENT_ATTN over a F16 cache."""
    ours = model.total(decompressed(model, "f16", queries, keys, exact, heads), gpu)
    return upstream_absorbed(model, gpu, "f16", queries, keys, heads) / ours


def default_gains(model: Model) -> tuple[float, float]:
    """The least and the largest ratio on GeForce devices where LATENT_ATTN is the default, up to 4096 queries."""
    gains = [
        gain_of_decompressed(model, gpu, queries, keys)
        for gpu in filter(model.knows, GPUS)
        if gpu.family == "GeForce"
        for keys in MANY_KEYS
        for queries in most_uneven(least_decompressed(gpu, keys), min(keys, 4096))
    ]
    return min(gains, default=1.0), max(gains, default=1.0)


def most_uneven(first: int, last: int) -> list[int]:
    """Numbers of queries: the first, those that fill whole blocks, and one more than these."""
    blocks = range(128, last + 1, 128)
    return (
        [first, *sorted(n for full in blocks for n in (full, full + 1) if first < n <= last)]
        if first <= last
        else []
    )


def least_decompressed(gpu: Gpu, keys: int, exact: bool = False, heads: int = HEADS) -> int:
    """The number of queries from which LATENT_ATTN computes a F16 cache: the table CUDA of llama-latent-attn.cpp."""
    row = next(i for i, last in enumerate(ROWS) if last is None or keys <= last)
    return with_heads(threshold(EXACT if exact else HALVES, gpu.family == "data centre", row), heads)


def matvec_table(model: Model) -> Rows:
    """Matmuls of one column: ours, upstream's, and upstream's / ours. Bold: what runs by default."""
    rows: Rows = [("device", "type", *(f"{columns} × {n}" for columns, n in MATRICES))]
    for gpu in filter(model.knows, GPUS):
        for kind in BLOCK_BYTES:
            cells = []
            for columns, n in MATRICES:
                ours = model.estimate(multiply(model, gpu, kind, columns, n), gpu).seconds
                theirs = model.estimate(upstream_multiply(model, gpu, kind, columns, n), gpu).seconds
                both = [short_time(ours), short_time(theirs)]
                chosen = 0 if gpu.family == "data centre" else 1
                both[chosen] = f"**{both[chosen]}**"
                cells.append(f"{', '.join(both)}, {theirs / ours:.2f}")
            rows.append((gpu.name, kind.upper(), *cells))
    return rows


def attention_table(model: Model, gpu: Gpu, measured: Measured) -> Rows:
    """Decoding on one device: ours and upstream's, by keys, type and queries."""
    rows: Rows = [
        ("keys", "cache", *(f"{n} quer{'y' if n == 1 else 'ies'}: ours, upstream, ratio" for n in QUERIES))
    ]
    for keys in KEYS:
        for kind in CACHES:
            cells = []
            for queries in QUERIES:
                ours = model.total(attend(model, gpu, kind, queries, keys), gpu)
                theirs = upstream_attention(model, gpu, kind, queries, keys)
                chosen = ours_by_default(model, gpu, kind, queries, keys)
                both = [
                    f"**{short_time(seconds)}**" if default else short_time(seconds)
                    for seconds, default in ((ours, chosen), (theirs, not chosen))
                ]
                cell = f"{', '.join(both)}, {theirs / ours:.2f}"
                found = measured.get((gpu.name, "FLASH_ATTN_EXT", f"kv={keys},nb={queries},type_K={kind}"))
                cells.append(cell + (f"; measured {short_time(found)}" if found else ""))
            rows.append((str(keys), kind.upper(), *cells))
    return rows


def least_gain(model: Model, spares: bool) -> float:
    """The least ratio of upstream's time to ours where our absorbed kernel is the default.

    spares: where it spares a large copy.
    """
    return min(
        upstream_attention(model, gpu, kind, queries, keys) / absorbed(model, gpu, kind, queries, keys)
        for gpu in filter(model.knows, GPUS)
        for kind in ROW_BYTES
        for queries in range(1, most_direct(model) + 1)
        for keys in (*KEYS, model.constants[f"{kind} keys, {gpu.family}"])
        if ours_by_default(model, gpu, kind, queries, keys) and spares_copy(model, kind, keys) == spares
    )


def most_direct(model: Model) -> int:
    """The largest number of queries with which our absorbed kernel reads a quantized cache of any length."""
    return model.constants["direct rows"] // HEADS


def gains_in_runs(model: Model) -> list[float]:
    """The time of upstream's kernel with a copy of the whole cache / that of the same kernel in runs of keys."""
    many = [*range(most_direct(model) + 1, 256), *range(256, max(MOST_QUERIES.values()) + 1, 31)]
    return [
        upstream_attention(model, gpu, kind, queries, keys) / absorbed(model, gpu, kind, queries, keys)
        for gpu in filter(model.knows, GPUS)
        for kind in BLOCK_BYTES
        for queries in filter(MOST_QUERIES[gpu.family].__ge__, many)
        for keys in KEYS
        if spares_copy(model, kind, keys)
    ]


def kernels_table(model: Model) -> Rows:
    """Each kernel: time, launches, limit and resident blocks on each device."""
    known = [gpu for gpu in GPUS if model.knows(gpu)]
    rows: Rows = [("shape", "kernel", *(gpu.name for gpu in known))]
    for shapes in zip(*(kernel_launches(model, gpu) for gpu in known), strict=True):
        for each in zip(*(launches for _, launches in shapes), strict=True):
            cells = []
            for gpu, launch in zip(known, each, strict=True):
                found = model.estimate(launch, gpu)
                times = f"{launch.times} × " if launch.times > 1 else ""
                seconds = short_time(found.seconds / launch.times)
                cells.append(f"{times}{seconds}, {found.bound}, {found.resident}")
            names = dict.fromkeys(launch.kernel for launch in each)
            rows.append((shapes[0][0], "; ".join(names), *cells))
    return rows


def measured_times(files: Sequence[Path]) -> Measured:
    """Seconds by device, operator and parameters, from records of `kimi-llama bench --operators`.

    Raises `KimiError` for times of a device that is not in GPUS.
    """
    found: Measured = {}
    for file, record in ((path, each) for path in files for each in load_all(path)):
        description = (record.get("device") or {}).get("description", "")
        name = next((gpu.name for gpu in GPUS if gpu.name in description), None)
        if name is None and record.get("device_operators"):
            raise KimiError(
                f"{file}: times of a device that the model does not have",
                expected=", ".join(gpu.name for gpu in GPUS),
                found=description or "no device",
            )
        for row in record.get("device_operators", ()):
            build = "upstream" if row["operator"] == RECURRENCE else "patched"
            if name is None or not row[build]:
                continue
            values = dict(part.split("=", 1) for part in row["parameters"].split(",") if "=" in part)
            shape = ",".join(row["parameters"].split(",")[:4])
            if values.get("exact") == "1":
                continue  # not the kernel that runs by default
            if row["operator"] == "FLASH_ATTN_EXT":
                shape = f"kv={values.get('kv')},nb={values.get('nb')},type_K={values.get('type_K')}"
            found[name, row["operator"], shape] = row[build] / 1e6
    return found


TEXT = """\
# Expected times of the CUDA kernels

Written by `python -m kimi_gguf.scripts.cuda_roofline`; do not edit. These are estimates from the
machine instructions of the compiled kernels ({compiler}), for one layer of the 48B. `scripts/bench-gpu` measures
what they estimate ([to be measured on a GPU](measure-on-gpu.md)).

## The model

A kernel's code is disassembled and its main loop is found. Barriers divide the loop into phases. A phase of a block
takes the longest of: the cycles of one warp that runs alone (stall counts and scoreboards of the machine code, with
published latencies of loads, shuffles and special functions), its instructions, tensor instructions, accesses to
shared memory, special functions, float and integer operations, each divided by the device's rate. Blocks that share a
multiprocessor overlap until a unit is full; registers, shared memory and threads limit how many there are. A launch
takes the longer of this and its bytes at {share:.0%} of the memory bandwidth, and {launch:.0f} µs. On Hopper,
`mma.sync` has {hopper:.0%} of the tensor cores' peak. Code that a branch can skip counts half.

Two kernels that run at the same time share registers, shared memory and units: blocks of the second one start where
the first one's leave room. Data that one kernel leaves to the next stays in the L2 if it is large enough.

The model leaves out bank conflicts, the bandwidth of the L2, clocks under load, and waiting for copies to shared
memory. How much it is off is [below](#how-far-it-is-off).

{devices}{missing}
## How far it is off

{calibration}
Measured on an H200: KDA by [`test-backend-ops perf`](bench-h200.md#single-operators), attention [by the same
program](measure-on-gpu.md#on-an-h200), without a record. The RTX 5090's recurrence is [published][delta] as times
of calls from the host (one token: 28 µs); its last row is a difference of two. The RTX 3090's attention is the
difference of two llama-bench tables, [with 32768 keys][deep] and [without][empty], divided by the layers. The first
one is of a later llama.cpp; what else became faster in between makes the published times too short. Without the
times of whole calls, the model says {least:.2f} to {most:.2f} of these times: **expect {fast:.1f} to {slow:.1f} ×
the times below.** This is also true for kernels that the model calls limited by memory: the bytes of one query over
131072 F16 keys take 35 µs on an H200; our kernel takes 92 µs and upstream's 94 µs.

The ratio of upstream's attention to ours is {worst_ratio:.2f} to {best_ratio:.2f} × the measured one. So a ratio
below {best_ratio:.1f} in the tables below does not prove that ours is faster. On the H200 these were measured to be
faster than upstream: one query over 4096 and more keys, LATENT_ATTN with 512 queries, and a whole model with 192
tokens. On a GeForce, LATENT_ATTN has ratios from {least_default:.2f} to {most_default:.2f} where it is the default
(F16, 32 heads, up to 4096 queries; also with one query more than whole blocks of 128, which the tables below do not
show). Divided by {best_ratio:.1f}, the [largest known
error](../ggml_ops/latent_attention/README.md#which-form) of this ratio, they are still above 1.

Other kernels of KDA are written in other languages; only their bytes and multiply-adds are known. The floor is the
longer of both at the peak rates. ([Published][kda] for an H100.)

[delta]: https://github.com/ggml-org/llama.cpp/pull/22587
[deep]: https://github.com/ggml-org/llama.cpp/pull/19057
[empty]: https://github.com/ggml-org/llama.cpp/pull/15525
[kda]: https://github.com/NVIDIA/cudnn-frontend/pull/1017

{forwards}
FlashMLA, an absorbed attention with Hopper's `wgmma`, is published with 3000 GB/s and 660 TFLOPS on an H800 (its
README): 90 % of the bandwidth, which the model takes for all kernels, and 67 % of the tensor cores' peak.

## KDA: {heads} heads of {head}, {tokens} tokens

`prepare`, `states` and `finish` are the sums of all their launches; the first and the last run may be shorter. KDA_SCAN
takes less, because `prepare` of a run of chunks runs at the same time as `states` of the run before it.

{kda}
### KDA: steps or chunks

The model takes the whole kernel `steps` as its loop, so it overestimates a further step (H200: 1.75 µs, measured
0.93). The last column is therefore scaled from the H200's number, which is computed from the measured times of 1,
16 and 64 tokens, by the model's time of a chunk / time of a step. The kernels use chunks from 32 tokens on where a
block can have 160 KiB of shared memory, and from 40 elsewhere: one threshold for all of these devices.

{switch}
## Latent attention, absorbed: {heads} heads

Each cell: ours, upstream's, and upstream's / ours. **Bold** is what runs by default: `limit_of`,
`MAX_COPY` and `MOST_DIRECT` in `latent-ggml.cu` decide. Upstream converts a Q8_0 cache to F16 before each call.
Up to {copied} keys, wherever our kernel is the default, upstream's kernel takes at least {gain:.2f} × as long.
For longer Q8_0 caches, upstream's F16 copy would take more than {largest} MiB. There ours is the default for up to
{direct} queries: upstream's kernel takes at least {spared:.2f} × as long.
With more, up to the largest number that LATENT_ATTN leaves to the absorbed form ({data_centre}; GeForce: {geforce}),
upstream's kernel runs over [runs of keys](../ggml_ops/latent_attention/README.md#in-runs-of-keys). With a copy of the
whole cache it takes {many:.2f} to {most_many:.2f} × as long.
{attention}
## Latent attention, decompressed: {heads} heads

Upstream's time / that of LATENT_ATTN by the number of queries, F16 cache. Upstream's time includes its matmuls by
k_b and v_b at cuBLAS's peak rate. **Bold**: LATENT_ATTN is the default. On the H200 and H100 it is also the default
with 176 to about 215 queries, where the model's ratio is below 1; on an H200 a whole model with 192 tokens was
nevertheless [faster than upstream's](measure-on-gpu.md#on-an-h200).

{decompressed}
## Matmuls of one column

Matrices of quantized weights, columns × rows. Each cell: ours, upstream's, and upstream's / ours. **Bold** is what
runs by default: ours on devices for data centres. Where memory limits both, they are equal here; on an H200 ours
takes [0.77 of upstream's time](../ggml_ops/matmul/README.md#on-cuda-one-column) on average. It also prefetches
weights while the previous kernel ends, which the model leaves out.

{matvec}
## All kernels

Each cell: launches and the time of one, what limits it, and the blocks that a multiprocessor holds.

{kernels}"""


CHANGED = (
    "**The kernels were changed after they were counted: the times below are those of the earlier ones.**"
)


def page(counts: Data, measured: Measured) -> str:
    """The page for these counts."""
    model = Model(counts)
    known = [gpu for gpu in GPUS if model.knows(gpu)]
    others = ", ".join(gpu.name for gpu in GPUS if gpu not in known)
    missing = f"\nNot counted yet: {others}. The command above counts them.\n" if others else ""
    if counts["sources"] != cuda_counts.sources_digest():
        missing += f"\n{CHANGED}\n"
    tables = [f"\n### {gpu.name}\n\n{markdown(attention_table(model, gpu, measured))}" for gpu in known]
    least, most = errors(model, measured)
    worst_ratio, best_ratio = ratio_errors(model)
    least_default, most_default = default_gains(model)
    largest = model.constants["largest copy"]
    in_runs = gains_in_runs(model)
    return TEXT.format(
        compiler=counts["compiler"], share=DRAM_SHARE, launch=1e6 * (LAUNCH + FILL), hopper=HOPPER_MMA_SHARE,
        missing=missing, least=least, most=most, fast=1 / most, slow=1 / least,
        worst_ratio=worst_ratio, best_ratio=best_ratio,
        least_default=least_default, most_default=most_default, switch=markdown(switch_table(model, measured)),
        matvec=markdown(matvec_table(model)), decompressed=markdown(decompressed_table(model, exact=False)),
        copied=largest // ROW_BYTES["f16"], largest=largest >> 20, gain=least_gain(model, spares=False),
        direct=most_direct(model),
        spared=least_gain(model, spares=True),
        many=min(in_runs), most_many=max(in_runs),
        data_centre=MOST_QUERIES["data centre"], geforce=MOST_QUERIES["GeForce"],
        devices=markdown(devices_table()), calibration=markdown(calibration_table(model, measured)),
        forwards=markdown(forwards_table(model)), heads=HEADS, head=HEAD, tokens=TOKENS,
        kda=markdown(kda_table(model, measured)), attention="".join(tables), kernels=markdown(kernels_table(model)),
    )  # fmt: skip


def fresh_counts(architectures: tuple[int, ...] = (), stored: Data | None = None) -> Data:
    """Compile and count everything, for all devices or for these architectures. Raises `EngineError`.

    Other architectures are taken from stored counts, if these are of the same sources and compiler.
    """
    architectures = architectures or tuple(sorted({gpu.architecture for gpu in GPUS}))
    found: Data = {
        "compiler": cuda_counts.compiler(),
        "sources": cuda_counts.sources_digest(),
        "constants": cuda_counts.constants(),
        "kernels": cuda_counts.count(architectures),
    }
    if stored and (stored["compiler"], stored["sources"]) == (found["compiler"], found["sources"]):
        for name, uses in found["kernels"].items():
            both = stored["kernels"][name] | uses
            found["kernels"][name] = {each: both[each] for each in sorted(both, key=int)}
    return found


def as_json(counts: Data) -> str:
    """One line for each kernel and architecture."""
    lines = [f' "{name}": {json.dumps(counts[name])}' for name in ("compiler", "sources", "constants")]
    kernels = [
        f'  "{name}": {{\n'
        + ",\n".join(f'   "{each}": {json.dumps(use)}' for each, use in uses.items())
        + "\n  }"
        for name, uses in counts["kernels"].items()
    ]
    return "{\n" + ",\n".join([*lines, ' "kernels": {\n' + ",\n".join(kernels) + "\n }"]) + "\n}\n"


def stored_counts(file: Path) -> Data:
    """Counts that this command wrote. Raises `KimiError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if {"kernels", "constants", "compiler", "sources"} <= set(found):
            return dict(found)
    except ValueError:
        pass
    raise KimiError(f"{file}: not counts of this command", todo="count again: leave out --stored")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="cuda_roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--architecture",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="count only for these, such as 90 (default: those of all devices)",
    )
    add("--stored", action="store_true", help="use the stored counts")
    add(
        "--counts", type=Path, default=COUNTS, metavar="JSON", help="the counts (default: docs/gpu-sass.json)"
    )
    add("--page", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/gpu-roofline.md)")
    add(
        "--records",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="measured times of scripts/bench-gpu, in addition to those of the documentation",
    )
    options = parser.parse_args(arguments)
    known = sorted({gpu.architecture for gpu in GPUS})
    if unknown := set(options.architecture) - set(known):
        parser.error(f"--architecture: expected some of {known}, found {unknown.pop()}")
    if options.stored and options.architecture:
        parser.error("--stored counts nothing: expected it without --architecture")
    try:
        if not options.stored:
            stored = stored_counts(options.counts) if options.counts.is_file() else None
            fresh = fresh_counts(tuple(options.architecture), stored)
            options.counts.write_text(as_json(fresh), encoding="utf-8")
        measured = measured_times([*RECORDS, *options.records])
        options.page.write_text(page(stored_counts(options.counts), measured), encoding="utf-8")
    except (KimiError, OSError) as error:
        print(f"cuda_roofline: error: {error}", file=sys.stderr)
        return 1
    print(f"cuda_roofline: see {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
