"""scripts/demo installs the wheel in dist/ and runs every step. The wheel is one of stand-ins for the programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from kimi_gguf.engine.version import VERSION

ROOT = Path(__file__).parents[2]
PROGRAMS = ("convert-kimi", "kimi-llama", "validate-kimi")
# Shows its arguments, and writes the file that the next step needs.
STAND_IN = """
import pathlib, sys

def main():
    program, *words = pathlib.Path(sys.argv[0]).name, *sys.argv[1:]
    print({name!r}, program, *words)
    for option, name in (("-o", ""), ("--out", "report.html")):
        if option in words:
            file = pathlib.Path(words[words.index(option) + 1], name)
            file.parent.mkdir(exist_ok=True)
            file.touch()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What scripts/demo reads of a checkout."""
    folder = tmp_path / "checkout"
    for name in ("scripts/demo", "engine/version.py", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def write_wheel(checkout: Path, name: str) -> None:
    """A wheel of this version in dist/, whose programs print `name`."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    (checkout / "dist").mkdir(exist_ok=True)
    info = f"kimi_gguf-{VERSION}.dist-info"
    scripts = "".join(f"{program} = stand_in:main\n" for program in PROGRAMS)
    files = {
        "stand_in.py": STAND_IN.format(name=name),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: kimi-gguf\nVersion: {VERSION}\nProvides-Extra: validate\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{platform}\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{scripts}",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(checkout / f"dist/kimi_gguf-{VERSION}-py3-none-{platform}.whl", "w") as wheel:
        for file, content in (*files.items(), (f"{info}/RECORD", record)):
            wheel.writestr(file, content)


def demo(checkout: Path) -> list[str]:
    """The lines that scripts/demo prints."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [checkout / "scripts/demo"], env=environment | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_new_wheel_of_the_same_version_replaces_the_installed_one(checkout: Path) -> None:
    for name in ("first", "second"):
        write_wheel(checkout, name)
        ran = [line for line in demo(checkout) if line.split(" ")[0] in ("first", "second")]
        assert [line.split(" ")[1] for line in ran] == [
            *["convert-kimi"] * 2, *["kimi-llama"] * 3, *["validate-kimi"] * 2
        ]  # fmt: skip
        assert {line.split(" ")[0] for line in ran} == {name}
    noted = next(checkout.glob("out/venv/lib/python*/site-packages/stand_in.py"))
    before = noted.stat().st_mtime_ns
    assert demo(checkout)[-1].endswith("out/report-BF16/report.html out/report-Q8_0/report.html ")
    assert noted.stat().st_mtime_ns == before, "the same wheel is not installed again"
