"""A miniature llama.cpp: an archive with the same folders, targets and options, which builds in a second.

Input: a folder for it. Output: the archive, a pin for it, and build specs, so that the engine is tested
with real tools and no network. `main()` lets a test run the engine or the command in a separate process:
`python tiny_llama.py FOLDER build`, or `python tiny_llama.py FOLDER kimi-llama ARGUMENTS`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.engine import build_spec
from kimi_gguf.engine import builds as engine
from kimi_gguf.engine.archive import file_sha256
from kimi_gguf.engine.build import Cache, build
from kimi_gguf.engine.progress import Plain, Silent
from kimi_gguf.patches.pin import Pin, load_pin
from kimi_gguf.patches.series import Series, load_series
from kimi_gguf.patches.tree import tree_hash
from kimi_gguf.scripts import kimi_llama

PATCH = """Subject: [PATCH] tiny: answer two

Two is the better answer.

Upstream: never.
Drop when: one is right.
Sources: llama/tiny

---
diff --git a/src/answer.cpp b/src/answer.cpp
--- a/src/answer.cpp
+++ b/src/answer.cpp
@@ -1,3 +1,5 @@
+#include "kimi.h"
+
 int answer() {
-    return 1;
+    return KIMI_ANSWER;
 }
"""
OVERLAY_FILE = "#define KIMI_ANSWER 2\n"

ECHO = """#include <cstdio>
int main(int n, char ** v) { for (int i = 1; i < n; i++) std::puts(v[i]); return %d; }
"""
# llama-cli prints its commit and the library's answer; llama-completion prints its arguments and exits with 7,
# llama-speculative-simple with 8.
FILES = {
    "CMakeLists.txt": """cmake_minimum_required(VERSION 3.14...3.28)
project(tiny CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
configure_file(commit.h.in ${CMAKE_BINARY_DIR}/commit.h)
add_library(llama SHARED src/answer.cpp src/steady.cpp)
set_target_properties(llama PROPERTIES VERSION 1.0 SOVERSION 1)
foreach(name llama-cli llama-completion llama-speculative-simple test-unicode)
    add_executable(${name} tools/${name}.cpp)
    target_include_directories(${name} PRIVATE ${CMAKE_BINARY_DIR})
    target_link_libraries(${name} PRIVATE llama)
endforeach()
""",
    "commit.h.in": '#define COMMIT "@LLAMA_BUILD_COMMIT@"\n',
    "LICENSE": "Do as you please too.\n",
    "include/llama.h": "int answer();\n",
    "ggml/include/ggml.h": "// nothing\n",
    "src/answer.cpp": "int answer() {\n    return 1;\n}\n",
    "src/steady.cpp": "int steady() {\n    return 5;\n}\n",
    "tools/llama-cli.cpp": '#include <cstdio>\n#include "commit.h"\nint answer();\n'
    'int main() { std::printf("%s answer %d\\n", COMMIT, answer()); }\n',
    "tools/llama-completion.cpp": ECHO % 7,
    "tools/llama-speculative-simple.cpp": ECHO % 8,
    "tools/test-unicode.cpp": "int main() {}\n",
    ".gitignore": "src/kimi*\n",
}
ROOT = "tiny-1.0"
NO_TENSORS = b"GGUF\x03" + bytes(19)  # a GGUF file without keys and tensors
PACKAGE = {
    "llama_cpp/__init__.py": '__version__ = "1.0"\n',
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n\nTiny.\n",
    "LICENSE.md": "Do as you please.\n",
}


@dataclass(frozen=True)
class Tiny:
    """The miniature in a folder: its pin, its series, its source archive and its own cache."""

    pin: Pin
    series: Series
    archive: Path
    cache: Cache

    def spec(self, upstream: bool = False, source: Path | None = None) -> build_spec.BuildSpec:
        """The build spec of the patched or upstream miniature."""
        real = build_spec.make_build_spec(upstream=True, source=source)
        series = Series(()) if upstream else self.series
        return dataclasses.replace(real, pin=self.pin, upstream=upstream, series=series)

    def build(
        self,
        upstream: bool = False,
        tests: bool = False,
        source: Path | None = None,
        limit: float | None = None,
    ) -> Path:
        """Build it; returns the folder of the build."""
        return build(self.spec(upstream, source), self.cache, self.archive, tests, Silent(), limit)


def pack(archive: Path, files: Mapping[str, str], extra: tuple[tarfile.TarInfo, ...] = ()) -> None:
    """Write an archive with these files and with the members in `extra`."""
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in extra:
            tar.addfile(member)


def write_tree(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files below a folder; return the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def make(folder: Path, files: Mapping[str, str] = FILES, patch: str = PATCH) -> Tiny:
    """Write the miniature's archive and series into a folder."""
    write_tree(folder / "tree", files)
    write_tree(folder / "series", {"fixes/0001-answer.patch": patch})
    write_tree(folder / "ops", {"llama/tiny/kimi.h": OVERLAY_FILE})
    members = {f"llama.cpp/{name}": text for name, text in files.items()} | PACKAGE
    pack(folder / f"{ROOT}.tar.gz", {f"{ROOT}/{name}": text for name, text in members.items()})
    patched = write_tree(folder / "patched", files)
    answer = '#include "kimi.h"\n\nint answer() {\n    return KIMI_ANSWER;\n}\n'
    write_tree(patched, {"src/kimi.h": OVERLAY_FILE, "src/answer.cpp": answer})
    return load(folder)


def load(folder: Path, patched: str | None = None) -> Tiny:
    """The miniature that `make` wrote into a folder."""
    archive = folder / f"{ROOT}.tar.gz"
    pin = dataclasses.replace(
        load_pin(),
        package="tiny",
        version="1.0",
        archive=archive.name,
        archive_sha256=file_sha256(archive),
        source_folder=f"{ROOT}/llama.cpp",
        python_folder=f"{ROOT}/llama_cpp",
        upstream_tree_sha256=tree_hash(folder / "tree"),
        patched_tree_sha256=patched or tree_hash(folder / "patched"),
    )
    series = load_series(folder / "series", folder / "ops")
    return Tiny(pin, series, archive, Cache(folder / "cache"))


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Run `main` in a separate process."""
    command = [sys.executable, __file__, str(folder), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `kimi-llama` on the miniature in a folder, and wait for it. A copy of this process needs no imports."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = os.fork()
        if process == 0:
            os.environ.update(environment)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os._exit(_exit_status([str(folder), "kimi-llama", *arguments]))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read(), err.read())


def _exit_status(arguments: list[str]) -> int:
    """Run `main` to the end of a process, as Python would."""
    status: object = 1
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 1


def main(arguments: list[str]) -> int:
    """Build the miniature, or run the command on it, in this process."""
    tiny = load(Path(arguments[0]))
    if arguments[1] == "build":
        print(build(tiny.spec(), tiny.cache, tiny.archive, False, Plain()))
        return 0
    build_spec.load_pin = lambda: tiny.pin
    build_spec.load_series = lambda: tiny.series
    kimi_llama.load_series = lambda: tiny.series
    engine.cache_folder = lambda: tiny.cache.root
    return kimi_llama.main(arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
