"""Programs that dispatch kernels to the emulated Metal device, and the device as a backend of ggml."""

from __future__ import annotations

import subprocess
from pathlib import Path

import native_program
from emulators.metal import compile_backend, compile_device
from emulators.metal.build import DEVICE, DEVICE_OPTIONS, INCLUDE
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
        f"-I{INCLUDE}",
        f"-I{NATIVE}",
    ]
    command += [str(NATIVE / f"{name}.cpp"), str(device), f"-Wl,-rpath,{device.parent}"]
    subprocess.run([*command, "-o", str(folder / name)], check=True)
    return folder / name


def compile_metal_backend(engine: Engine, ggml: Path, folder: Path) -> Path:
    """The backend of the tree `ggml` for the libraries of a build."""
    return compile_backend(ggml, folder, link=ggml_libraries(engine))
