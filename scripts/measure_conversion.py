"""Conversion timed against llama.cpp's two steps, in turns, and the page of it: `scripts/measure-conversion`.

Flows in: a checkpoint of the 48B's layer shapes with random values, made once in the cache. Flows out: for each type
the seconds of llama.cpp's converter to BF16 and of llama-quantize after it, those of convert-kimi straight to the
type, peak resident memory, and whether the tensors' bytes are the same; as JSON, and as docs/bench-conversion.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.load import DISTURBED, Watch
from kimi_gguf.bench.models import bench_folder
from kimi_gguf.bench.report import markdown
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.facts import engine_facts, machine_facts
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.patches.errors import EngineError
from kimi_gguf.scripts.synthetic_checkpoint import num_bytes, smaller_config, tensors, write_synthetic
from kimi_gguf.scripts.upstream_converter import Job, command, environment

LAYERS, EXPERTS, VOCAB, SHARDS, SEED = "KKKMKKKM", 32, 32000, 4, 0
TYPES = ("BF16", "Q4_0", "Q8_0", "Q4_K_M")
CONVERT = Path(sys.executable).with_name("convert-kimi")
POLL = 0.02  # seconds between two looks at a process's memory
Data = dict[str, Any]

EXAMPLES = """\
examples:
  scripts/measure-conversion                         all types, two turns each; some ten minutes
  scripts/measure-conversion --type Q4_K_M --turns 3
  scripts/measure-conversion --json out/bench/conversion.json --page docs/bench-conversion.md
"""

PAGE = """\
# Conversion, timed

Written by `scripts/measure-conversion --page`; do not edit.

{machine}; llama.cpp {commit} of {package}. Measured {when}: `{command}`.

A checkpoint of the 48B's layer shapes with {layers} layers, {experts} experts and {vocab} tokens, random weights,
{gigabytes:.2f} GB in {shards} shards, read from the page cache. llama.cpp goes by way of a BF16 file
(convert_hf_to_gguf.py's model class without its tokenizer step, then llama-quantize); `convert-kimi` writes the type at
once. Both took turns, {turns} times; medians, with the range behind them. Peak is the largest resident memory of any
of the processes. The tensors of both files were compared byte by byte (`ssm_a` may differ in the last bit:
[conversion.md](conversion.md)).

{table}
"""


def checkpoint(told: Reporter) -> Path:
    """The checkpoint, made on first use."""
    config = smaller_config(LAYERS, EXPERTS, VOCAB)
    folder = bench_folder() / "models" / f"checkpoint-48b-{len(LAYERS)}L-{EXPERTS}E-{SEED}"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        told.phase(f"writing a checkpoint of {sum(map(num_bytes, tensors(config))) / 1e9:.1f} GB")
        write_synthetic(folder, config, SHARDS, SEED)
    return folder


def timed(
    words: Sequence[object], variables: dict[str, str] | None = None
) -> tuple[float, int, float | None]:
    """Run a program: seconds, its peak resident bytes, processors that others kept busy. Raises `EngineError`."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in words],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch, peak = Watch((process.pid,)), 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(POLL)
    seconds = time.monotonic() - began
    said = process.stderr.read() if process.stderr else ""
    if process.returncode != 0:
        raise EngineError(
            f"{Path(str(words[0])).name} ended with status {process.returncode}", found=said[-300:]
        )
    return seconds, peak, watch.others()


def resident(pid: int) -> int:
    """Largest resident memory of a process so far, bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def different_tensors(one: Path, other: Path) -> list[str]:
    """Kinds of tensors (`blk.3.ssm_a` counts as `ssm_a`) that two GGUF files do not both hold with the same bytes."""
    files = [{tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (one, other)]
    different = {
        name
        for name in files[0].keys() | files[1].keys()
        if not (name in files[0] and name in files[1] and same(files[0][name], files[1][name]))
    }
    return sorted({re.sub(r"^blk\.\d+\.", "", name) for name in different})


def same(one: gguf.ReaderTensor, other: gguf.ReaderTensor) -> bool:
    """Type, shape and bytes. llama-quantize leaves out extents of 1 at the end, the converters write them."""
    shapes = ["x".join(map(str, tensor.shape)) for tensor in (one, other)]
    while any(shape.endswith("x1") for shape in shapes):
        shapes = [shape.removesuffix("x1") for shape in shapes]
    same_kind = one.tensor_type == other.tensor_type and shapes[0] == shapes[1]
    return same_kind and np.array_equal(one.data.view(np.uint8).ravel(), other.data.view(np.uint8).ravel())


def measure(source: Path, kind: str, turns: int, engine: Engine, told: Reporter) -> Data:
    """One type: both ways in turns."""
    folder = bench_folder() / "conversion"
    folder.mkdir(parents=True, exist_ok=True)
    bf16, theirs, ours = (folder / f"{name}.gguf" for name in ("upstream-bf16", "upstream", "ours"))
    row: Data = {
        "type": kind,
        "convert": [],
        "quantize": [],
        "ours": [],
        "peaks": {"llama.cpp": 0, "ours": 0},
    }
    disturbed = []
    try:
        for turn in range(turns):
            for file in (bf16, theirs, ours):
                file.unlink(missing_ok=True)
            told.phase(f"{kind}, turn {turn + 1} of {turns}: llama.cpp")
            seconds, peak, others = timed(command([Job(source, bf16, "BF16")]), environment())
            row["convert"].append(seconds)
            peaks, loads = [peak], [others]
            if kind != "BF16":
                seconds, peak, others = timed([engine.bin / "llama-quantize", bf16, theirs, kind])
                row["quantize"].append(seconds)
                peaks, loads = [*peaks, peak], [*loads, others]
            told.phase(f"{kind}, turn {turn + 1} of {turns}: convert-kimi")
            words = [CONVERT, source, "-o", ours, "--type", kind, "--quiet"]
            seconds, peak, others = timed(words)
            row["ours"].append(seconds)
            row["peaks"] = {
                "llama.cpp": max(row["peaks"]["llama.cpp"], *peaks), "ours": max(row["peaks"]["ours"], peak)
            }  # fmt: skip
            disturbed += [each for each in (*loads, others) if each is not None]
        row["different"] = different_tensors(bf16 if kind == "BF16" else theirs, ours)
        row["bytes"] = ours.stat().st_size
    finally:
        for file in (bf16, theirs, ours):
            file.unlink(missing_ok=True)
    row["others"] = max(disturbed, default=0.0)
    return row


def shown(samples: Sequence[float]) -> str:
    """Such as "5.7 s (5.6 to 5.9)"."""
    return f"{statistics.median(samples):.1f} s ({min(samples):.1f} to {max(samples):.1f})"


def table(rows: Sequence[Data]) -> list[tuple[str, ...]]:
    """The page's table."""
    lines: list[tuple[str, ...]] = [
        ("to", "llama.cpp: to BF16", "llama-quantize", "`convert-kimi`", "ratio", "peak", "same bytes in")
    ]
    for row in rows:
        whole = statistics.median(row["convert"]) + (
            statistics.median(row["quantize"]) if row["quantize"] else 0.0
        )
        peaks = " and ".join(f"{row['peaks'][name] / 1e9:.2f}" for name in ("llama.cpp", "ours")) + " GB"
        mark = " *" if row["others"] > DISTURBED else ""
        quantise = shown(row["quantize"]) if row["quantize"] else ""
        ratio = whole / statistics.median(row["ours"])
        same_in = f"all but {', '.join(row['different'])}" if row["different"] else "all"
        lines.append(
            (
                row["type"] + mark,
                shown(row["convert"]),
                quantise,
                shown(row["ours"]),
                f"{ratio:.1f}",
                peaks,
                same_in,
            )
        )
    return lines


def page(record: Data) -> str:
    """The page of a record."""
    machine, engine = record["machine"], record["engine"]
    text = PAGE.format(
        machine=f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        commit=str(engine["llama_cpp_commit"])[:7], package=engine["package"], when=str(record["created"])[:10],
        command=record["command"], layers=len(LAYERS), experts=EXPERTS, vocab=VOCAB, shards=SHARDS,
        gigabytes=record["bytes"] / 1e9, turns=record["turns"], table=markdown(table(record["rows"])),
    )  # fmt: skip
    if any(row["others"] > DISTURBED for row in record["rows"]):
        text += "\n\\* Other work was running on the machine.\n"
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="measure-conversion", description=__doc__.splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--type", action="append", metavar="TYPE", help=f"instead of {', '.join(TYPES)}")
    parser.add_argument("--turns", type=int, default=2, help="times that both run (default 2)")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--page", type=Path, help="write the page there")
    parsed = parser.parse_args()
    try:
        with reporting() as told:
            ensure()  # whose quantisers convert-kimi takes
            engine, source = ensure(pristine=True), checkpoint(told)
            record: Data = {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": " ".join(["scripts/measure-conversion", *sys.argv[1:]]),
                "machine": machine_facts(), "engine": engine_facts(engine), "turns": parsed.turns,
                "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")), "rows": [],
            }  # fmt: skip
            for kind in parsed.type or TYPES:
                record["rows"].append(measure(source, kind, parsed.turns, engine, told))
        print(markdown(table(record["rows"])))
        for file, text in ((parsed.json, json.dumps(record, indent=1) + "\n"), (parsed.page, page(record))):
            if file is not None:
                atomically(file, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
    except EngineError as error:
        sys.exit(f"measure-conversion: error: {error}")


if __name__ == "__main__":
    main()
