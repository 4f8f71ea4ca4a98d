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
from kimi_gguf.scripts.gpu_devices import DRAM_SHARE, GPUS, HOPPER_MMA_SHARE, Gpu
from kimi_gguf.scripts.gpu_model import (
    FILL,
    HEAD,
    HEADS,
    LAUNCH,
    ROW_BYTES,
    TOKENS,
    Model,
    attend,
    flash_attention,
    gated_delta_net,
    kda_floor,
    kda_forward,
    kernel_launches,
    ours_by_default,
    spares_copy,
    upstream_attention,
)

ROOT = Path(__file__).resolve().parents[1]
COUNTS, PAGE = ROOT / "docs" / "gpu-sass.json", ROOT / "docs" / "gpu-roofline.md"
RECORDS = [ROOT / "docs" / "bench-records" / "nvidia-h200.json"]
KEYS = (4096, 16384, 65536, 131072, 524288)
QUERIES = (1, 2, 4, 8)
# The largest number of queries that LATENT_ATTN leaves to the absorbed form. Every number up to it is compared; the
# tables have only those in QUERIES.
MOST_QUERIES = {"data centre": 175, "GeForce": 271}
Measured = dict[tuple[str, str, str], float]  # seconds by device, operator and parameters


# Upstream's recurrence, 32 heads of 128, on an RTX 5090 (llama.cpp pull request 22587): seconds by tokens, timed from
# the host. One token takes 28 µs there, so the difference of two lengths is what the kernel takes.
DELTA_NET_GPU = "RTX 5090"
DELTA_NET = {128: 84.7e-6, 256: 155.6e-6, 512: 279.6e-6, 1024: 525.1e-6}
# Upstream's attention: llama-bench of DeepSeek-V2-Lite in Q4_0 (27 layers, 16 heads over a latent of 576) on an RTX
# 3090, 512 tokens in microbatches: tokens/s with an empty cache (pull request 15525) and with 32768 keys (19057).
FLASH_GPU, FLASH_LAYERS, FLASH_HEADS, FLASH_DEPTH, FLASH_TEST = "RTX 3090", 27, 16, 32768, 512
FLASH = {16: (784.29, 587.24), 32: (1209.58, 770.71), 64: (1802.95, 946.42), 128: (2253.15, 1033.12)}
# Kernels whose code is not compiled here: only their bytes and multiply-adds are known. 24 heads, 8192 tokens.
FORWARDS = (("fla chunk_kda", 1153.9e-6), ("FlashKDA", 1003.2e-6))


def calibration(model: Model) -> list[tuple[str, float, float]]:
    """What is timed, its published seconds, the model's seconds."""
    (gpu,) = (gpu for gpu in GPUS if gpu.name == DELTA_NET_GPU)
    times = [
        (n, each, model.estimate(gated_delta_net(HEADS, n, False), gpu).seconds)
        for n, each in DELTA_NET.items()
    ]
    (least, published, ours), (most, longest, ours_longest) = times[0], times[-1]
    rows = [(f"{n} tokens", *seconds) for n, *seconds in times]
    return [*rows, (f"from {least} to {most} tokens", longest - published, ours_longest - ours)]  # type: ignore[list-item]


def flash_calibration(model: Model) -> list[tuple[str, float, float]]:
    """As `calibration`: upstream's attention of one layer, by the microbatch. Half of the test's tokens are keys."""
    (gpu,) = (gpu for gpu in GPUS if gpu.name == FLASH_GPU)
    rows: list[tuple[str, float, float]] = []
    if not model.knows(gpu):
        return rows
    for queries, (empty, deep) in FLASH.items():
        published = queries * (1 / deep - 1 / empty) / FLASH_LAYERS
        ours = [
            model.total(flash_attention("f16", queries, keys + FLASH_TEST // 2, FLASH_HEADS)(model, gpu), gpu)
            for keys in (0, FLASH_DEPTH)
        ]
        rows.append((f"{queries} queries", published, ours[1] - ours[0]))
    return rows


def scan_shape(tokens: int) -> str:
    """How a record names KDA_SCAN of one sequence."""
    return f"head_size={HEAD},head_count={HEADS},n_seq_tokens={tokens},n_seqs=1"


def device_calibration(model: Model, measured: Measured) -> list[tuple[str, float, float]]:
    """As `calibration`: what was measured on devices, of ours and of upstream's recurrence with decays by channel."""
    rows: list[tuple[str, float, float]] = []
    for gpu in filter(model.knows, GPUS):
        delta = model.estimate(gated_delta_net(HEADS, TOKENS, True), gpu).seconds
        for name, operator, shape, ours in (
            ("KDA_SCAN", "KDA_SCAN", scan_shape(TOKENS), kda_forward(model, gpu).seconds(model, gpu)),
            ("upstream's recurrence", RECURRENCE, f"kda=1,n_seq_tokens={TOKENS}", delta),
        ):
            if found := measured.get((gpu.name, operator, shape)):
                rows.append((f"{name}, {HEADS} heads, {gpu.name}: {TOKENS} tokens", found, ours))
    return rows


def calibration_table(model: Model, measured: Measured) -> Rows:
    """Published and measured times next to the model's."""
    rows: Rows = [("kernel", "published or measured", "model", "model / the other")]
    rows += [
        (name, f"{short_time(found)}, measured", short_time(ours), f"{ours / found:.2f}")
        for name, found, ours in device_calibration(model, measured)
    ]
    recurrence = f"upstream's recurrence, {HEADS} heads, {DELTA_NET_GPU}"
    attention = f"upstream's attention of {FLASH_HEADS} heads over {FLASH_DEPTH} keys, {FLASH_GPU}"
    for name, found in ((recurrence, calibration(model)), (attention, flash_calibration(model))):
        for what, published, ours in found:
            rows.append(
                (f"{name}: {what}", short_time(published), short_time(ours), f"{ours / published:.2f}")
            )
    return rows


def errors(model: Model, measured: Measured) -> tuple[float, float]:
    """The least and the largest model / published or measured, without the times of whole calls."""
    found = [calibration(model)[-1], *flash_calibration(model), *device_calibration(model, measured)]
    shares = [ours / published for _, published, ours in found]
    return min(shares), max(shares)


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


def attention_table(model: Model, gpu: Gpu, measured: Measured) -> Rows:
    """Decoding on one device: ours and upstream's, by keys, type and queries."""
    rows: Rows = [
        ("keys", "cache", *(f"{n} quer{'y' if n == 1 else 'ies'}: ours, upstream, ratio" for n in QUERIES))
    ]
    for keys in KEYS:
        for kind in ROW_BYTES:
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


def least_gain(model: Model, spares: bool, many: bool = False) -> float:
    """The least ratio of upstream's time to ours where ours is the default.

    spares: where it spares a large copy. many: for more queries than the tables have.
    """
    few = max(QUERIES) + 1
    return min(
        upstream_attention(model, gpu, kind, queries, keys)
        / model.total(attend(model, gpu, kind, queries, keys), gpu)
        for gpu in filter(model.knows, GPUS)
        for kind in ROW_BYTES
        for queries in (range(few, MOST_QUERIES[gpu.family] + 1) if many else range(1, few))
        for keys in (*KEYS, model.constants[f"{kind} keys, {gpu.family}"])
        if ours_by_default(model, gpu, kind, queries, keys) and spares_copy(model, kind, keys) == spares
    )


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
    """Seconds by device, operator and parameters, from records of `kimi-llama bench --operators`."""
    found: Measured = {}
    for record in (each for file in files for each in load_all(file)):
        description = (record.get("device") or {}).get("description", "")
        name = next((gpu.name for gpu in GPUS if gpu.name in description), None)
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
memory. Read differences below 30 % as equal.

{devices}{missing}
## How far it is off

{calibration}
Measured: by [`test-backend-ops perf`](bench-h200.md#single-operators). The RTX 5090's recurrence is [published][delta]
as times of calls from the host (one token: 28 µs); its last row is a difference of two. The attention is the difference
of two llama-bench tables, [with 32768 keys][deep] and [without][empty], divided by the layers. The first one is of a
later llama.cpp; what else became faster in between makes the published times too
short. Without the times of whole calls, the model says {least:.2f} to {most:.2f} of these times: **expect
{fast:.1f} to {slow:.1f} × the times below.** None of these times is of a kernel that memory limits: such kernels are as
good as the {share:.0%} of the bandwidth. The ratio of two kernels is off by less if the same unit limits both.

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
## Latent attention, absorbed: {heads} heads

Each cell: ours, upstream's, and upstream's / ours. **Bold** is what runs by default; `limit_of` in `latent-ggml.cu`
decides. Upstream converts a Q8_0 cache to F16 before each call.
Up to {copied} keys, wherever our kernel is the default, upstream's kernel takes at least {gain:.2f} × as long.
For longer Q8_0 caches ours is the default for any number of queries, because upstream's F16 copy would take more than
{largest} MiB. There upstream's kernel takes at least {spared:.2f} × as long with up to {most_queries} queries, and
at least {many:.2f} × with more, up to the largest number that LATENT_ATTN leaves to it ({data_centre},
GeForce: {geforce}).
{attention}
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
    largest = model.constants["largest copy"]
    return TEXT.format(
        compiler=counts["compiler"], share=DRAM_SHARE, launch=1e6 * (LAUNCH + FILL), hopper=HOPPER_MMA_SHARE,
        missing=missing, least=least, most=most, fast=1 / most, slow=1 / least,
        copied=largest // ROW_BYTES["f16"], largest=largest >> 20, gain=least_gain(model, spares=False),
        spared=least_gain(model, spares=True), most_queries=max(QUERIES),
        many=least_gain(model, spares=True, many=True),
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
        default=RECORDS,
        metavar="JSON",
        help="measured times of scripts/bench-gpu (default: those of the documentation)",
    )
    options = parser.parse_args(arguments)
    try:
        if not options.stored:
            stored = json.loads(options.counts.read_text()) if options.counts.is_file() else None
            fresh = fresh_counts(tuple(options.architecture), stored)
            options.counts.write_text(as_json(fresh), encoding="utf-8")
        counts = json.loads(options.counts.read_text(encoding="utf-8"))
        options.page.write_text(page(counts, measured_times(options.records)), encoding="utf-8")
    except (KimiError, OSError) as error:
        print(f"cuda_roofline: error: {error}", file=sys.stderr)
        return 1
    print(f"cuda_roofline: see {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
