"""Compiles our C and C++ sources for Apple silicon, with clang, libc++ and Darwin's headers.

The compiler is zig's, from PyPI. It has no frameworks of Apple, so Objective-C and Metal are not compiled.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree

COMPILER = [sys.executable, "-m", "ziglang"]
LANGUAGES = {".c": ["cc", "-std=gnu11"], ".cpp": ["c++", "-std=gnu++17"]}
OPTIONS = ["-target", "aarch64-macos", "-mcpu=apple_m1", "-O0", "-c", "-Wall", "-Wextra", "-Werror"]
OPTIONS += [
    "-fno-sanitize=undefined"
]  # zig adds this sanitizer at -O0; compiling takes 12 % less time without it
UPSTREAM_HEADERS = (
    "ggml/include", "ggml/src", "ggml/src/ggml-cpu", "ggml/src/ggml-metal",
    "include", "src", "common", "tools/mtmd", "tools/server", "vendor",
)  # fmt: skip
SUFFIXES = {".c", ".cpp", ".h", ".hpp", ".metal"}  # the last: arguments of kernels, which the host includes


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C and C++ sources and headers of the patched llama.cpp."""
    root = tmp_path_factory.mktemp("patched")
    tree = Tree(upstream_source() / "llama.cpp")
    load_series().apply(tree)
    for path in tree.paths():
        if Path(path).suffix in SUFFIXES and (content := tree.read(path)) is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    return root


# Sources of the server take 10 s each for their headers.
@pytest.mark.parametrize("server", [False, pytest.param(True, marks=pytest.mark.full)])
def test_our_sources_compile_for_apple_silicon(server: bool, patched: Path, tmp_path: Path) -> None:
    ours = sorted(path for path in patched.rglob("*") if "kimi" in path.relative_to(patched).parts)
    sources = [path for path in ours if path.suffix in LANGUAGES]
    folders = sorted({path.parent for path in ours if path.suffix == ".h"})
    includes = [f"-I{folder}" for folder in folders]
    includes += [word for name in UPSTREAM_HEADERS for word in ("-isystem", str(patched / name))]
    sources = [path for path in sources if ("server" in path.relative_to(patched).parts) == server]
    assert len(sources) > (2 if server else 40)
    failures = []
    for source in sources:
        command = [
            *COMPILER,
            *LANGUAGES[source.suffix],
            *OPTIONS,
            *includes,
            source,
            "-o",
            tmp_path / "object",
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            failures.append(f"{source.relative_to(patched)}:\n{ended.stderr}")
    assert not failures, "\n".join(failures)
