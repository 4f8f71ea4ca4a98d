"""Compares the time of convert-kimi with that of llama.cpp's two steps: `tools/measure-conversion`.

Input: a synthetic checkpoint of the 48B's layer shapes with random values, made once in the cache. Output: for each
type the seconds of llama.cpp's converter to BF16, of llama-quantize after it and of convert-kimi, peak resident memory,
and which tensors differ; as JSON, and as docs/bench-conversion.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_gguf.bench.load import Watch, resident_memory
from kimi_gguf.bench.models import bench_folder
from kimi_gguf.bench.report import Data, Rows, mark, markdown
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import engine_facts, machine_facts
from kimi_gguf.engine.gguf import GgufModel
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.tensor_names import without_layer
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.tools.record_page import add_outputs, machine_text, page_of, with_note, write
from kimi_gguf.tools.synthetic_checkpoint import num_bytes, smaller_config, tensors, write_synthetic
from kimi_gguf.tools.upstream_converter import Job, command, environment

LAYERS, EXPERTS, VOCAB, SHARDS, SEED = "KKKMKKKM", 32, 32000, 4, 0
TYPES = ("BF16", "Q4_0", "Q8_0", "Q4_K_M")
CONVERT = Path(sys.executable).with_name("convert-kimi")
POLL = 0.02  # seconds between two readings of a process's memory

EXAMPLES = """\
examples:
  tools/measure-conversion                           all types, two turns each: some ten minutes
  tools/measure-conversion --type Q4_K_M --turns 3
  tools/measure-conversion --json docs/bench-records/conversion.json --page docs/bench-conversion.md
  tools/measure-conversion --draw docs/bench-records/conversion.json --page docs/bench-conversion.md
"""

PAGE = """\
# Conversion, timed

Written by `tools/measure-conversion --page`; do not edit.

{machine}; llama.cpp {commit} of {package}. Measured {when}: `{command}`.

A checkpoint of the 48B's layer shapes with {layers} layers, {experts} experts and {vocab} tokens, random weights,
{gigabytes:.2f} GB in {shards} shards, read from the page cache. llama.cpp goes by way of a BF16 file
(convert_hf_to_gguf.py's model class without its tokenizer step, then llama-quantize); `convert-kimi` writes the type at
once. They alternated, {turns} times; medians, followed by the range. Peak is the largest resident memory of any
of the processes. The tensors of both files were compared byte by byte (`ssm_a` may differ in the last bit:
[conversion.md](conversion.md)).

{table}
"""


def checkpoint(reporter: Reporter) -> Path:
    """The checkpoint, made on first use."""
    config = smaller_config(LAYERS, EXPERTS, VOCAB)
    folder = bench_folder() / "models" / f"checkpoint-48b-{len(LAYERS)}L-{EXPERTS}E-{SEED}"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        reporter.phase(f"writing a checkpoint of {sum(map(num_bytes, tensors(config))) / 1e9:.1f} GB")
        write_synthetic(folder, config, SHARDS, SEED)
    return folder


class Timing(NamedTuple):
    """One run of a program."""

    seconds: float
    peak: int  # largest resident memory, bytes; 0 if the system does not report it
    others: float | None  # cores that other work kept busy, on average; None: unknown


def timed(words: Sequence[object], variables: dict[str, str] | None = None) -> Timing:
    """Run a program. Raises `EngineError` if it fails."""
    arguments = [str(word) for word in words]
    began = time.monotonic()
    process = subprocess.Popen(
        arguments, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    watch, peak = Watch((process.pid,)), 0
    while process.poll() is None:
        peak = max(peak, resident_memory(process.pid).get("peak", 0))
        time.sleep(POLL)
    seconds = time.monotonic() - began
    _, errors = process.communicate()
    if process.returncode != 0:
        name = Path(arguments[0]).name
        raise EngineError(f"{name} ended with status {process.returncode}", found=errors[-300:])
    return Timing(seconds, peak, watch.others())


def different_tensors(one: Path, other: Path) -> list[str]:
    """Kinds of tensors (`blk.3.ssm_a` counts as `ssm_a`) that differ between two GGUF files, or that only one has."""
    with GgufModel(one) as first, GgufModel(other) as second:
        both = first.tensors.keys() & second.tensors.keys()
        different = first.tensors.keys() ^ second.tensors.keys()
        different |= {name for name in both if not same(first, second, name)}
    return sorted(set(map(without_layer, different)))


def same(one: GgufModel, other: GgufModel, name: str) -> bool:
    """Compare type, shape and bytes. llama-quantize omits trailing dimensions of 1; the converters write them."""
    pair = one.tensors[name], other.tensors[name]
    shapes = ["x".join(map(str, tensor.ne)) for tensor in pair]
    while any(shape.endswith("x1") for shape in shapes):
        shapes = [shape.removesuffix("x1") for shape in shapes]
    same_kind = pair[0].type == pair[1].type and shapes[0] == shapes[1]
    return same_kind and np.array_equal(one.read(pair[0]), other.read(pair[1]))


def measure(source: Path, kind: str, turns: int, engine: Engine, reporter: Reporter) -> Data:
    """Convert to one type with both, alternating."""
    folder = bench_folder() / "conversion"
    folder.mkdir(parents=True, exist_ok=True)
    bf16, upstream, ours = files = [folder / f"{name}.gguf" for name in ("upstream-bf16", "upstream", "ours")]
    steps: dict[str, tuple[Sequence[object], dict[str, str] | None]] = {
        "convert": (command([Job(source, bf16, "BF16")]), environment()),
        "quantize": ([engine.bin / "llama-quantize", bf16, upstream, kind], None),
        "ours": ([CONVERT, source, "-o", ours, "--type", kind, "--quiet"], None),
    }
    runs: dict[str, list[Timing]] = {name: [] for name in steps}
    try:
        for turn in range(turns):
            remove(files)
            for name, (words, variables) in steps.items():
                if name != "quantize" or kind != "BF16":
                    reporter.phase(f"{kind}, turn {turn + 1} of {turns}: {name}")
                    settle(source)
                    runs[name].append(timed(words, variables))
        different = different_tensors(bf16 if kind == "BF16" else upstream, ours)
        nbytes = ours.stat().st_size
    finally:
        remove(files)
    theirs = runs["convert"] + runs["quantize"]
    return {
        "type": kind,
        **{name: [run.seconds for run in several] for name, several in runs.items()},
        "peaks": {
            "llama.cpp": max(run.peak for run in theirs),
            "ours": max(run.peak for run in runs["ours"]),
        },
        "different": different,
        "bytes": nbytes,
        "others": max(run.others or 0.0 for run in (*theirs, *runs["ours"])),
    }


def settle(source: Path) -> None:
    """Let earlier writes reach the disk, and read the checkpoint into the page cache."""
    os.sync()
    for file in source.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def remove(files: Iterable[Path]) -> None:
    """Delete files, if they exist."""
    for file in files:
        file.unlink(missing_ok=True)


def shown(samples: Sequence[float]) -> str:
    """Such as "5.7 s (5.6 to 5.9)"."""
    return f"{statistics.median(samples):.1f} s ({min(samples):.1f} to {max(samples):.1f})" if samples else ""


def table(rows: Sequence[Data]) -> Rows:
    """The page's table."""
    lines: Rows = [
        (
            "to",
            "llama.cpp: to BF16",
            "llama-quantize",
            "both steps",
            "`convert-kimi`",
            "ratio",
            "peak",
            "same bytes in",
        )
    ]
    for row in rows:
        both = sum(statistics.median(row[step]) for step in ("convert", "quantize") if row[step])
        peaks = " and ".join(f"{row['peaks'][name] / 1e9:.2f}" for name in ("llama.cpp", "ours")) + " GB"
        same_in = f"all but {', '.join(row['different'])}" if row["different"] else "all"
        times = [shown(row[step]) for step in ("convert", "quantize", "ours")]
        ratio = both / statistics.median(row["ours"])
        times.insert(2, f"{both:.1f} s")
        lines.append((row["type"] + mark(row), *times, f"{ratio:.1f}", peaks, same_in))
    return lines


def page(record: Data) -> str:
    """The page of a record."""
    engine = record["engine"]
    text = PAGE.format(
        machine=machine_text(record["machine"]),
        commit=str(engine["llama_cpp_commit"])[:7], package=engine["package"], when=str(record["created"])[:10],
        command=record["command"], layers=len(LAYERS), experts=EXPERTS, vocab=VOCAB, shards=SHARDS,
        gigabytes=record["bytes"] / 1e9, turns=record["turns"], table=markdown(table(record["rows"])),
    )  # fmt: skip
    return with_note(text, record["rows"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="measure-conversion", description=__doc__.splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    types = f"measure this type; may be repeated (default: {', '.join(TYPES)})"
    parser.add_argument("--type", action="append", metavar="TYPE", help=types)
    parser.add_argument(
        "--turns", type=int, default=2, help="run each converter this many times (default: 2)"
    )
    add_outputs(parser)
    parsed = parser.parse_args()
    try:
        if parsed.draw is not None:
            write(parsed.page, page_of(parsed.draw, page, "measure-conversion"))
            return
        with reporting() as reporter:
            ensure()  # convert-kimi uses its quantization functions
            engine, source = ensure(upstream=True), checkpoint(reporter)
            record: Data = {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": " ".join(["tools/measure-conversion", *sys.argv[1:]]),
                "machine": machine_facts(), "engine": engine_facts(engine), "turns": parsed.turns,
                "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")), "rows": [],
            }  # fmt: skip
            for kind in parsed.type or TYPES:
                record["rows"].append(measure(source, kind, parsed.turns, engine, reporter))
        print(markdown(table(record["rows"])))
        write(parsed.json, json.dumps(record, indent=1) + "\n")
        write(parsed.page, page(record))
    except KimiError as error:
        sys.exit(f"measure-conversion: error: {error}")


if __name__ == "__main__":
    main()
