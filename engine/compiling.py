"""CMake and Ninja: from sources to programs and libraries.

Input: a build spec and a scratch folder with the sources in src/. Output: build/bin/ in it, and a log.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.engine.build_spec import LIBRARIES, PROGRAMS, TEST_PROGRAMS, BuildSpec
from kimi_gguf.engine.errors import EngineError, UnfinishedError
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.engine.toolchain import cores, packaged_tool

# text of a log if a backend's tools are incomplete, and what to install
_ADVICE = (
    (r"CUDA::cublas|cublas_v2\.h|CUDA Toolkit not found|Could NOT find CUDAToolkit",
     "nvcc is installed without the rest of the toolkit: install NVIDIA's whole CUDA toolkit, with cuBLAS (its package "
     "cuda-toolkit, Debian's nvidia-cuda-toolkit); CUDACXX names its nvcc if that is not the first on PATH"),
    (r"Could NOT find Vulkan|SPIRV-Headers",
     "install what builds Vulkan programs: libvulkan-dev, glslc and spirv-headers (Debian, Ubuntu)"),
    (r"Killed signal terminated program",
     "the compiler was killed, probably because there was no memory left; build again, with fewer compilers at a time: "
     "taskset -c 0 COMMAND"),
)  # fmt: skip
_STEP = re.compile(r"\[(\d+)/(\d+)\] ")


def compile_tree(
    spec: BuildSpec, work: Path, tests: bool, lock: int, reporter: Reporter, limit: float | None = None
) -> dict[str, list[str]]:
    """Configure and build `work/src` in `work/build`; returns the names of the programs and test programs.

    lock: descriptor of the build lock; every child process holds it until it ends. limit: seconds of compiling, after
    which `UnfinishedError` is raised. Raises `EngineError` with the reason of a failure, from the log `work/build.log`.
    """
    log = work / "build.log"
    log.unlink(missing_ok=True)
    ninja = packaged_tool("ninja")
    reporter.phase("configure")
    command = [packaged_tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += ["-S", str(work / "src"), "-B", str(work / "build")]
    command += [f"-D{name}={value}" for name, value in spec.options]
    command += [f"-DLLAMA_BUILD_COMMIT={spec.commit}", "-DLLAMA_BUILD_NUMBER=0"]
    command += [f"-DGGML_KIMI_BUILD_ID={spec.sources}"]
    if spec.scripts:
        command += [f"-DCMAKE_PROJECT_TOP_LEVEL_INCLUDES={';'.join(map(str, spec.scripts))}"]
    # A release has the same bytes with and without ccache, which changes the paths that assertions name.
    released = "KIMI_PORTABLE" in dict(spec.options)
    launcher = None if released else shutil.which("ccache")
    languages = ["C", "CXX"] + (["CUDA"] if spec.backend == "cuda" else [])
    command += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={launcher or ''}" for language in languages]
    # relative paths for ccache; ignore a git repository around the tree
    environment = {**os.environ, "CCACHE_BASEDIR": str(work), "CCACHE_NOHASHDIR": "1"}
    environment |= {"GIT_CEILING_DIRECTORIES": str(work), "NINJA_STATUS": "[%f/%t] "}
    _run(command, environment, log, lock, "CMake cannot configure llama.cpp")
    command = [ninja, "-C", str(work / "build"), "-t", "targets", "all"]
    targets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"(?m)^([\w-]+): phony$", targets))
    libraries, programs, test_programs = (
        [name for name in names if name in known] for names in (LIBRARIES, PROGRAMS, TEST_PROGRAMS)
    )
    wanted = {"programs": programs, "tests": test_programs if tests else []}
    reporter.phase("compile")
    command = [ninja, "-C", str(work / "build"), "-j", str(cores())]
    command += [*libraries, *wanted["programs"], *wanted["tests"]]
    _run(command, environment, log, lock, "llama.cpp does not compile", reporter, limit)
    return wanted


def _run(
    command: Sequence[str],
    environment: dict[str, str],
    log: Path,
    lock: int,
    failure: str,
    reporter: Reporter | None = None,
    limit: float | None = None,
) -> None:
    """Run a command, write its output to the log, and report its `[n/m]` steps; it ends if the build is interrupted,
    or after `limit` seconds. Ninja removes the outputs of the steps that it could not finish."""
    reached = threading.Event()
    done = "0 of ?"
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", env=environment, start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip
        assert child.stdout is not None

        def stop() -> None:
            reached.set()
            os.killpg(child.pid, signal.SIGTERM)

        timer = threading.Timer(limit or 0.0, stop)
        if limit is not None:
            timer.start()
        try:
            for line in child.stdout:
                file.write(line)
                if reporter is not None and (step := _STEP.match(line)):
                    reporter.step(int(step[1]), int(step[2]))
                    done = f"{step[1]} of {step[2]}"
            status = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
        finally:
            timer.cancel()
    if status != 0 and reached.is_set():
        raise UnfinishedError(
            f"llama.cpp is not compiled after {limit:.0f} s",
            found=f"{done} steps done",
            todo="build again: it continues",
        )
    if status != 0:
        raise EngineError(failure, found=_errors(log), todo=advice(log.read_text(errors="replace")))


def advice(log: str) -> str:
    """Advice for a build that failed with this log."""
    known = (todo for pattern, todo in _ADVICE if re.search(pattern, log))
    return next(known, "correct what the log shows, then build again")


def _errors(log: Path, count: int = 8) -> str:
    """The reason of the failure in a log: CMake's first message, or the compiler's last errors."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    configuring = [i for i, line in enumerate(lines) if line.startswith("CMake Error")]
    if configuring:
        message = [line.strip() for line in lines[configuring[0] :] if line]
        return "\n    ".join(message[:count])
    telling = [line for line in lines if re.search(r"\berror\b|^FAILED", line, re.IGNORECASE)]
    return "\n    ".join((telling or lines)[-count:])
