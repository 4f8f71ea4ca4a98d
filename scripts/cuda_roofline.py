"""Estimate the times of our CUDA kernels and of upstream's on GPUs, without having one.

    .venv/bin/python -m kimi_gguf.scripts.cuda_roofline              count again and write docs/gpu-roofline.md
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
    conversion,
    flash_attention,
    gated_delta_net,
    kda_floor,
    kda_forward,
    kernel_launches,
)

ROOT = Path(__file__).resolve().parents[1]
COUNTS, PAGE = ROOT / "docs" / "gpu-sass.json", ROOT / "docs" / "gpu-roofline.md"
KEYS = (4096, 16384, 65536, 131072, 524288)
QUERIES = (1, 2, 4, 8)
Measured = dict[tuple[str, str, str], float]  # seconds by device, operator and parameters


# Upstream's recurrence, 32 heads of 128, on an RTX 5090 (llama.cpp pull request 22587): seconds by tokens, timed from
# the host. One token takes 28 µs there, so the difference of two lengths is what the kernel takes.
DELTA_NET_GPU = "RTX 5090"
DELTA_NET = {128: 84.7e-6, 256: 155.6e-6, 512: 279.6e-6, 1024: 525.1e-6}
# Kernels whose code is not compiled here: only their bytes and products are known. 24 heads, 8192 tokens.
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


def calibration_table(model: Model) -> Rows:
    """Published times next to the model's."""
    rows: Rows = [
        (f"upstream's recurrence, {HEADS} heads, {DELTA_NET_GPU}", "published", "model", "model / published")
    ]
    for what, published, ours in calibration(model):
        rows.append((what, short_time(published), short_time(ours), f"{ours / published:.2f}"))
    return rows


def forwards_table(model: Model) -> Rows:
    """Published forward passes of KDA on an H100 next to our estimate and the floor."""
    (gpu,) = (gpu for gpu in GPUS if gpu.name == "H100")
    ours = model.total(kda_forward(model, heads=24), gpu)
    floor = max(kda_floor(gpu)) * 24 / HEADS
    rows: Rows = [("forward of 24 heads, 8192 tokens, H100", "time", "time / floor")]
    rows += [
        (f"{name}, published", short_time(seconds), f"{seconds / floor:.1f}") for name, seconds in FORWARDS
    ]
    return [*rows, ("ours, model", short_time(ours), f"{ours / floor:.1f}")]


def devices_table() -> Rows:
    """What the model knows of each device."""
    rows: Rows = [("device", "compute capability", "multiprocessors", "clock", "bandwidth", "F16 mma.sync, F32 sums",
                   "shared memory", "source")]  # fmt: skip
    for gpu in GPUS:
        rate = 2 * gpu.mma_f32 * gpu.multiprocessors * gpu.clock
        rows.append((gpu.name, f"{gpu.architecture / 10}", str(gpu.multiprocessors), f"{gpu.clock / 1e9:.2f} GHz",
                     f"{gpu.bandwidth / 1e9:.0f} GB/s", f"{rate / 1e12:.0f} TFLOPS", f"{gpu.shared >> 10} KiB",
                     gpu.source))  # fmt: skip
    return rows


def kda_table(model: Model, measured: Measured) -> Rows:
    """The forward pass on each device."""
    rows: Rows = [("device", "prepare", "states", "finish", "KDA_SCAN", "measured", "floor: memory", "floor: products",
                   "upstream's recurrence alone")]  # fmt: skip
    shape = f"head_size={HEAD},head_count={HEADS},n_seq_tokens={TOKENS},n_seqs=1"
    for gpu in filter(model.knows, GPUS):
        parts = [model.estimate(each, gpu).seconds for each in kda_forward(model)]
        upstream = model.estimate(gated_delta_net(HEADS, TOKENS, True), gpu).seconds
        found = measured.get((gpu.name, "KDA_SCAN", shape))
        rows.append((gpu.name, *map(short_time, parts), f"**{short_time(sum(parts))}**",
                     short_time(found) if found else "–", *map(short_time, kda_floor(gpu)),
                     short_time(upstream)))  # fmt: skip
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
                ours = model.total(attend(model, kind, queries, keys), gpu)
                theirs = model.total(flash_attention(kind, queries, keys)(model, gpu), gpu) + conversion(
                    kind, keys, gpu
                )
                cell = f"{short_time(ours)}, {short_time(theirs)}, {theirs / ours:.2f}"
                found = measured.get((gpu.name, "FLASH_ATTN_EXT", f"kv={keys},nb={queries},type_K={kind}"))
                cells.append(cell + (f"; measured {short_time(found)}" if found else ""))
            rows.append((str(keys), kind.upper(), *cells))
    return rows


def kernels_table(model: Model) -> Rows:
    """Each kernel: time, limit and resident blocks on each device."""
    rows: Rows = [("shape", "kernel", "launches", *(gpu.name for gpu in GPUS if model.knows(gpu)))]
    for shape, launches in kernel_launches(model):
        for each in launches:
            cells = []
            for gpu in filter(model.knows, GPUS):
                found = model.estimate(each, gpu)
                cells.append(f"{short_time(found.seconds)}, {found.bound}, {found.resident}")
            rows.append((shape, each.kernel, str(each.times), *cells))
    return rows


def measured_times(files: Sequence[Path]) -> Measured:
    """Seconds by device, operator and parameters, from records of `kimi-llama bench --operators`."""
    found: Measured = {}
    for record in (each for file in files for each in load_all(file)):
        description = (record.get("device") or {}).get("description", "")
        name = next((gpu.name for gpu in GPUS if gpu.name in description), None)
        for row in record.get("device_operators", ()):
            if name is None or not row["patched"]:
                continue
            values = dict(part.split("=", 1) for part in row["parameters"].split(",") if "=" in part)
            shape = ",".join(row["parameters"].split(",")[:4])
            if row["operator"] == "FLASH_ATTN_EXT":
                shape = f"kv={values.get('kv')},nb={values.get('nb')},type_K={values.get('type_K')}"
            found[name, row["operator"], shape] = row["patched"] / 1e6
    return found


TEXT = """\
# Expected times of the CUDA kernels

Written by `python -m kimi_gguf.scripts.cuda_roofline`; do not edit. No GPU was available: these are estimates from the
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

It leaves out bank conflicts, the bandwidth of the L2, clocks under load, and waiting for copies to shared memory. Read
differences below 30 % as equal.

{devices}{missing}
## How far it is off

{calibration}
The recurrence waits for loads and shuffles in each token. Without the time of a call ([published][delta] from the
host; one token takes 28 µs), it takes {slower:.1f} × as long as the model says. Expect the same of our kernels whose
limit is latency. No published time of a kernel that the tensor cores or the memory limit can be compared.

Other kernels of KDA are written in other languages; only their bytes and products are known. The floor is the longer
of both at the peak rates. ([Published][kda] for an H100.)

[delta]: https://github.com/ggml-org/llama.cpp/pull/22587
[kda]: https://github.com/NVIDIA/cudnn-frontend/pull/1017

{forwards}
FlashMLA, an absorbed attention with Hopper's `wgmma`, is published with 3000 GB/s and 660 TFLOPS on an H800 (its
README): 90 % of the bandwidth, which the model takes for all kernels, and 67 % of the tensor cores' peak.

## KDA: {heads} heads of {head}, {tokens} tokens

{kda}
## Latent attention, absorbed: {heads} heads

Each cell: ours, upstream's, and upstream's / ours. Upstream converts a Q8_0 cache to F16 before each call.
`MAX_QUERIES_F16` and `MAX_QUERIES_CONVERTED` in `latent-ggml.cu` decide which of both runs.
{attention}
## All kernels

Each cell: time of all launches, what limits it, and the blocks that a multiprocessor holds.

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
    *_, (_, published, ours) = calibration(model)
    return TEXT.format(
        compiler=counts["compiler"], share=DRAM_SHARE, launch=1e6 * (LAUNCH + FILL), hopper=HOPPER_MMA_SHARE,
        slower=published / ours, missing=missing,
        devices=markdown(devices_table()), calibration=markdown(calibration_table(model)),
        forwards=markdown(forwards_table(model)), heads=HEADS, head=HEAD, tokens=TOKENS,
        kda=markdown(kda_table(model, measured)), attention="".join(tables), kernels=markdown(kernels_table(model)),
    )  # fmt: skip


def fresh_counts() -> Data:
    """Compile and count everything. Raises `EngineError`."""
    architectures = tuple(sorted({gpu.architecture for gpu in GPUS}))
    return {
        "compiler": cuda_counts.compiler(),
        "sources": cuda_counts.sources_digest(),
        "constants": cuda_counts.constants(),
        "kernels": cuda_counts.count(architectures),
    }


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
        help="measured times of scripts/bench-gpu",
    )
    options = parser.parse_args(arguments)
    try:
        if not options.stored:
            options.counts.write_text(as_json(fresh_counts()), encoding="utf-8")
        counts = json.loads(options.counts.read_text(encoding="utf-8"))
        options.page.write_text(page(counts, measured_times(options.records)), encoding="utf-8")
    except (KimiError, OSError) as error:
        print(f"cuda_roofline: error: {error}", file=sys.stderr)
        return 1
    print(f"cuda_roofline: see {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
