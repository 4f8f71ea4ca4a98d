"""`from kimi_gguf.engine import llama_cpp`: llama-cpp-python's package with the libraries of the build that runs.

An installed llama-cpp-python stays as it is. In this process `import llama_cpp` then gives the same module, so that its
own modules find each other. Raises ImportError if another llama_cpp was imported before, and `EngineError` if there is
no build.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from kimi_gguf.engine.builds import select

_engine = select(make=False)
_folder = _engine.folder / "python"
_loaded = sys.modules.get("llama_cpp")
if _loaded is not None and not Path(str(_loaded.__file__)).is_relative_to(_folder):
    raise ImportError(
        f"llama_cpp was imported from {_loaded.__file__} before; import kimi_gguf.engine.llama_cpp first: two "
        "builds of llama.cpp cannot be in one process"
    )
os.environ["LLAMA_CPP_LIB_PATH"] = str(_engine.lib)
sys.path.insert(0, str(_folder))
try:
    sys.modules[__name__] = importlib.import_module("llama_cpp")
finally:
    sys.path.remove(str(_folder))
