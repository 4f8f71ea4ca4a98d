"""Everything that a build is made of: sources, patches, options, compilers with assembler and linker, variables of the
environment, processor. Equal specs make equal builds.

CMake's and Ninja's versions are not in it: a release pins both (constraints.txt), and Ninja only runs CMake's commands.

Input: the caller's options and the machine. Output: `BuildSpec`, whose keys name the finished build
and its scratch folder. All defaults of the build are in the tables here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.toolchain import (
    Compiler,
    binutils,
    build_variables,
    cpu_fingerprint,
    cpuinfo,
    find_compilers,
)
from kimi_gguf.patches.pin import Pin, load_pin
from kimi_gguf.patches.series import Series, load_series
from kimi_gguf.patches.tree import Tree, list_files

LAYOUT = 3  # layout of the folders of builds and sources; increment it when one changes

_ORIGIN = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
# Run paths must take precedence over LD_LIBRARY_PATH, or a stray libllama could replace the build's own.
_LINK = {} if sys.platform == "darwin" else {"LINKER_FLAGS": "-Wl,--disable-new-dtags"}

# Upstream cannot run Kimi-Linear with its AMX matmuls (patches/fixes, 0023); ours need no option for AMX. Both builds
# have the same options, so that they share what they compile; a build for all CPUs has them on every machine.
_NO_AMX = {f"CMAKE_{language}_FLAGS_INIT": "-U__AMX_INT8__" for language in ("C", "CXX")}

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",  # one file per library: a wheel cannot contain symbolic links
    "CMAKE_INSTALL_RPATH": f"{_ORIGIN};{_ORIGIN}/../lib",
    **{f"CMAKE_{kind}_{name}": flags for kind in ("EXE", "SHARED") for name, flags in _LINK.items()},
    "FETCHCONTENT_FULLY_DISCONNECTED": "ON",
    "GGML_BLAS": "OFF",  # on by default on macOS, where it would take matmuls from the CPU's own kernels
    "GGML_CCACHE": "OFF",  # the launcher is set here, for llama.cpp's own files too
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "GGML_RPC_RDMA": "OFF",  # it waits without a deadline, and its library would become a requirement
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "ON",  # only configured, except llama-speculative-simple
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "ON",  # only configured; compiled on request
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    **(_NO_AMX if "amx_int8" in cpuinfo("flags").split() else {}),
}

# cpu-all: the CPU backend as a library for each kind of processor; ggml loads the best one when it starts.
BACKENDS: dict[str, dict[str, str]] = {
    "cpu": {"GGML_METAL": "OFF"},
    "cpu-all": {
        "GGML_METAL": "OFF", "GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON", **_NO_AMX,
    },
    "cuda": {"GGML_METAL": "OFF", "GGML_CUDA": "ON"},
    "metal": {"GGML_METAL": "ON", "GGML_METAL_EMBED_LIBRARY": "ON"},
    "vulkan": {"GGML_METAL": "OFF", "GGML_VULKAN": "ON"},
}  # fmt: skip
CPU_BACKENDS = ("cpu", "cpu-all")

FAST_COMPILE = Path(__file__).with_name("fast_compile.cmake")  # for the pinned sources, not for a checkout
PORTABLE = Path(__file__).with_name("portable.h")  # which it includes in portable builds
ARM_VARIANTS = Path(__file__).with_name("arm_variants.cmake")  # for builds for all CPUs on ARM Linux

# Settings of a cross compilation: CMake's own names.
SYSTEM, MACHINE, EMULATOR = "CMAKE_SYSTEM_NAME", "CMAKE_SYSTEM_PROCESSOR", "CMAKE_CROSSCOMPILING_EMULATOR"

LIBRARIES = ("llama", "mtmd")

VERIFY = "kimi-verify"  # compares the operators on a GPU with the CPU; only in patched builds

PROGRAMS = (
    VERIFY, "ggml-rpc-server", "llama-batched-bench", "llama-bench", "llama-cli", "llama-completion",
    "llama-gguf-split", "llama-imatrix", "llama-perplexity", "llama-quantize", "llama-server",
    "llama-speculative-simple", "llama-tokenize",
)  # fmt: skip

TEST_PROGRAMS = (
    "test-backend-ops", "test-chat-template", "test-llama-archs", "test-quantize-fns",
    "test-recurrent-state-rollback", "test-save-load-state", "test-tiled-mulmat", "test-tokenizer-0",
    "test-tokenizer-1-bpe", "test-unicode",
)  # fmt: skip


@dataclass(frozen=True)
class BuildSpec:
    """Everything that determines a build, except the test programs, which are added to it."""

    pin: Pin
    series: Series  # empty for upstream
    upstream: bool
    backend: str
    options: tuple[tuple[str, str], ...]
    compilers: tuple[tuple[str, Compiler], ...]
    binutils: tuple[str, ...]  # versions of the assembler and the linker
    variables: tuple[tuple[str, str], ...]  # of the environment, empty unless some are set
    cpu: str
    source: Path | None  # a llama.cpp checkout instead of the archive's

    @cached_property
    def source_tree(self) -> Tree | None:
        """The checkout's files, if the sources come from one."""
        return None if self.source is None else _checkout(self.source)

    @cached_property
    def origin(self) -> str:
        """The sources' identity: the archive's hash, or the checkout's tree hash."""
        tree = self.source_tree
        return f"archive {self.pin.archive_sha256}" if tree is None else f"tree {tree.hash()}"

    @cached_property
    def sources(self) -> str:
        """Identifies the patched sources: programs of builds with the same value use our operators over RPC."""
        text = f"{self.origin} {self.series.digest()}"
        return "" if self.upstream else hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def key(self) -> str:
        """Names the finished build."""
        return _digest(LAYOUT, self.origin, self.series.digest(), self.upstream, self.work_key)

    @cached_property
    def work_key(self) -> str:
        """Names the scratch folder, which the upstream and the patched build share, one after the other."""
        compilers = [(language, compiler.path, compiler.version) for language, compiler in self.compilers]
        files = [*self.scripts, PORTABLE] if self.source is None else self.scripts
        script = "".join(path.read_text() for path in files)
        tools = (compilers, self.binutils, self.variables)
        return _digest(LAYOUT, self.options, tools, self.cpu, script)

    @property
    def scripts(self) -> list[Path]:
        """What CMake includes before the sources' own CMakeLists.txt."""
        scripts = [FAST_COMPILE] if self.source is None else []
        return [*scripts, ARM_VARIANTS] if self.backend == "cpu-all" and self.cpu == "aarch64" else scripts

    @property
    def commit(self) -> str:
        """The commit that the programs report: upstream's, or a checkout's tree hash, marked if patched."""
        known = self.origin in (f"archive {self.pin.archive_sha256}", f"tree {self.pin.upstream_tree_sha256}")
        base = self.pin.short_commit if known else self.origin.replace("tree ", "tree-")[:13]
        mark = "" if self.upstream else f"-kimi-{self.series.digest()[:8]}"
        return base + mark


def make_build_spec(
    upstream: bool = False,
    backend: str = "cpu",
    source: Path | None = None,
    defines: tuple[tuple[str, str], ...] = (),
) -> BuildSpec:
    """The build spec for these options on this machine; `EngineError` for an unknown backend or no compiler."""
    if backend not in BACKENDS:
        raise EngineError(
            f"unknown backend {backend!r}", expected=", ".join(BACKENDS), todo="give one of these"
        )
    options = {**OPTIONS, **BACKENDS[backend], **dict(defines)}
    machine = options.get(MACHINE, platform.machine())
    compilers = find_compilers(backend)
    return BuildSpec(
        pin=load_pin(),
        series=_series(upstream),
        upstream=upstream,
        backend=backend,
        options=tuple(sorted(options.items())),
        compilers=tuple(compilers.items()),
        binutils=binutils(compilers["C++"]),
        variables=build_variables(backend),
        cpu=processor(backend, machine),
        source=None if source is None else source.resolve(),
    )


def provenance(upstream: bool) -> dict[str, object]:
    """The manifest of a build of this pin and series, without its options and its processor."""
    return {
        "upstream": upstream,
        "archive_sha256": load_pin().archive_sha256,
        "series_sha256": _series(upstream).digest(),
        "source": None,
    }


def processor(backend: str, machine: str | None = None) -> str:
    """The processors that can run a build made here: those like this one, or all of its architecture.

    machine: the architecture of a build for all processors, by default this machine's.
    """
    return (machine or platform.machine()) if backend == "cpu-all" else cpu_fingerprint()


def _series(upstream: bool) -> Series:
    return Series(()) if upstream else load_series()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _checkout(folder: Path) -> Tree:
    """A llama.cpp checkout: the files that git tracks, or all files except build folders if git is not available."""
    missing = [
        name for name in ("CMakeLists.txt", "include/llama.h", "ggml/include/ggml.h")
        if not (folder / name).is_file()
    ]  # fmt: skip
    if missing:
        raise EngineError(
            f"{folder} is not a llama.cpp source folder",
            expected="CMakeLists.txt, include/llama.h and ggml/include/ggml.h in it",
            found=f"no {', no '.join(missing)}",
            todo="give the top folder of a llama.cpp checkout",
        )
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        try:
            listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
            return Tree(folder, [path for path in listed if path and (folder / path).is_file()])
        except (OSError, subprocess.CalledProcessError):
            pass  # a stray .git file of an archive, or git is not installed: use all files
    return Tree(folder, [path for path in list_files(folder) if not path.startswith("build")])
