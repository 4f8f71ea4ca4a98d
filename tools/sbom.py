"""The software bill of materials of a wheel: what is inside, its version, its licence, where it comes from.

Input: the pinned sources. Output: CycloneDX 1.6 as JSON, and the licence texts by file name. Source of the format:
https://cyclonedx.org/docs/1.6/json; PEP 770 for its place in a wheel.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.patches.pin import Pin

CPP: Final = "llama.cpp"


@dataclass(frozen=True)
class Component:
    """Something that the wheel's libraries were compiled from."""

    name: str
    licence: str  # SPDX
    notice: str  # file with the licence's text, in the unpacked archive
    version: str = ""  # or `pattern`
    pattern: tuple[str, str] | None = None  # a file there, and an expression for the version in it

    def found_version(self, source: Path) -> str:
        """The version, read from the sources if it is not known. Raises `EngineError`."""
        if self.pattern is None:
            return self.version
        file, expression = self.pattern
        found = re.search(expression, (source / file).read_text(encoding="utf-8", errors="replace"))
        if found is None:
            raise EngineError(
                f"{source / file}: no version of {self.name}",
                expected=expression,
                todo="correct tools/sbom.py",
            )
        return ".".join(found.groups())


def components(pin: Pin) -> tuple[Component, ...]:
    """What the pinned archive contributes. Complete are llama.cpp's `vendor/` and the compiled sources with a copyright
    notice or dedication of their own (tests compare). Not listed, because llama.cpp names their origin but no licence:
    functions from Arm's optimized routines and OpenVINO (ggml-cpu/vec.h), and the DRY sampler of Koboldcpp
    (llama-sampler.cpp)."""
    vendor = f"{CPP}/vendor"
    inside = pin.llama_cpp_commit  # the version of llama.cpp and of what its own sources contain
    return (
        Component("llama.cpp", "MIT", f"{CPP}/LICENSE", version=inside),
        Component("ggml", "MIT", f"{CPP}/LICENSE", version=pin.ggml_version),
        Component("llama-cpp-python", "MIT", "LICENSE.md", version=pin.version),
        Component(
            "cpp-httplib", "MIT", f"{vendor}/cpp-httplib/LICENSE",
            pattern=(f"{vendor}/cpp-httplib/httplib.h", r'CPPHTTPLIB_VERSION "([^"]+)"'),
        ),
        Component(
            "nlohmann-json", "MIT", f"{CPP}/licenses/LICENSE-jsonhpp",
            pattern=(
                f"{vendor}/nlohmann/json.hpp",
                r"NLOHMANN_JSON_VERSION_MAJOR (\d+)[^\n]*\n[^\n]*MINOR (\d+)[^\n]*\n[^\n]*PATCH (\d+)",
            ),
        ),
        Component(
            "miniaudio", "Unlicense OR MIT-0", f"{vendor}/miniaudio/miniaudio.h",
            pattern=(
                f"{vendor}/miniaudio/miniaudio.h",
                r"MA_VERSION_MAJOR +(\d+)\n[^\n]*MINOR +(\d+)\n[^\n]*REVISION +(\d+)",
            ),
        ),
        Component(
            "stb_image", "MIT OR Unlicense", f"{vendor}/stb/stb_image.h",
            pattern=(f"{vendor}/stb/stb_image.h", r"stb_image - v([\d.]+)"),
        ),
        Component("subprocess.h", "Unlicense", f"{vendor}/sheredom/subprocess.h", version="0dccaa9"),
        Component("xxHash", "BSD-2-Clause", f"{vendor}/hash/xxhash/LICENSE", version="9f465f1"),
        Component("sha1", "LicenseRef-public-domain", f"{vendor}/hash/sha1/sha1.c", version="e1e2536"),
        Component("sha256.c", "LicenseRef-public-domain", f"{vendor}/hash/sha256/LICENSE", version="5e63727"),
        Component("rotate-bits", "MIT", f"{vendor}/hash/rotate-bits/LICENSE.md", version="27e7849"),
        Component("tinyBLAS", "MIT", f"{CPP}/ggml/src/ggml-cpu/llamafile/sgemm.cpp", version=inside),
        Component("YaRN", "MIT", f"{CPP}/ggml/src/ggml-cpu/ops.cpp", version=inside),
        Component("ggllm.cpp", "MIT", f"{CPP}/src/llama-vocab.cpp", version=inside),
        Component("base64.hpp", "Unlicense", f"{CPP}/common/base64.hpp", version=inside),
        Component(
            "string-algorithms", "LicenseRef-public-domain", f"{CPP}/src/llama-sampler.cpp", version=inside
        ),
        Component("Pillow", "MIT-CMU", f"{CPP}/tools/mtmd/mtmd-image.cpp", version=inside),
    )  # fmt: skip


def notices(source: Path, pin: Pin) -> dict[str, bytes]:
    """The licence texts by file name."""
    return {
        f"{each.name}.txt": _notice((source / each.notice).read_bytes(), each) for each in components(pin)
    }


def _notice(text: bytes, component: Component) -> bytes:
    """A whole licence file; of a source, the comment that grants the licence or names the origin."""
    if component.notice.rsplit("/", 1)[-1].startswith("LICENSE"):
        return text
    comments: list[bytes] = re.findall(rb"/\*.*?\*/|(?:[ \t]*//[^\n]*\n)+", text, re.DOTALL)
    words = (
        b"without restriction", b"free and unencumbered", b"100% Public Domain", b"MIT licensed", b"[MIT License]",
        b"github.com/python-pillow", b"public domain implementation",
    )  # fmt: skip
    granting = [comment for comment in comments if any(word in comment for word in words)]
    if not granting:
        raise EngineError(
            f"{component.notice}: no comment grants a licence",
            todo="look at the file, correct tools/sbom.py",
        )
    return b"\n\n".join(granting) + b"\n"


def sbom(source: Path, pin: Pin, version: str, licence: str) -> bytes:
    """The document, without a time or a random number, so that equal inputs give equal bytes."""
    parts = [
        {
            "type": "library",
            "name": each.name,
            "version": each.found_version(source),
            "licenses": [_licence(each.licence)],
            "bom-ref": each.name,
        }
        for each in components(pin)
    ]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "name": "kimi-gguf",
                "version": version,
                "licenses": [_licence(licence)],
                "bom-ref": "kimi-gguf",
                "purl": f"pkg:pypi/kimi-gguf@{version}",
            }
        },
        "components": parts,
        "dependencies": [{"ref": "kimi-gguf", "dependsOn": [part["name"] for part in parts]}],
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def _licence(spdx: str) -> dict[str, object]:
    if spdx.startswith("LicenseRef-"):
        return {"license": {"name": spdx.removeprefix("LicenseRef-").replace("-", " ")}}
    return {"expression": spdx} if " " in spdx else {"license": {"id": spdx}}
