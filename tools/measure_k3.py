r"""Measures the conversion of Kimi K3 at its real size: a plan of the whole model, and one layer with all its experts.

    tools/run measure_k3 --json docs/bench-records/conversion-k3.json \
        --page docs/bench-conversion-k3.md

Input: sparse checkpoints, made in a temporary folder, zero except for one matrix of an expert. The layer is converted
twice. The second conversion is killed in the middle and resumed. Outputs take no disk space where they are zero; they
are compared by their hash. Output: seconds, peak resident memory, whether the files are equal; as JSON, and as
docs/bench-conversion-k3.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from kimi_gguf.bench.load import Watch, resident_memory
from kimi_gguf.bench.report import Data, Rows, mark, markdown
from kimi_gguf.convert.model.kimi_k3 import PREFIX
from kimi_gguf.engine.archive import file_sha256
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import machine_facts
from kimi_gguf.engine.toolchain import cores
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.tools.record_page import add_outputs, machine_text, page_of, with_note, write
from kimi_gguf.tools.synthetic_checkpoint import K3_SHARDS, k3_config, write_synthetic

LAYERS = "KM"  # the first has a dense FFN, the second the experts
VOCAB = 4096  # the embedding is small next to the experts
MATRIX = 3072 * 3584 // 2  # bytes of a matrix of an expert

PAGE = """\
# Kimi K3 at its real size

Written by `tools/run measure_k3 --page`; do not edit.

{machine}, {used} used. Measured {when}: `{command}`.

The checkpoints are sparse files with the published widths and types: zeros, except for one matrix of an expert. Zeros
of the output are not stored, so that the times contain nearly no reading from or writing to a disk. "The layer" is a
model of two layers: one with a dense FFN, and one with {experts} experts in MXFP4. Its second conversion was killed
(SIGKILL) when half of the file was written, and resumed. Processor time is that of all threads and includes the start
of Python. Peak is the largest resident memory of the process.

{table}
The resumed file and that of the uninterrupted conversion have the same hash (SHA-256 `{sha256:.16}…`).
"""


def command(*words: object) -> list[str]:
    """A conversion in a process of its own."""
    return [sys.executable, "-P", str(Path(__file__).with_name("sparse_conversion.py")), *map(str, words)]


def run(*words: object) -> Data:
    """Plan or convert; returns what sparse_conversion prints. Raises `EngineError`."""
    watch, before = Watch(()), processor_time()
    done = subprocess.run(command(*words), capture_output=True, text=True)
    if done.returncode != 0:
        raise EngineError(f"sparse_conversion ended with status {done.returncode}", found=done.stderr[-300:])
    found: Data = json.loads(done.stdout)
    return found | {"processor": processor_time() - before, "others": watch.others()}


def processor_time() -> float:
    """Seconds that all processes took that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plan(folder: Path, config: Data, shards: int) -> Data:
    """Plan the conversion of a sparse checkpoint."""
    return run(write_synthetic(folder / "model", config, shards))


def layer(folder: Path, experts: int) -> Data:
    """Convert a layer, convert it again, kill that in the middle, and resume it. Raises `EngineError`."""
    source = write_synthetic(folder / "model", k3_config(LAYERS, experts, VOCAB), 3)
    matrix = f"{PREFIX}model.layers.1.block_sparse_moe.experts.{experts // 2}.w3.weight_packed"
    poke(source, matrix, np.random.default_rng(9).bytes(MATRIX))
    whole, resumed = folder / "whole.gguf", folder / "resumed.gguf"
    runs = {"whole": run(source, whole)}
    runs["killed"] = killed(source, resumed, whole.stat().st_size // 2)
    runs["resumed"] = run(source, resumed, "--resume")
    expected, found = file_sha256(whole), file_sha256(resumed)
    if found != expected:
        raise EngineError("the resumed file is another one", expected=expected, found=found)
    return {"experts": experts, "runs": runs, "sha256": found}


def poke(source: Path, name: str, content: bytes) -> None:
    """Write the data of a tensor into its sparse file."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    with (source / index["weight_map"][name]).open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        assert end - begin == len(content)
        file.seek(8 + length + begin)
        file.write(content)


def killed(source: Path, output: Path, size: int) -> Data:
    """Start a conversion and kill it when it has written `size` bytes. Raises `EngineError`."""
    growing = output.parent / f".{output.name}.unfinished" / output.name
    watch, before, began = Watch(()), processor_time(), time.monotonic()
    with subprocess.Popen(command(source, output), stdout=subprocess.DEVNULL) as process:
        while not growing.exists() or growing.stat().st_size < size:
            if process.poll() is not None:
                raise EngineError("the conversion ended before it was killed")
            time.sleep(0.001)
        peak = resident_memory(process.pid).get("peak", 0)
        process.kill()
    return {
        "bytes": growing.stat().st_size,
        "seconds": time.monotonic() - began,
        "processor": processor_time() - before,
        "peak": peak,
        "tensors": growing.with_name("journal").read_bytes().count(b"\n") - 1,
        "others": watch.others(),
    }


def table(record: Data) -> Rows:
    """The page's table."""
    runs = record["layer"]["runs"]
    rows = {
        "plan of the whole model": record["plan"],
        "the layer, not interrupted": runs["whole"],
        "the layer, until it was killed": runs["killed"],
        "the layer, resumed": runs["resumed"],
    }
    lines: Rows = [("what", "file, GB", "time, s", "processor time, s", "peak, MiB")]
    for what, row in rows.items():
        size, peak = f"{row['bytes'] / 1e9:.2f}", f"{row['peak'] / 2**20:.0f}"
        lines.append((what, size, f"{row['seconds']:.1f}{mark(row)}", f"{row['processor']:.1f}", peak))
    return lines


def page(record: Data) -> str:
    """The page of a record."""
    layer = record["layer"]
    text = PAGE.format(
        machine=machine_text(record["machine"]), used=record["cores_used"], when=str(record["created"])[:10],
        command=record["command"], experts=layer["experts"], table=markdown(table(record)), sha256=layer["sha256"],
    )  # fmt: skip
    return with_note(text, [record["plan"], *layer["runs"].values()])


def measure() -> Data:
    """The record: a plan of the whole model, and a layer with all experts. Raises `EngineError`."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "tools/run measure_k3 " + " ".join(sys.argv[1:]),
            "machine": machine_facts(),
            "cores_used": cores(),
            "plan": plan(Path(one), k3_config(), K3_SHARDS),
            "layer": layer(Path(other), 896),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="measure_k3", description=(__doc__ or "").splitlines()[0])
    add_outputs(parser)
    parsed = parser.parse_args()
    try:
        if parsed.draw is None:
            record = measure()
            write(parsed.json, json.dumps(record, indent=1) + "\n")
            text = page(record)
        else:
            text = page_of(parsed.draw, page, "measure_k3")
        write(parsed.page, text)
    except KimiError as error:
        sys.exit(f"measure_k3: error: {error}")


if __name__ == "__main__":
    main()
