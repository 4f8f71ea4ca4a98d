"""Upstream's own test programs, compiled from a llama.cpp tree with upstream's CMake, for the tests of pull requests.

Input: a tree, a CMake target and a command. Output: exit status and text of the command. One folder serves all trees:
only files that differ are written and compiled again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.engine.toolchain import cores, packaged_tool
from kimi_gguf.patches.diff import PatchConflictError
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.tree import Tree
from kimi_gguf.tools.pull_request import PullRequest

# The tests compare values, not times: -O1 takes half of the time to compile.
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_C_FLAGS_RELEASE=-O1", "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DBUILD_SHARED_LIBS=ON", "-DFETCHCONTENT_FULLY_DISCONNECTED=ON", "-DGGML_CCACHE=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_COMMIT=pin",
    "-DLLAMA_BUILD_NUMBER=0",
)  # fmt: skip
_LONGEST = 600  # seconds for a test

NEEDED = "needed: its test fails without it"
IN_UPSTREAM = "upstream has it: its test passes without it"
OTHER = "not clear"


@dataclass(frozen=True)
class Outcome:
    """What a test program did."""

    passed: bool
    text: str


def run_test(tree: Tree, target: str, run: str, work: Path) -> Outcome:
    """Compile the target from the tree in `work` and run the command in its sources.

    Raises `PatchError` if it does not compile.
    """
    tree.write_to(work / "src")
    build = work / "build"
    _compile(target, work)
    program, *words = shlex.split(run)
    try:
        done = subprocess.run(
            [build / "bin" / program, *words],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=work / "src",
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            timeout=_LONGEST,
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, f"{run} did not end within {_LONGEST} s")
    ended = f"\nended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    return Outcome(done.returncode == 0, done.stdout + done.stderr + ended)


def _compile(target: str, work: Path) -> None:
    build = work / "build"
    ninja = packaged_tool("ninja")
    configure = [
        packaged_tool("cmake"),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-S",
        str(work / "src"),
    ]
    commands = [] if (build / "build.ninja").exists() else [[*configure, "-B", str(build), *_OPTIONS]]
    commands.append([ninja, "-C", str(build), "-j", str(cores()), target])
    for command in commands:
        # a git repository around the folder is not upstream's
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(work)}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode != 0:
            raise PatchError(
                f"{target} does not compile in {work}", found="\n    ".join(done.stdout.splitlines()[-12:])
            )
    link = work / "src/build"  # where upstream's scripts look for programs
    if not link.exists():
        link.symlink_to(build)


def without_fix(request: PullRequest, source: Path, work: Path) -> tuple[str, str]:
    """Whether a llama.cpp tree needs a fix, by the fix's test on the tree without it; and the reason."""
    assert request.test is not None
    tree = Tree(source)
    try:
        request.apply(tree, fix=False)
        outcome = run_test(tree, request.test.target, request.test.run, work)
    except PatchConflictError as conflict:
        return OTHER, f"the test does not apply: {conflict}"
    except PatchError as error:
        return OTHER, str(error)
    if outcome.passed:
        return IN_UPSTREAM, ""
    if request.test.fails in outcome.text:
        return NEEDED, request.test.fails
    return OTHER, f"the test fails, but does not print {request.test.fails!r}:\n{_last(outcome.text)}"


def prove(request: PullRequest, source: Path, work: Path) -> str | None:
    """None if the test of a pull request fails without the fix and passes with it, else what is wrong."""
    assert request.test is not None
    verdict, reason = without_fix(request, source, work)
    if verdict != NEEDED:
        return f"{verdict}: {reason}" if reason else verdict
    tree = Tree(source)
    request.apply(tree)
    outcome = run_test(tree, request.test.target, request.test.run, work)
    return None if outcome.passed else f"the test fails with the fix:\n{_last(outcome.text)}"


def _last(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-8:])
