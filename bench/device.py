"""The device that both builds compute on: which one, what it is called, its memory, its driver.

Flows in: a backend, how its build is loaded, perhaps a name. Flows out: a `Device`, for the worker and the record.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_gguf.bench.contender import Contender
from kimi_gguf.patches.errors import EngineError

GPUS = ("GPU", "IGPU")  # kinds of devices that can hold all layers


@dataclass(frozen=True)
class Device:
    """A GPU, as ggml names it and as its maker does."""

    backend: str  # what the builds are made for
    name: str  # such as CUDA0
    description: str
    memory: int  # bytes
    free: int
    driver: str | None  # None: nothing here tells


def find_device(backend: str, environment: Mapping[str, str], wanted: str | None) -> Device:
    """The device named, or the first one. environment: of the build. Raises `EngineError`."""
    with Contender(backend, environment) as process:
        there = [each for each in process.ask("devices")["devices"] if each["kind"] in GPUS]
    names = ", ".join(each["name"] for each in there) or "none"
    for each in there:
        if wanted in (None, each["name"]):
            return Device(
                backend, each["name"], each["description"], each["memory"], each["free"], driver_of(backend)
            )
    raise EngineError(
        f"no device {wanted}" if wanted else f"built for {backend}, but no device is there",
        found=names,
        todo="name one of those: --device"
        if there
        else "check the driver; kimi-llama doctor shows the devices",
    )


def driver_of(backend: str) -> str | None:
    """The driver and its version, where the system tells."""
    if backend == "cuda":
        version = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return version and f"NVIDIA {version}"
    if backend == "vulkan":
        lines = _said_all("vulkaninfo", "--summary")
        told = [line.partition("=")[2].strip() for line in lines if line.strip().startswith("driverInfo")]
        return told[0] if told else None
    return f"macOS {platform.mac_ver()[0]}" if backend == "metal" else None


def _said(*command: str) -> str | None:
    """The first line that a program prints."""
    return next(iter(_said_all(*command)), None)


def _said_all(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return ended.stdout.strip().splitlines() if ended.returncode == 0 else []
