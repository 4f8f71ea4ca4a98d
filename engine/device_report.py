"""The operators of a build on the GPUs of this machine, for `kimi-llama doctor --devices`.

Input: the build that runs. Its program kimi-verify checks each GPU again and prints lines of fields (kimi-verify.cpp).
Output: `DeviceReport`, as text for an issue or as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from kimi_gguf.engine.build_spec import VERIFY
from kimi_gguf.engine.builds import Engine, select
from kimi_gguf.engine.doctor import list_devices
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import machine_facts

NOT_MEASURED = ("absent", "not checked", "HANGS", "CRASHES")


@dataclass(frozen=True)
class Part:
    """The result for one operator, or for a path inside one. case: the worst one, or why it was not checked."""

    name: str
    state: str
    nmse: float
    bound: float
    case: str

    def figures(self) -> tuple[float, float] | None:
        """The NMSE and its bound; None if there is no result to compare."""
        return None if self.state in NOT_MEASURED else (self.nmse, self.bound)


@dataclass(frozen=True)
class Device:
    """A GPU. facts: device, driver, build, and why it could not be checked (problem). seconds: started, checked."""

    facts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class DeviceReport:
    """What was checked, with which build and system. passed: all operators that the devices have are used."""

    build: str
    commit: str
    system: str
    devices: tuple[Device, ...]
    passed: bool

    def as_text(self) -> str:
        """A text for an issue."""
        lines = [
            "kimi-llama doctor --devices",
            f"build    {self.build}, {self.commit}",
            f"system   {self.system}",
        ]
        return "\n".join([*lines, *(line for device in self.devices for line in _device_lines(device))])

    def as_json(self) -> str:
        """All data. A figure that is not finite is null."""
        devices = [
            {**vars(device), "parts": [_part_data(part) for part in device.parts]} for device in self.devices
        ]
        return json.dumps({**vars(self), "devices": devices}, indent=2)


def check_devices() -> DeviceReport:
    """Check the operators on each GPU again, with the build that runs if none is named."""
    engine = select(make=False)
    devices, passed = _verify(engine)
    if not devices:
        list_devices(engine)  # an error if the build is for GPUs
    facts = machine_facts()
    system = f"{facts['system']}, {facts['processor']}"
    return DeviceReport(engine.label(), engine.manifest["commit"], system, devices, passed)


def _verify(engine: Engine) -> tuple[tuple[Device, ...], bool]:
    program = engine.bin / VERIFY
    if not os.access(program, os.X_OK):
        raise EngineError(
            f"{program}: the program that checks the devices is missing",
            todo=f"remove {engine.folder} and run kimi-llama build --backend {engine.backends[0]}",
        )
    ended = subprocess.run([program], stdout=subprocess.PIPE, text=True, errors="replace", check=False)
    if ended.returncode not in (0, 1):
        raise EngineError(f"{program}: no result", found=f"exit status {ended.returncode}")
    devices: list[Device] = []
    for line in ended.stdout.splitlines():
        kind, *fields = line.split("\t")
        if kind == "device":
            devices.append(Device())
        if kind == "result":
            name, state, nmse, bound, case = fields
            devices[-1].parts.append(Part(name, state, float(nmse), float(bound), case))
        elif kind in ("started", "checked"):
            devices[-1].seconds[kind] = float(fields[0])
        elif fields:
            devices[-1].facts[kind] = fields[0].replace(str(Path.home()), "~")  # the text is for an issue
    return tuple(devices), ended.returncode == 0


def _device_lines(device: Device) -> list[str]:
    facts, seconds = device.facts, device.seconds
    lines = ["", *(f"{name:8} {facts[name]}" for name in ("device", "driver", "build"))]
    if seconds:
        lines.append(f"checked  in {seconds['checked']:.2f} s, after {seconds['started']:.2f} s of start-up")
    lines += ["", f"{'operator':26} {'result':11} {'NMSE':>8} {'bound':>8}  case"]
    for part in device.parts:
        figures = part.figures()
        numbers = f"{figures[0]:8.1e} {figures[1]:8.1e}" if figures else " " * 17
        case = part.case or (facts.get("problem", "") if part.state == "not checked" else "")
        lines.append(f"{part.name:26} {part.state:11} {numbers}  {case}".rstrip())
    return lines


def _part_data(part: Part) -> dict[str, str | float | None]:
    nmse, bound = part.figures() or (None, None)
    finite = nmse if nmse is not None and math.isfinite(nmse) else None
    return {**vars(part), "nmse": finite, "bound": bound}
