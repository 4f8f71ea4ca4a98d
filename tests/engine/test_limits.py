"""Defaults follow what the kernel gives a process: affinity and quota, cgroups, address space, reclaimable memory."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from native_program import compile_shim
from small_memory import SHIM

from kimi_gguf.convert.output.stream import CHUNK_ELEMENTS, Pace
from kimi_gguf.engine import limits, toolchain
from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts import kimi_llama, llama_tools

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")

GIB = 1 << 30
MEMINFO = "MemAvailable: 20971520 kB\nCommitLimit: 12582912 kB\nCommitted_AS: 4194304 kB\n"
V1 = "30 20 0:1 {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
V2 = "31 20 0:2 {root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
DEVICE_MEMORY = """
import ctypes, sys
ggml = ctypes.CDLL(sys.argv[1] + "/libggml.so")
ggml.ggml_backend_load_all()
ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
device = ctypes.c_void_p(ggml.ggml_backend_dev_by_type(0))
free, total = ctypes.c_size_t(), ctypes.c_size_t()
ctypes.CDLL(sys.argv[1] + "/libggml-base.so").ggml_backend_dev_memory(
    device, ctypes.byref(free), ctypes.byref(total)
)
print(free.value, total.value)
"""


@dataclass(frozen=True)
class Machine:
    """A /proc and /sys, and what follows from it: GiB that are available, and threads. total: GiB of the engine's
    device, 0 for the machine's."""

    cgroup: str = "0::/\n"
    mounts: str = ""
    files: dict[str, str] = field(default_factory=dict)
    memory: int = 20
    total: int = 0
    threads: int = 4


def v2(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    where = f"sys/fs/cgroup{folder}"
    return {
        f"{where}/memory.max": limit,
        f"{where}/memory.current": str(used),
        f"{where}/memory.stat": f"anon 1\ninactive_file {cached // 2}\nactive_file {cached // 2}\n",
    }


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    where = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{where}/memory.limit_in_bytes": str(limit),
        f"{where}/memory.usage_in_bytes": str(used),
        f"{where}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n",
    }


def quota(folder: str, microseconds: int) -> dict[str, str]:
    where = f"sys/fs/cgroup/cpu{folder}"
    return {f"{where}/cpu.cfs_quota_us": str(microseconds), f"{where}/cpu.cfs_period_us": "100000\n"}


POD = {"cgroup": "0::/pod/app\n", "mounts": V2.format(root="/")}
DOCKER = {
    "cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
    "mounts": V1.format(root="/docker/1", name="memory") + V1.format(root="/docker/1", name="cpu,cpuacct"),
}
MACHINES = {
    "no-cgroup": Machine(),
    "no-limit": Machine(**POD, files=v2("/pod/app", "max", GIB)),
    "v2-own": Machine(**POD, files=v2("/pod/app", str(6 * GIB), 2 * GIB), memory=4, total=6),
    "v2-parent": Machine(
        **POD, files=v2("/pod/app", "max", 0) | v2("/pod", str(5 * GIB), 2 * GIB), memory=3, total=5
    ),
    "v2-page-cache": Machine(
        **POD, files=v2("/pod/app", str(6 * GIB), 5 * GIB, 4 * GIB), memory=5, total=6
    ),
    "v2-outside": Machine("0::/../other\n", V2.format(root="/"), v2("", str(3 * GIB), 0), memory=3, total=3),
    "v2-quota": Machine(**POD, files={"sys/fs/cgroup/pod/cpu.max": "250000 100000\n"}, threads=2),
    "v2-small-quota": Machine(**POD, files={"sys/fs/cgroup/pod/app/cpu.max": "50000 100000\n"}, threads=1),
    "v2-no-quota": Machine(**POD, files={"sys/fs/cgroup/pod/app/cpu.max": "max 100000\n"}),
    "v1-docker": Machine(**DOCKER, files=v1("", 6 * GIB, 5 * GIB, 3 * GIB), memory=4, total=6),
    "v1-no-limit": Machine(**DOCKER, files=v1("", 9223372036854771712, GIB)),
    "v1-quota": Machine(
        DOCKER["cgroup"].replace("cpu,cpuacct", "cpu"), V1.format(root="/", name="cpu"),
        quota("/docker/1", -1) | quota("/docker", 300000), threads=3,
    ),
    "no-overcommit": Machine(files={"proc/sys/vm/overcommit_memory": "2\n"}, memory=8),
}  # fmt: skip


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Machine, Path]:
    """A simulated machine and the folder in place of its root."""
    simulated = MACHINES[request.param]
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": simulated.cgroup,
        "proc/self/mountinfo": simulated.mounts,
    }
    for name, text in (files | simulated.files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return simulated, tmp_path


def test_python_reads_the_limits(machine: tuple[Machine, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, root = machine
    monkeypatch.setattr(limits, "_ROOT", root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert limits.available_memory() == expected.memory * GIB
    assert toolchain.cores() == expected.threads


@pytest.mark.engine
def test_the_engine_reads_the_same_limits_of_memory(
    machine: tuple[Machine, Path], engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected, root = machine
    shim = compile_shim(SHIM, tmp_path_factory.mktemp("shim"))
    command = [sys.executable, "-c", DEVICE_MEMORY, str(engine.lib)]
    ended = subprocess.run(
        command, env={"LD_PRELOAD": str(shim), "ROOT": str(root)}, capture_output=True, text=True, check=True
    )
    free, total = map(int, ended.stdout.split())
    all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total == (expected.total * GIB or all_of_it)
    assert free == min(expected.memory * GIB, total)


@pytest.mark.parametrize(
    ("given", "available", "ubatch"),
    [
        (["-c", "4096"], 24 * GIB, "2048"),
        (["-c", "1048576"], 22 * GIB, "1024"),
        (["-c", "1048576"], 64 * GIB, "2048"),
        (["-c", "4096"], 3 * GIB // 2, "512"),
        (["-c", "4096"], 5 * GIB, "1024"),
        (["-c", "4096", "-ub", "64"], GIB, "64"),
    ],
)
def test_the_ubatch_fits_into_memory(
    given: list[str], available: int, ubatch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_tools, "available_memory", lambda: available)
    words = llama_tools.tool_command(llama_tools.TOOLS["run"], Path("model.gguf"), given)
    option = "-ub" if "-ub" in words else "--ubatch-size"
    assert words[words.index(option) + 1] == ubatch and words.count(option) == 1


def test_a_conversion_uses_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --max-memory it takes smaller steps, but begins."""
    monkeypatch.setattr("kimi_gguf.convert.output.stream.available_memory", lambda: GIB // 2)
    small, given = Pace.within(None, 64), Pace.within(2 * GIB, 64)
    assert small.memory <= GIB // 8 < given.memory
    assert small.elements < CHUNK_ELEMENTS


@pytest.mark.engine
@pytest.mark.parametrize("ubatch", ["512", "2048"])
def test_a_small_address_space_is_enough(
    demo_gguf: Callable[[str], Path], engine: Engine, ubatch: str
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))

    command = [
        engine.bin / "llama-completion",
        "-m",
        demo_gguf("BF16"),
        "-p",
        "The sea",
        "-n",
        "2",
        "-no-cnv",
    ]
    ended = subprocess.run([*command, "-t", "1", "-ub", ubatch], preexec_fn=limit, capture_output=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def small_cgroup() -> Iterator[list[Path]]:
    """Lists of processes of real cgroups: 700 MB and half a processor."""
    found = []
    with ExitStack() as stack:
        for controller, name, value in (
            ("memory", "memory.limit_in_bytes", "700M"),
            ("cpu", "cpu.cfs_quota_us", "50000"),
        ):
            own = next(
                (folder for folder in limits._cgroups() if (folder / name).exists()), Path("/nonexistent")
            )
            folder = own / "kimi-gguf-test"
            try:
                folder.mkdir()
                stack.callback(folder.rmdir)
                (folder / name).write_text(value)
            except OSError:
                pytest.skip(f"needs the right to make a cgroup of the controller {controller} (version 1)")
            found.append(folder / "cgroup.procs")
        yield found


def test_a_container_is_recognized(small_cgroup: list[Path]) -> None:
    program = "from kimi_gguf.engine.limits import *; print(processors().value, available_memory() >> 20)"

    def enter() -> None:
        for processes in small_cgroup:
            processes.write_text(str(os.getpid()))

    told = subprocess.run([sys.executable, "-c", program], preexec_fn=enter, capture_output=True, text=True)
    threads, memory = map(int, told.stdout.split())
    assert threads == 1 and 600 <= memory <= 700


def test_a_cache_that_runs_no_programs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = os.statvfs(tmp_path).f_flag | os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path / "cache"))
    assert kimi_llama.main(["build"]) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path / 'cache'}: expected a file system that runs programs" in told
    assert "set KIMI_GGUF_CACHE" in told


def test_without_memory_an_error_names_the_limit() -> None:
    program = (
        "from kimi_gguf.scripts import commands; exit(commands._run(lambda: lambda: bytearray(1 << 40)))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))

    told = subprocess.run([sys.executable, "-c", program], preexec_fn=limit, capture_output=True, text=True)
    assert told.returncode == 2
    assert re.search(
        r"error: out of memory: \d{4} MiB are available \(ulimit -v\); raise the limit", told.stderr
    )
