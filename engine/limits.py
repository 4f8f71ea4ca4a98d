"""How many processors and how much memory this process may use: of the machine, of its cgroups, of its own limits.

Input: /proc and /sys. Output: numbers, each with the limit that decided it. The engine reads the same limits of memory
(patches/fixes/0027-copies-without-room.patch).
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")  # tests put another one in its place
# In a cgroup's folder: the limit, what is used, and what the names of memory.stat begin with (version 2, version 1).
_MEMORY = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
# The page cache: it counts as used, and makes room when needed.
_RECLAIMABLE = ("inactive_file", "active_file")
_NO_OVERCOMMIT = 2  # of vm.overcommit_memory


@dataclass(frozen=True, order=True)
class Limit:
    """A number of processors or bytes, and what it is a limit of."""

    value: int
    source: str


def processors() -> Limit:
    """Processors that this process can keep busy: the affinity (with the cpuset), or whole ones of a smaller quota.

    More threads than that would wait for each other: the kernel stops all of them when the quota is used up.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = Limit(len(os.sched_getaffinity(0)), "affinity")
    else:
        allowed = Limit(os.cpu_count() or 1, "this machine")
    return min([allowed, *_quotas()])


def memory() -> Limit | None:
    """Bytes that this process may still allocate, reclaimable page cache included; None if the system does not say."""
    return min([*_machine(), *_cgroup_memory(), *_own()], default=None)


def available_memory() -> int | None:
    """The number of `memory`."""
    limit = memory()
    return None if limit is None else limit.value


def _machine() -> Iterator[Limit]:
    memory = _sizes("proc/meminfo")
    if "MemAvailable" in memory:
        yield Limit(memory["MemAvailable"], "this machine's memory")
    if _number(_ROOT / "proc/sys/vm/overcommit_memory") == _NO_OVERCOMMIT:
        room = memory.get("CommitLimit", 0) - memory.get("Committed_AS", 0)
        yield Limit(max(room, 0), "CommitLimit, since vm.overcommit_memory is 2")


def _cgroup_memory() -> Iterator[Limit]:
    for folder in _cgroups():
        for limit, used, prefix in _MEMORY:
            most, taken = _number(folder / limit), _number(folder / used)
            if most is None or taken is None:
                continue
            cached = sum(_statistic(folder / "memory.stat", prefix + name) for name in _RECLAIMABLE)
            yield Limit(max(most - max(taken - cached, 0), 0), f"{folder / limit}")


def _quotas() -> Iterator[Limit]:
    for folder in _cgroups():
        words = " ".join(_lines(folder / "cpu.max")).split()
        words = words or [
            word for name in ("quota", "period") for word in _lines(folder / f"cpu.cfs_{name}_us")
        ]
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            yield Limit(max(int(words[0]) // int(words[1]), 1), f"the CPU quota in {folder}")


def _own() -> Iterator[Limit]:
    """Limits of the process itself. What it uses counts, which is about what a program of its own would use."""
    pages = [int(word) for word in " ".join(_lines(_ROOT / "proc/self/statm")).split()]
    if sys.platform != "linux" or len(pages) < 6:
        return
    for name, kind, used in (("-v", resource.RLIMIT_AS, pages[0]), ("-d", resource.RLIMIT_DATA, pages[5])):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield Limit(max(soft - used * resource.getpagesize(), 0), f"ulimit {name}")


def _cgroups() -> Iterator[Path]:
    """Folders of the cgroups that this process is in, with their parents, of both versions and all controllers."""
    paths = {}  # path by controllers: none in version 2
    for line in _lines(_ROOT / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths[frozenset(filter(None, controllers.split(",")))] = path
    for line in _lines(_ROOT / "proc/self/mountinfo"):
        mount, _, rest = line.partition(" - ")
        kind, _, options = [*rest.split(" ", 2), "", ""][:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        inside, point = mount.split()[3:5]
        mounted = frozenset(options.strip().split(",")) if kind == "cgroup" else frozenset()
        path = next(
            (path for names, path in paths.items() if names <= mounted and bool(names) == bool(mounted)), "/"
        )
        relative = PurePosixPath(path.removeprefix(inside.rstrip("/")).lstrip("/"))
        if ".." in relative.parts:  # a cgroup outside of what is mounted
            relative = PurePosixPath()
        for folder in (relative, *relative.parents) if relative.parts else (relative,):
            yield _ROOT / point.lstrip("/") / folder


def _lines(path: Path) -> list[str]:
    """A file's lines; none if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


def _number(path: Path) -> int | None:
    """The number that a file consists of; None without a file, or for "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")), 0)


def _sizes(path: str) -> dict[str, int]:
    """Bytes by name, of a file with lines such as "MemAvailable:  1024 kB"."""
    words = [line.split() for line in _lines(_ROOT / path)]
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in (w for w in words if len(w) == 3)}
