"""ggml's devices, for the worker: the same libggml that its llama.cpp uses.

Flows in: the folder of a build's libraries. Flows out: what devices there are, and the pointer to one of them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # ggml_backend_dev_type


class Devices:
    """Those of a build, and of the backend that GGML_BACKEND_PATH names, as llama.cpp's programs have it."""

    def __init__(self) -> None:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        self._ggml = ggml = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / f"libggml.{suffix}"))
        for name in ("load", "dev_get", "dev_by_name"):
            getattr(ggml, f"ggml_backend_{name}").restype = ctypes.c_void_p
        for name in ("name", "description"):
            getattr(ggml, f"ggml_backend_dev_{name}").restype = ctypes.c_char_p
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        further = os.environ.get("GGML_BACKEND_PATH")
        if further and not ggml.ggml_backend_load(further.encode()):
            raise OSError(f"{further}: the backend cannot be loaded")

    def listed(self) -> list[dict[str, Any]]:
        """Name, description, kind and memory of each."""
        ggml, found = self._ggml, []
        for i in range(ggml.ggml_backend_dev_count()):
            device = ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(i)))
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append({
                "name": ggml.ggml_backend_dev_name(device).decode(),
                "description": ggml.ggml_backend_dev_description(device).decode(errors="replace"),
                "kind": KINDS[ggml.ggml_backend_dev_type(device)],
                "memory": total.value,
                "free": free.value,
            })  # fmt: skip
        return found

    def alone(self, name: str) -> Any:
        """A list of the one device, as llama_model_params wants it."""
        device = self._ggml.ggml_backend_dev_by_name(name.encode())
        if not device:
            raise OSError(f"no device {name}")
        return (ctypes.c_void_p * 2)(device, None)
