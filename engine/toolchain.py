"""Compilers, CMake, Ninja, and the processor of this machine.

Input: the environment. Output: paths and versions, or an error that says how to install what is missing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.engine.errors import EngineError, install
from kimi_gguf.engine.limits import processors

# Variables that change what CMake, the compilers, the assembler and the linker make of the same sources and options:
# those of every build, and those of builds for one backend.
VARIABLES: dict[str, tuple[str, ...]] = {
    "": (
        "CFLAGS", "CXXFLAGS", "LDFLAGS",
        "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_RUN_PATH", "GCC_EXEC_PREFIX",
        "COMPILER_PATH",
        "CMAKE_PREFIX_PATH", "CMAKE_INCLUDE_PATH", "CMAKE_LIBRARY_PATH", "CMAKE_TOOLCHAIN_FILE",
        "SDKROOT", "MACOSX_DEPLOYMENT_TARGET", "CMAKE_OSX_ARCHITECTURES",
    ),
    "cuda": ("CUDAFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDAARCHS", "CUDAHOSTCXX", "CUDA_PATH"),
    "metal": ("OBJCFLAGS", "OBJC_INCLUDE_PATH"),
    "vulkan": ("VULKAN_SDK",),
}  # fmt: skip
MAX_THREADS = 512  # GGML_MAX_N_THREADS in ggml.h
# Of cores(), in help texts.
CORES = "the processors that this process may use, by affinity and quota; on a Mac the fast ones"
_PROGRAMS = {"": ("CC", "CXX"), "cuda": ("CUDACXX",)}  # variables that name a compiler, maybe with flags
_COMPILER_ADVICE = {
    "linux": "install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)",
    "darwin": "install Apple's command line tools: xcode-select --install",
}


@dataclass(frozen=True)
class Compiler:
    """A C or C++ compiler: its path and its version text.

    With a launcher, as in CXX="ccache g++", the path is the launcher's and the version the compiler's.
    """

    path: str
    version: str
    arguments: tuple[str, ...] = ()  # the words after the program, as in CXX="g++ -O0"

    @property
    def command(self) -> list[str]:
        """The words that run it."""
        return [self.path, *self.arguments]


def find_compilers(backend: str) -> dict[str, Compiler]:
    """The compilers that a build for `backend` uses, by language. Raises `EngineError` if one is missing."""
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {
        "C": ("CC", ("cc", "gcc", "clang")),
        "C++": ("CXX", ("c++", "g++", "clang++")),
    }
    if backend == "cuda":
        wanted["CUDA"] = ("CUDACXX", ("nvcc", "/usr/local/cuda/bin/nvcc"))
    return {language: _find(language, *where) for language, where in wanted.items()}


def build_variables(backend: str) -> tuple[tuple[str, str], ...]:
    """What the environment adds to a build: name and text of each of `VARIABLES` that is not empty, and of a variable
    that names a compiler the words after the program, as in CXX="g++ -O0". Raises `EngineError`."""
    names = (*VARIABLES[""], *VARIABLES.get(backend, ()))
    programs = (*_PROGRAMS[""], *_PROGRAMS.get(backend, ()))
    values = [(name, os.environ.get(name, "")) for name in names]
    values += [(name, shlex.join(program_words(name)[1:])) for name in programs]
    return tuple(sorted((name, text) for name, text in values if text))


def program_words(variable: str) -> list[str]:
    """The program and its arguments in a variable that names a compiler; empty if unset. Raises `EngineError`."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise EngineError(
            f"{variable} in the environment is not a command",
            expected="a program, and maybe flags",
            found=f"{text} ({error})",
            todo=f"correct {variable}, or unset it",
        ) from error


def binutils(compiler: Compiler) -> tuple[str, ...]:
    """The version lines of the assembler and the linker that a compiler calls, without those that do not tell theirs.

    Apple's do not: they come with the compiler.
    """
    versions = []
    for tool in ("as", "ld"):
        path = shutil.which(_first_line([*compiler.command, f"-print-prog-name={tool}"]) or tool)
        if path and (version := _first_line([path, "--version"])):
            versions.append(version)
    return tuple(versions)


def cpu_fingerprint() -> str:
    """A short hash of the processor's instruction sets: a build for this machine may not run on another."""
    return hashlib.sha256(f"{platform.machine()}\n{_cpu_flags()}".encode()).hexdigest()[:12]


def packaged_tool(name: str) -> str:
    """Path of `cmake` or `ninja`: the Python package's own program, or else the one on PATH."""
    try:
        if name == "cmake":
            folder = importlib.import_module("cmake").CMAKE_BIN_DIR
        else:
            folder = importlib.import_module("ninja").BIN_DIR
        path = shutil.which(name, path=folder)
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise EngineError(f"{name} is not installed", todo=install(name))
    return path


def cpuinfo(*names: str) -> str:
    """The first value in /proc/cpuinfo with one of these names; empty if there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def sysctl(name: str) -> str:
    """A fact about a Mac; empty on other systems, or if the Mac does not have it."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cores() -> int:
    """The number of processors that this process may use; on a Mac, that of the fast ones.

    All threads wait for the slowest one, so the slow processors of a Mac would slow down the others.
    """
    if fast := sysctl("hw.perflevel0.physicalcpu"):
        return int(fast)
    return processors().value


def _find(language: str, variable: str, names: tuple[str, ...]) -> Compiler:
    chosen, words = os.environ.get(variable), tuple(program_words(variable))
    for name in words[:1] if chosen else names:
        path = shutil.which(name)
        if path is not None:
            version = _version((path, *words[1:]), Path(path).stat().st_mtime_ns)
            return Compiler(path, version, words[1:])
    todo = _COMPILER_ADVICE.get(sys.platform, "install a C++17 compiler")
    if language == "CUDA":
        todo = "install NVIDIA's CUDA toolkit, or set CUDACXX to its nvcc"
    raise EngineError(
        f"no {language} compiler found",
        expected=f"{variable} in the environment, or one of {', '.join(names)} on PATH",
        found=f"{variable}={chosen}, which is not a program" if chosen else "none of them",
        todo=todo,
    )


@functools.cache
def _version(command: tuple[str, ...], _modified: int) -> str:
    """The line with the version of a compiler: of the one that is behind a launcher, too."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        raise EngineError(
            f"{shlex.join(command)} --version fails, so the compiler does not work",
            found=(result.stderr.strip() or f"exit status {result.returncode}"),
            todo=_COMPILER_ADVICE["darwin"]
            if sys.platform == "darwin"
            else "repair or reinstall the compiler",
        )
    return lines[-1] if "nvcc" in command[0] or lines[0].startswith("nvcc:") else lines[0]


def _first_line(command: list[str]) -> str:
    """The first line that a program prints; empty if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return ended.stdout.partition("\n")[0].strip() if ended.returncode == 0 else ""


def _cpu_flags() -> str:
    if flags := cpuinfo("flags", "Features"):
        return " ".join(sorted(flags.split()))
    return sysctl("machdep.cpu.brand_string") or platform.processor()
