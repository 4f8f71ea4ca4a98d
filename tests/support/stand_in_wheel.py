"""A wheel of this version with stand-ins for its programs, and an environment to install it into.

Input: folders. Output: `dist/kimi_gguf-VERSION-py3-none-PLATFORM.whl`; an environment that is made in a second, because
pip is not copied into it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

from kimi_gguf.engine.version import VERSION

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


def pip_folder() -> Path:
    """The package pip, which is not imported: setuptools refuses to be imported after it."""
    found = find_spec("pip")
    assert found and found.origin
    return Path(found.origin).parent


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


def make_environment(folder: Path) -> dict[str, str]:
    """Make a virtual environment; the variables with which its `python -m pip` installs into it, without a network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (folder / "pip").mkdir()
    (folder / "pip/pip").symlink_to(pip_folder())
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder / "pip"), "PIP_NO_INDEX": "1"}
