"""Finds the device that both builds compute on.

Input: a backend, the environment of its build, optionally a name. Output: a `Device` with its memory and driver.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_gguf.bench.runner import Runner
from kimi_gguf.engine.errors import EngineError

GPUS = ("GPU", "IGPU")  # types of devices that can hold all layers


@dataclass(frozen=True)
class Device:
    """A GPU."""

    backend: str
    name: str  # in ggml, such as CUDA0
    description: str
    memory: int  # bytes
    free: int
    driver: str | None  # None: unknown


def find_device(backend: str, environment: Mapping[str, str], wanted: str | None) -> Device:
    """The named device, or the first one. environment: of the build. Raises `EngineError`."""
    with Runner(backend, environment) as process:
        there = [device for device in process.ask("devices")["devices"] if device["kind"] in GPUS]
    for device in there:
        if wanted in (None, device["name"]):
            facts = {key: device[key] for key in ("name", "description", "memory", "free")}
            return Device(backend=backend, driver=driver_of(backend), **facts)
    raise EngineError(
        f"no device {wanted}" if wanted else f"no {backend} device",
        found=", ".join(device["name"] for device in there) or "none",
        todo="choose one of these with --device"
        if there
        else "check the driver; kimi-llama doctor shows the devices",
    )


def driver_of(backend: str) -> str | None:
    """The driver and its version, if known."""
    if backend == "cuda":
        lines = _output_lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return f"NVIDIA {lines[0]}" if lines else None
    if backend == "vulkan":
        lines = _output_lines("vulkaninfo", "--summary")
        drivers = [line.partition("=")[2].strip() for line in lines if line.strip().startswith("driverInfo")]
        return drivers[0] if drivers else None
    return f"macOS {platform.mac_ver()[0]}" if backend == "metal" else None


def _output_lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return ended.stdout.strip().splitlines() if ended.returncode == 0 else []
