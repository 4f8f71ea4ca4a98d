"""Programs that dispatch kernels to the emulated Metal device, and the device as a backend of ggml.

Models run on the backend with `llama_script.play`: `on_metal` is the setup, `dispatches` lists the kernels that ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import native_program
from compiled import compile_once
from emulators.metal import compile_backend, compile_device
from emulators.metal.build import DEVICE, DEVICE_OPTIONS, HEADERS
from llama_script import Setup
from native_program import ggml_libraries

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import find_compilers

NATIVE = native_program.NATIVE / "metal"


def compile_metal(name: str, folder: Path) -> Path:
    """Compile tests/native/metal/NAME.cpp, and NAME.metal when the program needs a kernel; return the program."""
    device = compile_device(folder, [NATIVE / f"{name}.metal"])
    command = [
        find_compilers("cpu")["C++"].path,
        *DEVICE_OPTIONS,
        f"-I{DEVICE}",
        *HEADERS,
        f"-I{NATIVE}",
    ]
    command += [str(NATIVE / f"{name}.cpp"), str(device), "-Wl,-rpath,$ORIGIN"]
    compile_once(command, folder / name)
    return folder / name


def compile_metal_backend(engine: Engine, ggml: Path, folder: Path) -> Path:
    """The backend of the tree `ggml` for the libraries of a build."""
    return compile_backend(ggml, folder, link=ggml_libraries(engine))


@contextmanager
def planted(backend: Path, source: str, right: str, wrong: str) -> Iterator[None]:
    """Kernels of ggml-metal with a fault: in kernels/SOURCE.metal `right` is replaced by `wrong`."""
    folder = backend.parent / "kernels"
    file = folder / f"{source}.metal.cpp"
    text = file.read_text()
    assert text.count(right) >= 1
    rows = (line.split("\t") for line in (folder / "kernels").read_text().splitlines())
    names = [row[0] for row in rows if row[1] == file.name]

    def write(content: str) -> None:
        file.write_text(content)
        for name in names:
            (folder / f"{name}.so").unlink(missing_ok=True)

    write(text.replace(right, wrong, 1))
    try:
        yield
    finally:
        write(text)


def on_metal(backend: Path, **chosen: Any) -> Setup:
    """A model with all layers on MTL0, or with those of `n_gpu_layers`; `chosen`: as for `Setup`."""
    return Setup(**{"backend": str(backend), "n_gpu_layers": 999, "op_offload": False, **chosen})


@dataclass(frozen=True)
class Dispatch:
    """A kernel that ran. kernel: with its function constants. nodes: operators with "+", and the first node's name."""

    kernel: str
    nodes: str
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    bytes_read: int
    bytes_written: int


_DISPATCH = re.compile(
    r"dispatch (\S+) of (.*): grid \((.*?)\), threads \((.*?)\), read (\d+), written (\d+)"
)


def dispatches(log: Path) -> list[Dispatch]:
    """The kernels in the file that KIMI_METAL_LOG named, in their order."""
    found = [
        _DISPATCH.fullmatch(line) for line in log.read_text().splitlines() if line.startswith("dispatch")
    ]
    return [
        Dispatch(kernel, nodes, _numbers(grid), _numbers(threads), int(read), int(written))
        for kernel, nodes, grid, threads, read, written in (each.groups() for each in found if each)
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
