"""Shared by the converter's tests: run the command, edit checkpoints, read GGUF files."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, dequantize
from random_checkpoint import Layout, Spec, write_checkpoint
from random_ling3 import LingSpec
from random_ling3 import write_checkpoint as write_ling3

from kimi_gguf.convert.cli import main
from kimi_gguf.tools import upstream_converter

Header = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The result of a run of the command."""

    status: int
    out: str
    err: str


@cache
def _files(spec: Spec | LingSpec, layout: Layout, shards: int) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        if isinstance(spec, LingSpec):
            write_ling3(Path(folder), spec, layout, shards)
        else:
            write_checkpoint(Path(folder), spec, layout, shards)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def fresh_checkpoint(folder: Path, spec: Spec | LingSpec, layout: Layout = "hub", shards: int = 2) -> Path:
    """`write_checkpoint`, but each kind is made only once in a test run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(spec, layout, shards).items():
        (folder / name).write_bytes(content)
    return folder


def convert(*arguments: object) -> Run:
    """Run `convert-kimi` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code if isinstance(end.code, int) else 2
    return Run(status, out.getvalue(), err.getvalue())


def start_convert(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `convert-kimi` in a separate process."""
    command = [sys.executable, "-m", "kimi_gguf.convert.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def upstream_convert(jobs: Sequence[upstream_converter.Job], sources: Path | None = None) -> None:
    """Convert all with llama.cpp's own converter, or with that of changed `sources`."""
    variables = upstream_converter.environment(sources) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(upstream_converter.command(jobs), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def killed_conversions(*arguments: object) -> dict[str, int]:
    """The counts of `conversion_killer`."""
    command = [sys.executable, Path(__file__).with_name("conversion_killer.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def assert_refused(run: Run, folder: Path, *words: str) -> None:
    """One clear error line with `words` in it, an error status, and no files in the output folder."""
    assert run.status != 0, "the damage went unnoticed"
    lines = run.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("convert-kimi: error: "), run.err
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert list(folder.iterdir()) == [], "something was left behind"


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, written back when the block ends."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


def split_safetensors(path: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(path: Path, header: Header | bytes, data: bytes) -> None:
    """Write a safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@contextmanager
def edited_tensors(path: Path) -> Iterator[dict[str, tuple[str, list[int], bytes]]]:
    """The tensors of a safetensors file as name -> (dtype, shape, bytes), written back as a valid file."""
    header, data = split_safetensors(path)
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    yield tensors
    out: Header = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, content) in tensors.items():
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    join_safetensors(path, out, b"".join(content for _, _, content in tensors.values()))


def edit_header(path: Path, change: Callable[[Header], None]) -> None:
    """Change the header of a safetensors file; the data is unchanged."""
    header, data = split_safetensors(path)
    change(header)
    join_safetensors(path, header, data)


def gguf_values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a GGUF file as float32, row-major shape."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in GGUFReader(path).tensors
    }


def gguf_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def gguf_keys(path: Path) -> dict[str, Any]:
    """Every key of a GGUF file except the counts that readers add."""
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def units_apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance between two float32 arrays of equal signs, in units in the last place."""
    bits = [np.ascontiguousarray(x).view(np.int32).astype(np.int64) for x in (a, b)]
    return int(np.abs(bits[0] - bits[1]).max())


def assert_upstreams_tensors(ours: Path, theirs: Path) -> None:
    """Names, types, shapes and bytes of a GGUF file are those of llama.cpp's converter.

    Only `ssm_a` may differ, by one unit in the last place: theirs is torch's exp in float32, which is not always the
    nearest float32. That ours is, test_convert_values.py tests.
    """
    found, expected = (
        {tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs)
    )
    assert set(found) == set(expected)
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape)), name
        if name.endswith(".ssm_a"):
            assert units_apart(tensor.data, other.data) <= 1, name
        else:
            assert tensor.data.tobytes() == other.data.tobytes(), name


def write_imatrix(path: Path, model: Path, every: int) -> None:
    """Random importances for every matrix, or only each `every`-th; some experts have no calls."""
    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    matrices = [t for t in GGUFReader(model).tensors if t.tensor_type.name == "BF16"]
    for tensor in matrices[::every]:
        columns, slices = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
        counts = np.full((1, 1), 9, "f4")
        if slices > 1:
            counts = rng.integers(0, 4, (slices, 1)).astype(np.float32)
        sums = rng.gamma(0.7, size=(slices, columns)).astype(np.float32) * np.maximum(counts, 1)
        writer.add_tensor(f"{tensor.name}.in_sum2", sums)
        writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
